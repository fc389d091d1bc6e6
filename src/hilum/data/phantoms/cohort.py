"""Who has what: patients, their studies, images and findings, drawn from published frequencies.

Every number below is fixed here, with its source, before any model is compared on phantoms. Findings follow a liability
model: a finding is present when a normal variable passes its threshold; a few latent conditions (heart failure,
intensive care, infection, ...) shared by findings make them occur together, and a part that stays with the patient makes
a patient's studies alike. Thresholds are set so that each finding's frequency is the published one.
Patient i depends on the seed and on i alone, except for the top-up of rare findings and the split.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import NormalDist

import numpy as np

from hilum.core.seeding import derive, stream
from hilum.data.labels import CXRLT_2024_TASK1
from hilum.data.phantoms.signs import CHILDREN

# CXR-LT 2024 train_labeled.csv: positives among 258,871 images (released class counts).
TRAIN_IMAGES = 258_871
TRAIN_POSITIVES: dict[str, int] = {
    "Support Devices": 86079, "Lung Opacity": 77482, "Cardiomegaly": 74738, "Pleural Effusion": 66401,
    "Atelectasis": 65376, "Pneumonia": 46660, "Edema": 37256, "Normal": 34292, "Enlarged Cardiomediastinum": 29628,
    "Consolidation": 15371, "Pneumothorax": 13858, "Fracture": 11568, "Infiltration": 10087, "Rib Fracture": 8919,
    "Nodule": 7531, "Mass": 5288, "Calcification of the Aorta": 4239, "Hernia": 3986, "Emphysema": 3661,
    "Adenopathy": 3409, "Tortuous Aorta": 3336, "Pleural Thickening": 3272, "Granuloma": 2965, "Fissure": 2803,
    "Lung Lesion": 2338, "Tuberculosis": 2078, "Subcutaneous Emphysema": 2046, "Pulmonary Embolism": 1631,
    "Fibrosis": 1169, "Pulmonary Hypertension": 903, "Kyphosis": 778, "Infarction": 727, "Pneumomediastinum": 704,
    "Hydropneumothorax": 646, "Pleural Other": 616, "Pneumoperitoneum": 516, "Azygos Lobe": 199,
    "Round(ed) Atelectasis": 172, "Clavicle Fracture": 168, "Lobar Atelectasis": 129,
}  # fmt: skip

# Studies by number of images in the same training set (5 and more counted as 4).
IMAGES_PER_STUDY = {1: 69_478, 2: 71_298, 3: 13_529, 4: 1_518}
# The set has 3.4 studies a patient with a very long tail; phantoms keep 1 to 3, so that patients stay many.
STUDIES_PER_PATIENT = {1: 0.62, 2: 0.26, 3: 0.12}
# Views for each number of images, bedside (AP) first, as shares; together they give the published mix
# AP 100,024, PA 66,470, LATERAL 57,546, LL 24,080 of 248,120 stated views.
VIEW_SETS: dict[int, list[tuple[float, tuple[str, ...]]]] = {
    1: [(0.90, ("AP",)), (0.10, ("PA",))],
    2: [(0.15, ("AP", "AP")), (0.22, ("AP", "side")), (0.60, ("PA", "side")), (0.03, ("PA", "PA"))],
    3: [(0.20, ("AP", "AP", "side")), (0.12, ("AP", "side", "side")), (0.38, ("PA", "side", "side")),
        (0.30, ("PA", "PA", "side"))],
    4: [(0.30, ("AP", "AP", "side", "side")), (0.70, ("PA", "PA", "side", "side"))],
}  # fmt: skip
LL_SHARE = 24_080 / (57_546 + 24_080)
BLANK_VIEW = 10_734 / 258_871
BLANK_VIEW_CODE = (11_222 - 10_734) / 258_871  # code missing though the view is stated
SPLIT_SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}  # CXR-LT 2024: by patient, 70 / 10 / 20
MINIMUM_PATIENTS = 8
SEVERITY = (1.5, 1.3)  # Beta: from hardly visible to obvious
SEVERITY_DRIFT = 0.12  # deviation between studies of one patient

# Latent conditions: share of the variance that stays with the patient.
CONDITIONS: dict[str, float] = {
    "heart failure": 0.7, "intensive care": 0.25, "infection": 0.2, "trauma": 0.4, "obstructive": 0.95,
    "tumour": 0.85, "old age": 1.0, "embolism": 0.3, "old tuberculosis": 0.95, "air leak": 0.3,
}  # fmt: skip
# Loadings: signs and order of magnitude from clinical association; their squares add up to less than 1 for each finding.
LOADINGS: dict[str, dict[str, float]] = {
    "Support Devices": {"intensive care": 0.75, "heart failure": 0.2},
    "Lung Opacity": {"infection": 0.5, "intensive care": 0.3},
    "Cardiomegaly": {"heart failure": 0.7, "old age": 0.15},
    "Pleural Effusion": {"heart failure": 0.45, "intensive care": 0.35, "tumour": 0.15},
    "Atelectasis": {"intensive care": 0.5},
    "Pneumonia": {"infection": 0.7, "intensive care": 0.15},
    "Edema": {"heart failure": 0.65, "intensive care": 0.3},
    "Enlarged Cardiomediastinum": {"heart failure": 0.4, "old age": 0.25, "trauma": 0.15},
    "Consolidation": {"infection": 0.6, "intensive care": 0.25},
    "Pneumothorax": {"air leak": 0.6, "trauma": 0.35},
    "Fracture": {"trauma": 0.7, "old age": 0.2},
    "Rib Fracture": {"trauma": 0.75, "old age": 0.15},
    "Clavicle Fracture": {"trauma": 0.75},
    "Infiltration": {"infection": 0.5},
    "Nodule": {"tumour": 0.55, "old tuberculosis": 0.2},
    "Mass": {"tumour": 0.65},
    "Lung Lesion": {"tumour": 0.6},
    "Adenopathy": {"tumour": 0.5},
    "Calcification of the Aorta": {"old age": 0.75},
    "Tortuous Aorta": {"old age": 0.7},
    "Hernia": {"old age": 0.45},
    "Kyphosis": {"old age": 0.55, "obstructive": 0.2},
    "Emphysema": {"obstructive": 0.75},
    "Pulmonary Hypertension": {"obstructive": 0.35, "heart failure": 0.35, "embolism": 0.2},
    "Pleural Thickening": {"old tuberculosis": 0.35, "tumour": 0.2},
    "Pleural Other": {"old tuberculosis": 0.25},
    "Granuloma": {"old tuberculosis": 0.55},
    "Tuberculosis": {"old tuberculosis": 0.5, "infection": 0.25},
    "Fissure": {"heart failure": 0.35},
    "Fibrosis": {"old age": 0.25, "obstructive": 0.15},
    "Subcutaneous Emphysema": {"air leak": 0.75, "trauma": 0.3},
    "Pneumomediastinum": {"air leak": 0.75},
    "Pneumoperitoneum": {"air leak": 0.2, "intensive care": 0.3},
    "Hydropneumothorax": {"air leak": 0.55, "intensive care": 0.2},
    "Pulmonary Embolism": {"embolism": 0.7},
    "Infarction": {"embolism": 0.65},
    "Azygos Lobe": {},
    "Round(ed) Atelectasis": {"old tuberculosis": 0.2, "heart failure": 0.15},
    "Lobar Atelectasis": {"tumour": 0.3, "intensive care": 0.25},
}
# Share of a finding's own (not condition's) variance that stays with the patient: anatomy stays, infection goes.
LASTING: dict[str, float] = {
    "Azygos Lobe": 1.0, "Kyphosis": 0.97, "Calcification of the Aorta": 0.97, "Tortuous Aorta": 0.95, "Hernia": 0.95,
    "Granuloma": 0.97, "Emphysema": 0.95, "Fibrosis": 0.95, "Pleural Thickening": 0.9, "Pleural Other": 0.95,
    "Cardiomegaly": 0.9, "Pulmonary Hypertension": 0.9, "Round(ed) Atelectasis": 0.9, "Nodule": 0.8, "Mass": 0.85,
    "Lung Lesion": 0.8, "Adenopathy": 0.8, "Fracture": 0.8, "Rib Fracture": 0.8, "Clavicle Fracture": 0.8,
    "Tuberculosis": 0.85, "Enlarged Cardiomediastinum": 0.8,
}  # fmt: skip
LASTING_OTHERWISE = 0.45
LASTING_NORMAL = 0.6

FINDINGS: tuple[str, ...] = tuple(name for name in CXRLT_2024_TASK1 if name != "Normal")
_SIMULATED = 20_000


@dataclass
class ImagePlan:
    """One image to be made."""

    number: int
    position: str
    blank_view: bool
    blank_code: bool
    aspect: float
    """Width over height."""


@dataclass
class StudyPlan:
    """One study: its findings with their severities ("Normal" when there is none), and its images."""

    number: int
    findings: dict[str, float]
    images: list[ImagePlan]
    margins: np.ndarray = field(repr=False, default_factory=lambda: np.zeros(0))
    """Liability minus threshold for each of FINDINGS: how near each finding was."""

    def labels(self) -> dict[str, int]:
        """0 or 1 for each of the 40 findings."""
        return {name: int(name in self.findings) for name in CXRLT_2024_TASK1}


@dataclass
class PatientPlan:
    """One patient."""

    number: int
    studies: list[StudyPlan]
    split: str = "train"

    def findings(self) -> set[str]:
        """Findings of any study."""
        return set().union(*(study.findings for study in self.studies))


def plan_cohort(patients: int, seed: int, minimum_patients: int = MINIMUM_PATIENTS) -> list[PatientPlan]:
    """Draw a cohort.

    Args:
        patients: how many.
        seed: same seed, same cohort.
        minimum_patients: each finding is given to at least so many patients (never more than a tenth of them), to those
            who were nearest to having it; 0 leaves the published prevalence as it is.
    """
    cohort = [plan_patient(seed, number) for number in range(patients)]
    top_up(cohort, seed, min(minimum_patients, patients // 10))
    assign_splits(cohort, seed)
    return cohort


def plan_patient(seed: int, number: int) -> PatientPlan:
    """Draw one patient, before the top-up and the split."""
    rng = stream(seed, "phantom", "cohort", number)
    lasting = _normals(rng, 1)
    count = int(rng.choice(list(STUDIES_PER_PATIENT), p=list(STUDIES_PER_PATIENT.values())))
    studies = []
    for study in range(count):
        present, margins, bedside = _liabilities(lasting, _normals(rng, 1))
        chosen = [name for name, yes in zip(FINDINGS, present[0], strict=True) if yes] or ["Normal"]
        studies.append(StudyPlan(study, dict.fromkeys(chosen, 0.0), _plan_images(rng, float(bedside[0])), margins[0]))
    plan = PatientPlan(number, studies)
    for planned in plan.studies:
        planned.findings = {name: severity(seed, number, planned.number, name) for name in planned.findings}
    return plan


def severity(seed: int, patient: int, study: int, finding: str) -> float:
    """How plain a finding is (0 to 1): the patient's own, with a little drift from study to study."""
    own = stream(seed, "phantom", "severity", patient, finding).beta(*SEVERITY)
    drift = stream(seed, "phantom", "severity", patient, finding, study).normal(0, SEVERITY_DRIFT)
    return float(np.clip(own + drift, 0.0, 1.0))


def _normals(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normal variables for the conditions, the findings and health."""
    return rng.standard_normal((count, len(CONDITIONS))), rng.standard_normal((count, len(FINDINGS))), rng.standard_normal(count)


def _liabilities(
    patient: tuple[np.ndarray, ...], study: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Present findings (N, 39), margins (N, 39) and the liability to bedside images (N,)."""
    normal, liability, bedside = _latent(patient, study)
    return *_decide(normal, liability, _thresholds()), bedside


def _latent(
    patient: tuple[np.ndarray, ...], study: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    stays = np.array(list(CONDITIONS.values()))
    conditions = np.sqrt(stays) * patient[0] + np.sqrt(1 - stays) * study[0]
    loadings = _loading_matrix()
    lasting = np.array([LASTING.get(name, LASTING_OTHERWISE) for name in FINDINGS])
    own = np.sqrt(lasting) * patient[1] + np.sqrt(1 - lasting) * study[1]
    liability = conditions @ loadings.T + np.sqrt(1 - (loadings**2).sum(1)) * own
    health = np.sqrt(LASTING_NORMAL) * patient[2] + np.sqrt(1 - LASTING_NORMAL) * study[2]
    normal = health > NormalDist().inv_cdf(1 - prevalence("Normal"))
    bedside = 0.7 * conditions[:, list(CONDITIONS).index("intensive care")] + np.sqrt(1 - 0.7**2) * study[2]
    return normal, liability, bedside


def _decide(normal: np.ndarray, liability: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Findings and margins; a study that is not normal has at least the finding it is nearest to; parents are implied."""
    margins = liability - thresholds
    present = margins > 0
    nearest = margins.argmax(1)
    empty = ~present.any(1)
    present[empty, nearest[empty]] = True
    for parent, children in CHILDREN.items():
        columns = [FINDINGS.index(child) for child in children]
        present[:, FINDINGS.index(parent)] |= present[:, columns].any(1)
    present[normal] = False
    return present, margins


@cache
def _loading_matrix() -> np.ndarray:
    return np.array([[LOADINGS[name].get(condition, 0.0) for condition in CONDITIONS] for name in FINDINGS])


def prevalence(finding: str) -> float:
    """Published share of training images."""
    return TRAIN_POSITIVES[finding] / TRAIN_IMAGES


@cache
def _thresholds() -> np.ndarray:
    """Thresholds at which the closed, never empty findings have the published frequencies (fixed simulation).

    The start is the exact quantile; a few rounds correct the common findings for implied parents and for studies that
    would have been empty. Findings under 0.5 % keep the exact quantile: the simulation could not improve it.
    """
    rng = stream(0, "phantom thresholds")
    normal, liability, _ = _latent(_normals(rng, _SIMULATED), _normals(rng, _SIMULATED))
    target = np.array([prevalence(name) for name in FINDINGS])
    inside = target / (1 - prevalence("Normal"))
    share = inside.copy()
    for _ in range(12):
        thresholds = np.array([NormalDist().inv_cdf(1 - value) for value in share])
        present, _ = _decide(normal, liability, thresholds)
        seen = present.mean(0)
        correction = np.where(target > 0.005, target / np.maximum(seen, 1e-4), 1.0)
        share = np.clip(share * np.clip(correction, 0.5, 1.5), 1e-6, 0.9)
    return np.array([NormalDist().inv_cdf(1 - value) for value in share])


def _plan_images(rng: np.random.Generator, bedside: float) -> list[ImagePlan]:
    """Views of one study; the sicker, the more often taken at the bedside."""
    counts = np.array(list(IMAGES_PER_STUDY.values()), float)
    count = int(rng.choice(list(IMAGES_PER_STUDY), p=counts / counts.sum()))
    rank = 1 - NormalDist().cdf(bedside)
    sets = VIEW_SETS[count]
    edges = np.cumsum([share for share, _ in sets])
    views = sets[min(int(np.searchsorted(edges, rank)), len(sets) - 1)][1]
    plans = []
    for number, view in enumerate(views):
        position = ("LL" if rng.random() < LL_SHARE else "LATERAL") if view == "side" else view
        blank = bool(rng.random() < BLANK_VIEW)
        wide = rng.random() < (0.7 if position == "AP" else 0.15)
        aspect = 3056 / 2544 if wide else 2544 / 3056
        plans.append(ImagePlan(number, position, blank, blank or bool(rng.random() < BLANK_VIEW_CODE), aspect))
    return plans


def top_up(cohort: Sequence[PatientPlan], seed: int, minimum: int) -> None:
    """Give each finding to the patients nearest to it until `minimum` have it; children before their parents."""
    order = [name for name in FINDINGS if name not in CHILDREN] + list(CHILDREN)
    for name in order:
        column = FINDINGS.index(name)
        lacking = minimum - sum(name in patient.findings() for patient in cohort)
        if lacking <= 0:
            continue
        candidates = [
            (study.margins[column], -patient.number, patient, study)
            for patient in cohort
            if name not in patient.findings()
            for study in [max(patient.studies, key=lambda s: ("Normal" not in s.findings, s.margins[column]))]
            if "Normal" not in study.findings
        ]
        for _, _, patient, study in sorted(candidates, key=lambda c: c[:2], reverse=True)[:lacking]:
            add_finding(seed, patient.number, study, name)


def add_finding(seed: int, patient: int, study: StudyPlan, name: str) -> None:
    """Add a finding and what it implies."""
    study.findings.pop("Normal", None)
    implied = [parent for parent, children in CHILDREN.items() if name in children]
    for finding in (name, *implied):
        study.findings.setdefault(finding, severity(seed, patient, study.number, finding))


def assign_splits(cohort: Sequence[PatientPlan], seed: int) -> None:
    """70 / 10 / 20 by patient, the rarest findings dealt out first (iterative stratification, Sechidis 2011)."""
    left = {p.number: p for p in sorted(cohort, key=lambda p: derive(seed, "phantom", "split", p.number))}
    size = dict.fromkeys(SPLIT_SHARES, 0.0)
    for split, share in SPLIT_SHARES.items():
        size[split] = share * len(cohort)
    holders = {name: [p for p in left.values() if name in p.findings()] for name in CXRLT_2024_TASK1}
    wanted = {n: {split: share * len(holders[n]) for split, share in SPLIT_SHARES.items()} for n in holders}

    def place(patient: PatientPlan, split: str) -> None:
        patient.split = split
        del left[patient.number]
        size[split] -= 1
        for name in patient.findings():
            wanted[name][split] -= 1

    for name in sorted(holders, key=lambda n: (len(holders[n]), n)):
        for patient in holders[name]:
            if patient.number in left:
                place(patient, max(SPLIT_SHARES, key=lambda split: (wanted[name][split], size[split])))
