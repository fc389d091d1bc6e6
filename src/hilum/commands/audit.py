"""`hilum audit`: leaks, duplicates, conflicts, counts and positives by split. A leak is exit status 1."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from hilum.commands.build import parse_roots
from hilum.core.errors import CheckpointError, LeakageError, UnknownNameError
from hilum.core.files import read_json, write_text
from hilum.core.tracking import next_step, say, warn
from hilum.data.audit import AuditReport, audit
from hilum.data.audit_pixels import Pixels
from hilum.data.leaks import Problem, exposed_to_known_weights, known_exposures, seen_by_weights
from hilum.data.schema import Manifest, check_rows, read_manifest
from hilum.data.store import Store

Exposed = Callable[[pl.DataFrame], list[Problem]]


def run(
    manifest: Path,
    hash_files: bool = False,
    hash_pixels: bool = False,
    within: bool = False,
    weights: str | None = None,
    roots: Sequence[str] = (),
    workers: int | None = None,
    evidence: Path | None = None,
) -> None:
    """Check a manifest and print the evidence.

    Args:
        manifest: file made by `hilum manifest`, or the copy in a store, which has the hashes of all pixels.
        hash_files: also compare the files' bytes.
        hash_pixels: also decode images that have no hashes of their pixels, and compare these.
        within: look for near duplicates inside the splits too.
        weights: a RUN or MODEL folder or a weights file in one, or the name of public weights.
        roots: KEY=FOLDER, where the originals of a root are now.
        workers: decoding processes.
        evidence: CSV to write every pair of near duplicates to.

    Raises:
        LeakageError: evaluation material is on the training side, or was seen by the weights.
        ManifestError: the table is inconsistent in another way.
        UnknownNameError: weights that are neither a folder nor known.
        CheckpointError: a folder that does not record what its weights have seen.
    """
    table = read_manifest(manifest, check=False)
    exposed = exposure_of(weights, _sources(table)) if weights else None
    store = Store.open(manifest.parent) if (manifest.parent / "store.json").is_file() else None
    pixels = Pixels(table, parse_roots(roots), store, workers)
    report = audit(table, hash_files, pixels, hash_pixels, within, exposed)
    print_counts(report.counts)
    _print_views(report)
    _print_positives(report)
    _print_problems("Leaks", report.leaks)
    _print_problems("Warnings", report.warnings)
    if evidence is not None:
        pairs = report.pairs if report.pairs is not None else pl.DataFrame()
        write_text(evidence, pairs.write_csv())
        say(f"{pairs.height:,} pairs of near duplicates in {evidence}")
    if report.leaks:
        kinds = ", ".join(dict.fromkeys(problem.kind for problem in report.leaks))
        advice = f"This was accepted: {table.accepted_leak}." if table.accepted_leak else "Make it again."
        raise LeakageError(f"{manifest} leaks ({kinds}). Nothing measured with it would hold. {advice}")
    check_rows(table.frame, str(manifest), table.accepted_leak)
    say("No leak between train, val and test" + (f", nor into {weights}." if weights else "."))
    if weights and not Path(weights).exists():
        say("Of public weights only what is known can be checked: they may have seen more.")
    say(_compared(report))
    next_step(f"hilum build {manifest} --out STORE" if store is None else f"hilum pretrain RECIPE --data {store.path}")


def _compared(report: AuditReport) -> str:
    if report.compared == report.sided:
        return f"All {report.sided:,} images were compared by their pixels too."
    if report.compared:
        return f"{report.compared:,} of {report.sided:,} images were compared by their pixels too."
    return "Ids, paths and hashes were compared, pixels were not: add --pixels, or audit the manifest of a store."


def _sources(table: Manifest) -> dict[str, str]:
    """Dataset -> the source that it was read by; of a manifest of an older version nothing."""
    said = json.loads(table.metadata.get("sources", "{}"))
    return {str(name): str(kind) for name, kind in said.items()}


def exposure_of(weights: str, sources: Mapping[str, str] | None = None) -> Exposed:
    """What tells, for a manifest's table, which of its evaluation images weights have met.

    Args:
        weights: a RUN or MODEL folder, a file in one, or the name of public weights.
        sources: dataset -> the source that it was read by; what is known of public weights is by source.

    Raises:
        UnknownNameError: neither.
        CheckpointError: a folder without a record, or a damaged one.

    Warns where a part of what the weights have met is not recorded.
    """
    from hilum.deploy.model_files import CONFIG_NAME, EXPOSURE_NAME, read_exposure  # torch, only where it is asked for
    from hilum.pretraining.exposure import SEEN_NAME, not_recorded, read_seen

    path = Path(weights)
    if not path.exists():
        known = {fact.weights for fact in known_exposures()}
        if weights.casefold() not in {name.casefold() for name in known}:
            raise UnknownNameError("weights", weights, known)
        return partial(exposed_to_known_weights, weights=weights, sources=sources)
    folder = path if path.is_dir() else path.parent
    if (folder / EXPOSURE_NAME).is_file():
        content = read_json(folder / CONFIG_NAME, CheckpointError)
        met, public = read_exposure(folder, content), content["exposure"].get("weights")
        if public:  # imported: no list of images, only what is known of where it was trained
            warn(f"{folder}: {content['exposure']['not_recorded']}")
            return partial(exposed_to_known_weights, weights=public, sources=sources)
        if said := content["exposure"].get("not_recorded"):
            warn(f"{folder}: {said}; only what is recorded can be compared.")
        used = np.concatenate([met.train, met.val, met.pictures])
        return partial(_of_model, weights=folder.name, pretraining=met.pretraining, used=used)
    if not (folder / SEEN_NAME).is_file():
        raise CheckpointError(
            f"{folder} has neither {SEEN_NAME} nor {EXPOSURE_NAME}, so nothing tells what its weights have seen. Copy "
            "that file from where they were trained; for public weights give their name."
        )
    if missing := not_recorded(folder):
        warn(
            f"{folder} comes from {missing}, and nothing lists which images that was trained on; only what is recorded "
            "can be compared."
        )
    seen = read_seen(folder)
    return partial(seen_by_weights, weights=folder.name, seen=np.concatenate([seen.uids, seen.pictures]))


def _of_model(frame: pl.DataFrame, weights: str, pretraining: np.ndarray, used: np.ndarray) -> list[Problem]:
    """A model has met the images of val, which chose it: for these only pretraining counts."""
    found = seen_by_weights(frame, weights, np.concatenate([pretraining, used]), ("test",))
    return found + seen_by_weights(frame, weights, pretraining, ("val",))


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
        for line in problem.evidence:
            say(f"    {line}")
