"""`hilum combine MODEL MODEL ... --out ENSEMBLE`: several models as one, with calibrators of its own."""

from pathlib import Path

from hilum.core.tracking import next_step, say
from hilum.deploy.ensemble_model import combine_models


def run(models: list[Path], out: Path) -> None:
    """Write an ensemble directory; `hilum.load` and `hilum predict` take it like a model.

    Args:
        models: two or more MODEL directories, validated on the same images.
        out: a new directory.

    Raises:
        ConfigError, CheckpointError, PredictionError, StageError: as `deploy.ensemble_model.combine_models`.
    """
    combine_models(models, out)
    say(f"{out}: an ensemble of {len(models)} models, calibrated on their validation predictions")
    next_step(f"hilum predict {out} STORE:test --out test.parquet")
