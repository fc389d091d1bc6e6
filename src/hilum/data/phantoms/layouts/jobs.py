"""What a layout is made of: the images of a cohort by name, and the tables beside them."""

import csv
import io
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hilum.core.errors import ConfigError
from hilum.core.seeding import derive
from hilum.data.label_maps import LabelMap
from hilum.data.labels import CXRLT_2024_TASK1
from hilum.data.phantoms.cohort import ImagePlan, PatientPlan, StudyPlan


@dataclass(frozen=True)
class ImageJob:
    """One image: what it is called and where it goes."""

    image_id: str
    path: str
    """Relative to OUT."""
    plan: ImagePlan
    shape: tuple[int, int]
    form: str = ""
    """How it is encoded, one of `encoding.FORMS`; "": by the suffix of `path`."""
    elements: tuple[tuple[str, str], ...] = ()
    """DICOM elements by keyword, where it is DICOM."""


@dataclass(frozen=True)
class StudyJob:
    """One study of one patient, ready to be rendered in any process."""

    seed: int
    patient: PatientPlan
    study: StudyPlan
    subject_id: str
    study_id: str
    images: list[ImageJob]


@dataclass(frozen=True)
class MaskRow:
    """One mask that was written; `box` is (x, y, width, height) in pixels."""

    image_id: str
    finding: str
    path: str
    area: float
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Layout:
    """How a cohort becomes files.

    Args:
        jobs: cohort, seed and size to the images, by name.
        tables: writes the tables into a folder.
        source: the source that reads it (`hilum manifest SOURCE=OUT`).
        own: names that it leaves in OUT besides masks, masks.csv and phantom.json.
        findings: that its cohorts have: those of CXR-LT 2024 task 1, or all 45.
    """

    jobs: Callable[[list[PatientPlan], int, int], list[StudyJob]]
    tables: Callable[[Path, list[StudyJob], list[MaskRow]], None]
    source: str
    own: tuple[str, ...]
    findings: tuple[str, ...] = CXRLT_2024_TASK1


def scattered_number(seed: int, kind: str, index: int, first: int) -> int:
    """The index-th of 10,000,000 distinct numbers from `first` on, scattered by a stride prime to their count."""
    return first + (derive(seed, "phantom", kind) + index * 618_033) % 10_000_000


def image_shape(size: int, aspect: float) -> tuple[int, int]:
    """Height and width of an image whose shorter side has `size` pixels and whose width over height is `aspect`."""
    long = round(size * max(aspect, 1 / aspect))
    return (size, long) if aspect > 1 else (long, size)


def csv_text(rows: list[list[Any]]) -> str:
    """Rows as CSV with Unix line ends."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def frontal_images(study: StudyPlan) -> list[ImagePlan]:
    """The PA and AP images of a study, for sources that have no others."""
    return [plan for plan in study.images if plan.position in ("PA", "AP")]


def one_frontal(patient: PatientPlan) -> tuple[StudyPlan, ImagePlan] | None:
    """A patient's first frontal image, for sources with one image each; None where there is none."""
    return next(((study, plan) for study in patient.studies for plan in frontal_images(study)), None)


def check_room(cohort: Collection[PatientPlan], most: int, layout: str) -> None:
    """Raise `ConfigError` where a source's names have no room for so many patients."""
    if len(cohort) > most:
        raise ConfigError(f"Layout {layout} names at most {most:,} patients; found patients={len(cohort):,}.")


def names_of(findings: Collection[str], table: LabelMap, turn: int) -> list[str]:
    """Labels of a source that say neither more nor less than the findings, as far as it can; `turn` chooses one.

    A label that is also a hint of something that is not there is taken only where there is no other.
    """
    closed = {row.finding for row in table.rows if row.present == "1" and row.tier == "strict"}
    chosen = []
    for finding in findings:
        names = [row.label for row in table.rows if (row.finding, row.present) == (finding, "1")]
        strict = [row.label for row in table.rows if row.finding == finding and row.tier == "strict"]
        names = [name for name in names if name in strict] or ([] if finding in closed else names)
        absent = closed - set(findings)
        exact = _without(names, table, absent, ("strict", "weak")) or _without(names, table, absent, ("strict",))
        if exact:
            chosen.append(exact[turn % len(exact)])
    return list(dict.fromkeys(chosen))


def _without(names: list[str], table: LabelMap, absent: Collection[str], tiers: tuple[str, ...]) -> list[str]:
    """Those of the labels that affirm, in rows of these tiers, nothing that is absent."""
    affirm = {row.label for row in table.rows if row.present == "1" and row.finding in absent and row.tier in tiers}
    return [name for name in names if name not in affirm]
