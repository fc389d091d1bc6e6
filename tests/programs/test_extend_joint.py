"""`hilum extend --joint`: distillation, the gate that stops a harmful model, and what is accepted is written down."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import save_backbone
from hilum.commands import extend, extend_joint, fit
from hilum.commands.extend_gate import compare, regression_lines
from hilum.commands.extend_inputs import check_sides, open_base
from hilum.core.config import override
from hilum.core.errors import ConfigError, HilumError, LeakageError
from hilum.core.seeding import forked
from hilum.data.store import Store, write_arrays
from hilum.deploy import model_files as files
from hilum.deploy.predictor import load
from hilum.evaluation.definitions import average_precision
from hilum.heads.config import FitConfig

OLD, NEW = ("Edema", "Fracture"), ("Rib Fracture",)
SPLITS = ["train"] * 120 + ["val"] * 60 + ["test"] * 12
CONFIG = FitConfig(
    head="linear", blocks=2, patch_mean=True, learning_rates=(1e-2, 3e-2), search_epochs=6, refit_epochs=6,
    batch_size=16, augmented_views=1, threads=1, workers=1, findings=OLD, loss="masked_bce_mean", standardise=True,
    prior_bias=True, refit=False,
)  # fmt: skip


def make_store(path: Path, old_in_train: bool = True, change=lambda labels: None, part: slice = slice(None)) -> Store:
    """Three halves of the image say three findings; the store may lack labels of the old ones in training.

    `part`: of the images, to have a store of some and one of others.
    """
    rng = np.random.default_rng(1)
    labels = (rng.random((len(SPLITS), 3)) < 0.4).astype(np.int8)
    images = []
    for row in labels:
        image = rng.integers(0, 60, (16, 16), np.uint8)
        image[:8] += np.uint8(110 * int(row[0]))
        image[8:, :8] += np.uint8(110 * int(row[1]))
        image[8:, 8:] += np.uint8(110 * int(row[2]))
        images.append(image)
    if not old_in_train:
        labels[:120, :2] = -1
    change(labels)
    names = [f"image{n}" for n in range(len(SPLITS))][part]
    patients = [f"arrays/p{n}" for n in range(len(SPLITS))][part]
    return write_arrays(
        path, images[part], labels[part], (*OLD, *NEW), splits=SPLITS[part], patients=patients, image_ids=names
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("joint")
    make_store(path / "store")
    make_store(path / "new_labels", old_in_train=False)
    with forked(0, "test"):
        backbone = VisionTransformer(ViTConfig(12, 2, 2, patch_size=4, image_size=16, layer_scale=0.5))
    save_backbone(backbone, path / "run", "hilum-grey-1")
    fit.run(CONFIG, path / "store", path / "run", path / "model", device="cpu")
    fit.run(override(CONFIG, ["refit=true"]), path / "store", path / "run", path / "refitted", device="cpu")
    return path


def joint(folder: Path, out: Path, data: str = "new_labels", model: str = "model", **options) -> dict:
    extend_joint.run(
        folder / model, folder / data, NEW, out, options.pop("overrides", ()), bootstraps=100, device="cpu", **options
    )
    return json.loads((out / "config.json").read_text())


def test_old_findings_are_learned_from_the_model_where_labels_are_missing(folder: Path, tmp_path: Path) -> None:
    store = Store.open(folder / "store")
    truth = store.labels[120:180]
    scores = {}
    for name, share in (("taught", 1.0), ("not taught", 0.0)):
        content = joint(folder, tmp_path / name, tolerance=1.0, distillation=share)
        assert content["joint"]["taught_labels"] == (240 if share else 0)
        assert [one["name"] for one in content["findings"]] == [*OLD, *NEW]
        assert content["findings"][0] == json.loads((folder / "model" / "config.json").read_text())["findings"][0]
        predicted = load(tmp_path / name, "cpu").predict_store(store, range(120, 180), raw=True).probabilities
        scores[name] = [average_precision(predicted[:, column], truth[:, column]) for column in range(3)]
    assert scores["taught"][0] > 0.9 > 0.6 > scores["not taught"][0]
    assert scores["taught"][1] > content["joint"]["regression"]["Fracture"]["before"] - 0.1
    assert min(scores["taught"][2], scores["not taught"][2]) > 0.5


def test_the_gate_stops_what_is_not_shown_to_be_harmless(folder: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(HilumError, match=r"old findings are not shown to lose less than 0.02 AP.*Nothing was written"):
        joint(folder, tmp_path / "refused", distillation=0.0)
    assert not (tmp_path / "refused").exists()
    content = joint(folder, tmp_path / "accepted", distillation=0.0, accept=True)
    assert content["joint"]["accepted"]
    assert not content["joint"]["harmless"]
    assert "Not shown to be harmless" in (tmp_path / "accepted" / "README.md").read_text()
    assert "Edema: " in capsys.readouterr().out
    rows = content["joint"]["regression"]
    validation, labels = files.read_validation(folder / "model")
    after, _ = files.read_validation(tmp_path / "accepted")
    for column, name in enumerate(OLD):
        before = average_precision(validation.probabilities[:, column], labels[:, column])
        now = average_precision(after.probabilities[:, column], labels[:, column])
        assert rows[name]["before"] == pytest.approx(before)
        assert rows[name]["after"] == pytest.approx(now)
        assert rows[name]["low"] <= rows[name]["difference"] <= rows[name]["high"]
    assert rows["Edema"]["verdict"] == "worse"
    assert rows["Fracture"]["low"] < -0.02 < rows["Fracture"]["high"]
    assert rows["Fracture"]["verdict"] == "not shown"  # an interval that reaches past the tolerance shows nothing


def test_an_old_finding_without_a_positive_to_compare_on_is_named_as_such(folder: Path) -> None:
    base = open_base(folder / "model")
    [(predictions, labels)] = base.validations
    [line] = regression_lines(compare(base, predictions, 0 * labels, 0.02, 20, 0), 0.02)[1:2]
    assert line.endswith("Edema: not both positive and negative labels among 60 validation images; not shown")
    elsewhere = replace(predictions, image_uid=np.array([f"{number:016x}" for number in range(60)]))
    [line] = regression_lines(compare(base, elsewhere, labels, 0.02, 20, 0), 0.02)[1:2]
    assert line.endswith("Edema: no validation image to compare on; not shown")


def test_a_harmless_joint_model_passes_and_says_so(folder: Path, tmp_path: Path) -> None:
    content = joint(folder, tmp_path / "out", data="store", tolerance=0.5)
    assert content["joint"]["harmless"]
    assert {row["verdict"] for row in content["joint"]["regression"].values()} == {"harmless"}
    assert "was shown to lose less than 0.5 AP" in (tmp_path / "out" / "README.md").read_text()
    assert len(files.read_exposure(tmp_path / "out", content).val) == 0  # refit=false is kept


def test_a_teacher_that_has_seen_validation_is_refused_or_written_down(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LeakageError, match=r"trained on 60 of 60 validation images.*refit=false"):
        joint(folder, tmp_path / "out", model="refitted", tolerance=1.0)
    content = joint(folder, tmp_path / "out", model="refitted", tolerance=1.0, accept=True)
    assert content["joint"]["teacher_has_seen_validation"]


def test_impossible_options_are_refused(folder: Path, tmp_path: Path) -> None:
    for options in ({"tolerance": -0.1}, {"distillation": 1.5}):
        with pytest.raises(ConfigError, match="expected 0"):
            joint(folder, tmp_path / "out", **options)


def test_a_new_finding_without_training_positives_is_refused(folder: Path, tmp_path: Path) -> None:
    def forget(labels: np.ndarray) -> None:
        labels[:120, 2] = 0

    make_store(tmp_path / "store", change=forget)
    with pytest.raises(ConfigError, match="no positive training image of 'Rib Fracture'"):
        extend_joint.run(folder / "model", tmp_path / "store", NEW, tmp_path / "out", device="cpu")


def test_how_the_backbone_was_tuned_stays_known(folder: Path, tmp_path: Path) -> None:
    """Later extensions ask whether a tuned backbone has met validation."""
    tune = ["tune.method=full", "tune.epochs=1", "tune.learning_rate=0.001", "search_epochs=1"]
    fit.run(override(CONFIG, tune), folder / "store", folder / "run", tmp_path / "tuned", device="cpu")
    joint = extend_joint.run(tmp_path / "tuned", folder / "store", NEW, tmp_path / "joint", accept=True, device="cpu")
    before, after = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "tuned", joint))
    assert before["training"]["tuning"]["method"] == "full"
    assert after["training"]["tuning"] == before["training"]["tuning"]


def test_a_finding_that_the_model_was_never_trained_on_has_nothing_to_lose(folder: Path, tmp_path: Path) -> None:
    """It is null before and after: neither the gate nor the choice of a rate knows of it."""

    def forget(labels: np.ndarray) -> None:
        labels[:120, 1] = 0  # validation has positives

    make_store(tmp_path / "store", change=forget)
    fit.run(CONFIG, tmp_path / "store", folder / "run", tmp_path / "model", device="cpu")
    extend_joint.run(
        tmp_path / "model", tmp_path / "store", NEW, tmp_path / "out", tolerance=0.1, bootstraps=50, device="cpu"
    )
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(content["joint"]["regression"]) == ["Edema"]
    assert content["joint"]["harmless"]
    assert [one["trained"] for one in content["findings"]] == [True, False, True]
    assert json.loads((tmp_path / "out" / "search.json").read_text())["findings"] == ["Edema", "Rib Fracture"]
    assert not files.read_validation(tmp_path / "out")[0].trained[1]


def test_heads_that_were_validated_on_other_images_are_each_held_against_their_own(
    folder: Path, tmp_path: Path
) -> None:
    """Edema was learned on every other image, Fracture added on the rest; all of them are there in the joint fit."""
    for name, start in (("one", 0), ("other", 1)):
        make_store(tmp_path / name, part=slice(start, None, 2))
    short = ["search_epochs=2", "refit_epochs=2"]
    config = override(CONFIG, ["findings=[Edema]", *short])
    fit.run(config, tmp_path / "one", folder / "run", tmp_path / "model", device="cpu")
    extend.run(tmp_path / "model", tmp_path / "other", ["Fracture"], tmp_path / "more", short, device="cpu")

    def forget(labels: np.ndarray) -> None:
        labels[120:180, 1] = -1  # the labels that the extension was validated with are in the model

    make_store(tmp_path / "store", change=forget)
    extend_joint.run(
        tmp_path / "more", tmp_path / "store", NEW, tmp_path / "out", short, accept=True, bootstraps=50, device="cpu"
    )
    rows = json.loads((tmp_path / "out" / "config.json").read_text())["joint"]["regression"]
    assert list(rows) == list(OLD)
    for number, name in ((None, "Edema"), (0, "Fracture")):
        validation, labels = files.read_validation_of(tmp_path / "more", number)
        assert rows[name]["before"] == pytest.approx(average_precision(validation.probabilities[:, 0], labels[:, 0]))
        assert rows[name]["positives"] == int((labels[:, 0] == 1).sum())

    # an image that an extension was validated on is no training image of the next
    moved = Store.open(tmp_path / "other")
    base = open_base(tmp_path / "more")
    with pytest.raises(LeakageError, match="validated on images of 30 patients"):
        check_sides(base, moved, moved.indices("val"), moved.indices("train")[:0])
