"""CheXpert v1.0, full and small, and CheXpert Plus; and the cells of the 14 labels, which two other layouts share.

Of the quirks: most absent findings are blank, No Finding is 1 or blank and may stand beside devices, ages end at 90,
laterals have no projection, the radiologists' tables are 0 and 1 throughout; Plus names .jpg files and holds .png.
"""

import json
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hilum.core.files import write_text
from hilum.core.seeding import stream
from hilum.data.phantoms.cohort import PatientPlan
from hilum.data.phantoms.layouts.jobs import ImageJob, Layout, MaskRow, StudyJob, csv_text, image_shape
from hilum.data.phantoms.render import patient_anatomy

CHEXPERT_LABELS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_LABELS)
PLUS_COLUMNS = (
    "path_to_image", "path_to_dcm", "frontal_lateral", "ap_pa", "deid_patient_id", "patient_report_date_order",
    "report", "section_narrative", "section_clinical_history", "section_history", "section_comparison",
    "section_technique", "section_procedure_comments", "section_findings", "section_impression",
    "section_end_of_impression", "section_summary", "section_accession_number", "age", "sex", "race", "ethnicity",
    "interpreter_needed", "insurance_type", "recent_bmi", "deceased", "split",
)  # fmt: skip
PLUS_TABLE = "df_chexpert_plus_240401.csv"
PLUS_LABELS = "chexbert_labels/impression_fixed.json"
FOLDERS = {"train": "train", "val": "valid", "test": "test"}
TABLES = {"train": "train.csv", "val": "valid.csv", "test": "test_labels.csv"}
OLDEST = 90
BLANK_SHARE, UNCERTAIN_SHARE = 0.6, 0.05
"""Of absent findings: not mentioned, and called uncertain; the others are denied."""


def label_cells(findings: Collection[str], rng: np.random.Generator, closed: bool = False) -> dict[str, str]:
    """The 14 cells of a study.

    Args:
        findings: of the study; those that the source cannot name are not written.
        rng: for what a report leaves out.
        closed: all cells are 0 or 1, as where radiologists filled them.
    """
    diseased = not set(findings) <= {"Normal", "Support Devices"}
    cells = {}
    for label in CHEXPERT_LABELS:
        present = not diseased if label == "No Finding" else label in findings
        draw = float(rng.random())
        if present:
            cells[label] = "1.0"
        elif closed or (label != "No Finding" and draw >= BLANK_SHARE + UNCERTAIN_SHARE):
            cells[label] = "0.0"
        else:
            uncertain = diseased and label not in ("No Finding", "Support Devices") and draw >= BLANK_SHARE
            cells[label] = "-1.0" if uncertain else ""
    return cells


def _jobs(
    cohort: list[PatientPlan], seed: int, size: int, *,
    home: str, suffix: str = ".jpg", splits: Collection[str] = ("train", "val", "test"),
) -> list[StudyJob]:  # fmt: skip
    jobs = []
    for patient in cohort:
        if patient.split not in splits:
            continue
        subject = f"patient{patient.number + 1:05d}"
        for study in patient.studies:
            images = []
            for plan in study.images:
                kind = "frontal" if plan.position in ("PA", "AP") else "lateral"
                name = f"{FOLDERS[patient.split]}/{subject}/study{study.number + 1}/view{plan.number + 1}_{kind}"
                images.append(ImageJob(name, f"{home}/{name}{suffix}", plan, image_shape(size, plan.aspect)))
            jobs.append(StudyJob(seed, patient, study, subject, f"study{study.number + 1}", images))
    return jobs


def _cells(job: StudyJob, closed: bool) -> dict[str, str]:
    return label_cells(
        job.study.findings, stream(job.seed, "phantom", "chexpert", job.patient.number, job.study.number), closed
    )


def _person(job: StudyJob) -> tuple[str, int]:
    anatomy = patient_anatomy(job.seed, job.patient.number)
    return "Female" if anatomy.female else "Male", min(round(anatomy.age), OLDEST)


def _projection(image: ImageJob) -> tuple[str, str]:
    frontal = image.plan.position in ("PA", "AP")
    return ("Frontal", image.plan.position) if frontal else ("Lateral", "")


def _tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow], *, home: str) -> None:
    for split, name in TABLES.items():
        rows: list[list[Any]] = []
        for job in jobs:
            if job.patient.split != split:
                continue
            cells = [_cells(job, split != "train")[label] for label in CHEXPERT_LABELS]
            for image in job.images:
                path = f"{home}/{image.image_id}.jpg"
                rows.append([path, *_person(job), *_projection(image), *cells] if split != "test" else [path, *cells])
        header = COLUMNS if split != "test" else ("Path", *CHEXPERT_LABELS)
        if rows:
            write_text(folder / home / name, csv_text([list(header), *rows]))


def _plus_tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    rows: list[list[Any]] = [list(PLUS_COLUMNS)]
    lines = []
    for job in jobs:
        sex, age = _person(job)
        cells = _cells(job, closed=False)
        values = {label: float(cell) if cell else None for label, cell in cells.items()}
        for image in job.images:
            filled = {
                "path_to_image": f"{image.image_id}.jpg", "path_to_dcm": f"{image.image_id}.dcm",
                "frontal_lateral": _projection(image)[0], "ap_pa": _projection(image)[1],
                "deid_patient_id": job.subject_id, "patient_report_date_order": job.study.number + 1,
                "report": 'NARRATIVE:\nSynthetic, with "quotes", and lines.', "section_impression": "Synthetic.",
                "age": age, "sex": sex, "race": "Unknown", "ethnicity": "Unknown",
                "split": FOLDERS[job.patient.split],
            }  # fmt: skip
            rows.append([filled.get(name, "") for name in PLUS_COLUMNS])
            lines.append(json.dumps({"path_to_image": f"{image.image_id}.jpg", **values}))
    write_text(folder / PLUS_TABLE, csv_text(rows))
    write_text(folder / PLUS_LABELS, "\n".join(lines) + "\n")


def _layout(home: str) -> Layout:
    return Layout(partial(_jobs, home=home), partial(_tables, home=home), source="chexpert", own=(home,))


CHEXPERT, CHEXPERT_SMALL = _layout("CheXpert-v1.0"), _layout("CheXpert-v1.0-small")
CHEXPERT_PLUS = Layout(
    partial(_jobs, home="PNG", suffix=".png", splits=("train", "val")),
    _plus_tables,
    source="chexpert",
    own=("PNG", "chexbert_labels", PLUS_TABLE),
)
