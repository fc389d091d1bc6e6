"""`hilum extend`: new findings beside old ones that stay the same bits, budgets, splits, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import save_backbone
from hilum.commands import extend, extend_joint, extend_zero_shot, fit
from hilum.commands.extend_inputs import Shots, open_base, open_new_examples, settings_of
from hilum.commands.extend_training import make_ladder, starting_weights
from hilum.core.config import override
from hilum.core.errors import ConfigError, LeakageError, PredictionError, PreprocessingMismatchError, UnknownNameError
from hilum.core.files import write_json
from hilum.core.seeding import forked
from hilum.data.store import Store, write_arrays
from hilum.deploy import model_files as files
from hilum.deploy.predictor import load
from hilum.deploy.validation import read_bands
from hilum.evaluation.calibration import describe_items
from hilum.evaluation.fitted_items import are_among
from hilum.heads.config import FitConfig
from hilum.heads.features import Features
from hilum.heads.registry import build_head, on_meta
from hilum.heads.standardise import measure

OLD, NEW = ("Atelectasis", "Edema", "Fracture"), ("Lobar Atelectasis", "Rib Fracture")
SPLITS = ["train"] * 60 + ["val"] * 24 + ["test"] * 12
SMALL = FitConfig(
    head="linear", blocks=2, learning_rates=(1e-3, 1e-2), search_epochs=3, refit_epochs=3, batch_size=16,
    augmented_views=1, threads=1, workers=1, findings=OLD, loss="masked_bce_mean", standardise=True, prior_bias=True,
)  # fmt: skip
DECODER = override(
    SMALL, ["head=ml_decoder", "decoder_dim=8", "decoder_feed_forward=12", "decoder_heads=2", "flip_average=true"]
)
FAST = ("search_epochs=2", "refit_epochs=2", "learning_rates=[0.01,0.03]")


def make_store(path: Path, splits: list[str] = SPLITS, change=None, **options) -> Store:
    """The brightness of an image says Edema and Rib Fracture; some new labels are unknown."""
    rng = np.random.default_rng(0)
    labels = (rng.random((len(splits), 5)) < 0.4).astype(np.int8)
    labels[::6, 3] = -1
    images = [
        rng.integers(0, 60, (22, 20 + 4 * (n % 3)), np.uint8) + np.uint8(100 * int(y[1]) + 60 * int(y[4]))
        for n, y in enumerate(labels)
    ]
    if change is not None:
        change(labels)
    defaults = {
        "studies": [f"arrays/s{n // 2}" for n in range(len(splits))],
        "patients": [f"arrays/p{n // 4}" for n in range(len(splits))],
    }
    return write_arrays(path, images, labels, (*OLD, *NEW), splits=splits, **(defaults | options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("extend")
    make_store(path / "store")
    with forked(0, "test"):
        backbone = VisionTransformer(ViTConfig(12, 2, 2, patch_size=8, image_size=16, layer_scale=0.5))
    save_backbone(backbone, path / "run", "hilum-grey-1")
    for name, config in (("linear", SMALL), ("decoder", DECODER)):
        fit.run(config, path / "store", path / "run", path / name, device="cpu")
        extend.run(path / name, path / "store", NEW, path / f"{name}_more", FAST, device="cpu")
    return path


def settings(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


BOTH = pytest.mark.parametrize("name", ["linear", "decoder"])


@BOTH
def test_old_tensors_are_the_same_bytes_and_old_outputs_the_same_bits(folder: Path, name: str) -> None:
    before, after = (load_file(folder / one / "model.safetensors") for one in (name, f"{name}_more"))
    for key, tensor in before.items():
        assert tensor.numpy().tobytes() == after[key].numpy().tobytes(), key
    assert {key for key in after if key not in before} == {key for key in after if key.startswith("extension.0.")}
    old, new = load(folder / name, "cpu"), load(folder / f"{name}_more", "cpu")
    store = Store.open(folder / "store")
    assert new.findings == (*OLD, *NEW)
    for raw in (True, False):
        for unit in ("image", "study"):
            one, other = (model.predict_store(store, range(84, 96), raw=raw, unit=unit) for model in (old, new))
            assert np.array_equal(one.probabilities, other.probabilities[:, :3])
            assert np.isfinite(other.probabilities).all()
    study = [store.read(84), store.read(85)]
    mine, theirs = old.predict(study), new.predict(study)
    assert {key: theirs.probabilities[key] for key in OLD} == mine.probabilities
    assert theirs.thresholds["Rib Fracture"] is not None


@BOTH
def test_views_say_the_same_of_old_findings_beside_a_head_that_reads_studies(folder: Path, tmp_path, name) -> None:
    sizes = ("decoder_dim=8", "decoder_feed_forward=12", "decoder_heads=2")
    changes = [*FAST, "head=ml_decoder", f"views={'attention' if name == 'linear' else 'memory'}", *sizes]
    extend.run(folder / name, folder / "store", NEW, tmp_path / "out", changes, ladder=["own"], device="cpu")
    store = Store.open(folder / "store")
    study = [store.read(84), store.read(85)]
    one, other = (load(path, "cpu").predict(study, attention=True) for path in (folder / name, tmp_path / "out"))
    for finding in OLD:
        assert other.contributions[finding] == one.contributions[finding]
        for view, weight in enumerate(one.view_weights):  # now over the study
            np.testing.assert_allclose(other.attention[finding][view], one.attention[finding][view] * weight)
    assert sum(other.contributions[NEW[0]]) == pytest.approx(1)


@BOTH
def test_old_maps_and_thresholds_are_the_same_bytes_and_records_are_joined(folder: Path, name: str) -> None:
    old, new = settings(folder / name), settings(folder / f"{name}_more")
    for unit in ("image", "study"):
        one, other = old["calibration"][unit], new["calibration"][unit]
        for key in ("maps", "thresholds", "raw_thresholds"):
            assert json.dumps(one[key]) == json.dumps({finding: other[key][finding] for finding in OLD})
            assert set(other[key]) == {*OLD, *NEW}
        assert one["fitted_on"] == other["fitted_on"]  # the same validation images
    assert new["findings"][:3] == old["findings"]
    assert new["architecture"] == old["architecture"]
    assert new["extended_from"] == files.digest_of(folder / name)
    for kept in ("search.json", "validation_logits.parquet", "validation_labels.npz"):
        assert (folder / name / kept).read_bytes() == (folder / f"{name}_more" / kept).read_bytes()
    exposures = [files.read_exposure(folder / one, settings(folder / one)) for one in (name, f"{name}_more")]
    for use in ("train", "val", "pictures", "pretraining"):
        assert np.array_equal(*(getattr(exposure, use) for exposure in exposures))
    validation, labels = files.read_validation(folder / f"{name}_more")
    assert validation.findings == (*OLD, *NEW)
    assert labels.shape == (24, 5)
    card = (folder / f"{name}_more" / "README.md").read_text()
    assert "Extension 1: Lobar Atelectasis, Rib Fracture" in card
    cards = new["extensions"][0]["cards"]
    store = Store.open(folder / "store")
    assert cards["Rib Fracture"]["train_positives"] == int((store.labels[:60, 4] == 1).sum())
    assert cards["Lobar Atelectasis"]["val_known"] == int((store.labels[60:84, 3] >= 0).sum())


def test_the_search_has_a_course_for_every_rung_and_parents_are_found(folder: Path) -> None:
    search = json.loads((folder / "decoder_more" / "extension_0_search.json").read_text())
    assert list(search["rungs"]) == ["rows", "adapter", "copy", "own"]
    weights = [rung["trained_weights"] for rung in search["rungs"].values()]
    assert weights[0] == 2 * (8 + 8 + 1)  # a query, a row and a bias for each finding
    assert weights[0] < weights[1] < weights[2] == weights[3]  # copy learns as many as own, and comes first
    assert all(len(rung["epochs"]) == 2 for rung in search["rungs"].values())
    best = {name: rung["chosen"]["score"] for name, rung in search["rungs"].items()}
    assert best[search["taken"]] == max(best.values())
    assert list(json.loads((folder / "linear_more" / "extension_0_search.json").read_text())["rungs"]) == ["own"]


@pytest.mark.parametrize("rung", ["rows", "adapter"])
def test_what_is_taken_over_is_shared_and_new_findings_start_from_their_parents(
    folder: Path, tmp_path: Path, rung: str
) -> None:
    extend.run(folder / "decoder", folder / "store", NEW, tmp_path / "more", FAST, ladder=[rung], device="cpu")
    described = settings(tmp_path / "more")["extensions"][0]
    assert "decoder.embed_standart.weight" in described["shared"]
    state = load_file(tmp_path / "more" / "model.safetensors")
    assert "extension.0.decoder.embed_standart.weight" not in state
    assert ("extension.0.decoder.layers.0.norm1.weight" in state) == (rung == "adapter")
    assert {name: card["parent"] for name, card in described["cards"].items()} == {
        "Lobar Atelectasis": "Atelectasis", "Rib Fracture": "Fracture",
    }  # fmt: skip
    assert described["training"]["memory_has_seen_validation"]
    base = open_base(folder / "decoder")
    config = settings_of(base, FAST)
    rungs = make_ladder(config, 12, base.network.head, base.main, NEW, OLD, None, [rung])
    queries, rows = rungs[0].initial["decoder.query_embed.weight"], rungs[0].initial["decoder.duplicate_pooling"]
    old = base.main.state_dict()
    assert torch.equal(queries, old["decoder.query_embed.weight"][[0, 2]])
    assert torch.equal(rows, old["decoder.duplicate_pooling"][[0, 2]])


@pytest.mark.slow
def test_a_copy_starts_from_the_models_head_and_all_of_it_is_its_own(folder: Path, tmp_path: Path) -> None:
    extend.run(folder / "decoder", folder / "store", NEW, tmp_path / "more", FAST, ladder=["copy"], device="cpu")
    described = settings(tmp_path / "more")["extensions"][0]
    assert described["training"]["rung"] == "copy"
    assert described["shared"] == []
    assert described["training"]["memory_has_seen_validation"]
    before, after = (load_file(path / "model.safetensors") for path in (folder / "decoder", tmp_path / "more"))
    assert all(tensor.numpy().tobytes() == after[key].numpy().tobytes() for key, tensor in before.items())
    base = open_base(folder / "decoder")
    copied = [name for name in base.main.state_dict() if not name.endswith(("query_embed.weight", "pooling", "bias"))]
    assert copied
    assert all((after[f"extension.0.{name}"] != base.main.state_dict()[name]).any() for name in copied)
    old, new = load(folder / "decoder", "cpu"), load(tmp_path / "more", "cpu")
    one, other = (model.predict_store(Store.open(folder / "store"), range(84, 96)) for model in (old, new))
    assert np.array_equal(one.probabilities, other.probabilities[:, :3])


def test_a_copy_of_standardised_features_starts_where_one_of_raw_features_does(folder: Path) -> None:
    base, config = open_base(folder / "decoder"), settings_of(open_base(folder / "decoder"), FAST)
    rows, copy = make_ladder(config, 12, base.network.head, base.main, NEW, OLD, None, ["rows", "copy"])
    assert copy.standardise
    assert not rows.standardise
    draw = torch.Generator().manual_seed(0)
    cls, mean, patches = (3 + 2 * torch.randn(*shape, generator=draw) for shape in ((6, 24), (6, 12), (6, 4, 24)))
    features = Features(cls, mean, patches, (2, 2), torch.arange(6), torch.zeros(6, dtype=torch.long))
    scaling = measure([features])
    raw, standardised = on_meta(rows.head), on_meta(copy.head)
    raw.load_state_dict(starting_weights(rows, scaling), assign=True)
    standardised.load_state_dict(starting_weights(copy, scaling), assign=True)
    torch.testing.assert_close(standardised(scaling.apply(features)), raw(features), rtol=1e-4, atol=1e-5)
    assert torch.equal(copy.initial["decoder.embed_standart.weight"], rows.initial["decoder.embed_standart.weight"])


def test_a_second_extension_leaves_the_first_as_it_is(folder: Path, tmp_path: Path) -> None:
    extend.run(folder / "decoder", folder / "store", NEW[:1], tmp_path / "a", FAST, device="cpu")
    extend.run(tmp_path / "a", folder / "store", NEW[1:], tmp_path / "b", FAST, device="cpu")
    store = Store.open(folder / "store")
    outputs = [
        load(path, "cpu").predict_store(store, range(60, 96)).probabilities
        for path in (folder / "decoder", tmp_path / "a", tmp_path / "b")
    ]
    assert [values.shape[1] for values in outputs] == [3, 4, 5]
    assert np.array_equal(outputs[0], outputs[2][:, :3])
    assert np.array_equal(outputs[1], outputs[2][:, :4])
    for name in ("search.json", "validation_logits.parquet", "validation_labels.npz"):
        first = f"extension_0_{name}"
        assert (tmp_path / "a" / first).read_bytes() == (tmp_path / "b" / first).read_bytes()
    assert files.read_validation(tmp_path / "b")[0].findings == (*OLD, *NEW)


def test_a_new_finding_is_learned(folder: Path) -> None:
    """Rib Fracture is brightness; what was learned of it ranks images it has never seen."""
    search = json.loads((folder / "decoder_more" / "extension_0_search.json").read_text())
    chosen = search["rungs"][search["taken"]]["chosen"]["score"]
    assert chosen > 0.55  # shares of positives are 0.4


@pytest.mark.parametrize(("train", "val"), [(1, 1), (4, 2), (8, 8)])
def test_shots_are_exactly_what_was_asked_for_in_every_phase(
    folder: Path, tmp_path: Path, monkeypatch, train: int, val: int
) -> None:
    """Defect C6: the budget was forgotten in the second phase, which trained on the whole validation set."""
    seen = []
    real = extend.learning_set

    def watched(config, examples):
        made = real(config, examples)
        seen.append(made)
        return made

    monkeypatch.setattr(extend, "learning_set", watched)
    extend.run(
        folder / "decoder", folder / "store", NEW, tmp_path / "few", FAST, Shots(train, val), ["rows"], device="cpu"
    )
    [learned] = seen
    for images, budget in ((learned.train, train), (learned.val, val), (learned.both, train + val)):
        assert (learned.labels[images] == 1).sum(axis=0).tolist() == [budget, budget]
    cards = settings(tmp_path / "few")["extensions"][0]["cards"]
    assert [(card["train_positives"], card["val_positives"]) for card in cards.values()] == [(train, val)] * 2
    maps = settings(tmp_path / "few")["calibration"]["image"]["maps"]
    assert [maps[name]["positives"] for name in NEW] == [val, val]
    store = Store.open(folder / "store")
    truth = store.labels[:, 3:]
    known = learned.labels >= 0
    assert np.array_equal(learned.labels[known], truth[known])
    assert (learned.labels[truth == 0] == 0).sum() == (truth[:84] == 0).sum()  # every negative of train and val stays


def test_the_terms_of_what_taught_new_findings_are_in_the_card(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Store, "licences", property(lambda self: {"arrays": ["site-terms"]}))
    extend.run(folder / "linear", folder / "store", NEW[:1], tmp_path / "out", FAST, device="cpu")
    content, known = settings(tmp_path / "out"), Store.open(folder / "store").labels[:60, 3] >= 0
    training = content["extensions"][0]["training"]
    assert training["sources"] == {"arrays": {"train": int(known.sum()), "val": 24}}
    assert (content["training"]["licences"], training["licences"]) == ({"arrays": []}, {"arrays": ["site-terms"]})
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Labels of extension 1 come from arrays ({known.sum()} train, 24 val)." in card
    assert "`site-terms`" in card
    monkeypatch.setattr(Store, "licences", property(lambda self: {"arrays": ["nih-open"]}))
    options = {"accept": True, "bootstraps": 10, "device": "cpu"}
    extend_joint.run(tmp_path / "out", folder / "store", NEW[1:], tmp_path / "joint", FAST, **options)
    assert settings(tmp_path / "joint")["training"]["licences"] == {"arrays": ["nih-open", "site-terms"]}
    assert "`site-terms`" in (tmp_path / "joint" / "README.md").read_text()


def test_a_larger_budget_holds_the_smaller_one_and_seeds_differ(folder: Path) -> None:
    base = open_base(folder / "decoder")

    def positives(shots: int, seed: int) -> set[int]:
        config = settings_of(base, [f"seed={seed}"])
        examples = open_new_examples(base, folder / "store", NEW, Shots(shots, None), config)
        return set(np.flatnonzero(examples.labels[:60, 1] == 1).tolist())

    assert positives(2, 0) < positives(5, 0) < positives(9, 0)
    assert positives(5, 0) != positives(5, 1)


def test_findings_that_cannot_be_added_are_refused(folder: Path, tmp_path: Path, capsys) -> None:
    def refused(error: type[Exception], match: str, findings, data: Path = folder / "store", **options) -> None:
        with pytest.raises(error, match=match):
            extend.run(folder / "decoder", data, findings, tmp_path / "out", FAST, device="cpu", **options)
        assert not (tmp_path / "out").exists()

    refused(ConfigError, r"already has Edema\. Nothing was changed.*hilum fit", ["edema"])
    refused(UnknownNameError, "Did you mean 'Rib Fracture'", ["Rib Fractur"])
    refused(ConfigError, "one or more different names", [])
    refused(ConfigError, "one or more different names", ["Rib Fracture", "Rib Fracture"])
    refused(ConfigError, "column of prediction files", ["view"])
    refused(UnknownNameError, "Did you mean 'adapter'", NEW, ladder=["adaptor"])
    make_store(tmp_path / "none", change=lambda labels: labels[:60, 4].fill(0))
    refused(
        ConfigError,
        r"no positive training image of 'Rib Fracture' \(60 known labels\).*zero-shot",
        NEW,
        tmp_path / "none",
    )
    make_store(tmp_path / "blind", change=lambda labels: labels[60:84, 3:].fill(0))
    refused(ConfigError, "positive images in both train and val", NEW, tmp_path / "blind")
    make_store(tmp_path / "recipe", preprocess_id="mimic-cxr-jpg-1")
    refused(PreprocessingMismatchError, "mimic-cxr-jpg-1", NEW, tmp_path / "recipe")
    with pytest.raises(ConfigError, match="blocks: an extension reads what the model reads"):
        extend.run(folder / "decoder", folder / "store", NEW, tmp_path / "out", ["blocks=1"], device="cpu")
    for setting in (
        "consistency=0.1", "datasets=[arrays]", "queries=fixed", "tune.method=lora", "train_images=5",
        "study=frontal_weighted:0.9", "normal_damping=power:0.5",
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="does not obey it"):
            settings_of(open_base(folder / "decoder"), [setting])
    with pytest.raises(ConfigError, match="already holds"):
        extend.run(folder / "decoder", folder / "store", NEW, folder / "linear", device="cpu")
    with pytest.raises(ConfigError, match="--shots: expected at least 1"):
        Shots(0)


def test_a_finding_without_a_validation_positive_is_flagged(folder: Path, tmp_path: Path, capsys) -> None:
    make_store(tmp_path / "store", change=lambda labels: labels[60:84, 3].fill(0))
    extend.run(folder / "decoder", tmp_path / "store", NEW, tmp_path / "out", FAST, ladder=["rows"], device="cpu")
    assert "no positive validation image of Lobar Atelectasis" in capsys.readouterr().err
    maps = settings(tmp_path / "out")["calibration"]["image"]["maps"]
    assert maps["Lobar Atelectasis"]["flag"]


def test_another_head_starts_without_what_the_models_own_alone_obeys(folder: Path, tmp_path: Path) -> None:
    """`head=linear` needs no list of settings to be taken back; those that were for other heads are left behind."""
    shutil.copytree(folder / "decoder", tmp_path / "model")
    content = settings(tmp_path / "model")
    recorded = content["training"]["settings"] | {
        "views": "memory", "decoder_layers": 2, "positions": "sincos", "cat_cls": True, "pyramid": True, "dropout": 0.3,
        "sampling_power": 1.0, "classifier_epochs": 2, "pseudo_labels": "teacher", "pseudo_weight": 0.2,
    }  # fmt: skip
    write_json(tmp_path / "model" / "config.json", content | {"training": {"settings": recorded}})
    base = open_base(tmp_path / "model")
    same, other = settings_of(base), settings_of(base, ["head=linear", "patch_mean=true"])
    assert (same.views, same.positions, same.dropout, same.queries) == ("memory", "sincos", 0.3, "learnable")
    assert same.sampling_power == FitConfig.sampling_power  # it was for `classifier_epochs` alone
    assert (other.views, other.positions, other.dropout, other.queries) == ("single", "none", 0.1, "fixed")
    assert other.patch_mean
    assert settings_of(base, ["head=csra", "csra_lambda=0.3"]).csra_lambda == 0.3
    with pytest.raises(ConfigError, match="dropout: of the head ml_decoder alone"):
        settings_of(base, ["head=linear", "dropout=0.2"])
    with pytest.raises(UnknownNameError, match="Did you mean 'linear'"):
        settings_of(base, ["head=liner"])
    make = ["head=linear", *FAST]
    extend.run(folder / "decoder", folder / "store", NEW, tmp_path / "out", make, device="cpu")
    assert settings(tmp_path / "out")["extensions"][0]["head"]["name"] == "linear"
    recorded = settings(folder / "linear")["training"]["settings"] | {"patch_mean": True, "csra_lambda": 0.2}
    content = settings(folder / "linear")
    write_json(tmp_path / "model" / "config.json", content | {"training": {"settings": recorded}})
    assert settings_of(replace(base, content=settings(tmp_path / "model")), ["head=ml_decoder"]).patch_mean is False


def test_an_imported_model_is_refused_in_words(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "linear", tmp_path / "model")
    content = settings(tmp_path / "model") | {"training": {"imported": {"backbone": {"file": "teacher.safetensors"}}}}
    write_json(tmp_path / "model" / "config.json", content)
    for run in (extend.run, extend_joint.run):
        with pytest.raises(ConfigError, match=r"was imported; it has no fit settings.*hilum fit RECIPE --backbone"):
            run(tmp_path / "model", folder / "store", NEW, tmp_path / "out", device="cpu")


def swap(splits: list[str], first: int, second: int) -> list[str]:
    changed = list(splits)
    changed[first], changed[second] = splits[second], splits[first]
    return changed


def test_patients_of_the_model_keep_their_splits(folder: Path, tmp_path: Path) -> None:
    def refused(name: str, match: str, splits: list[str], **options) -> None:
        make_store(tmp_path / name, splits, **options)
        with pytest.raises(LeakageError, match=match):
            extend.run(folder / "linear", tmp_path / name, NEW, tmp_path / "out", FAST, device="cpu")

    moved = [split if not 60 <= n < 64 else "train" for n, split in enumerate(SPLITS)]  # a validation patient
    refused("val", "was validated on images of 1 patients.*learn from.*keep their splits", moved)
    moved = [split if not 0 <= n < 4 else "val" for n, split in enumerate(SPLITS)]
    refused("train", "was trained on images of 1 patients.*validate on.*keep their splits", moved)
    # another image of a patient that the model was validated on: the image is new, the patient is not
    patients = [f"arrays/p{n // 4}" for n in range(len(SPLITS))]
    splits = [*SPLITS, "train"]
    moved = ["" if 60 <= n < 64 else split for n, split in enumerate(splits)]
    refused("patient", "validated on images of 1 patients", moved, patients=[*patients, patients[60]],
            studies=[f"arrays/s{n // 2}" for n in range(97)])  # fmt: skip
    # the same with no image of the model in the store
    moved = [split if not 60 <= n < 64 else "train" for n, split in enumerate(SPLITS)]
    refused("films", "validated on images of 1 patients", moved, image_ids=[f"new{n:03d}" for n in range(len(SPLITS))])


def test_images_that_the_model_has_never_met_are_joined_to_its_exposure(folder: Path, tmp_path: Path) -> None:
    names = [f"new{n:03d}" for n in range(len(SPLITS))]
    make_store(
        tmp_path / "store", image_ids=names, patients=[f"arrays/q{n // 4}" for n in range(96)],
        studies=[f"arrays/t{n // 2}" for n in range(96)],
    )  # fmt: skip
    extend.run(folder / "decoder", tmp_path / "store", NEW, tmp_path / "out", FAST, ladder=["rows"], device="cpu")
    content = settings(tmp_path / "out")
    exposure = files.read_exposure(tmp_path / "out", content)
    store = Store.open(tmp_path / "store")
    used = np.flatnonzero((store.labels[:60, 3:] >= 0).any(axis=1))
    assert len(exposure.train) == 60 + len(used)
    assert not content["extensions"][0]["training"]["memory_has_seen_validation"]
    old = settings(folder / "decoder")["calibration"]["image"]["fitted_on"]
    both = content["calibration"]["image"]["fitted_on"]
    assert (old["items"], both["items"]) == (24, 48)
    with pytest.raises(PredictionError, match="added on other validation images"):
        files.read_validation(tmp_path / "out")


def test_what_a_site_was_calibrated_on_is_not_forgotten(folder: Path, tmp_path: Path) -> None:
    """After `hilum recalibrate` the ids are a site's, known by their digests alone; the new findings' are added."""
    shutil.copytree(folder / "linear", tmp_path / "site")
    content = settings(tmp_path / "site")
    here = {"image": ["site/1", "site/2", "site/3"], "study": ["site/a", "site/b"]}
    for unit, items in here.items():
        content["calibration"][unit]["fitted_on"] = describe_items(items)
    content["exposure"]["not_recorded"] = "nobody has listed what its backbone has seen"
    write_json(tmp_path / "site" / "config.json", content | {"recalibrated": {"studies": 2}})
    extend.run(tmp_path / "site", folder / "store", NEW[:1], tmp_path / "one", FAST, device="cpu")
    extend.run(tmp_path / "one", folder / "store", NEW[1:], tmp_path / "two", FAST, device="cpu")
    validation = files.read_validation_of(folder / "linear")[0].image_uid.tolist()
    for name in ("one", "two"):
        content = settings(tmp_path / name)
        assert content["exposure"]["not_recorded"] == "nobody has listed what its backbone has seen"
        for unit, items in here.items():
            fitted_on = content["calibration"][unit]["fitted_on"]
            assert are_among(items, fitted_on)
            assert fitted_on["items"] == (27 if unit == "image" else 14)
        assert are_among(validation, content["calibration"]["image"]["fitted_on"])
        model = load(tmp_path / name, "cpu")
        bands = read_bands(tmp_path / name, content, model.composition, model.calibrators["image"])
        assert set(bands.findings) == set(model.findings) - set(OLD)  # validation says nothing of the site's maps
        assert "calibrated on studies of one site" in (tmp_path / name / "README.md").read_text()
    model = load(folder / "linear", "cpu")
    bands = read_bands(folder / "linear", settings(folder / "linear"), model.composition, model.calibrators["image"])
    assert set(bands.findings) == set(OLD)


def test_an_ensemble_and_a_model_without_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    from hilum.deploy.ensemble_model import combine_models

    combine_models([folder / "linear", folder / "decoder"], tmp_path / "ensemble")
    with pytest.raises(ConfigError, match="is an ensemble"):
        extend.run(tmp_path / "ensemble", folder / "store", NEW, tmp_path / "out", device="cpu")
    combine_models([folder / "linear_more", folder / "decoder_more"], tmp_path / "joined")
    model = load(tmp_path / "joined", "cpu")
    assert model.findings == (*OLD, *NEW)
    predicted = model.predict_store(Store.open(folder / "store"), range(84, 96))
    assert np.isfinite(predicted.probabilities).all()


def test_every_kind_of_head_that_can_be_built_has_a_ladder() -> None:
    """Whatever tensors a head has: a rung takes over only what does not belong to a finding."""
    for changes in (
        [], ["head=linear"], ["head=csra"], ["decoder_layers=2", "positions=sincos"],
        ["cls_memory=true", "cat_cls=true"],
        ["pyramid=true", "decoder_dim=24", "decoder_heads=2", "attention_temperature=true"], ["views=memory"],
        ["head=linear", "views=attention"],
    ):  # fmt: skip
        queries = [] if any(change.startswith("head=") for change in changes) else ["queries=learnable"]
        config = override(DECODER, [*changes, *queries])
        main = config.describe_head(12, 3)
        if "head=linear" not in changes and "head=csra" not in changes and "views=memory" not in changes:
            mains = (main, replace(main, text_dim=6, shared_output=True, learnable_queries=False))
        else:
            mains = (main,)
        check_ladders(config, mains)


def check_ladders(config: FitConfig, mains: tuple) -> None:
    for main in mains:
        with forked(0, "ladder"):
            head = build_head(main)
        rungs = make_ladder(config, 12, main, head, NEW, OLD, None)
        assert [rung.name for rung in rungs] == (
            ["rows", "adapter", "copy", "own"] if main.name == "ml_decoder" or main.views == "attention" else ["own"]
        )
        assert rungs[-1].name == "own"
        for rung in rungs[:-1]:
            assert rung.head.findings == 2
            assert bool(rung.shared) == (rung.name != "copy")
            for name in rung.shared:
                assert torch.equal(rung.initial[name], head.state_dict()[name])


@pytest.mark.parametrize(
    ("options", "data", "match"),
    [
        ({"joint": True, "zero_shot": Path("v.npz")}, "store", "Choose one"),
        ({"joint": True, "shots": 4}, "store", "plain extension alone"),
        ({"zero_shot": Path("v.npz"), "val_shots": 4}, "store", "plain extension alone"),
        ({"accept": True}, "store", "--accept goes with --joint"),
        ({"tolerance": 0.1}, "store", "--tolerance goes with --joint"),
        ({"joint": True, "ladder": "own"}, "store", "--ladder goes with the plain extension"),
        ({"zero_shot": Path("v.npz"), "ladder": "own"}, "store", "--ladder goes with the plain extension"),
        ({}, None, "--data STORE"),
        ({"joint": True}, None, "--data STORE"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict, data: str | None, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        extend.dispatch(
            Path("m"), None if data is None else Path(data), NEW, Path("out"), (), extend.Options(**options)
        )


def test_shots_hold_in_validation_too_unless_said_otherwise(folder: Path, tmp_path: Path, monkeypatch) -> None:
    budgets = []
    monkeypatch.setattr(extend, "run", lambda *arguments: budgets.append(arguments[5:7]) or arguments[3])
    for options in ({"shots": 4}, {"shots": 4, "val_shots": 9}, {"ladder": "rows, own"}):
        extend.dispatch(folder, folder, NEW, tmp_path / "out", (), extend.Options(**options))
    assert budgets == [
        (Shots(4, 4), ["rows", "adapter", "copy", "own"]), (Shots(4, 9), ["rows", "adapter", "copy", "own"]),
        (Shots(None, None), ["rows", "own"]),
    ]  # fmt: skip


@pytest.mark.slow
def test_heads_of_whole_studies_are_extended_too(folder: Path, tmp_path: Path) -> None:
    config = override(DECODER, ["views=memory"])
    fit.run(config, folder / "store", folder / "run", tmp_path / "model", device="cpu")
    extend.run(tmp_path / "model", folder / "store", NEW, tmp_path / "more", FAST, device="cpu")
    old, new = load(tmp_path / "model", "cpu"), load(tmp_path / "more", "cpu")
    store = Store.open(folder / "store")
    one, other = (model.predict_store(store, range(84, 96), batch_size=5) for model in (old, new))
    assert np.array_equal(one.probabilities, other.probabilities[:, :3])
    _, of_study = np.unique(other.study_id, return_inverse=True)
    for study in range(of_study.max() + 1):
        assert np.ptp(other.probabilities[of_study == study], axis=0).max() == 0  # both images carry the study
    single = new.predict_store(store, range(84, 96), batch_size=1)
    np.testing.assert_allclose(single.probabilities, other.probabilities, atol=1e-6)


def test_evidence_of_a_linear_head_stands_beside_the_attention_of_an_added_one(folder: Path, tmp_path: Path) -> None:
    options = [*FAST, "head=ml_decoder", "decoder_dim=8", "decoder_feed_forward=12", "decoder_heads=2"]
    extend.run(folder / "linear", folder / "store", NEW, tmp_path / "out", options, device="cpu")
    store = Store.open(folder / "store")
    result = load(tmp_path / "out", "cpu").predict([store.read(84), store.read(85)])
    assert [one.sum() for one in result.attention["Rib Fracture"]] == [pytest.approx(1), pytest.approx(1)]
    before = load(folder / "linear", "cpu").predict([store.read(84), store.read(85)]).attention["Edema"]
    for one, other in zip(result.attention["Edema"], before, strict=True):
        assert np.array_equal(one, other)


def test_a_model_that_learned_on_kept_channels_is_extended_and_joined(folder: Path, tmp_path: Path) -> None:
    """Its head reads whole tokens; a new one learns on whole tokens too."""
    config = override(DECODER, ["kept_channels=5", "refit=false", *FAST])
    fit.run(config, folder / "store", folder / "run", tmp_path / "model", device="cpu")
    extend.run(tmp_path / "model", folder / "store", NEW, tmp_path / "out", FAST, device="cpu")
    assert settings(tmp_path / "out")["extensions"][0]["training"]["settings"]["kept_channels"] is None
    extend_joint.run(tmp_path / "model", folder / "store", NEW, tmp_path / "joint", FAST, accept=True, device="cpu")
    with pytest.raises(ConfigError, match="kept_channels: `hilum extend` does not obey it"):
        extend.run(tmp_path / "model", folder / "store", NEW, tmp_path / "no", ["kept_channels=3"], device="cpu")


def test_new_findings_are_chosen_and_calibrated_for_the_dataset_that_is_predicted_for(
    folder: Path, tmp_path: Path
) -> None:
    datasets = ["here" if n // 4 % 2 else "there" for n in range(len(SPLITS))]
    make_store(tmp_path / "store", datasets=datasets)
    fit.run(
        override(SMALL, ["target=here", "refit=false", *FAST]), tmp_path / "store", folder / "run", tmp_path / "model",
        device="cpu",
    )  # fmt: skip
    extend.run(tmp_path / "model", tmp_path / "store", NEW, tmp_path / "out", FAST, device="cpu")
    extend_joint.run(tmp_path / "model", tmp_path / "store", NEW, tmp_path / "joint", FAST, accept=True, device="cpu")
    for name in ("out", "joint"):
        predictions, _ = files.read_validation(tmp_path / name)  # refuses heads that were validated on other images
        assert set(predictions.dataset.tolist()) == {"here"}
        assert len(predictions) == 12


def test_a_refit_may_stop_later_than_the_search(folder: Path, tmp_path: Path) -> None:
    extend.run(folder / "linear", folder / "store", NEW, tmp_path / "out", [*FAST, "refit_epochs=4", "stop_epoch=4"])
    training = settings(tmp_path / "out")["extensions"][0]["training"]
    assert (training["refit_epochs"], training["fitted_on"]["epoch"]) == (4, 2)


def test_a_task_stands_for_its_findings(tmp_path: Path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(extend_zero_shot, "run", lambda *arguments: asked.append(arguments[2]) or arguments[3])
    words = ["cxrlt2024-task3", "Situs inversus"]
    extend.dispatch(tmp_path, None, words, tmp_path / "out", (), extend.Options(zero_shot=Path("v.npz")))
    assert asked == [["Bulla", "Cardiomyopathy", "Hilum", "Osteopenia", "Scoliosis", "Situs inversus"]]
