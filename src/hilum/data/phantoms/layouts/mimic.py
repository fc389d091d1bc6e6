"""MIMIC-CXR-JPG 2.1.0 with its tables, and MIMIC-CXR as DICOM with its lists of paths.

Of the quirks: packed tables that keep the name of release 2.0.0, studies without labels, views that only the procedure
names, "Performed Desc", "validate", radiologists' labels of some test studies under a header of their own.
"""

import gzip
from functools import partial
from pathlib import Path
from typing import Any

from hilum.core.files import write_bytes, write_text
from hilum.core.seeding import derive, stream
from hilum.data.phantoms.cohort import PatientPlan
from hilum.data.phantoms.layouts.chexpert import CHEXPERT_LABELS, label_cells
from hilum.data.phantoms.layouts.jobs import (
    ImageJob,
    Layout,
    MaskRow,
    StudyJob,
    csv_text,
    image_shape,
    scattered_number,
)
from hilum.data.phantoms.render import patient_anatomy

METADATA_COLUMNS = (
    "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
    "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
)  # fmt: skip
VIEW_CODES = {"AP": "antero-posterior", "PA": "postero-anterior", "LATERAL": "lateral", "LL": "left lateral"}
ALPHABETICAL = tuple(sorted(CHEXPERT_LABELS))
"""MIMIC-CXR-JPG orders the labels of CheXpert by name."""
TEST_COLUMNS = (
    "study_id", "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Airspace Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
PATIENT_COLUMNS = ("subject_id", "gender", "anchor_age", "anchor_year", "anchor_year_group", "dod")
SPLIT_WORDS = {"train": "train", "val": "validate", "test": "test"}
UNLABELLED = 10
"""Every so many-th study has no labels."""
DICOM_FORMS = ("dicom", "dicom_monochrome1", "dicom", "dicom_no_window", "dicom_no_syntax")


def mimic_jobs(
    cohort: list[PatientPlan], seed: int, size: int, *, suffix: str = ".jpg", forms: tuple[str, ...] = ("",)
) -> list[StudyJob]:
    """Ids and paths of MIMIC-CXR: `files/p10/p10000001/s50000001/<dicom_id>.jpg`."""
    jobs, count = [], 0
    for patient in cohort:
        subject = str(scattered_number(seed, "subject", patient.number, 10_000_000))
        for study in patient.studies:
            study_id = str(scattered_number(seed, "study", 4 * patient.number + study.number, 50_000_000))
            images = []
            for plan in study.images:
                words = [
                    f"{derive(seed, 'dicom', patient.number, study.number, plan.number, k):016x}"[-8:] for k in range(5)
                ]
                dicom = "-".join(words)
                path = f"files/p{subject[:2]}/p{subject}/s{study_id}/{dicom}{suffix}"
                images.append(ImageJob(dicom, path, plan, image_shape(size, plan.aspect), forms[count % len(forms)]))
                count += 1
            jobs.append(StudyJob(seed, patient, study, subject, study_id, images))
    return jobs


def write_metadata(folder: Path, jobs: list[StudyJob]) -> None:
    """`mimic-cxr-2.0.0-metadata.csv.gz`."""
    rows: list[list[Any]] = [list(METADATA_COLUMNS)]
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
    write_packed(folder / "mimic-cxr-2.0.0-metadata.csv.gz", rows)


def write_packed(path: Path, rows: list[list[Any]]) -> None:
    """A packed table, without name and time in the header of gzip: same rows, same bytes."""
    write_bytes(path, gzip.compress(csv_text(rows).encode(), 6, mtime=0))


def _tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    write_metadata(folder, jobs)
    splits: list[list[Any]] = [["dicom_id", "study_id", "subject_id", "split"]]
    labels: list[list[Any]] = [["subject_id", "study_id", *ALPHABETICAL]]
    gold: list[list[Any]] = [list(TEST_COLUMNS)]
    people: dict[str, list[Any]] = {}
    for number, job in enumerate(jobs):
        word, anatomy = SPLIT_WORDS[job.patient.split], patient_anatomy(job.seed, job.patient.number)
        splits += [[image.image_id, job.study_id, job.subject_id, word] for image in job.images]
        rng = stream(job.seed, "phantom", "mimic", job.patient.number, job.study.number)
        cells = label_cells(job.study.findings, rng)
        if number % UNLABELLED != UNLABELLED - 1:
            labels.append([job.subject_id, job.study_id, *(cells[label] for label in ALPHABETICAL)])
        if word == "test" and number % 2:
            read_by_people = label_cells(job.study.findings, rng, closed=True)
            read_by_people["Airspace Opacity"] = read_by_people["Lung Opacity"]
            gold.append([job.study_id, *(read_by_people[label] for label in TEST_COLUMNS[1:])])
        people[job.subject_id] = [
            job.subject_id, "F" if anatomy.female else "M", round(anatomy.age), 2150, "2011 - 2013", "",
        ]  # fmt: skip
    write_packed(folder / "mimic-cxr-2.0.0-split.csv.gz", splits)
    write_packed(folder / "mimic-cxr-2.0.0-chexpert.csv.gz", labels)
    write_packed(folder / "mimic-cxr-2.0.0-negbio.csv.gz", labels)
    if gold[1:]:
        write_text(folder / "mimic-cxr-2.1.0-test-set-labeled.csv", csv_text(gold))
    write_packed(folder / "patients.csv.gz", [list(PATIENT_COLUMNS), *people.values()])


def _dicom_tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    records: list[list[Any]] = [["subject_id", "study_id", "dicom_id", "path"]]
    studies: list[list[Any]] = [["subject_id", "study_id", "path"]]
    for job in jobs:
        records += [[job.subject_id, job.study_id, image.image_id, image.path] for image in job.images]
        studies.append([job.subject_id, job.study_id, f"{job.images[0].path.rpartition('/')[0]}.txt"])
    write_packed(folder / "cxr-record-list.csv.gz", records)
    write_packed(folder / "cxr-study-list.csv.gz", studies)


_NAMES = ("metadata.csv.gz", "split.csv.gz", "chexpert.csv.gz", "negbio.csv.gz")
MIMIC = Layout(
    mimic_jobs,
    _tables,
    source="mimic",
    own=(
        "files", *(f"mimic-cxr-2.0.0-{name}" for name in _NAMES), "mimic-cxr-2.1.0-test-set-labeled.csv",
        "patients.csv.gz",
    ),
)  # fmt: skip
MIMIC_DICOM = Layout(
    partial(mimic_jobs, suffix=".dcm", forms=DICOM_FORMS),
    _dicom_tables,
    source="mimic",
    own=("files", "cxr-record-list.csv.gz", "cxr-study-list.csv.gz"),
)
