"""The steps of `prototype_loss.py` on chunks of rows, in plain PyTorch: any device, any precision.

`ChunkedPasses` makes the factors of targets, `ChunkedComparison` the losses of student rows and the gradients of their
logits. The matrices of a chunk always lie in the same memory, and all element-wise work is done in it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hilum.pretraining.projection import Projection, at_least_float32

_CPU_ELEMENTS = 2**25
"""Logits held at once on a CPU, 128 MB: few enough to stay near the cache, enough to make the products worth while."""
_KEPT_ELEMENTS = 2**26
"""Teacher logits that a CPU keeps between passes, 256 MB: there a product costs more than the room."""
_ROWS_OF_PRODUCT = 16384
_GPU_ELEMENTS = (2**24, 2**27)
"""Least and most logits held at once on a GPU; between them, a sixteenth of all."""


class ChunkedComparison:
    """Losses of a chunk of student rows, and the gradients with respect to their logits, in plain PyTorch."""

    def __init__(
        self, prototypes: Tensor, teacher: Projection, factors: tuple[Tensor, Tensor],
        temperatures: tuple[float, float], pairing: tuple[tuple[int, ...], ...], most: int, learns: bool,
        products: Tensor | None,
    ) -> None:  # fmt: skip
        """Memory for chunks of up to `most` units.

        Args:
            prototypes: K x E of the student.
            teacher: features of views x units rows, and prototypes.
            factors: log row and log prototype factors of the targets.
            temperatures: of student and teacher.
            pairing: whether a view (inner) supervises a crop (outer).
            most: units in the longest chunk.
            learns: whether gradients are wanted.
            products: logits of the teacher, where they have been kept.
        """
        crops, views = len(pairing), len(pairing[0])
        self.pairing, self.temperature, self.learns = pairing, temperatures[0], learns
        self.teacher_rows = teacher.features.unflatten(0, (views, -1))  # views units E
        self.products = None if products is None else products.unflatten(0, (views, -1))
        self.log_rows, self.log_prototypes = factors[0].unflatten(0, (views, -1)), factors[1]
        self.student_logits = Logits(prototypes, temperatures[0], crops * most)
        self.teacher_logits = Logits(teacher.prototypes, temperatures[1], views * most)

    def compare(self, rows: Tensor, span: slice, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies (crops x chunk), and weights x their gradients (crops chunk x K), in product precision."""
        crops, views = len(self.pairing), len(self.pairing[0])
        products = self.products[:, span].flatten(0, 1) if self.products is not None else None
        features = self.teacher_rows[:, span].flatten(0, 1)
        teacher = self.teacher_logits.of(features, self.log_prototypes, products)
        taught = teacher.add_(self.log_rows[:, span].reshape(-1, 1)).exp_().unflatten(0, (views, -1))  # views chunk K
        logits = self.student_logits.of(rows)
        losses = torch.empty_like(weights)
        sums: dict[tuple[int, ...], Tensor] = {}
        for crop, (said, share) in enumerate(zip(logits.unflatten(0, (crops, -1)), weights, strict=True)):  # chunk K
            chosen = self.pairing[crop]
            if chosen not in sums:
                views_of = [taught[view] for view in range(views) if chosen[view]]
                sums[chosen] = views_of[0] if len(views_of) == 1 else torch.stack(views_of).sum(dim=0)
            wanted, mass = sums[chosen], sum(chosen)
            agreement = (said[:, None] @ wanted[:, :, None]).flatten()
            peak = said.amax(dim=1)
            total = said.sub_(peak[:, None]).exp_().sum(dim=1)
            losses[crop] = mass * (peak + total.log()) - agreement
            if self.learns:  # in the logits' memory: weight (mass softmax - target) / temperature
                scale = share / self.temperature
                said.mul_((scale * mass / total)[:, None]).addcmul_(wanted, scale[:, None], value=-1)
        return losses, logits.to(rows.dtype)


class ChunkedPasses:
    """Passes over the teacher's logits for Sinkhorn-Knopp, some rows at a time, in plain PyTorch."""

    def __init__(self, teacher: Projection, temperature: float, valid: Tensor | None, chunk: int) -> None:
        self.features = teacher.features
        rows, count = self.features.shape[0], teacher.prototypes.shape[0]
        self.spans = spans_of(rows, count, 1, chunk, self.features.device)
        self.logits = Logits(teacher.prototypes, temperature, longest(self.spans))
        self.count, self.dtype = count, self.logits.buffer.dtype
        self.valid = self.logits.buffer.new_ones(rows) if valid is None else valid.to(self.dtype)
        keep = not self.features.is_cuda and rows * count <= _KEPT_ELEMENTS
        self.products = at_least_float32(self.features @ teacher.prototypes.T) if keep else None

    def _logits(self, span: slice, bias: Tensor | None = None) -> Tensor:
        return self.logits.of(self.features[span], bias, None if self.products is None else self.products[span])

    def log_column_mass(self) -> Float[Tensor, " K"]:
        """Log sum_i exp(z_ik / T); -inf without a row."""
        peak = self.valid.new_full((self.count,), -torch.inf)
        mass = self.valid.new_zeros(self.count)
        for span in self.spans:
            logits = self._logits(span)
            higher = torch.maximum(peak, logits.amax(dim=0))
            mass = mass * torch.exp(peak - higher) + self.valid[span] @ logits.sub_(higher).exp_()
            peak = higher
        return peak + mass.log()

    def row_factors(self, log_prototypes: Float[Tensor, " K"], columns: bool) -> tuple[Tensor, Tensor]:
        """Log row factors that make rows sum to 1; and, if `columns`, the column sums of what results."""
        log_rows = torch.empty_like(self.valid)
        mass = torch.zeros_like(log_prototypes)
        for span in self.spans:
            logits = self._logits(span, log_prototypes)
            peak = logits.amax(dim=1)
            similarity = logits.sub_(peak[:, None]).exp_()
            total = similarity.sum(dim=1)
            log_rows[span] = -(peak + total.log())
            if columns:
                mass += (self.valid[span] / total) @ similarity
        return log_rows, mass


class Logits:
    """Products of rows with all prototypes over a temperature, always in the same memory."""

    def __init__(self, prototypes: Float[Tensor, "K E"], temperature: float, longest: int) -> None:
        self.prototypes, self.temperature = prototypes, temperature
        exact = torch.float64 if prototypes.dtype == torch.float64 else torch.float32
        shape = (longest, prototypes.shape[0])
        self.buffer = prototypes.new_empty(shape, dtype=exact)  # once: fresh memory costs a CPU as much as a pass
        self.rounded = prototypes.new_empty(shape) if exact != prototypes.dtype and not prototypes.is_cuda else None

    def of(
        self, features: Float[Tensor, "rows E"], bias: Float[Tensor, " K"] | None = None,
        products: Float[Tensor, "rows K"] | None = None,
    ) -> Float[Tensor, "rows K"]:  # fmt: skip
        """Features @ prototypes.T / temperature + bias; overwritten by the next call.

        `products` may hold features @ prototypes.T from before.
        """
        out, transposed, scale = self.buffer[: features.shape[0]], self.prototypes.T, 1 / self.temperature
        if products is None and self.rounded is not None:  # a CPU rounds the products of half precision
            products = out.copy_(torch.mm(features, transposed, out=self.rounded[: features.shape[0]]))
        if products is not None:
            shift = out.new_zeros(()) if bias is None else bias
            return torch.add(shift, products, alpha=scale, out=out)
        if features.dtype != out.dtype:
            torch.mm(features, transposed, out_dtype=out.dtype, out=out).mul_(scale)
            return out if bias is None else out.add_(bias)
        if bias is None:
            return torch.mm(features * scale, transposed, out=out)
        return torch.addmm(bias, features, transposed, alpha=scale, out=out)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Left @ right, in at least float32; on a CPU half precision rounds it."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return at_least_float32(left @ right)


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Add left @ right to `total`, or, if it is the first, write it there.

    In half precision some rows at a time, for the products need memory of their own.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
        return
    for rows, part in zip(total.split(_ROWS_OF_PRODUCT), left.split(_ROWS_OF_PRODUCT), strict=True):
        if first:
            rows.copy_(product(part, right))
        else:
            rows.add_(product(part, right))


def spans_of(units: int, prototypes: int, rows_of_unit: int, chunk: int, device: torch.device) -> list[slice]:
    """Cut `units` so that about `chunk` rows, 0: as many as suits the device, are held at a time."""
    if chunk < 1:
        least, most = _GPU_ELEMENTS if device.type == "cuda" else (_CPU_ELEMENTS, _CPU_ELEMENTS)
        chunk = min(max(units * rows_of_unit * prototypes // 16, least), most) // prototypes
    step = max(chunk // rows_of_unit, 1)
    return [slice(start, min(start + step, units)) for start in range(0, units, step)]


def longest(spans: Sequence[slice]) -> int:
    """Length of the longest; 0 when there is none."""
    return max((span.stop - span.start for span in spans), default=0)
