"""What is wrong, or thin, in a manifest: leaks between splits, duplicates, conflicts, rare findings.

Reads the table only; with `hash_files` also the bytes of files that could be copies of each other. Images are named
by image_uid: patient ids never leave the table.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from hilum.core.files import sha256_file
from hilum.core.intervals import wilson_interval
from hilum.core.tracking import progress
from hilum.core.types import NEGATIVE, POSITIVE
from hilum.data.labels import COMPATIBLE_WITH_NORMAL, IMPLIES, NORMAL_NAMES
from hilum.data.schema import STUDY, Manifest, evaluation_in_pretraining, label_column

FEW_POSITIVES = 30
"""Below this many positives an average precision says little (its interval is wide)."""
EXAMPLES = 3
SHOWN_FINDINGS = 8

IDENTITIES: dict[str, tuple[str, ...]] = {
    "patient": ("dataset", "patient_id"),
    "study": ("dataset", "study_id"),
    "image": ("dataset", "image_id"),
    "path": ("source_root_key", "source_relpath"),
    "file": ("source_sha256",),
    "pixels": ("pixel_sha256",),
}
"""What may be on one side only: anything shared between train (or pretraining), val and test is a leak."""


@dataclass(frozen=True)
class Problem:
    """One kind of fault.

    Args:
        kind: short name ("patient across splits").
        message: the sentence for a person.
        count: images concerned.
        examples: some of their image_uids.
    """

    kind: str
    message: str
    count: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Args:
        leaks: evaluation material on the training side; any of these makes results worthless.
        warnings: what a person should know before trusting a number.
        counts: images, studies, patients by dataset and split.
        positives: finding, split, known, positives, prevalence, and its 95 % interval (low, high) in [0, 1].
        views: images by split and view.
    """

    leaks: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    counts: pl.DataFrame
    positives: pl.DataFrame
    views: pl.DataFrame

    @property
    def clean(self) -> bool:
        """No leak was found."""
        return not self.leaks


def audit(manifest: Manifest, hash_files: bool = False) -> AuditReport:
    """Check a manifest.

    Args:
        manifest: read with `read_manifest(path, check=False)`, so that all faults are reported at once.
        hash_files: also compare the files themselves. Only files of equal size are read.
    """
    frame, unread = _with_hashes(manifest) if hash_files else (manifest.frame, [])
    positives = positives_table(manifest)
    warnings = [
        *unread,
        *_duplicates(frame),
        *_conflicts(frame, manifest.findings),
        *_hierarchy(frame, manifest.findings),
        *_official(frame),
        *_thin(frame, positives),
    ]
    return AuditReport(
        leaks=tuple(_leaks(frame)),
        warnings=tuple(warnings),
        counts=count_images(frame),
        positives=positives,
        views=frame.group_by("split_project", "view").agg(images=pl.len()).sort("split_project", "view"),
    )


def _problem(kind: str, message: str, rows: pl.DataFrame) -> Problem:
    return Problem(kind, message, rows.height, tuple(rows["image_uid"].sort().head(EXAMPLES)))


def _side() -> pl.Expr:
    """The split; an image of no split that may be pretrained on is on the training side."""
    outside = pl.when(pl.col("ssl_ok")).then(pl.lit("train")).otherwise(pl.lit(None, dtype=pl.String))
    return pl.when(pl.col("split_project") != "").then("split_project").otherwise(outside)


def _leaks(frame: pl.DataFrame) -> list[Problem]:
    found = []
    sided = frame.with_columns(_side().alias("_side")).filter(pl.col("_side").is_not_null())
    for identity, keys in IDENTITIES.items():
        if any(key not in frame.columns for key in keys):
            continue
        named = sided.filter(pl.all_horizontal(pl.col(key).is_not_null() for key in keys))
        crossing = named.filter(pl.col("_side").n_unique().over(keys) > 1)
        if crossing.height:
            sides = crossing.group_by(keys).agg(pl.col("_side").unique().sort())["_side"]
            pairs = Counter(" and ".join(names) for names in sides.to_list())
            shown = "; ".join(f"{count:,} in {pair}" for pair, count in sorted(pairs.items()))
            message = f"the same {identity} is in more than one split: {shown}"
            found.append(_problem(f"{identity} across splits", message, crossing))
    exposed = evaluation_in_pretraining(frame)
    if exposed.height:
        message = "open to self-supervised pretraining (ssl_ok) although the patient is in val or test"
        found.append(_problem("evaluation in pretraining", message, exposed))
    return found


def _duplicates(frame: pl.DataFrame) -> list[Problem]:
    found = []
    keys = {"image_uid": ("image_uid",), **{name: IDENTITIES[name] for name in ("image", "path", "file", "pixels")}}
    for name, columns in keys.items():
        if any(column not in frame.columns for column in columns):
            continue
        rows = frame.filter(pl.all_horizontal(pl.col(column).is_not_null() for column in columns))
        repeated = rows.filter(pl.len().over(columns) > 1)
        if repeated.height:
            patients = repeated.filter(pl.struct("dataset", "patient_id").n_unique().over(columns) > 1).height
            under = f", {patients:,} of them under several patients" if patients else ""
            found.append(_problem(f"duplicate {name}", f"images that share their {name}{under}", repeated))
    return found


def _conflicts(frame: pl.DataFrame, findings: Sequence[str]) -> list[Problem]:
    """Findings that are 1 on one image of a study and 0 on another: sources label studies, so one of them is wrong."""
    several = frame.filter(pl.len().over(STUDY) > 1)
    if not several.height or not findings:
        return []
    columns = [pl.col(label_column(name)) for name in findings]
    differing = several.select(
        "image_uid", *(((column == POSITIVE).any() & (column == NEGATIVE).any()).over(STUDY) for column in columns)
    )
    totals = {name: int(differing[label_column(name)].sum()) for name in findings}
    rows = differing.filter(pl.any_horizontal(label_column(name) for name in findings))
    if not rows.height:
        return []
    shown = ", ".join(f"{name} {count:,}" for name, count in _largest(totals))
    return [_problem("conflicting labels", f"images of a study whose labels differ within it ({shown})", rows)]


def _hierarchy(frame: pl.DataFrame, findings: Sequence[str]) -> list[Problem]:
    found = []
    for child, parents in IMPLIES.items():
        for parent in parents:
            if child in findings and parent in findings:
                both = (pl.col(label_column(child)) == POSITIVE) & (pl.col(label_column(parent)) == NEGATIVE)
                rows = frame.filter(both)
                if rows.height:
                    found.append(_problem("hierarchy", f"{child} is positive and {parent} negative", rows))
    for normal in NORMAL_NAMES:
        others = [name for name in findings if name not in COMPATIBLE_WITH_NORMAL]
        if normal in findings and others:
            abnormal = pl.any_horizontal(pl.col(label_column(name)) == POSITIVE for name in others)
            rows = frame.filter((pl.col(label_column(normal)) == POSITIVE) & abnormal)
            if rows.height:
                found.append(_problem("hierarchy", f"{normal} is positive beside another finding", rows))
    return found


def _official(frame: pl.DataFrame) -> list[Problem]:
    if "split_official" not in frame.columns:
        return []
    listed = pl.col("split_official").is_in(["val", "test"]).any().over("dataset", "patient_id")
    rows = frame.filter(listed & (pl.col("split_project") == "train"))
    if not rows.height:
        return []
    message = "in train although the source lists the patient for evaluation: compare no result with that list"
    return [_problem("official evaluation images in train", message, rows)]


def _thin(frame: pl.DataFrame, positives: pl.DataFrame) -> list[Problem]:
    found = []
    present = set(frame["split_project"])
    for split in ("train", "val", "test"):
        if split not in present:
            found.append(Problem("empty split", f"no image is in {split}", 0))
            continue
        few = positives.filter((pl.col("split") == split) & (pl.col("positives") < FEW_POSITIVES))
        if few.height:
            rarest = few.sort("positives", "finding").head(SHOWN_FINDINGS).to_dicts()
            shown = ", ".join(f"{row['finding']} {row['positives']}" for row in rarest)
            shown += f", ... {few.height - len(rarest)} more" if few.height > len(rarest) else ""
            message = f"{split}: {few.height} findings have under {FEW_POSITIVES} positives ({shown})"
            found.append(Problem("few positives", message, 0))
    return found


def count_images(frame: pl.DataFrame) -> pl.DataFrame:
    """Images, studies, patients and images open to pretraining, by dataset and split."""
    groups = frame.group_by("dataset", "split_project").agg(
        images=pl.len(),
        studies=pl.struct(STUDY).n_unique(),
        patients=pl.col("patient_id").n_unique(),
        ssl_ok=pl.col("ssl_ok").sum(),
    )
    return groups.sort("dataset", "split_project")


def positives_table(manifest: Manifest) -> pl.DataFrame:
    """Positives and prevalence of each finding in each split that has images; the interval is Wilson's, at 95 %."""
    labels, splits = manifest.labels(), manifest.frame["split_project"].to_numpy()
    rows = []
    for split in ("train", "val", "test"):
        members = labels[splits == split]
        if not len(members):
            continue
        for column, finding in enumerate(manifest.findings):
            positive = int((members[:, column] == POSITIVE).sum())
            known = positive + int((members[:, column] == NEGATIVE).sum())
            low, high = wilson_interval(positive, known)
            rows.append((finding, split, known, positive, positive / known if known else None, low, high))
    schema = {
        "finding": pl.String, "split": pl.String, "known": pl.Int64, "positives": pl.Int64,
        "prevalence": pl.Float64, "low": pl.Float64, "high": pl.Float64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


def _largest(totals: dict[str, int], count: int = 5) -> list[tuple[str, int]]:
    return [(name, total) for name, total in Counter(totals).most_common(count) if total]


def _with_hashes(manifest: Manifest) -> tuple[pl.DataFrame, list[Problem]]:
    """Fill `source_sha256` for files whose size is that of another file; only those can be equal."""
    frame, roots = manifest.frame, manifest.roots()
    pairs = frame.select("source_root_key", "source_relpath").iter_rows()
    paths = [roots.get(key, Path(key)) / relpath for key, relpath in pairs]
    with ThreadPoolExecutor() as pool:
        sizes = np.array(list(pool.map(_size, paths)), dtype=np.int64)
        values, counts = np.unique(sizes, return_counts=True)
        twins = np.flatnonzero(np.isin(sizes, values[(counts > 1) & (values >= 0)]))
        hashes: list[str | None] = [None] * len(paths)
        with progress("Comparing files of equal size", len(twins), "files") as bar:
            for index, digest in zip(twins, pool.map(_digest, [paths[index] for index in twins]), strict=True):
                hashes[index] = digest
                bar.advance()
    known = (
        frame["source_sha256"] if "source_sha256" in frame.columns else pl.Series([None] * len(paths), dtype=pl.String)
    )
    computed = pl.Series("source_sha256", hashes, dtype=pl.String)
    unread = frame.filter(pl.Series(sizes < 0))
    problems = [_problem("unreadable file", "images whose file could not be read", unread)] if unread.height else []
    return frame.with_columns(computed.fill_null(known).alias("source_sha256")), problems


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _digest(path: Path) -> str | None:
    try:
        return sha256_file(path)
    except OSError:
        return None
