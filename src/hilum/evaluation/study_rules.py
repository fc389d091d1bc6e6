"""How the images of a study become one value: named rules, each a weight for every image, on probabilities or log-odds.

A rule looks at the views of a study and at nothing else of it, so its weights can be shown beside a result. Which rows
form a study is `studies.py`'s business; how the weights of `learned` are found is `learned_views.py`'s.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit, logit

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.types import FRONTAL_VIEWS, VIEW_KINDS, view_kind

SMALLEST = 2.0**-53
"""Log-odds are taken of probabilities held this far from 0 and 1, so that a certain image has a finite say."""

Parameters = Mapping[str, float]
Weigh = Callable[[np.ndarray, np.ndarray, Parameters], np.ndarray]


def equal(views: np.ndarray, starts: Int[np.ndarray, " S"], parameters: Parameters) -> Float[np.ndarray, " N"]:
    """Every image counts the same."""
    del starts, parameters
    return np.ones(len(views))


def by_frontal(views: np.ndarray, starts: Int[np.ndarray, " S"], parameters: Parameters) -> Float[np.ndarray, " N"]:
    """The frontal images of a study together weigh `frontal`, the others together the rest; one kind alone weighs all.

    Frontal are PA, AP and AP_SUPINE. An unknown view is one of the others: it cannot be told from a lateral one.
    """
    frontal = np.isin(views, sorted(FRONTAL_VIEWS))
    sizes = np.diff(np.append(starts, len(views)))
    in_study = np.repeat(np.add.reduceat(frontal.astype(np.int64), starts), sizes)
    others = np.repeat(sizes, sizes) - in_study
    share = np.where(frontal, parameters["frontal"], 1 - parameters["frontal"])
    return np.where((in_study == 0) | (others == 0), 1.0, share / np.where(frontal, in_study, others))


def by_kind(views: np.ndarray, starts: Int[np.ndarray, " S"], parameters: Parameters) -> Float[np.ndarray, " N"]:
    """Each image weighs as its kind of view (`core.types.VIEW_KINDS`); where all of a study weigh 0, all weigh 1."""
    of_kind = np.array([parameters[kind] for kind in VIEW_KINDS])
    names, place = np.unique(views, return_inverse=True)
    weights = of_kind[[view_kind(name) for name in names.tolist()]][place]
    sizes = np.diff(np.append(starts, len(views)))
    nothing = np.repeat(np.add.reduceat(weights, starts), sizes) == 0
    return np.where(nothing, 1.0, weights)


class Aggregation(NamedTuple):
    """One kind of rule.

    Args:
        weigh: (views (N,), first row of each study (S,), parameters) -> weights (N,), not negative.
        parameters: names and defaults; None: a value that has to be given, or fitted.
        logits: whether log-odds are averaged instead of probabilities.
    """

    weigh: Weigh
    parameters: Mapping[str, float | None]
    logits: bool = False


AGGREGATIONS: dict[str, Aggregation] = {
    "mean": Aggregation(equal, {}),
    "logit_mean": Aggregation(equal, {}, logits=True),
    "frontal_then_rest": Aggregation(lambda views, starts, _: by_frontal(views, starts, {"frontal": 0.5}), {}),
    "frontal_weighted": Aggregation(by_frontal, {"frontal": 0.8}),
    "learned": Aggregation(by_kind, dict.fromkeys(VIEW_KINDS)),
}
"""mean: CXR-LT 2024 slides, "Average aggregation". frontal_then_rest: mean within the frontal images, mean within the
others, mean of the two (yamagishi0824/cxrlt24-multiview-pp). frontal_weighted: the same with weights 8 : 2, which were
the best of that entry's ensemble (arXiv 2410.10710). learned: a weight per kind of view, fitted on validation."""


@dataclass(frozen=True)
class StudyRule:
    """A rule with its parameters.

    Raises:
        UnknownNameError: no such rule, or parameter of it.
        ConfigError: a parameter that is missing or out of range.
    """

    name: str = "mean"
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Those that differ from the rule's defaults, or all."""

    def __post_init__(self) -> None:
        if self.name not in AGGREGATIONS:
            raise UnknownNameError("study aggregation", self.name, AGGREGATIONS)
        defaults = AGGREGATIONS[self.name].parameters
        for key in self.parameters:
            if key not in defaults:
                raise UnknownNameError(f"parameter of study aggregation {self.name!r}", key, defaults)
        filled = {key: self.parameters.get(key, value) for key, value in defaults.items()}
        object.__setattr__(self, "parameters", {key: value for key, value in filled.items() if value is not None})
        for key, value in self.parameters.items():
            if not math.isfinite(value) or value < 0 or (key == "frontal" and value > 1):
                upper = " and at most 1" if key == "frontal" else ""
                raise ConfigError(f"Study rule {self.name!r}: {key} is a weight of at least 0{upper}; found {value!r}.")
        if self.name == "learned" and self.parameters and not any(self.parameters.values()):
            raise ConfigError("Study rule 'learned': at least one kind of view needs a weight above 0.")

    @classmethod
    def parse(cls, text: str) -> "StudyRule":
        """A rule from its text: `mean`, `frontal_weighted:0.8`, `learned:PA=1,AP=1,lateral=0.4,other=1`.

        `learned` without weights is a request to fit them (`needs_fit`).

        Raises:
            UnknownNameError, ConfigError: as above, or a text that is not of this form.
        """
        name, colon, rest = text.partition(":")
        if name not in AGGREGATIONS:
            raise UnknownNameError("study aggregation", name, AGGREGATIONS)
        names = list(AGGREGATIONS[name].parameters)
        parameters = {}
        for part in rest.split(",") if colon else ():
            key, equals, value = part.partition("=")
            if not equals and len(names) == 1:
                key, value = names[0], part
            try:
                parameters[key.strip()] = float(value)
            except ValueError as error:
                form = f"{name}:0.8" if len(names) == 1 else f"{name}:" + ",".join(f"{one}=1" for one in names)
                raise ConfigError(f"Study rule {text!r}: expected {form if names else name}.") from error
        missing = [one for one in names if one not in parameters and AGGREGATIONS[name].parameters[one] is None]
        if colon and missing:
            raise ConfigError(f"Study rule {text!r} lacks a weight for {', '.join(missing)}.")
        return cls(name, parameters)

    def __str__(self) -> str:
        """The text that `parse` reads back to the same bits."""
        if not self.parameters:
            return self.name
        if len(self.parameters) == 1:
            return f"{self.name}:{next(iter(self.parameters.values()))!r}"
        return f"{self.name}:" + ",".join(f"{key}={float(value)!r}" for key, value in self.parameters.items())

    @property
    def needs_fit(self) -> bool:
        """Whether its weights have still to be fitted on validation."""
        return len(self.parameters) < len(AGGREGATIONS[self.name].parameters)

    def weights(self, views: np.ndarray, starts: Int[np.ndarray, " S"]) -> Float[np.ndarray, " N"]:
        """What each image contributes to its study; those of a study add up to 1.

        Args:
            views: (N,) text, sorted by study.
            starts: first row of each study.
        """
        raw = self._raw(views, starts)
        return raw / np.repeat(np.add.reduceat(raw, starts), np.diff(np.append(starts, len(views))))

    def aggregate(
        self, probabilities: Float[np.ndarray, "N C"], starts: Int[np.ndarray, " S"], views: np.ndarray
    ) -> Float[np.ndarray, "S C"]:
        """One row per study.

        Args:
            probabilities: in [0, 1], rows sorted by study; NaN columns stay NaN.
            starts: first row of each study.
            views: (N,) text.
        """
        kind = AGGREGATIONS[self.name]
        weights = self._raw(views, starts)
        values = logit(np.clip(probabilities, SMALLEST, 1 - SMALLEST)) if kind.logits else probabilities
        total = np.add.reduceat(values * weights[:, None], starts, axis=0)
        average = total / np.add.reduceat(weights, starts)[:, None]
        # rounding must not push a mean outside its own images: the mean of equal values is that value, exactly
        low = np.minimum.reduceat(probabilities, starts, axis=0)
        high = np.maximum.reduceat(probabilities, starts, axis=0)
        return np.clip(expit(average) if kind.logits else average, low, high)

    def _raw(self, views: np.ndarray, starts: np.ndarray) -> np.ndarray:
        if self.needs_fit:
            raise ConfigError(
                f"Study rule {self.name!r} has no weights yet. They are fitted on validation (hilum combine MODEL "
                f"--study {self.name}); then give them, as in learned:PA=1,AP=1,lateral=0.5,other=1."
            )
        return AGGREGATIONS[self.name].weigh(views, starts, self.parameters)


MEAN = StudyRule()


def as_rule(rule: "StudyRule | str") -> StudyRule:
    """A rule, given itself or its text."""
    return rule if isinstance(rule, StudyRule) else StudyRule.parse(rule)
