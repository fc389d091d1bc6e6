"""CXR-LT 2024 and 2023 on MIMIC-CXR-JPG images, and 2024's one table of all 45 findings.

Not written: the task 3 tables of CXR-LT 2024, whose labels labels.csv has.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hilum.core.files import write_text
from hilum.data.labels import CXRLT_2023, CXRLT_2024_TASK1, CXRLT_2024_TASK2, CXRLT_2024_TASK3
from hilum.data.phantoms.layouts.jobs import Layout, MaskRow, StudyJob, csv_text
from hilum.data.phantoms.layouts.mimic import VIEW_CODES, mimic_jobs, write_metadata

WHOLE: tuple[str, ...] = tuple(sorted((*CXRLT_2024_TASK1, *CXRLT_2024_TASK3)))
"""The findings of labels.csv: both tasks', by name."""
SPLIT_WORDS = {"train": "train", "val": "development", "test": "test"}
CXRLT_COLUMNS = ("dicom_id", "subject_id", "study_id", "ViewPosition", "ViewCodeSequence_CodeMeaning")


def _rows(job: StudyJob, classes: tuple[str, ...]) -> Iterator[list[Any]]:
    labels = job.study.labels(WHOLE)
    labels["No Finding"] = labels["Normal"]
    for image in job.images:
        view = "" if image.plan.blank_view else image.plan.position
        code = "" if image.plan.blank_code else VIEW_CODES[image.plan.position]
        yield [
            image.image_id,
            job.subject_id,
            f"s{job.study_id}",
            view,
            code,
            image.path,
            *(labels[c] for c in classes),
        ]


def _tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    tables = {
        "train_labeled.csv": ("train", CXRLT_2024_TASK1),
        "development_labeled_task1.csv": ("val", CXRLT_2024_TASK1),
        "development_labeled_task2.csv": ("val", CXRLT_2024_TASK2),
        "test_labeled_task1.csv": ("test", CXRLT_2024_TASK1),
        "test_labeled_task2.csv": ("test", CXRLT_2024_TASK2),
    }
    _write(folder, "cxr-lt-2024", "fpath", tables, jobs)


def _tables_of_2023(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    tables = {
        "train.csv": ("train", CXRLT_2023),
        "development.csv": ("val", CXRLT_2023),
        "test.csv": ("test", CXRLT_2023),
    }
    _write(folder, "cxr-lt-2023", "path", tables, jobs)


def _whole_table(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    rows: list[list[Any]] = [[*CXRLT_COLUMNS, "fpath", *WHOLE, "split"]]
    for job in jobs:
        rows += [[*row, SPLIT_WORDS[job.patient.split]] for row in _rows(job, WHOLE)]
    write_text(folder / "cxr-lt-2024" / "labels.csv", csv_text(rows))
    write_metadata(folder, jobs)


def _write(
    folder: Path, name: str, path_column: str, tables: dict[str, tuple[str, tuple[str, ...]]], jobs: list[StudyJob]
) -> None:
    for file, (split, classes) in tables.items():
        rows: list[list[Any]] = [[*CXRLT_COLUMNS, path_column, *classes]]
        for job in jobs:
            if job.patient.split == split:
                rows += _rows(job, classes)
        write_text(folder / name / file, csv_text(rows))
    write_metadata(folder, jobs)


OWN = ("files", "cxr-lt-2023", "cxr-lt-2024", "mimic-cxr-2.0.0-metadata.csv.gz")
CXRLT = Layout(mimic_jobs, _tables, source="cxrlt", own=OWN)
CXRLT_WHOLE = Layout(mimic_jobs, _whole_table, source="cxrlt", own=OWN, findings=WHOLE)
CXRLT_OF_2023 = Layout(mimic_jobs, _tables_of_2023, source="cxrlt", own=OWN)
