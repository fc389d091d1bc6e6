"""Prediction with heads that look at whole studies, and files of models with extensions."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import expit
from torch import nn

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.core.errors import CheckpointError, ConfigError, PredictionError
from hilum.core.seeding import forked
from hilum.core.types import view_kind
from hilum.deploy import model_files as files
from hilum.deploy.network import Network, choose_device, raw_probabilities
from hilum.evaluation.predictions import Predictions
from hilum.heads.extension import ExtendedHead, grown_state, norms_and_biases, per_finding
from hilum.heads.registry import HeadConfig, build_head

LINEAR = HeadConfig("linear", 12, 2, 2)
DECODER = HeadConfig("ml_decoder", 12, 3, 2, decoder_dim=8, decoder_feed_forward=12, decoder_heads=2)
NAMES = ("Edema", "Hernia", "Mass")


def finding(name: str, trained: bool = True) -> files.Finding:
    return files.Finding(name, "head", trained, 5, 10)


def network_config(head: HeadConfig, names=NAMES, extensions=(), **changes) -> files.NetworkConfig:
    backbone = ViTConfig(12, 2, 2, patch_size=8, image_size=16, layer_scale=0.5)
    findings = tuple(finding(name) for name in names)
    return files.NetworkConfig(backbone, head, findings, "hilum-grey-1", 16, None, extensions=extensions, **changes)


def make_backbone() -> VisionTransformer:
    with forked(0, "test"):
        return VisionTransformer(ViTConfig(12, 2, 2, patch_size=8, image_size=16, layer_scale=0.5))


def make_head(config: HeadConfig, stream: str = "head"):
    with forked(0, stream):
        return build_head(config)


@pytest.mark.parametrize("name", ["mps", "meta", "tpu", "", "cuda:99"])
def test_devices_that_are_not_here_or_not_known_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        choose_device(name)


class StudyHead(nn.Module):
    """Every image of a study gets the largest [CLS] logit of the study, moved by what views it has."""

    needs_patches, needs_studies = False, True

    def __init__(self) -> None:
        super().__init__()
        with forked(0, "study head"):
            self.linear = nn.Linear(24, 2)

    def forward(self, features):
        own = self.linear(features.cls) + 0.5 * features.view[:, None]
        same = features.study[:, None] == features.study[None]
        return torch.where(same[:, :, None], own[None], -torch.inf).amax(dim=1)


def study_network(flip: bool = False) -> Network:
    network = Network(network_config(LINEAR, NAMES[:2], flip_average=flip), make_backbone(), make_head(LINEAR))
    network.head = StudyHead()  # a stand-in: what matters here is what it is given
    return network


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (9, 18, 20), np.uint8)


STUDIES = np.array(["b", "a", "", "b", "a", "", "a", "c", "b"])
VIEWS = np.array(["PA", "LATERAL", "AP", "LATERAL", "PA", "UNKNOWN", "AP", "PA", "OTHER"])


@pytest.mark.parametrize("flip", [False, True])
def test_every_image_carries_its_study_whatever_the_batches(images: np.ndarray, flip: bool) -> None:
    network = study_network(flip)
    squares = [network.crop(image) for image in images]
    expected = np.zeros((9, 2))
    for number in range(9):  # study by study, written out
        same = [other for other in range(9) if STUDIES[number] and STUDIES[other] == STUDIES[number]] or [number]
        for mirrored in (False, True) if flip else (False,):
            pixels = np.stack([squares[one][:, ::-1] if mirrored else squares[one] for one in same])
            features = network.features(torch.from_numpy(pixels.copy())[:, None])
            kinds = torch.tensor([view_kind(VIEWS[one]) for one in same])
            logits = (network.head.linear(features.cls) + 0.5 * kinds[:, None]).amax(dim=0)
            expected[number] += torch.sigmoid(logits.double()).detach().numpy() / (2 if flip else 1)
    for size in (1, 2, 4, 32):
        done = []
        [values], kept = raw_probabilities(
            [network], range(9), lambda index: images[index], size, 1, done.append, studies=STUDIES, views=VIEWS
        )
        assert kept.tolist() == list(range(9))
        assert sum(done) == 9
        np.testing.assert_allclose(values, expected, atol=1e-6)
    numbers = np.array([5, 3, 70, 5, 3, 71, 3, 9, 5])
    kinds = np.array([view_kind(view) for view in VIEWS])
    [again], _ = raw_probabilities([network], range(9), lambda index: images[index], 4, 1, studies=numbers, views=kinds)
    np.testing.assert_allclose(again, expected, atol=1e-6)


def test_what_cannot_be_read_is_left_out_and_the_rest_of_its_study_is_used(images: np.ndarray) -> None:
    network = study_network()
    [values], kept = raw_probabilities(
        [network], range(9), lambda index: None if index in (8, 2, 7) else images[index], 3, 1, studies=STUDIES,
        views=VIEWS,
    )  # fmt: skip
    assert kept.tolist() == [0, 1, 3, 4, 5, 6]
    left = kept.tolist()
    [alone], _ = raw_probabilities(
        [network], left, lambda index: images[index], 32, 1, studies=STUDIES[left], views=VIEWS[left]
    )
    np.testing.assert_allclose(values, alone, atol=1e-6)
    [whole], _ = raw_probabilities(
        [network], range(9), lambda index: images[index], 32, 1, studies=STUDIES, views=VIEWS
    )
    assert np.abs(whole[3] - values[2]).max() > 1e-3  # image 8 mattered to its study


def test_without_study_ids_an_image_is_a_study_of_its_own(images: np.ndarray) -> None:
    network = study_network()
    [values], _ = raw_probabilities([network], range(9), lambda index: images[index], 4, 1)
    [alone], _ = raw_probabilities([network], range(9), lambda index: images[index], 1, 1, studies=np.full(9, ""))
    np.testing.assert_allclose(values, alone, atol=1e-6)
    assert len(np.unique(values[:, 0])) == 9


def test_a_head_of_single_images_is_told_of_no_study(images: np.ndarray) -> None:
    network = Network(network_config(DECODER), make_backbone(), make_head(DECODER))
    assert network.features(torch.from_numpy(np.stack([network.crop(images[0])]))[:, None]).study is None
    [values], _ = raw_probabilities([network], range(9), lambda index: images[index], 4, 1, studies=STUDIES)
    [same], _ = raw_probabilities([network], range(9), lambda index: images[index], 4, 1)
    assert np.array_equal(values, same)


def extended(tmp_path: Path, main: HeadConfig, added: HeadConfig, shared=()) -> tuple[files.NetworkConfig, Path]:
    """A model of two or three findings, written with and without an extension of `added.findings` more."""
    backbone, head = make_backbone(), make_head(main)
    names = NAMES[: main.findings]
    plain = network_config(main, names)
    new = tuple(f"New {number}" for number in range(added.findings))
    config = dataclasses.replace(
        plain,
        findings=plain.findings + tuple(finding(name) for name in new),
        extensions=(files.Extension(added, new, tuple(shared), False, {}, {}),),
    )
    extension = make_head(added, "extension")
    if shared:
        own = head.state_dict()
        extension.load_state_dict({n: own[n] if n in shared else v for n, v in extension.state_dict().items()})
    outputs = [main.findings, added.findings]
    for folder, description, module in (
        ("old", plain, head), ("new", config, ExtendedHead(head, [extension], outputs)),
    ):  # fmt: skip
        (tmp_path / folder).mkdir()
        weights = files.write_weights(tmp_path / folder, backbone, module, description.extensions)
        content = {"format": files.MODEL_FORMAT, **files.describe(description), "weights": weights}
        files.write_config(tmp_path / folder, content)
    return config, tmp_path


def read(folder: Path) -> Network:
    content = files.read_config(folder)
    config = files.read_network(folder, content)
    return Network(config, *files.read_weights(folder, config, content["weights"]["sha256"]))


ADDED = dataclasses.replace(DECODER, findings=2)


@pytest.mark.parametrize("main", [LINEAR, DECODER], ids=["linear", "decoder"])
@pytest.mark.parametrize("added", [dataclasses.replace(LINEAR, findings=3), ADDED], ids=["linear", "decoder"])
@pytest.mark.parametrize("size", [1, 4, 9])
def test_old_outputs_are_the_same_bits_and_old_tensors_the_same_bytes(
    tmp_path: Path, images: np.ndarray, main: HeadConfig, added: HeadConfig, size: int
) -> None:
    extended(tmp_path, main, added)
    before, after = load_file(tmp_path / "old" / "model.safetensors"), load_file(tmp_path / "new" / "model.safetensors")
    for name, tensor in before.items():
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes()
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"extension"}
    outputs = []
    for folder in ("old", "new"):
        [values], _ = raw_probabilities([read(tmp_path / folder)], range(9), lambda index: images[index], size, 1)
        outputs.append(values)
    old, new = outputs
    assert np.array_equal(old, new[:, : main.findings])
    assert new.shape == (9, main.findings + added.findings)
    assert "extensions" not in json.loads((tmp_path / "old" / "config.json").read_text())


def test_shared_tensors_are_written_once_and_are_one_object(tmp_path: Path, images: np.ndarray) -> None:
    axes = per_finding(ADDED)
    shared = [name for name in make_head(ADDED).state_dict() if name not in axes]
    assert len(shared) > 10
    extended(tmp_path, DECODER, ADDED, shared)
    state = load_file(tmp_path / "new" / "model.safetensors")
    assert {name.removeprefix("extension.0.") for name in state if name.startswith("extension")} == set(axes)
    network = read(tmp_path / "new")
    main, added = network.head.heads
    for name in shared:
        assert main.get_parameter(name) is added.get_parameter(name)
    squares = torch.from_numpy(np.stack([network.crop(image) for image in images]))[:, None]
    with torch.no_grad():
        expected = expit(added(network.features(squares)).double().numpy())
    assert np.array_equal(network.probabilities(squares)[:, 3:], expected)


def test_a_linear_head_and_a_decoder_beside_it_both_have_maps(tmp_path: Path, images: np.ndarray) -> None:
    extended(tmp_path, LINEAR, ADDED)
    network = read(tmp_path / "new")
    squares = torch.from_numpy(np.stack([network.crop(images[0])]))[:, None]
    maps = network.attention(network.features(squares), squares)
    assert maps.shape == (1, 4, 2, 2)
    assert (maps >= 0).all()
    np.testing.assert_allclose(maps.sum(axis=(2, 3)), 1, atol=1e-6)


def test_descriptions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    extended(tmp_path, DECODER, ADDED)
    content = files.read_config(tmp_path / "new")
    one = content["extensions"][0]
    for wrong in (
        content | {"findings": content["findings"][:-1]},
        content | {"extensions": [one | {"findings": ["New 1", "New 0"]}]},
        content | {"extensions": [one | {"head": one["head"] | {"blocks": 1}}]},
        content | {"extensions": [{name: value for name, value in one.items() if name != "shared"}]},
        content | {"extensions": []},
    ):
        with pytest.raises(CheckpointError, match="does not describe a model"):
            files.read_network(tmp_path / "new", wrong)
    for shared in ("decoder.embed_standart.weight", "decoder.nothing"):  # in the file as well; not in the first head
        config = files.read_network(tmp_path / "new", content | {"extensions": [one | {"shared": [shared]}]})
        with pytest.raises(CheckpointError, match=rf"extension.0.*{shared}"):
            files.read_weights(tmp_path / "new", config, content["weights"]["sha256"])


def predictions(uids: list[str], names: tuple[str, ...], value: float) -> Predictions:
    empty = np.full(len(uids), "")
    return Predictions(
        np.array(uids), empty, empty, empty, empty, empty, names, np.full((len(uids), len(names)), value)
    )


def test_validation_of_extensions_is_joined_by_image_or_refused(tmp_path: Path) -> None:
    uids = [f"{number:016x}" for number in range(4)]
    files.write_validation(tmp_path, predictions(uids, ("A", "B"), 0.5), np.zeros((4, 2), np.int8))
    added = np.array([[1], [0], [0], [-1]], np.int8)
    files.write_validation(tmp_path, predictions(uids[::-1], ("C",), 0.25), added, extension=0)
    one = {"zero_shot": False, "findings": ["C"]}
    files.write_config(tmp_path, {"extensions": [one]})
    joined, labels = files.read_validation(tmp_path)
    assert joined.findings == ("A", "B", "C")
    assert labels[:, 2].tolist() == [-1, 0, 0, 1]
    assert joined.probabilities[0].tolist() == [0.5, 0.5, 0.25]
    files.write_validation(tmp_path, predictions([*uids[:3], "f" * 16], ("C",), 0.25), added, extension=0)
    with pytest.raises(PredictionError, match="C were added on other validation images"):
        files.read_validation(tmp_path)
    files.write_config(tmp_path, {"extensions": [one | {"zero_shot": True}]})
    with pytest.raises(PredictionError, match=r"scores C from text alone.*from before they were added"):
        files.read_validation(tmp_path)


def test_what_a_finding_owns_is_found_for_every_head() -> None:
    assert per_finding(LINEAR) == {"linear.weight": 0, "linear.bias": 0}
    axes = per_finding(DECODER)
    assert axes == {
        "decoder.query_embed.weight": 0, "decoder.duplicate_pooling": 0, "decoder.duplicate_pooling_bias": 0,
    }  # fmt: skip
    adapter = norms_and_biases(make_head(DECODER).state_dict())
    assert "decoder.layers.0.norm1.weight" in adapter
    assert "decoder.embed_standart.bias" in adapter
    assert "decoder.embed_standart.weight" not in adapter


def test_a_grown_head_takes_over_all_but_the_rows_and_rows_of_parents() -> None:
    trained, fresh = make_head(DECODER).state_dict(), make_head(ADDED, "fresh").state_dict()
    state = grown_state(fresh, trained, per_finding(ADDED), {1: 2})
    for name, value in state.items():
        if name not in per_finding(ADDED):
            assert torch.equal(value, trained[name])
        else:
            assert torch.equal(value[0], fresh[name][0])
            assert torch.equal(value[1], trained[name][2])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_old_outputs_are_the_same_bits_on_a_gpu_at_the_same_batch_shape(
    tmp_path: Path, images: np.ndarray, precision: str
) -> None:
    extended(tmp_path, DECODER, ADDED)
    outputs = []
    for folder in ("old", "new"):
        content = files.read_config(tmp_path / folder)
        config = dataclasses.replace(files.read_network(tmp_path / folder, content), precision=precision)
        weights = files.read_weights(tmp_path / folder, config, content["weights"]["sha256"])
        [values], _ = raw_probabilities([Network(config, *weights, "cuda")], range(9), lambda index: images[index], 4)
        outputs.append(values)
    assert np.array_equal(outputs[0], outputs[1][:, :3])
