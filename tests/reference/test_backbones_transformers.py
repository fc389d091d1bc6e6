"""Hilum's backbone against `transformers`: the same file, the same tokens, at every size and with every option.

Every parameter is redrawn so that no block is near the identity: at LayerScale 1e-5 nothing here could fail. A test
of the test shows that each single parameter matters.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hilum.backbones.sources import Source
from hilum.backbones.vit import Tokens, VisionTransformer
from hilum.backbones.weights import GREY_MEAN, GREY_STD, load_backbone, read_backbone_config
from hilum.core.seeding import torch_stream

transformers = pytest.importorskip("transformers")

PATCH, SIDE = 14, 56
MEAN, STD = (0.5307, 0.5307, 0.5307), (0.2583, 0.2583, 0.2583)  # RAD-DINO's
SIZES = {"native": (56, 56), "larger": (84, 84), "smaller": (28, 28), "wide": (56, 98), "tall and small": (70, 28)}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
KINDS = [(registers, swiglu) for registers in (0, 4) for swiglu in (False, True)]


def redraw(model: nn.Module) -> None:
    """Gains around 1, everything else far from 0, so that each token depends on each parameter."""
    generator = torch_stream(0, "redrawn")
    for name, parameter in model.named_parameters():
        gain = name.endswith("lambda1") or ("norm" in name and name.endswith("weight"))
        spread = 0.2 if parameter.dim() != 2 else parameter.shape[1] ** -0.5
        drawn = torch.randn(parameter.shape, generator=generator) * spread
        parameter.data.copy_(drawn + 1 if gain else drawn)


def peer(registers: int, swiglu: bool, channels: int = 3) -> nn.Module:
    options: dict[str, Any] = {
        "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH,
        "use_swiglu_ffn": swiglu, "num_channels": channels, "attn_implementation": "eager",
    }  # fmt: skip  # 24 channels a head: only the description tells
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **options)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**options))
    redraw(model)
    return model.eval()


def write(model: Any, folder: Path, mean: Any = MEAN, std: Any = STD) -> None:
    model.save_pretrained(folder)
    processor = {"do_normalize": True, "image_mean": mean, "image_std": std, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def expected(model: nn.Module, images: torch.Tensor, registers: int, mask: torch.Tensor | None = None) -> Tokens:
    with torch.no_grad():
        tokens = model(images, bool_masked_pos=mask).last_hidden_state
    return Tokens(tokens[:, 0], tokens[:, 1 : 1 + registers], tokens[:, 1 + registers :])


def as_published(folder: Path) -> VisionTransformer:
    """The file's own weights in our transformer, with three channels: before anything is folded."""
    source = Source.at(folder)
    model = VisionTransformer(source.config)
    model.load_state_dict(source.read_checked())
    return model.eval()


def difference(a: Tokens, b: Tokens) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True) if x.numel())


def colours(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch_stream(0, "colours", height, width))


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]} registers, {('mlp', 'swiglu')[kind[1]]}")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, int]:
    registers, swiglu = request.param
    model = peer(registers, swiglu)
    folder = tmp_path_factory.mktemp("peer")
    write(model, folder)
    return model, folder, registers


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_tokens_are_equal(pair: tuple[Any, Path, int], size: str) -> None:
    model, folder, registers = pair
    images = colours(*SIZES[size])
    with torch.no_grad():
        found = as_published(folder)(images)
    for a, b in zip(found, expected(model, images, registers), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_masked_patches_are_equal(pair: tuple[Any, Path, int]) -> None:
    model, folder, registers = pair
    images = colours(*SIZES["wide"])
    mask = torch.rand(2, 28, generator=torch_stream(0, "mask")) < 0.4
    with torch.no_grad():
        [found] = as_published(folder).forward_crops([images], [mask])
    for a, b in zip(found, expected(model, images, registers, mask), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("size", ["native", "wide"])
def test_what_load_backbone_returns_is_equal_on_grey_pixels(pair: tuple[Any, Path, int], size: str) -> None:
    """Folded to one channel, with the mean and deviation that stand beside the weights."""
    model, folder, registers = pair
    pixels = torch.rand(2, 1, *SIZES[size], generator=torch_stream(0, "grey"))
    with torch.no_grad():
        found = load_backbone(folder)((pixels - GREY_MEAN) / GREY_STD)
    normalised = (pixels.expand(-1, 3, -1, -1) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    for a, b in zip(found, expected(model, normalised, registers), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_every_parameter_matters(pair: tuple[Any, Path, int]) -> None:
    """The proof that the tests above can fail: any one tensor set to zero is seen a hundred times over."""
    model, folder, registers = pair
    images = colours(*SIZES["wide"])
    reference = expected(model, images, registers)
    ours = as_published(folder)
    unseen = {}
    with torch.no_grad():
        assert difference(ours(images), reference) < 1e-4
        for name, parameter in ours.named_parameters():
            kept = parameter.clone()
            parameter.zero_()
            change = difference(ours(images), reference)
            parameter.copy_(kept)
            if not change > 1e-3:
                unseen[name] = change
    assert set(unseen) == {"mask_token"}  # which is for masked patches: a test of its own, above


def test_names_in_memory_are_read_too(pair: tuple[Any, Path, int], tmp_path: Path) -> None:
    """A state_dict saved as it is has other names (q_proj, gate_proj) than save_pretrained writes."""
    model, folder, _ = pair
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    theirs, ours = as_published(folder).state_dict(), as_published(tmp_path / "state.safetensors").state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_positions_laid_out_for_another_size_are_equal(pair: tuple[Any, Path, int]) -> None:
    model, folder, registers = pair
    pixels = torch.rand(2, 1, 84, 84, generator=torch_stream(0, "grey"))
    loaded = load_backbone(folder, image_size=84)
    assert loaded.config.image_size == 84
    with torch.no_grad():
        found = loaded((pixels - GREY_MEAN) / GREY_STD)
    normalised = (pixels.expand(-1, 3, -1, -1) - MEAN[0]) / STD[0]
    for a, b in zip(found, expected(model, normalised, registers), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_the_description_says_what_was_done(pair: tuple[Any, Path, int]) -> None:
    model, folder, registers = pair
    described = read_backbone_config(folder)
    assert (described["format"], described["layout"], described["preprocess_id"]) == (
        "imported", "transformers", "hilum-grey-1",
    )  # fmt: skip
    assert described["normalisation"] == {"mean": list(MEAN), "std": list(STD), "from": "preprocessor_config.json"}
    assert (described["left_out"], described["filled"]) == ({}, {})
    architecture = described["architecture"]
    assert (architecture["num_heads"], architecture["registers"], architecture["in_channels"]) == (4, registers, 1)
    assert architecture["feed_forward"] == ("swiglu" if model.config.use_swiglu_ffn else "mlp")


@pytest.mark.parametrize("registers", [0, 4])
def test_a_classifier_on_top_is_left_out_by_name(tmp_path: Path, registers: int) -> None:
    options: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": SIDE, "patch_size": PATCH,
        "num_labels": 3,
    }  # fmt: skip
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **options)
        model = transformers.Dinov2WithRegistersForImageClassification(config)
    else:
        model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(use_mask_token=False, **options))
    redraw(model)
    write(model, tmp_path)
    described = read_backbone_config(tmp_path)
    assert described["left_out"] == {"a classifier": ["classifier.bias", "classifier.weight"]}
    assert described["filled"].keys() == (set() if registers else {"mask_token"})
    images = colours(SIDE, SIDE)
    with torch.no_grad():
        found = as_published(tmp_path)(images)
    for a, b in zip(found, expected(model.base_model.eval(), images, registers), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_one_channel_with_a_described_normalisation_is_folded(tmp_path: Path) -> None:
    model = peer(0, False, channels=1)
    write(model, tmp_path, [0.4], [0.3])
    assert read_backbone_config(tmp_path)["preprocess_id"] == "hilum-grey-1"
    pixels = torch.rand(2, 1, SIDE, SIDE, generator=torch_stream(0, "grey"))
    with torch.no_grad():
        found = load_backbone(tmp_path)((pixels - GREY_MEAN) / GREY_STD)
    for a, b in zip(found, expected(model, (pixels - 0.4) / 0.3, 0), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.slow
def test_rad_dino_at_full_size(tmp_path: Path) -> None:
    """ViT-B/14 for 518 pixels, 12 blocks, as RAD-DINO is published (its own weights are not at hand)."""
    model = transformers.Dinov2Model(transformers.Dinov2Config(image_size=518, patch_size=14, layerscale_value=1.0))
    redraw(model)
    write(model.eval(), tmp_path)
    pixels = torch.rand(1, 1, 518, 518, generator=torch_stream(0, "grey"))
    loaded = load_backbone(tmp_path)
    with torch.no_grad():
        found = loaded((pixels - GREY_MEAN) / GREY_STD)
    for a, b in zip(found, expected(model, (pixels.expand(-1, 3, -1, -1) - MEAN[0]) / STD[0], 0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-5)  # twelve blocks of gain 1: rounding adds up
    assert load_backbone(tmp_path, patch_size=16, image_size=512).config.grid == 32
