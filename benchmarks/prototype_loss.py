"""The losses over prototypes, forward and backward, beside the plain form that public code is composed of.

One step's targets, DINO and iBOT losses and their gradients with respect to features and normalised prototypes, both
heads. The peer, written here: float32 logits of teacher and student, Sinkhorn-Knopp that rescales the whole
matrix, a Python loop over crops and teacher views, log-softmax cross-entropy. Rounds alternate; medians and quartiles;
peak memory above the operands: of the allocator on a GPU, of the resident set of a process of its own on a CPU;
differences relative, in the norm, to the plain form in the same precision.
"""

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hilum.pretraining import prototype_loss
from hilum.pretraining.projection import Projection

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PROTOTYPES, TEACHER_TEMPERATURE, STUDENT_TEMPERATURE = 131072, 0.05, 0.1
SIZES = [(38, 2234), (32, 9830), (64, 19661)] if CUDA else [(4, 480)]
"""Images and masked patches: batch 38 at 224 pixels, 32 and 64 at 512; on a CPU a small step."""
WARM_UP, ROUNDS = (3, 15) if CUDA else (0, 3)
_PLAIN_BYTES = 30
"""What the plain form needs for each pair of a row and a prototype, about."""
WITHOUT_KERNELS = prototype_loss.triton_failure(DEVICE)
METHODS = ([] if WITHOUT_KERNELS else ["triton"]) + ["chunked"]


class Step(NamedTuple):
    """Operands of a step, for [CLS] and for patches."""

    student: list[Projection]
    teacher: list[Projection]

    def leaves(self) -> list[Tensor]:
        """What gradients are wanted of."""
        return [part for projection in self.student for part in projection]


def make_step(images: int, patches: int) -> Step:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def unit(rows: int, width: int) -> Tensor:
        return F.normalize(torch.randn(rows, width, generator=generator, device=DEVICE), dim=-1)

    def projections(rows: tuple[int, int]) -> list[Projection]:
        sizes = zip(rows, (384, 256), strict=True)
        return [Projection(unit(count, width), unit(PROTOTYPES, width)) for count, width in sizes]

    step = Step(projections((10 * images, patches)), projections((2 * images, patches)))
    for leaf in step.leaves():
        leaf.requires_grad_()
    return step


def published_sinkhorn(logits: Tensor) -> Tensor:
    """As DINOv2 composes it: in place, over the whole matrix, again and again."""
    q = torch.exp(logits / TEACHER_TEMPERATURE).t()
    prototypes, rows = q.shape
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True)
        q /= prototypes
        q /= q.sum(dim=0, keepdim=True)
        q /= rows
    q *= rows
    return q.t()


def plain(step: Step) -> Tensor:
    with torch.no_grad():
        targets = [published_sinkhorn(projection.logits().float()) for projection in step.teacher]
    said, patches = (projection.logits().float() for projection in step.student)
    total = said.new_zeros(())
    views, crops = targets[0].chunk(2), said.chunk(10)
    for crop, logits in enumerate(crops):
        log_probabilities = F.log_softmax(logits / STUDENT_TEMPERATURE, dim=-1)
        for view, target in enumerate(views):
            if view != crop:
                total = total - (target * log_probabilities).sum(dim=-1).mean() / 18
    log_probabilities = F.log_softmax(patches / STUDENT_TEMPERATURE, dim=-1)
    return total - 3 * (targets[1] * log_probabilities).sum(dim=-1).sum() / patches.shape[0]


def ours(step: Step, method: prototype_loss.Method) -> Tensor:
    with torch.no_grad():
        cls, patches = (
            prototype_loss.balanced_assignment(projection, TEACHER_TEMPERATURE, 3, method)
            for projection in step.teacher
        )
    rows = step.student[1].features.shape[0]
    dino = prototype_loss.dino_losses(step.student[0], cls, 2, STUDENT_TEMPERATURE)[0]
    weights = torch.ones(rows, device=DEVICE)
    ibot = prototype_loss.ibot_loss(step.student[1], patches, weights, rows, STUDENT_TEMPERATURE)
    return dino + 3 * ibot


def run(form: str, precision: str, step: Step) -> list[Tensor]:
    """Loss and gradients."""
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = plain(step) if form == "plain" else ours(step, form)  # type: ignore[arg-type]
    return [loss.detach(), *torch.autograd.grad(loss, step.leaves())]


def seconds(work: Callable[[], object]) -> float:
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident(field: str) -> int:
    """Bytes, from the kernel's record of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak_bytes(form: str, precision: str, images: int, patches: int) -> int:
    """Most memory of one step above its operands."""
    if not CUDA:
        command = [sys.executable, __file__, "peak", form, precision, str(images), str(patches)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    step = make_step(images, patches)
    run(form, precision, step)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(form, precision, step)
    return torch.cuda.max_memory_allocated() - before


def peak_of_this_process(form: str, precision: str, images: int, patches: int) -> int:
    """On a CPU, in a process that does nothing else."""
    step = make_step(images, patches)
    run("chunked", precision, make_step(1, 1))  # thread pools and libraries
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    run(form, precision, step)
    return resident("VmHWM") - before


def difference(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Of the loss, and the largest of the gradients."""
    off = [
        float((left.double() - right.double()).norm() / right.double().norm())
        for left, right in zip(found, expected, strict=True)
    ]
    return off[0], max(off[1:])


def measure(images: int, patches: int, precision: str, forms: list[str]) -> list[dict[str, object]]:
    """One size and precision; prints and returns a line a form."""
    peaks = {form: peak_bytes(form, precision, images, patches) for form in forms}
    step = make_step(images, patches)
    expected = run("plain", precision, step)
    off = {form: difference(run(form, precision, step), expected) for form in forms}
    del expected
    times: dict[str, list[float]] = {form: [] for form in forms}
    for number in range(WARM_UP + ROUNDS):
        for form in forms:
            taken = seconds(partial(run, form, precision, step))
            if number >= WARM_UP:
                times[form].append(taken)
    results: list[dict[str, object]] = []
    for form in forms:
        middle = statistics.median(times[form])
        low, _, high = statistics.quantiles(times[form], n=4)
        faster, smaller = statistics.median(times["plain"]) / middle, peaks["plain"] / peaks[form]
        print(
            f"{images:6} {patches:8}  {precision:8}  {form:8} {middle:8.4f} [{low:.4f}, {high:.4f}]  {faster:6.2f}x"
            f" {peaks[form] / 1e6:9.0f} {smaller:6.1f}x  {off[form][0]:8.1e}  {off[form][1]:9.1e}",
            flush=True,
        )
        results.append({
            "images": images, "patches": patches, "precision": precision, "form": form, "seconds": middle,
            "faster": faster, "peak_bytes": peaks[form], "smaller": smaller, "loss_off": off[form][0],
            "gradient_off": off[form][1],
        })  # fmt: skip
    return results


def main() -> list[dict[str, object]]:
    forms = ["plain", *METHODS]
    threads = "" if CUDA else f", {torch.get_num_threads()} threads"
    print(f"{DEVICE.type}, {PROTOTYPES} prototypes, both heads, forward and backward{threads}")
    if WITHOUT_KERNELS:
        print(f"triton left out: {WITHOUT_KERNELS}")
    print(
        "images  patches  products  form      seconds [quartiles]        faster   peak MB smaller  loss off  grad. off"
    )
    results: list[dict[str, object]] = []
    for images, patches in SIZES:
        needed = _PLAIN_BYTES * PROTOTYPES * (12 * images + patches)
        if CUDA and needed > torch.cuda.mem_get_info()[0]:
            print(f"{images:6} {patches:8}  left out: the plain form needs about {needed / 1e9:.0f} GB")
            continue
        for precision in ("fp32", "bf16"):
            results += measure(images, patches, precision, forms)
    return results


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        print(peak_of_this_process(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])))
    else:
        main()
