"""The losses over prototypes without a matrix of rows x prototypes: factored targets, gradients made in the forward.

With 131,072 prototypes the matrices of a step are tens of gigabytes, and moving them takes longer than the products
that make them. Here the teacher's targets are kept as two vectors (`Assignment`), logits are multiplied out again
where they are needed, a chunk of rows at a time, and the loss leaves its gradients behind, so that nothing waits for
the backward pass. Numbers are those of `losses.py`, up to rounding. Plain PyTorch; `prototype_kernels.py` has the same
steps as Triton kernels for a CUDA device. Which rows meet which is `dinov2.py`'s business.

Half precision is for products only: their results, targets, losses and sums are float32. float64 stays float64.
"""

import importlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from hilum.core.distributed import max_over_ranks, mean_over_ranks, sum_over_ranks
from hilum.pretraining.projection import Projection, at_least_float32

Method = Literal["chunked", "triton"]

_CPU_ELEMENTS = 2**24
"""Logits held at once on a CPU, 64 MB: few enough to stay near the cache, enough to make the products worth while."""
_KEPT_ELEMENTS = 2**26
"""Teacher logits that a CPU keeps between passes, 256 MB: there a product costs more than the room."""
_GPU_ELEMENTS = (2**24, 2**27)
"""Least and most logits held at once on a GPU; between them, a sixteenth of all."""


@dataclass(frozen=True)
class Assignment:
    """Soft assignments of rows to prototypes: Q_ik = exp(z_ik / T + log_rows_i + log_prototypes_k), rows sum to 1.

    z are the teacher's logits. Sinkhorn-Knopp and centring both have this form.
    """

    teacher: Projection
    """In the precision of products; takes no gradient."""
    temperature: float
    """T."""
    log_rows: Float[Tensor, " rows"]
    log_prototypes: Float[Tensor, " K"]
    valid: Float[Tensor, " rows"] | None = None
    """1, or 0 for rows of padding; None: all are rows."""
    method: Method = "chunked"
    """How it was made, and how losses against it are."""
    chunk: int = 0
    """Rows at a time, 0: chosen from the size."""
    products: Float[Tensor, "rows K"] | None = None
    """Logits in the precision of products, where a CPU has room for them; None: multiplied out where needed."""

    def matrix(self) -> Float[Tensor, "rows K"]:
        """Q itself; for tests and for small sizes."""
        none = self.log_rows.new_empty(0, self.log_prototypes.shape[0])
        return torch.cat([none, *(block.clone() for _, block in self.blocks())])

    def blocks(self) -> Iterator[tuple[slice, Float[Tensor, "chunk K"]]]:
        """Q some rows at a time; a block is overwritten by the next."""
        rows, count = self.log_rows.shape[0], self.log_prototypes.shape[0]
        spans = _spans(rows, count, 1, self.chunk, self.log_rows.device)
        logits = _Logits(self.teacher.prototypes, self.temperature, _longest(spans))
        for span in spans:
            products = None if self.products is None else self.products[span]
            block = logits.of(self.teacher.features[span], self.log_prototypes, products)
            yield span, block.add_(self.log_rows[span, None]).exp_()


@torch.no_grad()
def balanced_assignment(
    teacher: Projection, temperature: float, iterations: int = 3, method: Method = "chunked", chunk: int = 0,
    valid: Float[Tensor, " rows"] | None = None,
) -> Assignment:  # fmt: skip
    """Sinkhorn-Knopp over the rows of all ranks, as `losses.sinkhorn_targets`, from features instead of logits.

    Everything is a logarithm: the first column sums take out each column's own maximum, later ones weigh rows that sum
    to 1, so no exponential can overflow however long the prototypes have grown. After a column update one pass over a
    chunk of rows gives its row factors and its share of the next column sums: `iterations` + 1 products in all.

    Args:
        teacher: features and prototypes; zero rows are allowed on a rank, which still takes part in the sums.
        temperature: T.
        iterations: at least 1; 3 in DINOv2.
        method: chunked or triton.
        chunk: rows at a time, 0: chosen from the size.
        valid: 1, or 0 for rows of padding, which then weigh nothing.
    """
    operands = in_product_precision(teacher)
    passes = _passes(method)(operands, temperature, valid, chunk)
    with torch.autocast(teacher.features.device.type, enabled=False):
        log_mass = passes.log_column_mass()
        highest = max_over_ranks(log_mass.clone()).clamp_min(torch.finfo(log_mass.dtype).min)
        log_mass = highest + sum_over_ranks(torch.exp(log_mass - highest)).log()
        log_count = math.log(operands.prototypes.shape[0])
        log_prototypes = torch.where(log_mass == -torch.inf, 0.0, -log_mass - log_count)  # no row anywhere: any will do
        tiny = torch.finfo(log_mass.dtype).tiny
        for iteration in range(iterations):
            more = iteration + 1 < iterations
            log_rows, mass = passes.row_factors(log_prototypes, more)
            if more:
                log_prototypes = log_prototypes - log_count - sum_over_ranks(mass).clamp_min(tiny).log()
    return Assignment(operands, temperature, log_rows, log_prototypes, valid, method, chunk, passes.products)


@torch.no_grad()
def centred_assignment(
    teacher: Projection, centre: Float[Tensor, " K"], temperature: float, method: Method = "chunked", chunk: int = 0,
    valid: Float[Tensor, " rows"] | None = None,
) -> Assignment:  # fmt: skip
    """softmax((z - centre) / temperature), as `losses.centred_targets`, from features instead of logits."""
    operands = in_product_precision(teacher)
    passes = _passes(method)(operands, temperature, valid, chunk)
    log_prototypes = at_least_float32(centre).to(passes.dtype) / -temperature
    with torch.autocast(teacher.features.device.type, enabled=False):
        log_rows, _ = passes.row_factors(log_prototypes, False)
    return Assignment(operands, temperature, log_rows, log_prototypes, valid, method, chunk, passes.products)


def dino_losses(
    student: Projection, targets: Assignment, views: int = 2, temperature: float = 0.1
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """As `losses.dino_losses`: (local + global, local, global); gradients flow from the first only.

    The targets of an image serve all of its crops: they are made once, summed over the teacher's views first.

    Args:
        student: rows of the global crops, then of the local crops, each crop-major.
        targets: of the teacher's `views` global crops, crop-major.
        views: G.
        temperature: of the student.
    """
    images = targets.log_rows.shape[0] // views
    crops = student.features.shape[0] // images
    pairing = tuple(tuple(int(view != crop) for view in range(views)) for crop in range(crops))
    pairs = sum(map(sum, pairing))
    weights = targets.log_rows.new_full((crops, images), 1 / (pairs * images))
    total, per_crop = _compare(student, targets, weights, pairing, temperature)
    return total, per_crop[views:].sum(), per_crop[:views].sum()


def ibot_loss(
    student: Projection, targets: Assignment, weights: Float[Tensor, " M"], crops: int, temperature: float = 0.1
) -> Float[Tensor, ""]:
    """As `losses.ibot_loss`; a row of weight 0 is padding."""
    return _compare(student, targets, weights[None] / crops, ((1,),), temperature)[0]


def usage_and_entropy(targets: Assignment) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`losses.prototype_usage` and `losses.target_entropy`, chunk by chunk."""
    count = targets.log_prototypes.shape[0]
    mass, entropy = torch.zeros_like(targets.log_prototypes), targets.log_rows.new_zeros(())
    valid = torch.ones_like(targets.log_rows) if targets.valid is None else targets.valid.to(targets.log_rows.dtype)
    with torch.no_grad(), torch.autocast(mass.device.type, enabled=False):
        for span, block in targets.blocks():
            mass += valid[span] @ block
            entropy += valid[span] @ torch.special.entr(block).sum(dim=1)
        rows, log_count = valid.sum().clamp_min(1), math.log(count)
        mean = mean_over_ranks(mass / rows)
        return torch.special.entr(mean).sum() / log_count, entropy / rows / log_count


def in_product_precision(projection: Projection) -> Projection:
    """Detached operands in the precision that autocast gives to products here; as they are without autocast."""
    device, features = projection.features.device.type, projection.features
    wanted = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
    if features.dtype == torch.float64:
        wanted = torch.float64
    return Projection(features.detach().to(wanted), projection.prototypes.detach().to(wanted))


def _compare(
    student: Projection, targets: Assignment, weights: Tensor, pairing: tuple[tuple[int, ...], ...], temperature: float
) -> tuple[Tensor, Tensor]:
    return _Comparison.apply(student.features, student.prototypes, weights, targets, pairing, temperature)


class _Comparison(torch.autograd.Function):
    """Weighted cross-entropy of student rows against an `Assignment`; its gradients are made with it.

    Student rows are crops x units, teacher rows views x units (a unit is an image for DINO, a token for iBOT), and
    `pairing[crop][view]` says whether that view supervises that crop. Returns the weighted sum, and without gradient
    its part of each crop.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, prototypes: Tensor, weights: Tensor, targets: Assignment,
        pairing: tuple[tuple[int, ...], ...], temperature: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        crops, views = len(pairing), len(pairing[0])
        units, count = weights.shape[1], prototypes.shape[0]
        student = in_product_precision(Projection(features, prototypes))
        rows = student.features.unflatten(0, (crops, units))  # crops units E
        learns = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        with torch.autocast(features.device.type, enabled=False):
            per_crop = targets.log_rows.new_zeros(crops)
            feature_gradient = torch.zeros_like(rows, dtype=per_crop.dtype) if learns else None
            prototype_gradient = torch.zeros_like(prototypes, dtype=per_crop.dtype) if learns else None
            spans = _spans(units, count, crops + views, targets.chunk * (crops + views) // crops, features.device)
            chunks = _comparison(targets, student.prototypes, pairing, temperature, _longest(spans), learns)
            for span in spans:
                part = rows[:, span].flatten(0, 1)  # crops*chunk E
                share = weights[:, span].to(per_crop.dtype)  # crops chunk
                losses, gradient = chunks.compare(part, span, share)
                per_crop += (losses * share).sum(dim=1)
                if feature_gradient is not None and prototype_gradient is not None:
                    feature_gradient[:, span] = _product(gradient, student.prototypes).unflatten(0, (crops, -1))
                    _add_product(prototype_gradient, gradient.T, part)
        if feature_gradient is not None and prototype_gradient is not None:
            ctx.save_for_backward(feature_gradient.flatten(0, 1), prototype_gradient)
        ctx.mark_non_differentiable(per_crop)
        return per_crop.sum(), per_crop

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _per_crop: Tensor) -> tuple[Tensor | None, ...]:
        features, prototypes = ctx.saved_tensors
        return features * gradient, prototypes * gradient, None, None, None, None


def triton_available() -> bool:
    """Whether the kernels can be imported; they run on a CUDA device."""
    return importlib.util.find_spec("triton") is not None


def _passes(method: Method) -> Any:
    if method == "chunked":
        return _Passes
    return importlib.import_module("hilum.pretraining.prototype_kernels").FusedPasses


def _comparison(
    targets: Assignment, prototypes: Tensor, pairing: tuple[tuple[int, ...], ...], temperature: float, longest: int,
    learns: bool,
) -> Any:  # fmt: skip
    if targets.method == "chunked":
        return _ChunkComparison(prototypes, targets, pairing, temperature, longest, learns)
    kernels = importlib.import_module("hilum.pretraining.prototype_kernels")
    factors, temperatures = (targets.log_rows, targets.log_prototypes), (temperature, targets.temperature)
    return kernels.FusedComparison(prototypes, targets.teacher, factors, temperatures, pairing, longest, learns)


class _ChunkComparison:
    """Losses of a chunk of student rows, and the gradients with respect to their logits, in plain PyTorch."""

    def __init__(
        self, prototypes: Tensor, targets: Assignment, pairing: tuple[tuple[int, ...], ...], temperature: float,
        longest: int, learns: bool,
    ) -> None:  # fmt: skip
        crops, views = len(pairing), len(pairing[0])
        self.targets, self.pairing, self.temperature, self.learns = targets, pairing, temperature, learns
        self.teacher_rows = targets.teacher.features.unflatten(0, (views, -1))  # views units E
        self.products = None if targets.products is None else targets.products.unflatten(0, (views, -1))
        self.log_rows = targets.log_rows.unflatten(0, (views, -1))  # views units
        self.student_logits = _Logits(prototypes, temperature, crops * longest)
        self.teacher_logits = _Logits(targets.teacher.prototypes, targets.temperature, views * longest)

    def compare(self, rows: Tensor, span: slice, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies (crops x chunk), and weights x their gradients (crops chunk x K), in product precision."""
        crops, views = len(self.pairing), len(self.pairing[0])
        products = self.products[:, span].flatten(0, 1) if self.products is not None else None
        features = self.teacher_rows[:, span].flatten(0, 1)
        teacher = self.teacher_logits.of(features, self.targets.log_prototypes, products)
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


class _Passes:
    """Passes over the teacher's logits for Sinkhorn-Knopp, some rows at a time, in plain PyTorch."""

    def __init__(self, teacher: Projection, temperature: float, valid: Tensor | None, chunk: int) -> None:
        self.features = teacher.features
        rows, count = self.features.shape[0], teacher.prototypes.shape[0]
        self.spans = _spans(rows, count, 1, chunk, self.features.device)
        self.logits = _Logits(teacher.prototypes, temperature, _longest(self.spans))
        self.count, self.dtype = count, self.logits.buffer.dtype
        self.valid = self.logits.buffer.new_ones(rows) if valid is None else valid.to(self.dtype)
        keep = not self.features.is_cuda and rows * count <= _KEPT_ELEMENTS
        self.products = self.features @ teacher.prototypes.T if keep else None

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


class _Logits:
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
            products = torch.mm(features, transposed, out=self.rounded[: features.shape[0]])
        if products is not None:
            return torch.add(out.new_zeros(()) if bias is None else bias, products, alpha=scale, out=out)
        if features.dtype != out.dtype:
            torch.mm(features, transposed, out_dtype=out.dtype, out=out).mul_(scale)
            return out if bias is None else out.add_(bias)
        if bias is None:
            return torch.mm(features * scale, transposed, out=out)
        return torch.addmm(bias, features, transposed, alpha=scale, out=out)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Left @ right, in at least float32; on a CPU half precision rounds it."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return at_least_float32(left @ right)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(_product(left, right))


def _spans(units: int, prototypes: int, rows_of_unit: int, chunk: int, device: torch.device) -> list[slice]:
    """Cut `units` so that about `chunk` rows, 0: as many as suits the device, are held at a time."""
    if chunk < 1:
        least, most = _GPU_ELEMENTS if device.type == "cuda" else (_CPU_ELEMENTS, _CPU_ELEMENTS)
        chunk = min(max(units * rows_of_unit * prototypes // 16, least), most) // prototypes
    step = max(chunk // rows_of_unit, 1)
    return [slice(start, min(start + step, units)) for start in range(0, units, step)]


def _longest(spans: Sequence[slice]) -> int:
    return max((span.stop - span.start for span in spans), default=0)
