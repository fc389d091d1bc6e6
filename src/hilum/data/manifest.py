"""From sources to one manifest: read, align findings, namespace ids, split by patient, record where it came from.

Past 300 lines: the registry of sources, the options and the one function that uses them are read together.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import polars as pl

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.types import UNKNOWN, image_uid
from hilum.data.label_maps import LabelPolicy, apply_hierarchy
from hilum.data.labels import FINDING_SETS, canonical, ordered
from hilum.data.pools import keep_to_pool, mark_ssl_by_pool, open_pool, split_by_part
from hilum.data.rows import SourceOptions, SourceRows, check_dataset_name
from hilum.data.schema import ORDER, STUDY, Manifest, check_rows, complete, label_column
from hilum.data.sources import (
    brax,
    chexpert,
    cxrlt,
    cxrlt2026,
    folder,
    jsrt,
    mimic,
    montgomery,
    nih,
    openi,
    padchest,
    rsna,
    shenzhen,
    siim,
    taix,
    vindr,
)
from hilum.data.splits import assign, check_fractions, mark_ssl, name_people, settle_across_datasets
from hilum.data.views import is_frontal, view_of

SOURCES: dict[str, Callable[[SourceOptions], SourceRows]] = {
    "brax": brax.read,
    "chexpert": chexpert.read,
    "cxrlt": cxrlt.read,
    "cxrlt2026": cxrlt2026.read,
    "folder": folder.read,
    "jsrt": jsrt.read,
    "mimic": mimic.read,
    "montgomery": montgomery.read,
    "nih": nih.read,
    "openi": openi.read,
    "padchest": padchest.read,
    "rsna": rsna.read,
    "shenzhen": shenzhen.read,
    "siim": siim.read,
    "taix": taix.read,
    "vindr": vindr.read,
}

TABLELESS = ("cxrlt", "jsrt", "montgomery", "openi", "rsna", "shenzhen", "vindr")
"""Sources that read several tables, or none: another one cannot be given in their place."""
SplitRule = Literal["auto", "official", "project"]
VAL_FRACTION, TEST_FRACTION = 0.1, 0.2


@dataclass(frozen=True)
class ManifestOptions:
    """How a manifest is made of its sources."""

    findings: str = "auto"
    """auto: all that the sources label. Else the name of a fixed list (cxrlt2024-task1, nih) or names with commas."""
    split: SplitRule = "auto"
    """official: the source's own. project: by patient, stratified. auto: official where a source says so
    (`SourceRows.official`: a challenge's or a release's own lists, a folder whose table has a column `split`)."""
    val_fraction: float | None = None
    """Share for val; None is `VAL_FRACTION`."""
    test_fraction: float | None = None
    """Share for test; None is `TEST_FRACTION`."""
    seed: int = 0
    allow_missing: bool = False
    """Leave out listed images that are not there, and count them."""
    pool: str = ""
    """Name of a pool (`pools`): which images of each source enter pretraining. Decides the splits too."""
    accept_leak: bool = False
    """Take a pool that leaks by design."""
    policy: LabelPolicy = field(default_factory=LabelPolicy)
    """How label cells that are not plainly yes or no are read."""
    images: dict[str, Path] = field(default_factory=dict)
    """Dataset -> folder of its images, where they lie apart from its tables."""
    tables: dict[str, Path] = field(default_factory=dict)
    """Dataset -> table to read in place of the one that its source looks for."""

    def __post_init__(self) -> None:
        check_fractions(*self.fractions)
        if self.split not in get_args(SplitRule):
            raise UnknownNameError("split", self.split, get_args(SplitRule))
        given = {
            "--split": self.split != "auto",
            "--val-fraction": self.val_fraction is not None,
            "--test-fraction": self.test_fraction is not None,
        }
        besides = [option for option in given if given[option]]
        if self.pool and besides:
            raise ConfigError(f"--pool {self.pool} decides the splits; leave out {' and '.join(besides)}.")
        if self.accept_leak and not self.pool:
            raise ConfigError("--accept-leak is for a --pool that leaks by design; without one there is nothing.")

    @property
    def fractions(self) -> tuple[float, float]:
        """Shares for val and for test."""
        return (
            VAL_FRACTION if self.val_fraction is None else self.val_fraction,
            TEST_FRACTION if self.test_fraction is None else self.test_fraction,
        )


@dataclass(frozen=True)
class SourceSpec:
    """One `SOURCE=ROOT` or `SOURCE:NAME=ROOT` of the command line."""

    source: str
    dataset: str
    root: Path


def parse_source(text: str) -> SourceSpec:
    """Read `nih=/data/nih` or `folder:clinic=/data/clinic`.

    Raises:
        ConfigError: not of that form.
        UnknownNameError: no such source.
    """
    left, separator, root = text.partition("=")
    if not separator or not root:
        raise ConfigError(f"Expected SOURCE=ROOT, found {text!r}. Sources: {', '.join(SOURCES)}.")
    source, _, name = left.partition(":")
    if source not in SOURCES:
        raise UnknownNameError("source", source, SOURCES)
    return SourceSpec(source, check_dataset_name(name or source), Path(root).expanduser())


def parse_folders(texts: Sequence[str], option: str) -> dict[str, Path]:
    """Read `NAME=PATH` texts of an option into a dict.

    Raises:
        ConfigError: another form, or a name twice.
    """
    folders: dict[str, Path] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not separator or not name or not path:
            raise ConfigError(f"{option}: expected DATASET=PATH, found {text!r}.")
        if name in folders:
            raise ConfigError(f"{option}: {name} is given twice ({folders[name]} and {path}). Keep one.")
        folders[name] = Path(path).expanduser()
    return folders


def build_manifest(specs: Sequence[SourceSpec], options: ManifestOptions) -> tuple[Manifest, list[str]]:
    """Read all sources into one checked manifest.

    Returns:
        The manifest, and notes for a person (what was left out or assumed).

    Raises:
        ManifestError: a subclass for each kind of fault.
    """
    _check_names(specs, options)
    pool = open_pool(options.pool, options.accept_leak) if options.pool else None
    members = [pool.member(spec.source) for spec in specs] if pool else []
    parts, notes = [], []
    for number, spec in enumerate(specs):
        rows = SOURCES[spec.source](_source_options(spec, options))
        rule = f"pool:{members[number].part}" if pool else _rule(rows, options)
        parts.append(_Part(spec.source, spec.dataset, rows, rule))
        notes += [f"{spec.dataset}: {note}" for note in rows.notes]
    findings = _findings(parts, options.findings)
    notes += _ignored(parts, findings)
    finished = [_finish(part, findings, options) for part in parts]
    for part, (_, conflicts) in zip(parts, finished, strict=True):
        notes += _conflict_notes(part.dataset, conflicts)
    frame = name_people(pl.concat([frame for frame, _ in finished], how="diagonal"))
    leak = pool.leak if pool else ""
    if pool and leak:
        frame = mark_ssl_by_pool(frame, pool)
    else:
        frame, settled = settle_across_datasets(frame)
        frame = keep_to_pool(mark_ssl(frame), pool) if pool else mark_ssl(frame)
        notes += [*settled, *([] if pool else _unused_development(frame))]
    frame = complete(frame, findings).sort(ORDER)
    check_rows(frame, "the new manifest", leak)
    contradictions = {part.dataset: counts for part, (_, counts) in zip(parts, finished, strict=True) if counts}
    metadata = {**_metadata(parts, frame, options), "conflicts": json.dumps(contradictions, ensure_ascii=False)}
    if pool:
        metadata |= {"pool": pool.name, "pool_counts": json.dumps(_pool_counts(parts, frame)), "accepted_leak": leak}
    return Manifest(frame, findings, metadata), notes


def _pool_counts(parts: Sequence["_Part"], frame: pl.DataFrame) -> dict[str, int]:
    open_to_pretraining = dict(frame.filter("ssl_ok").group_by("dataset").len().iter_rows())
    counts: dict[str, int] = {}
    for part in parts:
        counts[part.source] = counts.get(part.source, 0) + open_to_pretraining.get(part.dataset, 0)
    return counts


@dataclass(frozen=True)
class _Part:
    source: str
    dataset: str
    rows: SourceRows
    rule: str


def _check_names(specs: Sequence[SourceSpec], options: ManifestOptions) -> None:
    if not specs:
        raise ConfigError(f"No source given. Expected SOURCE=ROOT, with SOURCE one of {', '.join(SOURCES)}.")
    names = [spec.dataset for spec in specs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(
            f"Two sources are named {repeated[0]!r}; their ids would mix. Name one of them: SOURCE:NAME=ROOT."
        )
    for option, given in (("--images", options.images), ("--table", options.tables)):
        for name in given:
            if name not in names:
                raise UnknownNameError(f"dataset in {option}", name, names)
    for spec in specs:
        if spec.dataset in options.tables and spec.source in TABLELESS:
            raise ConfigError(
                f"--table {spec.dataset}={options.tables[spec.dataset]}: {spec.source} reads its release's tables, and "
                "no other in their place. Leave it out; a table of your own goes with folder=ROOT."
            )


def _source_options(spec: SourceSpec, options: ManifestOptions) -> SourceOptions:
    return SourceOptions(
        dataset=spec.dataset,
        root=spec.root,
        images=options.images.get(spec.dataset),
        table=options.tables.get(spec.dataset),
        allow_missing=options.allow_missing,
        policy=options.policy,
    )


def _rule(rows: SourceRows, options: ManifestOptions) -> str:
    if options.split != "auto":
        return options.split
    return "official" if rows.official else "project"


def _findings(parts: Sequence[_Part], asked: str) -> tuple[str, ...]:
    if asked == "auto":
        return ordered(name for part in parts for name in part.rows.findings)
    if asked in FINDING_SETS:
        return FINDING_SETS[asked]
    known = {name for part in parts for name in part.rows.findings} | {
        n for names in FINDING_SETS.values() for n in names
    }
    names = tuple(canonical(name) for name in asked.split(","))
    if len(names) == 1 and names[0] not in known:
        raise UnknownNameError("list of findings", asked, ["auto", *FINDING_SETS])
    for name in names:
        if name not in known:
            raise UnknownNameError("finding", name, known)
    if len(set(names)) < len(names):
        raise ConfigError(f"--findings names a finding twice: {asked}.")
    return names


def _ignored(parts: Sequence[_Part], findings: Sequence[str]) -> list[str]:
    notes = []
    for part in parts:
        extra = [name for name in part.rows.findings if name not in findings]
        if extra:
            notes.append(f"{part.dataset}: labels not asked for, left out: {', '.join(extra)}")
    return notes


def _unused_development(frame: pl.DataFrame) -> list[str]:
    official = pl.col("split_official") == "val"
    moved = frame.filter(official & (pl.col("split_project") == "")).group_by("dataset").len().sort("dataset")
    return [
        f"{name}: the official development set ({count} images) has no labels; val was taken from train by patient"
        for name, count in moved.iter_rows()
    ]


def _conflict_notes(dataset: str, conflicts: Mapping[str, int]) -> list[str]:
    if not conflicts:
        return []
    shown = ", ".join(f"{name} {count:,}" for name, count in sorted(conflicts.items(), key=lambda pair: -pair[1]))
    return [f"{dataset}: labels that contradict each other (images): {shown}"]


def _finish(part: _Part, findings: Sequence[str], options: ManifestOptions) -> tuple[pl.DataFrame, dict[str, int]]:
    """One dataset's rows with namespaced ids, views, a split and exactly the manifest's findings; and conflicts."""
    frame, dataset, conflicts = part.rows.frame, part.dataset, dict(part.rows.conflicts)
    own = [frame[label_column(name)].to_numpy() for name in part.rows.findings]
    labels = np.stack(own, axis=1) if own else np.zeros((frame.height, 0), np.int8)
    if options.policy.hierarchy and not part.rows.native:
        related = apply_hierarchy(labels, part.rows.findings)
        labels = related.codes
        conflicts |= {name: conflicts.get(name, 0) + count for name, count in related.conflicts.items()}
        frame = frame.with_columns(
            pl.Series(label_column(name), labels[:, number]) for number, name in enumerate(part.rows.findings)
        )
    # On all labels of the source: the split does not depend on which findings are kept.
    if part.rule.startswith("pool:"):
        split = split_by_part(part.rule.removeprefix("pool:"), dataset, frame, labels, options.seed)
    else:
        split = assign(dataset, frame, labels, part.rule, *options.fractions, options.seed)
    frame = frame.with_columns(
        image_uid=pl.Series([image_uid(dataset, name) for name in frame["image_id"]], dtype=pl.String),
        dataset=pl.lit(dataset),
        source_root_key=pl.lit(dataset),
        patient_id=pl.format("{}/{}", pl.lit(dataset), "patient_id"),
        study_id=pl.format("{}/{}/{}", pl.lit(dataset), "patient_id", "study_id"),
        view=view_of(pl.col("view_raw")),
        split_project=pl.Series(split, dtype=pl.String),
        label_policy_id=pl.lit(str(options.policy)),
    )
    known_view = pl.col("view") != "UNKNOWN"
    stated = pl.col("view_source") if "view_source" in frame.columns else pl.lit("stated")
    frame = frame.with_columns(
        is_frontal=is_frontal(pl.col("view_raw")),
        view_source=pl.when(known_view).then(stated).otherwise(pl.lit("unknown")),
        is_pediatric=_pediatric(frame),
        study_order=_rank(frame),
    )
    frame = _with_origin(frame, part)
    absent = [name for name in findings if name not in part.rows.findings]
    frame = frame.drop([label_column(name) for name in part.rows.findings if name not in findings])
    return frame.with_columns(pl.lit(UNKNOWN, dtype=pl.Int8).alias(label_column(name)) for name in absent), conflicts


def _with_origin(frame: pl.DataFrame, part: _Part) -> pl.DataFrame:
    """Name each image and patient as the release that they come from does; null where there is none."""
    if not part.rows.origin:
        return frame
    own = {
        "origin_image": pl.format("{}/{}", pl.lit(part.rows.origin), "image_id"),
        "origin_patient": pl.col("patient_id").str.replace(f"^{re.escape(part.dataset)}/", f"{part.rows.origin}/"),
    }
    return frame.with_columns(value.alias(name) for name, value in own.items() if name not in frame.columns)


def _pediatric(frame: pl.DataFrame) -> pl.Expr:
    """A child: as the source says, or by age."""
    stated = pl.col("is_pediatric") if "is_pediatric" in frame.columns else pl.lit(None, dtype=pl.Boolean)
    return pl.coalesce(stated, pl.col("age_years") < 18) if "age_years" in frame.columns else stated


def _rank(frame: pl.DataFrame) -> pl.Expr:
    """Place of the study in the patient's sequence, where the source says one; never a claim about dates."""
    if "study_seq" not in frame.columns:
        return pl.lit(None, dtype=pl.Int32)
    return pl.col("study_seq").rank("dense").over("patient_id").cast(pl.Int32)


def _metadata(parts: Sequence[_Part], frame: pl.DataFrame, options: ManifestOptions) -> dict[str, str]:
    counts = frame.group_by("dataset").agg(
        images=pl.len(), patients=pl.col("patient_id").n_unique(), studies=pl.struct(STUDY).n_unique()
    )
    shares = dict(zip(("val_fraction", "test_fraction"), options.fractions, strict=True))
    fractions = {} if options.pool else shares
    return {
        "tool_version": version("hilum"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": str(options.seed),
        "label_policy": str(options.policy),
        "split": json.dumps({"rules": {part.dataset: part.rule for part in parts}, **fractions}),
        "counts": json.dumps({row.pop("dataset"): row for row in counts.sort("dataset").to_dicts()}),
        "sources": json.dumps({part.dataset: part.source for part in parts}, ensure_ascii=False),
        "roots": json.dumps({part.dataset: str(part.rows.root) for part in parts}, ensure_ascii=False),
        "source_sha256": json.dumps({part.dataset: dict(part.rows.tables) for part in parts}, ensure_ascii=False),
        "notes": json.dumps([f"{part.dataset}: {note}" for part in parts for note in part.rows.notes]),
    }
