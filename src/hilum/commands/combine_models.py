"""`hilum combine MODEL MODEL ... --out ENSEMBLE`: several models as one, with calibrators of its own.

With `--choose`, the members, their weights and the rules that are best on validation. One model alone may be given
another study rule, or damping by Normal.
"""

from pathlib import Path

from hilum.commands.combine_options import Rules, tell, tell_views
from hilum.core.errors import ConfigError
from hilum.core.tracking import next_step, progress, say
from hilum.deploy.ensemble_model import combine_models, inherited
from hilum.evaluation.ensemble_search import steps_of


def run(
    models: list[Path],
    out: Path,
    study: str | None = None,
    ensemble: str | None = None,
    unit: str = "image",
    weights: str | None = None,
    normal_damping: str | None = None,
    choose: bool = False,
    labels: Path | None = None,
    split: str | None = None,
) -> None:
    """Write an ensemble directory; `hilum.load` and `hilum predict` take it like a model.

    Args:
        models: two or more MODEL directories, validated on the same images.
        out: a new directory.
        study: a study rule; None: the members'. `learned` is fitted on validation. With `choose` also "choose".
        ensemble: a name in ENSEMBLES; None: "mean". With `choose`, None tries every one.
        unit: "image" only; an ensemble has calibrators for both, and `hilum predict --study` chooses.
        weights: one number per member, with commas; None: equal.
        normal_damping: such as "power:0.5", or "none"; None: the members'. With `choose` also "choose".
        choose: find members, weights and rules on validation.
        labels: None only; models bring their own validation labels.
        split: None or "val" only, for the same reason.

    Raises:
        ConfigError: options for prediction files, or that mean nothing; and as below.
        CheckpointError, PredictionError, StageError: as `deploy.ensemble_model.combine_models`.
    """
    if unit != "image":
        raise ConfigError(
            "An ensemble of models has calibrators for images and for studies: leave out --unit, and say hilum predict "
            "--study own for one row per study."
        )
    if labels is not None or split not in (None, "val"):
        raise ConfigError("Models bring the labels of their own validation: leave out --labels and --split.")
    said = {key for key, text in (("study", study), ("normal_damping", normal_damping)) if text}
    rules, default = Rules(study, ensemble, weights, normal_damping), inherited(models, said)
    if not choose:
        made = combine_models(models, out, rules.composition(default))
        say(f"{out}: an ensemble of {len(models)} models, calibrated on their validation predictions")
    else:
        plan = rules.plan(default)
        with progress("choose", steps_of(plan), "searches") as bar:
            made = combine_models(models, out, plan=plan, done=bar.advance)
        assert made.choice is not None
        for line in tell(made.choice, [str(path) for path in models]):
            say(line)
        say(f"{out}: an ensemble of {len(made.content['members'])} of {len(models)} models, calibrated on validation")
    if made.views:
        say(tell_views(made.views))
    next_step(f"hilum predict {out} STORE:test --out test.parquet")
