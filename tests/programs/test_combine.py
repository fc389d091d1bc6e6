"""`hilum combine` on prediction files: rules, weights, damping, and what may be chosen on which labels."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from typer.testing import CliRunner

from hilum.cli import app
from hilum.commands import calibrate, combine, evaluate
from hilum.core.errors import ConfigError, PredictionError, StageError, UnknownNameError
from hilum.evaluation.ensemble import combine_members
from hilum.evaluation.normal_damping import Damping
from hilum.evaluation.predictions import Predictions, read_predictions, write_predictions
from hilum.evaluation.studies import aggregate_studies
from hilum.evaluation.study_rules import StudyRule

FINDINGS = ("Normal", "Edema", "Mass")


def predictions(noise: float, labels: np.ndarray, seed: int, **metadata: object) -> Predictions:
    rng = np.random.default_rng(seed)
    patient = np.arange(len(labels)) // 2
    lateral = np.arange(len(labels)) % 2 == 1
    return Predictions(
        image_uid=np.array([f"{n:016x}" for n in range(len(labels))]),
        image_id=np.array([f"i{n}" for n in range(len(labels))]),
        study_id=np.array([f"d/s{n}" for n in patient]), patient_id=np.array([f"d/p{n}" for n in patient]),
        dataset=np.full(len(labels), "d"), view=np.where(lateral, "LATERAL", "PA"), findings=FINDINGS,
        probabilities=expit(3.0 * labels - 1.5 + noise * rng.normal(size=labels.shape) * (1 + 2 * lateral[:, None])),
        metadata={"head_splits": ["train"], **metadata},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`good`, `fair` and `bad` predictions of 240 images (0 .. 159 val, the rest test) of two views a study."""
    path = tmp_path_factory.mktemp("combine")
    rng = np.random.default_rng(0)
    abnormal = np.repeat((rng.random((120, 2)) < 0.3).astype(np.int8), 2, axis=0)
    labels = np.column_stack([(abnormal == 0).all(axis=1), abnormal]).astype(np.int8)
    with (path / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_uid", "dataset", "patient_id", "study_id", "split", *FINDINGS])
        for number, row in enumerate(labels.tolist()):
            split = "val" if number < 160 else "test"
            writer.writerow([f"{number:016x}", "d", f"d/p{number // 2}", f"d/s{number // 2}", split, *row])
    for seed, (name, noise) in enumerate((("good", 1.0), ("fair", 1.3), ("bad", 9.0))):
        write_predictions(predictions(noise, labels, seed), path / f"{name}.parquet")
        write_predictions(predictions(noise, labels, seed).rows(np.arange(160)), path / f"{name}_val.parquet")
    return path


def read(folder: Path, *names: str) -> list[Predictions]:
    return [read_predictions(folder / f"{name}.parquet") for name in names]


def test_studies_then_models_then_damping(folder: Path, tmp_path: Path) -> None:
    files = [folder / "good.parquet", folder / "fair.parquet"]
    out = tmp_path / "out.parquet"
    combine.run(files, out, "frontal_weighted:0.7", "logit_mean", weights="2,1", normal_damping="power:0.5")
    tables = [aggregate_studies(table, "frontal_weighted:0.7") for table in read(folder, "good", "fair")]
    expected = Damping().apply(combine_members(tables, "logit_mean", (2, 1)))
    found = read_predictions(out)
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)
    assert found.metadata["study_aggregation"] == "frontal_weighted:0.7"
    assert (found.stage, found.metadata["ensemble"]) == ("ensemble", "logit_mean")
    assert found.metadata["normal_damping"] == "power:0.5"
    assert [one["weight"] for one in found.metadata["members"]] == [2, 1]


def test_one_file_may_be_damped_alone(folder: Path, tmp_path: Path) -> None:
    combine.run([folder / "good.parquet"], tmp_path / "out.json", normal_damping="linear:0.5")
    found = read_predictions(tmp_path / "out.json")
    np.testing.assert_array_equal(
        found.probabilities, Damping("linear", 0.5).apply(read(folder, "good")[0]).probabilities
    )
    assert found.stage == "raw"
    with pytest.raises(StageError, match="damped"):
        combine.run([tmp_path / "out.json"], tmp_path / "twice.json", study="mean")


def test_the_best_is_chosen_on_validation_and_the_command_for_others_is_printed(
    folder: Path, tmp_path: Path, capsys
) -> None:
    files = [folder / f"{name}_val.parquet" for name in ("bad", "good", "fair")]
    combine.run(
        files, tmp_path / "val.parquet", study="choose", ensemble="mean", choose=True, labels=folder / "labels.csv"
    )
    found = read_predictions(tmp_path / "val.parquet")
    choice = found.metadata["choice"]
    assert choice["members"] == [str(files[1]), str(files[2])]
    assert found.metadata["chosen_on"]["items"] == 160
    assert found.metadata["study_aggregation"].startswith(("frontal_weighted", "learned"))
    printed = capsys.readouterr().out
    assert "On patients that it had not seen (5 folds)" in printed
    line = next(line for line in printed.splitlines() if "The same for other predictions" in line)
    assert str(files[1]) in line
    assert str(files[0]) not in line
    options = line.partition("hilum combine ... ")[2].split()
    others = [str(folder / f"{name}.parquet") for name in ("good", "fair")]
    done = CliRunner().invoke(app, ["combine", *others, *options, "--out", str(tmp_path / "all.parquet")])
    assert done.exit_code == 0, done.output
    everything = read_predictions(tmp_path / "all.parquet")
    np.testing.assert_array_equal(everything.probabilities[:160], found.probabilities)


def test_weights_of_views_are_fitted_on_validation_labels_alone(folder: Path, tmp_path: Path, capsys) -> None:
    combine.run([folder / "good_val.parquet"], tmp_path / "val.parquet", study="learned", labels=folder / "labels.csv")
    found = read_predictions(tmp_path / "val.parquet")
    rule = StudyRule.parse(found.metadata["study_aggregation"])
    assert rule.parameters["lateral"] < rule.parameters["PA"] == 1
    assert found.metadata["chosen_on"]["items"] == 160
    assert str(rule) in capsys.readouterr().out
    with pytest.raises(ConfigError, match="say --labels"):
        combine.run([folder / "good_val.parquet"], tmp_path / "x.parquet", study="learned")


def test_labels_of_test_play_no_part_in_a_choice(folder: Path, tmp_path: Path) -> None:
    """The labels of the test rows are turned round: nothing may change."""
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    turned = [row if row[4] != "test" else [*row[:5], *(str(1 - int(cell)) for cell in row[5:])] for row in rows]
    with (tmp_path / "turned.csv").open("w", newline="") as file:
        csv.writer(file).writerows(turned)
    files = [folder / f"{name}.parquet" for name in ("bad", "good", "fair")]
    found = []
    for labels in (folder / "labels.csv", tmp_path / "turned.csv"):
        combine.run(files, tmp_path / "out.parquet", choose=True, labels=labels)
        found.append(read_predictions(tmp_path / "out.parquet").metadata)
    assert found[0]["choice"] == found[1]["choice"]
    assert found[0]["chosen_on"]["items"] == 160


def test_nothing_is_chosen_on_test_or_in_sample_or_at_another_stage(folder: Path, tmp_path: Path) -> None:
    good, fair = read(folder, "good_val", "fair_val")
    labels, out = folder / "labels.csv", tmp_path / "out.parquet"
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    write_predictions(good, paths[0])

    def refused(second: Predictions, message: str, error: type[Exception] = StageError, split: str = "val") -> None:
        write_predictions(second, paths[1])
        for arguments in ({"choose": True}, {"study": "learned", "ensemble": "mean"}):
            with pytest.raises(error, match=message):
                combine.run(paths, out, labels=labels, split=split, **arguments)
        assert not out.exists()

    refused(fair, "Nothing is chosen on the test split", split="test")
    refused(fair.replace(fair.probabilities, head_splits=["train", "val"]), "trained on split 'val'")
    refused(fair.replace(fair.probabilities, split="test"), "of the test split")
    refused(fair.replace(fair.probabilities, stage="calibrated"), "at stage 'calibrated'")
    refused(aggregate_studies(fair), "at stage 'study'")
    refused(fair.rows(np.arange(100)), "do not cover the same items", PredictionError)
    refused(fair.select(FINDINGS[:2]), "'Mass'", PredictionError)
    write_predictions(fair.replace(fair.probabilities, head_splits=None), paths[1])
    with pytest.raises(StageError, match="does not say on which splits"):
        combine.run(paths[1:], out, "learned", labels=labels, split="train")


@pytest.mark.parametrize("unit", ["image", "study"])
def test_what_was_chosen_on_some_patients_is_not_judged_on_them(folder: Path, tmp_path: Path, unit: str) -> None:
    files = [folder / f"{name}_val.parquet" for name in ("good", "fair")]
    out, labels = tmp_path / "out.parquet", folder / "labels.csv"
    combine.run(files, out, unit=unit, choose=True, labels=labels)
    with pytest.raises(StageError, match="The choice of members or weights was fitted on"):
        evaluate.run(out, labels, tmp_path / "evaluation", bootstraps=0)
    combine.run(files[:1], tmp_path / "plain.parquet", study="mean", unit=unit)
    with pytest.raises(StageError, match="The choice of members or weights of the compared file"):
        evaluate.run(tmp_path / "plain.parquet", labels, tmp_path / "evaluation", bootstraps=0, compare=out)
    assert not (tmp_path / "evaluation").exists()


def test_loose_files_are_chosen_on_and_judged_under_the_patients_of_the_labels(folder: Path, tmp_path: Path) -> None:
    """As predicted each study is a patient of its own; in the labels four studies are one person's."""
    whose = np.array([f"s{number // 2}" for number in range(160)])
    for name, table in zip(("good", "fair"), read(folder, "good_val", "fair_val"), strict=True):
        loose = dataclasses.replace(table, dataset=np.full(160, "files"), study_id=whose, patient_id=whose)
        write_predictions(loose, tmp_path / f"{name}.parquet")
    with (folder / "labels.csv").open(newline="") as file, (tmp_path / "labels.csv").open("w", newline="") as out:
        rows = list(csv.reader(file))[1:161:2]
        writer = csv.writer(out)
        writer.writerow(["study_id", "patient_id", *FINDINGS])
        writer.writerows([f"s{number}", f"person {number // 4}", *row[5:]] for number, row in enumerate(rows))
    files, labels = [tmp_path / "good.parquet", tmp_path / "fair.parquet"], tmp_path / "labels.csv"
    assert evaluate.run(files[0], labels, tmp_path / "evaluation", bootstraps=0)["n_patients"] == 20
    combine.run(files, tmp_path / "chosen.parquet", unit="study", choose=True, labels=labels)
    with pytest.raises(StageError, match="fitted on 80 of the 80"):
        evaluate.run(tmp_path / "chosen.parquet", labels, tmp_path / "x", bootstraps=0)


@pytest.mark.parametrize("options", [{"choose": True}, {"study": "learned", "ensemble": "mean"}])
def test_a_misspelt_label_leaves_no_silent_gap(folder: Path, tmp_path: Path, capsys, options: dict) -> None:
    files, text = [folder / f"{name}_val.parquet" for name in ("good", "fair")], (folder / "labels.csv").read_text()
    for names, message in ((",Edema,Mas\n", r"'Mass' \(nearest: 'Mas'\)"), (",Odd,Mas\n", "'Mass'")):
        (tmp_path / "labels.csv").write_text(text.replace(",Edema,Mass\n", names, 1))
        with pytest.raises(PredictionError, match=message):
            combine.run(files, tmp_path / "out.parquet", labels=tmp_path / "labels.csv", **options)
    lines = [line.rpartition(",")[0] for line in text.splitlines()]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    combine.run(files, tmp_path / "out.parquet", labels=tmp_path / "labels.csv", **options)
    assert "no labels for Mass" in capsys.readouterr().err


def test_calibrated_ranks_are_probabilities(folder: Path, tmp_path: Path) -> None:
    for end, out in (("_val", "val"), ("", "all")):
        files = [folder / f"{name}{end}.parquet" for name in ("good", "fair")]
        combine.run(files, tmp_path / f"{out}.parquet", ensemble="rank_mean")
    calibrate.run(tmp_path / "val.parquet", folder / "labels.csv", out=tmp_path / "cal.json")
    calibrate.run(tmp_path / "all.parquet", use=tmp_path / "cal.json", out=tmp_path / "calibrated.parquet")
    assert "scale" in read_predictions(tmp_path / "all.parquet").metadata
    assert "scale" not in read_predictions(tmp_path / "calibrated.parquet").metadata


def test_options_that_mean_nothing_are_refused(folder: Path, tmp_path: Path) -> None:
    files = [folder / "good.parquet", folder / "fair.parquet"]
    for arguments, message in (
        ({}, "Nothing to combine"),
        ({"study": "mean"}, "become one by an ensemble"),
        ({"ensemble": "mean", "weights": "1"}, "ensemble of 2 needs"),
        ({"ensemble": "mean", "weights": "one,two"}, "expected numbers"),
        ({"ensemble": "mean", "unit": "study"}, "needs a rule for its images"),
        ({"ensemble": "choose"}, "needs --choose"),
        ({"choose": True}, "say --labels"),
        ({"choose": True, "weights": "1,1", "labels": folder / "labels.csv"}, "leave one of them out"),
    ):
        with pytest.raises(ConfigError, match=message):
            combine.run(files, tmp_path / "out.parquet", **arguments)
        assert not (tmp_path / "out.parquet").exists()
    for study in ("mean", "learned:PA=1,AP=1,lateral=1,other=1"):
        with pytest.raises(ConfigError, match="--labels are for --choose"):
            combine.run(files, tmp_path / "out.parquet", study, "mean", labels=folder / "labels.csv")
    for arguments in ({"ensemble": "mean"}, {"choose": True, "labels": folder / "labels.csv"}):
        with pytest.raises(UnknownNameError, match="unit"):
            combine.run(files, tmp_path / "out.parquet", unit="images", **arguments)
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="models and prediction files"):
        combine.run([tmp_path / "model", *files], tmp_path / "out.parquet", ensemble="mean")
    with pytest.raises(PredictionError, match=r"nowhere\.parquet does not exist"):
        combine.run([tmp_path / "model", tmp_path / "nowhere.parquet"], tmp_path / "out.parquet", ensemble="mean")
    with pytest.raises(ConfigError, match="--weights are those of an ensemble"):
        combine.run(files[:1], tmp_path / "out.parquet", study="mean", weights="1")


def test_what_is_written_is_plain_json(folder: Path, tmp_path: Path) -> None:
    files = [folder / f"{name}_val.parquet" for name in ("good", "fair")]
    out = tmp_path / "val.csv"
    combine.run(files, out, normal_damping="choose", choose=True, labels=folder / "labels.csv")
    metadata = json.loads((tmp_path / "val.csv.meta.json").read_text())
    assert {one["normal_damping"] for one in metadata["choice"]["tried"]} >= {None, "power:0.5", "power:2.0"}
    assert {one["ensemble"] for one in metadata["choice"]["tried"]} == {"mean", "logit_mean", "rank_mean"}
