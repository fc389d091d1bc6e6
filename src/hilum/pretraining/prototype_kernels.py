"""The steps of `prototype_loss.py` as Triton kernels for a CUDA device; imported only where they run.

Every kernel multiplies a tile of rows with a tile of prototypes and uses the tile at once, so that the teacher's logits
never reach memory. Sinkhorn-Knopp needs one kernel only: the log-sum-exp of each row of a product plus a bias, with
features against prototypes for row factors, and with prototypes against features for column sums. The losses take the
targets of a chunk from memory (they serve up to ten crops), and leave the gradients of the logits of that chunk, which
torch's own products turn into those of features and prototypes.

Products of bfloat16 or float32, sums in float32; no atomic additions, so that results do not vary from run to run.
TRITON_INTERPRET=1 runs all of it on a CPU, slowly; tests do.
"""
# mypy: disable-error-code="no-untyped-def"

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from hilum.pretraining.projection import Projection

TILE_ROWS, TILE_COLUMNS, TILE_INNER = 128, 128, 64
"""Tile of a product, and the part of its inner dimension that is loaded at a time; powers of two."""
_LAUNCH = {"num_warps": 8, "num_stages": 3}
_TARGET_SCALE = 2.0**15
"""Targets are 0 to 1; times this, float16 holds them with three bits more than bfloat16, down to 2e-12."""
_PROGRAMS = 528
"""Programs that keep a large GPU busy; fewer row tiles share each row among several."""


def _kernel(function: Callable[..., None]) -> Any:
    """The function for Triton to compile; what checks shapes in tests, and would be wrapped around it, is taken off."""
    return triton.jit(inspect.unwrap(function))


@_kernel
def _products(
    left, right, rows, columns, row_count, column_count,
    width: tl.constexpr, tile_inner: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """left[rows] @ right[columns].T, 0 outside."""
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, width, tile_inner):
        inner = start + tl.arange(0, tile_inner)
        inside = inner < width
        left_part = tl.load(
            left + rows[:, None] * width + inner[None, :],
            mask=(rows[:, None] < row_count) & inside[None, :], other=0.0,
        )  # fmt: skip
        right_part = tl.load(
            right + columns[None, :] * width + inner[:, None],
            mask=(columns[None, :] < column_count) & inside[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(left_part, right_part, total, input_precision=precision)
    return total


@_kernel
def _wanted(
    targets, pairing, rows, columns, row_count, column_count, units,
    views: tl.constexpr, target_scale: tl.constexpr,
):  # fmt: skip
    """The targets of student rows, summed over the views that supervise their crop; and how many views those are."""
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    mass = tl.zeros((rows.shape[0],), tl.float32)
    crop, unit = rows // units, rows % units
    for view in tl.static_range(views):
        share = tl.load(pairing + crop * views + view, mask=rows < row_count, other=0.0)
        place = (view * units + unit).to(tl.int64)[:, None] * column_count + columns[None, :]
        read = inside & (share[:, None] != 0.0)
        total += tl.load(targets + place, mask=read, other=0.0).to(tl.float32) * share[:, None]
        mass += share
    return total / target_scale, mass


@_kernel
def _log_mass_kernel(
    left, right, bias, out, row_count, column_count, scale, tiles,
    width: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr, tile_inner: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Log sum_j exp(scale left_i . right_j + bias_j) over `tiles` tiles of columns from the second program index on."""
    rows = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    part = tl.program_id(1)
    peak = tl.full((tile_rows,), float("-inf"), tl.float32)
    total = tl.zeros((tile_rows,), tl.float32)
    for tile in range(part * tiles, (part + 1) * tiles):
        columns = tile * tile_columns + tl.arange(0, tile_columns)
        shift = tl.load(bias + columns, mask=columns < column_count, other=float("-inf"))
        logits = _products(left, right, rows, columns, row_count, column_count, width, tile_inner, precision)
        logits = logits * scale + shift[None, :]
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf so far
        total = total * tl.exp(peak - safe) + tl.sum(tl.exp(logits - safe[:, None]), axis=1)
        peak = higher
    tl.store(out + part * row_count + rows, peak + tl.log(total), mask=rows < row_count)


@_kernel
def _targets_kernel(
    left, right, row_bias, column_bias, out, row_count, column_count, scale,
    width: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr, tile_inner: tl.constexpr,
    precision: tl.constexpr, target_scale: tl.constexpr,
):  # fmt: skip
    """target_scale exp(scale left_i . right_j + row_bias_i + column_bias_j), written out."""
    rows = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    columns = tl.program_id(1) * tile_columns + tl.arange(0, tile_columns)
    logits = _products(left, right, rows, columns, row_count, column_count, width, tile_inner, precision) * scale
    logits += tl.load(row_bias + rows, mask=rows < row_count, other=0.0)[:, None]
    logits += tl.load(column_bias + columns, mask=columns < column_count, other=0.0)[None, :]
    place = rows.to(tl.int64)[:, None] * column_count + columns[None, :]
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    tl.store(out + place, (tl.exp(logits) * target_scale).to(out.dtype.element_ty), mask=inside)


@_kernel
def _agreement_kernel(
    left, right, targets, pairing, log_mass, agreement, row_count, column_count, units, scale, tiles,
    views: tl.constexpr,
    width: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr, tile_inner: tl.constexpr,
    precision: tl.constexpr, target_scale: tl.constexpr,
):  # fmt: skip
    """Log sum_j exp(z_ij) and sum_j t_ij z_ij of student logits z, over some tiles of columns."""
    rows = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    part = tl.program_id(1)
    peak = tl.full((tile_rows,), float("-inf"), tl.float32)
    total = tl.zeros((tile_rows,), tl.float32)
    agreed = tl.zeros((tile_rows,), tl.float32)
    for tile in range(part * tiles, (part + 1) * tiles):
        columns = tile * tile_columns + tl.arange(0, tile_columns)
        logits = _products(left, right, rows, columns, row_count, column_count, width, tile_inner, precision) * scale
        wanted, _ = _wanted(targets, pairing, rows, columns, row_count, column_count, units, views, target_scale)
        agreed += tl.sum(wanted * logits, axis=1)
        logits = tl.where(columns[None, :] < column_count, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - safe) + tl.sum(tl.exp(logits - safe[:, None]), axis=1)
        peak = higher
    tl.store(log_mass + part * row_count + rows, peak + tl.log(total), mask=rows < row_count)
    tl.store(agreement + part * row_count + rows, agreed, mask=rows < row_count)


@_kernel
def _gradient_kernel(
    left, right, targets, pairing, log_mass, weights, out, row_count, column_count, units, scale,
    views: tl.constexpr,
    width: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr, tile_inner: tl.constexpr,
    precision: tl.constexpr, target_scale: tl.constexpr,
):  # fmt: skip
    """weight_i scale (views_i softmax_ij - t_ij), written out."""
    rows = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    columns = tl.program_id(1) * tile_columns + tl.arange(0, tile_columns)
    logits = _products(left, right, rows, columns, row_count, column_count, width, tile_inner, precision) * scale
    wanted, mass = _wanted(targets, pairing, rows, columns, row_count, column_count, units, views, target_scale)
    log_total = tl.load(log_mass + rows, mask=rows < row_count, other=0.0)
    weight = tl.load(weights + rows, mask=rows < row_count, other=0.0) * scale
    gradient = weight[:, None] * (mass[:, None] * tl.exp(logits - log_total[:, None]) - wanted)
    place = rows.to(tl.int64)[:, None] * column_count + columns[None, :]
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    tl.store(out + place, gradient.to(out.dtype.element_ty), mask=inside)


class FusedPasses:
    """Passes over the teacher's logits for Sinkhorn-Knopp; see `prototype_chunks.ChunkedPasses`."""

    products = None
    """Kept nowhere."""

    def __init__(self, teacher: Projection, temperature: float, valid: Tensor | None, _chunk: int) -> None:
        self.features, self.prototypes = teacher.features.contiguous(), teacher.prototypes.contiguous()
        self.scale, self.dtype = 1 / temperature, torch.float32
        rows = self.features.shape[0]
        self.log_valid = self.features.new_zeros(rows, dtype=self.dtype) if valid is None else valid.float().log()

    def log_column_mass(self) -> Float[Tensor, " K"]:
        """Log sum_i exp(z_ik / T); -inf without a row."""
        return log_mass(self.prototypes, self.features, self.log_valid, self.scale)

    def row_factors(self, log_prototypes: Float[Tensor, " K"], columns: bool) -> tuple[Tensor, Tensor]:
        """Log row factors that make rows sum to 1; and, if `columns`, the column sums of what results."""
        log_rows = -log_mass(self.features, self.prototypes, log_prototypes, self.scale)
        if not columns:
            return log_rows, torch.zeros_like(log_prototypes)
        over_rows = log_mass(self.prototypes, self.features, log_rows + self.log_valid, self.scale)
        return log_rows, torch.exp(over_rows + log_prototypes)


class FusedComparison:
    """Losses of a chunk of student rows, and the gradients with respect to their logits."""

    def __init__(
        self, prototypes: Tensor, teacher: Projection, factors: tuple[Tensor, Tensor],
        temperatures: tuple[float, float], pairing: tuple[tuple[int, ...], ...], most: int, learns: bool,
        _products: None,
    ) -> None:  # fmt: skip
        """See `prototype_chunks.ChunkedComparison`."""
        crops, views = len(pairing), len(pairing[0])
        self.prototypes = prototypes.contiguous()
        self.teacher_prototypes = teacher.prototypes.contiguous()
        self.teacher_rows = teacher.features.unflatten(0, (views, -1))  # views units E
        self.log_rows, self.log_prototypes = factors[0].unflatten(0, (views, -1)), factors[1]
        self.scale, self.teacher_scale = 1 / temperatures[0], 1 / temperatures[1]
        self.pairing = _on_device(pairing, prototypes.device)
        self.mass = self.pairing.sum(dim=1, keepdim=True)  # crops 1
        self.learns = learns
        count = prototypes.shape[0]
        exact = prototypes.dtype == torch.float32
        self.targets = prototypes.new_empty(views * most, count, dtype=torch.float32 if exact else torch.float16)
        self.target_scale = 1.0 if exact else _TARGET_SCALE
        self.gradient = prototypes.new_empty(crops * most if learns else 0, count)

    def compare(self, rows: Tensor, span: slice, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies (crops x chunk), and weights x their gradients (crops chunk x K), in product precision."""
        crops, views = self.pairing.shape
        units, (count, width) = span.stop - span.start, self.prototypes.shape
        shape = _tile(rows.dtype, width) | {"target_scale": self.target_scale}
        taught = self.teacher_rows[:, span].flatten(0, 1).contiguous()  # views*chunk E
        row_bias = self.log_rows[:, span].flatten().contiguous()  # flattened, one unit of each view is a strided vector
        targets = self.targets[: views * units]
        grid = (_tiles(views * units, TILE_ROWS), _tiles(count, TILE_COLUMNS))
        _targets_kernel[grid](
            taught, self.teacher_prototypes, row_bias, self.log_prototypes, targets, views * units, count,
            self.teacher_scale, **shape,
        )  # fmt: skip
        rows = rows.contiguous()
        total, flat_weights = crops * units, weights.flatten().contiguous()
        parts, tiles = _split(total, count)
        log_mass, agreement = weights.new_empty(2, parts, total)
        _agreement_kernel[(_tiles(total, TILE_ROWS), parts)](
            rows, self.prototypes, targets, self.pairing, log_mass, agreement, total, count, units, self.scale, tiles,
            views=views, **shape,
        )  # fmt: skip
        log_total = torch.logsumexp(log_mass, dim=0)
        losses = self.mass * log_total.unflatten(0, (crops, units)) - agreement.sum(dim=0).unflatten(0, (crops, units))
        gradient = self.gradient[:total]
        if self.learns:
            _gradient_kernel[(_tiles(total, TILE_ROWS), _tiles(count, TILE_COLUMNS))](
                rows, self.prototypes, targets, self.pairing, log_total, flat_weights, gradient, total, count,
                units, self.scale, views=views, **shape,
            )  # fmt: skip
        return losses, gradient


def log_mass(
    left: Float[Tensor, "rows E"], right: Float[Tensor, "columns E"], bias: Float[Tensor, " columns"], scale: float
) -> Float[Tensor, " rows"]:
    """Log sum_j exp(scale left_i . right_j + bias_j) of each row; -inf without a column."""
    rows, columns = left.shape[0], right.shape[0]
    if not rows or not columns:
        return bias.new_full((rows,), -torch.inf)
    parts, tiles = _split(rows, columns)
    out = bias.new_empty(parts, rows)
    _log_mass_kernel[(_tiles(rows, TILE_ROWS), parts)](
        left, right, bias, out, rows, columns, scale, tiles, **_tile(left.dtype, left.shape[1])
    )
    return torch.logsumexp(out, dim=0)


@cache
def _on_device(pairing: tuple[tuple[int, ...], ...], device: torch.device) -> Float[Tensor, "crops views"]:
    """Sent once: a copy from memory that is not page-locked waits for the GPU."""
    return torch.tensor(pairing, dtype=torch.float32, device=device)


def _split(rows: int, columns: int) -> tuple[int, int]:
    """How many programs share a row, and how many tiles of columns each of them takes."""
    tiles = _tiles(columns, TILE_COLUMNS)
    parts = min(max(_PROGRAMS // _tiles(rows, TILE_ROWS), 1), tiles)
    each = _tiles(tiles, parts)
    return _tiles(tiles, each), each


def _tiles(count: int, size: int) -> int:
    return -(-count // size)


def _tile(dtype: torch.dtype, width: int) -> dict[str, object]:
    """Compile-time arguments of all kernels. float32 is multiplied as such, not rounded to TF32."""
    exact = dtype == torch.float32
    return {
        "width": width,
        "tile_rows": TILE_ROWS,
        "tile_columns": TILE_COLUMNS,
        "tile_inner": TILE_INNER // 2 if exact else TILE_INNER,  # the same bytes of shared memory
        "precision": "ieee" if exact else "tf32",
        **_LAUNCH,
    }
