"""The real sources' folder layouts, ids and CSV tables, for a cohort of phantoms.

A layout names every image of a cohort (`jobs`) and writes the tables once they are made (`tables`); `LAYOUTS` is the
registry. Not written: labels.csv and the task 3 files of CXR-LT 2024, whose five further findings have no phantom sign.
"""

import csv
import gzip
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hilum.core.files import write_bytes, write_text
from hilum.core.seeding import derive, stream
from hilum.data.labels import CXRLT_2023, CXRLT_2024_TASK1, CXRLT_2024_TASK2, NIH_TO_CXRLT
from hilum.data.phantoms.cohort import ImagePlan, PatientPlan, StudyPlan
from hilum.data.phantoms.render import patient_anatomy

CXRLT_COLUMNS = ("dicom_id", "subject_id", "study_id", "ViewPosition", "ViewCodeSequence_CodeMeaning")
MIMIC_COLUMNS = (
    "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
    "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
)  # fmt: skip
VIEW_CODES = {"AP": "antero-posterior", "PA": "postero-anterior", "LATERAL": "lateral", "LL": "left lateral"}
NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
NIH_BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
NIH_BOXED = {
    "Atelectasis": "Atelectasis", "Cardiomegaly": "Cardiomegaly", "Pleural Effusion": "Effusion",
    "Infiltration": "Infiltrate", "Mass": "Mass", "Nodule": "Nodule", "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
}  # fmt: skip
"""The eight findings that the source has boxes for, under the names that its box file uses."""


@dataclass(frozen=True)
class ImageJob:
    """One image: what it is called and where it goes."""

    image_id: str
    path: str
    """Relative to OUT."""
    plan: ImagePlan
    shape: tuple[int, int]


@dataclass(frozen=True)
class StudyJob:
    """One study of one patient, ready to be rendered in any process."""

    seed: int
    patient: PatientPlan
    study: StudyPlan
    subject_id: str
    study_id: str
    images: list[ImageJob]


@dataclass(frozen=True)
class MaskRow:
    """One mask that was written; `box` is (x, y, width, height) in pixels."""

    image_id: str
    finding: str
    path: str
    area: float
    box: tuple[int, int, int, int]


# CXR-LT on MIMIC-CXR-JPG


def _number(seed: int, kind: str, index: int, first: int) -> int:
    """The index-th of 10,000,000 distinct numbers from `first` on, scattered by a stride prime to their count."""
    return first + (derive(seed, "phantom", kind) + index * 618_033) % 10_000_000


def _shape(size: int, aspect: float) -> tuple[int, int]:
    long = round(size * max(aspect, 1 / aspect))
    return (size, long) if aspect > 1 else (long, size)


def _cxrlt_jobs(cohort: list[PatientPlan], seed: int, size: int) -> list[StudyJob]:
    jobs = []
    for patient in cohort:
        subject = str(_number(seed, "subject", patient.number, 10_000_000))
        for study in patient.studies:
            study_id = str(_number(seed, "study", 4 * patient.number + study.number, 50_000_000))
            images = []
            for plan in study.images:
                words = [
                    f"{derive(seed, 'dicom', patient.number, study.number, plan.number, k):016x}"[-8:] for k in range(5)
                ]
                dicom = "-".join(words)
                path = f"files/p{subject[:2]}/p{subject}/s{study_id}/{dicom}.jpg"
                images.append(ImageJob(dicom, path, plan, _shape(size, plan.aspect)))
            jobs.append(StudyJob(seed, patient, study, subject, study_id, images))
    return jobs


def _cxrlt_rows(job: StudyJob, classes: tuple[str, ...]) -> Iterator[list[Any]]:
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


def _cxrlt_tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    tables = {
        "train_labeled.csv": ("train", CXRLT_2024_TASK1),
        "development_labeled_task1.csv": ("val", CXRLT_2024_TASK1),
        "development_labeled_task2.csv": ("val", CXRLT_2024_TASK2),
        "test_labeled_task1.csv": ("test", CXRLT_2024_TASK1),
        "test_labeled_task2.csv": ("test", CXRLT_2024_TASK2),
    }
    _cxrlt_write(folder, "cxr-lt-2024", "fpath", tables, jobs)


def _cxrlt2023_tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    tables = {
        "train.csv": ("train", CXRLT_2023),
        "development.csv": ("val", CXRLT_2023),
        "test.csv": ("test", CXRLT_2023),
    }
    _cxrlt_write(folder, "cxr-lt-2023", "path", tables, jobs)


def _cxrlt_write(
    folder: Path, name: str, path_column: str, tables: dict[str, tuple[str, tuple[str, ...]]], jobs: list[StudyJob]
) -> None:
    for file, (split, classes) in tables.items():
        rows: list[list[Any]] = [[*CXRLT_COLUMNS, path_column, *classes]]
        for job in jobs:
            if job.patient.split == split:
                rows += _cxrlt_rows(job, classes)
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


# NIH ChestX-ray14


def _nih_jobs(cohort: list[PatientPlan], seed: int, size: int) -> list[StudyJob]:
    jobs = []
    for patient in cohort:
        subject, follow_up = patient.number + 1, 0
        for study in patient.studies:
            images = []
            for plan in study.images:
                if plan.position in ("PA", "AP"):  # the source has no lateral views
                    name = f"{subject:08d}_{follow_up:03d}.png"
                    images.append(ImageJob(name, f"images/{name}", plan, (size, size)))
                    follow_up += 1
            jobs.append(StudyJob(seed, patient, study, str(subject), str(study.number), images))
    return jobs


def _nih_tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    rows: list[list[Any]] = []
    lists: dict[bool, list[str]] = {True: [], False: []}
    for job in jobs:
        anatomy = patient_anatomy(job.seed, job.patient.number)
        present = [t for t, name in NIH_TO_CXRLT.items() if name in job.study.findings and t != "No Finding"]
        tokens = "|".join(sorted(present)) or "No Finding"
        for image in job.images:
            wide = image.plan.aspect > 1
            lists[job.patient.split == "test"].append(image.image_id)
            rows.append([image.image_id, tokens, int(image.image_id[9:12]), int(job.subject_id), round(anatomy.age),
                         "F" if anatomy.female else "M", image.plan.position, 3056 if wide else 2544,
                         2544 if wide else 3056, 0.139, 0.139])  # fmt: skip
    write_text(folder / "Data_Entry_2017_v2020.csv", NIH_HEADER + "\n" + csv_text(rows))
    write_text(folder / "train_val_list.txt", "\n".join(lists[False]) + "\n" * bool(lists[False]))
    write_text(folder / "test_list.txt", "\n".join(lists[True]) + "\n" * bool(lists[True]))
    held_out = set(lists[True])
    boxes = [
        [m.image_id, NIH_BOXED[m.finding], *(float(value) for value in m.box), "", "", ""]
        for m in masks
        if m.finding in NIH_BOXED and m.image_id in held_out
    ]
    write_text(folder / "BBox_List_2017.csv", NIH_BOX_HEADER + "\n" + csv_text(boxes))


@dataclass(frozen=True)
class Layout:
    """How a cohort becomes files: `jobs` names the images, `tables` writes the CSVs."""

    jobs: Callable[[list[PatientPlan], int, int], list[StudyJob]]
    tables: Callable[[Path, list[StudyJob], list[MaskRow]], None]


LAYOUTS: dict[str, Layout] = {
    "cxrlt": Layout(_cxrlt_jobs, _cxrlt_tables),
    "cxrlt2023": Layout(_cxrlt_jobs, _cxrlt2023_tables),
    "nih": Layout(_nih_jobs, _nih_tables),
}


def csv_text(rows: list[list[Any]]) -> str:
    """Rows as CSV with Unix line ends."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
