"""TAIX-Ray as the script of its card writes it: 16-bit PNGs, grades left and right, five folds.

Of the quirks: ages in days, dates moved for each image alone, questionable grades, pixels that use 12 of the 16 bits.
"""

import datetime
import hashlib
from pathlib import Path
from typing import Any

from hilum.core.files import write_text
from hilum.core.seeding import derive, stream
from hilum.data.label_maps import load_map
from hilum.data.phantoms.cohort import PatientPlan
from hilum.data.phantoms.layouts.jobs import (
    ImageJob,
    Layout,
    MaskRow,
    StudyJob,
    csv_text,
    frontal_images,
    image_shape,
)
from hilum.data.phantoms.render import patient_anatomy

COLUMNS = ("UID", "PatientID", "PhysicianID", "StudyDate", "Age", "Sex")
FOLDS = 5
QUESTIONABLE = 9
"""One of so many grades that are not "present" is "questionable"."""


def _jobs(cohort: list[PatientPlan], seed: int, size: int) -> list[StudyJob]:
    jobs = []
    for patient in cohort:
        subject = _digest(seed, "patient", patient.number)
        for study in patient.studies:
            images = []
            for plan in frontal_images(study):
                name = _digest(seed, "image", patient.number, study.number, plan.number)
                images.append(ImageJob(name, f"data/{name}.png", plan, image_shape(size, plan.aspect), "png12"))
            jobs.append(StudyJob(seed, patient, study, subject, str(study.number), images))
    return jobs


def _digest(seed: int, *key: str | int) -> str:
    return hashlib.sha256(str(derive(seed, "taix", *key)).encode()).hexdigest()


def _grades(job: StudyJob, image: ImageJob) -> list[int]:
    """A grade for each label; a finding that has two sides is on one of them, or on both."""
    grades = []
    side = derive(job.seed, "side", job.patient.number, job.study.number) % 3
    for row_number, label in enumerate(load_map("taix").labels):
        finding = next(row.finding for row in load_map("taix").rows if row.label == label)
        here = side == 2 or not label.endswith(("Right", "Left")) or label.endswith(("Right", "Left")[side])
        worst = 3 if label == "HeartSize" else 4
        severity = job.study.findings.get(finding)
        doubtful = derive(job.seed, "doubt", image.image_id, row_number) % QUESTIONABLE == 0
        grades.append(int(doubtful) if severity is None or not here else 2 + round(severity * (worst - 2)))
    return grades


def _tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    rows: list[list[Any]] = [[*COLUMNS, *load_map("taix").labels]]
    folds: list[list[list[Any]]] = [[] for _ in range(FOLDS)]
    for job in jobs:
        anatomy = patient_anatomy(job.seed, job.patient.number)
        for image in job.images:
            rng = stream(job.seed, "phantom", "taix", image.image_id)
            days = round(anatomy.age * 365) + 3 * job.study.number
            date = datetime.date(2015, 6, 1) + datetime.timedelta(
                days=3 * job.study.number + int(rng.integers(-100, 101))
            )
            reader = _digest(job.seed, "reader", int(rng.integers(20)))
            sex = "F" if anatomy.female else "M"
            rows.append([image.image_id, job.subject_id, reader, date, days, sex, *_grades(job, image)])
            for fold in range(FOLDS):
                turned = ("train", "val", "test")[(derive(job.seed, "fold", job.patient.number, fold)) % 3]
                split = turned if fold else job.patient.split
                folds[fold].append([image.image_id, job.subject_id, fold, split])
    write_text(folder / "metadata" / "annotation.csv", csv_text(rows))
    split_rows = [row for fold in folds for row in fold]
    write_text(folder / "metadata" / "split.csv", csv_text([["UID", "PatientID", "Fold", "Split"], *split_rows]))


TAIX = Layout(_jobs, _tables, source="taix", own=("data", "metadata"))
