"""What is wrong, or thin, in a manifest: leaks between splits, duplicates, conflicts, rare findings.

Leaks are leaks.py's and copies.py's; this module puts the report together. It reads the table only; with `hash_files`
also the bytes of files that could be copies of each other, with `pixels` what perceptual hashes need. Images are named
by image_uid: patient ids never leave the table.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from hilum.core.files import sha256_file
from hilum.core.intervals import wilson_interval
from hilum.core.tracking import progress
from hilum.core.types import NEGATIVE, POSITIVE
from hilum.data.audit_pixels import Pixels
from hilum.data.copies import copies_across_splits, copies_within_splits, find_copies
from hilum.data.labels import COMPATIBLE_WITH_NORMAL, IMPLIES, NORMAL_NAMES
from hilum.data.leaks import IDENTITIES, Problem, leaks, problem, side
from hilum.data.schema import STUDY, Manifest, label_column

FEW_POSITIVES = 30
"""Below this many positives an average precision says little (its interval is wide)."""
SHOWN_FINDINGS = 8


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Args:
        leaks: evaluation material on the training side; any of these makes results worthless.
        warnings: what a person should know before trusting a number.
        counts: images, studies, patients by dataset and split.
        positives: finding, split, known, positives, prevalence, and its 95 % interval (low, high) in [0, 1].
        views: images by split and view.
        pairs: near duplicates, as `copies.find_copies`; None where no image has a perceptual hash.
        compared: images that were compared by their pixels, of those that belong to a side.
        sided: images that belong to train (or pretraining), val or test.
    """

    leaks: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    counts: pl.DataFrame
    positives: pl.DataFrame
    views: pl.DataFrame
    pairs: pl.DataFrame | None
    compared: int
    sided: int

    @property
    def clean(self) -> bool:
        """No leak was found."""
        return not self.leaks


def audit(
    manifest: Manifest,
    hash_files: bool = False,
    pixels: Pixels | None = None,
    hash_pixels: bool = False,
    within: bool = False,
    exposed: Callable[[pl.DataFrame], list[Problem]] | None = None,
) -> AuditReport:
    """Check a manifest.

    Args:
        manifest: read with `read_manifest(path, check=False)`, so that all faults are reported at once.
        hash_files: also compare the files themselves. Only files of equal size are read.
        pixels: where pixels are read from; default the manifest's own roots.
        hash_pixels: hash the pixels of images that have no hashes yet.
        within: look for near duplicates inside the splits too.
        exposed: further leaks, of the table with its hashes: what starting weights have seen.

    Raises:
        ConfigError: pixels are needed, and the folder of the originals is not there.
    """
    pixels, unread = pixels or Pixels(manifest), []
    if hash_files:
        manifest, missing = _with_hashes(manifest, pixels.roots)
        unread += missing
    if hash_pixels:
        manifest, missing = replace(pixels, manifest=manifest).hashed()
        unread += missing
    frame = manifest.frame
    sided = frame.filter(side().is_not_null())
    hashed = sided.filter(_hashed(sided))
    pairs = find_copies(frame, pixels, within) if hashed.height else None
    positives = positives_table(manifest)
    warnings = [
        *unread,
        *_unhashed(sided),
        *_duplicates(frame),
        *(copies_within_splits(frame, pairs) if pairs is not None else ()),
        *_conflicts(frame, manifest.findings),
        *_hierarchy(frame, manifest.findings),
        *_official(frame),
        *_thin(frame, positives),
    ]
    return AuditReport(
        leaks=(
            *leaks(frame),
            *(copies_across_splits(frame, pairs) if pairs is not None else ()),
            *(exposed(frame) if exposed is not None else ()),
        ),
        warnings=tuple(warnings),
        counts=count_images(frame),
        positives=positives,
        views=frame.group_by("split_project", "view").agg(images=pl.len()).sort("split_project", "view"),
        pairs=pairs,
        compared=hashed.height,
        sided=sided.height,
    )


def _hashed(frame: pl.DataFrame) -> pl.Expr:
    """Whether an image has a perceptual hash, or pixels without any structure, which have none."""
    known = [pl.col(name).is_not_null() for name in ("pixel_sha256", "phash256") if name in frame.columns]
    return pl.any_horizontal(known) if known else pl.lit(value=False)


def _unhashed(sided: pl.DataFrame) -> list[Problem]:
    """Images without hashes where others have them. Those that a build refused are in no store, and leak nowhere."""
    stored = sided
    if "store_shard" in sided.columns and sided["store_shard"].is_not_null().any():
        stored = sided.filter(pl.col("store_shard").is_not_null())
    rows = stored.filter(~_hashed(stored))
    if rows.height in (0, stored.height):
        return []
    return [problem("pixels not compared", "images without hashes of their pixels, not compared (--pixels)", rows)]


def _duplicates(frame: pl.DataFrame) -> list[Problem]:
    found = []
    names = ("image", "path", "file", "pixels")
    keys = {"image_uid": ("image_uid",), **{name: IDENTITIES[name] for name in names}, "origin": ("origin_image",)}
    for name, columns in keys.items():
        if any(column not in frame.columns for column in columns):
            continue
        rows = frame.filter(pl.all_horizontal(pl.col(column).is_not_null() for column in columns))
        repeated = rows.filter(pl.len().over(columns) > 1)
        if repeated.height:
            patients = repeated.filter(pl.struct("dataset", "patient_id").n_unique().over(columns) > 1).height
            under = f", {patients:,} of them under several patients" if patients else ""
            found.append(problem(f"duplicate {name}", f"images that share their {name}{under}", repeated))
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
    return [problem("conflicting labels", f"images of a study whose labels differ within it ({shown})", rows)]


def _hierarchy(frame: pl.DataFrame, findings: Sequence[str]) -> list[Problem]:
    found = []
    for child, parents in IMPLIES.items():
        for parent in parents:
            if child in findings and parent in findings:
                both = (pl.col(label_column(child)) == POSITIVE) & (pl.col(label_column(parent)) == NEGATIVE)
                rows = frame.filter(both)
                if rows.height:
                    found.append(problem("hierarchy", f"{child} is positive and {parent} negative", rows))
    for normal in NORMAL_NAMES:
        others = [name for name in findings if name not in COMPATIBLE_WITH_NORMAL]
        if normal in findings and others:
            abnormal = pl.any_horizontal(pl.col(label_column(name)) == POSITIVE for name in others)
            rows = frame.filter((pl.col(label_column(normal)) == POSITIVE) & abnormal)
            if rows.height:
                found.append(problem("hierarchy", f"{normal} is positive beside another finding", rows))
    return found


def _official(frame: pl.DataFrame) -> list[Problem]:
    if "split_official" not in frame.columns:
        return []
    listed = pl.col("split_official").is_in(["val", "test"]).any().over("dataset", "patient_id")
    rows = frame.filter(listed & (pl.col("split_project") == "train"))
    if not rows.height:
        return []
    message = "in train although the source lists the patient for evaluation: compare no result with that list"
    return [problem("official evaluation images in train", message, rows)]


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


def _with_hashes(manifest: Manifest, overrides: Mapping[str, Path]) -> tuple[Manifest, list[Problem]]:
    """Fill `source_sha256` for files whose size is that of another file; only those can be equal.

    Members of tars have no file of their own, and are left out.
    """
    frame, roots = manifest.frame, {**manifest.roots(), **overrides}
    pairs = frame.select("source_root_key", "source_relpath").iter_rows()
    paths = [roots.get(key, Path(key)) / relpath for key, relpath in pairs]
    own = np.ones(len(paths), bool)
    if "member_offset" in frame.columns:
        own = frame["member_offset"].is_null().to_numpy()
    with ThreadPoolExecutor() as pool:
        sizes = np.array(list(pool.map(_size, paths)), dtype=np.int64)
        values, counts = np.unique(sizes[own], return_counts=True)
        twins = np.flatnonzero(own & np.isin(sizes, values[(counts > 1) & (values >= 0)]))
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
    problems = [problem("unreadable file", "images whose file could not be read", unread)] if unread.height else []
    filled = frame.with_columns(computed.fill_null(known).alias("source_sha256"))
    return Manifest(filled, manifest.findings, manifest.metadata), problems


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
