"""JSRT: films of 2048 x 2048 words without a header, whatever size is asked for, and its two texts."""

from pathlib import Path

from hilum.core.files import write_text
from hilum.data.phantoms.cohort import PatientPlan
from hilum.data.phantoms.layouts.jobs import ImageJob, Layout, MaskRow, StudyJob, check_room, one_frontal
from hilum.data.phantoms.render import patient_anatomy

SIDE = 2048
FOLDERS = {"JPCLN": "Nodule154images", "JPCNN": "NonNodule93images"}


def _jobs(cohort: list[PatientPlan], seed: int, size: int) -> list[StudyJob]:
    check_room(cohort, 999, "jsrt")
    jobs, counts = [], dict.fromkeys(FOLDERS, 0)
    for patient in cohort:
        chosen = one_frontal(patient)
        if chosen is not None:
            study, plan = chosen
            prefix = "JPCLN" if "Nodule" in study.findings else "JPCNN"
            counts[prefix] += 1
            name = f"{prefix}{counts[prefix]:03d}"
            image = ImageJob(name, f"{FOLDERS[prefix]}/{name}.IMG", plan, (SIDE, SIDE), "raw12_inverted")
            jobs.append(StudyJob(seed, patient, study, name, "0", [image]))
    return jobs


def _texts(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    boxes = {mask.image_id: mask.box for mask in masks if mask.finding == "Nodule"}
    with_nodule, without = [], []
    for job in jobs:
        anatomy = patient_anatomy(job.seed, job.patient.number)
        name, sex = f"{job.subject_id}.IMG", "female" if anatomy.female else "male"
        if "Nodule" in job.study.findings:
            x, y, width, height = boxes.get(job.subject_id, (SIDE // 2, SIDE // 2, 2, 2))
            words = (name, 3, 15, round(anatomy.age), sex, x + width // 2, y + height // 2, "benign", "", "", "",
                     "r.upper lobe", "granuloma")  # fmt: skip
            with_nodule.append("\t".join(map(str, words)))
        else:
            without.append(f"{name}    {round(anatomy.age)}   {sex}   non-nodule")
    information = folder / "Clinical_Information"
    for file, lines in (("CLNDAT_EN.txt", with_nodule), ("CNNDAT_EN.TXT", without)):
        if lines:
            write_text(information / file, "\r\n".join(lines) + "\r\n")


JSRT = Layout(_jobs, _texts, source="jsrt", own=(*FOLDERS.values(), "Clinical_Information"))
