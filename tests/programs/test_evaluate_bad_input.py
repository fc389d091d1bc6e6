"""What `hilum evaluate` does with damaged, shifted, renamed and empty input: refused by name, or counted and said."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hilum.commands import evaluate
from hilum.core.errors import (
    CheckpointError,
    ConfigError,
    HilumError,
    LeakageError,
    PredictionError,
    StageError,
    UnknownNameError,
)
from hilum.core.seeding import stream
from hilum.data.store import write_arrays
from hilum.evaluation.calibration import describe_items
from hilum.evaluation.leaderboards import TEST_IMAGES
from hilum.evaluation.predictions import Predictions, read_predictions, write_predictions
from hilum.evaluation.studies import aggregate_studies

FINDINGS = ("Edema", "Mass", "Hernia", "Normal")
COUNT, PATIENTS = 300, 90


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store, a CSV of the same labels with sex and age, predictions of one model and of a weaker one."""
    folder = tmp_path_factory.mktemp("bad")
    rng = stream(0, "bad input")
    patient = np.sort(rng.integers(0, PATIENTS, COUNT))
    labels = (rng.random((COUNT, 4)) < [0.4, 0.25, 0.15, 0.5]).astype(np.int8)
    store = write_arrays(
        folder / "store", [np.zeros((2, 2), np.uint8)] * COUNT, labels, FINDINGS,
        patients=[f"d/p{p}" for p in patient], studies=[f"d/s{row}" for row in range(COUNT)],
        image_ids=[f"d/image{row}" for row in range(COUNT)], datasets=["d"] * COUNT,
        views=np.where(patient % 2 == 0, "PA", "LATERAL").tolist(), splits=["test"] * COUNT,
    )  # fmt: skip
    for name, strength in (("strong", 1.5), ("weak", 0.5)):
        logits = strength * labels - 1 + rng.normal(size=labels.shape)
        table = Predictions(
            store.uids, store.image_ids, store.studies, store.patients, store.datasets, store.views, FINDINGS,
            1 / (1 + np.exp(-logits)), {"model": name, "thresholds": {finding: {"f1": 0.4} for finding in FINDINGS}},
        )  # fmt: skip
        write_predictions(table, folder / f"{name}.parquet")
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "patient_id", "sex", "age", *FINDINGS])
        for row in range(COUNT):
            sex, age = "FM"[patient[row] % 2], 20 + patient[row] % 50
            writer.writerow([f"image{row}", f"p{patient[row]}", sex, age, *labels[row]])
    return folder


@pytest.fixture(scope="module")
def straight(world):
    return evaluate.run(world / "strong.parquet", world / "store", world / "straight", bootstraps=20)


def change_csv(world, path, edit):
    """The CSV of labels, with its rows (dicts) edited."""
    with (world / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = edit(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_rows_rolled_by_one_are_put_right_by_their_ids(world, straight, tmp_path):
    table = read_predictions(world / "strong.parquet")
    rolled = np.roll(np.arange(COUNT), 1)
    write_predictions(table.rows(rolled), tmp_path / "p.csv")
    result = evaluate.run(tmp_path / "p.csv", world / "store", tmp_path / "m", bootstraps=0)
    assert result["macro"]["mAUC"] == pytest.approx(straight["macro"]["mAUC"], abs=1e-12)
    # values rolled below their ids cannot be known for wrong; what they do to AUC is what the join protects from
    write_predictions(table.replace(table.probabilities[rolled]), tmp_path / "q.csv")
    broken = evaluate.run(tmp_path / "q.csv", world / "store", tmp_path / "n", bootstraps=0)
    assert broken["macro"]["mAUC"] == pytest.approx(0.5, abs=0.06) != straight["macro"]["mAUC"]


@pytest.mark.parametrize("rows_in_a_group", [1, 7, 300])
def test_chunks_of_the_file_and_the_order_of_its_rows_do_not_matter(world, straight, tmp_path, rows_in_a_group):
    frame, path = pl.read_parquet(world / "strong.parquet"), tmp_path / "p.parquet"
    metadata = {k: v for k, v in pl.read_parquet_metadata(world / "strong.parquet").items() if k != "ARROW:schema"}
    order = np.random.default_rng(rows_in_a_group).permutation(COUNT)
    frame[order].write_parquet(path, row_group_size=rows_in_a_group, metadata=metadata)
    result = evaluate.run(tmp_path / "p.parquet", world / "store", tmp_path / "m", bootstraps=20)
    for name in FINDINGS:
        ours, theirs = result["findings"][name], straight["findings"][name]
        for key in ("AP", "AUC", "F1@tuned", "ECE", "Brier"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-12)
            assert ours["ci95"][key] == pytest.approx(theirs["ci95"][key], abs=1e-12)


def test_a_store_and_a_csv_of_the_same_labels_give_the_same_numbers(world, straight, tmp_path):
    result = evaluate.run(world / "strong.parquet", world / "labels.csv", tmp_path / "m", bootstraps=20)
    assert result["macro"] == straight["macro"]
    assert set(result["subgroups"]) == {"sex", "age", "view"}
    assert set(straight["subgroups"]) == {"view"}  # a store without a manifest knows no sex and no age


@pytest.mark.parametrize("edit", ["missing", "extra", "twice"])
def test_ids_that_do_not_fit_are_refused(world, tmp_path, edit):
    edits = {
        "missing": (lambda rows: rows[:-3], "3 of 300 predicted items have no row"),
        "extra": (lambda rows: [*rows[:-1], rows[-1] | {"image_id": "image999"}], "1 of 300 predicted items"),
        "twice": (lambda rows: [*rows, rows[0]], "more than one row"),
    }
    change, message = edits[edit]
    path = change_csv(world, tmp_path / "l.csv", change)
    with pytest.raises(PredictionError, match=message):
        evaluate.run(world / "strong.parquet", path, tmp_path / "m", bootstraps=0)
    assert not (tmp_path / "m").exists()


def test_labels_of_images_that_were_not_predicted_are_counted_and_said(world, straight, tmp_path, capsys):
    path = change_csv(world, tmp_path / "l.csv", lambda rows: [*rows, rows[0] | {"image_id": "ghost"}])
    result = evaluate.run(world / "strong.parquet", path, tmp_path / "m", bootstraps=0)
    assert result["left_out"]["unpredicted"] == 1
    assert result["macro"]["mAP"] == straight["macro"]["mAP"]
    assert "1 labelled items have no prediction" in capsys.readouterr().err


def test_a_patient_in_two_splits_is_refused_and_an_image_is_named(world, tmp_path):
    def cross(rows):
        splits = [row | {"split": "test"} for row in rows]
        first = next(row for row in splits[1:] if row["patient_id"] == splits[0]["patient_id"])
        first["split"] = "train"
        return splits

    path = change_csv(world, tmp_path / "l.csv", cross)
    with pytest.raises(LeakageError, match=r"1 patients are in more than one split.*image1.*'train'") as error:
        evaluate.run(world / "strong.parquet", path, tmp_path / "m", split="test", bootstraps=0)
    assert not re.search(r"\bp\d", str(error.value))  # no patient in a message
    path = change_csv(world, tmp_path / "l.csv", lambda rows: [row | {"split": "test"} for row in rows])
    evaluate.run(world / "strong.parquet", path, tmp_path / "m", split="test", bootstraps=0)


def test_unknown_findings_name_the_nearest(world, tmp_path):
    path = change_csv(
        world,
        tmp_path / "l.csv",
        lambda rows: [{"Oedema" if k == "Edema" else k: v for k, v in row.items()} for row in rows],
    )
    with pytest.raises(PredictionError, match=r"'Edema' \(nearest: 'Oedema'\)"):
        evaluate.run(world / "strong.parquet", path, tmp_path / "m", bootstraps=0)
    with pytest.raises(UnknownNameError, match="Did you mean 'cxrlt2024-task2'"):
        evaluate.run(world / "strong.parquet", path, tmp_path / "m", task="cxrlt2024-tusk2", bootstraps=0)
    with pytest.raises(UnknownNameError, match="Did you mean 'sex'"):
        evaluate.run(world / "strong.parquet", world / "labels.csv", tmp_path / "m", by=["sax"], bootstraps=0)


def test_a_dropped_finding_is_counted_and_named(world, tmp_path, capsys):
    table = read_predictions(world / "strong.parquet").select(["Normal", "Edema", "Hernia"])
    write_predictions(table, tmp_path / "p.parquet")
    result = evaluate.run(tmp_path / "p.parquet", world / "store", tmp_path / "m", bootstraps=0)
    assert result["excluded"]["unpredicted"] == ["Mass"]
    assert "1 findings are labelled and not predicted: Mass" in capsys.readouterr().err
    # a column dropped from a file that says what it holds
    frame = pl.read_parquet(world / "strong.parquet")
    write_predictions(read_predictions(world / "strong.parquet"), tmp_path / "q.csv")
    frame.drop("Mass").write_csv(tmp_path / "q.csv")
    with pytest.raises(PredictionError, match="Missing: \\['Mass'\\]"):
        evaluate.run(tmp_path / "q.csv", world / "store", tmp_path / "m", bootstraps=0)


@pytest.mark.parametrize("value", ["nan", "inf", "-0.1", "1.1", "7e4", "yes", ""])
def test_a_prediction_that_is_no_probability_is_refused_with_its_place(world, tmp_path, value):
    frame = pl.read_parquet(world / "strong.parquet").with_columns(pl.col(FINDINGS).cast(pl.String))
    cells = frame["Mass"].to_list()
    cells[17] = value
    frame.with_columns(pl.Series("Mass", cells)).write_csv(tmp_path / "p.csv")
    with pytest.raises(PredictionError, match=r"p\.csv.*'Mass'"):
        evaluate.run(tmp_path / "p.csv", world / "store", tmp_path / "m", bootstraps=0)
    assert not (tmp_path / "m").exists()


def test_rows_without_any_label_count_in_nothing(world, straight, tmp_path, capsys):
    rng = np.random.default_rng(0)
    chosen = set(rng.choice(COUNT, 40, replace=False).tolist())

    def blank(rows):
        return [row | dict.fromkeys(FINDINGS, "") if index in chosen else row for index, row in enumerate(rows)]

    path = change_csv(world, tmp_path / "l.csv", blank)
    result = evaluate.run(world / "strong.parquet", path, tmp_path / "m", bootstraps=10)
    assert result["items_without_label"] == 40
    assert "40 of 300 items have no known label" in capsys.readouterr().err
    kept = np.array([row for row in range(COUNT) if row not in chosen])
    write_predictions(read_predictions(world / "strong.parquet").rows(kept), tmp_path / "p.parquet")
    without = evaluate.run(tmp_path / "p.parquet", path, tmp_path / "n", bootstraps=10)
    for name in FINDINGS:
        for key in ("AP", "AUC", "F1@0.5", "F1@tuned", "ECE", "Brier", "positives", "prevalence"):
            assert result["findings"][name][key] == without["findings"][name][key]


def test_labels_that_say_nothing_at_all_give_a_page_of_reasons(world, tmp_path):
    path = change_csv(world, tmp_path / "l.csv", lambda rows: [row | dict.fromkeys(FINDINGS, "") for row in rows])
    result = evaluate.run(world / "strong.parquet", path, tmp_path / "m", bootstraps=5, compare=world / "weak.parquet")
    assert result["excluded"]["no_labels"] == list(FINDINGS)
    assert result["macro"]["mAP"] is None
    assert result["macro"]["counted"]["mAP"] == 0
    page = (tmp_path / "m" / "report.html").read_text()
    assert "no label in this set" in page
    assert not {"nan", "None"} & set(re.findall(r">\s*(nan|None)\s*<", page))


def test_a_finding_without_positives_is_undefined_and_counted(world, straight, tmp_path, capsys):
    path = change_csv(world, tmp_path / "l.csv", lambda rows: [row | {"Hernia": "0"} for row in rows])
    result = evaluate.run(world / "strong.parquet", path, tmp_path / "m", bootstraps=20, compare=world / "weak.parquet")
    empty = result["findings"]["Hernia"]
    assert [empty[key] for key in ("AP", "AUC", "AP_lift", "FNR@tuned", "calibration_slope")] == [None] * 5
    assert result["macro"]["counted"]["mAP"] == 3
    others = [straight["findings"][name]["AP"] for name in FINDINGS if name != "Hernia"]
    assert result["macro"]["mAP"] == pytest.approx(np.mean(others))
    assert result["compare"]["differences"]["mAP"]["findings"] == 3
    assert "AP" not in result["compare"]["by_finding"]["Hernia"]
    assert all("Hernia" not in group["findings"] for group in result["subgroups"]["sex"]["groups"].values())
    assert "1 findings have no positive here: Hernia" in capsys.readouterr().err
    assert "no positive in this set" in (tmp_path / "m" / "report.html").read_text()


def test_shuffled_labels_constant_scores_and_noise_score_as_chance(world, tmp_path):
    table = read_predictions(world / "strong.parquet")
    rng = np.random.default_rng(1)
    many = np.tile(np.arange(COUNT), 20)  # chance is told from skill only on many rows
    ids = np.array([f"{row:016x}" for row in range(len(many))])
    rows = dataclasses.replace(table.rows(many[:0]), **{
        name: getattr(table, name)[many] for name in ("study_id", "patient_id", "dataset", "view", "probabilities")
    }, image_uid=ids, image_id=ids)  # fmt: skip
    labels = {name: rng.permutation(np.arange(len(many)) % 5 == 0).astype(int) for name in FINDINGS}
    pl.DataFrame({"image_uid": ids, **labels}).write_csv(tmp_path / "l.csv")
    for name, values in {
        "shuffled": rows.probabilities,
        "constant": np.full(rows.probabilities.shape, 0.2),
        "noise": rng.random(rows.probabilities.shape),
    }.items():
        write_predictions(rows.replace(values), tmp_path / f"{name}.parquet")
        result = evaluate.run(tmp_path / f"{name}.parquet", tmp_path / "l.csv", tmp_path / name, bootstraps=0, by=())
        assert result["macro"]["mAUC"] == pytest.approx(0.5, abs=0.03)
        assert result["macro"]["mAP_normalised"] == pytest.approx(0, abs=0.03)
    assert result["macro"]["mECE_standard"] > 0.2  # noise
    constant = json.loads((tmp_path / "constant" / "metrics.json").read_text())["macro"]
    assert (constant["mAUC"], constant["mAP"]) == (0.5, pytest.approx(0.2))
    assert constant["mECE_standard"] == pytest.approx(0, abs=1e-12)


def test_the_ledger_counts_every_look_even_one_that_is_refused(world, tmp_path, capsys):
    table, ledger = read_predictions(world / "strong.parquet"), tmp_path / "ledger.jsonl"
    options = {"split": "test", "bootstraps": 0, "ledger": ledger}
    evaluate.run(world / "strong.parquet", world / "store", tmp_path / "m", **options)
    evaluate.run(world / "weak.parquet", world / "store", tmp_path / "n", **options)
    assert "look number 2 at the test split" in capsys.readouterr().out
    fitted = {"fitted_on": describe_items(table.image_uid)}
    write_predictions(table.replace(table.probabilities, calibration=fitted), tmp_path / "p.parquet")
    with pytest.raises(StageError):
        evaluate.run(tmp_path / "p.parquet", world / "store", tmp_path / "o", **options)
    assert len(ledger.read_text().splitlines()) == 3
    assert json.loads(ledger.read_text().splitlines()[2])["opening"] == 3


def test_thresholds_without_one_for_f1_leave_f1_tuned_undefined(world, tmp_path):
    """The published schema asks for no operating point by name."""
    table = read_predictions(world / "strong.parquet")
    cuts = {"Edema": {"sens_at_spec95": 0.4}, "Mass": {"f1": 0.4, "youden": 0.3}}
    write_predictions(table.replace(table.probabilities, thresholds=cuts), tmp_path / "p.parquet")
    result = evaluate.run(tmp_path / "p.parquet", world / "store", tmp_path / "m", bootstraps=0)
    assert {name: one["threshold"] for name, one in result["findings"].items() if one["threshold"]} == {"Mass": 0.4}
    assert result["macro"]["counted"]["mF1@tuned"] == 1


@pytest.mark.parametrize("option", ["explain", "maps"])
def test_pictures_of_study_rows_are_refused_before_the_labels_are_looked_at(world, tmp_path, option):
    studies = aggregate_studies(read_predictions(world / "strong.parquet"), unit="study")
    write_predictions(studies, tmp_path / "studies.parquet")
    (tmp_path / "config.json").write_text("{}")
    maps = {"maps": [tmp_path / "maps.npz"], "regions": tmp_path / "regions.csv"}
    options = {"explain": tmp_path} if option == "explain" else maps
    with pytest.raises(PredictionError, match=rf"studies\.parquet has one row per study.*--{option}"):
        evaluate.run(
            tmp_path / "studies.parquet", world / "store", tmp_path / "m", ledger=tmp_path / "ledger.jsonl", **options
        )
    assert not (tmp_path / "ledger.jsonl").exists()
    assert not (tmp_path / "m").exists()


def test_other_items_in_the_compared_file_are_refused(world, tmp_path):
    table = read_predictions(world / "weak.parquet")
    write_predictions(table.rows(np.arange(COUNT - 1)), tmp_path / "p.parquet")
    with pytest.raises(PredictionError, match="299 in both, 1 only in the first"):
        evaluate.run(world / "strong.parquet", world / "store", tmp_path / "m", compare=tmp_path / "p.parquet")


def test_a_compared_model_that_has_met_the_images_is_refused_too(world, tmp_path):
    table = read_predictions(world / "weak.parquet")
    write_predictions(table.replace(table.probabilities, exposed_images=7), tmp_path / "p.parquet")
    options = {"compare": tmp_path / "p.parquet", "bootstraps": 0}
    with pytest.raises(LeakageError, match=r"p\.parquet: the model has met 7"):
        evaluate.run(world / "strong.parquet", world / "store", tmp_path / "m", **options)
    result = evaluate.run(world / "strong.parquet", world / "store", tmp_path / "m", accept_exposed=True, **options)
    assert result["compare"]["exposed_images"] == 7


def test_the_report_of_a_comparison_shows_both_sides(world, tmp_path):
    """The columns First and Second were empty once."""
    result = evaluate.run(
        world / "strong.parquet", world / "store", tmp_path / "m", bootstraps=20, compare=world / "weak.parquet"
    )
    row = result["compare"]["differences"]["mAUC"]
    weak = evaluate.run(world / "weak.parquet", world / "store", tmp_path / "n", bootstraps=0)
    assert row["first"] == pytest.approx(result["macro"]["mAUC"], abs=1e-12)
    assert row["second"] == pytest.approx(weak["macro"]["mAUC"], abs=1e-12)
    section = re.search(r'<section id="comparisons".*?</section>', (tmp_path / "m" / "report.html").read_text(), re.S)[
        0
    ]
    line = re.search(r"<td>mAUC</td>(.*?)</tr>", section, re.S)[1]
    cells = re.findall(r'<td class="number">(.*?)</td>', line)
    assert cells == [f"{row['first']:.3f}", f"{row['second']:.3f}"]
    edema = result["compare"]["by_finding"]["Edema"]["AP"]
    line = re.search(r'<th scope="row">Edema</th>(.*?)</tr>', section, re.S)[1]
    assert re.findall(r'<td class="number">([\d.]+)</td>', line) == [f"{edema['first']:.3f}", f"{edema['second']:.3f}"]


def test_subgroups_are_in_the_file_and_on_the_page(world, tmp_path, capsys):
    result = evaluate.run(
        world / "strong.parquet", world / "labels.csv", tmp_path / "m", bootstraps=20, by=["sex", "view", "Edema"],
        min_group=30,
    )  # fmt: skip
    assert list(result["subgroups"]) == ["sex", "view", "Edema"]
    assert set(result["subgroups"]["sex"]["groups"]) == {"F", "M"}
    group = result["subgroups"]["Edema"]["groups"]["present"]
    assert "Edema" not in group["findings"]
    section = re.search(r'<section id="subgroups".*?</section>', (tmp_path / "m" / "report.html").read_text(), re.S)[0]
    for level in ("F", "M", "PA", "lateral", "present", "absent"):
        assert f'<th scope="row">{level}<small>' in section
    assert "Called healthy" in section
    result = evaluate.run(
        world / "strong.parquet", world / "labels.csv", tmp_path / "n", bootstraps=0, by=["sex"], min_group=60
    )
    assert result["subgroups"]["sex"]["groups"] == {}
    assert "Too few patients to judge" in (tmp_path / "n" / "report.html").read_text()
    assert "subgroups" not in evaluate.run(
        world / "strong.parquet", world / "labels.csv", tmp_path / "o", bootstraps=0, by=["none"]
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [({"explain": Path("dec")}, PredictionError, "read from a store"),
     ({"by": ["patient_id"]}, ConfigError, "names people"), ({"min_group": -1}, ConfigError, "--min-group"),
     ({"bootstraps": -1}, ConfigError, "--bootstraps"), ({"min_positives": -2}, ConfigError, "--min-positives"),
     ({"by": ["dates"]}, HilumError, "'dates'")],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(world, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        evaluate.run(world / "strong.parquet", world / "labels.csv", tmp_path / "m", **{"bootstraps": 0, **options})
    assert not (tmp_path / "m").exists()


def test_a_model_that_is_to_explain_is_looked_for_before_anything_is_judged(world, tmp_path):
    with pytest.raises(CheckpointError, match="expected a model"):
        evaluate.run(world / "strong.parquet", world / "store", tmp_path / "m", bootstraps=0, explain=world / "store")
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "m").exists()


def test_a_task_prints_its_board_and_claims_no_place_on_other_images(tmp_path, capsys):
    from hilum.data.labels import TASKS

    task = "cxrlt2024-task2"
    count = TEST_IMAGES[task][0]
    rng = np.random.default_rng(0)
    labels = (rng.random((count, 26)) < 0.3).astype(np.int8)
    ids = np.array([f"{row:016x}" for row in range(count)])
    for dataset, comparable in (("phantom", False), ("mimic", True)):
        table = Predictions(
            ids, ids, ids, ids, np.full(count, dataset), np.full(count, "PA"), TASKS[task],
            np.clip(rng.normal(0.3 + 0.3 * labels, 0.2), 0, 1),
        )  # fmt: skip
        write_predictions(table, tmp_path / "p.parquet")
        columns = {name: labels[:, c] for c, name in enumerate(TASKS[task])}
        pl.DataFrame({"image_uid": ids, **columns}).write_csv(tmp_path / "l.csv")
        result = evaluate.run(tmp_path / "p.parquet", tmp_path / "l.csv", tmp_path / "m", task=task, bootstraps=0)
        own = result["leaderboard"]["rows"][0]
        assert (own["phase"], own["team"], own["values"]["mAP"]) == ("own", "p", result["macro"]["mAP"])
        assert result["leaderboard"]["comparable"] is comparable
        assert (own["rank"] is not None) is comparable
        assert "yangz16" in capsys.readouterr().out
        page = (tmp_path / "m" / "report.html").read_text()
        section = re.search(r'<section id="leaderboard".*?</section>', page, re.S)[0]
        assert "yangz16" in section
        assert ("says nothing about a place" in section) is not comparable


def test_a_place_that_the_board_leaves_open_is_said_in_the_text_and_on_the_page(tmp_path, capsys):
    from hilum.data.labels import TASKS

    task = "cxrlt2026-task2"
    count, names = TEST_IMAGES[task][0], TASKS[task]
    labels = (np.arange(count)[:, None] % 10 == np.arange(len(names))).astype(np.int8)  # one in ten
    ids = np.array([f"{row:016x}" for row in range(count)])
    table = Predictions(
        ids, ids, ids, ids, np.full(count, "cxrlt2026"), np.full(count, "PA"), names, np.full(labels.shape, 0.5)
    )
    write_predictions(table, tmp_path / "p.parquet")
    pl.DataFrame({"image_uid": ids, **dict(zip(names, labels.T, strict=True))}).write_csv(tmp_path / "l.csv")
    board = evaluate.run(tmp_path / "p.parquet", tmp_path / "l.csv", tmp_path / "m", task=task, bootstraps=0)[
        "leaderboard"
    ]
    assert (board["rows"][0]["rank"], board["comparable"]) == (None, True)
    for text in (board["note"], capsys.readouterr().out, (tmp_path / "m" / "report.html").read_text()):
        assert "No place: 3 or later by mAP" in text


@pytest.mark.parametrize("fault", ["untrained", "no labels", "few positives", "no positives"])
def test_no_place_on_a_board_without_every_class_of_the_task(tmp_path, capsys, fault):
    """A class that the mean lacks may be the hardest; one without a positive has no AP on anybody's board."""
    from hilum.data.labels import TASKS

    task = "cxrlt2024-task2"
    count, rng, hernia = TEST_IMAGES[task][0], np.random.default_rng(0), TASKS[task].index("Hernia")
    labels = (rng.random((count, 26)) < 0.3).astype(np.int8)
    values = np.clip(rng.normal(0.3 + 0.3 * labels, 0.2), 0, 1)
    if fault == "untrained":
        values[:, hernia] = np.nan
    else:
        labels[:, hernia] = -1 if fault == "no labels" else 0
        labels[:2, hernia] = 1 if fault == "few positives" else labels[:2, hernia]
    ids = np.array([f"{row:016x}" for row in range(count)])
    table = Predictions(ids, ids, ids, ids, np.full(count, "mimic"), np.full(count, "PA"), TASKS[task], values)
    write_predictions(table, tmp_path / "p.parquet")
    columns = {name: labels[:, c] for c, name in enumerate(TASKS[task])}
    pl.DataFrame({"image_uid": ids, **columns}).write_csv(tmp_path / "l.csv")
    result = evaluate.run(
        tmp_path / "p.parquet", tmp_path / "l.csv", tmp_path / "m", task=task, bootstraps=0, min_positives=3
    )
    board, shown = result["leaderboard"], capsys.readouterr().out
    place = fault == "no positives"
    assert (board["rows"][0]["rank"] is not None) is board["comparable"] is place
    message = "1 classes without a positive here are in no mean" if place else "1 classes of this task are in no mean"
    for text in (board["note"], shown, (tmp_path / "m" / "report.html").read_text()):
        assert re.search(f"{message}.*Hernia", text)
