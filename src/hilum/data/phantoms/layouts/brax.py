"""BRAX 1.1.0: its spreadsheet and PNGs.

Of the quirks: Lung Lesion before Lung Opacity, what follows `.png` in every third path, accession numbers that two
patients share, ages in bins of five years, views that are not stated.
"""

from pathlib import Path
from typing import Any

from hilum.core.files import write_text
from hilum.core.seeding import derive, stream
from hilum.data.phantoms.cohort import PatientPlan
from hilum.data.phantoms.encoding import uid_of
from hilum.data.phantoms.layouts.chexpert import label_cells
from hilum.data.phantoms.layouts.jobs import ImageJob, Layout, MaskRow, StudyJob, csv_text, image_shape
from hilum.data.phantoms.render import patient_anatomy

TABLE = "master_spreadsheet_update.csv"
BRAX_LABELS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Lesion", "Lung Opacity", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
COLUMNS = (
    "", "DicomPath", "PngPath", "PatientID", "PatientSex", "PatientAge", "AccessionNumber", "StudyDate", *BRAX_LABELS,
    "ViewPosition", "Rows", "Columns", "Manufacturer",
)  # fmt: skip
TAILS = ("", "", "_a1.png")
"""What some copies of the table have after `.png`."""
VIEWS = {"PA": "PA", "AP": "AP", "LATERAL": "L", "LL": "LL"}


def _jobs(cohort: list[PatientPlan], seed: int, size: int) -> list[StudyJob]:
    jobs = []
    for patient in cohort:
        hexes = f"{derive(seed, 'brax', patient.number, 0):016x}{derive(seed, 'brax', patient.number, 1):016x}"
        subject = f"id_{hexes[:8]}-{hexes[8:12]}-{hexes[12:16]}-{hexes[16:20]}-{hexes[20:32]}"
        for study in patient.studies:
            name = f"{seed} {patient.number} {study.number}"
            home = f"images/{subject}/Study_{uid_of(f'study {name}')}/Series_{uid_of(f'series {name}')}"
            images = []
            for plan in study.images:
                path = f"{home}/image-{uid_of(f'image {name} {plan.number}')}.png"
                image_id = path.removeprefix("images/").removesuffix(".png")
                images.append(ImageJob(image_id, path, plan, image_shape(size, plan.aspect)))
            accession = str(1000 + patient.number // 2 * 10 + study.number)
            jobs.append(StudyJob(seed, patient, study, subject, accession, images))
    return jobs


def _tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    rows: list[list[Any]] = [list(COLUMNS)]
    for job in jobs:
        rng = stream(job.seed, "phantom", "brax", job.patient.number, job.study.number)
        cells = label_cells(job.study.findings, rng)
        anatomy = patient_anatomy(job.seed, job.patient.number)
        low = int(anatomy.age) // 5 * 5
        age = "85 or more" if low >= 85 else f"{low}-{low + 4}"
        date = f"{2010 + job.patient.number % 8}-{1 + job.study.number:02d}-01"
        for image in job.images:
            view = "" if image.plan.blank_view else VIEWS[image.plan.position]
            dicom = image.path.replace("images/", "Anonymized_DICOMs/", 1).removesuffix(".png") + ".dcm"
            listed = image.path + TAILS[len(rows) % len(TAILS)]
            rows.append([
                len(rows) - 1, dicom, listed, job.subject_id, "F" if anatomy.female else "M", age, job.study_id, date,
                *(cells[label] for label in BRAX_LABELS), view, *image.shape, job.patient.number % 3,
            ])  # fmt: skip
    write_text(folder / TABLE, csv_text(rows))


BRAX = Layout(_jobs, _tables, source="brax", own=("images", TABLE))
