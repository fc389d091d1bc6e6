"""How predictions of images by one or several networks become a model's predictions, in the one order there is.

mean over the images of a study -> mean over models -> damping by Normal; calibration comes after. What is applied to a
test image and what a calibrator is fitted on go through the same function, so they cannot differ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.evaluation.ensemble import ENSEMBLES, check_weights, combine_members
from hilum.evaluation.normal_damping import Damping
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.ranks import Ranks
from hilum.evaluation.studies import aggregate_studies
from hilum.evaluation.study_rules import MEAN, StudyRule


@dataclass(frozen=True)
class Composition:
    """The steps between raw image predictions and a calibrator.

    Raises:
        UnknownNameError: no such ensemble rule.
        ConfigError: weights that mean nothing.
    """

    study: StudyRule = MEAN
    """How the images of a study become one value, where a row is a study."""
    ensemble: str = "mean"
    """How the members become one, a name in ENSEMBLES."""
    weights: tuple[float, ...] | None = None
    """One per member; None: equal."""
    damping: Damping | None = None
    """How Normal damps the others; None: not at all."""
    ranks: Mapping[str, tuple[Ranks, ...]] = field(default_factory=dict)
    """By unit, where the scores of each member stand on validation; needed for `rank_mean` of two or more."""

    def __post_init__(self) -> None:
        if self.ensemble not in ENSEMBLES:
            raise UnknownNameError("ensemble", self.ensemble, ENSEMBLES)
        if self.weights is not None:
            check_weights(self.weights, len(self.weights))

    def apply(self, members: Sequence[Predictions], unit: str = "image") -> Predictions:
        """Raw image predictions, one per network, as one table of images or of studies, not yet calibrated.

        Raises:
            ConfigError: `rank_mean` without the members' ranks, or another number of weights than of members.
            StageError, PredictionError: as the steps.
        """
        self._check(len(members), unit)
        if unit == "study":
            members = [aggregate_studies(member, self.study, unit) for member in members]
        combined = members[0]
        if len(members) > 1:
            combined = combine_members(members, self.ensemble, self.weights, self.ranks.get(unit))
        return self.damping.apply(combined) if self.damping else combined

    def describe(self) -> dict[str, Any]:
        """Plain values for a `config.json`; the ranks are kept in a file of their own."""
        return {
            "study": str(self.study),
            "ensemble": self.ensemble,
            "member_weights": list(self.weights) if self.weights is not None else None,
            "normal_damping": str(self.damping) if self.damping else None,
        }

    @classmethod
    def read(cls, content: Mapping[str, Any], ranks: Mapping[str, tuple[Ranks, ...]] | None = None) -> "Composition":
        """The inverse of `describe`; what is not there is the default.

        Raises:
            ConfigError, UnknownNameError: an entry that means nothing.
        """
        weights, damping = content.get("member_weights"), content.get("normal_damping")
        return cls(
            study=StudyRule.parse(content.get("study", "mean")),
            ensemble=content.get("ensemble", "mean"),
            weights=tuple(weights) if weights is not None else None,
            damping=Damping.parse(damping) if damping else None,
            ranks=ranks or {},
        )

    def _check(self, count: int, unit: str) -> None:
        if unit not in ("image", "study"):
            raise UnknownNameError("unit", unit, ("image", "study"))
        check_weights(self.weights, count)
        if self.ensemble == "rank_mean" and count > 1 and unit not in self.ranks:
            raise ConfigError(
                "A mean of ranks needs to know where each member's scores stand, from validation; without that an "
                "image's rank would depend on the others that are predicted with it."
            )


def ranks_of(members: Sequence[Predictions], study: StudyRule) -> dict[str, tuple[Ranks, ...]]:
    """The ranks of members' raw validation predictions, for images and for studies."""
    studies = [aggregate_studies(member, study, "study") for member in members]
    return {
        "image": tuple(Ranks.of(member) for member in members),
        "study": tuple(Ranks.of(study_rows) for study_rows in studies),
    }
