"""CXR-LT 2024 and 2023 on MIMIC-CXR-JPG images.

Not written: labels.csv and the task 3 files of CXR-LT 2024, whose five further findings have no phantom sign.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hilum.core.files import write_bytes, write_text
from hilum.core.seeding import derive, stream
from hilum.data.labels import CXRLT_2023, CXRLT_2024_TASK1, CXRLT_2024_TASK2
from hilum.data.phantoms.cohort import PatientPlan
from hilum.data.phantoms.layouts.jobs import (
    ImageJob,
    Layout,
    MaskRow,
    StudyJob,
    csv_text,
    image_shape,
    scattered_number,
)

CXRLT_COLUMNS = ("dicom_id", "subject_id", "study_id", "ViewPosition", "ViewCodeSequence_CodeMeaning")
MIMIC_COLUMNS = (
    "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
    "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
)  # fmt: skip
VIEW_CODES = {"AP": "antero-posterior", "PA": "postero-anterior", "LATERAL": "lateral", "LL": "left lateral"}


def _jobs(cohort: list[PatientPlan], seed: int, size: int) -> list[StudyJob]:
    jobs = []
    for patient in cohort:
        subject = str(scattered_number(seed, "subject", patient.number, 10_000_000))
        for study in patient.studies:
            study_id = str(scattered_number(seed, "study", 4 * patient.number + study.number, 50_000_000))
            images = []
            for plan in study.images:
                words = [
                    f"{derive(seed, 'dicom', patient.number, study.number, plan.number, k):016x}"[-8:] for k in range(5)
                ]
                dicom = "-".join(words)
                path = f"files/p{subject[:2]}/p{subject}/s{study_id}/{dicom}.jpg"
                images.append(ImageJob(dicom, path, plan, image_shape(size, plan.aspect)))
            jobs.append(StudyJob(seed, patient, study, subject, study_id, images))
    return jobs


def _rows(job: StudyJob, classes: tuple[str, ...]) -> Iterator[list[Any]]:
    labels = job.study.labels()
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


def _write(
    folder: Path, name: str, path_column: str, tables: dict[str, tuple[str, tuple[str, ...]]], jobs: list[StudyJob]
) -> None:
    for file, (split, classes) in tables.items():
        rows: list[list[Any]] = [[*CXRLT_COLUMNS, path_column, *classes]]
        for job in jobs:
            if job.patient.split == split:
                rows += _rows(job, classes)
        write_text(folder / name / file, csv_text(rows))
    rows = [list(MIMIC_COLUMNS)]
    for job in jobs:
        rng = stream(job.seed, "phantom", "date", job.patient.number)
        date = f"{2110 + int(rng.integers(90))}{1 + job.study.number:02d}{int(rng.integers(1, 28)):02d}"
        views = {image.plan.position for image in job.images}
        procedure = "CHEST (PORTABLE AP)" if views == {"AP"} else "CHEST (PA AND LAT)"
        for image in job.images:
            view = "" if image.plan.blank_view else image.plan.position
            code = "" if image.plan.blank_code else VIEW_CODES[image.plan.position]
            erect = "Recumbent" if image.plan.position == "AP" else "Erect"
            height, width = image.shape
            rows.append([image.image_id, job.subject_id, job.study_id, procedure, view, height, width, date,
                         f"{int(rng.integers(60_000, 235_959))}.875", procedure, code, erect])  # fmt: skip
    # no name and no time in the gzip header: same seed, same bytes
    write_bytes(folder / "mimic-cxr-2.0.0-metadata.csv.gz", gzip.compress(csv_text(rows).encode(), 6, mtime=0))


OWN = ("files", "cxr-lt-2023", "cxr-lt-2024", "mimic-cxr-2.0.0-metadata.csv.gz")
CXRLT = Layout(_jobs, _tables, source="cxrlt", own=OWN)
CXRLT_OF_2023 = Layout(_jobs, _tables_of_2023, source="cxrlt", own=OWN)
