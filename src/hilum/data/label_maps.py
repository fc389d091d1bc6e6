"""How each dataset's labels become findings: tables that a radiologist can read and correct, and the logic over them.

A table (`facts/labels/<name>.csv`) has one row per pair of a source's label and a finding:

- `label`: the source's own word, matched exactly (never a part of a word). `*`: every label of the table that has no
  row of its own for this finding.
- `finding`: the CXR-LT name. `*`: all findings of the table. Empty: the label is known and says nothing.
- `present`: what the label says of the finding where it is present: 1, 0, `unknown` (it forbids a 1), or nothing.
  `unknown` for all findings (`*`) means that the image cannot be used for any.
- `absent`: what it says where it is absent: 0, or nothing.
- `tier`: `strict`, or `weak`: a hint. Off by default; a weak label that is present then makes the finding unknown
  unless a strict one says more, and never 0.
- `note`: why.

Several rows for one finding are read as "or": one present label is enough for 1, all must be absent for 0. A finding
that one present label affirms and another denies is a conflict: unknown, and counted. Source of the maps: the
releases' own vocabularies; see docs/datasets.md.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Int8

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.types import NEGATIVE, POSITIVE, UNCERTAIN, UNKNOWN
from hilum.data.labels import COMPATIBLE_WITH_NORMAL, IMPLIES, NORMAL_NAMES, ordered

COLUMNS = ("label", "finding", "present", "absent", "tier", "note")
EVERY = "*"

BlankPolicy = Literal["mask", "zero"]
UncertainPolicy = Literal["mask", "zero", "one"]
Tier = Literal["strict", "weak"]


@dataclass(frozen=True)
class LabelPolicy:
    """How cells that are not plainly yes or no are read."""

    uncertain: UncertainPolicy = "mask"
    """A source's own "uncertain": kept apart as -2 (every loss masks it), or made negative or positive."""
    blank: BlankPolicy = "mask"
    """An empty label cell: unknown, or negative."""
    tier: Tier = "strict"
    """`weak` also believes the hints of the label tables."""
    imply_negatives: bool = False
    """Where a source says that all is normal, the findings it could have named are negative, not unknown."""
    hierarchy: bool = False
    """A child implies its parents, an absent parent its children's absence, a finding that the chest is not normal."""

    def __post_init__(self) -> None:
        for name, known in (("uncertain", UncertainPolicy), ("blank", BlankPolicy), ("tier", Tier)):
            if getattr(self, name) not in get_args(known):
                raise UnknownNameError(f"policy for {name} labels", getattr(self, name), get_args(known))

    def __str__(self) -> str:
        """As the manifest records it."""
        flags = {"imply_negatives": self.imply_negatives, "hierarchy": self.hierarchy}
        words = {name: "on" if value else "off" for name, value in flags.items()}
        named = {"uncertain": self.uncertain, "blank": self.blank, "tier": self.tier, **words}
        return ",".join(f"{name}={value}" for name, value in named.items())

    def settle(self, values: Int8[np.ndarray, "N L"]) -> Int8[np.ndarray, "N L"]:
        """Values of a source's labels (1, 0, -1 blank, -2 uncertain) with the policies for the last two applied."""
        settled = values.copy()
        if self.blank == "zero":
            settled[values == UNKNOWN] = NEGATIVE
        if self.uncertain != "mask":
            settled[values == UNCERTAIN] = NEGATIVE if self.uncertain == "zero" else POSITIVE
        return settled


@dataclass(frozen=True)
class MapRow:
    """One row of a table; empty cells are ""."""

    label: str
    finding: str
    present: str
    absent: str
    tier: str
    note: str


@dataclass(frozen=True)
class LabelMap:
    """A dataset's label table.

    Args:
        name: of the file.
        rows: in the file's order.
        labels: the source's vocabulary, without repeats.
        findings: what the labels can say something about, in CXR-LT order.
    """

    name: str
    rows: tuple[MapRow, ...]
    labels: tuple[str, ...]
    findings: tuple[str, ...]

    def about(self, finding: str) -> tuple[MapRow, ...]:
        """The rows that speak of a finding, one per label, wildcards written out."""
        own = [row for row in self.rows if row.finding == finding and row.label != EVERY]
        named = {row.label for row in own}
        vetoes = [row for row in self.rows if row.finding == EVERY and row.label not in named]
        named |= {row.label for row in vetoes}
        for row in self.rows:
            if row.finding == finding and row.label == EVERY:
                own += [
                    MapRow(label, finding, row.present, row.absent, row.tier, row.note)
                    for label in self.labels
                    if label not in named
                ]
        return (*own, *vetoes)


@dataclass(frozen=True)
class Mapped:
    """What a table made of a source's labels.

    Args:
        codes: label codes, findings in the order of the map.
        conflicts: images on which present labels contradict each other, by finding; only counts above zero.
    """

    codes: Int8[np.ndarray, "N C"]
    conflicts: Mapping[str, int]


@cache
def load_map(name: str) -> LabelMap:
    """Read and check a table of the package.

    Raises:
        ConfigError: the table is malformed (after an edit): names file, row and cell.
    """
    where = f"label table {name}.csv"
    text = (files("hilum.data") / "facts" / "labels" / f"{name}.csv").read_text(encoding="utf-8")
    reader = csv.reader(text.splitlines(), strict=True)
    if tuple(next(reader, ())) != COLUMNS:
        raise ConfigError(f"{where}: expected the header {','.join(COLUMNS)}.")
    rows, seen = [], set()
    for number, cells in enumerate(reader, start=2):
        if len(cells) != len(COLUMNS):
            raise ConfigError(f"{where}, row {number}: {len(cells)} cells, expected {len(COLUMNS)}.")
        row = MapRow(*(cell.strip() for cell in cells))
        _check_row(row, f"{where}, row {number}")
        if (row.label, row.finding) in seen:
            raise ConfigError(f"{where}, row {number}: {row.label!r} and {row.finding!r} have a row already.")
        seen.add((row.label, row.finding))
        rows.append(row)
    labels = tuple(dict.fromkeys(row.label for row in rows if row.label != EVERY))
    findings = ordered(row.finding for row in rows if row.finding not in ("", EVERY))
    return LabelMap(name, tuple(rows), labels, findings)


def _check_row(row: MapRow, where: str) -> None:
    for column, allowed in (
        ("present", ("1", "0", "unknown", "")),
        ("absent", ("0", "")),
        ("tier", ("strict", "weak")),
    ):
        value = getattr(row, column)
        if value not in allowed:
            raise ConfigError(f"{where}: {column} is {value!r}; expected one of {', '.join(map(repr, allowed))}.")
    if not row.label:
        raise ConfigError(f"{where}: the label is empty.")
    if row.finding == EVERY and (row.present, row.absent) != ("unknown", ""):
        raise ConfigError(f"{where}: a row for all findings can only say `unknown` where the label is present.")


def apply_map(values: Int8[np.ndarray, "N L"], table: LabelMap, policy: LabelPolicy) -> Mapped:
    """Turn a source's labels into findings.

    Args:
        values: 1 present, 0 absent, -1 blank, -2 uncertain; columns in the order of `table.labels`.
        table: which label says what.
        policy: for blanks, uncertainty, hints and implied negatives.
    """
    values = policy.settle(values)
    column = {label: number for number, label in enumerate(table.labels)}
    codes = np.full((len(values), len(table.findings)), UNKNOWN, np.int8)
    conflicts: dict[str, int] = {}
    for number, finding in enumerate(table.findings):
        codes[:, number], contradicted = _verdict(values, column, table.about(finding), policy)
        if contradicted:
            conflicts[finding] = contradicted
    if policy.imply_negatives:
        codes = _imply_negatives(codes, table.findings)
    return Mapped(codes, conflicts)


def _verdict(
    values: Int8[np.ndarray, "N L"], column: Mapping[str, int], rows: Sequence[MapRow], policy: LabelPolicy
) -> tuple[Int8[np.ndarray, " N"], int]:
    def any_of(value: int, chosen: Sequence[MapRow]) -> Bool[np.ndarray, " N"]:
        return (values[:, [column[row.label] for row in chosen]] == value).any(axis=1)

    believed = [row for row in rows if row.tier == "strict" or policy.tier == "weak"]
    hints = [row for row in rows if row not in believed]
    affirm = [row for row in believed if row.present == "1"]
    yes, no = any_of(POSITIVE, affirm), any_of(POSITIVE, [row for row in believed if row.present == "0"])
    forbidden = any_of(POSITIVE, [row for row in believed if row.present == "unknown"])
    unusable = any_of(POSITIVE, [row for row in rows if row.finding == EVERY])
    hinted = any_of(POSITIVE, [row for row in hints if row.present == "1"])
    denying = [column[row.label] for row in believed if row.absent == "0"]
    all_absent = (values[:, denying] == NEGATIVE).all(axis=1) if denying else np.zeros(len(values), bool)
    verdict = np.select(
        [unusable | (yes & no), no, forbidden, yes, any_of(UNCERTAIN, affirm), hinted, all_absent],
        [UNKNOWN, NEGATIVE, UNKNOWN, POSITIVE, UNCERTAIN, UNKNOWN, NEGATIVE],
        default=UNKNOWN,
    )
    return verdict.astype(np.int8), int((yes & no).sum())


def _imply_negatives(codes: Int8[np.ndarray, "N C"], findings: Sequence[str]) -> Int8[np.ndarray, "N C"]:
    normal = np.zeros(len(codes), bool)
    for name in NORMAL_NAMES:
        if name in findings:
            normal |= codes[:, findings.index(name)] == POSITIVE
    implied = np.array([name not in COMPATIBLE_WITH_NORMAL for name in findings], bool)
    return np.where(normal[:, None] & implied & (codes == UNKNOWN), np.int8(NEGATIVE), codes)


def apply_hierarchy(codes: Int8[np.ndarray, "N C"], findings: Sequence[str], with_normal: bool = True) -> Mapped:
    """Fill unknown findings from their relatives; what a source says outright is never overruled, only counted.

    Rules, in this order: a child makes its parents positive; an absent parent makes its children absent; Normal makes
    every finding absent but devices; a finding other than a device makes Normal absent.

    Args:
        codes: labels.
        findings: their columns.
        with_normal: also the two rules of Normal. They hold among the findings that one source looks for; beside those
            of others, Normal says nothing.
    """
    codes, conflicts = codes.copy(), dict[str, int]()
    place = {name: number for number, name in enumerate(findings)}

    def imply(given: Bool[np.ndarray, " N"], finding: str, value: int) -> None:
        current = codes[:, place[finding]]
        contradicted = int((given & (current == (NEGATIVE if value == POSITIVE else POSITIVE))).sum())
        if contradicted:
            conflicts[finding] = conflicts.get(finding, 0) + contradicted
        codes[:, place[finding]] = np.where(given & (current == UNKNOWN), value, current)

    pairs = [(child, parent) for child, parents in IMPLIES.items() for parent in parents if child in place]
    for child, parent in pairs:
        if parent in place:
            imply(codes[:, place[child]] == POSITIVE, parent, POSITIVE)
    for child, parent in pairs:
        if parent in place:
            absent = codes[:, place[parent]] == NEGATIVE  # a child that is positive here was counted above
            imply(absent & (codes[:, place[child]] == UNKNOWN), child, NEGATIVE)
    others = [name for name in findings if name not in COMPATIBLE_WITH_NORMAL]
    for normal in (name for name in NORMAL_NAMES if with_normal and name in place):
        abnormal = (codes[:, [place[name] for name in others]] == POSITIVE).any(axis=1)
        healthy = (codes[:, place[normal]] == POSITIVE) & ~abnormal
        for name in others:
            imply(healthy, name, NEGATIVE)
        imply(abnormal, normal, NEGATIVE)
    return Mapped(codes, conflicts)
