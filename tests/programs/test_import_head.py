"""A published backbone and head become a model: the numbers are those of an independent forward pass in float64."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from published import (
    NAME,
    backbone_shapes,
    backbone_tokens,
    chunked,
    glori,
    head_shapes,
    normalised,
    random_state,
    sigmoid,
)
from safetensors.torch import save_file

import hilum
from hilum import cli
from hilum.backbones.pickled import convert, convert_in_child
from hilum.backbones.vit import SIZES, VisionTransformer
from hilum.commands import import_weights
from hilum.core.errors import LeakageError
from hilum.data.labels import CXRLT_2024_TASK1
from hilum.data.store import write_arrays
from hilum.evaluation.predictions import read_predictions
from hilum.heads.registry import on_meta
from hilum.heads.released import choose_head, head_config, read_heads

DIM, DEPTH, PATCH, SIDE, HIDDEN = 128, 3, 8, 32, 344
SMALL = {"dim": DIM, "depth": DEPTH, "patch": PATCH, "side": SIDE, "hidden": HIDDEN}
HEAD = {"embed": DIM, "blocks": 2, "dim": 32, "forward": 24, "findings": 40}
RATES = ("0_0001000000", "0_0005000000")
NAMES = [NAME.format(blocks=2, rate=rate) for rate in RATES]
RNG = np.random.default_rng(3)
IMAGE = RNG.integers(20, 200, (40, 56)).astype(np.uint8)


def run(*words: object) -> int:
    before, sys.argv = sys.argv, ["hilum", *map(str, words)]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    return 0


def tensors(state):
    return {name: torch.from_numpy(value) for name, value in state.items()}


def heads_file(path: Path, cat_cls: bool, names=NAMES) -> dict[str, dict[str, np.ndarray]]:
    """As fvcore's checkpointer saves them: all heads, and the state of their training."""
    states = {name: random_state(head_shapes(**HEAD, cat_cls=cat_cls), n + 7) for n, name in enumerate(names)}
    model = {f"classifiers_dict.{name}.{key}": value for name, s in states.items() for key, value in tensors(s).items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save({"model": model, "optimizer": optimizer, "scheduler": {"last_epoch": 3}, "iteration": 12}, path)
    return states


@pytest.fixture(scope="module", autouse=True)
def no_child() -> Iterator[None]:
    """Pickles are read in this process; what a child of its own is for is tested where it is made, and below, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_weights, "convert_in_child", convert)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published")
    state = random_state(backbone_shapes(**SMALL), 1, 0.15)
    teacher = {f"backbone.{name}": value for name, value in tensors(chunked(state)).items()}
    torch.save({"teacher": teacher | {"dino_head.mlp.0.weight": torch.zeros(2, 2)}}, path / "teacher_checkpoint.pth")
    heads_file(path / "glori.pth", False)
    heads_file(path / "cat.pth", True, NAMES[:1])
    for name in ("glori", "cat"):
        convert(path / f"{name}.pth", path / f"{name}.safetensors")
    assert run("import-weights", path / "teacher_checkpoint.pth", "--out", path / "backbone") == 0
    assert import_small(path, path / "model", head="cat.pth", backbone="teacher_checkpoint.pth") == 0
    return path


def import_small(
    world: Path, out: Path, *words: object, head: str = "glori.safetensors", backbone: str = "backbone"
) -> int:
    return run("import-weights", "--backbone", world / backbone, "--head", world / head, "--out", out, *words)


def by_hand(image: np.ndarray, state, cat_cls: bool) -> tuple[np.ndarray, np.ndarray]:
    """The centre square of an image whose shorter side is brought to SIDE by area means, all the rest in float64."""
    rows, columns = image.shape
    width = round(columns * SIDE / rows)
    small = cv2.resize(image, (width, SIDE), interpolation=cv2.INTER_AREA)
    left = (width - SIDE) // 2
    weights = random_state(backbone_shapes(**SMALL), 1, 0.15)
    cls, patches = backbone_tokens(weights, normalised(small[:, left : left + SIDE]), PATCH, 2, DIM // 64)
    logits, maps = glori(state, cls, patches, cat_cls)
    return sigmoid(logits), maps


@pytest.mark.parametrize(("cat_cls", "words"), [(True, ()), (False, ("--head-name", "lr=0_0005"))])
def test_a_prediction_equals_the_published_forward_pass(world: Path, tmp_path: Path, cat_cls, words) -> None:
    state = random_state(head_shapes(**HEAD, cat_cls=cat_cls), 7 if cat_cls else 8)
    out = world / "model" if cat_cls else tmp_path / "model"
    if not cat_cls:
        assert import_small(world, out, *words) == 0
    result = hilum.load(out, device="cpu").predict(IMAGE)
    expected, maps = by_hand(IMAGE, state, cat_cls)
    found = np.array([result.probabilities[name] for name in CXRLT_2024_TASK1])
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)
    assert expected.std() > 0.02  # no part of the network is idle
    assert result.findings == CXRLT_2024_TASK1
    assert not result.calibrated
    assert set(result.thresholds.values()) == {None}
    for column, name in ((0, "Adenopathy"), (39, "Tuberculosis")):
        attention = result.attention[name]
        assert attention is not None
        np.testing.assert_allclose(attention[0].ravel(), maps[column], rtol=2e-3, atol=1e-7)


def test_its_images_are_stretched_to_their_own_range(world: Path) -> None:
    """What tells its recipe from Hilum's: brightness and contrast of a whole square do not matter."""
    model = hilum.load(world / "model", device="cpu")
    square = RNG.integers(0, 60, (SIDE, SIDE)).astype(np.uint8)
    values = [model.predict(one, attention=False).probabilities for one in (square, square * 4 + 9, square * 2)]
    for other in values[1:]:
        np.testing.assert_allclose(list(other.values()), list(values[0].values()), rtol=1e-4)
    flat = model.predict(np.full((SIDE, SIDE), 77, np.uint8), attention=False).probabilities
    assert all(value is not None and 0 < value < 1 for value in flat.values())


def test_the_model_says_what_it_is(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_weights, "convert_in_child", convert_in_child)
    out = tmp_path / "model"
    assert import_small(world, out, "--head-name", NAMES[0], head="glori.pth") == 0
    printed = " ".join("".join(capsys.readouterr()).split())
    assert f"other heads in the file: {NAMES[1]}" in printed
    assert "left out, state of the optimiser and its schedule: optimizer.state.0.exp_avg" in printed
    assert "is not calibrated and has no thresholds" in printed
    assert "probably met images of CXR-LT" in printed
    content = json.loads((out / "config.json").read_text())
    assert content["uncalibrated"]
    assert content["training"]["imported"]["head"]["learning_rate"] == 0.0001
    assert content["exposure"]["datasets"] == ["brax", "chexpert", "cxrlt", "mimic", "nih"]
    assert content["preprocessing"] == {"id": "chexfound-1", "resolution": SIDE, "short_side": 512}
    groups = {one["name"]: one["group"] for one in content["findings"]}
    assert (groups["Cardiomegaly"], groups["Mass"], groups["Azygos Lobe"]) == ("head", "medium", "tail")
    card = (out / "README.md").read_text()
    assert "## Not calibrated" in card
    assert "\nWhich images these weights have seen is not recorded. By what is published" in card
    assert "CXR-LT, CheXpert, BRAX and NIH" in card
    assert card.startswith("---\nlibrary_name: hilum\n")
    rows = (out / "checklist.md").read_text().splitlines()
    assert sum("Images met: imported: which images these weights have seen is not recorded" in row for row in rows) == 2
    assert any("Not calibrated: imported" in row for row in rows)
    assert any("published weights (" in row and "glori" in row for row in rows)
    assert not any("The head is fitted on train" in row or "0 images in pretraining" in row for row in rows)

    cv2.imwrite(str(tmp_path / "one.png"), IMAGE)
    assert run("predict", out, tmp_path / "one.png", "--out", tmp_path / "one.csv") == 0
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "not calibrated: imported" in printed
    assert "exposure: imported: which images these weights have seen is not recorded" in printed
    table = read_predictions(tmp_path / "one.csv")
    assert table.stage == "raw"
    assert "thresholds" not in table.metadata


def test_evaluating_it_on_what_it_has_probably_seen_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = world / "model"
    images = [RNG.integers(0, 255, (SIDE, SIDE)).astype(np.uint8) for _ in range(6)]
    labels = np.array([[0, 1], [1, 0]] * 3, np.int8)
    for dataset, status in (("mimic", 1), ("here", 0)):
        store = tmp_path / dataset
        write_arrays(
            store,
            images,
            labels,
            ("Edema", "Mass"),
            splits=["test"] * 6,
            preprocess_id="chexfound-1",
            datasets=[dataset] * 6,
        )
        assert run("predict", out, f"{store}:test", "--out", tmp_path / "p.parquet") == 0
        words = ("evaluate", tmp_path / "p.parquet", "--labels", store, "--bootstraps", 0, "--out", tmp_path / "e")
        capsys.readouterr()
        assert run(*words) == status
        printed = " ".join("".join(capsys.readouterr()).split())
        if status:
            assert "the model has met 6 of the predicted images" in printed
            assert LeakageError is not None
            assert run(*words, "--accept-exposed") == 0
            printed = " ".join("".join(capsys.readouterr()).split())
        assert "Not calibrated: imported" in printed
        assert "Exposure: imported: which images" in printed
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert metrics["uncalibrated"]
    assert metrics["exposure_not_recorded"]
    assert metrics["calibration"] is None


@pytest.mark.slow
def test_an_audit_knows_where_it_was_trained(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phantoms = tmp_path / "phantoms"
    assert run("phantom", phantoms, "--layout", "nih", "--patients", 6, "--size", 64, "--workers", 1) == 0
    assert run("manifest", f"nih={phantoms}", "--out", tmp_path / "manifest.parquet", "--split", "project") == 0
    capsys.readouterr()
    assert run("audit", tmp_path / "manifest.parquet", "--weights", world / "model") == 1
    assert "CheXFound-CXR1M is known to have seen nih" in " ".join("".join(capsys.readouterr()).split())


def test_best_is_what_the_public_code_selected(world: Path, tmp_path: Path, capsys) -> None:
    results = tmp_path / "results.json"
    lines = ["iter: 1", json.dumps({"best_classifier": {"name": "an earlier one", "accuracy": 0.1}}), "",
             "iter: 2", json.dumps({"best_classifier": {"name": NAMES[1], "accuracy": 0.2}}), ""]  # fmt: skip
    results.write_text("\n".join(lines))
    assert import_small(world, tmp_path / "model", "--head-name", "best", "--results", results) == 0
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["training"]["imported"]["head"]["name"] == NAMES[1]
    results.write_text("\n".join(lines[:3]))
    assert import_small(world, tmp_path / "second", "--head-name", "best", "--results", results) == 1
    assert "it names 'an earlier one'; expected one of" in "".join(capsys.readouterr())


def test_names_of_outputs(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "names.txt"
    lines = ["cardiomegaly", "Device = Support Devices", "aortic elongation  # CXR-LT 2026's word", "Widget = Widget"]
    lines += [
        name for name in CXRLT_2024_TASK1 if name not in ("Cardiomegaly", "Support Devices", "Tortuous Aorta", "Mass")
    ]
    file.write_text("\n".join(lines))
    assert import_small(world, tmp_path / "model", "--findings", file, head="cat.safetensors") == 0
    findings = hilum.load(tmp_path / "model", device="cpu").findings
    assert findings[:5] == ("Cardiomegaly", "Support Devices", "Tortuous Aorta", "Widget", "Adenopathy")
    capsys.readouterr()
    file.write_text("\n".join(["Cardiomegali", *lines[1:]]))
    assert import_small(world, tmp_path / "second", "--findings", file, head="cat.safetensors") == 1
    assert "Hilum has no finding 'Cardiomegali' (nearest: 'Cardiomegaly')" in "".join(capsys.readouterr())
    file.write_text("\n".join(lines[1:]))
    assert import_small(world, tmp_path / "second", "--findings", file, head="cat.safetensors") == 1
    assert "expected 40 different findings" in "".join(capsys.readouterr())


MISTAKES = {
    "glori.safetensors": "holds 2 heads",
    "extra.safetensors": "unexpected: decoder.temperature.weight",
    "short.safetensors": "missing: decoder.layers.0.norm3.bias",
    "stranger.safetensors": "1 tensors belong to no head: something.else",
    "narrow.safetensors": "expected a multiple of 128",
    "renamed.safetensors": "its tensors read 2 blocks without pooling",
    "linear.safetensors": "expected a decoder (classifiers_dict.<name>.decoder.*), found linear heads alone",
    "broken.safetensors": "no finite numbers: decoder.embed_standart.bias",
    "code.pth": "is refused: it asks for",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_refused(name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = random_state(head_shapes(**HEAD), 7)
    prefix = f"classifiers_dict.{NAMES[0]}."
    if name == "extra.safetensors":
        state["decoder.temperature.weight"] = np.zeros(3, np.float32)
    elif name == "short.safetensors":
        del state["decoder.layers.0.norm3.bias"]
    elif name == "narrow.safetensors":
        state = random_state(head_shapes(**HEAD | {"embed": 80}), 7)
    elif name == "renamed.safetensors":
        prefix = f"classifiers_dict.{NAME.format(blocks=4, rate=RATES[0])}."
    elif name == "linear.safetensors":
        state = {"linear.weight": np.zeros((40, 256), np.float32)}
    elif name == "broken.safetensors":
        state["decoder.embed_standart.bias"][3] = np.nan
    full = {prefix + key: value for key, value in tensors(state).items()}
    if name == "stranger.safetensors":
        full["something.else"] = torch.zeros(2)
    if name == "code.pth":
        torch.save({"model": full, "config": tmp_path}, tmp_path / name)
    elif name != "glori.safetensors":
        save_file(full, tmp_path / name)
    head = world / name if name == "glori.safetensors" else tmp_path / name
    words = ("--backbone", world / "backbone", "--head", head, "--out", tmp_path / "model")
    assert run("import-weights", *words) == 1
    assert MISTAKES[name] in "".join(capsys.readouterr())
    assert not (tmp_path / "model").exists()


def test_what_is_no_backbone_is_named_as_it_was_given(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither by the file that its pickle was converted to for the while, nor by a path that is not there."""
    assert import_small(world, tmp_path / "model", "--head-name", "lr=0_0005", backbone="cat.pth") == 1
    printed = "".join(capsys.readouterr())
    assert f"{world / 'cat.pth'} is not a vision transformer" in printed
    assert "hilum-import-" not in printed
    assert run("import-weights", world / "model", "--out", tmp_path / "model") == 1
    assert f"error: {world / 'model' / 'model.safetensors'} is part of a Hilum model" in "".join(capsys.readouterr())


def test_a_pickle_that_swells_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One stored number that says it is ten billion: read, it costs nothing; copied, all memory."""
    torch.save({"model": {"classifiers_dict.x.decoder.a": torch.zeros(1).expand(100_000, 100_000)}}, tmp_path / "g.pth")
    assert (tmp_path / "g.pth").stat().st_size < 10_000
    words = ("--backbone", world / "backbone", "--head", tmp_path / "g.pth", "--out", tmp_path / "model")
    assert run("import-weights", *words) == 1
    assert "more than the whole file" in "".join(capsys.readouterr())


@pytest.mark.parametrize(("cat_cls", "numbers"), [(False, 8_692_776), (True, 8_856_616)])
def test_the_true_shapes(cat_cls: bool, numbers: int) -> None:
    """ViT-L/16 at 512 pixels and the 40-finding heads: names, shapes and counts as published; no values."""
    with torch.device("meta"):
        backbone = VisionTransformer(SIZES["vitl16_chexfound"])
    shapes = backbone_shapes()
    ours = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    shapes["patch_embed.proj.weight"] = (1024, 1, 16, 16)  # three channels folded to one
    assert ours == shapes
    assert len(shapes) == 344
    name = NAME.format(blocks=4, rate="0_0001000000")
    held = {f"model.classifiers_dict.{name}.{key}": shape for key, shape in head_shapes(cat_cls=cat_cls).items()}
    head = choose_head(read_heads(held, "glori.pth").heads, None, "glori.pth")
    config = head_config(head, held, 1024, "glori.pth")
    assert (config.findings, config.blocks, config.decoder_dim, config.cat_cls) == (40, 4, 768, cat_cls)
    trained = [value for key, value in on_meta(config).named_parameters() if key != "decoder.query_embed.weight"]
    assert sum(value.numel() for value in trained) == numbers
