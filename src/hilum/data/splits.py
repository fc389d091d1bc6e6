"""Splits by patient: train, val and test as a function of ids, labels and a seed, never of row order.

A patient, (dataset, patient_id), goes to one split with all images. Rare findings are shared out first (iterative
stratification, Sechidis et al. 2011, with patients as the unit), so that a finding of ten patients is not left to
chance. Each dataset is split alone: adding another one to a manifest moves nobody.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import polars as pl
from jaxtyping import Bool, Int

from hilum.core.errors import ConfigError, LeakageError, ManifestError
from hilum.core.seeding import derive
from hilum.core.types import POSITIVE
from hilum.data.schema import person

EVALUATION_SPLITS = ("val", "test")


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise `ConfigError` unless both are in [0, 1) and leave something to train on."""
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ConfigError(
            f"Fractions val={val_fraction} and test={test_fraction}: each must be in [0, 1) and their sum below 1."
        )


def project_split(
    dataset: str,
    patients: Sequence[str],
    labels: Int[np.ndarray, "N C"],
    fractions: dict[str, float],
    seed: int,
) -> np.ndarray:
    """Assign every image of one dataset to a split, by patient.

    Args:
        dataset: name, part of the key of a patient.
        patients: patient of each image (N).
        labels: label codes of each image; positives are shared out, other codes are not looked at.
        fractions: share of images for each split, in order of preference on ties; shares sum to 1.
        seed: another seed gives another split.

    Returns:
        Text array (N): the split of each image.
    """
    names = list(fractions)
    ids, of_image = np.unique(np.asarray(patients, dtype=object).astype(str), return_inverse=True)
    images = np.bincount(of_image, minlength=len(ids))
    positives = np.zeros((len(ids), labels.shape[1]), np.int64)
    np.add.at(positives, of_image, (labels == POSITIVE).astype(np.int64))
    order = _shuffled(dataset, ids, seed)
    chosen = _stratify(positives[order], images[order], np.array([fractions[name] for name in names]))
    split_of = np.empty(len(ids), np.int64)
    split_of[order] = chosen
    return np.array(names)[split_of[of_image]]


def _shuffled(dataset: str, ids: np.ndarray, seed: int) -> np.ndarray:
    """Patients ordered by a keyed hash of their id, so that nobody's place depends on the rows of others."""
    root = derive(seed, "split", dataset)
    keys = [hashlib.sha256(f"{root}\x1f{patient}".encode()).digest() for patient in ids]
    return np.array(sorted(range(len(ids)), key=keys.__getitem__), dtype=np.int64)


def _stratify(
    positives: Int[np.ndarray, "patients C"], images: Int[np.ndarray, " patients"], shares: np.ndarray
) -> Int[np.ndarray, " patients"]:
    """Split index of each patient. Counts are of images, so that a patient with many weighs as much as they do."""
    wanted = np.outer(shares, positives.sum(0)).astype(np.float64)
    room = shares * images.sum()
    chosen = np.full(len(images), -1, np.int64)
    waiting: Bool[np.ndarray, " patients"] = np.ones(len(images), bool)

    def place(patient: int, column: int | None) -> None:
        need = wanted[:, column] if column is not None else room
        # Largest need of this finding; on a tie, most room; on a tie, the first split.
        split = int(np.lexsort((-room, -need))[0])
        chosen[patient] = split
        waiting[patient] = False
        wanted[split] -= positives[patient]
        room[split] -= images[patient]

    while True:
        left = positives[waiting].sum(0)
        candidates = np.flatnonzero(left)
        if not len(candidates):
            break
        rarest = int(candidates[np.argmin(left[candidates])])
        for patient in np.flatnonzero(waiting & (positives[:, rarest] > 0)):
            place(int(patient), rarest)
    for patient in np.flatnonzero(waiting):
        place(int(patient), None)
    return chosen


def assign(
    dataset: str,
    frame: pl.DataFrame,
    labels: np.ndarray,
    rule: str,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> np.ndarray:
    """The `split_project` of one dataset's images.

    Args:
        dataset: name.
        frame: `patient_id` and `split_official` of each image.
        labels: label codes (N, C).
        rule: "project": by patient, stratified. "official": the source's own split; where it has no val, or one
            without labels (which then belongs to no split), val is taken from its train by patient.
        val_fraction: share for val (under "official": of train).
        test_fraction: share for test; not used under "official".
        seed: of the shuffling.

    Raises:
        ManifestError: "official" where the source has no split.
        LeakageError: the source's own split has a patient in two of its parts.
    """
    patients = frame["patient_id"].to_list()
    if rule == "project":
        fractions = {"train": 1 - val_fraction - test_fraction, "val": val_fraction, "test": test_fraction}
        return project_split(dataset, patients, labels, fractions, seed)
    official = frame["split_official"].to_numpy().astype(str)
    if not (official != "").any():
        raise ManifestError(
            f"{dataset} has no official split (no list, or no column 'split'). Use --split project, or add the lists."
        )
    _check_official(dataset, frame)
    train, val = official == "train", official == "val"
    known: Bool[np.ndarray, " N"] = np.any(labels >= 0, axis=1)
    blind = known[train].any() and not known[val].any()  # a challenge's development set without labels judges nothing
    if (val.any() and not blind) or not train.any() or val_fraction == 0:
        return official
    fractions = {"train": 1 - val_fraction, "val": val_fraction}
    carved = np.where(val, "", official).astype("<U5")
    carved[train] = project_split(dataset, np.array(patients)[train].tolist(), labels[train], fractions, seed)
    return carved


def _check_official(dataset: str, frame: pl.DataFrame) -> None:
    placed = frame.filter(pl.col("split_official") != "")
    parts = placed.group_by("patient_id").agg(pl.col("split_official").unique().sort())
    crossing = parts.filter(pl.col("split_official").list.len() > 1)
    if crossing.height:
        kinds = sorted({" and ".join(names) for names in crossing["split_official"].to_list()})
        raise LeakageError(
            f"{dataset}: {crossing.height} patients are on both sides of the given split ({'; '.join(kinds)}). "
            "A patient belongs to one part; correct the lists, or make a split by patient with --split project."
        )


def name_people(frame: pl.DataFrame) -> pl.DataFrame:
    """Fill `origin_patient` where another dataset holds the same picture and knows whose it is.

    CXR-LT 2026 has PadChest's pictures without their patients: beside PadChest itself, its images are of those people.
    """
    if not {"origin_image", "origin_patient"} <= set(frame.columns):
        return frame
    known = frame.select("origin_image", person="origin_patient").drop_nulls().unique("origin_image", keep="first")
    joined = frame.join(known, on="origin_image", how="left", maintain_order="left")
    return joined.with_columns(origin_patient=pl.coalesce("origin_patient", "person")).drop("person")


def settle_across_datasets(frame: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Where datasets share patients and place them differently, evaluation wins: test before val before train.

    Images of such a patient in an earlier split belong to none (`split_project` ""). Within one dataset a patient has
    one split already.

    Returns:
        The rows, and a note for each dataset that lost images.
    """
    rank = pl.col("split_project").replace_strict({"": 0, "train": 1, "val": 2, "test": 3}, return_dtype=pl.Int8)
    yields = (rank > 0) & (rank < rank.max().over(person(frame)))
    frame = frame.with_columns(_yields=yields)
    lost = frame.filter("_yields").group_by("dataset", "split_project").len().sort("dataset", "split_project")
    notes = [
        f"{dataset}: {count} images left out of {split}: another dataset evaluates on their patients"
        for dataset, split, count in lost.iter_rows()
    ]
    settled = pl.when("_yields").then(pl.lit("")).otherwise("split_project")
    return frame.with_columns(split_project=settled).drop("_yields"), notes


def mark_ssl(frame: pl.DataFrame) -> pl.DataFrame:
    """Add `ssl_ok` and `ssl_reason`: may an image enter self-supervised pretraining?

    It may when no image of its patient, in any dataset, is in val or test, of the project's split or of the sources'
    own lists. The lists count even where the project splits otherwise: others are judged on them. A picture that two
    datasets hold enters once, from the one whose rows come first.
    """
    who = person(frame)
    in_project = pl.col("split_project").is_in(EVALUATION_SPLITS).any().over(who)
    in_official = pl.col("split_official").fill_null("").is_in(EVALUATION_SPLITS).any().over(who)
    again = pl.lit(False)
    if "origin_image" in frame.columns:
        again = pl.col("origin_image").is_not_null() & ~pl.col("origin_image").is_first_distinct()
    reason = (
        pl.when(in_project)
        .then(pl.format("excluded: patient in {} val or test", "dataset"))
        .when(in_official)
        .then(pl.format("excluded: patient in {} official val or test", "dataset"))
        .when(again)
        .then(pl.lit("excluded: the same picture is there under another dataset"))
        .otherwise(pl.lit("no image of the patient in val or test"))
    )
    return frame.with_columns(ssl_ok=~(in_project | in_official | again), ssl_reason=reason)
