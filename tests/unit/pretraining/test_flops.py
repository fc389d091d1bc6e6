"""The model of a step's operations against torch's own counter on real steps, and against published figures."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hilum.backbones.vit import SIZES, ViTConfig
from hilum.core.errors import ConfigError
from hilum.core.seeding import torch_stream
from hilum.pretraining import dinov2
from hilum.pretraining.flops import device_peak, step_flops, utilisation
from hilum.pretraining.masking import block_masks, mask_weights
from hilum.pretraining.projection import Projection

HEADS = dinov2.HeadConfig(96, 48, 24, 16)
LOSSES = dinov2.LossConfig(prototype_loss="plain")
"""The form that recomputes no logits."""


def small(**changes: object) -> ViTConfig:
    return dataclasses.replace(ViTConfig(64, 3, 2, patch_size=8, image_size=32), **changes)


def random_batch(vit: ViTConfig, images: int, sizes: tuple[int, int], local_crops: int) -> dinov2.Batch:
    masks = block_masks(images, (sizes[0] // vit.patch_size,) * 2, np.random.default_rng(0))
    flat = torch.from_numpy(masks)
    return dinov2.Batch(
        torch.randn(2 * images, vit.in_channels, sizes[0], sizes[0]),
        torch.randn(local_crops * images, vit.in_channels, sizes[1], sizes[1]),
        flat,
        flat.flatten().nonzero().flatten(),
        torch.as_tensor(mask_weights(masks)),
    )


def count(run: Callable[[], object]) -> int:
    """What torch counts; attention by plain products, which its backward pass then does not recompute."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def there_and_back(outputs: Callable[[], list[Tensor]]) -> Callable[[], None]:
    return lambda: torch.stack([output.sum() for output in outputs()]).sum().backward()


CASES = [
    (small(), 4, (32, 16), 8, 0.0),
    (small(registers=4), 4, (32, 16), 8, 0.0),
    (small(registers=1, feed_forward="swiglu"), 3, (40, 24), 3, 0.0),
    (small(swiglu_multiple=64, feed_forward="swiglu"), 3, (32, 16), 8, 0.3),
    (small(), 5, (32, 16), 8, 0.4),
    (small(registers=4, in_channels=3), 1, (48, 16), 2, 0.9),
    (small(patch_size=14, image_size=56), 3, (56, 28), 8, 0.1),
    (small(patch_size=16, image_size=64), 2, (64, 32), 0, 0.2),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1:]} {case[0].feed_forward}")
def test_every_part_of_a_step_is_what_torch_counts(case: tuple[ViTConfig, int, tuple[int, int], int, float]) -> None:
    vit, images, sizes, local_crops, drop_path = case
    student, teacher = dinov2.make_networks(vit, HEADS, 0)
    batch = random_batch(vit, images, sizes, local_crops)
    crops = [batch.global_crops, batch.local_crops][: 2 if local_crops else 1]
    masks = [batch.masks, None][: len(crops)]
    cls = torch.randn((2 + local_crops) * images, vit.embed_dim)
    patches = torch.randn(len(batch.masked), vit.embed_dim)

    def backbone() -> list[Tensor]:
        tokens = student.backbone.forward_crops(crops, masks, drop_path, torch_stream(0, "drop path"))
        return [part for group in tokens for part in (group.cls, group.patches)]

    def projected(network: dinov2.Network, rows: int, gradient: bool) -> list[Tensor]:
        tokens = [token.requires_grad_(gradient) for token in (cls[:rows].detach(), patches.detach())]
        return [network.dino_head(tokens[0]).features, network.ibot_head(tokens[1]).features]

    def compared(network: dinov2.Network, rows: int) -> list[Tensor]:
        sizes_of = ((rows, HEADS.dino_bottleneck), (len(patches), HEADS.ibot_bottleneck))
        heads = (network.dino_head, network.ibot_head)
        return [
            Projection(torch.randn(size).requires_grad_(), head.last_layer()).logits()
            for size, head in zip(sizes_of, heads, strict=True)
        ]

    taught_rows, said_rows = 2 * images, len(cls)
    with torch.no_grad():
        taught = count(lambda: teacher.backbone(batch.global_crops))
        heads = count(lambda: projected(teacher, taught_rows, False))
        prototypes = count(lambda: compared(teacher, taught_rows))
    expected = step_flops(vit, HEADS, images, sizes, local_crops, drop_path, masked=len(patches))
    assert expected.teacher == taught
    assert expected.student == count(there_and_back(backbone))
    assert expected.heads == heads + count(there_and_back(lambda: projected(student, said_rows, True)))
    assert expected.prototypes == prototypes + count(there_and_back(lambda: compared(student, said_rows)))


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_a_whole_step_is_the_sum_of_the_parts(drop_path: float) -> None:
    vit, images, sizes = small(registers=4, embed_dim=128), 5, (64, 32)
    student, teacher = dinov2.make_networks(vit, HEADS, 0)
    batch = random_batch(vit, images, sizes, 8)
    centres = dinov2.make_centres(HEADS.prototypes, torch.device("cpu"))

    def step() -> None:
        taught = dinov2.teacher_forward(teacher, batch)
        targets = dinov2.teacher_targets(taught, centres, 0.05, LOSSES)
        said = student(batch, drop_path, torch_stream(0, "drop path"))
        dinov2.compute_losses(said, targets, batch, LOSSES).total.backward()

    expected = step_flops(vit, HEADS, images, sizes, 8, drop_path, masked=len(batch.masked)).total
    assert count(step) == pytest.approx(expected, rel=0.01)  # the distances of KoLeo are left out


@pytest.mark.parametrize(
    ("name", "sizes", "drop_path", "teacher", "student", "heads", "total"),
    [
        ("vitb16", (224, 96), 0.2, 0.072, 0.308, 0.022, 0.402),
        ("vitb16", (512, 144), 0.2, 0.430, 1.320, 0.102, 1.851),
        ("vitl16", (224, 96), 0.4, 0.251, 0.812, 0.023, 1.086),
        ("vitl16", (336, 128), 0.4, 0.579, 1.651, 0.046, 2.277),
        ("vitl16", (448, 144), 0.4, 1.078, 2.701, 0.080, 3.858),
        ("vitl16", (512, 144), 0.4, 1.454, 3.378, 0.103, 4.935),
        ("vitl16", (224, 96), 0.0, 0.251, 1.354, 0.023, 1.628),
    ],
)
def test_an_independent_model_gave_the_same(
    name: str, sizes: tuple[int, int], drop_path: float, teacher: float, student: float, heads: float, total: float
) -> None:
    """TFLOP an image of the published recipes, from a model written before this one, for three input channels."""
    vit = dataclasses.replace(SIZES[name], in_channels=3)
    found = step_flops(vit, dinov2.HeadConfig(), 1000, sizes, 8, drop_path)  # 1000: no crop is lost to rounding
    parts = (found.teacher, found.student, found.heads + found.prototypes)
    for part, expected in zip((*parts, found.total), (teacher, student, heads, total), strict=True):
        assert part / 1000 / 1e12 == pytest.approx(expected, rel=0.02, abs=0.0006)


def test_crops_that_do_not_divide_into_patches_are_refused() -> None:
    with pytest.raises(ConfigError, match="100 is not a multiple of the patch size 8"):
        step_flops(small(), HEADS, 4, (100, 16))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("cpu", None),
    ],
)
def test_peaks_go_by_whole_words_of_the_name(name: str, peak: float | None) -> None:
    assert device_peak(name) == peak


def test_utilisation_is_the_share_of_the_peak() -> None:
    assert utilisation(410, 1.086e12, 989e12) == pytest.approx(0.450, abs=0.001)
