"""SIIM-ACR Pneumothorax 2019: DICOM in a tree of UIDs, and runs of pixels in a table with a space in its header."""

from pathlib import Path

import cv2
import numpy as np

from hilum.core.files import write_text
from hilum.data.phantoms.cohort import PatientPlan
from hilum.data.phantoms.encoding import uid_of
from hilum.data.phantoms.layouts.jobs import ImageJob, Layout, MaskRow, StudyJob, frontal_images
from hilum.data.phantoms.render import patient_anatomy

TABLE = "train-rle.csv"
FINDING = "Pneumothorax"


def _jobs(cohort: list[PatientPlan], seed: int, size: int) -> list[StudyJob]:
    jobs = []
    for patient in cohort:
        anatomy = patient_anatomy(seed, patient.number)
        subject = uid_of(f"siim {seed} {patient.number}")
        for study in patient.studies:
            uid = uid_of(f"siim {seed} {patient.number} {study.number}")
            images = []
            for plan in frontal_images(study):
                name = uid_of(f"siim {seed} {patient.number} {study.number} {plan.number}")
                elements = (("PatientID", subject), ("StudyInstanceUID", uid), ("ViewPosition", plan.position),
                            ("PatientSex", "F" if anatomy.female else "M"), ("PatientAge", str(round(anatomy.age))),
                            )  # fmt: skip
                path = f"dicom-images-train/{uid}/{uid}.1/{name}.dcm"
                images.append(ImageJob(name, path, plan, (size, size), "dicom", elements))
            jobs.append(StudyJob(seed, patient, study, subject, uid, images))
    return jobs


def _tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    drawn = {mask.image_id: mask.path for mask in masks if mask.finding == FINDING}
    lines = ["ImageId, EncodedPixels"]
    for job in jobs:
        for image in job.images:
            regions = ["-1"]
            if FINDING in job.study.findings:
                path = drawn.get(image.image_id)
                pixels = cv2.imread(str(folder / path), cv2.IMREAD_GRAYSCALE) if path else None
                regions = _regions(pixels) if pixels is not None else ["0 1"]
            lines += [f"{image.image_id}, {region}" for region in regions]
    write_text(folder / TABLE, "\n".join(lines) + "\n")


def _regions(mask: np.ndarray) -> list[str]:
    """One text of runs for each side of the chest that the mask touches."""
    middle = mask.shape[1] // 2
    sides = [np.where(np.arange(mask.shape[1]) < middle, mask, 0), np.where(np.arange(mask.shape[1]) < middle, 0, mask)]
    return [runs(side) for side in sides if side.any()]


def runs(mask: np.ndarray) -> str:
    """Runs of a mask, column by column: pixels since the end of the run before, and length."""
    flat = (mask.T.reshape(-1) > 0).astype(np.int8)
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=0))
    starts, ends = edges[::2], edges[1::2]
    gaps = starts - np.concatenate([[0], ends[:-1]])
    return " ".join(f"{gap} {end - start}" for gap, start, end in zip(gaps, starts, ends, strict=True))


SIIM = Layout(_jobs, _tables, source="siim", own=("dicom-images-train", TABLE))
