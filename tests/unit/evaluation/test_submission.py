import csv
import zipfile

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from hilum.core.errors import PredictionError, UnknownNameError
from hilum.data.labels import ID_COLUMNS, TASKS
from hilum.evaluation.submission import (
    challenge_scores,
    check_submission,
    labels_of,
    read_ids,
    submission_rows,
)
from hilum.evaluation.truth import read_truth


def test_rows_and_classes_come_in_the_challenges_order(made_up):
    table, _ = made_up()
    ids = table.image_id[[7, 3, 50]].tolist()
    np.testing.assert_array_equal(submission_rows(table, ["D", "B"], ids), table.probabilities[[7, 3, 50]][:, [3, 1]])


def test_what_is_missing_is_named(made_up):
    table, _ = made_up()
    with pytest.raises(PredictionError, match=r"1 of 2 listed images.*'x'"):
        submission_rows(table, ["A"], [str(table.image_id[0]), "x"])
    with pytest.raises(PredictionError, match="'Z'"):
        submission_rows(table, ["A", "Z"], [str(table.image_id[0])])
    values = table.probabilities.copy()
    values[:, 1] = np.nan
    untrained = table.replace(values)
    with pytest.raises(PredictionError, match="never trained: 'B'"):
        submission_rows(untrained, ["A", "B"], [str(table.image_id[0])])
    assert submission_rows(untrained, ["B"], [str(table.image_id[0])], {"B": 0.2}).tolist() == [[0.2]]


@pytest.mark.parametrize("content", ["id\na\n", "dicom_id\na\na\n", "dicom_id\n", "dicom_id,x\n,1\n"])
def test_a_bad_list_of_ids_is_refused(tmp_path, content):
    (tmp_path / "ids.csv").write_text(content)
    with pytest.raises(PredictionError, match=r"ids\.csv"):
        read_ids(tmp_path / "ids.csv")
    with pytest.raises(PredictionError, match="cannot be read"):
        read_ids(tmp_path / "absent.csv")


def test_lists_of_2026_name_their_ids_either_way(tmp_path):
    for name in ("ImageID", "dicom_id"):
        (tmp_path / "ids.csv").write_text(f"{name}\na.png\nb.png\n")
        assert read_ids(tmp_path / "ids.csv", "ImageID") == ["a.png", "b.png"]
    (tmp_path / "ids.csv").write_text("ImageID\na.png\n")
    with pytest.raises(PredictionError, match="dicom_id"):
        read_ids(tmp_path / "ids.csv")


def test_a_class_may_have_another_name_than_its_finding(made_up):
    table, _ = made_up()
    ids = table.image_id[[4, 2]].tolist()
    values = submission_rows(table, ["x", "y", "C"], ids, {"y": 0.3}, {"x": "A", "C": "C"})
    np.testing.assert_array_equal(values[:, 0], table.probabilities[[4, 2], 0])
    np.testing.assert_array_equal(values[:, 1], [0.3, 0.3])
    np.testing.assert_array_equal(values[:, 2], table.probabilities[[4, 2], 2])
    with pytest.raises(PredictionError, match="never trained: 'y'"):
        submission_rows(table, ["x", "y"], ids, None, {"x": "A"})


IDS = ["c", "a", "b"]


def rows_of(task, ids=IDS, seed=0):
    """A sound submission as cells, header first."""
    rng = np.random.default_rng(seed)
    values = rng.random((len(ids), len(TASKS[task])))
    return [
        [ID_COLUMNS[task], *TASKS[task]],
        *([name, *map(repr, row)] for name, row in zip(ids, values.tolist(), strict=True)),
    ]


def write(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path


@pytest.mark.parametrize("task", TASKS)
def test_a_sound_submission_is_read_as_it_is(task, tmp_path):
    rows = rows_of(task)
    found = check_submission(write(tmp_path / "s.csv", rows), task, IDS)
    assert (found.ids, found.classes, found.notes) == (tuple(IDS), TASKS[task], ())
    np.testing.assert_array_equal(found.values, np.array([row[1:] for row in rows[1:]], np.float64))
    assert "another order" in check_submission(tmp_path / "s.csv", task, ["a", "b", "c"]).notes[0]


def swapped_columns(rows):
    for row in rows:
        row[2], row[3] = row[3], row[2]


def set_cell(value):
    def change(rows):
        rows[2][4] = value

    return change


FAULTS = {
    "columns missing: 'Fibrosis'": lambda rows: [
        row.pop(1 + TASKS["cxrlt2024-task2"].index("Fibrosis")) for row in rows
    ],
    "columns unknown: 'fibrosis'": lambda rows: rows[0].__setitem__(8, "fibrosis"),
    "columns repeated: 'Hernia'": lambda rows: [row.append(row[10]) for row in rows],
    r"columns in another order: column 3 is 'Cardiomegaly', expected 'Calcification": swapped_columns,
    "columns missing: 'dicom_id'.*unknown: 'ImageID'": lambda rows: rows[0].__setitem__(0, "ImageID"),
    "1 ids missing, for example 'b'": lambda rows: rows.pop(),
    "1 ids not listed, for example 'x'": lambda rows: rows.append(["x", *rows[1][1:]]),
    "1 ids repeated, for example 'c'": lambda rows: rows.append(rows[1]),
    "1 values are no numbers in .0, 1., for example 'nan'.*line 3": set_cell("nan"),
    "for example 'inf' of 'Consolidation' in line 3": set_cell("inf"),
    "for example '1.0001'": set_cell("1.0001"),
    "for example '-1e-09'": set_cell("-1e-09"),
    "for example ''": set_cell(""),
    "for example 'high'": set_cell("high"),
    "another number of cells than the header in line 3": lambda rows: rows[2].pop(),
    "3 significant digits": lambda rows: [
        row.__setitem__(slice(1, None), [f"{float(cell):.3g}" for cell in row[1:]]) for row in rows[1:]
    ],
}


@pytest.mark.parametrize("message", FAULTS)
def test_each_fault_of_a_submission_is_named(message, tmp_path):
    rows = rows_of("cxrlt2024-task2")
    FAULTS[message](rows)
    with pytest.raises(PredictionError, match=message):
        check_submission(write(tmp_path / "s.csv", rows), "cxrlt2024-task2", IDS)


def test_several_faults_are_named_together_and_a_constant_class_is_noted(tmp_path):
    rows = rows_of("cxrlt2024-task2")
    for row in rows[1:]:
        row[8] = "0.02"
    found = check_submission(write(tmp_path / "s.csv", rows), "cxrlt2024-task2", IDS)
    assert found.notes == ("1 classes have one value throughout, which ranks nothing: Fibrosis",)
    rows[1][0], rows[2][3] = "x", "2"
    with pytest.raises(PredictionError, match=r"ids missing.*ids not listed.*no numbers"):
        check_submission(write(tmp_path / "s.csv", rows), "cxrlt2024-task2", IDS)
    with pytest.raises(UnknownNameError, match="cxrlt2024-task2"):
        check_submission(tmp_path / "s.csv", "cxrlt2024-task7", IDS)


def test_containers_are_checked(tmp_path):
    rows, task = rows_of("cxrlt2024-task3"), "cxrlt2024-task3"
    table = write(tmp_path / "s.csv", rows).read_text()
    for names, message in (
        (["p.csv"], "no folder code/"),
        (["p.csv", "q.csv", "code/x.py"], "found 2"),
        ([], "found 0"),
    ):
        with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
            for name in names:
                archive.writestr(name, table)
        with pytest.raises(PredictionError, match=message):
            check_submission(tmp_path / "s.zip", task, IDS)
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for name in ("p.csv", "code/a.csv"):
            archive.writestr(name, table)
    assert check_submission(tmp_path / "s.zip", task, IDS).ids == tuple(IDS)
    for name, content in (("s.zip", b"PK"), ("t.csv", b"\xff\xfe\x00"), ("empty.csv", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PredictionError, match=name):
            check_submission(tmp_path / name, task, IDS)
    with pytest.raises(PredictionError, match=r"absent\.csv"):
        check_submission(tmp_path / "absent.csv", task, IDS)


def test_scores_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    labels = (rng.random((300, 5)) < [0.3, 0.1, 0.02, 0.5, 0.0]).astype(np.int8)
    values = np.clip(0.5 * labels + rng.random(labels.shape) * 0.7, 0, 1)
    found = challenge_scores(values, labels)
    some = range(4)  # the last has no positive: no AP, no AUC, no F1
    assert found["mAP"] == pytest.approx(np.mean([average_precision_score(labels[:, c], values[:, c]) for c in some]))
    assert found["mAUC"] == pytest.approx(np.mean([roc_auc_score(labels[:, c], values[:, c]) for c in some]))
    each = [f1_score(labels[:, c], values[:, c] > 0.5, zero_division=0.0) for c in some]
    assert found["mF1@0.5"] == pytest.approx(np.mean(each))
    wide = np.full((300, 1), 0.9)
    correct = (labels[:, :1] == 1).mean()
    assert challenge_scores(wide, labels[:, :1])["mECE_challenge_inferred"] == pytest.approx(abs(0.9 - correct))
    assert set(challenge_scores(values[:, 4:], np.full((300, 1), -1, np.int8)).values()) == {None}


def test_labels_come_by_id_and_class(tmp_path):
    task = "cxrlt2024-task3"
    found = check_submission(write(tmp_path / "s.csv", rows_of(task)), task, IDS)
    names = list(TASKS[task])[::-1]
    (tmp_path / "l.csv").write_text(
        ",".join(["dicom_id", *names]) + "\n" + "\n".join(f"{one},1,0,{int(one == 'a')},0,1" for one in "abcd") + "\n"
    )
    truth = read_truth(tmp_path / "l.csv")
    labels = labels_of(found, truth)
    assert labels.tolist() == [[1, 0, 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 0, 0, 1]]
    with pytest.raises(PredictionError, match="1 of 3 submitted"):
        labels_of(found, truth.rows(np.array([0, 1, 3])))
    with pytest.raises(PredictionError, match="1 ids repeat"):
        labels_of(found, truth.rows(np.array([0, 1, 2, 2])))
    (tmp_path / "l.csv").write_text("dicom_id,Bulla\na,1\nb,0\nc,0\n")
    with pytest.raises(PredictionError, match="no labels for 'Cardiomyopathy'"):
        labels_of(found, read_truth(tmp_path / "l.csv"))
