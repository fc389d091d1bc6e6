"""Our step against LightlyTrain's DINOv2 from the same weights, pixels and masks: the same losses, the same gradients.

It makes the ratio of `hilum bench pretrain-step` one between equal things. Needs `lightly-train`, which is in no extra
of ours: run it in an environment of its own, `PYTHONPATH=src PYTHON -m pytest --noconftest` and this file.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightly_train", reason="lightly-train is not installed in this environment")

from hilum.backbones.vit import ViTConfig
from hilum.pretraining import dinov2
from hilum.pretraining.masking import block_masks, mask_weights

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
IMAGES, SIZES, PROTOTYPES, BOTTLENECK = 3, (56, 28), 257, 32


@pytest.fixture(scope="module")
def method() -> Any:
    """The peer's method as the benchmark builds it, on the CPU."""
    sys.path.insert(0, str(PEERS))
    import lightly_step

    settings = {
        "model": "vits14", "sizes": SIZES, "images": IMAGES, "drop_path": 0.0, "registers": 0, "feed_forward": "mlp",
        "prototypes": PROTOTYPES, "bottlenecks": (BOTTLENECK, BOTTLENECK), "batches": 1, "precision": "fp32",
    }  # fmt: skip
    return lightly_step.make_method(settings, torch.device("cpu"))


def names_of(peer: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """The peer's names of a head's parameters to ours."""
    renamed = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    found = {}
    for name, value in peer.items():
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        found[f"{part}.{name}"] = value
    return found


def all_of(embedding: Any, heads: Any, value: str) -> dict[str, torch.Tensor]:
    parts = {
        "backbone": embedding.wrapped_model.get_model(), "dino_head": heads.dino_head, "ibot_head": heads.ibot_head,
    }  # fmt: skip
    found: dict[str, torch.Tensor] = {}
    for part, module in parts.items():
        found |= names_of({name: getattr(p, value) for name, p in module.named_parameters()}, part)
    return found


def test_same_weights_same_batch_same_losses_and_gradients(method: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from the identity, student and teacher apart
        for module in (
            method.student_embedding_model, method.student_head, method.teacher_embedding_model, method.teacher_head,
        ):  # fmt: skip
            for name, parameter in module.named_parameters():
                around = 1.0 if "gamma" in name or ("norm" in name and name.endswith("weight")) else 0.0
                parameter.copy_(around + 0.05 * torch.randn(parameter.shape, generator=generator))
                if "original0" in name:
                    parameter.fill_(1.0)
    views = [torch.randn(IMAGES, 1, size, size, generator=generator) for size in [SIZES[0]] * 2 + [SIZES[1]] * 8]
    masks = block_masks(IMAGES, (4, 4), np.random.default_rng(0))
    flat, weights = torch.from_numpy(masks), torch.as_tensor(mask_weights(masks))
    positions = flat.flatten().nonzero().flatten()

    architecture = ViTConfig(384, 12, 6, patch_size=14, image_size=56)
    heads = dinov2.HeadConfig(PROTOTYPES, 2048, BOTTLENECK, BOTTLENECK)
    student, teacher = dinov2.make_networks(architecture, heads, 0)
    student.load_state_dict(all_of(method.student_embedding_model, method.student_head, "data"))
    teacher.load_state_dict(all_of(method.teacher_embedding_model, method.teacher_head, "data"))
    batch = dinov2.Batch(torch.cat(views[:2]), torch.cat(views[2:]), flat, positions, weights)
    losses = dinov2.LossConfig(ibot=1.0)

    import lightly_step

    theirs = lightly_step.loss_of(
        method, views, {"collated_masks": flat, "mask_indices_list": positions, "masks_weight": weights}
    )
    theirs.loss.backward()
    temperature = lightly_step.teacher_temperature(method)
    targets = dinov2.teacher_targets(
        dinov2.teacher_forward(teacher, batch), dinov2.make_centres(PROTOTYPES, flat.device), temperature, losses
    )
    ours = dinov2.compute_losses(student(batch, 0.0, None), targets, batch, losses)
    ours.total.backward()

    assert [ours.dino_global.item(), ours.dino_local.item(), ours.ibot.item(), ours.koleo.item()] == pytest.approx(
        [theirs.log_dict[f"train_loss/{name}_loss"].item() for name in ("dino_global", "dino_local", "ibot", "koleo")],
        rel=1e-4,
    )
    gradients = all_of(method.student_embedding_model, method.student_head, "grad")
    compared = 0
    for name, parameter in student.named_parameters():
        scale = gradients[name].abs().max()
        if scale > 1e-7:
            assert (parameter.grad - gradients[name]).abs().max() <= 2e-3 * scale, name
            compared += 1
    assert compared > 150
