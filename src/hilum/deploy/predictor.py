"""A trained model, or several as one: images or a study in, findings out. The only way to a prediction.

Order of operations, everywhere: sigmoid, mean with the mirror image, the images of a study, models, damping by Normal
(`evaluation/composition.py`), the calibrator that was fitted at that stage (docs/reference/model.md). Files are in
`model_files.py`, the forward pass in `network.py`. What a study's answer holds is in
`study_result.py`. Past 300 lines: one class, and what reads it from its folder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from hilum.core.errors import CheckpointError, EmptyStudyError, PreprocessingMismatchError
from hilum.core.types import view_kind
from hilum.data.store import Indices, Store
from hilum.deploy import model_files as files
from hilum.deploy.admission import Admission, Flagged, Gate, RawReading
from hilum.deploy.engines import check_engine, choose_precision, computed_by, open_network, read_export
from hilum.deploy.ensemble_model import read_composition
from hilum.deploy.network import Engine, Network, Read, choose_device, raw_probabilities, store_identity
from hilum.deploy.out_of_sample import PLAIN
from hilum.deploy.screening import Screening, read_screening
from hilum.deploy.study_images import (
    Image,
    Part,
    as_study,
    box,
    by_name,
    contributions,
    decode,
    has_maps,
    mean_of_maps,
    study_embedding,
    view_names_of,
)
from hilum.deploy.study_result import StudyResult
from hilum.evaluation.composition import Composition
from hilum.evaluation.predictions import Predictions, column_indices
from hilum.evaluation.studies import study_uids, view_weights
from hilum.evaluation.thresholds import DEFAULT_POINTS
from hilum.heads.features import to_batch
from hilum.pretraining.exposure import join_leaks


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
        self.computed_by: dict[str, str] = {}
        """Engine and precision, for the metadata of predictions, where they are not the model's own."""
        recipes = sorted({network.config.preprocess_id for network in networks})
        if len(recipes) > 1:
            raise PreprocessingMismatchError(
                f"The members of this ensemble were trained with different preprocessing: {', '.join(recipes)}. "
                "Predict with each of them, and combine the prediction files."
            )
        self.networks, self.calibrators, self.digest = tuple(networks), calibrators, digest
        self.exposure, self.groups = exposure, dict(groups)
        self.unexcused = files.Exposure() if leak else exposure  # of the members without an accepted leak
        self.folder: Path | None = None  # where it was loaded from
        self.screening: Screening | None = None  # of the first network that has one
        self.site_points: tuple[str, ...] = ()  # operating points that a site has asked for, in its order

    @property
    def findings(self) -> tuple[str, ...]:
        """Names, in order."""
        return self.networks[0].findings

    @property
    def trained(self) -> dict[str, bool]:
        """By finding, whether any network that has a share in this model was trained on it."""
        shares = self.composition.weights or [1.0] * len(self.networks)
        return {
            name: any(
                bool(share) and bool(network.trained[network.findings.index(name)])
                for network, share in zip(self.networks, shares, strict=True)
            )
            for name in self.findings
        }

    @property
    def operating_points(self) -> tuple[str, ...]:
        """Names of the operating points that studies have; first those that a site asked for, then the usual order."""
        there = dict.fromkeys(name for points in self.calibrators["study"].thresholds.values() for name in points)
        return tuple(dict.fromkeys(name for name in (*self.site_points, *DEFAULT_POINTS, *there) if name in there))

    def predict(
        self,
        views: Sequence[Image] | Image,
        raw: bool = False,
        attention: bool = True,
        view_names: Sequence[str] | None = None,
        score_flagged: bool = False,
        correct_inverted: bool = False,
    ) -> StudyResult:
        """Findings of one study. A view that is no upright chest X-ray takes no part in it, and says so.

        Args:
            views: its images in any order, or its only one: paths or contents of DICOM, PNG or JPEG files, or uint8
                (H, W) arrays.
            raw: without calibration.
            attention: also attention maps.
            view_names: PA, AP, LATERAL, ... (`core.types.VIEWS`) or "", one for each, for rules and heads that look
                at views; None: as DICOM headers say. Where nobody says, the model's view classifier does.
            score_flagged: flagged views take part all the same.
            correct_inverted: inverted views take part with bright and dark exchanged back.

        Raises:
            EmptyStudyError: no image.
            ImageError: a view cannot be used; names it by its position.
            UnknownNameError: no such view.
            CheckpointError: a network gives no number for a finding that it was trained on.
        """
        if isinstance(views, Path | str | bytes | np.ndarray):
            views = [views]
        if not len(views):
            raise EmptyStudyError("A study needs at least one image, found none.")
        raw = raw or bool(self.reservations.uncalibrated)
        said = view_names_of(views, view_names)
        decoded = [decode(view, number, self.short_side, self.preprocess_id) for number, view in enumerate(views, 1)]
        gate = Gate(self.screening, score_flagged, correct_inverted)
        source = "header" if view_names is None else "given"
        admitted = [gate.admit(pixels, name, source) for (pixels, _), name in zip(decoded, said, strict=True)]
        scored = [one.pixels is not None for one in admitted]
        calibrator = self.calibrators["study"]
        points = calibrator.raw_thresholds if raw else calibrator.thresholds
        facts: dict[str, Any] = {
            "findings": self.findings,
            "boxes": [box(pixels) for pixels, _ in decoded],
            "thresholds": {name: points.get(name) for name in self.findings},
            "flags": calibrator.provenance()["flags"],
            "quality": [quality for _, quality in decoded],
            "views": [one.view for one in admitted],
            "view_sources": [one.view_source for one in admitted],
            "image_flags": [list(one.flags) for one in admitted],
            "scored": scored,
            "calibrated": not raw,
            "model": self.digest,
        }
        if any(scored):
            part = [one for one in admitted if one.pixels is not None]
            return self._scored_study(part, scored, raw, attention, facts)
        nothing: dict[str, Any] = dict.fromkeys(self.findings)
        return StudyResult(
            **facts, probabilities=nothing, image_probabilities=[dict(nothing) for _ in admitted],
            view_weights=[0.0] * len(admitted), contributions=dict(nothing), attention=dict(nothing), embedding=None,
        )  # fmt: skip

    def _scored_study(
        self, admitted: list[Admission], scored: list[bool], raw: bool, attention: bool, facts: dict[str, Any]
    ) -> StudyResult:
        """The result from the views that take part, with places for those that do not."""
        pictures = [one.pixels for one in admitted if one.pixels is not None]
        names = [one.view for one in admitted]
        kinds = np.array([view_kind(name) for name in names], dtype=np.int64)
        members, parts, embedding = [], [], None
        for network, share in zip(self.networks, self.composition.weights or [1.0] * len(self.networks), strict=True):
            squares = to_batch([network.crop(pixels) for pixels in pictures])
            reading = network.read(squares, np.zeros(len(names), np.int64), kinds, attention and bool(share))
            values = reading.probabilities
            _refuse_no_numbers(network, values)
            embedding = study_embedding(reading.cls) if embedding is None else embedding
            members.append(as_study(values, pictures, names, network.findings))
            columns = column_indices(network.findings, self.findings, "a member of the ensemble")
            maps = None if reading.attention is None else reading.attention[:, columns]
            parts.append(Part(values[:, columns], maps, share, network.over_study[columns]))
        image, study = self._finish(members, raw), self._finish(members, raw, unit="study")
        trained = {name: bool(known) for name, known in zip(self.findings, study.trained, strict=True)}
        weights = view_weights(members[0], self.composition.study)
        joined = mean_of_maps(parts, weights)
        shares = contributions(self.findings, parts, weights)
        place = np.cumsum(scored) - 1  # of a view that takes part, among those that do

        def spread(values: Sequence[Any], absent: Callable[[], Any]) -> list[Any]:
            return [values[place[view]] if part else absent() for view, part in enumerate(scored)]

        def maps_of(column: int) -> list[np.ndarray]:
            shown = [view[column] for view in joined]
            return spread(shown, lambda: np.zeros_like(shown[0]))

        return StudyResult(
            **facts,
            probabilities=by_name(self.findings, study.probabilities[0]),
            image_probabilities=spread(
                [by_name(self.findings, row) for row in image.probabilities], lambda: dict.fromkeys(self.findings)
            ),
            view_weights=spread(weights.tolist(), float),
            contributions={name: None if one is None else spread(one, float) for name, one in shares.items()},
            attention={
                name: maps_of(column) if trained[name] and has_maps(joined, column) else None
                for column, name in enumerate(self.findings)
            },
            embedding=embedding,
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
        """Findings of images of a store, as `hilum predict` finds them.

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
        chosen = np.asarray(list(indices), dtype=np.int64)
        reading = self.read_store(store, chosen, batch_size, workers, done)
        return self.assemble(store_identity(store, chosen), reading, raw, unit, store.pictures[chosen])

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
        """Findings of any images; those for which `read` gives None are left out. Pictures are not screened.

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
        reading = self.read_images(identity, indices, read, batch_size, workers, done)
        return self.assemble(identity, reading, raw, unit, pictures)

    def read_store(
        self,
        store: Store,
        indices: Indices,
        batch_size: int = 32,
        workers: int = 2,
        done: Callable[[int], None] = lambda count: None,
    ) -> RawReading:
        """What the networks say of images of a store; `assemble` goes on from there.

        Somebody has chosen these pictures, so none is withheld. Views that the store does not name are named by the
        model's view classifier.

        Args:
            store: made with the preprocessing recipe of this model.
            indices: which images.
            batch_size: images at a time.
            workers: threads that read.
            done: told how many images were finished, after each batch.

        Raises:
            PreprocessingMismatchError: a store of another recipe.
            StoreError: a damaged record.
        """
        store.check_recipe(self.preprocess_id)
        chosen = np.asarray(list(indices), dtype=np.int64)
        named = np.isin(store.views[chosen], ("", "UNKNOWN"), invert=True).all()
        gate = None if named else Gate(self.screening, score_flagged=True)
        return self.read_images(store_identity(store, chosen), chosen, store.read, batch_size, workers, done, gate)

    def read_images(
        self,
        identity: Mapping[str, np.ndarray],
        indices: Indices,
        read: Read,
        batch_size: int = 32,
        workers: int = 2,
        done: Callable[[int], None] = lambda count: None,
        gate: Gate | None = None,
        view_sources: np.ndarray | None = None,
    ) -> RawReading:
        """What the networks say of images, before studies, ensemble and calibration; `assemble` goes on from there.

        Parts of a list of images can be read at different times and places, as long as the images of a study come
        together where a network asks for that (`needs_studies`).

        Args:
            identity: as `predict_images`.
            indices: what `read` takes.
            read: as `predict_images`.
            batch_size: images at a time.
            workers: threads that read.
            done: told how many images were finished, after each batch.
            gate: screens every picture and names views that are not known; None: nothing is screened.
            view_sources: (N,) where the views of `identity` are known from; None: given.

        Raises:
            CheckpointError: a network gives no number for a finding that it was trained on.
        """
        chosen = np.asarray(list(indices), dtype=np.int64)
        names = ("dataset", "patient_id", "study_id", "image_uid")
        studies = study_uids(*(np.asarray(identity[name]) for name in names))
        views = np.asarray(identity["view"]).astype(object)
        sources = np.full(len(chosen), "given", dtype=object) if view_sources is None else view_sources.astype(object)
        kinds = np.array([view_kind(view) for view in views], dtype=np.int64)
        flagged: list[Flagged] = []

        def admitted(position: int) -> np.ndarray | None:
            pixels = read(int(chosen[position]))
            if gate is None or pixels is None:
                return pixels
            found = gate.admit(pixels, views[position], sources[position])
            views[position], sources[position] = found.view, found.view_source
            kinds[position] = view_kind(found.view)  # before the head of its batch asks for it
            if gate.screening is not None:
                flagged.extend(Flagged(position, flag, found.pixels is not None) for flag in found.flags)
            return found.pixels

        outputs, kept = raw_probabilities(
            self.networks, np.arange(len(chosen)), admitted, batch_size, workers, done, studies=studies, views=kinds
        )
        for network, values in zip(self.networks, outputs, strict=True):
            _refuse_no_numbers(network, values)
        return RawReading(
            kept, outputs, views[kept].astype(str), None if gate is None else sources[kept].astype(str),
            sorted(flagged, key=lambda one: one.position),
        )  # fmt: skip

    @property
    def needs_studies(self) -> bool:
        """Whether a network looks at all images of a study at once."""
        return any(network.needs_studies for network in self.networks)

    def assemble(
        self,
        identity: Mapping[str, np.ndarray],
        reading: RawReading,
        raw: bool = False,
        unit: str = "image",
        pictures: np.ndarray | None = None,
    ) -> Predictions:
        """From what networks say of images to findings: studies, ensemble, calibration.

        Args:
            identity: as `predict_images`.
            reading: of these images.
            raw: without calibration.
            unit: "image", or "study" for one row per study.
            pictures: as `predict_images`.

        Raises:
            EmptyStudyError: no image is left.
        """
        kept = reading.kept
        if len(kept) == 0:
            raise EmptyStudyError("There is no image to predict.")
        rows = {name: np.asarray(column)[kept] for name, column in identity.items()} | {"view": reading.views}
        names = None if pictures is None else pictures[kept]
        met = self.exposure.count(rows["image_uid"], names)
        facts = {
            "model": self.digest,
            "groups": self.groups,
            "prevalence": {
                one.name: one.positives / one.known for one in self.networks[0].config.findings if one.known
            },
            "head_splits": [name for name in ("train", "val") if len(getattr(self.exposure, name))],
            "exposed_images": max(met["any"], int(np.isin(rows["dataset"], self.reservations.datasets).sum())),
            "exposure": met,
            "accepted_leak": "" if self.unexcused.count(rows["image_uid"], names)["any"] else self.leak,
            **self.computed_by,
            **({"uncalibrated": self.reservations.uncalibrated} if self.reservations.uncalibrated else {}),
            **({"exposure_not_recorded": self.reservations.not_recorded} if self.reservations.not_recorded else {}),
        }
        members = [
            Predictions(
                **rows,
                findings=network.findings,
                probabilities=values,
                metadata=facts,
                view_source=reading.view_sources,
            )
            for network, values in zip(self.networks, reading.probabilities, strict=True)
        ]
        combined = self._finish(members, raw, unit)
        chosen_on = self.calibrators[unit].fitted_on if unit in self.chosen else None
        return combined.replace(combined.probabilities, model=self.digest, chosen_on=chosen_on)

    def push_to_hub(self, repository: str, *, private: bool = True, with_cases: bool = False) -> str:
        """Send this model to the Hugging Face Hub; `hilum.from_pretrained` takes it back. Returns the commit's address.

        Args:
            repository: owner/name.
            private: whether a new repository is.
            with_cases: also validation predictions and labels, which name patients (`hub_models.push_model`).

        Raises:
            HilumError: as `hub_models.push_model`.
        """
        from hilum.deploy.hub_models import push_model  # it loads models itself

        return push_model(self, repository, private=private, with_cases=with_cases)

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


def load(path: Path | str, device: str = "auto", engine: str | None = None, precision: str | None = None) -> Model:
    """Load a MODEL directory made by `hilum fit`, an ensemble made by `hilum combine`, or an EXPORT of either.

    Args:
        path: the directory.
        device: auto, cpu or cuda.
        engine: torch for a MODEL, onnx or openvino for an EXPORT of that format; None: what the directory is for.
        precision: fp32, bf16, or auto: bf16 where the processor has instructions for it; None: as the model says.

    Raises:
        CheckpointError: absent, incomplete, damaged, or a member of an ensemble has changed.
        ConfigError: an engine that cannot run what is there, or has no such device or precision.
        PreprocessingMismatchError: a preprocessing recipe that this version does not know.
    """
    path, place = Path(path), choose_device(device)
    content = files.read_config(path)
    export = read_export(path)
    check_engine(path, engine, export)
    if export is not None:
        folders = export.folders()
    else:
        folders = [path] if content["format"] == files.MODEL_FORMAT else member_folders(path, content)
    networks: list[Engine] = []
    stated: list[str] = []
    exposures, leaks, reservations = [], [], files.Reservations.read(content)
    groups: dict[str, str] = {}
    screenings: list[Screening] = []
    for folder in folders:
        described = files.read_config(folder)
        config = files.read_network(folder, described)
        if export is not None:
            networks.append(open_network(export, len(networks), config, str(place), precision))
        else:
            weights = files.read_weights(folder, config, _weights_digest(folder, described))
            chosen = choose_precision(precision, config.precision, place)
            network = Network(replace(config, precision=chosen), *weights, place)
            if precision is not None:
                network.speed_up()
            networks.append(network)
        stated.append(config.precision)
        exposures.append(files.read_exposure(folder, described))
        leaks.append(described.get("accepted_leak") or "")
        reservations = reservations.join(files.Reservations.read(described))
        groups |= {finding.name: finding.group for finding in config.findings}
        screening = read_screening(folder, described)
        screenings += [] if screening is None else [screening]
    model = Model(
        networks, files.read_calibrators(path, content), files.digest_of(path), files.Exposure.join(exposures), groups,
        join_leaks(*leaks), read_composition(path, content), _chosen_units(content), reservations,
    )  # fmt: skip
    model.folder = path
    model.unexcused = files.Exposure.join([one for one, leak in zip(exposures, leaks, strict=True) if not leak])
    model.screening = screenings[0] if screenings else None
    model.site_points = tuple(((content.get("recalibrated") or {}).get("rules") or {}).get("points") or ())
    model.computed_by = computed_by(export, networks, stated)
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


def _refuse_no_numbers(network: Engine, values: Float[np.ndarray, "B C"]) -> None:
    """NaN says "never trained", and is left out of ensembles: it must not come from damage."""
    broken = np.isnan(values[:, network.trained]).any(axis=0)
    if broken.any():
        names = [name for name, trained in zip(network.findings, network.trained, strict=True) if trained]
        raise CheckpointError(
            f"The network gives no number for {int(broken.sum())} of {len(names)} findings that it was trained on, for "
            f"example {names[int(broken.argmax())]!r}: its weights may be damaged. Copy the model again."
        )


def _chosen_units(content: Mapping[str, Any]) -> tuple[str, ...]:
    return ("image", "study") if "choice" in content else ("study",) if "learned_views" in content else ()


def _weights_digest(folder: Path, content: Mapping[str, Any]) -> str:
    try:
        return str(content["weights"]["sha256"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / files.CONFIG_NAME} does not name its weights ({error}).") from error
