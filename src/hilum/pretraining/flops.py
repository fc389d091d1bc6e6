"""The floating-point operations that one pretraining step asks for, by part; what a rate in images/s is worth.

Counts the matrix products of the method, a multiplication with its addition as two operations: what any exact
implementation must do, not what one happens to do, so recomputed logits and attention scores count once. Element-wise
work is left out. `tests/unit/pretraining/test_flops.py` holds it against torch's own counter on real steps.
"""

import re
from dataclasses import dataclass

from hilum.backbones.vit import ViTConfig
from hilum.core.errors import ConfigError
from hilum.pretraining.dinov2 import HeadConfig

PEAKS: dict[str, float] = {
    "B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
    "A100": 312e12, "A40": 150e12, "A10": 125e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12,
}  # fmt: skip
"""Dense bfloat16 operations a second with float32 sums, by words of the device's name: NVIDIA's data sheets."""


@dataclass(frozen=True)
class StepFlops:
    """Operations of one step over a whole batch, by part."""

    teacher: float
    """The teacher's backbone on the global crops."""
    student: float
    """The student's backbone on all crops, there and back, on the images that stochastic depth keeps."""
    heads: float
    """Both projection heads up to the bottleneck, of both networks."""
    prototypes: float
    """Products with the prototypes, of both networks."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.teacher + self.student + self.heads + self.prototypes


def step_flops(
    architecture: ViTConfig,
    heads: HeadConfig,
    images: int,
    sizes: tuple[int, int],
    local_crops: int = 8,
    drop_path: float = 0.0,
    masked: float | None = None,
) -> StepFlops:
    """Operations of one step.

    Args:
        architecture: of both networks.
        heads: of both networks.
        images: B, on this process.
        sizes: sides of a global and of a local crop, pixels.
        local_crops: L an image; there are two global crops.
        drop_path: stochastic depth of the student; of b crops, max(int(b (1 - rate)), 1) pass through a branch.
        masked: masked patches of all global crops together; None: the mean of the published masks, where half of the
            crops lose 30 % of their patches.

    Raises:
        ConfigError: crops that do not divide into patches.
    """
    for size in sizes:
        if size % architecture.patch_size or size < architecture.patch_size:
            raise ConfigError(f"sizes: {size} is not a multiple of the patch size {architecture.patch_size}.")
    patches = [(size // architecture.patch_size) ** 2 for size in sizes]
    rows = [2 * images, local_crops * images]
    if masked is None:
        masked = 2 * images * 0.5 * 0.3 * patches[0]

    def kept(count: int) -> int:
        return count if drop_path <= 0 or not count else max(int(count * (1 - drop_path)), 1)

    embedding = [count * _embedding(architecture, grid) for count, grid in zip(rows, patches, strict=True)]
    blocks = [kept(count) * _blocks(architecture, grid) for count, grid in zip(rows, patches, strict=True)]
    # Pixels take no gradient, so the backward pass of the patch embedding is one product, of everything else two.
    student = 2 * sum(embedding) + 3 * sum(blocks)
    teacher = rows[0] * (_embedding(architecture, patches[0]) + _blocks(architecture, patches[0]))

    cls = rows[0] + 3 * sum(rows)  # the teacher's rows, and the student's there and back
    patch = masked + 3 * masked
    dino, ibot = heads.dino_bottleneck, heads.ibot_bottleneck
    inner = architecture.embed_dim * heads.hidden + heads.hidden**2
    projected = cls * 2 * (inner + heads.hidden * dino) + patch * 2 * (inner + heads.hidden * ibot)
    compared = 2 * heads.prototypes * (cls * dino + patch * ibot)
    return StepFlops(teacher, student, projected, compared)


def _embedding(architecture: ViTConfig, patches: int) -> float:
    """Forward operations of the patch embedding of one crop."""
    return 2 * patches * architecture.in_channels * architecture.patch_size**2 * architecture.embed_dim


def _blocks(architecture: ViTConfig, patches: int) -> float:
    """Forward operations of all blocks on one crop."""
    dim, tokens = architecture.embed_dim, patches + 1 + architecture.registers
    matrices = 2 if architecture.feed_forward == "mlp" else 3
    weights = 4 * dim**2 + matrices * dim * architecture.feed_forward_hidden
    return architecture.depth * (2 * tokens * weights + 4 * tokens**2 * dim)


def device_peak(name: str) -> float | None:
    """Data-sheet peak of a device, dense bfloat16 operations a second; None where it is not known."""
    matching = [words for words in PEAKS if re.search(rf"\b{words}\b", name, re.IGNORECASE)]
    return PEAKS[max(matching, key=len)] if matching else None


def utilisation(images_per_second: float, flops_per_image: float, peak: float) -> float:
    """Share of the peak that the method's own operations make use of (MFU)."""
    return images_per_second * flops_per_image / peak
