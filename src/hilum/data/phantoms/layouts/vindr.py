"""VinDr-CXR 1.0.0 and the VinBigData challenge: DICOM files, three readers for training images, boxes.

Of the quirks: files that are MONOCHROME1 or do not name their transfer syntax, no window in some, readers who disagree
(the majority says what the chest has), "Other disease" in the test table, no patients.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hilum.core.files import write_text
from hilum.core.seeding import derive
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
    names_of,
)

FORMS = ("dicom", "dicom_monochrome1", "dicom", "dicom_no_window", "dicom", "dicom_no_syntax")
READERS = 17
SAYS_NOTHING = "Other lesion"
"""Where a chest has findings, and none that the source could name."""
CHALLENGE_CLASSES = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation", "ILD", "Infiltration",
    "Lung Opacity", "Nodule/Mass", "Other lesion", "Pleural effusion", "Pleural thickening", "Pneumothorax",
    "Pulmonary fibrosis", "No finding",
)  # fmt: skip
"""In the order of their numbers."""
BOX = ("class_name", "x_min", "y_min", "x_max", "y_max")


def _jobs(cohort: list[PatientPlan], seed: int, size: int) -> list[StudyJob]:
    jobs = []
    for patient in cohort:
        for study in patient.studies:
            images = []
            for plan in frontal_images(study):
                parts = (derive(seed, "vindr", patient.number, study.number, plan.number, k) for k in range(2))
                name = "".join(f"{part:016x}" for part in parts)
                folder = "test" if patient.split == "test" else "train"
                form = FORMS[derive(seed, "form", patient.number, study.number) % len(FORMS)]
                images.append(ImageJob(name, f"{folder}/{name}.dicom", plan, image_shape(size, plan.aspect), form))
            jobs.append(StudyJob(seed, patient, study, str(patient.number), str(study.number), images))
    return jobs


def _labels(job: StudyJob, number: int) -> list[str]:
    table = load_map("vindr")
    names = names_of(job.study.findings, table, number)
    if {"Nodule", "Mass"} & set(job.study.findings):
        names.append("Nodule/Mass")
    return sorted(names or [SAYS_NOTHING], key=table.labels.index)


def _readings(job: StudyJob, number: int) -> Iterator[tuple[str, list[str]]]:
    """Three readers and what each says: one of them may overlook all, or see what is not there."""
    labels = _labels(job, number)
    said = [labels, labels, [labels, ["No finding"], [*labels, "Lung cyst"]][number % 3]]
    for place, names in enumerate(said):
        yield f"R{1 + (number + 5 * place) % READERS}", names if names != ["No finding", "Lung cyst"] else ["Lung cyst"]


def _tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    labels = load_map("vindr").labels
    train: list[list[Any]] = [["image_id", "rad_id", *labels]]
    test: list[list[Any]] = [["image_id", *(name.replace("Other diseases", "Other disease") for name in labels)]]
    boxes: dict[str, list[list[Any]]] = {"train": [["image_id", "rad_id", *BOX]], "test": [["image_id", *BOX]]}
    for number, job in enumerate(jobs):
        for image in job.images:
            if job.patient.split == "test":
                names = _labels(job, number)
                test.append([image.image_id, *(int(label in names) for label in labels)])
                boxes["test"] += [[image.image_id, *box] for box in _boxes(image, names, masks)]
                continue
            for reader, names in _readings(job, number):
                train.append([image.image_id, reader, *(int(label in names) for label in labels)])
                boxes["train"] += [[image.image_id, reader, *box] for box in _boxes(image, names, masks)]
    for split, rows in {"train": train, "test": test}.items():
        if len(rows) == 1:
            continue  # in a cohort of a few patients
        write_text(folder / "annotations" / f"image_labels_{split}.csv", csv_text(rows))
        write_text(folder / "annotations" / f"annotations_{split}.csv", csv_text(boxes[split]))


def _challenge_tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    rows: list[list[Any]] = [["image_id", "class_name", "class_id", "rad_id", "x_min", "y_min", "x_max", "y_max"]]
    for number, job in enumerate(jobs):
        for image in job.images:
            if job.patient.split == "test":
                continue  # the challenge gave out no labels for these
            for reader, names in _readings(job, number):
                asked = [name for name in names if name in CHALLENGE_CLASSES] or [SAYS_NOTHING]
                rows += [
                    [image.image_id, name, CHALLENGE_CLASSES.index(name), reader, *corners]
                    for name, *corners in _boxes(image, asked, masks)
                ]
    write_text(folder / "train.csv", csv_text(rows))


def _boxes(image: ImageJob, names: list[str], masks: list[MaskRow]) -> Iterator[list[Any]]:
    """A box for each label: of the finding's mask where there is one, else the whole image; none for "No finding"."""
    table = load_map("vindr")
    for name in names:
        findings = {row.finding for row in table.rows if row.label == name}
        found = [mask.box for mask in masks if mask.image_id == image.image_id and mask.finding in findings]
        height, width = image.shape
        for x, y, w, h in found or [(0, 0, width, height)]:
            yield [name, "", "", "", ""] if name == "No finding" else [name, x, y, x + w, y + h]


VINDR = Layout(_jobs, _tables, source="vindr", own=("train", "test", "annotations"))
VINBIGDATA = Layout(_jobs, _challenge_tables, source="vindr", own=("train", "test", "train.csv"))
