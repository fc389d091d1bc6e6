"""NIH ChestX-ray14: its table of 2020, split lists and boxes."""

from pathlib import Path
from typing import Any

from hilum.core.files import write_text
from hilum.data.label_maps import load_map
from hilum.data.phantoms.cohort import PatientPlan
from hilum.data.phantoms.layouts.jobs import ImageJob, Layout, MaskRow, StudyJob, csv_text
from hilum.data.phantoms.render import patient_anatomy

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


def _jobs(cohort: list[PatientPlan], seed: int, size: int) -> list[StudyJob]:
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


def _tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    rows: list[list[Any]] = []
    lists: dict[bool, list[str]] = {True: [], False: []}
    for job in jobs:
        anatomy = patient_anatomy(job.seed, job.patient.number)
        present = [
            row.label for row in load_map("nih").rows if row.finding in job.study.findings and row.label != "No Finding"
        ]
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


OWN = ("images", "Data_Entry_2017_v2020.csv", "train_val_list.txt", "test_list.txt", "BBox_List_2017.csv")
NIH = Layout(_jobs, _tables, source="nih", own=OWN)
