"""Is this picture like the X-rays that the model was trained on, and does it lie like them? Fitted at the end of `fit`.

A Gaussian of edge strengths (`gradients.py`) for each kind of view that training had, on 32 principal directions with
what is left over; a picture's distance is to the nearest one. The threshold is a quantile of the distances of training
patients to Gaussians that had not seen them. A picture is also judged as it would look inverted, or turned by quarters:
if one of these fits and is nearer, that is its flag. The share of validation images flagged is the false-flag rate.
It decides about pictures, never about findings. The view classifier, fitted on the same numbers: `view_classifier.py`.
"""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from hilum.core.errors import CheckpointError
from hilum.core.files import atomic_file, sha256_file
from hilum.core.types import view_kind
from hilum.deploy.gradients import LENGTH, TURNS, turned
from hilum.deploy.view_classifier import ViewClassifier, fit_views

SCREENING_NAME = "screening.npz"
FORMAT = "hilum-screening-1"
LEAST_IMAGES = 100
"""Training images below which no quantile is worth stating, and nothing is fitted."""
LEAST_GROUP = 40
"""Training images that a kind of view needs for a Gaussian of its own; others share the largest one's."""
COMPONENTS = 32
SHRINKAGE = 0.1
"""Of the mean variance, added to every variance."""
QUANTILE = 0.995
FOLDS = 5
INVERTED, TURNED, STRANGER, NOT_SCREENED = "inverted", "turned", "not_a_chest_xray", "not_screened"


class Flag(NamedTuple):
    """Why a picture was not simply scored."""

    code: str
    """inverted, turned, not_a_chest_xray or not_screened."""
    message: str


_STRANGER = "This does not look like the chest X-rays that the model has learned from."


class Judgement(NamedTuple):
    """What screening says of one picture."""

    flag: Flag | None
    distance: float
    """Logarithm of the distance to the training images; flagged above `Screening.threshold`."""


@dataclass(frozen=True)
class Gaussian:
    """Of the gradient maps of one kind of view."""

    mean: Float64[np.ndarray, " 128"]
    scale: Float64[np.ndarray, " 128"]
    components: Float64[np.ndarray, "k 128"]
    """Principal directions of (map - mean) / scale."""
    variances: Float64[np.ndarray, " k"]
    """Along them, shrunk."""
    rest: float
    """Mean square of what they leave over."""

    def distance(self, maps: Float64[np.ndarray, "N 128"]) -> Float64[np.ndarray, " N"]:
        """log(mean square along the components in their deviations + what is left over in its mean)."""
        centred = (maps - self.mean) / self.scale
        along = centred @ self.components.T
        left = np.square(centred - along @ self.components).sum(axis=1)
        return np.log((np.square(along) / self.variances).mean(axis=1) + left / self.rest)


@dataclass(frozen=True)
class Record:
    """What a model says of its screening: the entry `screening` of `config.json`."""

    images: int
    """Training images it was fitted on."""
    groups: dict[str, int]
    """Of which kind of view."""
    quantile: float
    threshold: float
    validation: int
    """Validation images that it was tried on."""
    false_flags: float | None
    """Share of them that it flags."""
    views: dict[str, Any] | None
    """Training images of each kind, and on validation the share that the view classifier names and that it gets right;
    None where there is no classifier."""
    format: str = FORMAT


@dataclass(frozen=True)
class Screening:
    """Judges pictures by their gradient maps."""

    gaussians: tuple[Gaussian, ...]
    threshold: float
    views: ViewClassifier | None
    record: Record

    def distance(self, maps: Float64[np.ndarray, "N 128"]) -> Float64[np.ndarray, " N"]:
        """To the nearest Gaussian."""
        return np.min([one.distance(maps) for one in self.gaussians], axis=0)

    def judge(self, maps: Float64[np.ndarray, "N 128"]) -> list[Judgement]:
        """A judgement of each picture, by its gradient map."""
        distances = np.stack([self.distance(turned(maps, turn)) for turn in TURNS])
        return [self._judgement(column) for column in distances.T]

    def _judgement(self, by_turn: Float64[np.ndarray, " T"]) -> Judgement:
        own, nearest = float(by_turn[0]), int(np.argmin(by_turn))
        turn = list(TURNS)[nearest]
        if nearest and by_turn[nearest] <= self.threshold:
            code = INVERTED if turn == "inverted" else TURNED
            said = "bright and dark are exchanged" if code == INVERTED else f"it lies {turn}"
            return Judgement(Flag(code, f"This looks like a chest X-ray, but {said}."), own)
        if own > self.threshold:
            return Judgement(Flag(STRANGER, _STRANGER), own)
        return Judgement(None, own)


def fit_screening(
    maps: Float64[np.ndarray, "N 128"],
    views: Sequence[str],
    patients: Sequence[str],
    validation: Float64[np.ndarray, "M 128"],
    validation_views: Sequence[str],
) -> Screening | None:
    """Fit on training images, try on validation images.

    Args:
        maps: gradient maps of training images.
        views: of each (`core.types.VIEWS`); UNKNOWN where it is not known.
        patients: of each; a patient's images are left out together when the threshold is found.
        validation: gradient maps of images of other patients.
        validation_views: of each.

    Returns:
        None where there are fewer than `LEAST_IMAGES` training images.
    """
    if len(maps) < LEAST_IMAGES:
        return None
    kinds = np.array([view_kind(view) for view in views])
    groups = _groups(kinds)
    gaussians = _fit(maps, groups)
    fold = np.unique(np.asarray(patients, dtype=str), return_inverse=True)[1].reshape(-1) % FOLDS
    held_out = np.concatenate(
        [_nearest(_fit(maps[fold != one], groups[fold != one]), maps[fold == one]) for one in np.unique(fold).tolist()]
    )
    threshold = float(np.quantile(held_out, QUANTILE, method="higher"))
    classifier = fit_views(maps, kinds)
    record = Record(
        images=len(maps),
        groups={_NAMES[group]: int((groups == group).sum()) for group in np.unique(groups).tolist()},
        quantile=QUANTILE,
        threshold=threshold,
        validation=len(validation),
        false_flags=None,
        views=None if classifier is None else classifier.describe(validation, validation_views),
    )
    fitted = Screening(gaussians, threshold, classifier, record)
    flags = [one.flag is not None for one in fitted.judge(validation)]
    return replace(fitted, record=replace(record, false_flags=float(np.mean(flags)) if flags else None))


_NAMES = ("frontal", "lateral", "other")


def _groups(kinds: np.ndarray) -> np.ndarray:
    """0 frontal, 1 lateral, 2 other; small ones become part of the largest."""
    groups = np.array([0, 0, 1, 2])[kinds]  # VIEW_KINDS
    counts = np.bincount(groups, minlength=3)
    groups[counts[groups] < LEAST_GROUP] = counts.argmax()
    return groups


def _fit(maps: np.ndarray, groups: np.ndarray) -> tuple[Gaussian, ...]:
    return tuple(_gaussian(maps[groups == group]) for group in np.unique(groups).tolist())


def _gaussian(maps: np.ndarray) -> Gaussian:
    mean, scale = maps.mean(axis=0), maps.std(axis=0) + 1e-6
    centred = (maps - mean) / scale
    values, vectors = np.linalg.eigh(centred.T @ centred / len(maps))
    count = max(min(COMPONENTS, len(maps) // 4), 1)
    variances, components = values[::-1][:count], vectors.T[::-1][:count]
    rest = max(float(values.sum() - variances.sum()), 1e-6)
    return Gaussian(mean, scale, np.ascontiguousarray(components), variances + SHRINKAGE * variances.mean(), rest)


def _nearest(gaussians: Sequence[Gaussian], maps: np.ndarray) -> np.ndarray:
    return np.min([one.distance(maps) for one in gaussians], axis=0)


def write_screening(path: Path, screening: Screening) -> dict[str, Any]:
    """Write `screening.npz` to the folder of a model; returns the entry `screening` of its `config.json`."""
    arrays = {
        f"{number}.{name}": np.asarray(value, np.float64)
        for number, one in enumerate(screening.gaussians)
        for name, value in asdict(one).items()
    }
    if screening.views is not None:
        arrays |= {f"views.{name}": value for name, value in screening.views.arrays().items()}
    with atomic_file(path / SCREENING_NAME) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return {"file": SCREENING_NAME, "sha256": sha256_file(path / SCREENING_NAME), **asdict(screening.record)}


def read_screening(path: Path, content: Mapping[str, Any]) -> Screening | None:
    """The screening of a model, or None for one that has none (made before there was any, or on too few images).

    Args:
        path: folder of the model.
        content: of its `config.json`.

    Raises:
        CheckpointError: absent, damaged, or not the file that `config.json` was written for.
    """
    described = content.get("screening")
    if described is None:
        return None
    file = path / SCREENING_NAME
    try:
        entries = {name: described[name] for name in Record.__dataclass_fields__}
        if entries["format"] != FORMAT or sha256_file(file) != described["sha256"]:
            raise ValueError("it is not the file that config.json was written for")
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as loaded:
            arrays = dict(loaded)
        record = Record(**entries)
        gaussians = tuple(_gaussian_of(arrays, number) for number in range(len(record.groups)))
        if not gaussians or any(one.mean.shape != (LENGTH,) for one in gaussians):
            raise ValueError("it holds no Gaussians of this version's pictures")
        parts = {name.removeprefix("views."): value for name, value in arrays.items() if name.startswith("views.")}
        views = ViewClassifier.from_arrays(parts) if parts else None
        return Screening(gaussians, float(record.threshold), views, record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Copy the model again.") from error


def _gaussian_of(arrays: Mapping[str, np.ndarray], number: int) -> Gaussian:
    mean, scale, components, variances = (
        arrays[f"{number}.{name}"] for name in ("mean", "scale", "components", "variances")
    )
    return Gaussian(mean, scale, components, variances, float(arrays[f"{number}.rest"]))
