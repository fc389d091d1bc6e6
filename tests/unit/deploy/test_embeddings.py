"""What a finding's query pools, head by head: what its class weights are put on, or the map's mean of patches."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.core.errors import CheckpointError, ConfigError, UnknownNameError
from hilum.core.seeding import forked
from hilum.data.store import Store
from hilum.data.transforms import normalise, preprocessing
from hilum.deploy.embeddings import embed_finding, embed_many, embed_study, mean_of, study_means, unit
from hilum.deploy.encoder import Encoder, load_encoder
from hilum.deploy.gradients import gradient_map
from hilum.deploy.predictor import load
from hilum.deploy.screening import fit_screening
from hilum.heads.evidence import maps_of
from hilum.heads.extension import ExtendedHead
from hilum.heads.features import extract, freeze
from hilum.heads.registry import HeadConfig, build_head

RECIPE = "hilum-grey-1"
NAMES = ("Edema", "Hernia", "Mass", "Nodule", "Pneumonia")
STUDY, VIEW = np.array([0, 1, 0, 2]), np.array([0, 1, 2, 3])


def encoder_of(head) -> Encoder:
    with forked(1, "test"):
        backbone = VisionTransformer(ViTConfig(12, 2, 2, patch_size=8, image_size=32, layer_scale=0.5))
    return Encoder(
        freeze(backbone), RECIPE, 32, None, torch.device("cpu"), blocks=2, head=head.eval().requires_grad_(False),
        findings=NAMES, trained=(True,) * 5,
    )  # fmt: skip


def head_of(name: str, findings: int = 5, **settings):
    if name == "ml_decoder":
        settings = {"decoder_dim": 8, "decoder_feed_forward": 12, "decoder_heads": 2} | settings
    with forked(2, "test"):
        head = build_head(HeadConfig(name, 12, findings, blocks=2, **settings))
        for parameter in head.parameters():
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return head


@pytest.fixture(scope="module")
def squares() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 255, (4, 1, 32, 32), np.uint8))


def features_of(encoder: Encoder, squares: torch.Tensor):
    found = extract(encoder.backbone, squares, preprocessing(RECIPE), 2, True)
    return found._replace(study=torch.from_numpy(STUDY), view=torch.from_numpy(VIEW))


@pytest.mark.parametrize(
    "settings",
    [{}, {"query_groups": 2}, {"decoder_layers": 2, "cls_memory": True, "pyramid": True}, {"views": "memory"}],
    ids=str,
)
def test_of_a_decoder_it_is_what_the_class_weights_are_put_on(settings: dict, squares: torch.Tensor) -> None:
    """Independently: each finding's logit is its row of weights times the vector, and its bias."""
    head = head_of("ml_decoder", **settings)
    encoder = encoder_of(head)
    found = encoder.read(squares, NAMES, STUDY, VIEW)
    rows = head.decoder.duplicate_pooling.double()  # queries, width, findings of a query
    logits = head(features_of(encoder, squares)).double()
    for column, name in enumerate(NAMES):
        query, place = divmod(column, rows.shape[2])
        expected = torch.from_numpy(found.pooled[name]).double() @ rows[query, :, place] + head.bias[column].double()
        torch.testing.assert_close(logits[:, column], expected, rtol=0, atol=2e-5)
    assert found.pooled["Edema"].shape == (4, 8)
    if settings.get("views") == "memory":  # one vector to a study
        np.testing.assert_array_equal(found.pooled["Edema"][0], found.pooled["Edema"][2])
        assert np.abs(found.pooled["Edema"][0] - found.pooled["Edema"][1]).max() > 1e-3


@pytest.mark.parametrize("name", ["linear", "csra"])
def test_of_other_heads_it_is_the_maps_mean_of_the_last_blocks_patches(name: str, squares: torch.Tensor) -> None:
    head = head_of(name)
    encoder = encoder_of(head)
    found = encoder.read(squares, ["Mass", "Edema"])
    features = features_of(encoder, squares)
    with torch.no_grad():
        maps = maps_of(head, features, encoder.backbone, normalise(squares, preprocessing(RECIPE))).double()
        patches = encoder.backbone(normalise(squares, preprocessing(RECIPE))).patches.double()
    for finding, column in (("Mass", 2), ("Edema", 0)):
        expected = sum(maps[:, column].flatten(1)[:, [place]] * patches[:, place] for place in range(16))
        np.testing.assert_allclose(found.pooled[finding], expected.numpy(), rtol=0, atol=2e-5)
    assert np.abs(found.pooled["Mass"] - found.pooled["Edema"]).max() > 1e-3


def test_inside_extensions_and_attention_over_views_it_is_the_inner_heads(squares: torch.Tensor) -> None:
    decoder, linear = head_of("ml_decoder", 3), head_of("linear", 2)
    mixed = encoder_of(ExtendedHead(decoder, [linear], [3, 2])).read(squares, ["Mass", "Nodule"])
    alone = encoder_of(decoder)
    alone.findings = NAMES[:3]
    np.testing.assert_array_equal(mixed.pooled["Mass"], alone.read(squares, ["Mass"]).pooled["Mass"])
    added = encoder_of(linear)
    added.findings = NAMES[3:]
    np.testing.assert_array_equal(mixed.pooled["Nodule"], added.read(squares, ["Nodule"]).pooled["Nodule"])
    attended = head_of("ml_decoder", views="attention")
    inner = encoder_of(attended.inner).read(squares, NAMES)
    outer = encoder_of(attended).read(squares, NAMES, STUDY, VIEW)
    for name in NAMES:
        np.testing.assert_array_equal(outer.pooled[name], inner.pooled[name])


def test_views_that_nobody_names_are_those_of_the_view_classifier() -> None:
    """Bright at the top is PA, at the bottom LATERAL, to this classifier; the head looks at views."""
    films = np.random.default_rng(0).integers(0, 40, (400, 48, 48), np.uint8)
    films[::2, 4:20, 8:40] += 200
    films[1::2, 28:44, 8:40] += 200
    top, bottom = films[:2]
    maps, names = np.stack([gradient_map(film) for film in films]), ["PA", "LATERAL"] * 200
    patients = [str(number) for number in range(400)]
    screening = fit_screening(maps[4:300], names[4:300], patients[4:300], maps[300:], names[300:])
    encoder = encoder_of(head_of("ml_decoder", views="memory"))
    unnamed = embed_finding(encoder, [top, bottom], "Mass")
    encoder.screening = screening
    named = embed_finding(encoder, [top, bottom], "Mass", ["PA", "LATERAL"])
    np.testing.assert_array_equal(embed_finding(encoder, [top, bottom], "Mass"), named)
    assert np.abs(named - unnamed).max() > 1e-4
    [(_, many)] = embed_many(encoder, [0, 1], [top, bottom].__getitem__, ["Mass"], np.zeros(2, np.int64))
    np.testing.assert_allclose(mean_of(unit(many.pooled["Mass"])), named, rtol=0, atol=1e-6)
    swapped = embed_finding(encoder, [top, bottom], "Mass", ["LATERAL", "PA"])
    assert np.abs(swapped - named).max() > 1e-4


def test_what_cannot_be_asked_is_said(squares: torch.Tensor) -> None:
    encoder = encoder_of(head_of("linear"))
    with pytest.raises(UnknownNameError, match="Did you mean 'Mass'"):
        encoder.read(squares, ["Masss"])
    encoder.trained = (True, True, False, True, True)
    with pytest.raises(ConfigError, match="never trained"):
        encoder.read(squares, ["Mass"])
    encoder.backbone.cls_token.data[:] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        encoder.read(squares)
    encoder.head = None
    with pytest.raises(ConfigError, match="no findings"):
        encoder.read(squares, ["Edema"])
    assert encoder.head_digest == ""


def test_a_models_own_embedding_of_a_study_is_the_same(fitted: Path, store: Store) -> None:
    for name in ("linear", "ensemble"):
        model = load(fitted / name, "cpu")
        views = [store.read(0), store.read(1)]
        np.testing.assert_allclose(model.predict(views).embedding, embed_study(model, views), rtol=0, atol=2e-6)


def test_a_backbone_alone_and_the_model_made_from_it_are_one(fitted: Path) -> None:
    model, alone = Encoder.of(load(fitted / "linear", "cpu")), load_encoder(fitted / "run", "cpu", resolution=24)
    assert alone.dim == 12
    assert alone.model == ""
    assert alone.digest != load_encoder(fitted / "run", "cpu").digest  # another resolution
    np.testing.assert_allclose(
        alone.read(torch.zeros(1, 1, 24, 24, dtype=torch.uint8)).cls,
        model.read(torch.zeros(1, 1, 24, 24, dtype=torch.uint8)).cls, atol=2e-6,
    )  # fmt: skip


def test_batches_hold_whole_studies_and_change_nothing(fitted: Path, store: Store) -> None:
    encoder = Encoder.of(load(fitted / "decoder", "cpu"))
    told: list[int] = []
    results: list[np.ndarray] = []

    def read(index: int) -> np.ndarray | None:
        return None if index == 5 else store.read(index)

    for size, studies in ((3, None), (3, store.studies), (68, store.studies)):
        told.clear()
        places, cls = [], []
        for positions, found in embed_many(encoder, range(68), read, (), studies, None, size, done=told.append):
            if studies is not None:
                assert not set(studies[positions].tolist()) & {studies[place] for place in places}
            places += positions.tolist()
            cls.append(found.cls)
        assert sorted(places) == [number for number in range(68) if number != 5]
        assert sum(told) == 68
        results.append(np.concatenate(cls)[np.argsort(places)])
        np.testing.assert_allclose(results[-1], results[0], rtol=0, atol=2e-6)


def test_means_are_of_directions() -> None:
    vectors = np.array([[3.0, 0], [0, 0.1], [0, -5]])
    names, means = study_means(vectors, np.array([7, 7, 2]))
    assert names.tolist() == [2, 7]
    np.testing.assert_allclose(means, [[0, -1], [np.sqrt(0.5), np.sqrt(0.5)]], atol=1e-7)
    assert unit(np.zeros((1, 3))).tolist() == [[0, 0, 0]]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ml_decoder", "linear", "csra"])
def test_a_gpu_gives_what_the_cpu_gives(name: str, squares: torch.Tensor) -> None:
    encoder = encoder_of(head_of(name))
    expected = encoder.read(squares, NAMES, STUDY, VIEW)
    encoder.device = torch.device("cuda")
    encoder.backbone.to("cuda")
    encoder.head.to("cuda")
    found = encoder.read(squares, NAMES, STUDY, VIEW)
    np.testing.assert_allclose(found.cls, expected.cls, rtol=0, atol=1e-3)
    for finding in NAMES:
        np.testing.assert_allclose(found.pooled[finding], expected.pooled[finding], rtol=0, atol=1e-3)
