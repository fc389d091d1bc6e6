"""The losses over prototypes that build no matrix, against explicit float64 matrices and autograd.

The reference is written as the algorithm is published: Q as a K x B matrix that is rescaled again and again, one
log-softmax for every pair of views. Chunked PyTorch runs here; the Triton kernels run in a child process under Triton's
interpreter where triton is installed, and on a CUDA device.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hilum.pretraining import losses, prototype_chunks, prototype_loss
from hilum.pretraining.projection import Projection, Prototypes
from hilum.pretraining.prototype_loss import Assignment

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def published_sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """DINOv2's loops: total mass 1, rows to 1/K, columns to 1/B; the maximum is taken out so that nothing overflows."""
    q = torch.exp((logits - logits.max()) / temperature).T  # K B
    prototypes, rows = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / prototypes
        q = q / q.sum(dim=0, keepdim=True) / rows
    return (q * rows).T


class Case:
    """Student and teacher features and weight-normalised prototypes whose length is not 1, in float64."""

    def __init__(
        self, student: int, teacher: int, prototypes: int, dim: int, length: float = 1.3, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randn(student, dim, generator=generator, dtype=torch.float64)
        self.layer, self.teacher_layer = (Prototypes(dim, prototypes).double() for _ in range(2))
        for layer in (self.layer, self.teacher_layer):
            with torch.no_grad():
                layer.weight_g.copy_(torch.rand(prototypes, 1, generator=generator) + length - 0.5)
                layer.weight_v.copy_(torch.randn(prototypes, dim, generator=generator))
        taught = torch.randn(teacher, dim, generator=generator, dtype=torch.float64)
        self.teacher = Projection(F.normalize(taught, dim=-1), self.teacher_layer().detach())

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        sources = (self.tokens, self.layer.weight_g, self.layer.weight_v)
        return [source.detach().to(dtype).clone().requires_grad_() for source in sources]

    def student(self, leaves: list[Tensor]) -> Projection:
        tokens, length, direction = leaves
        return Projection(F.normalize(tokens, dim=-1), direction * (length / direction.norm(dim=1, keepdim=True)))

    def taught(self, dtype: torch.dtype) -> Projection:
        return Projection(self.teacher.features.to(dtype), self.teacher.prototypes.to(dtype))


def naive_dino(case: Case, leaves: list[Tensor], targets: Tensor, views: int) -> Tensor:
    """One pair of views at a time."""
    images = targets.shape[0] // views
    logits = case.student(leaves).logits().split(images)
    terms = [
        -(target * torch.log_softmax(said / 0.1, dim=-1)).sum(dim=-1).mean()
        for view, target in enumerate(targets.split(images))
        for crop, said in enumerate(logits)
        if crop != view
    ]
    return torch.stack(terms).mean()


def naive_ibot(case: Case, leaves: list[Tensor], targets: Tensor, weights: Tensor, crops: int) -> Tensor:
    rows = -(targets * torch.log_softmax(case.student(leaves).logits() / 0.1, dim=-1)).sum(dim=-1)
    return (rows * weights).sum() / crops


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative, in the norm."""
    return float((found.double() - expected).norm() / expected.norm())


def compare(
    ours: Callable[[list[Tensor]], Tensor], reference: Callable[[list[Tensor]], Tensor], case: Case,
    dtype: torch.dtype, tolerance: float, gradient_tolerance: float | None = None,
) -> None:  # fmt: skip
    leaves, exact = case.leaves(dtype), case.leaves(torch.float64)
    loss, expected = ours(leaves), reference(exact)
    assert difference(loss.detach(), expected.detach()) <= tolerance
    found = torch.autograd.grad(loss, leaves)
    wanted = torch.autograd.grad(expected, exact)
    for name, left, right in zip(("features", "weight_g", "weight_v"), found, wanted, strict=True):
        off = difference(left, right)
        assert off <= (gradient_tolerance or tolerance), f"gradient of {name} off by {off}"


DINO = [  # views, local crops, images, prototypes, width, temperature, chunk
    (2, 8, 5, 40, 12, 0.04, 0),
    (2, 8, 5, 40, 12, 0.04, 7),
    (2, 8, 5, 131, 24, 0.07, 20),
    (2, 0, 3, 33, 7, 0.05, 1),
    (2, 4, 1, 17, 8, 0.04, 0),
    (3, 2, 4, 50, 8, 0.05, 10),
]
IBOT = [  # rows, prototypes, width, temperature, chunk
    (37, 64, 16, 0.04, 0),
    (37, 64, 16, 0.04, 5),
    (37, 500, 16, 0.07, 36),
    (1, 19, 8, 0.04, 0),
    (3, 1000, 24, 0.055, 1),
]


def check_dino(
    shape: tuple[int, int, int, int, int, float, int], method: prototype_loss.Method, dtype: torch.dtype,
    tolerance: float, device: str = "cpu",
) -> None:  # fmt: skip
    views, local, images, prototypes, width, temperature, chunk = shape
    case = Case((views + local) * images, views * images, prototypes, width)
    targets = published_sinkhorn(case.teacher.logits(), temperature, 3)

    def ours(leaves: list[Tensor]) -> Tensor:
        taught = Projection(*(part.to(device) for part in case.taught(dtype)))
        assignment = prototype_loss.balanced_assignment(taught, temperature, 3, method, chunk)
        student = Projection(*(part.to(device) for part in case.student(leaves)))
        total, of_locals, of_globals = prototype_loss.dino_losses(student, assignment, views, 0.1)
        torch.testing.assert_close(total, of_locals + of_globals)
        return total.cpu()

    compare(ours, lambda leaves: naive_dino(case, leaves, targets, views), case, dtype, tolerance)


def check_ibot(
    shape: tuple[int, int, int, float, int], method: prototype_loss.Method, dtype: torch.dtype, tolerance: float,
    device: str = "cpu",
) -> None:  # fmt: skip
    rows, prototypes, width, temperature, chunk = shape
    case = Case(rows, rows, prototypes, width)
    targets = published_sinkhorn(case.teacher.logits(), temperature, 3)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1

    def ours(leaves: list[Tensor]) -> Tensor:
        taught = Projection(*(part.to(device) for part in case.taught(dtype)))
        assignment = prototype_loss.balanced_assignment(taught, temperature, 3, method, chunk)
        student = Projection(*(part.to(device) for part in case.student(leaves)))
        return prototype_loss.ibot_loss(student, assignment, weights.to(device, dtype), 8, 0.1).cpu()

    compare(ours, lambda leaves: naive_ibot(case, leaves, targets, weights, 8), case, dtype, tolerance)


@pytest.mark.parametrize("kept", [0, 2**26])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_chunked_losses_and_gradients_are_those_of_explicit_matrices(
    dtype: torch.dtype, tolerance: float, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prototype_chunks, "_KEPT_ELEMENTS", kept)
    for shape in DINO:
        check_dino(shape, "chunked", dtype, tolerance)
    for rows in IBOT:
        check_ibot(rows, "chunked", dtype, tolerance)


def rounded_reference(
    case: Case, temperature: float, dtype: torch.dtype = torch.bfloat16
) -> Callable[[list[Tensor]], Tensor]:
    """A patch loss in float64 whose operands are those that products in half precision get."""
    taught = Projection(*(part.to(dtype).double() for part in case.teacher))
    targets = published_sinkhorn(taught.logits(), temperature, 3)

    def loss(leaves: list[Tensor]) -> Tensor:
        near = Projection(*(part + (part.to(dtype).double() - part).detach() for part in case.student(leaves)))
        return -(targets * torch.log_softmax(near.logits() / 0.1, dim=-1)).sum() / 8

    return loss


@pytest.mark.parametrize("kept", [0, 2**26])
def test_bfloat16_is_for_products_only(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss within 1e-3 of float64 on the same rounded operands; gradients as near to it as the plain form's.

    A CPU rounds the products themselves, in both forms.
    """
    monkeypatch.setattr(prototype_chunks, "_KEPT_ELEMENTS", kept)
    case = Case(60, 60, 400, 32, length=1.0)
    exact = case.leaves(torch.float64)
    expected = rounded_reference(case, 0.05)(exact)
    wanted = torch.autograd.grad(expected, exact)
    off = []
    for form in ("chunked", "plain"):
        leaves = case.leaves(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            taught, student = case.taught(torch.float32), case.student(leaves)
            if form == "chunked":
                targets = prototype_loss.balanced_assignment(taught, 0.05, chunk=16)
                loss = prototype_loss.ibot_loss(student, targets, torch.ones(60), 8)
            else:
                loss = losses.ibot_loss(student, losses.sinkhorn_targets(taught.logits(), 0.05), torch.ones(60), 8)
        assert loss.dtype == torch.float32
        assert difference(loss.detach(), expected.detach()) < 1e-3
        found = torch.autograd.grad(loss, leaves)
        off.append([difference(left, right) for left, right in zip(found, wanted, strict=True)])
    assert all(ours < 1.1 * plain for ours, plain in zip(*off, strict=True)), off


def test_gradcheck() -> None:
    case = Case(6, 3, 11, 5)
    assignment = prototype_loss.balanced_assignment(case.teacher, 0.05, chunk=2)

    def ibot(*leaves: Tensor) -> Tensor:
        return prototype_loss.ibot_loss(case.student([*leaves]), assignment, torch.ones(3, dtype=torch.float64), 2, 0.3)

    def dino(*leaves: Tensor) -> Tensor:
        return prototype_loss.dino_losses(case.student([*leaves]), pair, 2, 0.3)[0]

    leaves = case.leaves(torch.float64)
    pair = prototype_loss.balanced_assignment(Projection(case.teacher.features[:2], case.teacher.prototypes), 0.05)
    assert torch.autograd.gradcheck(dino, leaves)
    leaves[0] = leaves[0].detach()[:3].requires_grad_()
    assert torch.autograd.gradcheck(ibot, leaves)


def test_backward_scales_what_the_forward_made() -> None:
    case = Case(9, 9, 21, 6)
    assignment = prototype_loss.balanced_assignment(case.taught(torch.float32), 0.05)
    leaves = case.leaves(torch.float32)
    loss = prototype_loss.ibot_loss(case.student(leaves), assignment, torch.ones(9), 4)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, leaves)
    torch.testing.assert_close(thrice, tuple(3 * gradient for gradient in once))
    with torch.no_grad():
        silent = prototype_loss.ibot_loss(case.student(leaves), assignment, torch.ones(9), 4)
    assert not silent.requires_grad
    torch.testing.assert_close(silent, loss.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("iterations", [1, 2, 3, 7])
@pytest.mark.parametrize("chunk", [0, 1, 5])
def test_balanced_assignments_are_the_published_matrix(iterations: int, chunk: int) -> None:
    case = Case(1, 23, 90, 8)
    expected = published_sinkhorn(case.teacher.logits(), 0.04, iterations)
    double = prototype_loss.balanced_assignment(case.teacher, 0.04, iterations, chunk=chunk).matrix()
    torch.testing.assert_close(double, expected, rtol=1e-10, atol=1e-15)
    single = prototype_loss.balanced_assignment(case.taught(torch.float32), 0.04, iterations, chunk=chunk).matrix()
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("length", [5.0, 40.0])
def test_long_prototypes_whose_exponentials_overflow(length: float) -> None:
    """|z| / T up to 1,000: exp is infinite or 0 in float32 and, at the top, in float64."""
    case = Case(12, 12, 60, 8, length)
    exact = prototype_loss.balanced_assignment(case.teacher, 0.04)
    assert case.teacher.logits().max() / 0.04 > (88 if length < 10 else 700)
    single = prototype_loss.balanced_assignment(case.taught(torch.float32), 0.04, chunk=5)
    found = single.matrix()
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(12))
    torch.testing.assert_close(found.double(), exact.matrix(), rtol=0, atol=2e-3)
    mass = exact.matrix().sum(dim=1)
    torch.testing.assert_close(mass, torch.ones(12, dtype=torch.float64))
    leaves = case.leaves(torch.float32)
    loss = prototype_loss.ibot_loss(case.student(leaves), single, torch.ones(12), 4)
    assert all(torch.isfinite(value).all() for value in (loss, *torch.autograd.grad(loss, leaves)))


def test_centred_assignments() -> None:
    case = Case(1, 9, 30, 8)
    centre = torch.randn(30, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.2
    found = prototype_loss.centred_assignment(case.teacher, centre, 0.05, chunk=4).matrix()
    torch.testing.assert_close(found, torch.softmax((case.teacher.logits() - centre) / 0.05, dim=-1))


def without_padding(assign: Callable[[Projection, Tensor | None], Tensor]) -> tuple[Tensor, Tensor]:
    case = Case(1, 14, 40, 8)
    valid = torch.ones(14, dtype=torch.float64)
    valid[[0, 5, 13]] = 0.0
    kept = valid.bool()
    alone = Projection(case.teacher.features[kept], case.teacher.prototypes)
    return assign(case.teacher, valid)[kept], assign(alone, None)


def test_rows_of_padding_weigh_nothing() -> None:
    def chunked(teacher: Projection, valid: Tensor | None) -> Tensor:
        return prototype_loss.balanced_assignment(teacher, 0.05, chunk=3, valid=valid).matrix()

    def plain(teacher: Projection, valid: Tensor | None) -> Tensor:
        return losses.sinkhorn_targets(teacher.logits(), 0.05, valid=valid)

    for assign in (chunked, plain):
        torch.testing.assert_close(*without_padding(assign), rtol=1e-10, atol=1e-14)


def test_usage_and_entropy_are_those_of_the_matrix() -> None:
    case = Case(1, 14, 40, 8)
    valid = torch.ones(14, dtype=torch.float64)
    valid[3:6] = 0.0
    for weights in (None, valid):
        assignment = prototype_loss.balanced_assignment(case.teacher, 0.05, chunk=3, valid=weights)
        usage, entropy = prototype_loss.usage_and_entropy(assignment)
        rows = assignment.matrix() if weights is None else assignment.matrix()[weights.bool()]
        assert float(usage) == pytest.approx(float(losses.prototype_usage(rows)), rel=1e-5)
        assert float(entropy) == pytest.approx(float(losses.target_entropy(rows)), rel=1e-5)


def test_no_rows_at_all() -> None:
    case = Case(0, 0, 12, 4)
    assignment = prototype_loss.balanced_assignment(case.taught(torch.float32), 0.05)
    assert assignment.matrix().shape == (0, 12)
    leaves = case.leaves(torch.float32)
    loss = prototype_loss.ibot_loss(case.student(leaves), assignment, torch.zeros(0), 4)
    assert loss.item() == 0.0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in torch.autograd.grad(loss, leaves))
    assert [value.item() for value in prototype_loss.usage_and_entropy(assignment)] == [0.0, 0.0]


def test_one_bad_row_does_not_pass_for_a_loss() -> None:
    case = Case(9, 9, 20, 4)
    for broken in (float("nan"), float("inf")):
        taught = case.taught(torch.float32)
        taught.features[2, 1] = broken
        assignment = prototype_loss.balanced_assignment(taught, 0.05)
        loss = prototype_loss.ibot_loss(case.student(case.leaves(torch.float32)), assignment, torch.ones(9), 4)
        assert not torch.isfinite(loss)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        result = function(*arguments, **(keywords or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_no_matrix_of_rows_by_prototypes_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prototype_chunks, "_KEPT_ELEMENTS", 0)
    case = Case(300, 300, 500, 4)
    leaves = case.leaves(torch.float32)
    with Largest() as seen:
        assignment = prototype_loss.balanced_assignment(case.taught(torch.float32), 0.05, chunk=10)
        loss = prototype_loss.ibot_loss(case.student(leaves), assignment, torch.ones(300), 4)
        loss.backward()
        prototype_loss.usage_and_entropy(assignment)
    assert seen.elements <= 10 * 500
    with Largest() as seen:
        losses.sinkhorn_targets(case.taught(torch.float32).logits(), 0.05)
    assert seen.elements == 300 * 500


RANKS = """
import sys
from pathlib import Path
import torch
from hilum.core.distributed import launch
from hilum.pretraining import losses, prototype_loss
from hilum.pretraining.projection import Projection

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
features = torch.nn.functional.normalize(torch.randn(11, 8, generator=generator, dtype=torch.float64), dim=-1)
prototypes = torch.randn(30, 8, generator=generator, dtype=torch.float64) * 0.4
centre = torch.zeros(30, dtype=torch.float64)
with launch(2, "fp32", "cpu") as engine:
    for cuts in ((0, 4, 11), (0, 11, 11), (0, 0, 11)):  # uneven, and all rows on one rank
        mine = Projection(features[cuts[engine.rank] : cuts[engine.rank + 1]], prototypes)
        whole = torch.load(sys.argv[1])
        for chunk in (0, 2):
            found = prototype_loss.balanced_assignment(mine, 0.05, chunk=chunk)
            torch.testing.assert_close(found.matrix(), whole["q"][cuts[engine.rank] : cuts[engine.rank + 1]])
        torch.testing.assert_close(found.log_prototypes, whole["log_prototypes"])
        torch.testing.assert_close(losses.sinkhorn_targets(mine.logits(), 0.05), found.matrix())
        torch.testing.assert_close(losses.moved_centre(centre, mine), whole["centre"])
    none = prototype_loss.balanced_assignment(Projection(features[:0], prototypes), 0.05)
    assert torch.isfinite(none.log_prototypes).all()
"""


@pytest.mark.slow
def test_two_ranks_find_what_one_finds_with_all_rows(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(11, 8, generator=generator, dtype=torch.float64), dim=-1)
    prototypes = torch.randn(30, 8, generator=generator, dtype=torch.float64) * 0.4
    logits = features @ prototypes.T
    alone = prototype_loss.balanced_assignment(Projection(features, prototypes), 0.05)
    expected = {
        "q": published_sinkhorn(logits, 0.05, 3), "centre": 0.1 * logits.mean(dim=0),
        "log_prototypes": alone.log_prototypes,
    }  # fmt: skip
    torch.save(expected, tmp_path / "expected.pt")
    (tmp_path / "ranks.py").write_text(RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(tmp_path / "ranks.py"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


INTERPRETED = """
import sys
import warnings
import torch
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
import test_prototype_loss as tests
from hilum.pretraining import prototype_kernels, prototype_loss
from hilum.pretraining.projection import Projection

prototype_kernels.TILE_ROWS, prototype_kernels.TILE_COLUMNS, prototype_kernels.TILE_INNER = 16, 32, 16
prototype_kernels._LAUNCH = {}
prototype_kernels._PROGRAMS = 12
tests.check_kernels("cpu")
prototype_kernels._PROGRAMS = 1  # no row is shared
tests.check_ibot(tests.IBOT[2], "triton", torch.float32, 1e-5)
"""


def check_kernels(device: str) -> None:
    """The fused form against float64 matrices, in single and half precision."""
    for shape in DINO:
        check_dino(shape, "triton", torch.float32, 1e-5, device)
    for rows in IBOT:
        check_ibot(rows, "triton", torch.float32, 1e-5, device)
    case = Case(9, 14, 70, 24, length=6.0)
    valid = torch.ones(14, device=device)
    valid[[0, 5, 13]] = 0.0
    taught = Projection(*(part.to(device) for part in case.taught(torch.float32)))
    assignments: list[Assignment] = [
        prototype_loss.balanced_assignment(taught, 0.04, 3, method, 0, valid) for method in ("triton", "chunked")
    ]
    torch.testing.assert_close(assignments[0].matrix(), assignments[1].matrix(), rtol=1e-3, atol=1e-5)
    assert torch.isfinite(assignments[0].matrix()).all()
    centre = torch.linspace(-0.2, 0.2, 70, device=device)
    centred = prototype_loss.centred_assignment(taught, centre, 0.05, "triton")
    expected = torch.softmax((taught.features.double() @ taught.prototypes.double().T - centre) / 0.05, dim=-1)
    torch.testing.assert_close(centred.matrix().double(), expected, rtol=1e-3, atol=1e-6)
    none = Projection(taught.features[:0], taught.prototypes)
    empty = prototype_loss.balanced_assignment(none, 0.05, 3, "triton")
    assert torch.isfinite(empty.log_prototypes).all()
    assert prototype_loss.ibot_loss(none, empty, valid[:0], 4).item() == 0.0
    check_half(device, torch.float16)
    if device == "cuda":  # Triton's interpreter cannot multiply bfloat16
        check_half(device, torch.bfloat16)


def check_half(device: str, dtype: torch.dtype) -> None:
    """Loss within 1e-3 of float64 on the same rounded operands; gradients within what rounding them to half costs."""
    case = Case(40, 40, 200, 24, length=1.0)

    def fused(leaves: list[Tensor]) -> Tensor:
        taught, student = (
            Projection(*(part.to(device) for part in projection))
            for projection in (case.taught(torch.float32), case.student(leaves))
        )
        with torch.autocast(device, dtype):
            assignment = prototype_loss.balanced_assignment(taught, 0.05, 3, "triton", 24)
            return prototype_loss.ibot_loss(student, assignment, torch.ones(40, device=device), 8).cpu()

    compare(fused, rounded_reference(case, 0.05, dtype), case, torch.float32, 1e-3, 3e-3)


@pytest.mark.slow
@needs_triton
def test_kernels_under_the_interpreter(tmp_path: Path) -> None:
    (tmp_path / "interpreted.py").write_text(INTERPRETED)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "interpreted.py"), str(Path(__file__).parent)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr


ARGUMENTS = {  # of each kernel at run time; X: the type of the operands, T: of the targets
    "_log_mass_kernel": "*X *X *fp32 *fp32 i32 i32 fp32 i32",
    "_targets_kernel": "*X *X *fp32 *fp32 *T i32 i32 fp32",
    "_agreement_kernel": "*X *X *T *fp32 *fp32 *fp32 i32 i32 i32 fp32 i32",
    "_gradient_kernel": "*X *X *T *fp32 *fp32 *fp32 *X i32 i32 i32 fp32",
}


@pytest.mark.slow
@needs_triton
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dtype", "capability"), [("bf16", 90), ("bf16", 80), ("fp32", 89)])
@pytest.mark.parametrize("kernel", ARGUMENTS)
def test_kernels_compile_for_gpus_that_are_not_here(
    kernel: str, dtype: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to machine code, in the shared memory of that generation; the compiler needs no device."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hilum.pretraining import prototype_kernels

    function = getattr(prototype_kernels, kernel)
    operands = torch.float32 if dtype == "fp32" else torch.bfloat16
    constants = prototype_kernels._tile(operands, 384) | {"views": 2, "target_scale": 1.0}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = iter(ARGUMENTS[kernel].replace("X", dtype).replace("T", "fp32" if dtype == "fp32" else "fp16").split())
    signature = {name: "constexpr" if name in constants else next(types) for name in function.arg_names}
    assert next(types, None) is None
    source = ASTSource(function, signature, {(function.arg_names.index(name),): constants[name] for name in constants})
    options = prototype_kernels._LAUNCH
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 99 * 1024  # the least of these generations


@pytest.mark.gpu
def test_the_kernels_are_found_good_on_this_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    prototype_loss.triton_failure.cache_clear()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):  # where a run asks first
        assert prototype_loss.triton_failure(torch.device("cuda", torch.cuda.current_device())) == ""


@pytest.mark.gpu
@needs_triton
def test_kernels_on_a_gpu() -> None:
    check_kernels("cuda")


@pytest.mark.gpu
def test_chunked_on_a_gpu() -> None:
    for shape in DINO:
        check_dino(shape, "chunked", torch.float32, 1e-5, "cuda")
    for rows in IBOT:
        check_ibot(rows, "chunked", torch.float32, 1e-5, "cuda")


@pytest.mark.gpu
@needs_triton
def test_kernels_at_full_size_on_a_gpu() -> None:
    """131,072 prototypes, rows that fill no tile: loss and gradients of all forms agree within 1e-3 in bfloat16."""
    generator = torch.Generator("cuda").manual_seed(0)
    features, said = (F.normalize(torch.randn(1001, 256, generator=generator, device="cuda"), dim=-1) for _ in range(2))
    prototypes, taught = (
        F.normalize(torch.randn(131072, 256, generator=generator, device="cuda"), dim=-1) for _ in range(2)
    )
    weights = torch.full((1001,), 1 / 100, device="cuda")
    found = []
    for method in ("triton", "chunked"):
        leaves = [said.clone().requires_grad_(), prototypes.clone().requires_grad_()]
        with torch.autocast("cuda", torch.bfloat16):
            assignment = prototype_loss.balanced_assignment(Projection(features, taught), 0.05, 3, method)
            loss = prototype_loss.ibot_loss(Projection(*leaves), assignment, weights, 20)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert difference(found[0][0].cpu(), found[1][0].cpu().double()) < 1e-3
    for left, right in zip(found[0][1:], found[1][1:], strict=True):
        assert difference(left, right.double()) < 5e-3
