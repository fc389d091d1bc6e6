"""hilum build: decode every image of a manifest once, into a store that training reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hilum.core.config import parse_shard
from hilum.core.errors import ConfigError, StoreError
from hilum.core.tracking import duration, next_step, say
from hilum.data.build import BuildSummary, build_store
from hilum.data.greys import Greys, apart
from hilum.data.intensity import EQUALISED, PREPROCESS_ID
from hilum.data.shards import IN_PLACE

SHOWN = 10
"""Pairs of datasets whose greys are compared in print."""
BUDGET = 0.01
"""Share of refused images that is an error: more than that is seldom chance."""


def run(
    manifest: Path,
    out: Path,
    size: int = 512,
    encoding: str | None = None,
    shard: str | None = None,
    workers: int | None = None,
    roots: Sequence[str] = (),
    budget: float = BUDGET,
    in_place: bool = False,
    intensity: str = PREPROCESS_ID,
    checksums: bool = True,
) -> None:
    """Build, print what happened, and fail when too much was refused (after everything is written).

    Args:
        manifest: a manifest.parquet.
        out: the store folder.
        size: pixels of the shorter side.
        encoding: jpeg95 (default), png or raw.
        shard: "i/n", job i of n, counted from 0.
        workers: decoding processes.
        roots: KEY=FOLDER, where the images of a root are now.
        budget: share of refused images above which the command fails.
        in_place: store no pixels; check every file once, and read it where it is from then on.
        intensity: recipe for DICOM and more than 8 bits; models trained on the store keep to it.
        checksums: compare files with the SHA256SUMS.txt of their root, where there is one.

    Raises:
        StoreError: more than `budget` was refused, or the store cannot be written.
        ConfigError, ManifestError: as `build_store`.
    """
    if not 0 <= budget <= 1:
        raise ConfigError(f"--budget: expected a share between 0 and 1, found {budget}.")
    if in_place and encoding is not None:
        raise ConfigError(f"--in-place stores no pixels, so there is nothing to encode as {encoding!r}. Choose one.")
    chosen = IN_PLACE if in_place else encoding or "jpeg95"
    summary = build_store(
        manifest, out, size, chosen, workers, parse_shard(shard), parse_roots(roots), intensity=intensity,
        checksums=checksums,
    )  # fmt: skip
    for line in describe(summary):
        say(line)
    check_budget(summary, out, budget)
    if summary.finished and summary.quarantined:
        say(f"  each with its reason: {out / 'quarantine.csv'}")
    if summary.finished:
        next_step(f"hilum pretrain RECIPE --data {out} --out RUN")
    else:
        next_step(f"hilum build {manifest} --out {out}, once the other jobs are through")


def check_budget(summary: BuildSummary, out: Path, budget: float) -> None:
    """Raise StoreError where more than `budget` of the images was refused."""
    if summary.refused_share > budget:
        raise StoreError(
            f"{sum(summary.quarantined.values())} of {summary.stored + sum(summary.quarantined.values())} images "
            f"({summary.refused_share:.1%}) were refused; at most {budget:.1%} are accepted. "
            + (f"{out / 'quarantine.csv'} has each with its reason; the rest is stored. " if summary.finished else "")
            + "Repair them and run the command again, or raise --budget."
        )


def describe(summary: BuildSummary) -> list[str]:
    """The summary in lines for people."""
    refused = sum(summary.quarantined.values())
    images = f"{summary.inputs} images in the manifest"
    if not summary.finished:
        images += f", {summary.stored + refused} in the shards of this job"
    lines = [
        f"{images}: {summary.stored} stored, {refused} in quarantine.",
        f"{summary.shards} shards ({summary.shards_kept} already there), {summary.bytes / 1e6:.1f} MB, "
        f"{duration(summary.seconds)}.",
    ]
    lines += [
        f"  published checksums of {key}: {listed} images compared, {unlisted} not listed"
        for key, (listed, unlisted) in sorted(summary.checksums.items())
    ]
    lines += [f"  refused, {reason}: {count}" for reason, count in sorted(summary.quarantined.items())]
    lines += [f"  stored, flagged {flag}: {count}" for flag, count in sorted(summary.flagged.items())]
    return lines + describe_greys(summary.greys, summary.intensity)


def describe_greys(datasets: Mapping[str, Greys], recipe: str) -> list[str]:
    """How far apart the datasets of a store are by their greys, and whether some are histogram-equalised."""
    pairs = apart(datasets)
    lines = [f"  greys, {one} and {other}: {levels:.1f} of 255 levels apart" for levels, one, other in pairs[:SHOWN]]
    if len(pairs) > SHOWN:
        lines.append(f"  greys: {len(pairs) - SHOWN} other pairs are nearer")
    even = sorted(name for name, greys in datasets.items() if greys.images and greys.equalised)
    plain = sorted(name for name, greys in datasets.items() if greys.images and not greys.equalised)
    if even and plain:
        lines.append(
            f"Histogram-equalised: {', '.join(even)}; not: {', '.join(plain)}. A network can tell them apart by their "
            "greys alone. Files of 8 bits are kept as they were published; docs/reference/images.md says what can be "
            "done."
        )
    if even and recipe == PREPROCESS_ID:
        lines.append(
            f"{', '.join(even)}: histogram-equalised before publication. A model trained on this store will be shown "
            f"DICOM by {recipe}, which does not equalise. Where it is to read DICOM, build with --intensity "
            f"{' or '.join(EQUALISED)}."
        )
    return lines


def parse_roots(assignments: Sequence[str]) -> Mapping[str, Path]:
    """Folders by root key, from KEY=FOLDER.

    Raises:
        ConfigError: another form, or a key twice.
    """
    roots: dict[str, Path] = {}
    for text in assignments:
        key, separator, folder = text.partition("=")
        if not separator or not key or not folder:
            raise ConfigError(f"--root: expected KEY=FOLDER, found {text!r}.")
        if key in roots:
            raise ConfigError(f"--root: {key} is given twice ({roots[key]} and {folder}). Keep one.")
        roots[key] = Path(folder)
    return roots
