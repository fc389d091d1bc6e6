"""Where evaluation material is on the training side: by identity, by ancestry, and in what weights have seen.

Works on the table alone. Copies that differ in their bytes: near_duplicates.py. What weights have seen comes as
numbers (a run's record) or as facts about public weights (facts/known_exposure.csv).
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import polars as pl
from jaxtyping import UInt64

from hilum.core.errors import ManifestError, UnknownNameError
from hilum.data.finish import pictures
from hilum.data.schema import evaluation_in_pretraining, person

EXAMPLES = 3
EVALUATION: tuple[str, ...] = ("test", "val")
NUMBER, SIDE, PERSON, PICTURE = "_number", "_side", "_person", "_picture"
"""Columns that an audit adds while it works."""

IDENTITIES: dict[str, tuple[str, ...]] = {
    "patient": ("dataset", "patient_id"),
    "study": ("dataset", "study_id"),
    "image": ("dataset", "image_id"),
    "path": ("source_root_key", "source_relpath"),
    "file": ("source_sha256",),
    "pixels": ("pixel_sha256",),
}
"""What may be on one side only: anything shared between train (or pretraining), val and test is a leak."""
ORIGINS: dict[str, tuple[str, tuple[str, ...]]] = {
    "origin patient": (PERSON, IDENTITIES["patient"]),
    "origin image": ("origin_image", IDENTITIES["image"]),
}
"""The same across datasets: the column that names it, and what tells rows of several datasets from those of one."""
COPIES_OF = {"rsna": "nih", "siim": "nih"}
"""Sources whose pictures are those of another release, also where no map says which is which."""


@dataclass(frozen=True)
class Problem:
    """One kind of fault.

    Args:
        kind: short name ("patient across splits").
        message: the sentence for a person.
        count: images concerned.
        examples: some of their image_uids.
        evidence: some cases in words, where an image_uid alone says too little; names no patient.
    """

    kind: str
    message: str
    count: int
    examples: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class KnownExposure:
    """One line of facts/known_exposure.csv."""

    weights: str
    dataset: str
    part: str
    """train, val or test of the dataset's own lists, or "all"; other words are for people, and cover everything."""
    share: str
    """How much of that part, in words."""
    source: str


def problem(kind: str, message: str, rows: pl.DataFrame) -> Problem:
    """A fault of these rows, with the first of them as examples."""
    return Problem(kind, message, rows.height, tuple(rows["image_uid"].sort().head(EXAMPLES)))


def side() -> pl.Expr:
    """The split; an image of no split that may be pretrained on is on the training side; null for others."""
    outside = pl.when(pl.col("ssl_ok")).then(pl.lit("train")).otherwise(pl.lit(None, dtype=pl.String))
    return pl.when(pl.col("split_project") != "").then("split_project").otherwise(outside)


def with_origin(frame: pl.DataFrame) -> pl.DataFrame:
    """With the person that each image is of, in the release it descends from."""
    return frame.with_columns(person(frame).alias(PERSON))


def leaks(frame: pl.DataFrame) -> list[Problem]:
    """Anything shared between train (or pretraining), val and test, and evaluation open to pretraining."""
    found = []
    sided = with_origin(frame).with_columns(side().alias(SIDE)).filter(pl.col(SIDE).is_not_null())
    for identity, keys in IDENTITIES.items():
        if all(key in frame.columns for key in keys):
            found += _crossing(sided, identity, keys)
    for identity, (key, within) in ORIGINS.items():
        if key in sided.columns:
            several = pl.struct(within).n_unique().over(key) > 1
            found += _crossing(sided.filter(pl.col(key).is_not_null()).filter(several), identity, (key,))
    exposed = evaluation_in_pretraining(frame)
    if exposed.height:
        message = "open to self-supervised pretraining (ssl_ok) although the patient is in val or test"
        found.append(problem("evaluation in pretraining", message, exposed))
    return found


def _crossing(sided: pl.DataFrame, identity: str, keys: tuple[str, ...]) -> list[Problem]:
    named = sided.filter(pl.all_horizontal(pl.col(key).is_not_null() for key in keys))
    crossing = named.filter(pl.col(SIDE).n_unique().over(keys) > 1)
    if not crossing.height:
        return []
    sides = crossing.group_by(keys).agg(pl.col(SIDE).unique().sort())[SIDE]
    pairs = Counter(" and ".join(names) for names in sides.to_list())
    shown = "; ".join(f"{count:,} in {pair}" for pair, count in sorted(pairs.items()))
    message = f"the same {identity} is in more than one split: {shown}"
    return [problem(f"{identity} across splits", message, crossing)]


def seen_by_weights(
    frame: pl.DataFrame, weights: str, seen: UInt64[np.ndarray, " n"], splits: Sequence[str] = EVALUATION
) -> list[Problem]:
    """Evaluation images that weights have been trained on, or of whose patient they have seen another image.

    Args:
        frame: a manifest's table.
        weights: how messages call them.
        seen: the record of a run: identities of images, and of the pictures by their name in any dataset.
        splits: those that it must not have met.

    Raises:
        ManifestError: an image_uid is not 16 hex digits.
    """
    frame = with_origin(frame).with_columns(pictures(frame).alias(PICTURE))
    met = np.isin(_numbers(frame["image_uid"]), seen) | np.isin(_numbers(frame[PICTURE]), seen)
    known = frame.filter(pl.Series(met))
    again = pl.Series(met)
    for key in (PICTURE, "pixel_sha256", "source_sha256"):
        if key in frame.columns:
            again |= frame[key].is_in(known[key].drop_nulls().unique().implode()).fill_null(value=False)
    evaluated = frame["split_project"].is_in(splits)
    images = frame.filter(evaluated & again)
    others = frame.filter(evaluated & ~again & frame[PERSON].is_in(known[PERSON].unique().implode()))
    found = []
    for kind, what, rows in (
        ("image seen by the weights", "it was trained on these evaluation images", images),
        ("patient seen by the weights", "it was trained on other images of these evaluation patients", others),
    ):
        if rows.height:
            counts = rows.group_by("split_project").len().sort("split_project").iter_rows()
            shown = ", ".join(f"{count:,} in {split}" for split, count in counts)
            found.append(problem(kind, f"{weights}: {what} ({shown})", rows))
    return found


def _numbers(uids: pl.Series) -> UInt64[np.ndarray, " n"]:
    try:
        return np.array([int(uid, 16) for uid in uids], np.uint64)
    except (ValueError, OverflowError) as error:
        raise ManifestError(f"image_uid: expected 16 hex digits; make the manifest again. {error}.") from error


def known_exposures() -> list[KnownExposure]:
    """The lines of facts/known_exposure.csv."""
    text = files("hilum.data").joinpath("facts/known_exposure.csv").read_text(encoding="utf-8")
    return [KnownExposure(**row) for row in csv.DictReader(text.splitlines())]


def exposed_to_known_weights(
    frame: pl.DataFrame, weights: str, sources: Mapping[str, str] | None = None
) -> list[Problem]:
    """Evaluation images of datasets, or descending from datasets, that public weights are known to have seen.

    Where the manifest does not say in which of the source's own lists an image is, it counts as exposed. What is known
    of a source itself goes before what is known of the one that it descends from.

    Args:
        frame: a manifest's table.
        weights: their name in facts/known_exposure.csv, in any case.
        sources: dataset -> the source it was read by; a folder, and a dataset of which nothing is said, is what its
            name says.

    Raises:
        UnknownNameError: weights of which nothing is known. That is no proof that they have seen nothing.
    """
    facts = known_exposures()
    about = [fact for fact in facts if fact.weights.casefold() == weights.casefold()]
    if not about:
        raise UnknownNameError("weights", weights, {fact.weights for fact in facts})
    evaluated = frame.filter(pl.col("split_project").is_in(EVALUATION))
    kinds = {name: kind for name, kind in (sources or {}).items() if kind != "folder"}
    kind = pl.col("dataset").replace(kinds)
    origin = pl.col("origin_image").str.extract(r"^([^/]+)/") if "origin_image" in frame.columns else pl.lit(None)
    ancestor = pl.coalesce(origin, kind.replace_strict(COPIES_OF, default=None, return_dtype=pl.String))
    known_itself = kind.is_in([fact.dataset for fact in about])
    listed = pl.col("split_official").fill_null("") if "split_official" in frame.columns else pl.lit("")
    found = []
    for fact in about:
        own, inherited = kind == fact.dataset, (ancestor == fact.dataset).fill_null(value=False) & ~known_itself
        elsewhere = listed.is_in(["train", "val", "test"]) & (listed != fact.part)
        outside = elsewhere if fact.part in ("train", "val", "test") else pl.lit(value=False)
        rows = evaluated.filter((own & ~outside) | inherited)
        if rows.height:
            counts = rows.group_by("dataset", "split_project").len().sort("dataset", "split_project").iter_rows()
            shown = ", ".join(f"{count:,} of {dataset} in {split}" for dataset, split, count in counts)
            message = (
                f"{fact.weights} is known to have seen {fact.dataset}, part {fact.part}, share {fact.share} "
                f"(source: {fact.source}); evaluation images concerned: {shown}"
            )
            found.append(problem("evaluation set known to the weights", message, rows))
    return found
