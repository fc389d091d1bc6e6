"""Views of a batch of images on any device: what `crops.make_crops` makes, by matrix products.

Cutting, resizing and blur are linear and separable, so that a view is W_y I W_x^T; the look-up tables, the noise and
the levels' rounding to bytes come in the same order as in `crops.py`, which is the reference. Each step equals OpenCV's
within one grey level, and nearly everywhere exactly: sums in another order may round a tie the other way, and a steep
look-up table makes such a level several.

`stack_views` runs in the loader's processes, `render` on the device. Which views need which step is known on the CPU,
so that nothing waits for the device; images are taken a few at a time, so that memory is bounded.

More than 300 lines: one function for each thing that OpenCV does in `crops.py`, in the same order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from hilum.core.transfer import send
from hilum.pretraining.crops import (
    BLUR_KERNEL,
    NOISE_UNIT,
    View,
    blur_kernel,
    brighten,
    noise_field,
    noise_place,
    window_table,
)

CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**29}
"""About how much memory `render` uses beside its input and output."""
_CUBIC = -0.75
"""Coefficient of OpenCV's cubic kernel."""
_IDENTITY = np.arange(256, dtype=np.uint8)


@dataclass(frozen=True)
class StackedViews:
    """Views of one size of a batch of images: B images, K views of each. Fields hold what `crops.View` holds."""

    size: int
    """Side, pixels."""
    boxes: Int32[Tensor, "*BK 4"]
    """Top, left, height, width in the source."""
    turns: Float32[Tensor, "*BK 2"]
    """Cosine and sine of the rotation; (1, 0) where there is none."""
    flips: Bool[Tensor, "*BK"]
    before: UInt8[Tensor, "*BK 256"]
    """Levels before the change of contrast: brightness, where it comes first."""
    contrasts: Float32[Tensor, "*BK"]
    """Factor about the view's mean; 1 where there is none."""
    after: UInt8[Tensor, "*BK 256"]
    """Levels after it: brightness, where it comes second, and the window."""
    kernels: Float32[Tensor, "*BK 9"]
    """Taps of the blur; the fifth is 1 and the others 0 where there is none."""
    noise: Float32[Tensor, "*BK"]
    """Grey levels of the view for one level of the noise field; 0 where there is none."""
    noise_places: Int64[Tensor, "*BK 2"]
    """Row and column of the noise field."""
    solarised: Bool[Tensor, "*BK"]

    def each(self, change: Callable[[Tensor], Tensor]) -> "StackedViews":
        """The same with every tensor changed (moved, pinned)."""
        values = [getattr(self, field.name) for field in fields(self)]
        return StackedViews(self.size, *(change(value) for value in values if isinstance(value, Tensor)))

    def __getitem__(self, images: slice) -> "StackedViews":
        """The views of some images."""
        return self.each(lambda tensor: tensor[images])


def stack_views(views: Sequence[Sequence[View]], size: int) -> StackedViews:
    """Put what was drawn into arrays.

    Args:
        views: for each image, its views of that size, equally many.
        size: side of the views, pixels.
    """
    count, each = len(views), len(views[0])
    boxes, turns = np.zeros((count, each, 4), np.int32), np.zeros((count, each, 2))
    flips, solarised = np.zeros((count, each), bool), np.zeros((count, each), bool)
    before, after = (np.empty((count, each, 256), np.uint8) for _ in range(2))
    contrasts, noise = np.ones((count, each)), np.zeros((count, each))
    kernels, places = np.zeros((count, each, BLUR_KERNEL)), np.zeros((count, each, 2), np.int64)
    before[:], after[:], kernels[:, :, BLUR_KERNEL // 2], turns[:, :, 0] = _IDENTITY, _IDENTITY, 1, 1
    for image, row in enumerate(views):
        for number, view in enumerate(row):
            at = image, number
            boxes[at], flips[at], solarised[at] = view.box, view.flip, view.solarise
            if view.angle is not None:
                turns[at] = np.cos(np.radians(view.angle)), np.sin(np.radians(view.angle))
            if view.jitter is not None:
                table = brighten(_IDENTITY[None], view.jitter.brightness)[0]
                (before if view.jitter.brightness_first else after)[at] = table
                contrasts[at] = view.jitter.contrast
            if view.window is not None:
                after[at] = window_table(*view.window)[after[at]]
            if view.blur is not None:
                kernels[at] = blur_kernel(view.blur)
            if view.noise is not None:
                noise[at] = view.noise.sigma / NOISE_UNIT
                places[at] = noise_place(size, view.noise.top_at, view.noise.left_at)
    return StackedViews(
        size, torch.from_numpy(boxes), _single(turns), torch.from_numpy(flips), torch.from_numpy(before),
        _single(contrasts), torch.from_numpy(after), _single(kernels), _single(noise), torch.from_numpy(places),
        torch.from_numpy(solarised),
    )  # fmt: skip


def _single(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def render(
    sources: UInt8[Tensor, "B H W"],
    views: StackedViews,
    here: StackedViews,
    shapes: Int64[Tensor, "B 2"],
    chunk_bytes: int | None = None,
) -> UInt8[Tensor, "KB 1 S S"]:
    """Make the views of a batch, all first views, then all second views.

    Args:
        sources: images, each in the top left corner of its place.
        views: what was drawn, on the device of `sources`.
        here: the same on the CPU, to know which views need which step.
        shapes: height and width of each image, on the CPU.
        chunk_bytes: about how much memory to use; by default `CHUNK_BYTES`.
    """
    (images, count), size, device = here.flips.shape, here.size, sources.device
    made = torch.empty((count, images, size, size), dtype=torch.uint8, device=device)
    if device.type == "meta" or not made.numel():
        return made.view(-1, 1, size, size)
    budget = chunk_bytes or CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _full_precision(device):
        for part, (height, width) in _chunks(shapes, size, count, budget):
            pixels = sources[part, :height, :width].float()
            made[:, part] = _render_chunk(pixels, views[part], here[part])
    return made.view(-1, 1, size, size)


def _chunks(shapes: Tensor, size: int, count: int, budget: int) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Images that are rendered together, and the rows and columns that hold them."""
    start, images = 0, len(shapes)
    while start < images:
        stop, height, width = start, 0, 0
        while stop < images:
            rows, columns = (int(value) for value in shapes[stop])
            high, wide = max(height, rows), max(width, columns)
            # The image; per view two matrices with one temporary each, the half-resized view, and the views' levels.
            each = high * wide + count * size * (2 * (high + wide) + 2 * wide + 6 * size)
            if stop > start and 4 * each * (stop + 1 - start) > budget:
                break
            stop, height, width = stop + 1, high, wide
        yield slice(start, stop), (height, width)
        start = stop


def _render_chunk(pixels: Float[Tensor, "B H W"], views: StackedViews, here: StackedViews) -> UInt8[Tensor, "K B S S"]:
    """Views of a few images, crop-major."""
    (images, count), size = here.flips.shape, here.size
    flat = here.each(lambda tensor: tensor.flatten(0, 1))
    drawn = views.each(lambda tensor: tensor.flatten(0, 1))
    chosen = _Chosen(flat, pixels.device)
    made = _resize(pixels, drawn, chosen, count).round_().clamp_(0, 255)

    made = chosen.apply("turned", made, lambda part, at: _turn(part, drawn.turns[at]))
    made = torch.where(drawn.flips[:, None, None], made.flip(-1), made) if chosen.some("flipped") else made
    levels = made.to(torch.uint8)
    levels = chosen.apply("brightened", levels, lambda part, at: _look_up(part, drawn.before[at]))
    levels = chosen.apply("contrasted", levels, lambda part, at: _contrast(part, drawn.contrasts[at]))
    levels = chosen.apply("windowed", levels, lambda part, at: _look_up(part, drawn.after[at]))
    levels = chosen.apply("blurred", levels, lambda part, at: _blur(part, drawn.kernels[at]))
    levels = chosen.apply("noisy", levels, lambda part, at: _noise(part, drawn.noise[at], drawn.noise_places[at]))
    if chosen.some("solarised"):
        levels = torch.where(drawn.solarised[:, None, None], torch.minimum(levels, 255 - levels), levels)
    return levels.view(images, count, size, size).transpose(0, 1)


class _Chosen:
    """Which views of a chunk need which step: found on the CPU, sent to the device in one piece.

    Args:
        views: on the CPU, images and views in one axis.
        device: where the positions are needed.
    """

    def __init__(self, views: StackedViews, device: torch.device) -> None:
        height, width = views.boxes[:, 2], views.boxes[:, 3]
        taller, wider = height >= views.size, width >= views.size  # the axis shrinks, or stays as it is
        identity = torch.from_numpy(_IDENTITY)
        self.total = len(height)
        masks = {
            "rows shrunk": taller,
            "rows grown": ~taller,
            "columns shrunk": wider,
            "columns grown": ~wider,
            "rows shrunk first": (height > views.size) & ~wider,
            "columns shrunk first": (width > views.size) & ~taller,
            "turned": (views.turns != torch.tensor([1.0, 0.0])).any(dim=1),
            "flipped": views.flips,
            "brightened": (views.before != identity).any(dim=1),
            "contrasted": views.contrasts != 1,
            "windowed": (views.after != identity).any(dim=1),
            "blurred": views.kernels[:, BLUR_KERNEL // 2] != 1,
            "noisy": views.noise != 0,
            "solarised": views.solarised,
        }
        places = [mask.nonzero().flatten() for mask in masks.values()]
        self.counts = dict(zip(masks, map(len, places), strict=True))
        moved = send(torch.cat(places), device).split([len(place) for place in places])
        self._places = dict(zip(masks, moved, strict=True))

    def some(self, step: str) -> bool:
        """Whether any view needs a step."""
        return self.counts[step] > 0

    def all(self, step: str) -> bool:
        """Whether every view needs a step."""
        return self.counts[step] == self.total

    def at(self, step: str) -> Int64[Tensor, " n"]:
        """The views that need a step."""
        return self._places[step]

    def apply(self, step: str, values: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`values` with those views changed that need it, in place where it is not all of them."""
        if not self.some(step):
            return values
        at = self._places[step]
        return change(values, at) if self.all(step) else values.index_copy_(0, at, change(values[at], at))


def _resize(pixels: Float[Tensor, "B H W"], views: StackedViews, chosen: _Chosen, count: int) -> Float[Tensor, "n S S"]:
    """Boxes of the images, resized: area where an axis shrinks, cubic where it grows, as `data.transforms.resize`.

    Where one axis shrinks and the other grows, the one that shrinks comes first and is rounded to bytes between.
    """
    images, rows, columns = pixels.shape
    tops, lefts, heights, widths = views.boxes.unbind(dim=1)
    size = views.size
    down = _weights(tops, heights, rows, size, chosen, "rows")  # (n, S, H)
    across = _weights(lefts, widths, columns, size, chosen, "columns")  # (n, S, W)
    # One product for all views of an image.
    half = torch.bmm(down.view(images, count * size, rows), pixels).view(-1, size, columns)
    half = chosen.apply("rows shrunk first", half, lambda part, _: part.round())
    made = torch.bmm(half, across.transpose(1, 2))
    if chosen.some("columns shrunk first"):
        at = chosen.at("columns shrunk first")
        half = torch.bmm(pixels[at // count], across[at].transpose(1, 2)).round_()
        made.index_copy_(0, at, torch.bmm(down[at], half))
    return made


def _weights(
    starts: Int32[Tensor, " n"], lengths: Int32[Tensor, " n"], old: int, new: int, chosen: _Chosen, axis: str
) -> Float[Tensor, "n new old"]:
    """What each line of an image adds to each line of a view, along one axis."""
    if chosen.all(f"{axis} shrunk"):
        return _area_weights(starts, lengths, old, new)
    if chosen.all(f"{axis} grown"):
        return _cubic_weights(starts, lengths, old, new)
    weights = torch.empty((len(starts), new, old), device=starts.device)
    for step, make in ((f"{axis} shrunk", _area_weights), (f"{axis} grown", _cubic_weights)):
        at = chosen.at(step)
        weights.index_copy_(0, at, make(starts[at], lengths[at], old, new))
    return weights


def _area_weights(
    starts: Int32[Tensor, " n"], lengths: Int32[Tensor, " n"], old: int, new: int
) -> Float[Tensor, "n new old"]:
    """Overlap of an output line and an input line, as a share of the output line.

    In units of 1 / new of an input line every edge is a whole number, exact in float32 below 2^24.
    """
    edges = torch.arange(new + 1, device=starts.device) * lengths[:, None] + starts[:, None] * new
    edges = edges.float()[:, :, None]
    lines = torch.arange(0, old * new, new, device=starts.device).float()
    overlap = torch.minimum(edges[:, 1:], lines + new).sub_(torch.maximum(edges[:, :-1], lines)).clamp_(min=0)
    return overlap.div_(lengths[:, None, None])


def _cubic_weights(
    starts: Int32[Tensor, " n"], lengths: Int32[Tensor, " n"], old: int, new: int
) -> Float[Tensor, "n new old"]:
    """Four taps about the place of each output line; lines past the box are its first or last."""
    twice = (2 * torch.arange(new, device=starts.device) + 1) * lengths[:, None] - new  # whole numbers until here
    places = twice.float() / (2 * new)
    first = places.floor()
    x = places - first
    a = _CUBIC
    outer = ((a * (x + 1) - 5 * a) * (x + 1) + 8 * a) * (x + 1) - 4 * a
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    next_inner = ((a + 2) * (1 - x) - (a + 3)) * (1 - x) * (1 - x) + 1
    taps = (outer, inner, next_inner, 1 - outer - inner - next_inner)
    lines = torch.arange(old, device=starts.device)
    weights = torch.zeros((len(starts), new, old), device=starts.device)
    for number, tap in enumerate(taps):
        line = (first.int() - 1 + number).clamp_(min=0).minimum(lengths[:, None] - 1) + starts[:, None]
        weights += tap[:, :, None] * (lines == line[:, :, None])
    return weights


def _turn(views: Float[Tensor, "n S S"], turns: Float[Tensor, "n 2"]) -> Float[Tensor, "n S S"]:
    """Rotate about the centre, bilinear, edges mirrored about the outermost pixels."""
    size = views.shape[-1]
    places = torch.linspace(-1, 1, size, device=views.device) if size > 1 else torch.zeros(1, device=views.device)
    cosine, sine = turns[:, 0, None, None], turns[:, 1, None, None]
    across, down = places[None, None, :], places[None, :, None]
    grid = torch.stack([cosine * across - sine * down, sine * across + cosine * down], dim=-1)
    turned = F.grid_sample(views[:, None], grid, mode="bilinear", padding_mode="reflection", align_corners=True)
    return turned[:, 0].round_()


def _look_up(levels: UInt8[Tensor, "n S S"], tables: UInt8[Tensor, "n 256"]) -> UInt8[Tensor, "n S S"]:
    offsets = torch.arange(0, tables.numel(), 256, dtype=torch.int32, device=levels.device)
    index = levels.int().add_(offsets[:, None, None])
    return tables.flatten().index_select(0, index.flatten()).view(levels.shape)


def _contrast(levels: UInt8[Tensor, "n S S"], factors: Float[Tensor, " n"]) -> UInt8[Tensor, "n S S"]:
    means = levels.sum(dim=(1, 2), dtype=torch.int32).float() / levels[0].numel()
    shifts = (1 - factors) * means
    return _to_bytes(levels * factors[:, None, None] + shifts[:, None, None])


def _blur(levels: UInt8[Tensor, "n S S"], kernels: Float[Tensor, "n 9"]) -> UInt8[Tensor, "n S S"]:
    """Separable, edges mirrored: K I K^T with a banded matrix K."""
    size = levels.shape[-1]
    band = (kernels @ _band(size, levels.device)).view(-1, size, size)
    return _to_bytes(torch.bmm(torch.bmm(band, levels.float()), band.transpose(1, 2)))


@lru_cache(maxsize=8)
def _band(size: int, device: torch.device) -> Float[Tensor, "9 cells"]:
    """For each tap of the blur, 1 where it connects an output line with an input line; flattened."""
    lines, reach = np.arange(size), BLUR_KERNEL // 2
    cells = np.zeros((BLUR_KERNEL, size, size), np.float32)
    period = max(2 * (size - 1), 1)
    for tap in range(BLUR_KERNEL):
        mirrored = np.abs(lines + tap - reach) % period
        cells[tap, lines, np.where(mirrored < size, mirrored, period - mirrored)] = 1
    return torch.from_numpy(cells.reshape(BLUR_KERNEL, -1)).to(device)


def _noise(
    levels: UInt8[Tensor, "n S S"], factors: Float[Tensor, " n"], places: Int64[Tensor, "n 2"]
) -> UInt8[Tensor, "n S S"]:
    size = levels.shape[-1]
    windows = _field(size, levels.device).unfold(0, size, 1).unfold(1, size, 1)[places[:, 0], places[:, 1]]
    factor = factors[:, None, None]
    return _to_bytes(levels + windows * factor - 128 * factor)


@lru_cache(maxsize=8)
def _field(size: int, device: torch.device) -> UInt8[Tensor, "n n"]:
    return torch.from_numpy(noise_field(size)).to(device)


def _to_bytes(values: Float[Tensor, "n S S"]) -> UInt8[Tensor, "n S S"]:
    return values.round_().clamp_(0, 255).to(torch.uint8)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Inside, float32 products on a GPU keep 24 bits, whatever the program allows elsewhere."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer switch, which does not mix with this one
        newer, matmul.fp32_precision = matmul.fp32_precision, "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = newer
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
