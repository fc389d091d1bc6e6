"""Everything that a run of DINOv2 carries from step to step, as named tensors; and where a run starts from.

A stage at another resolution starts from the last checkpoint of a run: student into student, teacher into teacher,
heads into heads, positions (and patch kernels, for other patches) resampled in both networks. Files are
`core.checkpoint`'s and `backbones.weights`' business.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from hilum.backbones.patch_kernels import resample_patches
from hilum.backbones.pos_embed import resize_positions
from hilum.backbones.sources import find_weights
from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import load_backbone, read_backbone_config, resolve_weights
from hilum.core.checkpoint import (
    INDEX_NAME,
    Checkpoint,
    flatten_optimizer,
    load_newest,
    load_strictly,
    restore_optimizer,
)
from hilum.core.config import from_dict
from hilum.core.errors import CheckpointError, PreprocessingMismatchError
from hilum.core.files import sha256_file
from hilum.core.meta import without_weights
from hilum.core.tracking import say, warn
from hilum.pretraining.dinov2 import Centres, Network
from hilum.pretraining.exposure import SEEN_NAME, Origin, Seen, leak_of, not_recorded, read_seen

CHECKPOINTS = "checkpoints"
_KERNEL, _POSITIONS = "backbone.patch_embed.proj.weight", "backbone.pos_embed"


@dataclass
class TrainingState:
    """What is saved and restored. Random streams are functions of (seed, step) and need no saving."""

    student: Network
    teacher: Network
    optimizer: Optimizer
    centres: Centres
    seen: Tensor
    """bool, one per image of the store: used by this run."""
    inherited: Seen
    """What earlier stages have seen."""

    def tensors(self) -> dict[str, Tensor]:
        """All of it, under one name each."""
        return {
            **_prefixed("student", self.student.state_dict()),
            **_prefixed("teacher", self.teacher.state_dict()),
            **_prefixed("optimizer", flatten_optimizer(self.optimizer, self._names())),
            **_prefixed("centres", self.centres._asdict()),
            "seen": self.seen,
            "inherited": _bits(self.inherited.uids),
            "inherited_pictures": _bits(self.inherited.pictures),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint of the same run.

        Raises:
            CheckpointError: tensors that do not fit.
        """
        parts, where = checkpoint.tensors, str(checkpoint.path)
        load_strictly(self.student, _part(parts, "student"), where)
        load_strictly(self.teacher, _part(parts, "teacher"), where)
        restore_optimizer(self.optimizer, self._names(), _part(parts, "optimizer"))
        device = self.centres.cls.device
        self.centres = Centres(**{name: value.to(device) for name, value in _part(parts, "centres").items()})
        if parts["seen"].shape != self.seen.shape:
            raise CheckpointError(
                f"{where} was written with a store of {len(parts['seen'])} images, this one has {len(self.seen)}."
            )
        self.seen = parts["seen"].clone()
        self.inherited = Seen(_numbers(parts["inherited"]), _numbers(parts["inherited_pictures"]))

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.student.named_parameters()}


def all_seen(tensors: Mapping[str, Tensor], store: Seen) -> Seen:
    """What a run and the stages before it have seen.

    Args:
        tensors: of `TrainingState.tensors`.
        store: the identities of every image, in its order.
    """
    mine = tensors["seen"].numpy()
    inherited = _numbers(tensors["inherited"]), _numbers(tensors["inherited_pictures"])
    return Seen(*(np.union1d(every[mine], before) for every, before in zip(store, inherited, strict=True)))


def teacher_backbone(tensors: Mapping[str, Tensor], architecture: ViTConfig) -> VisionTransformer:
    """The backbone of the teacher in `TrainingState.tensors`; it shares their memory."""
    with without_weights():
        backbone = VisionTransformer(architecture)
    backbone.load_state_dict(_part(tensors, "teacher.backbone"), assign=True)
    return backbone.requires_grad_(False).eval()


def _bits(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers.view(np.int64))


def _numbers(bits: Tensor) -> np.ndarray:
    return bits.numpy().view(np.uint64).copy()


def architecture_of(init: Path) -> ViTConfig:
    """The network of an earlier run, or of weights, as it is after loading.

    Raises:
        CheckpointError: nothing there, damaged, or no network that Hilum knows.
    """
    return from_dict(ViTConfig, read_backbone_config(init)["architecture"], str(init))


def start_from(init: Path, student: Network, teacher: Network, preprocess_id: str) -> Origin:
    """Give both networks the weights of an earlier run, or of a backbone file; returns what those have met.

    From a run with checkpoints: backbones and heads of its student and its teacher. From weights alone: the same
    backbone for both, heads as they are.

    Raises:
        CheckpointError: nothing there, damaged, of another architecture, or a run without its record of images.
        PreprocessingMismatchError: trained with another normalisation.
    """
    name, local = str(init), init.exists()
    init = resolve_weights(init)
    checkpoint = load_newest(init / CHECKPOINTS) if init.is_dir() else None
    if checkpoint is None:
        _start_from_weights(init, student, teacher, preprocess_id)
    elif not (init / SEEN_NAME).is_file():  # every run writes it before its first checkpoint
        raise CheckpointError(
            f"{init} has checkpoints and no {SEEN_NAME}, so nothing tells which images it was trained on. Copy the "
            "file from where the run was made; or give that run's command again, which writes it."
        )
    else:
        _start_from_run(checkpoint, student, teacher, preprocess_id)
    seen = read_seen(init if init.is_dir() else init.parent)
    content = sha256_file(find_weights(init) if checkpoint is None else checkpoint.path / INDEX_NAME)
    return Origin(seen, leak_of(init), not_recorded(init, "" if local else name), content)


def is_origin(weights: Path, sha256: str) -> bool:
    """Whether weights are those that `start_from` gave the digest of: it has looked at one of these files.

    Args:
        weights: a run, or a folder or file with weights, which exists.
        sha256: `Origin.sha256`.
    """
    files = list((weights / CHECKPOINTS).glob(f"*/{INDEX_NAME}"))
    with suppress(CheckpointError):  # nothing there: not the origin
        files = files or [find_weights(weights)]
    return any(sha256_file(file) == sha256 for file in files)


def _start_from_run(checkpoint: Checkpoint, student: Network, teacher: Network, preprocess_id: str) -> None:
    values, where = checkpoint.values, str(checkpoint.path)
    architecture = student.backbone.config
    _check_architecture(values["architecture"], architecture, where)
    _check_preprocessing(values["preprocess_id"], preprocess_id, where)
    if checkpoint.step < values["steps"]:
        warn(f"{where} is step {checkpoint.step} of {values['steps']}: the earlier stage was not finished")
    if values["architecture"]["patch_size"] != architecture.patch_size:
        before = values["architecture"]["patch_size"]
        say(f"{where} has patches of {before} pixels; its kernels are resampled to {architecture.patch_size}.")
    for network, part in ((student, "student"), (teacher, "teacher")):
        tensors = _part(checkpoint.tensors, part)
        tensors[_KERNEL] = resample_patches(tensors[_KERNEL], architecture.patch_size)
        grid = (architecture.grid, architecture.grid)
        tensors[_POSITIONS] = resize_positions(
            tensors[_POSITIONS], grid, architecture.interpolate_offset, architecture.interpolate_antialias
        )
        load_strictly(network, tensors, f"The {part} in {where}")


def _start_from_weights(init: Path, student: Network, teacher: Network, preprocess_id: str) -> None:
    architecture, described = student.backbone.config, read_backbone_config(init)
    if described["format"] == "imported" and described["preprocess_id"]:
        # Three channels folded into one: the weights expect the one normalisation, and know no intensity recipe.
        say(f"{init} is imported: its network meets images prepared as {preprocess_id} for the first time.")
    else:
        _check_preprocessing(described["preprocess_id"], preprocess_id, str(init))
    backbone = load_backbone(init, image_size=architecture.image_size, patch_size=architecture.patch_size)
    _check_architecture(asdict(backbone.config), architecture, str(init))
    for network in (student, teacher):
        load_strictly(network.backbone, backbone.state_dict(), str(init))


def _check_architecture(found: dict[str, object], expected: ViTConfig, where: str) -> None:
    """Shapes alone do not tell the number of heads or how positions are resampled. Not what only matters at birth."""
    free = ("image_size", "patch_size", "layer_scale", "positions", "swiglu_multiple")  # the first two are resampled
    differences = [
        f"{name} {found.get(name)}, here {value}"
        for name, value in asdict(expected).items()
        if name not in free and found.get(name) != value
    ]
    if differences:
        raise CheckpointError(
            f"{where} has another architecture: {'; '.join(differences)}. architecture=init takes that of the weights."
        )


def _check_preprocessing(found: str, expected: str, where: str) -> None:
    if not found:
        warn(f"{where} does not say how its images were normalised; training goes on with {expected}")
    elif found != expected:
        raise PreprocessingMismatchError(
            f"{where} was trained with preprocessing {found!r}, the store is meant for {expected!r}. Build the store "
            "with the version that wrote the weights."
        )


def _prefixed(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for name, tensor in tensors.items()}


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}
