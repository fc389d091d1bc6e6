"""PadChest: 16-bit PNGs in numbered folders and the one table, with its quirks.

Of the quirks: ids of 38 digits, "15" beside "15.0", spaces and empty texts in the lists of labels, studies without
labels ("[]" and nothing), "normal" for a sentence of a report about a diseased chest, views told by a classifier.
"""

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
    image_shape,
    names_of,
)
from hilum.data.phantoms.render import patient_anatomy

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
COLUMNS = (
    "", "ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth", "PatientSex_DICOM",
    "ViewPosition_DICOM", "Projection", "MethodProjection", "Pediatric", "Modality_DICOM", "Manufacturer_DICOM",
    "PhotometricInterpretation_DICOM", "PixelRepresentation_DICOM", "PixelAspectRatio_DICOM",
    "SpatialResolution_DICOM", "BitsStored_DICOM", "WindowCenter_DICOM", "WindowWidth_DICOM", "Rows_DICOM",
    "Columns_DICOM", "XRayTubeCurrent_DICOM", "Exposure_DICOM", "ExposureInuAs_DICOM", "ExposureTime",
    "RelativeXRayExposure_DICOM", "ReportID", "Report", "MethodLabel", "Labels", "Localizations",
    "LabelsLocalizationsBySentence", "labelCUIS", "LocalizationsCUIS",
)  # fmt: skip
FOLDERS = 55
STATED = {"PA": "POSTEROANTERIOR", "AP": "ANTEROPOSTERIOR", "LATERAL": "LATERAL", "LL": "LATERAL"}
SAYS_NOTHING = "bronchovascular markings"
"""Where a chest has findings, and none that the source could name."""
EMPTY_CELLS = {3: "", 5: "[]"}
"""Of every 40 studies, those whose labels are not there."""


def _jobs(cohort: list[PatientPlan], seed: int, size: int) -> list[StudyJob]:
    jobs = []
    for patient in cohort:
        subject = _digits(seed, "patient", patient.number)
        for study in patient.studies:
            study_id = _digits(seed, "study", 100 * patient.number + study.number)
            folder = derive(seed, "folder", patient.number, study.number) % FOLDERS
            images = []
            for plan in study.images:
                name = f"{study_id}_{derive(seed, 'image', patient.number, study.number, plan.number) % 36**4:06x}.png"
                images.append(ImageJob(name, f"{folder}/{name}", plan, image_shape(size, plan.aspect), "png16"))
            jobs.append(StudyJob(seed, patient, study, subject, study_id, images))
    return jobs


def _digits(seed: int, kind: str, number: int) -> str:
    """38 digits, the first not 0."""
    return "".join(str(derive(seed, kind, number, part)).zfill(20) for part in range(2))[-37:].rjust(38, "1")


def _tables(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    rows: list[list[Any]] = [list(COLUMNS)]
    for number, job in enumerate(jobs):
        rng = stream(job.seed, "phantom", "padchest", job.patient.number)
        year, anatomy = 2009 + int(rng.integers(8)), patient_anatomy(job.seed, job.patient.number)
        date = f"{year}{1 + job.study.number:02d}{int(rng.integers(1, 28)):02d}"
        method = "Physician" if derive(job.seed, "method", job.patient.number) % 100 < 27 else "RNN_model"
        labels = names_of(job.study.findings, load_map("padchest"), number) or [SAYS_NOTHING]
        for image in job.images:
            bedside = image.plan.position == "AP" and image.plan.blank_code
            projection = {"LATERAL": "L", "LL": "L", "AP": "AP_horizontal" if bedside else "AP"}
            guessed = image.plan.blank_view
            height, width = image.shape
            parent = image.path.split("/")[0]
            rows.append([
                len(rows) - 1, image.image_id, parent if len(rows) % 2 else f"{parent}.0", date, job.study_id,
                job.subject_id, f"{year - round(anatomy.age)}.0", "F" if anatomy.female else "M",
                "" if guessed else STATED[image.plan.position], projection.get(image.plan.position, "PA"),
                "resnet-50.t7" if guessed else "Manual review of DICOM fields", "No", "DX", "Hilum", "MONOCHROME2", 0,
                "", 0.143, 12, 2047.0, 4095.0, height, width, "", "", "", "", "", 1_000_000 + number, "sintetico",
                method, _cell(labels, number), "['loc basal']", [["normal"], [*labels, "loc basal"]],
                "['C0000000' 'C0000001']", "[]",
            ])  # fmt: skip
    write_text(folder / TABLE, csv_text(rows))


def _cell(labels: list[str], number: int) -> str:
    """A list of labels as the table writes it."""
    if number % 40 in EMPTY_CELLS:
        return EMPTY_CELLS[number % 40]
    return str([*(f"{label} " if number % 3 == 0 else label for label in labels), *([""] if number % 4 == 0 else [])])


PADCHEST = Layout(_jobs, _tables, source="padchest", own=(*map(str, range(FOLDERS)), TABLE))
