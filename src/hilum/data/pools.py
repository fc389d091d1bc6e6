"""Pools by name: which images of which datasets a published model was pretrained on, and how many there should be.

A pool (`facts/pools.csv`) has a row per source: the part of it that enters, the count to expect, and the likely cause
of another count. Parts:

- `train`, `train+val`: of the source's own split.
- `all`: every image.
- `patients:80`: 80 % of the source's training patients (of all, where it has no split); the others are val.
- `image_cut:80`: the training rows cut by image: n - ceil(n / 5) for training, the others val. It leaks.
- `image_share:a/b`: a of every b images.
- `evaluation`: nothing; its own val and test are kept, so that whoever is in them enters from no other source either.

`slides-710k` is the pool of the slides as its numbers give it: CXR-LT cut by image, so that siblings of validation
images are in pretraining, and CheXpert's validation set inside. It is for reproduction, and refused unless the leak is
accepted; `slides-710k-clean` is its sound twin. `cxrlt2026-eligible` has no PadChest, since that challenge bans models
pretrained on it, and of the challenge's own images takes none.
Source of the counts: the slides' data table; the datasets' own releases.
"""

import csv
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import polars as pl
from jaxtyping import Int

from hilum.core.errors import ConfigError, LeakageError, UnknownNameError
from hilum.core.seeding import derive
from hilum.data.splits import project_split

LEAKS: dict[str, str] = {
    "slides-710k": "slides-710k: CXR-LT is cut by image, so that patients and studies of validation images are in "
    "pretraining, and CheXpert's validation set is inside",
}
"""Pools that leak by design, and how."""
CLEAN_TWIN = {"slides-710k": "slides-710k-clean"}
BANNED: dict[tuple[str, str], str] = {
    ("cxrlt2026-eligible", "padchest"): "CXR-LT 2026 takes its images from PadChest and bans models pretrained on it",
}


@dataclass(frozen=True)
class Member:
    """One source of a pool."""

    source: str
    part: str
    expected: int
    """Images that enter pretraining from the published release."""
    tolerance: float
    """Share by which the count may differ without being remarked on: a cut by patient never ends on a number."""
    cause: str
    """Of another count."""


@dataclass(frozen=True)
class Pool:
    """A named pool."""

    name: str
    members: tuple[Member, ...]

    @property
    def leak(self) -> str:
        """How it leaks by design; "" where it does not."""
        return LEAKS.get(self.name, "")

    @property
    def expected(self) -> int:
        """Images of all members."""
        return sum(member.expected for member in self.members)

    def member(self, source: str) -> Member:
        """The row of a source.

        Raises:
            ConfigError: the pool does not take this source, with the reason where there is one.
        """
        for member in self.members:
            if member.source == source:
                return member
        reason = BANNED.get((self.name, source), "")
        taken = ", ".join(member.source for member in self.members)
        raise ConfigError(
            f"Pool {self.name} does not take {source}{f': {reason}' if reason else ''}. It takes {taken}."
        )


@dataclass(frozen=True)
class Difference:
    """Found against expected for one source of a pool."""

    source: str
    found: int
    expected: int
    cause: str
    """Of the difference; "" where there is none to speak of."""


@cache
def pools() -> Mapping[str, Pool]:
    """All pools, by name."""
    text = (files("hilum.data") / "facts" / "pools.csv").read_text(encoding="utf-8")
    members: dict[str, list[Member]] = {}
    for row in csv.DictReader(text.splitlines(), strict=True):
        member = Member(row["source"], row["part"], int(row["expected"]), float(row["tolerance"]), row["cause"])
        members.setdefault(row["pool"], []).append(member)
    return {name: Pool(name, tuple(rows)) for name, rows in members.items()}


def open_pool(name: str, accept_leak: bool) -> Pool:
    """A pool by name.

    Raises:
        UnknownNameError: no such pool.
        LeakageError: it leaks by design, and nobody has said that this is accepted.
    """
    if name not in pools():
        raise UnknownNameError("pool", name, pools())
    pool = pools()[name]
    if pool.leak and not accept_leak:
        raise LeakageError(
            f"{pool.leak}. For results that hold take {CLEAN_TWIN[name]}; to reproduce the published numbers add "
            "--accept-leak, which is then written into every checkpoint and report made with it."
        )
    return pool


def split_by_part(
    part: str, dataset: str, frame: pl.DataFrame, labels: Int[np.ndarray, "N C"], seed: int
) -> np.ndarray:
    """The split of each image of one source under a pool: "train" is what enters pretraining.

    Args:
        part: of the pool's table.
        dataset: name that the ids are under.
        frame: `image_id`, `patient_id`, `split_official`.
        labels: label codes; a cut by patient shares out rare findings.
        seed: of the cuts.

    Raises:
        ConfigError: the source has no split of its own and the part needs one.
    """
    official = frame["split_official"].fill_null("").to_numpy().astype("<U5")
    kind, _, number = part.partition(":")
    if kind in ("train", "train+val") and not (official == "train").any():
        raise ConfigError(f"{dataset}: the pool takes its own training split, and no list of one was found.")
    if kind == "train":
        return official
    if kind == "train+val":
        return np.where(official == "val", "train", official)
    if kind == "evaluation":
        return np.where(official == "train", "", official)
    if kind == "all":
        return np.full(len(official), "train")
    base = official == "train" if (official != "").any() else np.ones(len(official), bool)
    split = np.where(official == "test", "test", "").astype("<U5")
    if kind == "patients":
        share = int(number) / 100
        patients = frame["patient_id"].filter(pl.Series(base)).to_list()
        split[base] = project_split(dataset, patients, labels[base], {"train": share, "val": 1 - share}, seed)
        return split
    order = _shuffled(dataset, frame["image_id"].filter(pl.Series(base)).to_list(), seed)
    places = np.flatnonzero(base)[order]
    if kind == "image_cut":
        held_out = math.ceil(len(places) * (100 - int(number)) / 100)
        split[places] = "train"
        split[places[:held_out]] = "val"
        return split
    if kind != "image_share":
        raise ConfigError(f"pools.csv: unknown part {part!r}.")
    taken, whole = (int(text) for text in number.split("/"))
    split[places[: round(len(places) * taken / whole)]] = "train"
    return split


def _shuffled(dataset: str, ids: Sequence[str], seed: int) -> np.ndarray:
    """Positions ordered by a keyed hash of the id: nobody's place depends on the order of rows."""
    root = derive(seed, "pool", dataset)
    keys = [hashlib.sha256(f"{root}\x1f{image}".encode()).digest() for image in ids]
    return np.array(sorted(range(len(ids)), key=keys.__getitem__), dtype=np.int64)


def mark_ssl_by_pool(frame: pl.DataFrame, pool: Pool) -> pl.DataFrame:
    """`ssl_ok` and `ssl_reason` under a pool that leaks by design: its training part, whoever the patients are."""
    inside = pl.col("split_project") == "train"
    reason = (
        pl.when(inside).then(pl.lit(f"in {pool.name}, which leaks by design")).otherwise(pl.lit(f"not in {pool.name}"))
    )
    return frame.with_columns(ssl_ok=inside, ssl_reason=reason)


def keep_to_pool(frame: pl.DataFrame, pool: Pool) -> pl.DataFrame:
    """`ssl_ok` and `ssl_reason` under a sound pool: of what else may be pretrained on, its training part alone."""
    outside = pl.col("ssl_ok") & (pl.col("split_project") != "train")
    reason = pl.when(outside).then(pl.lit(f"not in {pool.name}")).otherwise("ssl_reason")
    return frame.with_columns(ssl_ok=pl.col("ssl_ok") & ~outside, ssl_reason=reason)


def differences(pool: Pool, found: Mapping[str, int]) -> list[Difference]:
    """Counts against the expected ones, a row per source of the pool.

    Args:
        pool: which.
        found: images open to pretraining, by source; an absent source was not given.
    """
    rows = []
    for member in pool.members:
        count = found.get(member.source, 0)
        near = abs(count - member.expected) <= member.tolerance * member.expected
        cause = "this source was not given" if member.source not in found else "" if near else member.cause
        rows.append(Difference(member.source, count, member.expected, cause))
    return rows
