"""runs/label_sources.py: what is planted is what is said, and the experiment tells right from wrong on known data."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import save_backbone
from hilum.commands import fit
from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.seeding import forked
from hilum.data.store import Store, write_arrays
from hilum.deploy.predictor import load
from hilum.evaluation.definitions import average_precision

RUNS = Path(__file__).resolve().parents[2] / "runs"
FINDINGS = ("Edema", "Hernia")
COUNTS = {"here": {"train": 48, "val": 24, "test": 40}, "there": {"train": 60, "test": 20}, "yonder": {"val": 24}}


@pytest.fixture
def programs(monkeypatch):
    monkeypatch.syspath_prepend(str(RUNS))
    return importlib.import_module("label_planting"), importlib.import_module("label_sources")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Edema is brightness, Hernia are stripes, which most added images have and none annotates.

    A fifth of the target's images without stripes are called Hernia too. So where added images count as negative,
    stripes speak against it; were the target's labels clean, they would only speak less for it, and the order stay.
    """
    path, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    datasets = [name for name, splits in COUNTS.items() for n in splits.values() for _ in range(n)]
    splits = [split for by_split in COUNTS.values() for split, n in by_split.items() for _ in range(n)]
    added = np.array(datasets) != "here"
    truth = np.repeat((rng.random((len(splits) // 2, 2)) < 0.3), 2, axis=0)  # two images a study
    truth[added, 1] = np.repeat(rng.random(added.sum() // 2) < 0.9, 2)
    images = rng.integers(0, 40, (len(splits), 16, 16)).astype(np.uint8)
    images += (truth[:, 0, None, None] * 60).astype(np.uint8)
    images[:, np.arange(16) % 4 < 2] += (truth[:, 1, None, None] * 120).astype(np.uint8)
    labels = truth.astype(np.int8)
    labels[:, 1] |= np.repeat(rng.random(len(splits) // 2) < 0.2, 2)
    labels[added, 1] = -1
    labels[np.flatnonzero(added)[:4], 0] = -2
    write_arrays(
        path / "store", list(images), labels, FINDINGS, splits=splits, datasets=datasets,
        patients=[f"{d}/p{n // 4}" for n, d in enumerate(datasets)],
        studies=[f"{d}/s{n // 2}" for n, d in enumerate(datasets)],
    )  # fmt: skip
    with forked(0, "test"):
        backbone = VisionTransformer(ViTConfig(12, 2, 2, patch_size=8, image_size=16))
    save_backbone(backbone, path / "run", "hilum-grey-1")
    return path


def test_noise_moves_a_share_of_the_positive_studies_and_keeps_how_many_there_are(programs, folder: Path) -> None:
    planting, _ = programs
    store = Store.open(folder / "store")
    added = store.datasets != "here"
    before = np.array(store.labels)
    small, large = (planting.flip_labels(store, added, share, 3) for share in (0.25, 0.5))
    np.testing.assert_array_equal(large[~added], before[~added])
    np.testing.assert_array_equal(large[before < 0], before[before < 0])
    np.testing.assert_array_equal(large, planting.flip_labels(store, added, 0.5, 3))
    assert (large != planting.flip_labels(store, added, 0.5, 4)).any()
    np.testing.assert_array_equal(planting.flip_labels(store, added, 0.0, 3), before)
    assert ((small != before) <= (large != before)).all()
    for dataset in ("there", "yonder"):
        known = (store.datasets == dataset) & (before[:, 0] >= 0)
        studies = np.unique(store.studies[known])
        of_study = {when: {s: set(at[store.studies == s, 0].tolist()) for s in studies.tolist()}
                    for when, at in (("before", before), ("after", large))}  # fmt: skip
        assert all(len(codes) == 1 for at in of_study.values() for codes in at.values())  # images change together
        positive = [s for s in studies if of_study["before"][s] == {1}]
        lost = [s for s in positive if of_study["after"][s] == {0}]
        won = [s for s in studies if of_study["before"][s] == {0} and of_study["after"][s] == {1}]
        assert len(lost) == len(won) == round(0.5 * len(positive)) > 0
    np.testing.assert_array_equal(store.labels, before)


def test_the_planted_defect_reads_what_added_images_do_not_say_as_absent(programs, folder: Path) -> None:
    planting, _ = programs
    store = Store.open(folder / "store")
    added = store.datasets != "here"
    labels = np.array(store.labels)
    labels[0, 1] = -1  # of the target: stays
    planted = planting.unknown_as_negative(labels, added)
    assert planted[0, 1] == -1
    assert (planted[added] == (labels[added] == 1)).all()


def test_a_copy_has_the_same_pixels_and_other_labels_and_leaves_the_first_as_it_was(
    programs, folder: Path, tmp_path: Path
) -> None:
    planting, _ = programs
    store = Store.open(folder / "store")
    index = (store.path / "index.npz").read_bytes()
    splits = store.splits.copy()
    splits[:10] = ""
    labels = 1 - np.clip(store.labels, 0, 1)
    (tmp_path / "copy" / "shards").mkdir(parents=True)  # what an interrupted copy left
    copy = planting.copy_store(store, tmp_path / "copy", labels, splits)
    np.testing.assert_array_equal(copy.labels, labels)
    np.testing.assert_array_equal(copy.splits, splits)
    for name in ("uids", "patients", "studies", "datasets", "pictures"):
        np.testing.assert_array_equal(getattr(copy, name), getattr(store, name))
    assert all((copy.read(n) == store.read(n)).all() for n in range(len(store)))
    assert (store.path / "index.npz").read_bytes() == index


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_another_scanner_darkens_and_blurs_added_images_alone(programs, tmp_path: Path, encoding: str) -> None:
    planting, _ = programs
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (20, 14), np.uint8), np.full((9, 9), 128, np.uint8), np.zeros((33, 33), np.uint8)]
    images[2][16, 16] = 255
    store = write_arrays(
        tmp_path / "store", images, np.zeros((3, 1), np.int8), ("Mass",), datasets=["here", "there", "there"],
        encoding=encoding,
    )  # fmt: skip
    shifted = planting.shift_store(store, tmp_path / "shifted", store.datasets != "here", 1.6, 1.5)
    np.testing.assert_array_equal(shifted.read(0), images[0])
    np.testing.assert_array_equal(shifted.read(1), np.full((9, 9), round(255 * (128 / 255) ** 1.6)))
    y, x = np.mgrid[-16:17, -16:17]
    point = 255 * np.exp(-(x**2 + y**2) / (2 * 1.5**2)) / (2 * np.pi * 1.5**2)
    assert np.abs(shifted.read(2) - point).max() < 1.5
    np.testing.assert_array_equal(shifted.labels, store.labels)
    with pytest.raises(ConfigError, match=r"00001\.bin holds images that are to stay"):
        planting.shift_store(store, tmp_path / "mixed", np.array([False, True, False]), 1.6, 1.5)


def test_a_smaller_share_is_whole_patients_and_everything_added_is_for_training(programs, folder: Path) -> None:
    _, sources = programs
    place = sources.Place(folder / "store", str(folder / "run"), folder / "splits", _small(sources))
    store, whole, half = place.base, place.splits(1.0, 0), place.splits(0.5, 0)
    assert (whole[~place.own] == "train").all()
    np.testing.assert_array_equal(whole[place.own], store.splits[place.own])
    kept = place.own & (half == "train")
    assert (kept.sum(), (half == "val").sum()) == (24, 12)
    assert (half[place.test] == "test").all()
    assert not set(store.patients[kept]) & set(store.patients[place.own & (half == "")])
    alone, masked = (sources.Unit(variant, 0.5, 0) for variant in (sources.ALONE, sources.MASKED))
    steps = {unit.variant.name: place.settings(unit).search_epochs * n for unit, n in ((alone, 24), (masked, 128))}
    assert steps["alone"] == pytest.approx(steps["masked"], rel=0.1)
    assert (place.splits(0.5, 1) != half).any()


def _small(sources):
    return replace(sources.SCALES["tiny"], target="here")


def test_masked_unknowns_beat_the_planted_defect_and_a_stopped_run_goes_on(
    programs, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    _, sources = programs
    settings = (*_small(sources).settings, "search_epochs=4", "refit_epochs=4", "learning_rates=[5e-2]", "flip=0")
    experiment = replace(
        _small(sources), variants={1.0: (sources.MASKED, sources.NEGATIVE)}, recipe="laptop_linear",
        settings=settings,
    )  # fmt: skip
    fitted, real = [], sources.fit.run

    def stopped(config, data, *rest):
        fitted.append(data.parent)
        if len(fitted) == 2:
            raise KeyboardInterrupt
        return real(config, data, *rest)

    monkeypatch.setattr(sources.fit, "run", stopped)
    place = sources.Place(folder / "store", str(folder / "run"), tmp_path, experiment)
    with pytest.raises(KeyboardInterrupt):
        sources.run(place)
    summary = sources.run(sources.Place(folder / "store", str(folder / "run"), tmp_path, experiment))
    assert len(fitted) == 3
    assert fitted[1] == fitted[2]  # the first once, the one that was stopped twice
    [part] = summary["shares"]
    assert part["columns"] == {"all": [*FINDINGS], "head": [*FINDINGS], "shared": ["Edema"], "unshared": ["Hernia"]}
    [difference] = [one for one in part["differences"] if one["first"] == "masked" and one["second"] == "negative"]
    assert difference["sets"]["unshared"]["value"] > 0.1
    assert difference["sets"]["unshared"]["shown"]
    rows = {name: sets["unshared"]["value"] for name, sets in part["rows"].items()}
    assert difference["sets"]["unshared"]["value"] == pytest.approx(rows["masked"] - rows["negative"])
    table = (tmp_path / "label_sources.md").read_text()
    assert "| masked - negative |" in table
    assert "| masked | 48 + 104 | 2 |" in table
    assert (
        summary["shares"][0]["rows"] == json.loads((tmp_path / "label_sources.json").read_text())["shares"][0]["rows"]
    )
    assert not list(tmp_path.glob("units/*/*/*/store"))


def test_a_store_without_the_target_or_anything_to_add_is_refused(programs, folder: Path, tmp_path: Path) -> None:
    _, sources = programs
    with pytest.raises(UnknownNameError, match="here"):
        sources.Place(folder / "store", "random:demo8", tmp_path, replace(_small(sources), target="her"))
    with pytest.raises(ConfigError, match="found 0"):
        sources.Place(folder / "store", "random:demo8", tmp_path, replace(_small(sources), target="yonder"))


@pytest.mark.slow
def test_every_kind_of_variant_runs_from_the_command_line(
    programs, folder: Path, tmp_path: Path, monkeypatch
) -> None:  # fmt: skip
    _, sources = programs
    words = [str(folder / "store"), str(folder / "run"), str(tmp_path), "--scale", "tiny", "--target", "here"]
    sources.main([*words, "--seeds", "0,1"])
    content = json.loads((tmp_path / "label_sources.json").read_text())
    assert [part["share"] for part in content["shares"]] == [1.0, 0.5]
    assert set(content["shares"][0]["rows"]) == {
        "alone", "masked", "negative", "noise_30_weight_25", "shifted_bias", "masked_pseudo",
    }  # fmt: skip
    assert [(one["share"], one["first"]) for one in content["by_size"]] == [(0.5, "masked")]
    assert "minus at 100%" in (tmp_path / "label_sources.md").read_text()
    [pseudo] = tmp_path.glob("units/1/masked_pseudo-judged/seed0-*/model/config.json")
    assert "alone-teacher" in json.loads(pseudo.read_text())["training"]["settings"]["pseudo_labels"]

    monkeypatch.setattr(sources.fit, "run", None)  # every unit is there
    sources.main([*words, "--seeds", "0,1", "--variants", "alone,noise_30_weight_25"])
    some = json.loads((tmp_path / "label_sources_alone_noise_30_weight_25.json").read_text())
    assert [list(part["rows"]) for part in some["shares"]] == [["alone", "noise_30_weight_25"], ["alone"]]
    assert some["shares"][0]["facts"]["alone"] == content["shares"][0]["facts"]["alone"]
    assert content == json.loads((tmp_path / "label_sources.json").read_text())
    with pytest.raises(UnknownNameError, match="noise_30_weight_25"):
        sources.main([*words, "--variants", "noise_30_weight_2"])


@pytest.mark.slow
def test_without_faults_the_copy_is_learned_from_as_the_store_itself(programs, folder: Path, tmp_path: Path) -> None:
    _, sources = programs
    place = sources.Place(folder / "store", str(folder / "run"), tmp_path, _small(sources))
    unit = sources.Unit(sources.ALONE, 1.0, 0)
    made = place.make(unit)
    fit.run(place.settings(unit), folder / "store", folder / "run", tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (made / "model/model.safetensors").read_bytes()
    predictions = load(tmp_path / "model").predict_store(place.base, place.test, raw=True)
    result = sources.read_result(made / "result.npz")
    assert result.points["AP"].tolist() == [
        average_precision(predictions.probabilities[:, column], place.base.labels[place.test, column])
        for column in range(2)
    ]
