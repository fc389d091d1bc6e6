"""The losses over prototypes without a matrix of rows x prototypes: factored targets, gradients made in the forward.

With 131,072 prototypes the matrices of a step are tens of gigabytes, and moving them takes longer than the products
that make them. Here the teacher's targets are kept as two vectors (`Assignment`), logits are multiplied out again
where they are needed, a chunk of rows at a time, and the loss leaves its gradients behind, so that nothing waits for
the backward pass. Numbers are those of `losses.py`, up to rounding. Which rows meet which is `dinov2.py`'s business.

The steps on a chunk are in `prototype_chunks.py`, in plain PyTorch, and in `prototype_kernels.py`, as Triton kernels
for a CUDA device.

Half precision is for products only: their results, targets, losses and sums are float32. float64 stays float64.
"""

import importlib
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from hilum.core.distributed import max_over_ranks, mean_over_ranks, sum_over_ranks
from hilum.core.seeding import torch_stream
from hilum.pretraining.projection import Projection, at_least_float32
from hilum.pretraining.prototype_chunks import (
    ChunkedComparison,
    ChunkedPasses,
    Logits,
    add_product,
    longest,
    product,
    spans_of,
)

Method = Literal["chunked", "triton"]
_EXAMPLE_TOLERANCE = 0.02
"""Of a relative difference in norm; rounding logits to bfloat16 costs some 0.003."""


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
        spans = spans_of(rows, count, 1, self.chunk, self.log_rows.device)
        logits = Logits(self.teacher.prototypes, self.temperature, longest(spans))
        for span in spans:
            products = None if self.products is None else self.products[span]
            block = logits.of(self.teacher.features[span], self.log_prototypes, products)
            yield span, block.add_(self.log_rows[span, None]).exp_()


@torch.no_grad()
def balanced_assignment(
    teacher: Projection, temperature: float, iterations: int = 3, method: Method = "chunked", chunk: int = 0,
    valid: Float[Tensor, " rows"] | None = None, across_ranks: bool = True,
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
        across_ranks: False balances the rows of this rank alone.
    """
    highest_of, sum_of = (max_over_ranks, sum_over_ranks) if across_ranks else (_alone, _alone)
    operands = in_product_precision(teacher)
    passes = _passes(method)(operands, temperature, valid, chunk)
    with torch.autocast(teacher.features.device.type, enabled=False):
        log_mass = passes.log_column_mass()
        highest = highest_of(log_mass.clone()).clamp_min(torch.finfo(log_mass.dtype).min)
        log_mass = highest + sum_of(torch.exp(log_mass - highest)).log()
        log_count = math.log(operands.prototypes.shape[0])
        log_prototypes = torch.where(log_mass == -torch.inf, 0.0, -log_mass - log_count)  # no row anywhere: any will do
        tiny = torch.finfo(log_mass.dtype).tiny
        for iteration in range(iterations):
            more = iteration + 1 < iterations
            log_rows, mass = passes.row_factors(log_prototypes, more)
            if more:
                log_prototypes = log_prototypes - log_count - sum_of(mass).clamp_min(tiny).log()
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
            empty = torch.zeros_like if units == 0 else torch.empty_like  # the first chunk writes, the others add
            prototype_gradient = empty(prototypes, dtype=per_crop.dtype) if learns else None
            spans = spans_of(units, count, crops + views, targets.chunk * (crops + views) // crops, features.device)
            chunks = _comparison(targets, student.prototypes, pairing, temperature, longest(spans), learns)
            for span in spans:
                part = rows[:, span].flatten(0, 1)  # crops*chunk E
                share = weights[:, span].to(per_crop.dtype)  # crops chunk
                losses, gradient = chunks.compare(part, span, share)
                per_crop += (losses * share).sum(dim=1)
                if feature_gradient is not None and prototype_gradient is not None:
                    feature_gradient[:, span] = product(gradient, student.prototypes).unflatten(0, (crops, -1))
                    add_product(prototype_gradient, gradient.T, part, span.start == 0)
        if feature_gradient is not None and prototype_gradient is not None:
            ctx.save_for_backward(feature_gradient.flatten(0, 1), prototype_gradient)
        ctx.mark_non_differentiable(per_crop)
        return per_crop.sum(), per_crop

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _per_crop: Tensor) -> tuple[Tensor | None, ...]:
        features, prototypes = ctx.saved_tensors
        return features * gradient, prototypes * gradient, None, None, None, None


@cache
def triton_failure(device: torch.device) -> str:
    """Why the kernels are not to be used on a device; "" where they run, and agree with plain PyTorch on an example.

    Tried once a process: compilers, drivers and devices are too many to trust.
    """
    if device.type != "cuda":
        return "they need a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        expected, found = (_example(device, method) for method in ("chunked", "triton"))
    except Exception as error:  # of a compiler or a driver, of any kind
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    for ours, theirs in zip(found, expected, strict=True):
        difference = ((ours - theirs).norm() / theirs.norm()).item()
        if not difference < _EXAMPLE_TOLERANCE:
            return f"on a small example they differ from plain PyTorch by {difference:.2g}, relative"
    return ""


@torch.enable_grad()  # the first to ask are the teacher's targets, which take no gradient
def _example(device: torch.device, method: Method) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of 100 masked patches against 300 prototypes, in the precision of training."""
    generator = torch_stream(0, "example of the kernels")
    rows, count, width = 100, 300, 64

    def drawn(number: int) -> Tensor:
        return normalize(torch.randn(number, width, generator=generator), dim=-1).to(device)

    features, prototypes = drawn(rows).requires_grad_(), drawn(count).requires_grad_()
    teacher, weights = Projection(drawn(rows), drawn(count)), torch.full((rows,), 0.1, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        targets = balanced_assignment(teacher, 0.05, method=method, across_ranks=False)
        loss = ibot_loss(Projection(features, prototypes), targets, weights, 10)
    loss.backward()
    assert features.grad is not None
    assert prototypes.grad is not None
    return loss.detach(), features.grad, prototypes.grad


def _alone(values: Tensor) -> Tensor:
    return values


def _passes(method: Method) -> Any:
    return ChunkedPasses if method == "chunked" else _kernels().FusedPasses


def _comparison(
    targets: Assignment, prototypes: Tensor, pairing: tuple[tuple[int, ...], ...], temperature: float, most: int,
    learns: bool,
) -> Any:  # fmt: skip
    factors, temperatures = (targets.log_rows, targets.log_prototypes), (temperature, targets.temperature)
    kind = ChunkedComparison if targets.method == "chunked" else _kernels().FusedComparison
    return kind(prototypes, targets.teacher, factors, temperatures, pairing, most, learns, targets.products)


def _kernels() -> Any:
    return importlib.import_module("hilum.pretraining.prototype_kernels")
