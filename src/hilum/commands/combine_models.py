"""`hilum combine MODEL MODEL ... --out ENSEMBLE`: several models as one, with calibrators of its own."""

from pathlib import Path

from hilum.core.errors import ConfigError
from hilum.core.tracking import next_step, say
from hilum.deploy.ensemble_model import combine_models


def run(
    models: list[Path], out: Path, study: str | None = None, ensemble: str | None = None, unit: str = "image"
) -> None:
    """Write an ensemble directory; `hilum.load` and `hilum predict` take it like a model.

    Args:
        models: two or more MODEL directories, validated on the same images.
        out: a new directory.
        study: "mean", or None for the same.
        ensemble: "mean", or None for the same.
        unit: "image" only; an ensemble has calibrators for both, and `hilum predict --study` chooses.

    Raises:
        ConfigError: options for prediction files; and as below.
        CheckpointError, PredictionError, StageError: as `deploy.ensemble_model.combine_models`.
    """
    if study not in (None, "mean") or ensemble not in (None, "mean") or unit != "image":
        raise ConfigError(
            "Models are joined by means over the images of a study and over models, for images and for studies: "
            "leave out --study, --ensemble and --unit, and choose with hilum predict --study mean."
        )
    combine_models(models, out)
    say(f"{out}: an ensemble of {len(models)} models, calibrated on their validation predictions")
    next_step(f"hilum predict {out} STORE:test --out test.parquet")
