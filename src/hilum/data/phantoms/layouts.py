"""Phantoms on disk, in the folder and CSV layouts of the real sources, lesion masks beside them.

`OUT/masks/<image stem>/<finding>.png` (0 / 255), `OUT/masks.csv` and `OUT/phantom.json` are the same in all layouts.
A run is written to a folder beside OUT and takes its place at the end, so OUT is whole or untouched.
"""

import csv
import gzip
import io
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from hilum.core.errors import ConfigError, HilumError, UnknownNameError
from hilum.core.files import read_json, write_bytes, write_json, write_text
from hilum.core.seeding import derive, stream
from hilum.core.tracking import progress
from hilum.data.labels import CXRLT_2023, CXRLT_2024_TASK1, CXRLT_2024_TASK2, NIH_TO_CXRLT
from hilum.data.phantoms.cohort import MINIMUM_PATIENTS, ImagePlan, PatientPlan, StudyPlan, plan_cohort
from hilum.data.phantoms.render import patient_anatomy, render_study

FORMAT = "hilum-phantom-1"
VERSION = 1
"""Of the generator: pictures of two versions differ for one seed."""
SMALLEST, LARGEST = 64, 2048
JPEG_QUALITY = 95
OWN = ("files", "images", "masks", "cxr-lt-2023", "cxr-lt-2024", "mimic-cxr-2.0.0-metadata.csv.gz", "masks.csv")
"""What a run may leave in OUT besides phantom.json; a new run over an old one of ours removes these and nothing else."""

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


def write_phantoms(
    out: Path, layout: str, patients: int, seed: int, size: int = 320, minimum_patients: int = MINIMUM_PATIENTS,
    workers: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a cohort of synthetic patients.

    Args:
        out: a folder that is empty, absent, or holds an earlier run of this function (which is replaced).
        layout: "cxrlt" (CXR-LT 2024 on MIMIC-CXR-JPG), "cxrlt2023", or "nih" (ChestX-ray14).
        patients: how many.
        seed: same seed and arguments, same bytes, whatever the number of workers.
        size: short side of the images in pixels.
        minimum_patients: see `cohort.plan_cohort`.
        workers: processes; None takes the cores this process may use, up to 8.

    Returns:
        What `OUT/phantom.json` holds: parameters and counts by finding.

    Raises:
        ConfigError: an argument out of range, or `out` holds something else.
        UnknownNameError: no such layout.
    """
    if layout not in LAYOUTS:
        raise UnknownNameError("layout", layout, LAYOUTS)
    if patients < 1 or minimum_patients < 0 or not SMALLEST <= size <= LARGEST or (workers is not None and workers < 1):
        raise ConfigError(
            f"Phantoms need at least 1 patient, 1 worker and a size from {SMALLEST} to {LARGEST}; found "
            f"patients={patients}, size={size}, minimum_patients={minimum_patients}, workers={workers}."
        )
    out = Path(out)
    _refuse_foreign(out)
    cohort = plan_cohort(patients, seed, minimum_patients)
    jobs = LAYOUTS[layout].jobs(cohort, seed, size)
    with _workplace(out) as folder:
        masks = _render_all(folder, jobs, workers or min(len(os.sched_getaffinity(0)), 8))
        LAYOUTS[layout].tables(folder, jobs, masks)
        rows = [[m.image_id, m.finding, m.path, f"{m.area:.6f}"] for m in masks]
        write_text(folder / "masks.csv", _csv([["image_id", "finding", "path", "area_fraction"], *rows]))
        summary = _summary(layout, patients, seed, size, minimum_patients, jobs, masks)
        write_json(folder / "phantom.json", summary)
    return summary


def _refuse_foreign(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    record = out / "phantom.json"
    error = lambda text: ConfigError(text)  # noqa: E731
    if out.is_dir() and record.exists() and read_json(record, error).get("format") == FORMAT:
        return
    raise ConfigError(
        f"{out} is not empty and was not made by this command (it has no phantom.json). Nothing was written. "
        "Name a new folder, or empty this one yourself."
    )


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """A folder beside `out`; on success its content takes the place of an earlier run in `out`."""
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder
        if not out.exists():
            folder.rename(out)
            return
        (out / "phantom.json").unlink(missing_ok=True)
        for name in OWN:
            old = out / name
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)
        for new in sorted(folder.iterdir(), key=lambda path: path.name == "phantom.json"):
            new.rename(out / new.name)
    except OSError as error:
        raise HilumError(f"Could not write phantoms to {out}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# Rendering


def _render_all(folder: Path, jobs: list[StudyJob], workers: int) -> list[MaskRow]:
    masks: list[MaskRow] = []
    with progress("phantoms", sum(len(job.images) for job in jobs), "images") as bar:
        if workers == 1:
            for job in jobs:
                masks += render_job(folder, job)
                bar.advance(len(job.images))
            return masks
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _one_thread)
        with pool:
            done = pool.map(render_job, [folder] * len(jobs), jobs, chunksize=8)
            for job, rows in zip(jobs, done, strict=True):
                masks += rows
                bar.advance(len(job.images))
    return masks


def _one_thread() -> None:
    cv2.setNumThreads(1)


def render_job(folder: Path, job: StudyJob) -> list[MaskRow]:
    """Render and write the images and masks of one study."""
    images = render_study(
        job.seed, job.patient.number, job.study.number, [image.plan.position for image in job.images],
        job.study.findings, [image.shape for image in job.images], [image.plan.number for image in job.images],
    )  # fmt: skip
    rows = []
    for image, rendered in zip(job.images, images, strict=True):
        path = folder / image.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_encode(path.suffix, rendered.pixels))
        if rendered.masks:
            (folder / "masks" / path.stem).mkdir(parents=True, exist_ok=True)
        for finding, mask in sorted(rendered.masks.items()):
            name = f"masks/{path.stem}/{mask_name(finding)}"
            pixels = mask.astype(np.uint8) * np.uint8(255)
            (folder / name).write_bytes(_encode(".mask", pixels))
            x, y, width, height = cv2.boundingRect(pixels)
            rows.append(MaskRow(image.image_id, finding, name, float(mask.mean()), (x, y, width, height)))
    return rows


def mask_name(finding: str) -> str:
    """File name of a finding's mask."""
    return re.sub(r"\W", "_", finding) + ".png"


def _encode(suffix: str, pixels: np.ndarray) -> bytes:
    if suffix == ".jpg":
        kind, options = ".jpg", [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    elif suffix == ".mask":
        kind, options = ".png", [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_BILEVEL, 1]
    else:
        kind, options = ".png", [cv2.IMWRITE_PNG_COMPRESSION, 1]
    written, data = cv2.imencode(kind, pixels, options)
    assert written
    return data.tobytes()


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
                words = [f"{derive(seed, 'dicom', patient.number, study.number, plan.number, k):016x}"[-8:] for k in range(5)]
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
        yield [image.image_id, job.subject_id, f"s{job.study_id}", view, code, image.path, *(labels[c] for c in classes)]


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
    tables = {"train.csv": ("train", CXRLT_2023), "development.csv": ("val", CXRLT_2023), "test.csv": ("test", CXRLT_2023)}
    _cxrlt_write(folder, "cxr-lt-2023", "path", tables, jobs)


def _cxrlt_write(
    folder: Path, name: str, path_column: str, tables: dict[str, tuple[str, tuple[str, ...]]], jobs: list[StudyJob]
) -> None:
    for file, (split, classes) in tables.items():
        rows: list[list[Any]] = [[*CXRLT_COLUMNS, path_column, *classes]]
        for job in jobs:
            if job.patient.split == split:
                rows += _cxrlt_rows(job, classes)
        write_text(folder / name / file, _csv(rows))
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
    write_bytes(folder / "mimic-cxr-2.0.0-metadata.csv.gz", gzip.compress(_csv(rows).encode(), 6, mtime=0))


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
    write_text(folder / "Data_Entry_2017_v2020.csv", NIH_HEADER + "\n" + _csv(rows))
    write_text(folder / "train_val_list.txt", "\n".join(lists[False]) + "\n" * bool(lists[False]))
    write_text(folder / "test_list.txt", "\n".join(lists[True]) + "\n" * bool(lists[True]))
    held_out = set(lists[True])
    boxes = [
        [m.image_id, NIH_BOXED[m.finding], *(float(value) for value in m.box), "", "", ""]
        for m in masks
        if m.finding in NIH_BOXED and m.image_id in held_out
    ]
    write_text(folder / "BBox_List_2017.csv", NIH_BOX_HEADER + "\n" + _csv(boxes))


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


def _csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _summary(
    layout: str, patients: int, seed: int, size: int, minimum_patients: int, jobs: list[StudyJob], masks: list[MaskRow]
) -> dict[str, Any]:
    counts = {}
    for name in CXRLT_2024_TASK1:
        having = [job for job in jobs if name in job.study.findings]
        counts[name] = {
            "patients": len({job.patient.number for job in having}),
            "studies": len(having),
            "images": sum(len(job.images) for job in having),
            "masks": sum(mask.finding == name for mask in masks),
        }
    splits = {s: len({j.patient.number for j in jobs if j.patient.split == s}) for s in ("train", "val", "test")}
    return {
        "format": FORMAT,
        "generator_version": VERSION,
        "layout": layout,
        "seed": seed,
        "size": size,
        "minimum_patients": minimum_patients,
        "patients": patients,
        "studies": len(jobs),
        "images": sum(len(job.images) for job in jobs),
        "patients_by_split": splits,
        "findings": counts,
        "notice": "Synthetic images. They carry no information about real disease.",
    }
