"""combine -> calibrate -> evaluate -> submit, on made-up predictions of two models and a store of their labels."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from hilum.commands import calibrate, combine, evaluate, submit
from hilum.core.errors import ConfigError, HilumError, LeakageError, PredictionError, StageError, UnknownNameError
from hilum.core.seeding import stream
from hilum.data.labels import TASKS
from hilum.data.store import Store, write_arrays
from hilum.evaluation.metrics import average_precision, f1_at
from hilum.evaluation.predictions import Predictions, read_predictions, write_predictions
from hilum.evaluation.summary import evaluation_table

TASK = "cxrlt2024-task2"
FINDINGS = tuple(sorted(TASKS[TASK]))
COUNT = 480


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store of labels and, of two models, raw predictions on val and on test."""
    folder = tmp_path_factory.mktemp("world")
    rng = stream(0, "evaluation world")
    study = np.arange(COUNT) // 2
    labels = (rng.random((COUNT // 2, len(FINDINGS))) < np.geomspace(0.4, 0.05, len(FINDINGS)))[study].astype(np.int8)
    labels[::50, 0] = -1
    splits = np.array(["train", "train", "val", "test", "test"])[study // 2 % 5]
    store = write_arrays(
        folder / "store", [np.zeros((2, 2), np.uint8)] * COUNT, labels, FINDINGS,
        patients=[f"d/p{s // 2}" for s in study], studies=[f"d/s{s}" for s in study], splits=splits.tolist(),
        image_ids=[f"d/image{index}" for index in range(COUNT)], datasets=["d"] * COUNT,
    )  # fmt: skip
    for model in ("one", "two"):
        logits = 1.2 * (labels == 1) - 3 + rng.normal(size=labels.shape)
        for split in ("val", "test"):
            rows = np.flatnonzero(splits == split)
            table = Predictions(
                store.uids[rows], store.image_ids[rows], store.studies[rows], store.patients[rows],
                store.datasets[rows], store.views[rows], FINDINGS, 1 / (1 + np.exp(-logits[rows])),
                {"model": model, "head_splits": ["train"]},
            )  # fmt: skip
            write_predictions(table, folder / f"{model}-{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def results(world):
    """The whole way, once."""
    for split in ("val", "test"):
        files = [world / f"one-{split}.parquet", world / f"two-{split}.parquet"]
        combine.run(files, world / f"both-{split}.parquet", study="mean", ensemble="mean")
    calibrate.run(world / "both-val.parquet", labels=world / "store", out=world / "cal.json")
    calibrate.run(world / "both-test.parquet", out=world / "calibrated.parquet", use=world / "cal.json")
    options = {"split": "test", "bootstraps": 50}
    return {
        "single": evaluate.run(world / "one-test.parquet", world / "store", world / "single", **options),
        "calibrated": evaluate.run(
            world / "calibrated.parquet", world / "store", world / "calibrated",
            compare=world / "one-test.parquet", **options,
        ),
    }  # fmt: skip


def test_each_step_does_what_it_says(results):
    single, calibrated = results["single"], results["calibrated"]
    assert calibrated["stage"] == "calibrated"
    assert single["stage"] == "raw"
    assert calibrated["macro"]["mAP"] > single["macro"]["mAP"]
    assert calibrated["macro"]["mECE_standard"] < single["macro"]["mECE_standard"]
    assert calibrated["macro"]["mF1@tuned"] is not None
    assert single["macro"]["mF1@tuned"] is None
    difference = calibrated["compare"]["differences"]["mAP"]
    assert difference["difference"] == pytest.approx(calibrated["macro"]["mAP"] - single["macro"]["mAP"])
    assert difference["shown"]
    assert difference["low"] > 0


def test_the_files_are_strict_json_and_a_page(world, results):
    def refuse(token):
        raise AssertionError(token)

    content = json.loads((world / "calibrated" / "metrics.json").read_text(), parse_constant=refuse)
    assert content == results["calibrated"]
    assert content["n_images"] == 192
    assert content["n_patients"] == 48
    assert content["groups_from"] == "training images of the labels file"
    assert "digests" not in json.dumps(content)
    assert "Research use only" in (world / "calibrated" / "report.html").read_text()


def test_two_runs_write_the_same_bytes(world, results):
    evaluate.run(world / "one-test.parquet", world / "store", world / "again", split="test", bootstraps=50)
    assert (world / "again" / "metrics.json").read_bytes() == (world / "single" / "metrics.json").read_bytes()


def test_classes_in_another_order_give_the_same_numbers(world, results, tmp_path):
    table = read_predictions(world / "one-test.parquet")
    write_predictions(table.select(table.findings[::-1]), tmp_path / "p.csv")
    turned = evaluate.run(tmp_path / "p.csv", world / "store", tmp_path / "m", split="test", bootstraps=0)
    for name in FINDINGS:
        assert turned["findings"][name]["AP"] == results["single"]["findings"][name]["AP"]
    assert turned["macro"]["mAP"] == pytest.approx(results["single"]["macro"]["mAP"], abs=1e-12)


def test_a_renamed_finding_is_named(world, tmp_path):
    table = read_predictions(world / "one-test.parquet")
    names = ["Oedema" if name == "Edema" else name for name in table.findings]
    write_predictions(dataclasses.replace(table, findings=tuple(names)), tmp_path / "p.parquet")
    for task in (None, TASK):
        with pytest.raises(PredictionError, match="'Edema'"):
            evaluate.run(tmp_path / "p.parquet", world / "store", tmp_path / "m", task=task, bootstraps=0)


def test_study_means_per_image_and_per_study_agree(world, tmp_path):
    combine.run([world / "one-test.parquet"], tmp_path / "images.csv", study="mean")
    combine.run([world / "one-test.parquet"], tmp_path / "studies.csv", study="mean", unit="study")
    images = evaluate.run(tmp_path / "images.csv", world / "store", tmp_path / "a", split="test", bootstraps=10)
    studies = evaluate.run(tmp_path / "studies.csv", world / "store", tmp_path / "b", split="test", bootstraps=10)
    assert (studies["unit"], studies["n_items"]) == ("study", 96)
    assert studies["findings"]["Hernia"]["AUC"] == pytest.approx(images["findings"]["Hernia"]["AUC"], abs=1e-12)


def test_a_calibrator_fitted_on_test_is_refused(world, results, tmp_path):
    with pytest.raises(StageError, match="test split"):
        calibrate.run(world / "both-test.parquet", labels=world / "store", split="test", out=tmp_path / "c.json")
    # fitted on the test images all the same, behind a CSV that knows no splits
    table = read_predictions(world / "both-test.parquet")
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", *FINDINGS])
        writer.writerows([name, *[index % 3 % 2] * len(FINDINGS)] for index, name in enumerate(table.image_id.tolist()))
    calibrate.run(world / "both-test.parquet", labels=tmp_path / "labels.csv", out=tmp_path / "c.json")
    calibrate.run(world / "both-test.parquet", out=tmp_path / "c.parquet", use=tmp_path / "c.json")
    with pytest.raises(StageError, match="192 of the 192"):
        evaluate.run(tmp_path / "c.parquet", world / "store", tmp_path / "m", bootstraps=0)
    with pytest.raises(StageError, match="192 of the 192"):
        evaluate.run(
            world / "both-test.parquet", world / "store", tmp_path / "m", calibration=tmp_path / "c.json", bootstraps=0
        )
    assert not (tmp_path / "m").exists()


def write_labels(path, world, name, split=None):
    """The store's labels of predicted items as a CSV, with a column of splits or without."""
    table, store = read_predictions(world / f"{name}.parquet"), Store.open(world / "store")
    place = {uid: row for row, uid in enumerate(store.uids.tolist())}
    rows = [store.labels[place[uid]].tolist() for uid in table.image_uid.tolist()]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_uid", *(["split"] if split else []), *FINDINGS])
        writer.writerows(
            [uid, *([split] if split else []), *row] for uid, row in zip(table.image_uid.tolist(), rows, strict=True)
        )
    return path


def test_the_test_split_is_refused_however_it_is_spelled_and_where_labels_name_none(world, tmp_path):
    out, test = tmp_path / "out.json", world / "one-test.parquet"
    spelled = write_labels(tmp_path / "spelled.csv", world, "one-test", "Test")
    silent = write_labels(tmp_path / "silent.csv", world, "one-test")
    table = read_predictions(test)
    write_predictions(table.replace(table.probabilities, split="test"), tmp_path / "of_test.parquet")
    write_predictions(table.replace(table.probabilities, split="train"), tmp_path / "of_train.parquet")
    for file, labels, split, error, message in (
        (test, spelled, "Test", StageError, "on the test split"),
        (tmp_path / "of_test.parquet", silent, None, StageError, "of the test split"),
        (tmp_path / "of_train.parquet", silent, None, StageError, "trained on split 'train'"),
        (test, silent, "val", PredictionError, "leave out --split"),
    ):
        with pytest.raises(error, match=message):
            calibrate.run(file, labels, split, out)
        with pytest.raises(error, match=message):
            combine.run([file], out.with_suffix(".csv"), study="learned", labels=labels, split=split)
    assert not out.exists()
    found = evaluate.run(test, spelled, tmp_path / "m", split="TEST", bootstraps=0)
    assert (found["split"], found["n_items"]) == ("test", 192)
    val = write_labels(tmp_path / "val.csv", world, "one-val", "Val")
    for labels, split in ((val, "VAL"), (world / "store", None)):
        calibrate.run(world / "one-val.parquet", labels, split, out)


def test_thresholds_come_from_the_calibrator_of_the_predictions_and_no_other(world, results, tmp_path):
    """Another one that was fitted on the same items has thresholds of other probabilities."""
    options = {"split": "test", "bootstraps": 0}
    for name, more in (("other", {"method": "platt"}), ("more", {"sensitivity": [0.9]})):
        calibrate.run(world / "both-val.parquet", world / "store", out=tmp_path / f"{name}.json", **more)
    found = [
        evaluate.run(world / "calibrated.parquet", world / "store", tmp_path / "m", calibration=path, **options)[
            "macro"
        ]
        for path in (None, world / "cal.json", tmp_path / "more.json")
    ]
    assert found[0] == found[1] == found[2]
    with pytest.raises(StageError, match="calibrated by something else than"):
        evaluate.run(
            world / "calibrated.parquet",
            world / "store",
            tmp_path / "x",
            calibration=tmp_path / "other.json",
            **options,
        )


def test_validation_predictions_of_a_head_trained_on_validation_are_refused(world, tmp_path):
    table = read_predictions(world / "one-val.parquet")
    write_predictions(table.replace(table.probabilities, head_splits=["train", "val"]), tmp_path / "p.parquet")
    with pytest.raises(StageError, match="not out of sample"):
        calibrate.run(tmp_path / "p.parquet", labels=world / "store", out=tmp_path / "c.json")
    result = evaluate.run(tmp_path / "p.parquet", world / "store", tmp_path / "m", split="val", bootstraps=0)
    assert result["items_of_head_training"] == 96


def test_calibrated_input_and_other_stages_are_refused(world, results, tmp_path):
    for options in ({"study": "mean"}, {"ensemble": "mean"}):
        with pytest.raises(StageError, match="calibrated"):
            combine.run([world / "calibrated.parquet"], tmp_path / "x.parquet", **options)
    with pytest.raises(StageError, match="ensemble predictions per image"):
        calibrate.run(world / "one-test.parquet", out=tmp_path / "x.parquet", use=world / "cal.json")
    assert not list(tmp_path.iterdir())


def test_exposed_images_are_refused_unless_that_is_said(world, tmp_path, capsys):
    table = read_predictions(world / "one-test.parquet")
    write_predictions(table.replace(table.probabilities, exposed_images=17), tmp_path / "p.parquet")
    with pytest.raises(LeakageError, match=r"has met 17 of the predicted images.*--accept-exposed"):
        evaluate.run(tmp_path / "p.parquet", world / "store", tmp_path / "m", bootstraps=0)
    assert not (tmp_path / "m").exists()
    result = evaluate.run(tmp_path / "p.parquet", world / "store", tmp_path / "m", bootstraps=0, accept_exposed=True)
    assert result["exposed_images"] == 17
    accepted = table.replace(table.probabilities, exposed_images=17, accepted_leak="a pool that leaks by design")
    write_predictions(accepted, tmp_path / "q.parquet")
    evaluate.run(tmp_path / "q.parquet", world / "store", tmp_path / "q", bootstraps=0)
    result = evaluate.run(world / "one-test.parquet", world / "store", tmp_path / "n", bootstraps=0)
    assert result["exposed_images"] is None  # these predictions do not say
    assert "17 of the predicted images" in capsys.readouterr().err
    for exposed in (None, 0):
        unseen = table.replace(table.probabilities, exposed_images=exposed)
        write_predictions(dataclasses.replace(unseen, dataset=np.full(len(table), "files")), tmp_path / "r.parquet")
        evaluate.run(tmp_path / "r.parquet", world / "store", tmp_path / "r", bootstraps=0)
        said = "Whether the model, or its calibrator, has met these images is not known"
        for where in (capsys.readouterr().err, (tmp_path / "r" / "report.html").read_text()):
            assert (said in where) is (exposed is None)


def test_the_table_has_groups_and_intervals(world, results, capsys):
    text = evaluation_table(results["calibrated"])
    assert text.splitlines()[0].split()[:3] == ["findings", "mAP", "mAUC"]
    assert "head (" in text
    assert "medium (" in text
    assert "tail (" not in text
    assert f"{results['calibrated']['macro']['mAP']:.3f} [" in text


def write_ids(path, rows):
    path.write_text("dicom_id\n" + "".join(f"image{row}\n" for row in rows))
    return path


def test_submission(world, results, tmp_path):
    table = read_predictions(world / "calibrated.parquet")
    chosen = np.arange(len(table))[::-2]
    ids = [name.removeprefix("d/") for name in table.image_id[chosen].tolist()]
    listed = write_ids(tmp_path / "ids.csv", [name.removeprefix("image") for name in ids])
    for name, options in {"plain": {}, "scaled": {"scale": "f1", "calibration": world / "cal.json"}}.items():
        submit.run(world / "calibrated.parquet", TASK, listed, tmp_path / f"{name}.csv", **options)
    content = {}
    for name in ("plain", "scaled"):
        header, *rows = list(csv.reader((tmp_path / f"{name}.csv").read_text().splitlines()))
        assert header == ["dicom_id", *TASKS[TASK]]
        assert header.index("Normal") < header.index("Nodule")
        assert [row[0] for row in rows] == ids
        content[name] = np.array([row[1:] for row in rows], np.float64)
    np.testing.assert_array_equal(content["plain"], table.rows(chosen).select(TASKS[TASK]).probabilities)
    cuts = {name: values["f1"] for name, values in table.metadata["thresholds"].items()}
    labels = (np.arange(len(chosen)) % 3 == 0).astype(np.int8)
    for c, name in enumerate(TASKS[TASK]):
        plain, scaled = content["plain"][:, c], content["scaled"][:, c]
        assert average_precision(plain, labels) == average_precision(scaled, labels)
        assert f1_at(scaled, labels, 0.5) == f1_at(plain, labels, cuts[name])


def test_submissions_that_would_be_refused(world, results, tmp_path):
    listed = write_ids(tmp_path / "ids.csv", [12, 13])
    out = tmp_path / "s.csv"
    predictions = world / "calibrated.parquet"
    with pytest.raises(UnknownNameError, match="cxrlt2024-task2"):
        submit.run(predictions, "cxrlt2024-task9", listed, out)
    with pytest.raises(PredictionError, match="'Adenopathy'"):
        submit.run(predictions, "cxrlt2024-task1", listed, out)
    with pytest.raises(PredictionError, match="1 of 1 listed images"):
        submit.run(predictions, TASK, write_ids(tmp_path / "other.csv", [0]), out)
    edited = (world / "cal.json").read_text().replace('"fitted_on": {', '"fitted_on": {"x": 1,')
    (tmp_path / "cal.json").write_text(edited)
    with pytest.raises(StageError, match="something else"):
        submit.run(predictions, TASK, listed, out, scale="f1", calibration=tmp_path / "cal.json")
    with pytest.raises(PredictionError, match="no F1 thresholds"):
        submit.run(world / "one-test.parquet", TASK, listed, out, scale="f1")
    table = read_predictions(predictions)
    values = table.probabilities.copy()
    values[:, table.findings.index("Hernia")] = np.nan
    write_predictions(table.replace(values), tmp_path / "untrained.parquet")
    with pytest.raises(PredictionError, match="never trained: 'Hernia'"):
        submit.run(tmp_path / "untrained.parquet", TASK, listed, out)
    with pytest.raises(PredictionError, match="prevalence of 'Hernia'"):
        submit.run(tmp_path / "untrained.parquet", TASK, listed, out, fill_untrained="prevalence")
    recorded = table.replace(values, prevalence={"Hernia": 0.02})
    write_predictions(recorded, tmp_path / "recorded.parquet")
    with pytest.raises(ConfigError, match="fill-untrained"):
        submit.run(tmp_path / "untrained.parquet", TASK, listed, out, fill_untrained="much")
    assert not out.exists()
    first = int(str(table.image_id[0]).removeprefix("d/image"))
    listed = write_ids(tmp_path / "ids.csv", [first])
    for name, fill in (("untrained", "0.02"), ("recorded", "prevalence")):
        submit.run(tmp_path / f"{name}.parquet", TASK, listed, out, scale="f1", fill_untrained=fill)
        assert out.read_text().splitlines()[1].split(",")[1 + TASKS[TASK].index("Hernia")] == "0.02"


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [(1, {}, "Nothing to combine"), (2, {"study": "mean"}, "--ensemble mean"), (1, {"ensemble": "median"}, "median"),
     (1, {"ensemble": "mean", "unit": "study"}, "--study mean"), (1, {"study": "sum"}, "sum")],
)  # fmt: skip
def test_combinations_that_make_no_sense(world, tmp_path, files, options, message):
    with pytest.raises(HilumError, match=message):
        combine.run([world / "one-val.parquet", world / "two-val.parquet"][:files], tmp_path / "x.csv", **options)


def test_calibrate_needs_one_of_labels_and_use(world, tmp_path):
    with pytest.raises(ConfigError, match="--use"):
        calibrate.run(world / "both-val.parquet", out=tmp_path / "c.json")
    for options in ({"method": "platt"}, {"sensitivity": [0.9]}, {"specificity": [0.9]}, {"split": "train"}):
        with pytest.raises(ConfigError, match="--use applies what was fitted"):
            calibrate.run(world / "both-val.parquet", use=tmp_path / "c.json", out=tmp_path / "c.csv", **options)


def test_evaluation_needs_splits_when_one_is_asked_for(world, tmp_path):
    (tmp_path / "l.csv").write_text("image_id,Edema\nimage0,1\n")
    with pytest.raises(PredictionError, match="leave out --split"):
        evaluate.run(world / "one-test.parquet", tmp_path / "l.csv", tmp_path / "m", split="test", bootstraps=0)


def test_a_task_of_2026_is_judged_by_the_findings_that_answer_its_classes(tmp_path):
    """Its classes have names of their own: "aortic elongation" is what is called Tortuous Aorta here."""
    from hilum.data.labels import TASKS, task_findings
    from hilum.data.store import write_arrays
    from hilum.evaluation.predictions import Predictions

    classes = TASKS["cxrlt2026-task1"]
    known = task_findings(
        "cxrlt2026-task1", ["Tortuous Aorta", *(name for name in classes if name != "aortic elongation")]
    )
    findings = tuple(known[name] for name in classes)
    assert "Tortuous Aorta" in findings
    rng = np.random.default_rng(0)
    labels = (rng.random((30, len(findings))) < 0.4).astype(np.int8)
    images = [np.full((8, 8), n, np.uint8) for n in range(30)]
    patients = [f"p{n}" for n in range(30)]
    store = write_arrays(tmp_path / "store", images, labels, findings, splits=["test"] * 30, patients=patients)
    table = Predictions(
        store.uids, store.image_ids, store.studies, store.patients, store.datasets, store.views, findings[::-1],
        rng.random((30, len(findings))),
    )  # fmt: skip
    write_predictions(table, tmp_path / "p.parquet")
    result = evaluate.run(
        tmp_path / "p.parquet", tmp_path / "store", tmp_path / "m", task="cxrlt2026-task1", bootstraps=0
    )
    assert tuple(result["findings"]) == findings
    # the challenge's own label file, in its words; and predictions in its words beside labels in ours
    names = dict(zip(findings, classes, strict=True))
    with (tmp_path / "challenge.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_uid", *classes])
        writer.writerows([uid, *row] for uid, row in zip(store.uids.tolist(), labels.tolist(), strict=True))
    write_predictions(
        dataclasses.replace(table, findings=tuple(names[name] for name in table.findings)), tmp_path / "q.parquet"
    )
    for file, truth in (("p", "challenge.csv"), ("q", "store"), ("q", "challenge.csv")):
        other = evaluate.run(
            tmp_path / f"{file}.parquet", tmp_path / truth, tmp_path / "n", task="cxrlt2026-task1", bootstraps=0
        )
        assert [one["AP"] for one in other["findings"].values()] == [one["AP"] for one in result["findings"].values()]
    with pytest.raises(PredictionError, match="'Tortuous Aorta'"):
        evaluate.run(tmp_path / "p.parquet", tmp_path / "challenge.csv", tmp_path / "x", bootstraps=0)
