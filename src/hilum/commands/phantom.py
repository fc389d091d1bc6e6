"""`hilum phantom`: write synthetic patients in a real source's folder and CSV layout, lesion masks beside them."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from hilum.core.tracking import next_step, say
from hilum.data.phantoms.faults import parse_kinds
from hilum.data.phantoms.layouts import LAYOUTS
from hilum.data.phantoms.writing import write_phantoms


def run(
    out: Path,
    layout: str,
    patients: int,
    seed: int,
    size: int,
    minimum_patients: int,
    workers: int | None,
    faults: str = "",
) -> None:
    """Write the cohort and print what is in it."""
    summary = write_phantoms(out, layout, patients, seed, size, minimum_patients, workers, parse_kinds(faults))
    table = Table(title=f"{summary['patients']} patients, {summary['studies']} studies, {summary['images']} images")
    table.add_column("finding")
    for unit in ("patients", "studies", "images", "masks"):
        table.add_column(unit, justify="right")
    findings = summary["findings"]
    for name in sorted(findings, key=lambda finding: -findings[finding]["images"]):
        table.add_row(name, *(str(findings[name][unit]) for unit in ("patients", "studies", "images", "masks")))
    Console().print(table)
    splits = summary["patients_by_split"]
    say(
        f"Patients: {splits['train']} train, {splits['val']} development, {splits['test']} test. Masks: {out}/masks.csv"
    )
    if "faults" in summary:
        say(f"Faults: {', '.join(summary['faults'])}. What must become of each: {out}/faults.csv")
    next_step(f"hilum manifest {LAYOUTS[layout].source}={out} --out {out}/manifest.parquet")
