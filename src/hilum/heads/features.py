"""Frozen backbone -> features for heads, with or without a cache of augmented views in memory.

Images of a store come in as uint8 squares; features go out in float32. The backbone is in evaluation mode and no
gradient reaches it. Heads, losses and scores live elsewhere. Past 300 lines: what heads read, and where it is kept.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from hilum.backbones.vit import VisionTransformer
from hilum.core.errors import ConfigError
from hilum.core.memory import usable_memory
from hilum.core.seeding import stream
from hilum.data.store import Store
from hilum.data.transforms import Preprocessing, evaluation_crop, normalise, random_resized_crop

EVALUATION = -1
"""The view number of the centre crop; 0 and up are augmented views."""
BATCHES_AHEAD = 2
LARGEST_CACHE = 0.7
"""Share of the usable memory that a cache may take."""


class Features(NamedTuple):
    """What heads read: tokens of the last n blocks of a frozen backbone, float32."""

    cls: Float[Tensor, "B E"]
    """[CLS] of the n blocks, concatenated: E = n·D."""
    patch_mean: Float[Tensor, "B D"]
    """Mean patch token of the last block."""
    patches: Float[Tensor, "B N E"] | None
    """Patch tokens of the n blocks, concatenated on channels; None for heads that do not read them."""
    grid: tuple[int, int]
    """Rows and columns of the patch grid: N = h·w."""
    study: Int64[Tensor, " B"] | None = None
    """Study of each image, 0 .. S-1 in this batch, every study whole; None where nothing asks for studies."""
    view: Int64[Tensor, " B"] | None = None
    """Position of each image's view in `core.types.VIEW_KINDS`; None as above."""
    source: Int64[Tensor, " B"] | None = None
    """Number of each image's dataset; 0 is the one that is predicted for. None where nothing asks."""


def freeze(backbone: VisionTransformer) -> VisionTransformer:
    """Put a backbone in evaluation mode, out of reach of gradients; returns it."""
    return backbone.eval().requires_grad_(False)


@torch.no_grad()
def extract(
    backbone: VisionTransformer,
    images: UInt8[Tensor, "B 1 H W"],
    recipe: Preprocessing,
    blocks: int,
    patches: bool,
    precision: str = "fp32",
) -> Features:
    """Features of a batch of grey images on the backbone's device, out of reach of gradients.

    Args:
        backbone: frozen, in evaluation mode.
        images: pixels as the crops give them; normalised here by `recipe`.
        recipe: the backbone's own fixed mean and standard deviation.
        blocks: n, how many last blocks to read.
        patches: also keep the patch tokens.
        precision: "bf16" runs the backbone under autocast; what comes out is float32 either way.
    """
    assert not backbone.training, "features come from a frozen backbone in evaluation mode"
    return read_tokens(backbone, images, recipe, blocks, patches, precision)


def read_tokens(
    backbone: VisionTransformer,
    images: UInt8[Tensor, "B 1 H W"],
    recipe: Preprocessing,
    blocks: int,
    patches: bool,
    precision: str = "fp32",
) -> Features:
    """As `extract`, with gradients to whatever in the backbone asks for them."""
    height, width = images.shape[2] // backbone.config.patch_size, images.shape[3] // backbone.config.patch_size
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        tokens = backbone.intermediate(normalise(images, recipe), blocks)
    return Features(
        cls=torch.cat([block.cls.float() for block in tokens], dim=1),
        patch_mean=tokens[-1].patches.float().mean(dim=1),
        patches=torch.cat([block.patches.float() for block in tokens], dim=2) if patches else None,
        grid=(height, width),
    )


Item = TypeVar("Item")


def read_ahead(
    batches: Iterable[np.ndarray], read: Callable[[int], Item], workers: int
) -> Iterator[tuple[np.ndarray, list[Item]]]:
    """Call `read` on every index of every batch with threads, a few batches ahead of their use, in order.

    Yields:
        a batch's indices and what was read for each.
    """
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        waiting = ((batch, [pool.submit(read, int(index)) for index in batch]) for batch in batches)
        queue = deque(islice(waiting, BATCHES_AHEAD))
        try:
            while queue:
                batch, futures = queue.popleft()
                items = [future.result() for future in futures]
                queue.extend(islice(waiting, 1))
                yield batch, items
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def to_batch(crops: list[np.ndarray]) -> UInt8[Tensor, "B 1 S S"]:
    """Square crops of one size as one tensor."""
    return torch.from_numpy(np.stack(crops)[:, None])


class Compaction(Protocol):
    """How patch tokens are made small enough to be kept (`compact.Kept`)."""

    def keep(self, features: Features) -> Features:
        """The same features with reduced patches in 8 bits."""

    def restore(self, features: Features) -> Features:
        """What heads read of kept features: float32."""


@dataclass(frozen=True)
class Augmentation:
    """Training views of a head (RPIDIAL/CheXFound linear_glori.py): a large random crop and a flip."""

    crop_scale: tuple[float, float] = (0.75, 1.0)
    """Share of the image's area that a crop keeps."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a crop before it is resized to a square."""
    flip: float = 0.5
    """Probability of a horizontal flip."""


class FeatureSource:
    """Features of a store's images by view, recomputed each time or kept in memory once computed.

    A view is a function of (seed, image uid, view number) alone: not of order, batch size or worker count.

    Args:
        store: where pixels come from.
        indices: the images it may be asked for (training and validation), int64.
        backbone: frozen, on the device that is to compute.
        recipe: its normalisation.
        resolution: side of the square crops, pixels.
        blocks: n, last blocks to read.
        patches: also patch tokens.
        augmentation: how training views are made.
        cached_views: K; training epoch e uses view e mod K and views stay in memory, as does the evaluation view.
            0: view e, nothing is kept.
        cache_dtype: what the cache holds; "float16" halves it, at a relative error of 2^-11.
        precision: as `extract`.
        workers: threads that read images.
        seed: root seed of the augmentation.
        device: where features are computed and handed out.
        kept_channels: how many numbers of 8 bits `compaction` will keep of a patch token; None: tokens as they are.

    Raises:
        ConfigError: a cache that would take most of the memory there is.
    """

    def __init__(
        self,
        store: Store,
        indices: np.ndarray,
        backbone: VisionTransformer,
        recipe: Preprocessing,
        *,
        resolution: int,
        blocks: int,
        patches: bool,
        augmentation: Augmentation,
        cached_views: int = 0,
        cache_dtype: str = "float32",
        precision: str = "fp32",
        workers: int = 2,
        seed: int = 0,
        device: torch.device | str = "cpu",
        kept_channels: int | None = None,
    ) -> None:
        self.store, self.backbone, self.recipe = store, backbone, recipe
        self.resolution, self.blocks, self.patches = resolution, blocks, patches
        self.augmentation, self.cached_views, self.precision = augmentation, cached_views, precision
        self.workers, self.seed, self.device = workers, seed, torch.device(device)
        self.cache_dtype = getattr(torch, cache_dtype)
        self.rows = np.full(len(store), -1, dtype=np.int64)  # a cache's row of each store index
        self.rows[indices] = np.arange(len(indices))
        self.images = len(indices)
        self.cache: dict[int, _CachedView] = {}
        self.kept_channels = kept_channels
        self.compaction: Compaction | None = None
        """Set once it has been fitted on `computed` features; what is handed out is then restored from what is kept."""
        self._check_memory()

    def training(self, epoch: int, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, Features]]:
        """Augmented features of an epoch, batch by batch: (store indices, features)."""
        return self._view(epoch % self.cached_views if self.cached_views else epoch, batches)

    def evaluation(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, Features]]:
        """Features of the centre crops, batch by batch: (store indices, features)."""
        return self._view(EVALUATION, batches)

    def computed(self, view: int, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, Features]]:
        """Features of a view as the backbone gives them, neither kept nor reduced: (store indices, features)."""
        for indices, images in self.squares(view, batches):
            yield indices, extract(self.backbone, images, self.recipe, self.blocks, self.patches, self.precision)

    def pixels(self, index: int, view: int) -> UInt8[np.ndarray, "S S"]:
        """One image's crop for a view."""
        pixels = self.store.read(index)
        if view == EVALUATION:
            return evaluation_crop(pixels, self.resolution)
        rng = stream(self.seed, "head augmentation", view, str(self.store.uids[index]))
        how = self.augmentation
        crop = random_resized_crop(pixels, self.resolution, how.crop_scale, how.crop_ratio, rng)
        return crop[:, ::-1] if rng.random() < how.flip else crop

    @property
    def cache_bytes(self) -> int:
        """Size of the full cache, all views."""
        dim = self.backbone.config.embed_dim
        tokens = (self.resolution // self.backbone.config.patch_size) ** 2 if self.patches else 0
        size = self.cache_dtype.itemsize
        of_token = dim * self.blocks * size if self.kept_channels is None else self.kept_channels
        views = self.cached_views + 1 if self.cached_views else 0
        return self.images * views * (tokens * of_token + dim * (self.blocks + 1) * size)

    def _check_memory(self) -> None:
        memory = usable_memory()
        if self.cache_bytes > LARGEST_CACHE * memory:
            raise ConfigError(
                f"A cache of {self.cached_views} augmented views of {self.images} images takes "
                f"{self.cache_bytes / 1e9:.1f} GB; this machine or container has {memory / 1e9:.1f} GB. Lower "
                "augmented_views (0 recomputes features each epoch), or use cache_dtype=float16."
            )

    def _view(self, view: int, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, Features]]:
        if not self.cached_views:
            for indices, features in self._compute(view, batches):
                yield indices, self._restored(features)
            return
        if view not in self.cache:
            self.cache[view] = _CachedView(self.images, self.cache_dtype)
        cache = self.cache[view]
        listed = list(batches)
        # An image that comes twice is computed once; what is missing now is missing when its turn comes.
        promised, missing = cache.filled.copy(), []
        for batch in listed:
            first = np.zeros(len(batch), dtype=bool)
            first[np.unique(batch, return_index=True)[1]] = True
            missing.append(batch[first & ~promised[self.rows[batch]]])
            promised[self.rows[batch]] = True
        computed = self._compute(view, [batch for batch in missing if len(batch)])
        for batch, absent in zip(listed, missing, strict=True):
            if len(absent):
                indices, features = next(computed)
                cache.put(self.rows[indices], features)
            yield batch, self._restored(cache.get(self.rows[batch], self.device))

    def squares(
        self, view: int, batches: Iterable[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, UInt8[Tensor, "B 1 S S"]]]:
        """The crops of a view, batch by batch, on the device: (store indices, images)."""
        for indices, crops in read_ahead(batches, lambda index: self.pixels(index, view), self.workers):
            yield indices, to_batch(crops).to(self.device)

    def _compute(self, view: int, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, Features]]:
        for indices, features in self.computed(view, batches):
            yield indices, features if self.compaction is None else self.compaction.keep(features)

    def _restored(self, features: Features) -> Features:
        return features if self.compaction is None else self.compaction.restore(features)


class _CachedView:
    """Features of one view, a row per image."""

    def __init__(self, images: int, dtype: torch.dtype) -> None:
        self.filled = np.zeros(images, dtype=bool)
        self.dtype = dtype
        self.columns: list[Tensor | None] = []
        self.grid = (0, 0)

    def put(self, rows: np.ndarray, features: Features) -> None:
        parts = features[:3]
        if not self.columns:
            self.grid = features.grid
            self.columns = [
                None if part is None else torch.empty((len(self.filled), *part.shape[1:]), dtype=self._dtype(part))
                for part in parts
            ]
        for column, part in zip(self.columns, parts, strict=True):
            if column is not None and part is not None:
                column[torch.from_numpy(rows)] = part.to("cpu", column.dtype)
        self.filled[rows] = True

    def _dtype(self, part: Tensor) -> torch.dtype:
        return part.dtype if part.dtype == torch.int8 else self.dtype

    def get(self, rows: np.ndarray, device: torch.device) -> Features:
        cls, patch_mean, patches = (
            None if column is None else self._from(column[torch.from_numpy(rows)], device) for column in self.columns
        )
        assert cls is not None
        assert patch_mean is not None
        return Features(cls, patch_mean, patches, self.grid)

    @staticmethod
    def _from(rows: Tensor, device: torch.device) -> Tensor:
        """Numbers that were kept in 8 bits stay so on their way to the device."""
        return rows.to(device) if rows.dtype == torch.int8 else rows.to(device, torch.float32)
