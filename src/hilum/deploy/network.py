"""One backbone with one head: decoded pixels -> square -> raw probabilities, and attention. The only forward pass of
prediction; `fit` takes its validation predictions from here too. Studies, ensembles and calibration: `predictor.py`.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from scipy.special import expit
from torch import Tensor

from hilum.backbones.vit import VisionTransformer
from hilum.core.errors import ConfigError
from hilum.data.images import shrink
from hilum.data.store import Indices, Store
from hilum.data.transforms import evaluation_crop, preprocessing
from hilum.deploy.model_files import NetworkConfig
from hilum.evaluation.predictions import IDENTITY
from hilum.heads.features import Features, extract, freeze, read_ahead, to_batch
from hilum.heads.registry import Head

Read = Callable[[int], np.ndarray | None]


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
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: expected auto, cpu or cuda.") from error


class Network:
    """A network in evaluation mode on a device.

    Args:
        config: how it was built and how images reach it.
        backbone: with the weights.
        head: with the weights.
        device: where it runs.

    Raises:
        PreprocessingMismatchError: a recipe that this version does not know.
    """

    def __init__(
        self, config: NetworkConfig, backbone: VisionTransformer, head: Head, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.recipe = preprocessing(config.preprocess_id)
        self.device = torch.device(device)
        self.backbone = freeze(backbone).to(self.device)
        self.head = head.eval().requires_grad_(False).to(self.device)
        self.trained = np.array([finding.trained for finding in config.findings])

    @property
    def findings(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(finding.name for finding in self.config.findings)

    def crop(self, pixels: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "S S"]:
        """The square that the network sees of a decoded image, by way of the size that its training store had."""
        small = shrink(pixels, self.config.short_side) if self.config.short_side else pixels
        return evaluation_crop(small, self.config.resolution)

    def features(self, images: UInt8[Tensor, "B 1 S S"]) -> Features:
        """Backbone features of squares."""
        return extract(
            self.backbone, images.to(self.device), self.recipe, self.config.head.blocks, self.head.needs_patches,
            self.config.precision,
        )  # fmt: skip

    def probabilities(self, images: UInt8[Tensor, "B 1 S S"], features: Features | None = None) -> np.ndarray:
        """Raw probabilities, float64 (B, C): sigmoid, then the mean with the mirror image where the model says so.

        Findings never trained are NaN.

        Args:
            images: squares, as `crop` makes them.
            features: of `images`, where the caller has them already.
        """
        values = self._sigmoid(self.features(images) if features is None else features)
        if self.config.flip_average:
            values = (values + self._sigmoid(self.features(images.flip(-1)))) / 2
        values[:, ~self.trained] = np.nan
        return values

    def attention(self, features: Features) -> Float[np.ndarray, "B C h w"] | None:
        """Attention maps on the patch grid (each sums to 1), or None for a head that has none."""
        attend = getattr(self.head, "attention", None)
        if attend is None:
            return None
        with torch.no_grad():
            return attend(features).double().cpu().numpy()

    def _sigmoid(self, features: Features) -> Float[np.ndarray, "B C"]:
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            logits = self.head(features)
        return expit(logits.double().cpu().numpy())


def store_identity(store: Store, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Who is predicted: the identity columns of a prediction table for images of a store."""
    columns = (store.uids, store.image_ids, store.studies, store.patients, store.datasets, store.views)
    return {name: column[indices] for name, column in zip(IDENTITY, columns, strict=True)}


def raw_probabilities(
    networks: Sequence[Network],
    indices: Indices,
    read: Read,
    batch_size: int = 32,
    workers: int = 2,
    done: Callable[[int], None] = lambda count: None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Raw probabilities of many images from several networks; each image is decoded once.

    Args:
        networks: one or more.
        indices: what `read` takes.
        read: decoded pixels of an image, uint8 (H, W), or None to leave it out.
        batch_size: images at a time.
        workers: threads that read.
        done: told how many images were finished after each batch.

    Returns:
        for each network (N, C) float64, and the positions in `indices` that were read (N,).
    """
    chosen = np.asarray(list(indices), dtype=np.int64)
    outputs: list[list[np.ndarray]] = [[] for _ in networks]
    kept: list[np.ndarray] = []
    for positions, squares in read_ahead(_chunks(len(chosen), batch_size), _squares(networks, chosen, read), workers):
        good = [place for place, square in enumerate(squares) if square is not None]
        if good:
            for number, network in enumerate(networks):
                images = to_batch([crops[number] for crops in squares if crops is not None])
                outputs[number].append(network.probabilities(images))
            kept.append(positions[good])
        done(len(positions))
    empty = [np.zeros((0, len(network.findings))) for network in networks]
    stacked = [np.concatenate([nothing, *parts]) for nothing, parts in zip(empty, outputs, strict=True)]
    return stacked, np.concatenate([np.zeros(0, np.int64), *kept])


def _squares(networks: Sequence[Network], chosen: np.ndarray, read: Read) -> Callable[[int], list[np.ndarray] | None]:
    def squares(position: int) -> list[np.ndarray] | None:
        pixels = read(int(chosen[position]))
        return None if pixels is None else [network.crop(pixels) for network in networks]

    return squares


def _chunks(count: int, size: int) -> Iterator[np.ndarray]:
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))
