"""One DINOv2 step (teacher, student, losses, backward, clip, AdamW, EMA) beside the floor of its matrix products.

The floor: the step's floating-point operations, counted by torch's own counter, at the rate of a plain square matrix
product measured in the same run and precision. On a GPU ViT-B and ViT-L at the published crops, on a CPU a small one.
Data is on the device beforehand: this times the step, not the loader.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from hilum.backbones.vit import SIZES
from hilum.pretraining import dinov2
from hilum.pretraining.masking import block_masks, mask_weights
from hilum.pretraining.param_groups import parameter_groups

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CASES = (
    [("vitb16", 224, 96, 64), ("vitb16", 512, 144, 32), ("vitl16", 224, 96, 64), ("vitl16", 512, 144, 24)]
    if CUDA
    else [("mini16", 128, 48, 16)]
)
PROTOTYPES = 131072 if CUDA else 1024
WARM_UP, TIMED = (10, 20) if CUDA else (1, 5)


def seconds(run: Callable[[], object]) -> list[float]:
    """Seconds of each timed call, after warming up."""
    times = []
    for _ in range(WARM_UP + TIMED):
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[WARM_UP:]


def product_rate() -> float:
    """Floating-point operations per second of a square bf16 matrix product."""
    side = 8192 if CUDA else 1024
    left, right = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / statistics.median(seconds(lambda: left @ right))


def make_batch(size: int, local: int, images: int) -> dinov2.Batch:
    """Random pixels, real masks."""
    grid = (size // 16, size // 16)
    masks = torch.from_numpy(block_masks(images, grid, np.random.default_rng(0)))
    weights = torch.as_tensor(mask_weights(masks.numpy()))
    return dinov2.Batch(
        torch.randn(2 * images, 1, size, size, device=DEVICE),
        torch.randn(8 * images, 1, local, local, device=DEVICE),
        masks.to(DEVICE),
        masks.flatten().nonzero().flatten().to(DEVICE),
        weights.to(DEVICE),
    )


def main() -> dict[str, dict[str, float]]:
    rate = product_rate()
    print(f"{DEVICE.type}, bf16, {PROTOTYPES} prototypes; matrix product {rate / 1e12:.2f} TFLOP/s")
    print("model    crops    batch  images/s  TFLOP/image  floor images/s  share of floor  peak GB")
    results = {}
    for name, size, local, images in CASES:
        config, losses = SIZES[name], dinov2.LossConfig()
        student, teacher = dinov2.make_networks(config, dinov2.HeadConfig(PROTOTYPES), 0)
        student.to(DEVICE)
        teacher.to(DEVICE)
        optimizer = torch.optim.AdamW(parameter_groups(student, config.depth, 1.0, 0.2), lr=1e-4, fused=True)
        centres = dinov2.make_centres(PROTOTYPES, DEVICE)
        batch = make_batch(size, local, images)
        generator = torch.Generator().manual_seed(0)
        drop_path = 0.4 if name == "vitl16" else 0.2 if CUDA else 0.0

        def step() -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                taught = dinov2.teacher_forward(teacher, batch)  # noqa: B023
                targets = dinov2.teacher_targets(taught, centres, 0.05, losses)  # noqa: B023
                said = student(batch, drop_path, generator)  # noqa: B023
                loss = dinov2.compute_losses(said, targets, batch, losses)  # noqa: B023
            loss.total.backward()
            dinov2.clip_gradients(student, 3.0)  # noqa: B023
            optimizer.step()  # noqa: B023
            optimizer.zero_grad(set_to_none=True)  # noqa: B023
            dinov2.update_teacher(teacher, student, 0.99)  # noqa: B023

        with FlopCounterMode(display=False) as counter:
            step()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        speed = images / statistics.median(seconds(step))
        floor = rate / (counter.get_total_flops() / images)
        peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else float("nan")
        results[f"{name} {size}/{local}"] = {"images_per_second": speed, "floor": floor, "peak_gb": peak}
        print(
            f"{name:8} {size}/{local:<4} {images:5}  {speed:8.1f}  {counter.get_total_flops() / images / 1e12:11.4f}"
            f"  {floor:14.1f}  {speed / floor:14.0%}  {peak:7.1f}"
        )
    return results


if __name__ == "__main__":
    main()
