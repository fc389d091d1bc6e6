"""The files of a MODEL and of an ENSEMBLE directory (docs/reference/model.md): written whole, read strictly.

`config.json` is written last, so that a directory that has one is complete. Nothing is pickle. What the files mean to
a prediction is `predictor.py`'s business. Past 300 lines: every file of a model, each with its writer and its reader.
"""

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.core.config import from_dict, to_dict
from hilum.core.errors import CheckpointError, ConfigError, PredictionError
from hilum.core.files import atomic_file, atomic_path, read_json, sha256_file, write_json
from hilum.core.meta import without_weights
from hilum.evaluation.calibration import Calibrator
from hilum.evaluation.predictions import Predictions, read_predictions, write_predictions
from hilum.heads.extension import ExtendedHead
from hilum.heads.registry import Head, HeadConfig, build_head
from hilum.pretraining.exposure import seen_digest, uid_numbers

MODEL_FORMAT, ENSEMBLE_FORMAT = "hilum-model-1", "hilum-ensemble-1"
CONFIG_NAME, WEIGHTS_NAME, CARD_NAME = "config.json", "model.safetensors", "README.md"
LOGITS_NAME, LABELS_NAME = "validation_logits.parquet", "validation_labels.npz"
EXPOSURE_NAME, SEARCH_NAME = "exposure.npz", "search.json"
EXPOSURES = ("pretraining", "train", "val")
PICTURES = ("pictures", "train_pictures", "val_pictures", "validated_pictures")


@dataclass(frozen=True)
class Finding:
    """One output of a model."""

    name: str
    group: str
    """head, medium or tail, by share of training images."""
    trained: bool
    """False: no training image was positive; its prediction is null. Zero-shot findings are predicted all the same."""
    positives: int
    """Positive training images."""
    known: int
    """Training images with a known label."""


@dataclass(frozen=True)
class Extension:
    """Findings that were added to a model by `hilum extend`: a head beside the first one."""

    head: HeadConfig
    """It reads the same blocks of the same backbone."""
    findings: tuple[str, ...]
    """Names, in the order of its outputs."""
    shared: tuple[str, ...] = ()
    """Names of tensors that are the first head's own; the file holds them once."""
    zero_shot: bool = False
    """Scored from text alone: no label of these findings was seen, nothing is calibrated, there is no threshold."""
    cards: dict[str, Any] = field(default_factory=dict)
    """By finding: positives and known labels it was trained, selected and calibrated on, and how."""
    training: dict[str, Any] = field(default_factory=dict)
    """How the head came to be: mode, settings, stores."""


@dataclass(frozen=True)
class NetworkConfig:
    """What is needed to rebuild a network and to feed it."""

    backbone: ViTConfig
    head: HeadConfig
    """The first head."""
    findings: tuple[Finding, ...]
    """All outputs: those of the first head, then those of each extension."""
    preprocess_id: str
    """Normalisation and intensity recipe."""
    resolution: int
    """Side of the square images, pixels."""
    short_side: int | None
    """Source files are first shrunk to this, as the training store was; None: they are not."""
    flip_average: bool = False
    """Mean of the probabilities of an image and its mirror image."""
    precision: str = "fp32"
    """fp32 or bf16 (autocast), in prediction."""
    extensions: tuple[Extension, ...] = ()
    """In the order in which they were added."""


@dataclass(frozen=True)
class Exposure:
    """Identities (uint64) of the images that a model has met, by use."""

    pretraining: UInt64[np.ndarray, " n"] = field(default_factory=lambda: np.zeros(0, np.uint64))
    train: UInt64[np.ndarray, " m"] = field(default_factory=lambda: np.zeros(0, np.uint64))
    val: UInt64[np.ndarray, " k"] = field(default_factory=lambda: np.zeros(0, np.uint64))
    pictures: UInt64[np.ndarray, " p"] = field(default_factory=lambda: np.zeros(0, np.uint64))
    """All of them by the name that a picture has in any dataset (`Store.pictures`)."""
    train_pictures: UInt64[np.ndarray, " _"] = field(default_factory=lambda: np.zeros(0, np.uint64))
    """`train`, by these names."""
    val_pictures: UInt64[np.ndarray, " _"] = field(default_factory=lambda: np.zeros(0, np.uint64))
    """`val`, by these names."""
    validated_pictures: UInt64[np.ndarray, " _"] = field(default_factory=lambda: np.zeros(0, np.uint64))
    """What selection and calibration were done on, by these names, whether or not a refit has learned from it."""

    @classmethod
    def join(cls, several: Sequence["Exposure"]) -> "Exposure":
        """What any of several models has met."""
        if not several:
            return cls()
        uses = (*EXPOSURES, *PICTURES)
        return cls(*(np.unique(np.concatenate([getattr(one, use) for one in several])) for use in uses))

    def learned_from(self, uids: np.ndarray, pictures: np.ndarray) -> np.ndarray:
        """Which images the head was trained on, under their own name or another dataset's.

        Args:
            uids: identities of the images.
            pictures: their names across datasets.

        Returns:
            bool (n,).
        """
        return are_met(uids, pictures, self.train, self.train_pictures, self.val, self.val_pictures)

    def count(self, uids: np.ndarray, pictures: np.ndarray | None = None) -> dict[str, int]:
        """How many of these images the model has met, by use, under another dataset's name alone, and in all ("any").

        Args:
            uids: identities of the images.
            pictures: names of the same images across datasets, where known.
        """
        numbers = uid_numbers(uids)
        met = {name: np.isin(numbers, getattr(self, name)) for name in EXPOSURES}
        known = np.any([*met.values()], axis=0)
        elsewhere = np.isin(uid_numbers(uids if pictures is None else pictures), self.pictures) & ~known
        return {
            **{name: int(hit.sum()) for name, hit in met.items()},
            "other_dataset": int(elsewhere.sum()),
            "any": int((known | elsewhere).sum()),
        }


def are_met(uids: np.ndarray, pictures: np.ndarray, *lists: UInt64[np.ndarray, " _"]) -> np.ndarray:
    """Which images are in any of some lists of identities, by their own name or by that across datasets: bool (n,)."""
    met = np.unique(np.concatenate(lists))
    return np.isin(uid_numbers(uids), met) | np.isin(uid_numbers(pictures), met)


Calibrators = dict[str, Calibrator]
"""By unit: image, study."""


@dataclass(frozen=True)
class Reservations:
    """What a model says against itself: imported weights are not calibrated, and nothing lists what they have seen."""

    uncalibrated: str = ""
    """Why its values are not calibrated; predictions are raw then, whatever is asked for. Empty: they are."""
    not_recorded: str = ""
    """That it is not recorded image by image what it has seen, and what is known of it. Empty: it is recorded."""
    datasets: tuple[str, ...] = ()
    """Datasets whose images all count as met."""

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Reservations":
        """From `config.json` of a model."""
        exposure = content.get("exposure") or {}
        return cls(
            str(content.get("uncalibrated") or ""), str(exposure.get("not_recorded") or ""),
            tuple(exposure.get("datasets") or ()),
        )  # fmt: skip

    def join(self, other: "Reservations") -> "Reservations":
        """Of two networks together; whether an ensemble is calibrated, it says itself."""
        datasets = tuple(sorted({*self.datasets, *other.datasets}))
        return replace(self, not_recorded=self.not_recorded or other.not_recorded, datasets=datasets)


def require_new(path: Path) -> None:
    """Refuse to write over a model, or where no folder can be.

    Raises:
        ConfigError: there is a model already, a file, or a folder in which nothing may be written.
    """
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir():
        raise ConfigError(f"{there} is a file; expected a folder for the model.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{there} cannot be written. Choose another folder for the model, or ask for the right to.")
    if (path / CONFIG_NAME).exists():
        raise ConfigError(f"{path} already holds {CONFIG_NAME}. Choose another folder, or move this one away.")


def write_weights(
    path: Path, backbone: VisionTransformer, head: Head | ExtendedHead, extensions: Sequence[Extension] = ()
) -> dict[str, str]:
    """Write `model.safetensors` (`backbone.*`, `head.*`, `extension.N.*`, float32); returns its name and digest.

    Args:
        path: folder of the model.
        backbone: its weights.
        head: the head; with extensions, if there are.
        extensions: their descriptions; tensors that they share with the first head are written once.
    """
    heads = head.heads if isinstance(head, ExtendedHead) else [head]
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    state |= {f"head.{name}": value for name, value in heads[0].state_dict().items()}
    for number, (added, described) in enumerate(zip(heads[1:], extensions, strict=True)):
        own = {name: value for name, value in added.state_dict().items() if name not in described.shared}
        state |= {f"extension.{number}.{name}": value for name, value in own.items()}
    with atomic_path(path / WEIGHTS_NAME, SafetensorError) as temporary:
        save_file(
            {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in state.items()}, temporary
        )
    return {"file": WEIGHTS_NAME, "sha256": sha256_file(path / WEIGHTS_NAME)}


def read_weights(path: Path, network: NetworkConfig, digest: str) -> tuple[VisionTransformer, Head | ExtendedHead]:
    """Rebuild backbone and head (with its extensions), in evaluation mode, without gradients.

    Raises:
        CheckpointError: absent, damaged, or not the tensors that the description asks for.
    """
    file = path / WEIGHTS_NAME
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; the model is incomplete. Copy it again or run `hilum fit` again.")
    if sha256_file(file) != digest:
        raise CheckpointError(f"{file} is not the file that {CONFIG_NAME} was written for (its SHA-256 differs).")
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    with without_weights():
        backbone, head = VisionTransformer(network.backbone), build_head(network.head)
        added = [build_head(extension.head) for extension in network.extensions]
    _fill(backbone, _under("backbone.", state), file, "backbone.")
    _fill(head, _under("head.", state), file, "head.")
    own = dict(head.named_parameters()) | dict(head.named_buffers())
    for number, (module, extension) in enumerate(zip(added, network.extensions, strict=True)):
        prefix = f"extension.{number}."
        part = _under(prefix, state)
        for name in extension.shared:
            if name in part or name not in own:
                found = "in the file as well" if name in part else "not a tensor of the first head"
                raise CheckpointError(f"{file}: {prefix}{name} should be shared with the first head, and is {found}.")
            part[name] = own[name]
        _fill(module, part, file, prefix)
    outputs = [network.head.findings, *(extension.head.findings for extension in network.extensions)]
    return backbone, (ExtendedHead(head, added, outputs) if added else head)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _fill(module: torch.nn.Module, state: Mapping[str, Tensor], file: Path, prefix: str) -> None:
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"{file}: {len(wrong)} tensors under {prefix!r} are missing, unexpected or of another shape than "
            f"{CONFIG_NAME} says, for example {wrong[0]}: {found.get(wrong[0])}, expected {expected.get(wrong[0])}."
        )
    module.load_state_dict(state, strict=True, assign=True)
    module.eval().requires_grad_(False)


def describe(network: NetworkConfig) -> dict[str, Any]:
    """The part of `config.json` that rebuilds the network; `extensions` only where there are any."""
    added = [to_dict(extension) for extension in network.extensions]
    return {
        "architecture": {"backbone": to_dict(network.backbone), "head": to_dict(network.head)},
        "findings": [to_dict(finding) for finding in network.findings],
        "preprocessing": {
            "id": network.preprocess_id, "resolution": network.resolution, "short_side": network.short_side,
        },
        "inference": {"flip_average": network.flip_average, "precision": network.precision},
        **({"extensions": added} if added else {}),
    }  # fmt: skip


def read_network(path: Path, content: Mapping[str, Any]) -> NetworkConfig:
    """The inverse of `describe`.

    Raises:
        CheckpointError: an entry is missing or of the wrong kind.
    """
    try:
        network = NetworkConfig(
            backbone=from_dict(ViTConfig, content["architecture"]["backbone"], "architecture.backbone."),
            head=from_dict(HeadConfig, content["architecture"]["head"], "architecture.head."),
            findings=tuple(from_dict(Finding, finding, "findings.") for finding in content["findings"]),
            preprocess_id=str(content["preprocessing"]["id"]),
            resolution=int(content["preprocessing"]["resolution"]),
            short_side=content["preprocessing"]["short_side"],
            flip_average=bool(content["inference"]["flip_average"]),
            precision=str(content["inference"]["precision"]),
            extensions=tuple(_read_extension(one) for one in content.get("extensions", ())),
        )
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{path / CONFIG_NAME} does not describe a model: {type(error).__name__} {error}."
        ) from error
    names = [finding.name for finding in network.findings]
    added = [name for extension in network.extensions for name in extension.findings]
    heads = (network.head, *(extension.head for extension in network.extensions))
    outputs, blocks = sum(head.findings for head in heads), {head.blocks for head in heads}
    if outputs != len(names) or names[len(names) - len(added) :] != added or len(blocks) > 1:
        raise CheckpointError(
            f"{path / CONFIG_NAME} does not describe a model: its heads have {outputs} outputs on {sorted(blocks)} "
            f"blocks for {len(names)} findings, of which the extensions name {', '.join(added) or 'none'}."
        )
    return network


def _read_extension(content: Mapping[str, Any]) -> Extension:
    return Extension(
        head=from_dict(HeadConfig, content["head"], "extensions.head."),
        findings=tuple(str(name) for name in content["findings"]),
        shared=tuple(str(name) for name in content["shared"]),
        zero_shot=bool(content["zero_shot"]),
        cards=dict(content["cards"]),
        training=dict(content["training"]),
    )


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a model or an ensemble.

    Raises:
        CheckpointError: no such directory, incomplete, or of another format.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a model directory; expected one made by `hilum fit` or `hilum combine`.")
    content = read_json(path / CONFIG_NAME, CheckpointError)
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found not in (MODEL_FORMAT, ENSEMBLE_FORMAT):
        raise CheckpointError(
            f"{path / CONFIG_NAME}: expected format {MODEL_FORMAT!r} or {ENSEMBLE_FORMAT!r}, found {found!r}. "
            "A pretraining run becomes a model by `hilum fit`."
        )
    return content


def write_config(path: Path, content: Mapping[str, Any]) -> None:
    """Write `config.json`: the last file of a directory."""
    write_json(path / CONFIG_NAME, content)


def digest_of(path: Path) -> str:
    """Identity of a model: SHA-256 of its `config.json`, which holds the digest of its weights; 16 hex digits."""
    return sha256_file(path / CONFIG_NAME)[:16]


def describe_calibrators(calibrators: Calibrators) -> dict[str, Any]:
    """The `calibration` entry of `config.json`."""
    return {unit: calibrator.to_dict() for unit, calibrator in calibrators.items()}


def read_calibrators(path: Path, content: Mapping[str, Any]) -> Calibrators:
    """The inverse of `describe_calibrators`.

    Raises:
        CheckpointError: a unit is missing, or a calibrator is malformed.
    """
    try:
        return {unit: Calibrator.from_dict(content["calibration"][unit]) for unit in ("image", "study")}
    except (KeyError, TypeError, PredictionError) as error:
        raise CheckpointError(f"{path / CONFIG_NAME}: the calibration cannot be read: {error}.") from error


def trainings(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What `config.json` says of how the first head was trained, then of each that was added."""
    return [content.get("training") or {}, *(one["training"] for one in content.get("extensions", ()))]


def write_exposure(path: Path, exposure: Exposure) -> dict[str, Any]:
    """Write `exposure.npz`; returns counts and digests for `config.json`."""
    arrays = {name: np.unique(getattr(exposure, name)) for name in EXPOSURES}
    with atomic_file(path / EXPOSURE_NAME) as file:
        np.savez(file, **arrays, **{name: np.unique(getattr(exposure, name)) for name in PICTURES})  # type: ignore[arg-type]
    return {
        "file": EXPOSURE_NAME,
        "images": {name: len(values) for name, values in arrays.items()},
        "sha256": {name: seen_digest(values) for name, values in arrays.items()},
    }


def read_exposure(path: Path, content: Mapping[str, Any]) -> Exposure:
    """Read `exposure.npz` and hold it against the digests in `config.json`.

    Raises:
        CheckpointError: absent, damaged, or another file.
    """
    file = path / EXPOSURE_NAME
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            met = {name: arrays[name] for name in EXPOSURES}
            exposure = Exposure(**met, **{name: arrays[name] for name in PICTURES if name in arrays})
        digests = content["exposure"]["sha256"]
        if any(seen_digest(getattr(exposure, name)) != digests[name] for name in EXPOSURES):
            raise ValueError("it is not the file that config.json was written for")
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Copy the model again.") from error
    return exposure


def write_validation(
    path: Path, predictions: Predictions, labels: Int[np.ndarray, "N C"], extension: int | None = None
) -> None:
    """Write `validation_logits.parquet` and, with the labels of the same images, `validation_labels.npz`.

    Args:
        path: folder of the model.
        predictions: raw, of a head that has not seen these images.
        labels: codes, rows as in the predictions.
        extension: its number; its files have a name of their own, so that those of the first head stay as they are.
    """
    write_predictions(predictions, path / validation_name(LOGITS_NAME, extension))
    with atomic_file(path / validation_name(LABELS_NAME, extension)) as file:
        uids = predictions.image_uid.astype("S16")
        np.savez(file, uid=uids, labels=labels.astype(np.int8), findings=np.array(predictions.findings))


def validation_name(name: str, extension: int | None = None) -> str:
    """File name of validation predictions or labels, or of the search, of the first head or of an extension."""
    return name if extension is None else f"extension_{extension}_{name}"


def read_validation(path: Path) -> tuple[Predictions, Int[np.ndarray, "N C"]]:
    """Raw out-of-sample validation predictions of a model, and the labels of the same rows.

    Of a model with extensions: all findings, where all were validated on the same images.

    Raises:
        PredictionError: a file is missing or malformed, they do not belong together, or an extension was validated on
            other images or, being zero-shot, on none.
    """
    predictions, labels = read_validation_of(path, None)
    content = read_json(path / CONFIG_NAME, PredictionError) if (path / CONFIG_NAME).is_file() else {}
    for number, extension in enumerate(content.get("extensions", ())):
        if extension["zero_shot"]:
            raise PredictionError(
                f"{path} scores {', '.join(extension['findings'])} from text alone; there is no validation of them, "
                "and nothing to calibrate an ensemble on. Take the model from before they were added."
            )
        added, added_labels = read_validation_of(path, number)
        mine, theirs = set(predictions.image_uid.tolist()), set(added.image_uid.tolist())
        if mine != theirs:
            raise PredictionError(
                f"{path}: {', '.join(added.findings)} were added on other validation images than the rest "
                f"({len(mine & theirs)} in both, {len(mine - theirs)} and {len(theirs - mine)} in one alone), so there "
                "is no one set to calibrate an ensemble on. Extend on the store that the model was fitted on, or "
                "combine prediction files."
            )
        order = np.argsort(added.image_uid)
        rows = order[np.searchsorted(added.image_uid, predictions.image_uid, sorter=order)]
        values = np.concatenate([predictions.probabilities, added.probabilities[rows]], axis=1)
        predictions = replace(predictions, findings=predictions.findings + added.findings, probabilities=values)
        labels = np.concatenate([labels, added_labels[rows]], axis=1)
    return predictions, labels


def read_validation_of(path: Path, extension: int | None = None) -> tuple[Predictions, Int[np.ndarray, "N C"]]:
    """As `read_validation`, of the first head alone, or of one extension.

    Raises:
        PredictionError: a file is missing or malformed, or the two do not belong together.
    """
    name, file = validation_name(LOGITS_NAME, extension), path / validation_name(LABELS_NAME, extension)
    predictions = read_predictions(path / name)
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            uids, labels, findings = arrays["uid"].astype(str), arrays["labels"], tuple(arrays["findings"].tolist())
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise PredictionError(f"{file} cannot be read: {error}. Copy the model again.") from error
    order = np.argsort(uids)
    if findings != predictions.findings or set(uids.tolist()) != set(predictions.image_uid.tolist()):
        raise PredictionError(f"{file} and {name} do not cover the same images and findings.")
    return predictions, labels[order][np.searchsorted(uids[order], predictions.image_uid)]
