"""Which models make the best ensemble, with what weights and by which rules: chosen on validation, judged beside it.

Few members: every subset, weighed equally. Many: greedy forward selection with replacement (Caruana et al., "Ensemble
selection from libraries of models", ICML 2004), whose repeats are the weights. The criterion is macro AP per image of
study values, what the CXR-LT challenge scores. The same choice is made again on folds of patients and judged on the
patients left out, so that what it gains is not what it gains by having looked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Int

from hilum.core.errors import ConfigError
from hilum.evaluation.composition import Composition, ranks_of
from hilum.evaluation.ensemble import ENSEMBLES, combine_members
from hilum.evaluation.folds import FOLDS, patient_splits
from hilum.evaluation.learned_views import fit_views
from hilum.evaluation.member_selection import LEAST_GAIN, Mixture, select_members
from hilum.evaluation.normal_damping import Damping
from hilum.evaluation.predictions import Predictions, column_indices
from hilum.evaluation.study_rules import MEAN, StudyRule


@dataclass(frozen=True)
class Plan:
    """What is tried. The first of each list wins ties."""

    studies: tuple[StudyRule, ...] = (MEAN,)
    """Rules for the images of a study; `learned` without weights is fitted."""
    ensembles: tuple[str, ...] = tuple(ENSEMBLES)
    """Names in ENSEMBLES."""
    dampings: tuple[Damping | None, ...] = (None,)
    """Ways to damp by Normal."""
    folds: int = FOLDS
    """Of patients, for the estimate; below 2 for none."""
    seed: int = 0
    """How patients are dealt out."""


@dataclass(frozen=True)
class Estimate:
    """Mean macro AP over folds of patients that the choice had not seen: its own, and of what it is up against."""

    folds: int
    chosen: float
    """What was chosen on the other folds."""
    all_equal: float
    """All members weighed equally, by the first rules of the plan."""
    best_single: float
    """The member that was best on the other folds."""
    seen_gain: float
    """What the choice on all of validation gains over `all_equal` there: the same images, so too much."""
    members: tuple[tuple[str, ...], ...]
    """What each fold chose: where they differ, the choice is chance."""

    @property
    def gain(self) -> float:
        """What choosing gains over all members weighed equally, on unseen patients."""
        return self.chosen - self.all_equal

    @property
    def optimism(self) -> float:
        """How much of the apparent gain comes from having looked."""
        return self.seen_gain - self.gain


@dataclass(frozen=True)
class Choice:
    """The best ensemble found.

    Args:
        members: positions, of the members given.
        composition: for those members, in that order.
        score: macro AP on all of validation.
        singles: the same of every member alone, by the first rules of the plan.
        tried: (study, ensemble, damping, positions, weights, macro AP) of the best of every combination of rules.
        estimate: on unseen patients; None where there are too few.
    """

    members: tuple[int, ...]
    composition: Composition
    score: float
    singles: tuple[float, ...]
    tried: tuple[dict[str, Any], ...]
    estimate: Estimate | None

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        """Plain values for a `config.json`: how the choice was made, and what it is worth."""
        found: dict[str, Any] = {
            "criterion": "macro average precision per image of study values, validation",
            "score": self.score,
            "singles": dict(zip(names, self.singles, strict=True)),
            "members": [names[place] for place in self.members],
            "tried": [one | {"members": [names[place] for place in one["members"]]} for one in self.tried],
        }
        if self.estimate:
            e = self.estimate
            found["unseen_patients"] = {
                "folds": e.folds, "chosen": e.chosen, "all_equal": e.all_equal, "best_single": e.best_single,
                "gain": e.gain, "seen_gain": e.seen_gain, "optimism": e.optimism,
                "members": [list(one) for one in e.members],
            }  # fmt: skip
        return found


def choose_ensemble(
    members: Sequence[Predictions],
    labels: Int[np.ndarray, "N C"],
    names: Sequence[str],
    plan: Plan | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> Choice:
    """The best ensemble of these members by this plan.

    Args:
        members: raw validation predictions of images, out of sample (the caller sees to that), of the same images.
        labels: codes, rows and columns as those of the first member.
        names: one per member, for the record.
        plan: what is tried; None: the mean over studies, every ensemble rule, no damping.
        done: told after each of `steps_of(plan)` searches.

    Raises:
        PredictionError: members that do not cover the same images or findings, or no finding has a positive.
        StageError: members that are not raw.
        ConfigError: two members of the same name, or a plan without rules.
    """
    plan = plan or Plan()
    if len(set(names)) < len(names) or len(names) != len(members) or not members:
        raise ConfigError(f"An ensemble is chosen among distinct members; found {', '.join(names) or 'none'}.")
    if not (plan.studies and plan.ensembles and plan.dampings):
        raise ConfigError("A choice needs at least one study rule, one ensemble rule and one way of damping.")
    combine_members(members)  # refuses what does not belong together
    first = members[0]
    aligned = [_aligned(first, member) for member in members]
    everything = np.arange(len(first))
    found = _search(aligned, labels, everything, plan, done)
    best = _best(found)
    singles = _singles(aligned, labels, everything, plan)
    baseline = _judge(aligned, labels, everything, everything, _equal(len(members), plan))
    estimate = _estimate(aligned, labels, names, plan, best.score - baseline, done)
    kept = tuple(np.flatnonzero(best.weights).tolist())
    chosen = [aligned[place] for place in kept]
    shares = best.weights[list(kept)]
    composition = Composition(
        best.study, best.ensemble if len(kept) > 1 else "mean",
        None if np.ptp(shares) == 0 else tuple(float(one) for one in shares / shares.sum()), best.damping,
        ranks_of(chosen, best.study) if best.ensemble == "rank_mean" and len(kept) > 1 else {},
    )  # fmt: skip
    tried = tuple(one.describe() for one in found)
    return Choice(kept, composition, best.score, singles, tried, estimate)


def steps_of(plan: Plan) -> int:
    """How many searches a choice takes."""
    return len(plan.studies) * len(plan.ensembles) * (1 + max(plan.folds, 0) * (plan.folds > 1))


@dataclass(frozen=True)
class _Found:
    """One combination of rules with its best weights, one per member."""

    study: StudyRule
    ensemble: str
    damping: Damping | None
    weights: np.ndarray
    score: float

    def describe(self) -> dict[str, Any]:
        kept = np.flatnonzero(self.weights).tolist()
        return {
            "study": str(self.study), "ensemble": self.ensemble,
            "normal_damping": str(self.damping) if self.damping else None, "members": kept,
            "weights": [float(self.weights[place]) for place in kept], "score": self.score,
        }  # fmt: skip


def _aligned(first: Predictions, member: Predictions) -> Predictions:
    """A member's rows and columns in the order of the first one's."""
    columns = column_indices(member.findings, first.findings, "a member of the ensemble")
    return first.replace(member.probabilities[member.places(first.image_uid)][:, columns])


def _search(
    members: Sequence[Predictions], labels: np.ndarray, rows: np.ndarray, plan: Plan, done: Callable[[int], None]
) -> list[_Found]:
    """The best members and weights by every combination of rules, in the order of the plan."""
    found = []
    studies = [_fitted(study, members, labels, rows) for study in plan.studies]
    for study, ensemble in product(studies, plan.ensembles):
        mixture = Mixture(members, labels, rows, rows, study, ensemble)
        weights, score = select_members(mixture.score, len(members))
        found.append(_Found(study, ensemble, None, weights, score))
        dampings = [one for one in plan.dampings if one is not None]
        found += [_Found(study, ensemble, one, weights, mixture.score(weights, one)) for one in dampings]
        if None not in plan.dampings:
            found = [one for one in found if one.damping is not None]
        done(1)
    return found


def _best(found: Sequence[_Found]) -> _Found:
    best = found[0]
    for one in found[1:]:
        fewer = np.count_nonzero(one.weights) < np.count_nonzero(best.weights)
        if one.score > best.score + LEAST_GAIN or (fewer and one.score >= best.score):
            best = one
    return best


def _fitted(study: StudyRule, members: Sequence[Predictions], labels: np.ndarray, rows: np.ndarray) -> StudyRule:
    """A rule with its weights; those of `learned` are fitted on the mean of all members."""
    if not study.needs_fit:
        return study
    together = members[0].replace(combine_members(members).probabilities)
    return fit_views(together.rows(rows), labels[rows], folds=0).rule


def _equal(count: int, plan: Plan) -> _Found:
    """All members weighed equally, by the first rules that need no fitting."""
    study = next((one for one in plan.studies if not one.needs_fit), MEAN)
    return _Found(study, plan.ensembles[0], plan.dampings[0], np.ones(count), 0.0)


def _singles(members: Sequence[Predictions], labels: np.ndarray, rows: np.ndarray, plan: Plan) -> tuple[float, ...]:
    base = _equal(len(members), plan)
    mixture = Mixture(members, labels, rows, rows, base.study, "mean")
    return tuple(mixture.score(weights, base.damping) for weights in np.eye(len(members)))


def _judge(
    members: Sequence[Predictions], labels: np.ndarray, rows: np.ndarray, seen: np.ndarray, found: _Found
) -> float:
    """What was found on the rows `seen` is worth on `rows`."""
    return Mixture(members, labels, rows, seen, found.study, found.ensemble).score(found.weights, found.damping)


def _estimate(
    members: Sequence[Predictions],
    labels: np.ndarray,
    names: Sequence[str],
    plan: Plan,
    seen_gain: float,
    done: Callable[[int], None],
) -> Estimate | None:
    """The whole choice again without each fold of patients, judged on that fold."""
    scores, chosen = [], []
    for inside, outside in patient_splits(members[0], plan.folds, plan.seed):
        positive = [(labels[rows] == 1).any(axis=0) & members[0].trained for rows in (inside, outside)]
        if not all(part.any() for part in positive):
            continue
        best = _best(_search(members, labels, inside, plan, done))
        alone = np.eye(len(members))[int(np.argmax(_singles(members, labels, inside, plan)))]
        base = _equal(len(members), plan)
        single = _Found(base.study, "mean", base.damping, alone, 0.0)
        scores.append([_judge(members, labels, outside, inside, one) for one in (best, base, single)])
        chosen.append(tuple(names[place] for place in np.flatnonzero(best.weights).tolist()))
    if len(scores) < 2:
        return None
    of_choice, of_all, of_single = np.mean(scores, axis=0).tolist()
    return Estimate(len(scores), of_choice, of_all, of_single, seen_gain, tuple(chosen))
