"""hilum build: decode every image of a manifest once, into a store that training reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hilum.core.config import parse_shard
from hilum.core.errors import ConfigError, StoreError
from hilum.core.tracking import duration, next_step, say
from hilum.data.build import BuildSummary, build_store

BUDGET = 0.01
"""Share of refused images that is an error: more than that is seldom chance."""


def run(
    manifest: Path,
    out: Path,
    size: int = 512,
    encoding: str = "jpeg95",
    shard: str | None = None,
    workers: int | None = None,
    roots: Sequence[str] = (),
    budget: float = BUDGET,
) -> None:
    """Build, print what happened, and fail when too much was refused (after everything is written).

    Args:
        manifest: a manifest.parquet.
        out: the store folder.
        size: pixels of the shorter side.
        encoding: jpeg95, png or raw.
        shard: "i/n", job i of n, counted from 0.
        workers: decoding processes.
        roots: KEY=FOLDER, where the images of a root are now.
        budget: share of refused images above which the command fails.

    Raises:
        StoreError: more than `budget` was refused, or the store cannot be written.
        ConfigError, ManifestError: as `build_store`.
    """
    if not 0 <= budget <= 1:
        raise ConfigError(f"--budget: expected a share between 0 and 1, found {budget}.")
    summary = build_store(manifest, out, size, encoding, workers, parse_shard(shard), _roots(roots))
    for line in describe(summary):
        say(line)
    if summary.refused_share > budget:
        raise StoreError(
            f"{sum(summary.quarantined.values())} of {summary.stored + sum(summary.quarantined.values())} images "
            f"({summary.refused_share:.1%}) were refused; at most {budget:.1%} are accepted. "
            + (f"{out / 'quarantine.csv'} has each with its reason; the rest is stored. " if summary.finished else "")
            + "Repair them and run the command again, or raise --budget."
        )
    if summary.finished:
        next_step(f"hilum pretrain RECIPE --data {out} --out RUN")
    else:
        next_step(f"hilum build {manifest} --out {out}, once the other jobs are through")


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
    lines += [f"  refused, {reason}: {count}" for reason, count in sorted(summary.quarantined.items())]
    lines += [f"  stored, flagged {flag}: {count}" for flag, count in sorted(summary.flagged.items())]
    return lines


def _roots(assignments: Sequence[str]) -> Mapping[str, Path]:
    roots = {}
    for text in assignments:
        key, separator, folder = text.partition("=")
        if not separator or not key or not folder:
            raise ConfigError(f"--root: expected KEY=FOLDER, found {text!r}.")
        roots[key] = Path(folder)
    return roots
