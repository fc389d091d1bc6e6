"""A trained model, or several as one: images or a study in, findings out. The only way to a prediction.

Order of operations, everywhere: sigmoid, mean with the mirror image, the images of a study, models, damping by Normal
(`evaluation/composition.py`), the calibrator that was fitted at that stage (docs/reference/model.md). Files are in
`model_files.py`, the forward pass in `network.py`. Past 300 lines: one class, and the result that it gives.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from hilum.core.errors import CheckpointError, EmptyStudyError, PreprocessingMismatchError
from hilum.core.types import RESEARCH_NOTICE, view_kind
from hilum.data.store import Indices, Store
from hilum.deploy import model_files as files
from hilum.deploy.ensemble_model import read_composition
from hilum.deploy.network import Engine, Network, Read, choose_device, raw_probabilities, store_identity
from hilum.deploy.out_of_sample import PLAIN
from hilum.deploy.study_images import (
    Box,
    Image,
    Part,
    as_study,
    box,
    by_name,
    contributions,
    decode,
    has_maps,
    mean_of_maps,
    view_names_of,
)
from hilum.evaluation.composition import Composition
from hilum.evaluation.predictions import Predictions, column_indices
from hilum.evaluation.studies import study_uids, view_weights
from hilum.heads.features import to_batch
from hilum.pretraining.exposure import join_leaks


@dataclass(frozen=True)
class StudyResult:
    """What a model says of one study. Research use only; not a medical device."""

    findings: tuple[str, ...]
    """Names, in the model's order."""
    probabilities: dict[str, float | None]
    """Of the study, in [0, 1]; None for a finding that was never trained."""
    image_probabilities: list[dict[str, float | None]]
    """Of each view alone, calibrated as images are (or raw); a head that looks at whole studies gives all the same."""
    view_weights: list[float]
    """What each view contributes to `probabilities` by the model's study rule; they add up to 1. Equal ones say nothing
    where the head itself weighs views."""
    contributions: dict[str, list[float] | None]
    """The part of each view in a finding's probability, adding up to 1 (`study_images.contributions`); None for a
    finding that was never trained, and for heads that look at whole studies where maps were not asked for."""
    attention: dict[str, list[Float[np.ndarray, "h w"]] | None]
    """Where the answer came from (docs/explanation/where-it-looked.md): one map per view on the patch grid, 0 or more,
    each summing to 1; together, where a head looks at whole studies. None where untrained, or not asked for. Maps cover
    `boxes`."""
    boxes: list[Box]
    """Per view, the part of the image that was looked at: top, left, height, width as shares of its sides."""
    thresholds: dict[str, dict[str, float] | None]
    """Operating points (f1, youden, sens_at_spec95) for `probabilities`, from validation."""
    flags: dict[str, str]
    """Findings whose calibration has a reservation, with the reason."""
    quality: list[tuple[str, ...]]
    """Per view, flags of the decoder (constant, polarity_suspect, ...)."""
    calibrated: bool
    """Whether calibrators were applied."""
    model: str
    """Identity of the model."""
    notice: str = RESEARCH_NOTICE


class Model:
    """One network, or an ensemble of several, with calibrators for images and for studies.

    Args:
        networks: one or more, with the same findings by name.
        calibrators: by unit.
        digest: identity.
        exposure: images met in pretraining and training, all networks together.
        groups: head, medium or tail per finding.
        leak: leaks by design that its pretraining or training accepted, in words.
        composition: how images become studies and networks one model; the calibrators were fitted with the same.
        chosen: units for whose predictions members, weights or rules were chosen where the calibrators were fitted.
        reservations: what the model says against itself.

    Raises:
        PreprocessingMismatchError: the networks were trained with different recipes.
    """

    def __init__(
        self,
        networks: Sequence[Engine],
        calibrators: files.Calibrators,
        digest: str,
        exposure: files.Exposure,
        groups: Mapping[str, str],
        leak: str = "",
        composition: Composition = PLAIN,
        chosen: Sequence[str] = (),
        reservations: files.Reservations = files.Reservations(),  # noqa: B008 (frozen)
    ) -> None:
        self.reservations = reservations
        self.leak, self.composition, self.chosen = leak, composition, tuple(chosen)
        recipes = sorted({network.config.preprocess_id for network in networks})
        if len(recipes) > 1:
            raise PreprocessingMismatchError(
                f"The members of this ensemble were trained with different preprocessing: {', '.join(recipes)}. "
                "Predict with each of them, and combine the prediction files."
            )
        self.networks, self.calibrators, self.digest = tuple(networks), calibrators, digest
        self.exposure, self.groups = exposure, dict(groups)
        self.folder: Path | None = None  # where it was loaded from

    @property
    def findings(self) -> tuple[str, ...]:
        """Names, in order."""
        return self.networks[0].findings

    def predict(
        self,
        views: Sequence[Image] | Image,
        raw: bool = False,
        attention: bool = True,
        view_names: Sequence[str] | None = None,
    ) -> StudyResult:
        """Findings of one study.

        Args:
            views: its images in any order, or its only one: paths or contents of DICOM, PNG or JPEG files, or uint8
                (H, W) arrays.
            raw: without calibration.
            attention: also attention maps.
            view_names: PA, AP, LATERAL, ... (`core.types.VIEWS`) or "", one for each, for rules and heads that look
                at views; None: as DICOM headers say, unknown otherwise.

        Raises:
            EmptyStudyError: no image.
            ImageError: a view cannot be used; names it by its position.
            UnknownNameError: no such view.
        """
        if isinstance(views, Path | str | bytes | np.ndarray):
            views = [views]
        if not len(views):
            raise EmptyStudyError("A study needs at least one image, found none.")
        raw = raw or bool(self.reservations.uncalibrated)
        names = view_names_of(views, view_names)
        decoded = [decode(view, number, self.short_side, self.preprocess_id) for number, view in enumerate(views, 1)]
        kinds = np.array([view_kind(name) for name in names], dtype=np.int64)
        members, parts = [], []
        for network, share in zip(self.networks, self.composition.weights or [1.0] * len(self.networks), strict=True):
            squares = to_batch([network.crop(pixels) for pixels, _ in decoded])
            reading = network.read(squares, np.zeros(len(names), np.int64), kinds, attention and bool(share))
            values = reading.probabilities
            members.append(as_study(values, [pixels for pixels, _ in decoded], names, network.findings))
            columns = column_indices(network.findings, self.findings, "a member of the ensemble")
            maps = None if reading.attention is None else reading.attention[:, columns]
            parts.append(Part(values[:, columns], maps, share, network.needs_studies))
        image, study = self._finish(members, raw), self._finish(members, raw, unit="study")
        trained = {name: bool(known) for name, known in zip(self.findings, study.trained, strict=True)}
        weights = view_weights(members[0], self.composition.study)
        joined = mean_of_maps(parts, weights)
        calibrator = self.calibrators["study"]
        points = calibrator.raw_thresholds if raw else calibrator.thresholds
        return StudyResult(
            findings=self.findings,
            probabilities=by_name(self.findings, study.probabilities[0]),
            image_probabilities=[by_name(self.findings, row) for row in image.probabilities],
            view_weights=weights.tolist(),
            contributions=contributions(self.findings, parts, weights),
            attention={
                name: [view[column] for view in joined] if trained[name] and has_maps(joined, column) else None
                for column, name in enumerate(self.findings)
            },
            boxes=[box(pixels) for pixels, _ in decoded],
            thresholds={name: points.get(name) for name in self.findings},
            flags=calibrator.provenance()["flags"],
            quality=[quality for _, quality in decoded],
            calibrated=not raw,
            model=self.digest,
        )

    def predict_store(
        self,
        store: Store,
        indices: Indices,
        raw: bool = False,
        unit: str = "image",
        batch_size: int = 32,
        workers: int = 2,
        done: Callable[[int], None] = lambda count: None,
    ) -> Predictions:
        """Findings of images of a store.

        Args:
            store: made with the preprocessing recipe of this model.
            indices: which images; their labels are not looked at.
            raw: without calibration.
            unit: "image", or "study" for one row per study.
            batch_size: images at a time.
            workers: threads that read.
            done: told how many images were finished, after each batch.

        Raises:
            PreprocessingMismatchError: a store of another recipe.
            StoreError: a damaged record.
        """
        if store.preprocess_id != self.preprocess_id:
            raise PreprocessingMismatchError(
                f"{store.path} was built for preprocessing {store.preprocess_id!r}, this model needs "
                f"{self.preprocess_id!r}. Build the store again: hilum build ... --intensity {self.preprocess_id}."
            )
        chosen = np.asarray(list(indices), dtype=np.int64)
        return self.predict_images(
            store_identity(store, chosen), chosen, store.read, raw, unit, batch_size, workers, done,
            store.pictures[chosen],
        )  # fmt: skip

    def predict_images(
        self,
        identity: Mapping[str, np.ndarray],
        indices: Indices,
        read: Read,
        raw: bool = False,
        unit: str = "image",
        batch_size: int = 32,
        workers: int = 2,
        done: Callable[[int], None] = lambda count: None,
        pictures: np.ndarray | None = None,
    ) -> Predictions:
        """Findings of any images; those for which `read` gives None are left out.

        Args:
            identity: the columns of a prediction table that say who is predicted, one entry per index.
            indices: what `read` takes.
            read: decoded pixels, uint8 (H, W), shrunk as `short_side` says.
            raw: without calibration.
            unit: "image", or "study" for one row per study.
            batch_size: images at a time.
            workers: threads that read.
            done: told how many images were finished, after each batch.
            pictures: names of the images across datasets (`Store.pictures`), one per index, where known.

        Raises:
            EmptyStudyError: no image is left.
        """
        names = ("dataset", "patient_id", "study_id", "image_uid")
        studies = study_uids(*(np.asarray(identity[name]) for name in names))
        views = np.asarray(identity["view"])
        outputs, kept = raw_probabilities(
            self.networks, indices, read, batch_size, workers, done, studies=studies, views=views
        )
        if len(kept) == 0:
            raise EmptyStudyError("There is no image to predict.")
        rows = {name: np.asarray(column)[kept] for name, column in identity.items()}
        met = self.exposure.count(rows["image_uid"], None if pictures is None else pictures[kept])
        facts = {
            "model": self.digest,
            "groups": self.groups,
            "prevalence": {
                one.name: one.positives / one.known for one in self.networks[0].config.findings if one.known
            },
            "head_splits": [name for name in ("train", "val") if len(getattr(self.exposure, name))],
            "exposed_images": max(met["any"], int(np.isin(rows["dataset"], self.reservations.datasets).sum())),
            "exposure": met,
            "accepted_leak": self.leak,
            **({"uncalibrated": self.reservations.uncalibrated} if self.reservations.uncalibrated else {}),
            **({"exposure_not_recorded": self.reservations.not_recorded} if self.reservations.not_recorded else {}),
        }
        members = [
            Predictions(**rows, findings=network.findings, probabilities=values, metadata=facts)
            for network, values in zip(self.networks, outputs, strict=True)
        ]
        combined = self._finish(members, raw, unit)
        chosen_on = self.calibrators[unit].fitted_on if unit in self.chosen else None
        return combined.replace(combined.probabilities, model=self.digest, chosen_on=chosen_on)

    @property
    def preprocess_id(self) -> str:
        """The recipe that source files are read with, one of `intensity.RECIPES`; the same for all networks."""
        return self.networks[0].config.preprocess_id

    @property
    def short_side(self) -> int | None:
        """What source files are shrunk to before anything else, pixels on the shorter side; None: nothing."""
        sizes = {network.config.short_side for network in self.networks}
        return None if None in sizes else max(size for size in sizes if size is not None)

    def _finish(self, members: list[Predictions], raw: bool, unit: str = "image") -> Predictions:
        """From raw image predictions of every network to this model's predictions per image or study."""
        combined = self.composition.apply(members, unit)
        return combined if raw or self.reservations.uncalibrated else self.calibrators[unit].apply_to(combined)


def load(path: Path | str, device: str = "auto") -> Model:
    """Load a MODEL directory made by `hilum fit`, or an ensemble directory made by `hilum combine`.

    Args:
        path: the directory.
        device: auto, cpu or cuda.

    Raises:
        CheckpointError: absent, incomplete, damaged, or a member of an ensemble has changed.
        PreprocessingMismatchError: a preprocessing recipe that this version does not know.
    """
    path, place = Path(path), choose_device(device)
    content = files.read_config(path)
    folders = [path] if content["format"] == files.MODEL_FORMAT else member_folders(path, content)
    networks, exposures, leaks, reservations = [], [], [], files.Reservations.read(content)
    groups: dict[str, str] = {}
    for folder in folders:
        described = files.read_config(folder)
        config = files.read_network(folder, described)
        networks.append(Network(config, *files.read_weights(folder, config, _weights_digest(folder, described)), place))
        exposures.append(files.read_exposure(folder, described))
        leaks.append(described.get("accepted_leak") or "")
        reservations = reservations.join(files.Reservations.read(described))
        groups |= {finding.name: finding.group for finding in config.findings}
    if len(exposures) > 1:
        uses = (*files.EXPOSURES, "pictures")
        merged = (np.unique(np.concatenate([getattr(one, use) for one in exposures])) for use in uses)
        exposures = [files.Exposure(*merged)]
    model = Model(
        networks, files.read_calibrators(path, content), files.digest_of(path), exposures[0], groups,
        join_leaks(*leaks), read_composition(path, content), _chosen_units(content), reservations,
    )  # fmt: skip
    model.folder = path
    return model


def member_folders(path: Path, content: Mapping[str, Any]) -> list[Path]:
    """The model directories of an ensemble, each checked to be the one it was made from.

    Raises:
        CheckpointError: a member is missing, changed, or itself an ensemble.
    """
    folders = []
    for member in content["members"]:
        folder = path / member["path"]  # an absolute path stands for itself
        if not (folder / files.CONFIG_NAME).is_file():
            raise CheckpointError(f"{path}: its member {folder} is missing. Put it back, or combine again.")
        if files.digest_of(folder) != member["digest"]:
            raise CheckpointError(f"{path}: its member {folder} has changed since they were combined. Combine again.")
        if files.read_config(folder)["format"] != files.MODEL_FORMAT:
            raise CheckpointError(f"{path}: its member {folder} is itself an ensemble; combine the models directly.")
        folders.append(folder)
    if not folders:
        raise CheckpointError(f"{path / files.CONFIG_NAME} names no members.")
    return folders


def _chosen_units(content: Mapping[str, Any]) -> tuple[str, ...]:
    return ("image", "study") if "choice" in content else ("study",) if "learned_views" in content else ()


def _weights_digest(folder: Path, content: Mapping[str, Any]) -> str:
    try:
        return str(content["weights"]["sha256"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / files.CONFIG_NAME} does not name its weights ({error}).") from error
