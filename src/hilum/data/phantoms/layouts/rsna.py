"""RSNA Pneumonia 2018: DICOM under ids of images, two tables, and the map to NIH.

The same cohort in the layout `nih` has the images that the map names.
"""

from pathlib import Path
from typing import Any

from hilum.core.files import write_json, write_text
from hilum.core.seeding import derive
from hilum.data.phantoms.cohort import PatientPlan
from hilum.data.phantoms.layouts.jobs import ImageJob, Layout, MaskRow, StudyJob, csv_text, frontal_images
from hilum.data.phantoms.render import patient_anatomy

BOXES, CLASSES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
MAP = "pneumonia-challenge-dataset-mappings_2018.json"
IMPOSSIBLE_AGE = "155"
"""A few headers have ages like this one."""


def _jobs(cohort: list[PatientPlan], seed: int, size: int) -> list[StudyJob]:
    jobs = []
    for patient in cohort:
        anatomy, follow_up = patient_anatomy(seed, patient.number), 0
        for study in patient.studies:
            images = []
            for plan in frontal_images(study):
                digits = f"{derive(seed, 'rsna', patient.number, follow_up):016x}{derive(seed, 'rsna', follow_up):016x}"
                name = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:32]))
                age = IMPOSSIBLE_AGE if patient.number % 10 == 7 else str(round(anatomy.age))
                elements = (("PatientID", name), ("ViewPosition", plan.position), ("PatientAge", age),
                            ("PatientSex", "F" if anatomy.female else "M"))  # fmt: skip
                images.append(ImageJob(name, f"stage_2_train_images/{name}.dcm", plan, (size, size), "dicom", elements))
                follow_up += 1
            jobs.append(StudyJob(seed, patient, study, f"{patient.number + 1:08d}", str(study.number), images))
    return jobs


def _tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    drawn: dict[str, list[MaskRow]] = {}
    for mask in masks:
        if mask.finding == "Lung Opacity":
            drawn.setdefault(mask.image_id, []).append(mask)
    boxes: list[list[Any]] = [["patientId", "x", "y", "width", "height", "Target"]]
    classes: list[list[Any]] = [["patientId", "class"]]
    entries, follow_ups = [], dict[str, int]()
    for job in jobs:
        for image in job.images:
            follow_up = follow_ups.get(job.subject_id, 0)
            follow_ups[job.subject_id] = follow_up + 1
            entries.append({"subset_img_id": image.image_id, "img_id": f"{job.subject_id}_{follow_up:03d}.png"})
            if "Lung Opacity" in job.study.findings:
                for box in halves(drawn[image.image_id][0].box if image.image_id in drawn else (1, 1, 8, 8)):
                    boxes.append([image.image_id, *map(float, box), 1])
                    classes.append([image.image_id, "Lung Opacity"])
            else:
                boxes.append([image.image_id, "", "", "", "", 0])
                normal = "Normal" in job.study.findings
                classes.append([image.image_id, "Normal" if normal else "No Lung Opacity / Not Normal"])
    write_text(folder / BOXES, csv_text(boxes))
    write_text(folder / CLASSES, csv_text(classes))
    write_json(folder / MAP, entries)


def halves(box: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
    """A wide box as two beside each other: images have up to four."""
    x, y, width, height = box
    if width < 2 * height:
        return [box]
    return [(x, y, width // 2, height), (x + width // 2, y, width - width // 2, height)]


RSNA = Layout(_jobs, _tables, source="rsna", own=("stage_2_train_images", BOXES, CLASSES, MAP))
