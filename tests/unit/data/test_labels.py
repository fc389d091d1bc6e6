import csv
from importlib.resources import files

import pytest

from hilum.core.errors import UnknownNameError
from hilum.data.labels import (
    CXRLT_2023,
    CXRLT_2024_TASK1,
    CXRLT_2024_TASK2,
    CXRLT_2026_TASK1,
    CXRLT_2026_TASK2,
    FINDING_SETS,
    ID_COLUMNS,
    TASKS,
    task_findings,
)
from hilum.data.sources import cxrlt2026


def test_the_tasks_are_the_challenges():
    assert {task: len(classes) for task, classes in TASKS.items()} == {
        "cxrlt2023": 26, "cxrlt2024-task1": 40, "cxrlt2024-task2": 26, "cxrlt2024-task3": 5, "cxrlt2026-task1": 30,
        "cxrlt2026-task2": 6,
    }  # fmt: skip
    assert all(len(set(classes)) == len(classes) for classes in TASKS.values())
    assert list(CXRLT_2024_TASK1) == sorted(CXRLT_2024_TASK1)
    assert CXRLT_2024_TASK2.index("Normal") + 1 == CXRLT_2024_TASK2.index("Nodule")
    assert set(CXRLT_2024_TASK2) < set(CXRLT_2024_TASK1)
    assert CXRLT_2023[CXRLT_2024_TASK2.index("Normal")] == "No Finding"
    assert CXRLT_2026_TASK2 == cxrlt2026.UNSEEN
    assert {ID_COLUMNS[task] for task in TASKS if "2026" in task} == {"ImageID"}
    assert {ID_COLUMNS[task] for task in TASKS if "2026" not in task} == {"dicom_id"}


def test_classes_of_2026_are_those_of_its_label_table_and_stand_for_the_same_finding():
    text = (files("hilum.data") / "facts" / "labels" / "cxrlt2026.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert {row["label"] for row in rows} - {"*"} == {*CXRLT_2026_TASK1, *CXRLT_2026_TASK2}
    for task in ("cxrlt2026-task1", "cxrlt2026-task2"):
        found = task_findings(task, FINDING_SETS["cxrlt2024-task1"] + FINDING_SETS["cxrlt2024-task3"])
        assert set(found) < set(TASKS[task]) or task == "cxrlt2026-task1"
        for name, finding in found.items():
            same = [
                r for r in rows if (r["label"], r["finding"], r["present"], r["tier"]) == (name, finding, "1", "strict")
            ]
            assert same, (name, finding)
    assert found == {name: name for name in CXRLT_2026_TASK2 if name != "goiter"}


def test_a_class_is_answered_by_its_own_name_first():
    have = ["Cardiomegaly", "cardiomegaly", "Tortuous Aorta", "No Finding"]
    assert task_findings("cxrlt2026-task1", have) == {
        "aortic elongation": "Tortuous Aorta", "cardiomegaly": "cardiomegaly",
    }  # fmt: skip
    assert task_findings("cxrlt2026-task1", have[:1]) == {"cardiomegaly": "Cardiomegaly"}
    assert "Normal" not in task_findings("cxrlt2024-task2", have)  # 2023's No Finding is another thing
    with pytest.raises(UnknownNameError, match="cxrlt2026-task1"):
        task_findings("cxrlt2026", have)
