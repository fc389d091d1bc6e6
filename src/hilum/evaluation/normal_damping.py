"""Abnormal findings held down where the chest looks normal: p_c (1 - p_Normal)^gamma, or p_c (1 - strength p_Normal).

A step of its own, off unless asked for: after the ensemble and before calibration, so that the calibrator is fitted on
what it will see. The 2026 winner did it (hieuphamha19/CXR_LT: the code has the power with gamma 0.5, its README the
linear form with strength 0.5); a later third-place team found that it hurt an asymmetric-loss model (by 0.010 to
0.046 mAP), so it is to be tried on validation and never assumed.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from hilum.core.errors import ConfigError, PredictionError, StageError, UnknownNameError
from hilum.data.labels import COMPATIBLE_WITH_NORMAL, NORMAL_NAMES
from hilum.evaluation.predictions import Predictions

FORMS = ("power", "linear")
GAMMAS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 2.0)
"""What is tried where gamma is chosen on validation. 0 is no damping."""


@dataclass(frozen=True)
class Damping:
    """How the Normal score damps the others.

    Raises:
        UnknownNameError: no such form.
        ConfigError: a strength out of range.
    """

    form: str = "power"
    """power: times (1 - p_Normal)^strength. linear: times 1 - strength * p_Normal."""
    strength: float = 0.5
    """gamma of the power, at least 0; or the share taken away at p_Normal = 1, 0 to 1."""
    spared: tuple[str, ...] = tuple(sorted(COMPATIBLE_WITH_NORMAL))
    """Findings left as they are, since they may be there in a normal chest; Normal itself always is."""

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UnknownNameError("form of Normal damping", self.form, FORMS)
        if not math.isfinite(self.strength) or self.strength < 0 or (self.form == "linear" and self.strength > 1):
            upper = " and at most 1" if self.form == "linear" else ""
            raise ConfigError(f"Normal damping {self.form!r}: expected at least 0{upper}, found {self.strength!r}.")

    @classmethod
    def parse(cls, text: str) -> "Damping":
        """From `power`, `power:0.5` or `linear:0.5`.

        Raises:
            UnknownNameError, ConfigError: not of this form, or out of range.
        """
        form, colon, strength = text.partition(":")
        try:
            return cls(form, float(strength) if colon else 0.5)
        except ValueError as error:
            raise ConfigError(f"Normal damping {text!r}: expected power:0.5 or linear:0.5.") from error

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        return f"{self.form}:{self.strength!r}"

    def factors(self, normal: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """What damped findings are multiplied by, in [0, 1], at these probabilities of Normal."""
        return (1 - normal) ** self.strength if self.form == "power" else 1 - self.strength * normal

    def damp(self, probabilities: Float[np.ndarray, "N C"], findings: tuple[str, ...]) -> Float[np.ndarray, "N C"]:
        """Damped probabilities; rows do not touch each other.

        Raises:
            PredictionError: no finding says that the chest is normal, or it was never trained.
        """
        name = normal_name(findings)
        factors = self.factors(probabilities[:, findings.index(name)])
        if np.isnan(factors).any():
            raise PredictionError(f"{name!r} was never trained, so it cannot damp the other findings.")
        damped = np.array([one not in {name, *self.spared} for one in findings])
        return np.where(damped, probabilities * factors[:, None], probabilities)

    def apply(self, predictions: Predictions) -> Predictions:
        """Damp raw, study or ensemble predictions; their metadata say so.

        Raises:
            StageError: calibrated, or damped already.
            PredictionError: as `damp`.
        """
        if predictions.stage == "calibrated":
            raise StageError("Abnormal findings are damped before calibration; these predictions are calibrated.")
        if "normal_damping" in predictions.metadata:
            raise StageError(
                f"These predictions are damped already, by {predictions.metadata['normal_damping']!r}; once is enough."
            )
        values = self.damp(predictions.probabilities, predictions.findings)
        return predictions.replace(values, normal_damping=str(self), thresholds=None, calibration=None)


def normal_name(findings: tuple[str, ...]) -> str:
    """The finding that says that the chest is normal.

    Raises:
        PredictionError: there is none.
    """
    found = [name for name in NORMAL_NAMES if name in findings]
    if not found:
        raise PredictionError(
            f"Damping by Normal needs a finding called {' or '.join(map(repr, NORMAL_NAMES))}; found "
            f"{', '.join(map(repr, findings))}."
        )
    return found[0]
