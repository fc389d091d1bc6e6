"""CXR-LT 2026: a table of 30 columns on PadChest's images, and test images of NIH without labels.

Of the quirks: patient ids that a spreadsheet rounded, and images that the organisers took back.
"""

from pathlib import Path
from typing import Any

from hilum.core.files import write_text
from hilum.core.seeding import derive
from hilum.data.label_maps import load_map
from hilum.data.labels import CXRLT_2026_TASK1
from hilum.data.phantoms.cohort import PatientPlan
from hilum.data.phantoms.layouts.jobs import ImageJob, Layout, MaskRow, StudyJob, csv_text, image_shape
from hilum.data.phantoms.layouts.padchest import names_of

TABLE, TEST, REMOVED = "CXRLT_2026_training.csv", "CXRLT_2026_TEST_ALL_TASK1.csv", "Removal.csv"


def _jobs(cohort: list[PatientPlan], seed: int, size: int) -> list[StudyJob]:
    jobs = []
    for patient in cohort:
        held_out = patient.split == "test"
        follow_up = 0
        for study in patient.studies:
            images = []
            for plan in study.images:
                if held_out and plan.position not in ("PA", "AP"):  # test images are frontal
                    continue
                digits = f"{derive(seed, 'cxrlt2026', patient.number, study.number, plan.number):038d}"
                name = f"{patient.number + 1:08d}_{follow_up:03d}.png" if held_out else f"1{digits[1:]}_00-000-001.png"
                form = "png" if held_out else "png16"
                images.append(ImageJob(name, f"images/{name}", plan, image_shape(size, plan.aspect), form))
                follow_up += 1
            jobs.append(StudyJob(seed, patient, study, str(patient.number), str(study.number), images))
    return jobs


def _tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    rows: list[list[Any]] = [["ImageID", "StudyDate_DICOM", "PatientID", *CXRLT_2026_TASK1]]
    test: list[list[Any]] = [["ImageID"]]
    for number, job in enumerate(jobs):
        if job.patient.split == "test":
            test += [[image.image_id] for image in job.images]
            continue
        present = set(names_of(job.study.findings, load_map("cxrlt2026"), number))
        rounded = f"{1 + job.patient.number % 9}.{job.patient.number % 100:02d}E+37"
        cells = [int(label in present) for label in CXRLT_2026_TASK1]
        rows += [[image.image_id, 20140101 + job.study.number, rounded, *cells] for image in job.images]
    write_text(folder / TABLE, csv_text(rows))
    write_text(folder / REMOVED, csv_text([["ImageID"], *(row[:1] for row in rows[1:2])]))
    if test[1:]:
        write_text(folder / TEST, csv_text(test))


CXRLT_OF_2026 = Layout(_jobs, _tables, source="cxrlt2026", own=("images", TABLE, TEST, REMOVED))
