"""Who has what: patients, their studies, images and findings, drawn from published frequencies.

Findings follow a liability model: a finding is present when a normal variable passes its threshold; a few latent
conditions (heart failure, intensive care, infection, ...) shared by findings make them occur together, and a part that
stays with the patient makes a patient's studies alike. Thresholds are set so that each finding's frequency is the
published one (`prevalence.py`).
Patient i depends on the seed and on i alone, except for the top-up of rare findings and the split.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import NormalDist

import numpy as np

from hilum.core.seeding import derive, stream
from hilum.data.labels import CXRLT_2024_TASK1
from hilum.data.phantoms.prevalence import (
    BLANK_VIEW,
    BLANK_VIEW_CODE,
    CONDITIONS,
    IMAGES_PER_STUDY,
    LASTING,
    LASTING_NORMAL,
    LASTING_OTHERWISE,
    LL_SHARE,
    LOADINGS,
    MINIMUM_PATIENTS,
    MORE_SHARES,
    SEVERITY,
    SEVERITY_DRIFT,
    SPLIT_SHARES,
    STUDIES_PER_PATIENT,
    TRAIN_IMAGES,
    TRAIN_POSITIVES,
    VIEW_SETS,
)
from hilum.data.phantoms.signs import CHILDREN

FINDINGS: tuple[str, ...] = tuple(name for name in CXRLT_2024_TASK1 if name != "Normal")
MORE: tuple[str, ...] = tuple(MORE_SHARES)
"""Findings of task 3, for cohorts that ask for more."""
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
    """Liability minus threshold for each of FINDINGS, and of MORE where asked for: how near each finding was."""

    def labels(self, names: Sequence[str] = CXRLT_2024_TASK1) -> dict[str, int]:
        """0 or 1 for each of the findings."""
        return {name: int(name in self.findings) for name in names}


@dataclass
class PatientPlan:
    """One patient."""

    number: int
    studies: list[StudyPlan]
    split: str = "train"

    def findings(self) -> set[str]:
        """Findings of any study."""
        return set().union(*(study.findings for study in self.studies))


def plan_cohort(
    patients: int, seed: int, minimum_patients: int = MINIMUM_PATIENTS, more: bool = False
) -> list[PatientPlan]:
    """Draw a cohort.

    Args:
        patients: how many.
        seed: same seed, same cohort.
        minimum_patients: each finding is given to at least so many patients (never more than a tenth of them), to those
            who were nearest to having it; 0 leaves the published prevalence as it is.
        more: also the findings of task 3, `MORE`; apart from the splits, all else is as without them.
    """
    cohort = [plan_patient(seed, number) for number in range(patients)]
    top_up(cohort, seed, min(minimum_patients, patients // 10))
    if more:
        for patient in cohort:
            _add_more(seed, patient)
        top_up(cohort, seed, min(minimum_patients, patients // 10), MORE)
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


def _add_more(seed: int, patient: PatientPlan) -> None:
    """Draw the findings of task 3 for a patient whose others are drawn; who is normal stays so."""
    rng = stream(seed, "phantom", "more", patient.number)
    lasting = np.array([LASTING[name] for name in MORE])
    thresholds = np.array([NormalDist().inv_cdf(1 - share) for share in MORE_SHARES.values()])
    own = rng.standard_normal(len(MORE))
    for study in patient.studies:
        liability = np.sqrt(lasting) * own + np.sqrt(1 - lasting) * rng.standard_normal(len(MORE))
        study.margins = np.concatenate([study.margins, liability - thresholds])
        if "Normal" not in study.findings:
            for name, value, threshold in zip(MORE, liability, thresholds, strict=True):
                if value > threshold:
                    add_finding(seed, patient.number, study, name)


def severity(seed: int, patient: int, study: int, finding: str) -> float:
    """How plain a finding is (0 to 1): the patient's own, with a little drift from study to study."""
    own = stream(seed, "phantom", "severity", patient, finding).beta(*SEVERITY)
    drift = stream(seed, "phantom", "severity", patient, finding, study).normal(0, SEVERITY_DRIFT)
    return float(np.clip(own + drift, 0.0, 1.0))


def _normals(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normal variables for the conditions, the findings and health."""
    return (
        rng.standard_normal((count, len(CONDITIONS))),
        rng.standard_normal((count, len(FINDINGS))),
        rng.standard_normal(count),
    )


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
    """Findings and margins; a study that is not normal has at least the finding it is nearest to, and parents."""
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


def top_up(cohort: Sequence[PatientPlan], seed: int, minimum: int, findings: Sequence[str] = FINDINGS) -> None:
    """Give each finding to the patients nearest to it until `minimum` have it; children before their parents."""
    order = [name for name in findings if name not in CHILDREN] + [name for name in CHILDREN if name in findings]
    for name in order:
        column = (*FINDINGS, *MORE).index(name)
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
    names = (*CXRLT_2024_TASK1, *MORE)
    holders = {name: [p for p in left.values() if name in p.findings()] for name in names}
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
