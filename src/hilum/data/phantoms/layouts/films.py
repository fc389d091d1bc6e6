"""Shenzhen and Montgomery: one film a patient and a short text beside it; the one in colour PNG, the other grey."""

from pathlib import Path

from hilum.core.files import write_text
from hilum.data.phantoms.cohort import PatientPlan
from hilum.data.phantoms.layouts.jobs import (
    ImageJob,
    Layout,
    MaskRow,
    StudyJob,
    check_room,
    image_shape,
    one_frontal,
)
from hilum.data.phantoms.render import patient_anatomy

SICK = "Tuberculosis"
SPELLINGS = ("{sex} {age}yrs", "{sex} {age}yr", "{Sex}, {age}yrs")
"""Shenzhen's first lines are not all alike."""


def _jobs(cohort: list[PatientPlan], seed: int, size: int, prefix: str, form: str) -> list[StudyJob]:
    check_room(cohort, 9_999, prefix)
    jobs = []
    for patient in cohort:
        chosen = one_frontal(patient)
        if chosen is not None:
            study, plan = chosen
            name = f"{prefix}_{patient.number + 1:04d}_{int(SICK in study.findings)}"
            image = ImageJob(name, f"CXR_png/{name}.png", plan, image_shape(size, plan.aspect), form)
            jobs.append(StudyJob(seed, patient, study, name, "0", [image]))
    return jobs


def _shenzhen_jobs(cohort: list[PatientPlan], seed: int, size: int) -> list[StudyJob]:
    return _jobs(cohort, seed, size, "CHNCXR", "png_rgb")


def _montgomery_jobs(cohort: list[PatientPlan], seed: int, size: int) -> list[StudyJob]:
    return _jobs(cohort, seed, size, "MCUCXR", "png")


def _shenzhen_texts(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    for number, job in enumerate(jobs):
        anatomy = patient_anatomy(job.seed, job.patient.number)
        sex = "female" if anatomy.female else "male"
        first = SPELLINGS[number % 3].format(sex=sex, Sex=sex.title(), age=round(anatomy.age))
        write_text(folder / "ClinicalReadings" / f"{job.subject_id}.txt", f"{first}\n{_reading(job)}\n")


def _montgomery_texts(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    for job in jobs:
        anatomy = patient_anatomy(job.seed, job.patient.number)
        lines = (f"Patient's Sex: {'F' if anatomy.female else 'M'} ", f"Patient's Age: {round(anatomy.age):03d}Y",
                 _reading(job))  # fmt: skip
        write_text(folder / "ClinicalReadings" / f"{job.subject_id}.txt", "\r\n".join(lines) + "\r\n")


def _reading(job: StudyJob) -> str:
    return ", ".join(sorted(job.study.findings)).lower()


OWN = ("CXR_png", "ClinicalReadings")
SHENZHEN = Layout(_shenzhen_jobs, _shenzhen_texts, source="shenzhen", own=OWN)
MONTGOMERY = Layout(_montgomery_jobs, _montgomery_texts, source="montgomery", own=OWN)
