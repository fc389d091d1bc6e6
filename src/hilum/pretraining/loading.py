"""Batches for pretraining: what step t sees, made in this process or in workers, always the same.

Order from `data.samplers`, pixels from a store, views from `crops`, masks from `masking`; out comes `PretrainBatch`,
still uint8. Views are cut here, or (`crops_on="device"`) only drawn here and cut by `device_crops` when the batch moves
to its device. A batch is a function of (seed, step, rank, global batch size): it does not depend on the number of
workers or on where a run was resumed. A damaged record is replaced by the next sample of the order, and named; a worker
process that dies ends the run with one message.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hilum.core.errors import ConfigError, HilumError, StoreError
from hilum.core.seeding import stream
from hilum.core.tracking import warn
from hilum.data.samplers import EndlessSampler, Position
from hilum.pretraining.crops import CropConfig, View, draw_views, make_crops
from hilum.pretraining.device_crops import StackedViews, render, stack_views
from hilum.pretraining.masking import block_masks, check_masks, mask_weights
from hilum.pretraining.workers import in_worker, watched

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


@dataclass(frozen=True)
class Uncut:
    """Images of a batch, and the views that were drawn for them."""

    sources: UInt8[Tensor, "B H W"]
    """Each image in the top left corner of its place; zero beyond."""
    shapes: Int64[Tensor, "B 2"]
    """Height and width of each image."""
    global_views: StackedViews
    local_views: StackedViews

    def each(self, change: Callable[[Tensor], Tensor]) -> "Uncut":
        """The same with every tensor changed (moved, pinned)."""
        return Uncut(
            change(self.sources), change(self.shapes), self.global_views.each(change), self.local_views.each(change)
        )

    def tensors(self) -> list[Tensor]:
        """All that determines the crops."""
        parts = (self.global_views, self.local_views)
        values = [getattr(part, field.name) for part in parts for field in fields(part)]
        return [self.sources, self.shapes, *(value for value in values if isinstance(value, Tensor))]


@dataclass
class PretrainBatch:
    """What one step of pretraining sees. Crop-major: all first crops, then all second crops."""

    global_crops: UInt8[Tensor, "_GB 1 S S"]
    """Of size 0 while the batch is uncut."""
    local_crops: UInt8[Tensor, "_LB 1 s s"]
    """Of size 0 while the batch is uncut."""
    masks: Bool[Tensor, "GB N"]
    """True where the student's global crop is masked."""
    mask_weights: Float[Tensor, " M"]
    """1 / masked patches of the crop, for each masked patch, in the row-major order of `masks`."""
    indices: Int64[Tensor, " B"]
    """Position in the store of each image."""
    replaced: tuple[str, ...] = ()
    """Identities of damaged images that were replaced."""
    uncut: Uncut | None = None
    """What the crops are made of, when the batch moves to its device; None where they are made already."""

    def to(self, device: torch.device | str) -> "PretrainBatch":
        """The batch on a device (this one too), with its crops made."""
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        if self.uncut is None or moved.uncut is None:
            return moved
        there, here = moved.uncut, self.uncut
        crops = (
            render(there.sources, views, here_views, here.shapes)
            for views, here_views in (
                (there.global_views, here.global_views), (there.local_views, here.local_views),
            )
        )  # fmt: skip
        global_crops, local_crops = crops
        return replace(moved, global_crops=global_crops, local_crops=local_crops, uncut=None)

    def pin_memory(self) -> "PretrainBatch":
        """The batch in page-locked memory, for copies that overlap with computation."""
        return self._each(lambda tensor: tensor.pin_memory())

    def digest(self) -> str:
        """16 hex digits that name the batch: equal for equal crops and masks, or where uncut for what makes them.

        Of a batch as the loader gives it; once moved, a batch that was uncut has another.
        """
        content = hashlib.sha256()
        cut = [self.global_crops, self.local_crops]
        for tensor in (self.indices, self.masks, *(cut if self.uncut is None else self.uncut.tensors())):
            content.update(tensor.cpu().numpy().tobytes())
        return content.hexdigest()[:16]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "PretrainBatch":
        return PretrainBatch(
            change(self.global_crops), change(self.local_crops), change(self.masks), change(self.mask_weights),
            change(self.indices), self.replaced, None if self.uncut is None else self.uncut.each(change),
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
    crops_on: Literal["cpu", "device"] = "cpu"
    """Where views are cut: here, or, drawn here from the same stream, on the device that the batch moves to."""

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            if getattr(self.crops, name) % self.patch_size:
                raise ConfigError(
                    f"CropConfig.{name}: {getattr(self.crops, name)} pixels is not a multiple of the patch size "
                    f"{self.patch_size}."
                )
        side = self.crops.global_size // self.patch_size  # here, since a worker would be the first to find out
        check_masks(
            self.sampler.batch_size, (side, side), self.mask_ratio, self.mask_probability, self.crops.global_crops
        )

    def __getitem__(self, step: int) -> PretrainBatch:
        """Make the batch of a step, counted from 0.

        Raises:
            StoreError: many records in a row are damaged; the message of the last.
        """
        seed, sampler = self.sampler.seed, self.sampler
        sources, indices, replaced = [], np.empty(sampler.batch_size, np.int64), []
        streams = []
        self.images.expect(sampler.opens(step))
        for place, position in enumerate(sampler.positions(step)):
            pixels, indices[place], damaged = self._read(position)
            replaced += damaged
            sources.append(pixels)
            streams.append(stream(seed, "crops", position.epoch, position.offset))
        side = self.crops.global_size // self.patch_size
        masks = block_masks(
            sampler.batch_size, (side, side), stream(seed, "masks", step, sampler.rank, sampler.world_size),
            self.mask_ratio, self.mask_probability, self.crops.global_crops,
        )  # fmt: skip
        global_crops, local_crops, uncut = self._views(sources, streams)
        return PretrainBatch(
            global_crops,
            local_crops,
            torch.from_numpy(masks),
            torch.from_numpy(mask_weights(masks)),
            torch.from_numpy(indices),
            tuple(replaced),
            uncut,
        )

    def _views(
        self, sources: list[np.ndarray], streams: list[np.random.Generator]
    ) -> tuple[Tensor, Tensor, Uncut | None]:
        """Global and local crops of some images, or what they are made of."""
        crops, batch, later = self.crops, len(sources), self.crops_on == "device"
        counts = (0, 0) if later else (crops.global_crops, crops.local_crops)
        global_crops = np.empty((counts[0], batch, crops.global_size, crops.global_size), np.uint8)
        local_crops = np.empty((counts[1], batch, crops.local_size, crops.local_size), np.uint8)
        drawn: list[list[View]] = []
        for place, (pixels, rng) in enumerate(zip(sources, streams, strict=True)):
            if later:
                drawn.append(draw_views(pixels.shape[0], pixels.shape[1], crops, rng))
            else:
                global_crops[:, place], local_crops[:, place] = make_crops(pixels, crops, rng)
        return (
            torch.from_numpy(global_crops.reshape(-1, 1, crops.global_size, crops.global_size)),
            torch.from_numpy(local_crops.reshape(-1, 1, crops.local_size, crops.local_size)),
            _uncut(sources, drawn, crops) if later else None,
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


def _uncut(sources: list[np.ndarray], drawn: list[list[View]], crops: CropConfig) -> Uncut:
    shapes = np.array([pixels.shape for pixels in sources], np.int64)
    padded = np.zeros((len(sources), *shapes.max(axis=0)), np.uint8)
    for place, pixels in zip(padded, sources, strict=True):
        place[: pixels.shape[0], : pixels.shape[1]] = pixels
    return Uncut(
        torch.from_numpy(padded),
        torch.from_numpy(shapes),
        stack_views([views[: crops.global_crops] for views in drawn], crops.global_size),
        stack_views([views[crops.global_crops :] for views in drawn], crops.local_size),
    )


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
        """The batches of steps `start` to `stop` - 1.

        Raises:
            StoreError: many records in a row are damaged; the message of the last.
            HilumError: a worker process died.
        """
        options: dict[str, Any] = {}
        if self.workers:
            # Spawned, not forked: a fork copies the locks of the threads of torch and OpenCV in whatever state.
            options = {"prefetch_factor": self.ahead, "multiprocessing_context": "spawn", "worker_init_fn": in_worker}
        loader = DataLoader(
            _Told(self.source), batch_size=None, sampler=range(start, stop), num_workers=self.workers,
            pin_memory=self.pinned, generator=torch.Generator(), **options,
        )  # fmt: skip
        for batch in watched(loader) if self.workers else loader:
            if isinstance(batch, HilumError):
                raise batch
            for uid in batch.replaced:
                self.replaced[uid] += 1
                if self.replaced[uid] == 1:
                    warn(f"image {uid} is damaged and was replaced ({len(self.replaced)} so far); see `hilum verify`")
            yield batch


@dataclass(frozen=True)
class _Told(Dataset[PretrainBatch | HilumError]):
    """A source whose errors come back as values: torch would put a worker's traceback into their message."""

    source: PretrainSource

    def __getitem__(self, step: int) -> PretrainBatch | HilumError:
        try:
            return self.source[step]
        except HilumError as error:  # one that is made from other arguments than its message does not pickle
            return error if type(error).__init__ is HilumError.__init__ else HilumError(str(error))
