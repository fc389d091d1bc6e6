"""What the options of `hilum combine` mean, for prediction files and for models alike: fixed rules, or rules to try."""

from collections.abc import Sequence
from dataclasses import dataclass

from hilum.core.errors import ConfigError
from hilum.evaluation.composition import Composition
from hilum.evaluation.ensemble import ENSEMBLES
from hilum.evaluation.ensemble_search import Choice, Plan
from hilum.evaluation.learned_views import LearnedViews
from hilum.evaluation.normal_damping import GAMMAS, Damping
from hilum.evaluation.study_rules import AGGREGATIONS, StudyRule

NONE = "none"
"""In place of a damping: none, whatever the models were made with."""
CHOOSE = "choose"
"""In place of a rule: every one is tried on validation."""


@dataclass(frozen=True)
class Rules:
    """Options as typed; None where the user said nothing."""

    study: str | None = None
    """Text of a study rule, or "choose"."""
    ensemble: str | None = None
    """A name in ENSEMBLES, or "choose"."""
    weights: str | None = None
    """One number per member, with commas."""
    normal_damping: str | None = None
    """Text of a damping, "none" or "choose"."""

    def composition(self, default: Composition) -> Composition:
        """Fixed rules; what was not said is as in `default`.

        Raises:
            ConfigError, UnknownNameError: a rule that means nothing, or one that is to be chosen.
        """
        said = {"--study": self.study, "--ensemble": self.ensemble, "--normal-damping": self.normal_damping}
        for option, text in said.items():
            if text == CHOOSE:
                raise ConfigError(f"{option} choose needs --choose: rules are tried together.")
        return Composition(
            StudyRule.parse(self.study) if self.study else default.study,
            self.ensemble or default.ensemble,
            _numbers(self.weights) if self.weights else default.weights,
            _damping(self.normal_damping) if self.normal_damping else default.damping,
        )

    def plan(self, default: Composition) -> Plan:
        """What to try: the rules that were said, every one where "choose" was; of ensemble rules all unless one was.

        Raises:
            ConfigError, UnknownNameError: a rule that means nothing, or weights.
        """
        if self.weights:
            raise ConfigError("--weights gives the weights that --choose would find; leave one of them out.")
        studies = (StudyRule.parse(self.study) if self.study else default.study,) if self.study != CHOOSE else ()
        dampings: tuple[Damping | None, ...] = (default.damping,)
        if self.normal_damping == CHOOSE:
            dampings = (None, *(Damping("power", gamma) for gamma in GAMMAS if gamma))
        elif self.normal_damping:
            dampings = (_damping(self.normal_damping),)
        ensembles = tuple(ENSEMBLES)
        if self.ensemble is not None and self.ensemble != CHOOSE:
            ensembles = (Composition(ensemble=self.ensemble).ensemble,)
        return Plan(studies or tuple(StudyRule.parse(name) for name in AGGREGATIONS), ensembles, dampings)


def _damping(text: str) -> Damping | None:
    return None if text == NONE else Damping.parse(text)


def _numbers(text: str) -> tuple[float, ...]:
    """Weights; of any sum, since only ratios matter."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--weights {text!r}: expected numbers with commas, one per member, as in 2,1.") from error


def tell(choice: Choice, names: Sequence[str]) -> list[str]:
    """What was chosen, what it scores, and what the choice is worth on patients that it has not seen."""
    composition = choice.composition
    weights = composition.weights or [1 / len(choice.members)] * len(choice.members)
    lines = [f"Members alone, validation mAP: {_listed(names, choice.singles, '.4f')}"]
    chosen = [names[place] for place in choice.members]
    lines.append(
        f"Chosen: {_listed(chosen, weights, '.3g', 'weight ')}; studies by {composition.study}, models by "
        f"{composition.ensemble}, damping by Normal {composition.damping or 'none'}; validation mAP {choice.score:.4f}"
    )
    if choice.estimate is None:
        return [*lines, "Too few patients to say what the choice gains on others."]
    e = choice.estimate
    lines.append(
        f"On patients that it had not seen ({e.folds} folds): chosen {e.chosen:.4f}, all members equally "
        f"{e.all_equal:.4f}, best member alone {e.best_single:.4f}. Gain over all equally {e.gain:+.4f}; it looks like "
        f"{e.seen_gain:+.4f} on those it was chosen on"
    )
    if e.gain <= 0:
        lines.append("Choosing gains nothing on unseen patients here: combining all members may be as good, or better.")
    return lines


def tell_views(views: LearnedViews) -> str:
    """What the weights of `learned` are, and what they gain on patients that they have not seen."""
    gain = "not known, too few" if views.held_out_gain is None else f"a gain of {views.held_out_gain:+.4f}"
    return (
        f"Views weigh {views.rule}: mAP {views.score:.4f}, equal weights {views.mean_score:.4f} on what they were "
        f"fitted on; on patients not seen {gain}"
    )


def _listed(names: Sequence[str], values: Sequence[float], form: str, word: str = "") -> str:
    return ", ".join(f"{name} {word}{value:{form}}" for name, value in zip(names, values, strict=True))
