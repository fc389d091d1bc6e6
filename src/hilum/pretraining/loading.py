"""Batches for pretraining: what step t sees, made in this process or in workers, always the same.

Order from `data.samplers`, pixels from a store, views from `crops`, masks from `masking`; out comes `PretrainBatch`,
still uint8. A batch is a function of (seed, step, rank, global batch size): it does not depend on the number of
workers or on where a run was resumed. A damaged record is replaced by the next sample of the order, and named.
"""

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hilum.core.errors import ConfigError, StoreError
from hilum.core.seeding import stream
from hilum.core.tracking import warn
from hilum.data.samplers import EndlessSampler, Position
from hilum.pretraining.crops import CropConfig, make_crops
from hilum.pretraining.masking import block_masks, mask_weights

REPLACEMENT_TRIES = 32
"""Damaged records in a row after which a store is taken to be broken."""


@runtime_checkable
class Images(Protocol):
    """The part of `hilum.data.store.Store` that is used here; must pickle for use with workers."""

    @property
    def uids(self) -> np.ndarray:
        """Identity of each image."""

    def read(self, index: int) -> np.ndarray:
        """Pixels of one image, uint8 (H, W)."""

    def expect(self, indices: np.ndarray) -> None:
        """Images that will be read soon."""


@dataclass
class PretrainBatch:
    """What one step of pretraining sees. Crop-major: all first crops, then all second crops."""

    global_crops: UInt8[Tensor, "GB 1 S S"]
    local_crops: UInt8[Tensor, "LB 1 s s"]
    masks: Bool[Tensor, "GB N"]
    """True where the student's global crop is masked."""
    mask_weights: Float[Tensor, " M"]
    """1 / masked patches of the crop, for each masked patch, in the row-major order of `masks`."""
    indices: Int64[Tensor, " B"]
    """Position in the store of each image."""
    replaced: tuple[str, ...] = ()
    """Identities of damaged images that were replaced."""

    def to(self, device: torch.device | str) -> "PretrainBatch":
        """The batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PretrainBatch":
        """The batch in page-locked memory, for copies that overlap with computation."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "PretrainBatch":
        return PretrainBatch(
            change(self.global_crops), change(self.local_crops), change(self.masks), change(self.mask_weights),
            change(self.indices), self.replaced,
        )  # fmt: skip


@dataclass(frozen=True)
class PretrainSource(Dataset[PretrainBatch]):
    """Everything that determines the batches of a run; cheap to send to workers. `source[step]` is a batch."""

    images: Images
    """The store."""
    sampler: EndlessSampler
    """Which images, in which order, for which process."""
    crops: CropConfig
    """Views of an image."""
    patch_size: int
    """Side of a patch, pixels; with the size of global crops it gives the grid that is masked."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of masked patches of a masked crop."""
    mask_probability: float = 0.5
    """Share of the global crops that are masked."""

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            if getattr(self.crops, name) % self.patch_size:
                raise ConfigError(
                    f"CropConfig.{name}: {getattr(self.crops, name)} pixels is not a multiple of the patch size "
                    f"{self.patch_size}."
                )

    def __getitem__(self, step: int) -> PretrainBatch:
        """Make the batch of a step, counted from 0.

        Raises:
            StoreError: many records in a row are damaged; the message of the last.
        """
        crops, sampler = self.crops, self.sampler
        batch, seed = sampler.batch_size, sampler.seed
        global_views = np.empty((crops.global_crops, batch, crops.global_size, crops.global_size), np.uint8)
        local_views = np.empty((crops.local_crops, batch, crops.local_size, crops.local_size), np.uint8)
        indices, replaced = np.empty(batch, np.int64), []
        self.images.expect(sampler.opens(step))
        for place, position in enumerate(sampler.positions(step)):
            pixels, indices[place], damaged = self._read(position)
            replaced += damaged
            rng = stream(seed, "crops", position.epoch, position.offset)
            global_views[:, place], local_views[:, place] = make_crops(pixels, crops, rng)
        side = crops.global_size // self.patch_size
        masks = block_masks(
            batch, (side, side), stream(seed, "masks", step, sampler.rank, sampler.world_size), self.mask_ratio,
            self.mask_probability, crops.global_crops,
        )  # fmt: skip
        return PretrainBatch(
            torch.from_numpy(global_views.reshape(-1, 1, crops.global_size, crops.global_size)),
            torch.from_numpy(local_views.reshape(-1, 1, crops.local_size, crops.local_size)),
            torch.from_numpy(masks),
            torch.from_numpy(mask_weights(masks)),
            torch.from_numpy(indices),
            tuple(replaced),
        )

    def _read(self, position: Position) -> tuple[np.ndarray, int, list[str]]:
        """The image at a place in the order, or the next one that can be read."""
        damaged: list[str] = []
        while True:
            index = self.sampler.index(position)
            try:
                return self.images.read(index), index, damaged
            except StoreError:
                damaged.append(str(self.images.uids[index]))
                if len(damaged) == REPLACEMENT_TRIES:
                    raise
            position = self.sampler.after(position)


class PretrainLoader:
    """Iterates over batches from a step on, made ahead of time by worker processes or here.

    Warns once for each image that had to be replaced, and counts.

    Args:
        source: what the batches are.
        workers: processes that make batches; 0 makes them in this one.
        pin_memory: page-locked batches, for a GPU.
        ahead: batches that each worker keeps ready.
    """

    def __init__(self, source: PretrainSource, workers: int = 0, pin_memory: bool = False, ahead: int = 2) -> None:
        if workers < 0 or ahead < 1:
            raise ConfigError(
                f"Loading: expected 0 or more workers, 1 or more batches ahead; found {workers}, {ahead}."
            )
        self.source, self.workers, self.pinned, self.ahead = source, workers, pin_memory, ahead
        self.replaced: Counter[str] = Counter()
        """How often each damaged image was replaced, by identity."""

    def batches(self, start: int, stop: int) -> Iterator[PretrainBatch]:
        """The batches of steps `start` to `stop` - 1."""
        options: dict[str, Any] = {}
        if self.workers:
            # Spawned, not forked: a fork copies the locks of the threads of torch and OpenCV in whatever state.
            options = {"prefetch_factor": self.ahead, "multiprocessing_context": "spawn", "worker_init_fn": _in_worker}
        loader = DataLoader(
            self.source, batch_size=None, sampler=range(start, stop), num_workers=self.workers,
            pin_memory=self.pinned, generator=torch.Generator(), **options,
        )  # fmt: skip
        for batch in loader:
            for uid in batch.replaced:
                self.replaced[uid] += 1
                if self.replaced[uid] == 1:
                    warn(f"image {uid} is damaged and was replaced ({len(self.replaced)} so far); see `hilum verify`")
            yield batch


def _in_worker(_worker: int) -> None:
    """One thread each; signals are for the main process, which saves and then stops its workers."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
