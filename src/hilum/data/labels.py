"""Finding vocabularies: names, spelling and order as the releases have them.

Order is data, not convention: Task 2 has Normal before Nodule, Task 1 the reverse. Everything matches by name.
"""

import csv
import hashlib
from collections.abc import Iterable, Mapping
from importlib.resources import files

from hilum.core.errors import UnknownNameError

# CXR-LT 2024, `train_labeled.csv`, column order (bionlplab / PhysioNet cxr-lt-iccv-workshop-cvamd 2.0.0).
CXRLT_2024_TASK1: tuple[str, ...] = (
    "Adenopathy", "Atelectasis", "Azygos Lobe", "Calcification of the Aorta", "Cardiomegaly", "Clavicle Fracture",
    "Consolidation", "Edema", "Emphysema", "Enlarged Cardiomediastinum", "Fibrosis", "Fissure", "Fracture",
    "Granuloma", "Hernia", "Hydropneumothorax", "Infarction", "Infiltration", "Kyphosis", "Lobar Atelectasis",
    "Lung Lesion", "Lung Opacity", "Mass", "Nodule", "Normal", "Pleural Effusion", "Pleural Other",
    "Pleural Thickening", "Pneumomediastinum", "Pneumonia", "Pneumoperitoneum", "Pneumothorax",
    "Pulmonary Embolism", "Pulmonary Hypertension", "Rib Fracture", "Round(ed) Atelectasis",
    "Subcutaneous Emphysema", "Support Devices", "Tortuous Aorta", "Tuberculosis",
)  # fmt: skip

CXRLT_2024_TASK2: tuple[str, ...] = (
    "Atelectasis", "Calcification of the Aorta", "Cardiomegaly", "Consolidation", "Edema", "Emphysema",
    "Enlarged Cardiomediastinum", "Fibrosis", "Fracture", "Hernia", "Infiltration", "Lung Lesion", "Lung Opacity",
    "Mass", "Normal", "Nodule", "Pleural Effusion", "Pleural Other", "Pleural Thickening", "Pneumomediastinum",
    "Pneumonia", "Pneumoperitoneum", "Pneumothorax", "Subcutaneous Emphysema", "Support Devices", "Tortuous Aorta",
)  # fmt: skip

CXRLT_2024_TASK3: tuple[str, ...] = ("Bulla", "Cardiomyopathy", "Hilum", "Osteopenia", "Scoliosis")

# 2023 has "No Finding" in the slot where 2024 has "Normal"; the two do not mean the same.
CXRLT_2023: tuple[str, ...] = tuple("No Finding" if name == "Normal" else name for name in CXRLT_2024_TASK2)

# CXR-LT 2026, `CXRLT_2026_training.csv`, column order and spelling (arXiv:2602.22092; hieuphamha19/CXR_LT).
CXRLT_2026_TASK1: tuple[str, ...] = (
    "Normal", "aortic elongation", "cardiomegaly", "pleural effusion", "Nodule", "atelectasis", "pleural thickening",
    "aortic atheromatosis", "Support Devices", "alveolar pattern", "fracture", "Hernia", "Emphysema", "azygos lobe",
    "Hydropneumothorax", "Kyphosis", "Mass", "Pneumothorax", "Subcutaneous Emphysema", "pneumoperitoneo",
    "vascular hilar enlargement", "vertebral degenerative changes", "hyperinflated lung", "interstitial pattern",
    "central venous catheter", "hypoexpansion", "bronchiectasis", "hemidiaphragm elevation", "sternotomy",
    "calcified densities",
)  # fmt: skip

# CXR-LT 2026, `Eval_Class_Task2.txt`: classes that no training image is labelled with.
CXRLT_2026_TASK2: tuple[str, ...] = ("Scoliosis", "Osteopenia", "Bulla", "Infarction", "Adenopathy", "goiter")

TASKS: dict[str, tuple[str, ...]] = {
    "cxrlt2023": CXRLT_2023,
    "cxrlt2024-task1": CXRLT_2024_TASK1,
    "cxrlt2024-task2": CXRLT_2024_TASK2,
    "cxrlt2024-task3": CXRLT_2024_TASK3,
    "cxrlt2026-task1": CXRLT_2026_TASK1,
    "cxrlt2026-task2": CXRLT_2026_TASK2,
}
"""Challenge task -> its classes, spelled and ordered as in its sample submission."""

ID_COLUMNS: dict[str, str] = {task: "ImageID" if task.startswith("cxrlt2026") else "dicom_id" for task in TASKS}
"""Challenge task -> the first column of its submission."""

SAME_FINDING: dict[str, str] = {
    "aortic elongation": "Tortuous Aorta",
    "aortic atheromatosis": "Calcification of the Aorta",
    "pneumoperitoneo": "Pneumoperitoneum",
}
"""Class of a challenge -> the finding that means the same under another word (facts/labels/cxrlt2026.csv)."""

NIH_FINDINGS: tuple[str, ...] = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Hernia", "Infiltration", "Mass",
    "Nodule", "Normal", "Pleural Effusion", "Pleural Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip

# Ways to name a fixed list of findings on the command line (`--findings`).
FINDING_SETS: dict[str, tuple[str, ...]] = {
    **{task: classes for task, classes in TASKS.items() if not task.startswith("cxrlt2026")},  # other words
    "nih": NIH_FINDINGS,
}


def _hierarchy() -> dict[str, tuple[str, ...]]:
    text = (files("hilum.data") / "facts" / "labels" / "hierarchy.csv").read_text(encoding="utf-8")
    parents: dict[str, tuple[str, ...]] = {}
    for row in csv.DictReader(text.splitlines()):
        parents[row["child"]] = (*parents.get(row["child"], ()), row["parent"])
    return parents


IMPLIES: dict[str, tuple[str, ...]] = _hierarchy()
"""Child -> parents: a positive child implies positive parents. Explicit, because text-mined labels break it."""
NORMAL_NAMES: tuple[str, ...] = ("Normal", "No Finding")
COMPATIBLE_WITH_NORMAL = frozenset({"Normal", "No Finding", "Support Devices"})
"""Findings that may be positive beside Normal: a pacemaker in a healthy chest."""

HEAD_SHARE, TAIL_SHARE = 0.10, 0.01


def ordered(findings: Iterable[str]) -> tuple[str, ...]:
    """Findings without repeats: those of CXR-LT 2024 task 1 in its column order, then the others alphabetically."""
    unique = set(findings)
    return (*(name for name in CXRLT_2024_TASK1 if name in unique), *sorted(unique - set(CXRLT_2024_TASK1)))


def canonical(name: str) -> str:
    """The release's spelling of a finding, matched without regard to case; an unknown name comes back stripped."""
    return _SPELLING.get(name.strip().casefold(), name.strip())


def task_findings(task: str, have: Iterable[str]) -> dict[str, str]:
    """Which of the findings at hand answers each class of a challenge task.

    A class is answered by the finding of exactly its name, else by the finding that it is another word or spelling for
    (`SAME_FINDING`, or the same letters in other case). 2023's No Finding is not 2024's Normal.

    Args:
        task: a name in TASKS.
        have: findings of a model, a prediction file or labels.

    Returns:
        class -> finding, in the task's order; a class that nothing answers is absent.

    Raises:
        UnknownNameError: no such task.
    """
    if task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    names = set(have)
    answers = {name: (name, SAME_FINDING.get(name, ""), canonical(name)) for name in TASKS[task]}
    found = {name: next((one for one in known if one in names), None) for name, known in answers.items()}
    return {name: one for name, one in found.items() if one is not None}


def findings_hash(findings: Iterable[str]) -> str:
    """Hex SHA-256 of names and order. Two files with the same hash have the same columns in the same places."""
    return hashlib.sha256("\x1f".join(findings).encode()).hexdigest()


def frequency_groups(positives: Mapping[str, int], total: int) -> dict[str, str]:
    """Head, medium or tail for each finding, by its share of training images.

    Args:
        positives: positive training images of each finding.
        total: training images.

    Returns:
        "head" above 10 %, "medium" from 1 to 10 %, "tail" below 1 %. With no training images everything is "tail".
    """
    shares = {name: count / total if total else 0.0 for name, count in positives.items()}
    return {
        name: "head" if share > HEAD_SHARE else "tail" if share < TAIL_SHARE else "medium"
        for name, share in shares.items()
    }


_SPELLING: dict[str, str] = {name.casefold(): name for name in (*CXRLT_2024_TASK1, *CXRLT_2024_TASK3, "No Finding")}
