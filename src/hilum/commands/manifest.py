"""`hilum manifest`: sources -> one checked table -> splits -> manifest.parquet."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import polars as pl

from hilum.commands.audit import print_counts
from hilum.core.tracking import next_step, say, warn
from hilum.data.audit import count_images, positives_table
from hilum.data.label_maps import LabelPolicy
from hilum.data.labels import frequency_groups
from hilum.data.manifest import ManifestOptions, build_manifest, parse_folders, parse_source
from hilum.data.pools import differences, pools
from hilum.data.schema import Manifest, write_manifest


def run(
    sources: Sequence[str],
    out: Path,
    images: Sequence[str] = (),
    findings: str = "auto",
    split: Literal["auto", "official", "project"] = "auto",
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    allow_missing: bool = False,
    uncertain: Literal["mask", "zero", "one"] = "mask",
    blank: Literal["mask", "zero"] = "mask",
    tables: Sequence[str] = (),
    weak_labels: bool = False,
    imply_negatives: bool = False,
    hierarchy: bool = False,
    pool: str = "",
    accept_leak: bool = False,
) -> None:
    """Make a manifest of one or more `SOURCE=ROOT` and print what is in it.

    Args:
        sources: "nih=/data/nih", "cxrlt=/data/cxr-lt", "folder:clinic=/data/clinic".
        out: the file to write.
        images: "DATASET=FOLDER" where images lie apart from their tables.
        findings: "auto", the name of a list ("cxrlt2024-task1", "nih"), or names separated by commas.
        split: "official", "project" (by patient, stratified), or "auto".
        val_fraction: share for val; default 0.1.
        test_fraction: share for test; default 0.2.
        seed: of the split.
        allow_missing: leave out listed images that are not there.
        uncertain: what a source's own uncertain becomes.
        blank: what an empty label cell becomes.
        tables: "DATASET=CSV", a table in place of the one that the source looks for (labels.csv of a folder).
        weak_labels: also believe the hints of the label tables.
        imply_negatives: normal images are negative for every finding that their source could have named.
        pool: name of a pool, in place of `split` and the fractions.
        accept_leak: take a pool that leaks by design.
        hierarchy: fill unknown findings from their relatives (not for CXR-LT).
    """
    options = ManifestOptions(
        findings=findings,
        split=split,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
        allow_missing=allow_missing,
        policy=LabelPolicy(uncertain, blank, "weak" if weak_labels else "strict", imply_negatives, hierarchy),
        images=parse_folders(images, "--images"),
        tables=parse_folders(tables, "--table"),
        pool=pool,
        accept_leak=accept_leak,
    )
    manifest, notes = build_manifest([parse_source(text) for text in sources], options)
    write_manifest(manifest, out)
    for note in notes:
        warn(note)
    describe(manifest)
    if pool:
        _print_pool(manifest)
    next_step(f"hilum audit {out}")


def _print_pool(manifest: Manifest) -> None:
    """Found against expected, source by source."""
    chosen, found = pools()[manifest.metadata["pool"]], json.loads(manifest.metadata["pool_counts"])
    say(f"pool {chosen.name}:")
    rows = differences(chosen, found)
    for row in rows:
        cause = f"  {row.cause}" if row.cause else ""
        say(f"  {row.source:<12}{row.found:>9,} of {row.expected:>9,}  ({row.found - row.expected:+,}){cause}")
    total = sum(row.found for row in rows)
    say(f"  {'together':<12}{total:>9,} of {chosen.expected:>9,}  ({total - chosen.expected:+,})")
    if manifest.accepted_leak:
        warn(f"leak accepted: {manifest.accepted_leak}")


def describe(manifest: Manifest) -> None:
    """Print counts by dataset and split, and findings by frequency."""
    print_counts(count_images(manifest.frame))
    if not manifest.findings:
        say("No labels: the images can be used for pretraining.")
        return
    table = positives_table(manifest).filter(pl.col("split") == "train")
    positives = dict(table.select("finding", "positives").iter_rows())
    groups = frequency_groups(positives, int((manifest.frame["split_project"] == "train").sum()))
    for group in ("head", "medium", "tail"):
        members = sorted((name for name in groups if groups[name] == group), key=lambda name: -positives[name])
        if members:
            shown = ", ".join(f"{name} {positives[name]:,}" for name in members)
            say(f"{group} ({len(members)} findings, positive training images): {shown}")
