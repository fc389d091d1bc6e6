"""The peer's contestant: LightlyTrain's own DINOv2 method, as its default install runs it, on a fixed batch.

Run by the interpreter of an environment that has `lightly-train`. In: everything that its training step and its hooks
around the optimizer do: both networks, losses, backward, clipping, weight-decay schedule, AdamW, learning-rate
schedule, EMA. Out, in its favour: Lightning's loop and logging, loading, and the masks, which it draws inside the step
by loops in Python; here they are drawn beforehand by its own functions and the time is reported beside the step's.

Made equal to the other side, by its own settings: crops, batch, one input channel, prototypes, one width of bottleneck
for both heads, separate heads, Sinkhorn-Knopp, drop path, registers, feed-forward, position table laid out for the
size of the global crops. The rest is as shipped: attention without xFormers, eager execution, AdamW by foreach.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle
from typing import Any
from unittest.mock import patch

import lightly_train
import protocol
import torch
from lightly_train._commands.train_helpers import get_precision
from lightly_train._methods.dinov2 import dinov2 as method_module
from lightly_train._methods.dinov2.dinov2 import DINOv2, DINOv2AdamWViTArgs, DINOv2Args
from lightly_train._methods.method import TrainingStepResult
from lightly_train._models.dinov2_vit.dinov2_vit_package import DINOV2_VIT_PACKAGE
from lightly_train._models.dinov2_vit.dinov2_vit_src.layers import attention
from lightly_train._models.embedding_model import EmbeddingModel

NAMES = {
    "vits14": "vits14-noreg-notpretrained",
    "vitb14": "vitb14-noreg-notpretrained",
    "vitl14": "vitl14-noreg-notpretrained",
    "vitl16": "vitl16-noreg-notpretrained",
}
PRECISIONS = {"bf16": "bf16-mixed", "fp32": "32-true"}
FEED_FORWARDS = {"mlp": "mlp", "swiglu": "swiglufused"}
TOTAL_STEPS = 125_000


class Step:
    """The part of Lightning's trainer that the method asks: where in the run it is."""

    def __init__(self) -> None:
        self.global_step = 2_000  # past the steps in which the prototypes do not move
        self.max_epochs = 100
        self.estimated_stepping_batches = TOTAL_STEPS


def make_method(chosen: dict[str, Any], device: torch.device) -> DINOv2:
    """Its method with both networks, and a stand-in for the trainer; for the life of this process."""
    torch.manual_seed(0)
    sizes, images = chosen["sizes"], chosen["images"]
    if chosen["bottlenecks"][0] != chosen["bottlenecks"][1]:
        raise ValueError("lightly-train has one width of bottleneck for both heads")
    model = DINOV2_VIT_PACKAGE.get_model(
        NAMES[chosen["model"]],
        num_input_channels=1,
        model_args={
            "img_size": sizes[0],
            "drop_path_rate": chosen["drop_path"],
            "drop_path_uniform": True,
            "ffn_layer": FEED_FORWARDS[chosen["feed_forward"]],
            "num_register_tokens": chosen["registers"],
        },
        load_weights=False,
    )
    arguments = DINOv2Args(
        ibot_separate_head=True,
        dino_bottleneck_dim=chosen["bottlenecks"][0],
        output_dim=chosen["prototypes"],
        center_method="sinkhorn_knopp",
        weight_decay_start=0.04,
    )
    method = DINOv2(
        arguments, DINOv2AdamWViTArgs(), EmbeddingModel(DINOV2_VIT_PACKAGE.get_model_wrapper(model)), images, 1
    )
    method.to(device)
    method.train()
    method.teacher_embedding_model.eval()
    method.teacher_head.eval()
    patch.object(DINOv2, "trainer", Step()).start()
    return method


def loss_of(method: DINOv2, views: list[torch.Tensor], masks: dict[str, torch.Tensor]) -> TrainingStepResult:
    """Its training step up to the loss, on masks that are given."""
    with patch.object(method_module, "create_collated_masks", lambda **_: masks):
        return method.training_step_impl({"views": views}, method.trainer.global_step)


def teacher_temperature(method: DINOv2) -> float:
    """What its training step takes at this point of the run."""
    arguments = method.method_args
    return method_module.linear_warmup_schedule(
        step=method.trainer.global_step,
        warmup_steps=arguments.teacher_temp_warmup_steps,
        start_value=arguments.teacher_temp_start,
        end_value=arguments.teacher_temp_end,
    )


def build(chosen: dict[str, Any], device: torch.device) -> tuple[Callable[[], torch.Tensor], dict[str, Any]]:
    """One step of its DINOv2, and what it is."""
    sizes, images = chosen["sizes"], chosen["images"]
    method = make_method(chosen, device)
    arguments, trainer = method.method_args, method.trainer
    [optimizer], [schedule] = method.configure_optimizers()
    scheduler = schedule["scheduler"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    generator = torch.Generator().manual_seed(0)
    sides = [sizes[0]] * 2 + [sizes[1]] * 8
    turns = cycle(
        [
            [torch.randn(images, 1, size, size, generator=generator).to(device) for size in sides]
            for _ in range(chosen["batches"])
        ]
    )
    began = time.perf_counter()
    masks = [draw_masks(arguments, method._patch_size, sizes[0], images) for _ in range(chosen["batches"])]
    mask_seconds = (time.perf_counter() - began) / len(masks)
    masked = sum(len(mask["mask_indices_list"]) for mask in masks) / len(masks)
    mask_turns = cycle([{name: value.to(device) for name, value in mask.items()} for mask in masks])
    precision = PRECISIONS.get(chosen["precision"]) or get_precision("auto")
    bf16 = precision == "bf16-mixed"

    def step() -> torch.Tensor:
        views = next(turns)
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = loss_of(method, views, next(mask_turns)).loss
        optimizer.zero_grad()
        loss.backward()
        method.on_before_optimizer_step(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, arguments.gradient_clip_val)
        optimizer.step()
        scheduler.step()
        trainer.global_step += 1
        with patch.object(method_module.Method, "on_train_batch_end", lambda *_, **__: None):  # its timing log
            method.on_train_batch_end(None, {"views": views}, trainer.global_step)
        return loss

    facts = {
        "name": f"lightly-train {lightly_train.__version__}",
        "precision": precision,
        "xformers": attention.XFORMERS_AVAILABLE,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "mask_seconds": mask_seconds,
        "masked": masked,
    }
    return step, facts


def draw_masks(arguments: DINOv2Args, patch_size: int, size: int, images: int) -> dict[str, torch.Tensor]:
    """Masks of one batch by its own generator, with the numbers of its training step."""
    side = size // patch_size
    generator = method_module.MaskingGenerator(input_size=(side, side), max_num_patches=int(0.5 * side * side))
    return method_module.create_collated_masks(
        mask_ratio_min=arguments.mask_ratio_min,
        mask_ratio_max=arguments.mask_ratio_max,
        n_masked_crops=int(2 * images * arguments.mask_probability),
        n_crops=2 * images,
        mask_generator=generator,
    )


if __name__ == "__main__":
    protocol.serve(build)
