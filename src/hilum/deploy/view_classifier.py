"""Which view a picture is, where nobody says: PA, AP or lateral, from its gradient map. Trained with every model.

Linear discriminants with a shrunk common covariance and equal priors, fitted on training images whose view is known. It
names a view only where it is sure, and never stands in for one that was given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from hilum.core.types import VIEW_KINDS, view_kind

LEAST_IMAGES = 20
"""Training images that a kind needs."""
SHRINKAGE = 0.3
"""Of the common covariance towards a multiple of the identity."""
SURE = 0.9
"""Probability from which a view is named; below it is UNKNOWN."""
_VIEW_OF_KIND = {"PA": "PA", "AP": "AP", "lateral": "LATERAL"}


@dataclass(frozen=True)
class ViewClassifier:
    """Scores of K kinds are `maps @ weights + biases`."""

    kinds: Int64[np.ndarray, " K"]
    """Positions in `VIEW_KINDS`."""
    weights: Float64[np.ndarray, "128 K"]
    biases: Float64[np.ndarray, " K"]
    counts: Int64[np.ndarray, " K"]
    """Training images of each kind."""

    def probabilities(self, maps: Float64[np.ndarray, "N 128"]) -> Float64[np.ndarray, "N K"]:
        """Of each kind, adding up to 1."""
        scores = maps @ self.weights + self.biases
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def name(self, maps: Float64[np.ndarray, "N 128"]) -> list[str]:
        """PA, AP or LATERAL of each picture; UNKNOWN where no kind reaches `SURE`."""
        found = self.probabilities(maps)
        names = [_VIEW_OF_KIND[VIEW_KINDS[kind]] for kind in self.kinds[found.argmax(axis=1)].tolist()]
        return [name if sure else "UNKNOWN" for name, sure in zip(names, found.max(axis=1) >= SURE, strict=True)]

    def describe(self, maps: Float64[np.ndarray, "N 128"], views: Sequence[str]) -> dict[str, Any]:
        """Training images by kind, and how it does on other images: the share it names, and of these the share right.

        Args:
            maps: of images it was not fitted on.
            views: of each; those of no kind that it knows are left out.
        """
        kinds = np.array([view_kind(view) for view in views], dtype=np.int64)
        known = np.isin(kinds, self.kinds)
        names = self.name(maps[known]) if known.any() else []
        named = np.array([name != "UNKNOWN" for name in names], dtype=bool)
        right = np.array([view_kind(name) for name in names], dtype=np.int64) == kinds[known]
        return {
            "training": {VIEW_KINDS[kind]: int(count) for kind, count in zip(self.kinds, self.counts, strict=True)},
            "validation": int(known.sum()),
            "named": float(named.mean()) if len(named) else None,
            "right": float(right[named].mean()) if named.any() else None,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """What `from_arrays` takes."""
        return {"kinds": self.kinds, "weights": self.weights, "biases": self.biases, "counts": self.counts}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "ViewClassifier":
        """The inverse of `arrays`.

        Raises:
            ValueError: they do not belong together.
        """
        one = cls(**{name: arrays[name] for name in ("kinds", "weights", "biases", "counts")})
        if one.weights.shape[1:] != one.kinds.shape or one.kinds.shape != one.biases.shape or not len(one.kinds):
            raise ValueError("the view classifier's arrays do not belong together")
        return one


def fit_views(maps: Float64[np.ndarray, "N 128"], kinds: Int64[np.ndarray, " N"]) -> ViewClassifier | None:
    """Fit on the images of known kinds; None where fewer than two kinds have `LEAST_IMAGES`.

    Args:
        maps: gradient maps.
        kinds: positions in `VIEW_KINDS`; "other" is not known.
    """
    found, counts = np.unique(kinds, return_counts=True)
    enough = [(kind, count) for kind, count in zip(found, counts, strict=True) if count >= LEAST_IMAGES]
    used = [(kind, count) for kind, count in enough if VIEW_KINDS[kind] in _VIEW_OF_KIND]
    if len(used) < 2:
        return None
    chosen = np.array([kind for kind, _ in used], dtype=np.int64)
    inside = np.isin(kinds, chosen)
    mean, scale = maps[inside].mean(axis=0), maps[inside].std(axis=0) + 1e-6
    standard, of_image = (maps[inside] - mean) / scale, np.searchsorted(chosen, kinds[inside])
    centres = np.stack([standard[of_image == number].mean(axis=0) for number in range(len(chosen))])
    spread = standard - centres[of_image]
    covariance = spread.T @ spread / len(spread)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / len(covariance) * np.eye(len(mean))
    weights = np.linalg.solve(covariance, centres.T)
    biases = -0.5 * (centres.T * weights).sum(axis=0)
    return ViewClassifier(
        chosen, weights / scale[:, None], biases - (mean / scale) @ weights, np.array([count for _, count in used])
    )
