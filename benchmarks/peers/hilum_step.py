"""Hilum's contestant: the step of `commands/pretrain.py` on a fixed batch that is already on the device.

In: teacher, targets, student, losses, backward, clipping, AdamW, EMA. Out: loading, masks, crops, the log, and the flag
for numbers that are not finite, as on the peer's side.
"""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle
from typing import Any

import numpy as np
import protocol
import torch

from hilum.backbones.vit import SIZES
from hilum.core.seeding import torch_stream
from hilum.pretraining import dinov2
from hilum.pretraining.flops import step_flops
from hilum.pretraining.masking import block_masks, mask_weights
from hilum.pretraining.param_groups import parameter_groups


def build(chosen: dict[str, Any], device: torch.device) -> tuple[Callable[[], torch.Tensor], dict[str, Any]]:
    """One step of a DINOv2 pretraining, and what it is."""
    sizes, images, drop_path = tuple(chosen["sizes"]), chosen["images"], chosen["drop_path"]
    architecture = dataclasses.replace(
        SIZES[chosen["model"]], image_size=sizes[0], registers=chosen["registers"], feed_forward=chosen["feed_forward"]
    )
    heads = dinov2.HeadConfig(
        chosen["prototypes"], dino_bottleneck=chosen["bottlenecks"][0], ibot_bottleneck=chosen["bottlenecks"][1]
    )
    losses = dinov2.LossConfig(ibot=1.0)
    student, teacher = dinov2.make_networks(architecture, heads, 0)
    student.to(device)
    teacher.to(device)
    compiled = chosen["compile"] == "on" or (chosen["compile"] == "auto" and device.type == "cuda")
    if compiled:
        student.backbone.compile_blocks()
        teacher.backbone.compile_blocks()
    groups = parameter_groups(student, architecture.depth, 1.0, 0.2)
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.04, fused=True)
    centres = dinov2.make_centres(heads.prototypes, device)
    generator = torch_stream(0, "drop path")
    batches = [
        make_batch(sizes, architecture.patch_size, images, number, device) for number in range(chosen["batches"])
    ]
    turns = cycle(batches)
    precision = chosen["precision"]
    if precision == "auto":  # as `hilum.core.distributed.launch` chooses
        precision = "bf16" if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() else "fp32"
    bf16 = precision == "bf16"

    def step() -> torch.Tensor:
        batch = next(turns)
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            taught = dinov2.teacher_forward(teacher, batch)
            targets = dinov2.teacher_targets(taught, centres, 0.05, losses)
            said = student(batch, drop_path, generator)
            loss = dinov2.compute_losses(said, targets, batch, losses)
        loss.total.backward()
        dinov2.clip_gradients(student, 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        dinov2.update_teacher(teacher, student, 0.994)
        return loss.total

    masked = sum(len(batch.masked) for batch in batches) / len(batches)
    flops = step_flops(architecture, heads, images, sizes, 8, drop_path, masked)
    facts = {
        "name": "hilum",
        "compiled": compiled,
        "precision": precision,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "flops_per_image": flops.total / images,
        "masked": masked,
        "product_rate": protocol.product_rate(device, torch.bfloat16 if bf16 else torch.float32),
    }
    return step, facts


def make_batch(sizes: tuple[int, int], patch: int, images: int, number: int, device: torch.device) -> dinov2.Batch:
    """Random pixels, masks as published."""
    generator = torch.Generator().manual_seed(number)
    side = sizes[0] // patch
    masks = block_masks(images, (side, side), np.random.default_rng(number))
    flat = torch.from_numpy(masks)
    return dinov2.Batch(
        torch.randn(2 * images, 1, sizes[0], sizes[0], generator=generator).to(device),
        torch.randn(8 * images, 1, sizes[1], sizes[1], generator=generator).to(device),
        flat.to(device),
        flat.flatten().nonzero().flatten().to(device),
        torch.as_tensor(mask_weights(masks)).to(device),
    )


if __name__ == "__main__":
    protocol.serve(build)
