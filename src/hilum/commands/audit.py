"""`hilum audit`: leaks, duplicates, conflicts, counts and positives by split. A leak is exit status 1."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from hilum.core.errors import LeakageError
from hilum.core.tracking import next_step, say
from hilum.data.audit import AuditReport, Problem, audit
from hilum.data.schema import check_rows, read_manifest


def run(manifest: Path, hash_files: bool = False) -> None:
    """Check a manifest and print the evidence.

    Args:
        manifest: file made by `hilum manifest`.
        hash_files: also compare the files' bytes.

    Raises:
        LeakageError: evaluation material is on the training side.
        ManifestError: the table is inconsistent in another way.
    """
    table = read_manifest(manifest, check=False)
    report = audit(table, hash_files)
    print_counts(report.counts)
    _print_views(report)
    _print_positives(report)
    _print_problems("Leaks", report.leaks)
    _print_problems("Warnings", report.warnings)
    if report.leaks:
        kinds = ", ".join(problem.kind for problem in report.leaks)
        raise LeakageError(f"{manifest} leaks ({kinds}). Nothing measured with it would hold; make it again.")
    check_rows(table.frame, str(manifest))
    say("No leak between train, val and test.")
    next_step(f"hilum build {manifest} --out STORE")


def print_counts(counts: pl.DataFrame) -> None:
    """Print the table of `count_images`."""
    say(f"{'dataset':<16}{'split':<8}{'images':>9}{'studies':>9}{'patients':>9}{'for SSL':>9}")
    for row in counts.iter_rows(named=True):
        numbers = "".join(f"{row[name]:>9,}" for name in ("images", "studies", "patients", "ssl_ok"))
        say(f"{row['dataset']:<16}{row['split_project'] or '(none)':<8}{numbers}")


def _print_views(report: AuditReport) -> None:
    for split in report.views["split_project"].unique().sort():
        mix = report.views.filter(report.views["split_project"] == split).sort("images", descending=True)
        shown = ", ".join(f"{row['view']} {row['images']:,}" for row in mix.iter_rows(named=True))
        say(f"views, {split or '(none)'}: {shown}")


def _print_positives(report: AuditReport) -> None:
    table = report.positives
    if not table.height:
        return
    splits = list(table["split"].unique(maintain_order=True))
    width = max(map(len, table["finding"])) + 2
    say()
    say(f"{'positives (share, 95 % interval)':<{width}}" + "".join(f"  {split:<28}" for split in splits))
    for (finding,), rows in table.group_by(["finding"], maintain_order=True):
        cells = {row["split"]: _cell(row) for row in rows.iter_rows(named=True)}
        say(f"{finding!s:<{width}}" + "".join(f"  {cells[split]:<28}" for split in splits))


def _cell(row: dict) -> str:
    if not row["known"]:
        return "not labelled"
    return f"{row['positives']:>7,}  {row['prevalence']:6.2%} [{row['low']:.2%}, {row['high']:.2%}]"


def _print_problems(title: str, problems: Sequence[Problem]) -> None:
    if not problems:
        return
    say()
    say(f"{title}:")
    for problem in problems:
        number = f"{problem.count:,} images: " if problem.count else ""
        examples = (
            f" (image_uid {', '.join(problem.examples)}{', ...' if problem.count > len(problem.examples) else ''})"
        )
        say(f"  {number}{problem.message}{examples if problem.examples else ''}")
