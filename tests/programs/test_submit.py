"""The challenge kits: for every task, raw predictions -> a scaled, checked, scored submission in one command each."""

import csv
import dataclasses
import json
import zipfile

import numpy as np
import pytest
from typer.testing import CliRunner

from hilum.cli import app
from hilum.commands import calibrate, combine, submit
from hilum.core.errors import ConfigError, HilumError, PredictionError, StageError
from hilum.data.labels import ID_COLUMNS, SAME_FINDING, TASKS, canonical
from hilum.evaluation.ensemble import combine_members
from hilum.evaluation.leaderboards import NOT_COMPARABLE
from hilum.evaluation.metrics import average_precision, challenge_ece, f1_at, roc_auc
from hilum.evaluation.predictions import IDENTITY, Predictions, read_predictions, write_predictions
from hilum.evaluation.studies import aggregate_studies
from hilum.evaluation.submission import check_submission
from hilum.evaluation.truth import read_truth

COUNT = 400


small = pytest.mark.parametrize("kit", ["cxrlt2024-task3"], indirect=True)
"""Where it does not matter which task it is."""


def finding_of(name):
    """The name under which a Hilum model predicts a class."""
    return SAME_FINDING.get(name, canonical(name))


@pytest.fixture(scope="module", params=TASKS)
def kit(request, tmp_path_factory):
    """Predictions of validation and test images of a task, columns turned round; labels; the list; a calibrator."""
    task, folder = request.param, tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(len(task))
    names = TASKS[task]
    labels = (rng.random((COUNT, len(names))) < np.geomspace(0.4, 0.08, len(names))).astype(int)
    logits = 1.5 * labels - 4 + rng.normal(size=labels.shape)
    ids = np.array([f"image{index}" for index in range(COUNT)])
    for split, rows in (("val", np.arange(200)), ("test", np.arange(200, COUNT))):
        table = Predictions(
            ids[rows], ids[rows], np.char.add("s", (rows // 2).astype(str)), np.char.add("p", (rows // 4).astype(str)),
            np.full(200, "d"), np.full(200, "PA"), tuple(map(finding_of, names)), 1 / (1 + np.exp(-logits[rows])),
            {"model": "made-up", "head_splits": ["train"]},
        )  # fmt: skip
        write_predictions(table.select(table.findings[::-1]), folder / f"{split}.parquet")
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image_id", *map(finding_of, names)])
            writer.writerows([ids[row], *labels[row]] for row in rows)
    listed = rng.permutation(np.arange(200, COUNT))[:150]
    (folder / "ids.csv").write_text(f"{ID_COLUMNS[task]}\n" + "".join(f"{ids[row]}\n" for row in listed))
    calibrate.run(folder / "val.parquet", labels=folder / "val.csv", out=folder / "cal.json")
    return task, folder, ids[listed].tolist(), labels[listed]


def test_from_predictions_to_a_checked_and_scored_file(kit, tmp_path, capsys):
    task, folder, ids, labels = kit
    options = {"scale": "f1", "calibration": folder / "cal.json"}
    submit.run(folder / "test.parquet", task, folder / "ids.csv", tmp_path / "plain.csv")
    submit.run(folder / "test.parquet", task, folder / "ids.csv", tmp_path / "scaled.csv", **options)
    submit.run(folder / "test.parquet", task, folder / "ids.csv", tmp_path / "closer.csv", **options, compress=0.3)
    table = read_predictions(folder / "test.parquet")
    expected = table.select([finding_of(name) for name in TASKS[task]])
    place = [table.image_id.tolist().index(name) for name in ids]
    found = {}
    for name in ("plain", "scaled", "closer"):
        header, *rows = list(csv.reader((tmp_path / f"{name}.csv").read_text().splitlines()))
        assert header == [ID_COLUMNS[task], *TASKS[task]]
        assert [row[0] for row in rows] == ids
        read, scores = submit.check(tmp_path / f"{name}.csv", task, folder / "ids.csv", labels=folder / "test.csv")
        assert read.notes == ()
        found[name] = read.values, scores
    np.testing.assert_array_equal(found["plain"][0], expected.probabilities[place])
    for c in range(labels.shape[1]):
        y = labels[:, c].astype(np.int8)
        plain, scaled, closer = (found[name][0][:, c] for name in ("plain", "scaled", "closer"))
        for other in (scaled, closer):
            assert average_precision(other, y) == pytest.approx(average_precision(plain, y), abs=1e-12)
            assert roc_auc(other, y) == pytest.approx(roc_auc(plain, y), abs=1e-12)
        assert f1_at(closer, y, 0.5) == f1_at(scaled, y, 0.5)
    scores = {name: score for name, (_, score) in found.items()}
    assert scores["scaled"]["mF1@0.5"] > scores["plain"]["mF1@0.5"] + 0.1
    errors = [scores[name]["mECE_challenge_inferred"] for name in ("plain", "scaled", "closer")]
    assert errors == sorted(errors, reverse=True)
    mean = np.mean(
        [challenge_ece(found["plain"][0][:, c], labels[:, c].astype(np.int8)) for c in range(len(TASKS[task]))]
    )
    assert errors[0] == pytest.approx(mean)
    text = capsys.readouterr()
    assert "not probabilities" in text.err
    assert NOT_COMPARABLE in text.out  # 150 images are no challenge's test set


def test_a_scaled_file_is_never_taken_for_probabilities(kit, tmp_path):
    task, folder, _, _ = kit
    out = tmp_path / "s.csv"
    submit.run(folder / "test.parquet", task, folder / "ids.csv", out, scale="f1", calibration=folder / "cal.json")
    beside = tmp_path / "s.csv.meta.json"
    said = json.loads(beside.read_text())
    assert (said["stage"], said["scale"], said["compress"], said["scaled_from"]) == ("scaled", "f1", 1.0, "raw")
    with pytest.raises(PredictionError):
        read_predictions(out)
    with pytest.raises(HilumError):
        read_truth(out)
    # even with the columns of a prediction file
    header, *rows = list(csv.reader(out.read_text().splitlines()))
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*IDENTITY, *header[1:]])
        writer.writerows([row[0], row[0], "", "", "", "", *row[1:]] for row in rows)
    with pytest.raises(PredictionError, match="stage 'scaled'"):
        read_predictions(out)
    submit.run(folder / "test.parquet", task, folder / "ids.csv", out)
    assert not beside.exists()


@small
def test_the_zip_is_whole_and_always_the_same(kit, tmp_path):
    task, folder, _, _ = kit
    code = tmp_path / ".venv" / "mine"  # what is left out is left out of the code, not of what is above it
    (code / "sub" / "__pycache__").mkdir(parents=True)
    (code / "sub" / "model.py").write_text("x = 1\n")
    (code / "sub" / "__pycache__" / "model.pyc").write_text("")
    for name in ("a.zip", "b.zip"):
        submit.run(folder / "test.parquet", task, folder / "ids.csv", tmp_path / name, code=code)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == ["predictions.csv", "code/sub/model.py"]
    submit.run(folder / "test.parquet", task, folder / "ids.csv", tmp_path / "c.zip")
    ids = (folder / "ids.csv").read_text().split()[1:]
    np.testing.assert_array_equal(
        check_submission(tmp_path / "c.zip", task, ids).values, check_submission(tmp_path / "a.zip", task, ids).values
    )


@small
def test_studies_are_aggregated_on_the_way(kit, tmp_path):
    task, folder, ids, _ = kit
    submit.run(folder / "test.parquet", task, folder / "ids.csv", tmp_path / "s.csv", study="mean")
    values = check_submission(tmp_path / "s.csv", task, ids).values
    table = read_predictions(folder / "test.parquet")
    column = table.findings.index(finding_of(TASKS[task][0]))
    for row, name in enumerate(ids):
        of_study = table.study_id == table.study_id[table.image_id == name]
        assert values[row, 0] == pytest.approx(table.probabilities[of_study, column].mean())
    with pytest.raises(StageError, match="study"):  # cuts fitted on single images
        submit.run(
            folder / "test.parquet", task, folder / "ids.csv", tmp_path / "t.csv", study="mean", scale="f1",
            calibration=folder / "cal.json",
        )  # fmt: skip


@small
def test_an_ensemble_is_submitted_from_its_members(kit, tmp_path):
    """What the refusal of the ensemble's own predictions advises, and join-a-challenge.md."""
    task, folder, ids, _ = kit
    members = [read_predictions(folder / "test.parquet")]
    members.append(members[0].replace(members[0].probabilities[::-1]))
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, member in zip(files, members, strict=True):
        write_predictions(member, path)
    write_predictions(combine_members(members), tmp_path / "ensemble.parquet")  # as hilum predict ENSEMBLE --raw
    write_predictions(aggregate_studies(members[0], unit="study"), tmp_path / "studies.parquet")
    for name, error, message in (
        ("ensemble", StageError, "--study mean --ensemble mean"), ("studies", PredictionError, "images are gone"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            submit.run(tmp_path / f"{name}.parquet", task, folder / "ids.csv", tmp_path / "s.csv", study="mean")
    with pytest.raises(PredictionError, match=r"one row per study.*hilum predict without --study"):
        submit.run(tmp_path / "studies.parquet", task, folder / "ids.csv", tmp_path / "s.csv")
    combine.run(files, tmp_path / "both.parquet", study="mean", ensemble="mean")
    submit.run(tmp_path / "both.parquet", task, folder / "ids.csv", tmp_path / "s.csv")
    expected = combine_members([aggregate_studies(member) for member in members])
    rows = [expected.image_id.tolist().index(name) for name in ids]
    columns = [expected.findings.index(finding_of(name)) for name in TASKS[task]]
    values = check_submission(tmp_path / "s.csv", task, ids).values
    np.testing.assert_array_equal(values, expected.probabilities[rows][:, columns])


@small
def test_cuts_of_the_submitted_images_are_refused(kit, tmp_path):
    task, folder, _, _ = kit
    calibrate.run(folder / "test.parquet", labels=folder / "test.csv", out=tmp_path / "c.json")
    with pytest.raises(StageError, match="150 of the 150"):
        submit.run(
            folder / "test.parquet", task, folder / "ids.csv", tmp_path / "s.csv", scale="f1",
            calibration=tmp_path / "c.json",
        )  # fmt: skip
    assert not (tmp_path / "s.csv").exists()
    # validation images in the same file, which are not listed, are not submitted
    parts = [read_predictions(folder / f"{split}.parquet") for split in ("val", "test")]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in (*IDENTITY, "probabilities")}
    write_predictions(dataclasses.replace(parts[0], **columns), tmp_path / "both.parquet")
    for name, source in (("s", tmp_path / "both.parquet"), ("t", folder / "test.parquet")):
        submit.run(
            source, task, folder / "ids.csv", tmp_path / f"{name}.csv", scale="f1", calibration=folder / "cal.json"
        )
    assert (tmp_path / "s.csv").read_bytes() == (tmp_path / "t.csv").read_bytes()


def test_a_class_without_a_finding_needs_a_constant(kit, tmp_path, capsys):
    task, folder, ids, _ = kit
    table = read_predictions(folder / "test.parquet")
    write_predictions(table.select(table.findings[:-1]), tmp_path / "p.parquet")  # without the first class
    arguments = (tmp_path / "p.parquet", task, folder / "ids.csv", tmp_path / "s.csv")
    with pytest.raises(PredictionError, match=f"never trained: {TASKS[task][0]!r}.*--fill-untrained 0.01"):
        submit.run(*arguments)
    recorded = read_predictions(tmp_path / "p.parquet")
    shares = dict.fromkeys(recorded.findings, 0.1)
    write_predictions(recorded.replace(recorded.probabilities, prevalence=shares), tmp_path / "p.parquet")
    with pytest.raises(PredictionError, match=f"prevalence of {TASKS[task][0]!r}.*--fill-untrained 0.01"):
        submit.run(*arguments, fill_untrained="prevalence")
    submit.run(*arguments, fill_untrained="0.25")
    found = check_submission(tmp_path / "s.csv", task, ids)
    assert set(found.values[:, 0]) == {0.25}
    assert TASKS[task][0] in found.notes[0]
    assert "1 classes are a constant" in capsys.readouterr().err


@small
def test_options_that_mean_nothing_are_refused(kit, tmp_path):
    task, folder, _, _ = kit
    arguments = (folder / "test.parquet", task, folder / "ids.csv")
    for out, options, message in (
        ("s.csv", {"compress": 0.3}, "--scale f1"),
        ("s.csv", {"scale": "f1", "compress": 2.0}, "at most 1"),
        ("s.csv", {"calibration": folder / "cal.json"}, "--calibration goes with --scale"),
        ("s.csv", {"code": folder}, "--out submission.zip"),
        ("s.zip", {"code": folder / "ids.csv"}, "--code is a folder"),
        ("s.parquet", {}, "a .csv or a .zip"),
    ):
        with pytest.raises(ConfigError, match=message):
            submit.run(*arguments, tmp_path / out, **options)
    assert not list(tmp_path.iterdir())


@small
def test_the_command_line(kit, tmp_path):
    task, folder, _, _ = kit
    out, ids = str(tmp_path / "s.csv"), str(folder / "ids.csv")
    runner = CliRunner()
    written = runner.invoke(app, ["submit", str(folder / "test.parquet"), "--task", task, "--ids", ids, "--out", out])
    assert written.exit_code == 0, written.output
    checked = runner.invoke(app, ["submit", "--check", out, "--task", task, "--ids", ids])
    assert checked.exit_code == 0, checked.output
    for arguments in (
        ["--task", task, "--ids", ids],
        [str(folder / "test.parquet"), "--check", out, "--task", task, "--ids", ids],
        [str(folder / "test.parquet"), "--task", task, "--ids", ids, "--labels", str(folder / "labels.csv")],
        ["--check", out, "--task", task, "--ids", ids, "--scale", "f1"],
        ["--check", out, "--task", task, "--ids", ids, "--study", "mean"],
    ):
        assert runner.invoke(app, ["submit", *arguments]).exit_code == 2


@small
def test_more_operating_points_and_a_report_of_patients_left_out(kit, tmp_path, capsys):
    _, folder, _, _ = kit
    calibrate.run(
        folder / "val.parquet", labels=folder / "val.csv", out=tmp_path / "c.json", method="cross_fitted",
        sensitivity=[0.9], specificity=[0.99],
    )  # fmt: skip
    content = json.loads((tmp_path / "c.json").read_text())
    points = {"f1", "youden", "sens_at_spec95", "spec_at_sens95", "spec_at_sens90", "sens_at_spec99"}
    assert all(set(cuts) == points for cuts in content["thresholds"].values())
    before, after = content["cross_fitted"]["macro"]["Brier"]
    assert after < before
    assert "On patients left out of the fit" in capsys.readouterr().out


@small
def test_the_training_split_is_refused_where_a_file_does_not_say_what_its_head_saw(kit, tmp_path):
    _, folder, _, _ = kit
    table = read_predictions(folder / "val.parquet")
    labels = (folder / "val.csv").read_text().splitlines()
    (tmp_path / "l.csv").write_text("\n".join([f"split,{labels[0]}", *(f"train,{line}" for line in labels[1:])]))
    for splits, message in ((["train"], "was trained on split 'train'"), ([], "does not say")):
        write_predictions(table.replace(table.probabilities, head_splits=splits), tmp_path / "p.parquet")
        with pytest.raises(StageError, match=message):
            calibrate.run(tmp_path / "p.parquet", labels=tmp_path / "l.csv", split="train", out=tmp_path / "c.json")
