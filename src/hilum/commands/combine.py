"""`hilum combine`: raw prediction files -> the mean over each study's images -> the mean over models -> one file."""

from pathlib import Path

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.tracking import next_step, say
from hilum.evaluation.ensemble import ENSEMBLES
from hilum.evaluation.predictions import read_predictions, write_predictions
from hilum.evaluation.studies import aggregate_studies


def run(
    files: list[Path], out: Path, study: str | None = None, ensemble: str | None = None, unit: str = "image"
) -> None:
    """Combine prediction files; studies first, then models, whatever the order of the options.

    Args:
        files: raw predictions, one file per model.
        out: `.parquet`, `.csv` or `.json`.
        study: a study rule such as "frontal_weighted:0.8", or None.
        ensemble: a name in ENSEMBLES, or None; needed for more than one file.
        unit: image (each keeps its row and carries its study's value) or study (one row each).

    Raises:
        ConfigError: nothing to do, or several files without an ensemble.
        StageError: calibrated input.
        PredictionError: files that do not cover the same items or findings.
    """
    if ensemble is not None and ensemble not in ENSEMBLES:
        raise UnknownNameError("ensemble", ensemble, ENSEMBLES)
    if study is None and ensemble is None:
        raise ConfigError("Nothing to combine: say --study mean, --ensemble mean, or both.")
    if len(files) > 1 and ensemble is None:
        raise ConfigError(f"{len(files)} files become one by an ensemble: say --ensemble mean, or give one file.")
    if unit == "study" and study is None:
        raise ConfigError("One row per study needs a rule for its images: say --study mean.")
    members = [read_predictions(path) for path in files]
    if study is not None:
        members = [aggregate_studies(member, study, unit) for member in members]
        say(f"Images per study: {_histogram(members[0].metadata['images_per_study'])}")
    result = members[0] if ensemble is None else ENSEMBLES[ensemble](members)
    write_predictions(result, out)
    say(f"{out}: {len(result)} {result.unit} rows, {len(result.findings)} findings, stage {result.stage}")
    next_step(f"hilum calibrate {out} --labels STORE --split val --out calibration.json")


def _histogram(sizes: dict[str, int]) -> str:
    return ", ".join(f"{size}: {count} studies" for size, count in sizes.items())
