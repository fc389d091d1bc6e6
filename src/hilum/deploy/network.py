"""One backbone with one head: decoded pixels -> square -> raw probabilities, attention and embeddings. The only forward
pass of prediction; `fit` takes its validation predictions from here too. Studies, ensembles and calibration:
`predictor.py`; the same network as an exported graph: `engines.py`. Past 300 lines: what an engine is, the one made of
torch modules, and the loop over images that serves all of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt8
from scipy.special import expit
from torch import Tensor

from hilum.backbones.vit import VisionTransformer
from hilum.core.errors import ConfigError
from hilum.core.types import view_kind
from hilum.data.images import shrink
from hilum.data.store import Indices, Store
from hilum.data.transforms import evaluation_crop, normalise, preprocessing
from hilum.deploy.fast_cpu import fast_backbone
from hilum.deploy.model_files import NetworkConfig
from hilum.evaluation.predictions import IDENTITY
from hilum.heads.batches import in_order
from hilum.heads.evidence import maps_of
from hilum.heads.extension import ExtendedHead
from hilum.heads.features import Features, extract, freeze, read_ahead, to_batch
from hilum.heads.registry import Head

Read = Callable[[int], np.ndarray | None]


class Reading(NamedTuple):
    """What a network says of a batch of squares."""

    probabilities: Float64[np.ndarray, "B C"]
    """Raw: sigmoid, then the mean with the mirror image where the model says so. Findings never trained are NaN."""
    attention: Float[np.ndarray, "B C h w"] | None
    """On the patch grid, each map 0 or more and summing to 1 (over a study, where the head looks at studies); None
    where it was not asked for, or where an exported graph has none."""
    cls: Float32[np.ndarray, "B D"]
    """[CLS] of the last block."""
    patch_mean: Float32[np.ndarray, "B D"]
    """Mean patch token of the last block."""


@runtime_checkable
class Engine(Protocol):
    """What runs a network: torch modules (`Network`), or an exported graph (`engines.py`)."""

    config: NetworkConfig
    """How the network was built and how images reach it."""
    trained: np.ndarray
    """(C,) bool: findings that were trained."""

    @property
    def findings(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""

    @property
    def needs_studies(self) -> bool:
        """Whether the images of a study must come together."""

    @property
    def over_study(self) -> Bool[np.ndarray, " C"]:
        """Of which outputs the maps sum to 1 over a study; of the others they do over each image."""

    def crop(self, pixels: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "S S"]:
        """The square that the network sees of a decoded image."""

    def read(
        self,
        squares: UInt8[Tensor, "B 1 S S"],
        study: Int64[np.ndarray, " B"] | None = None,
        view: Int64[np.ndarray, " B"] | None = None,
        attention: bool = False,
    ) -> Reading:
        """Everything that the network says of squares."""


Observe = Callable[[Int64[np.ndarray, " B"], list[Reading]], None]
"""Told the positions of a batch, and a reading of each network."""


def square_of(pixels: UInt8[np.ndarray, "H W"], config: NetworkConfig) -> UInt8[np.ndarray, "S S"]:
    """The square that a network sees of a decoded image, by way of the size that its training store had."""
    small = shrink(pixels, config.short_side) if config.short_side else pixels
    return evaluation_crop(small, config.resolution)


def choose_device(name: str) -> torch.device:
    """A device by name; "auto" is CUDA where there is one.

    Raises:
        ConfigError: a device that is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: torch finds no CUDA device here; use cpu or auto.")
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: expected auto, cpu or cuda.") from error
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r}: expected auto, cpu or cuda.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: torch finds {torch.cuda.device_count()} CUDA devices here.")
    return found


class Network:
    """A network in evaluation mode on a device.

    Args:
        config: how it was built and how images reach it.
        backbone: with the weights.
        head: with the weights, and its extensions, if any.
        device: where it runs.

    Raises:
        PreprocessingMismatchError: a recipe that this version does not know.
    """

    def __init__(
        self,
        config: NetworkConfig,
        backbone: VisionTransformer,
        head: Head | ExtendedHead,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.recipe = preprocessing(config.preprocess_id)
        self.device = torch.device(device)
        self.backbone = freeze(backbone).to(self.device)
        self.head = head.eval().requires_grad_(False).to(self.device)
        self.trained = np.array([finding.trained for finding in config.findings])
        self.reads_with: VisionTransformer = self.backbone
        """What features are read with: the backbone, or a faster copy of it (`speed_up`)."""

    @property
    def findings(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(finding.name for finding in self.config.findings)

    def speed_up(self) -> bool:
        """Read with a faster form of a bf16 backbone on a CPU (`fast_cpu.py`); whether there is one.

        Values then differ from autocast's by rounding, so this is for those who ask for it.
        """
        if self.device.type == "cpu" and self.config.precision == "bf16":
            self.reads_with = fast_backbone(self.backbone) or self.backbone
        return self.reads_with is not self.backbone

    def crop(self, pixels: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "S S"]:
        """The square that the network sees of a decoded image, by way of the size that its training store had."""
        return square_of(pixels, self.config)

    @property
    def needs_studies(self) -> bool:
        """Whether the head looks at all images of a study at once."""
        return self.head.needs_studies

    @property
    def over_study(self) -> Bool[np.ndarray, " C"]:
        """Which outputs are of a head that looks at all images of a study at once."""
        if isinstance(self.head, ExtendedHead):
            return np.repeat([head.needs_studies for head in self.head.heads], self.head.outputs)
        return np.full(len(self.findings), self.head.needs_studies)

    def read(
        self,
        squares: UInt8[Tensor, "B 1 S S"],
        study: Int64[np.ndarray, " B"] | None = None,
        view: Int64[np.ndarray, " B"] | None = None,
        attention: bool = False,
    ) -> Reading:
        """Everything that the network says of squares, from one pass of the backbone (two with the mirror image).

        Args:
            squares: as `crop` makes them.
            study: as `features`.
            view: as `features`.
            attention: also maps; they cost a second pass of the head.
        """
        features = self.features(squares, study, view)
        width = self.config.backbone.embed_dim
        return Reading(
            probabilities=self.probabilities(squares, features),
            attention=self.attention(features, squares) if attention else None,
            cls=features.cls[:, -width:].cpu().numpy(),
            patch_mean=features.patch_mean.cpu().numpy(),
        )

    def features(
        self,
        images: UInt8[Tensor, "B 1 S S"],
        study: Int64[np.ndarray, " B"] | None = None,
        view: Int64[np.ndarray, " B"] | None = None,
    ) -> Features:
        """Backbone features of squares.

        Args:
            images: squares, as `crop` makes them.
            study: study of each, 0 .. S-1, every study whole; None: each is a study of its own.
            view: position of each one's view in `core.types.VIEW_KINDS`; None: not known, "other".
        """
        found = extract(
            self.reads_with, images.to(self.device), self.recipe, self.config.head.blocks, self.head.needs_patches,
            self.config.precision,
        )  # fmt: skip
        if not self.head.needs_studies:
            return found
        count = len(images)
        return found._replace(
            study=self._put(np.arange(count) if study is None else study),
            view=self._put(np.full(count, view_kind("UNKNOWN")) if view is None else view),
        )

    def probabilities(
        self,
        images: UInt8[Tensor, "B 1 S S"],
        features: Features | None = None,
        study: Int64[np.ndarray, " B"] | None = None,
        view: Int64[np.ndarray, " B"] | None = None,
    ) -> np.ndarray:
        """Raw probabilities, float64 (B, C): sigmoid, then the mean with the mirror image where the model says so.

        Findings never trained are NaN. A head that looks at whole studies gives every image of one the study's values.

        Args:
            images: squares, as `crop` makes them.
            features: of `images`, where the caller has them already; their study and view then stand.
            study: as `features`.
            view: as `features`.
        """
        given = self.features(images, study, view) if features is None else features
        values = self._sigmoid(given)
        if self.config.flip_average:
            mirrored = self.features(images.flip(-1))._replace(study=given.study, view=given.view)
            values = (values + self._sigmoid(mirrored)) / 2
        values[:, ~self.trained] = np.nan
        return values

    def attention(self, features: Features, squares: UInt8[Tensor, "B 1 S S"]) -> Float[np.ndarray, "B C h w"]:
        """Where the answer came from, on the patch grid: attention, or evidence (`heads/evidence.py`).

        Each map is 0 or more and sums to 1; over the images of a study, where `over_study` says so.

        Args:
            features: of `squares`.
            squares: heads that read [CLS] run the backbone over them once more.
        """
        images = normalise(squares.to(self.device), self.recipe)
        return maps_of(self.head, features, self.backbone, images).double().cpu().numpy()

    def _put(self, values: np.ndarray) -> Int64[Tensor, " B"]:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(self.device)

    def _sigmoid(self, features: Features) -> Float[np.ndarray, "B C"]:
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            logits = self.head(features)
        return expit(logits.double().cpu().numpy())


def store_identity(store: Store, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Who is predicted: the identity columns of a prediction table for images of a store."""
    columns = (store.uids, store.image_ids, store.studies, store.patients, store.datasets, store.views)
    return {name: column[indices] for name, column in zip(IDENTITY, columns, strict=True)}


def raw_probabilities(
    networks: Sequence[Engine],
    indices: Indices,
    read: Read,
    batch_size: int = 32,
    workers: int = 2,
    done: Callable[[int], None] = lambda count: None,
    studies: np.ndarray | None = None,
    views: np.ndarray | None = None,
    observe: Observe | None = None,
    attention: bool = False,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Raw probabilities of many images from several networks; each image is decoded once.

    Where a head looks at whole studies, the images of one go through together; those that cannot be read are left out
    and the rest is used. Values do not depend on what else is in a batch.

    Args:
        networks: one or more.
        indices: what `read` takes.
        read: decoded pixels of an image, uint8 (H, W), or None to leave it out.
        batch_size: images at a time; a study that does not fit makes a larger batch.
        workers: threads that read.
        done: told how many images were finished after each batch.
        studies: (N,) study of each index: numbers, or text such as `evaluation.studies.study_uids` makes, in which ""
            is a study of its own. None: every image is one.
        views: (N,) view of each: names (`core.types.VIEWS`), or int64 positions in `VIEW_KINDS`, which `read` may still
            set for the image that it reads. None: not known.
        observe: told the positions (B,) in `indices` of every batch and what each network says of it.
        attention: also maps, for who observes.

    Returns:
        for each network (N, C) float64, and the positions in `indices` that were read (N,), ascending.
    """
    chosen = np.asarray(list(indices), dtype=np.int64)
    together = any(network.needs_studies for network in networks)
    study = _number(studies, len(chosen)) if together else None
    kinds = _kinds(views, len(chosen)) if together else None
    batches = in_order(np.arange(len(chosen)), batch_size, study)
    outputs: list[list[np.ndarray]] = [[] for _ in networks]
    kept: list[np.ndarray] = []
    squares_of = _squares(networks, chosen, read)
    for positions, squares in read_ahead((batch.images for batch in batches), squares_of, workers):
        good = [place for place, square in enumerate(squares) if square is not None]
        if good:
            seen = positions[good]
            whole = None if study is None else np.unique(study[seen], return_inverse=True)[1].reshape(-1)
            view = None if kinds is None else kinds[seen]
            readings = []
            for number, network in enumerate(networks):
                images = to_batch([crops[number] for crops in squares if crops is not None])
                readings.append(network.read(images, whole, view, attention))
                outputs[number].append(readings[-1].probabilities)
            kept.append(seen)
            if observe is not None:
                observe(seen, readings)
        done(len(positions))
    read_positions = np.concatenate([np.zeros(0, np.int64), *kept])
    order = np.argsort(read_positions, kind="stable")
    empty = [np.zeros((0, len(network.findings))) for network in networks]
    stacked = [np.concatenate([nothing, *parts])[order] for nothing, parts in zip(empty, outputs, strict=True)]
    return stacked, read_positions[order]


def _number(studies: np.ndarray | None, count: int) -> Int64[np.ndarray, " N"]:
    """Studies as numbers; an image without a study is one of its own."""
    if studies is None:
        return np.arange(count)
    numbers = np.unique(studies, return_inverse=True)[1].reshape(-1).astype(np.int64)
    if studies.dtype.kind in "US":
        alone = studies == ""
        numbers[alone] = count + np.flatnonzero(alone)
    return numbers


def _kinds(views: np.ndarray | None, count: int) -> Int64[np.ndarray, " N"]:
    """Views as positions in `VIEW_KINDS`."""
    if views is None:
        return np.full(count, view_kind("UNKNOWN"), dtype=np.int64)
    if views.dtype.kind not in "US":
        return views.astype(np.int64, copy=False)
    names, of_image = np.unique(views, return_inverse=True)
    return np.array([view_kind(str(name)) for name in names], dtype=np.int64)[of_image.reshape(-1)]


def _squares(networks: Sequence[Engine], chosen: np.ndarray, read: Read) -> Callable[[int], list[np.ndarray] | None]:
    def squares(position: int) -> list[np.ndarray] | None:
        pixels = read(int(chosen[position]))
        return None if pixels is None else [network.crop(pixels) for network in networks]

    return squares
