"""Student and teacher of DINOv2: what goes through which network, which tokens meet in which loss, the EMA update.

    global crops, masked ──▶ student ──▶ [CLS] ──▶ dino_head ──┐       ┌── dino_head ◀── [CLS] ◀── teacher ◀── global
    local crops ───────────▶         └─▶ masked ─▶ ibot_head ──┴▶ loss ◀┴─ ibot_head ◀─ masked ◀─┘            crops

Takes batches that are already on the device; `commands/pretrain.py` owns the loop. Dimensions: G global and L local
crops an image, GB rows of global crops, N patches of a global crop, M masked patches, K prototypes.

More than 300 lines: the settings, the data that pass between the parts, and the parts of a step, in one place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.core.distributed import rows_of_all_ranks
from hilum.core.errors import ConfigError
from hilum.core.seeding import forked
from hilum.core.sharding import local_parameters, whole
from hilum.core.tracking import warn
from hilum.pretraining import prototype_loss
from hilum.pretraining.losses import (
    centred_targets,
    dino_losses,
    effective_rank,
    ibot_loss,
    koleo_loss,
    moved_centre,
    prototype_usage,
    sinkhorn_targets,
    target_entropy,
)
from hilum.pretraining.projection import DINOHead, Projection
from hilum.pretraining.prototype_loss import Assignment

Centering = Literal["sinkhorn", "centre"]
PrototypeLoss = Literal["auto", "plain", "chunked", "triton"]
PARTS = ("backbone", "dino_head", "ibot_head")
GLOBAL_VIEWS = 2
_LARGE = 2**20
"""Teacher logits of [CLS] from which no matrix is built (with their masked patches some 100 MB a matrix)."""

_ROWS = 1024
"""Rows of [CLS] of several processes that health is judged by: more would not say more, and cost a step's time."""


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of the two projection heads."""

    prototypes: int = 131072
    """K, of each head."""
    hidden: int = 2048
    """Width of the inner layers."""
    dino_bottleneck: int = 384
    """Width of the normalised vectors of [CLS]."""
    ibot_bottleneck: int = 256
    """Width of the normalised vectors of patches."""

    def __post_init__(self) -> None:
        for name in ("prototypes", "hidden", "dino_bottleneck", "ibot_bottleneck"):
            if getattr(self, name) < 1:
                raise ConfigError(f"heads.{name}: expected at least 1, found {getattr(self, name)}.")


@dataclass(frozen=True)
class LossConfig:
    """Weights and temperatures of the losses."""

    dino: float = 1.0
    """Weight of the [CLS] losses."""
    ibot: float = 3.0
    """Weight of the masked-patch loss; 3 in the slides, 1 in DINOv2."""
    koleo: float = 0.1
    """Weight of the spread of [CLS]."""
    student_temperature: float = 0.1
    """Divides the student's logits."""
    centering: Centering = "sinkhorn"
    """How teacher logits become targets: Sinkhorn-Knopp, or softmax around a moving centre."""
    sinkhorn_iterations: int = 3
    """Rounds of Sinkhorn-Knopp."""
    centre_momentum: float = 0.9
    """Share of the centre that stays, for centering=centre."""
    koleo_group: int = 0
    """Images whose nearest neighbours are looked for together, 0: all of a process. Set to a divisor of the images of
    a process, results do not depend on how many processes share a batch."""
    prototype_loss: PrototypeLoss = "auto"
    """How the losses over prototypes are computed; the same numbers up to rounding. plain: whole matrices, readable.
    chunked: some rows at a time, no matrix is kept. triton: fused kernels, on a CUDA device. auto: plain for small
    matrices; for large ones triton where it can be, else chunked."""
    chunk: int = 0
    """Rows whose logits are held at once; 0: chosen from the size (for plain: all)."""

    def __post_init__(self) -> None:
        if self.koleo_group < 0 or self.koleo_group == 1:
            raise ConfigError(
                f"losses.koleo_group: expected 0 or at least 2 (an image needs a neighbour), found {self.koleo_group}."
            )
        for name in ("dino", "ibot", "koleo"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"losses.{name}: expected a weight of 0 or more, found {getattr(self, name)}.")
        if not self.student_temperature > 0:
            raise ConfigError(f"losses.student_temperature: expected more than 0, found {self.student_temperature}.")
        if not 0 <= self.centre_momentum <= 1:
            raise ConfigError(f"losses.centre_momentum: expected a share in [0, 1], found {self.centre_momentum}.")
        if self.sinkhorn_iterations < 1:
            raise ConfigError(f"losses.sinkhorn_iterations: expected at least 1, found {self.sinkhorn_iterations}.")
        if self.chunk < 0:
            raise ConfigError(f"losses.chunk: expected 0 or more rows, found {self.chunk}.")


class Batch(NamedTuple):
    """One step's input, on the device. Crop-major: all images of crop 1, then all of crop 2, ..."""

    global_crops: Float[Tensor, "GB 1 S S"]
    """Normalised."""
    local_crops: Float[Tensor, "LB 1 s s"]
    """Normalised."""
    masks: Bool[Tensor, "GB N"]
    """True where the student does not see the patch."""
    masked: Int64[Tensor, " M"]
    """Positions of the masked patches in the flattened GB x N."""
    mask_weights: Float[Tensor, " M"]
    """1 / (masked patches of the same crop)."""


class StudentOutput(NamedTuple):
    """What the student says of a batch."""

    cls: Projection
    """Rows of the global crops, then of the local crops."""
    patches: Projection
    """Rows of the masked patches."""
    global_cls: Float[Tensor, "GB D"]
    """[CLS] of the global crops before the head."""


class TeacherOutput(NamedTuple):
    """What the teacher says of a batch; logits are left to what makes targets of them."""

    cls: Projection
    """Rows of the global crops."""
    patches: Projection
    """Rows of the masked patches."""
    global_cls: Float[Tensor, "GB D"]
    """[CLS] of the global crops before the head."""
    valid: Float[Tensor, " M"] | None = None
    """1 for masked patches, 0 for rows that only fill the batch up (those of mask weight 0); None: no such rows."""


class Centres(NamedTuple):
    """Moving centres of the teacher's logits; used with centering=centre only."""

    cls: Float[Tensor, " K"]
    patches: Float[Tensor, " K"]


class Targets(NamedTuple):
    """What the student is asked to say; matrices for the plain losses, assignments in factors for the others."""

    cls: Float[Tensor, "GB K"] | Assignment
    patches: Float[Tensor, "M K"] | Assignment


class Losses(NamedTuple):
    """Scalars on the device, before their weights, except `total`."""

    total: Float[Tensor, ""]
    dino_local: Float[Tensor, ""]
    dino_global: Float[Tensor, ""]
    ibot: Float[Tensor, ""]
    koleo: Float[Tensor, ""]
    """Sum over the two global crops."""
    nearest_distance: Float[Tensor, ""]
    """Mean distance of a [CLS] to its nearest neighbour; falls to 0 in a collapse."""


class Network(nn.Module):
    """Backbone and both heads: the student, and the teacher of the same shape."""

    def __init__(self, architecture: ViTConfig, heads: HeadConfig) -> None:
        super().__init__()
        dim = architecture.embed_dim
        self.backbone = VisionTransformer(architecture)
        self.dino_head = DINOHead(dim, heads.prototypes, heads.hidden, heads.dino_bottleneck)
        self.ibot_head = DINOHead(dim, heads.prototypes, heads.hidden, heads.ibot_bottleneck)

    def forward(self, batch: Batch, drop_path: float, generator: torch.Generator | None) -> StudentOutput:
        """The student's pass: masked global crops and whole local crops through the backbone at once."""
        has_locals = batch.local_crops.shape[0] > 0
        crops = [batch.global_crops, batch.local_crops] if has_locals else [batch.global_crops]
        masks = [batch.masks, None] if has_locals else [batch.masks]
        global_tokens, *local_tokens = self.backbone.forward_crops(crops, masks, drop_path, generator)
        cls = torch.cat([global_tokens.cls, *[tokens.cls for tokens in local_tokens]])  # GB + LB, D
        masked = global_tokens.patches.flatten(0, 1).index_select(0, batch.masked)  # M D
        return StudentOutput(self.dino_head(cls), self.ibot_head(masked), global_tokens.cls)


def make_networks(architecture: ViTConfig, heads: HeadConfig, seed: int) -> tuple[Network, Network]:
    """Student and teacher with equal weights; the teacher takes no gradient."""
    with forked(seed, "initialisation"):
        student = Network(architecture, heads)
        teacher = Network(architecture, heads)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return student, teacher.eval()


def make_centres(prototypes: int, device: torch.device) -> Centres:
    """Centres at zero."""
    return Centres(torch.zeros(prototypes, device=device), torch.zeros(prototypes, device=device))


@torch.no_grad()
def teacher_forward(teacher: Network, batch: Batch) -> TeacherOutput:
    """The teacher's pass: unmasked global crops, no stochastic depth."""
    tokens = teacher.backbone(batch.global_crops)  # cls GB D, patches GB N D
    masked = tokens.patches.flatten(0, 1).index_select(0, batch.masked)  # M D
    return TeacherOutput(
        cls=teacher.dino_head(tokens.cls),
        patches=teacher.ibot_head(masked),
        global_cls=tokens.cls,
        valid=(batch.mask_weights > 0).float(),
    )


@torch.no_grad()
def teacher_targets(output: TeacherOutput, centres: Centres, temperature: float, config: LossConfig) -> Targets:
    """Targets of [CLS] over both global crops of all ranks, and of the masked patches of all ranks.

    Raises:
        ConfigError: `prototype_loss=triton` where no kernel can run.
    """
    method = prototype_method(config, output)
    heads = ((output.cls, centres.cls, None), (output.patches, centres.patches, output.valid))
    if method == "plain":
        matrices = [
            sinkhorn_targets(said.logits(), temperature, config.sinkhorn_iterations, valid)
            if config.centering == "sinkhorn"
            else centred_targets(said.logits(), centre, temperature)
            for said, centre, valid in heads
        ]
        return Targets(*matrices)
    assignments = [
        prototype_loss.balanced_assignment(said, temperature, config.sinkhorn_iterations, method, config.chunk, valid)
        if config.centering == "sinkhorn"
        else prototype_loss.centred_assignment(said, centre, temperature, method, config.chunk, valid)
        for said, centre, valid in heads
    ]
    return Targets(*assignments)


def prototype_method(config: LossConfig, output: TeacherOutput) -> Literal["plain", "chunked", "triton"]:
    """What `config.prototype_loss` means for a batch. All ranks come to the same answer: their sums must meet.

    Raises:
        ConfigError: triton is asked for and cannot run.
    """
    wanted, features = config.prototype_loss, output.cls.features
    if wanted in ("plain", "chunked"):
        return wanted
    if wanted == "auto" and features.shape[0] * output.cls.prototypes.shape[0] < _LARGE:
        return "plain"  # by the rows of [CLS]: masked patches vary by rank
    reason = prototype_loss.triton_failure(features.device)
    if wanted == "triton" and reason:
        raise ConfigError(f"losses.prototype_loss=triton: the kernels cannot be used ({reason}). Use chunked or auto.")
    if reason and features.is_cuda:
        _warn_once(f"the fused kernels of the losses cannot be used ({reason}); training goes on without, more slowly")
    return "chunked" if reason else "triton"


@cache
def _warn_once(text: str) -> None:
    warn(text)


def compute_losses(student: StudentOutput, targets: Targets, batch: Batch, config: LossConfig) -> Losses:
    """The weighted sum of dino (local + global), ibot, and koleo over each global crop; and its terms.

    Gradients flow from `total`; the terms may be detached.
    """
    views, crops = GLOBAL_VIEWS, batch.masks.shape[0]
    temperature, chunk = config.student_temperature, config.chunk
    if isinstance(targets.cls, Assignment):
        dino, dino_local, dino_global = prototype_loss.dino_losses(student.cls, targets.cls, views, temperature)
    else:
        by_view = targets.cls.unflatten(0, (views, -1))  # G B K
        dino_local, dino_global = dino_losses(student.cls, by_view, temperature, chunk)
        dino = dino_local + dino_global
    if isinstance(targets.patches, Assignment):
        ibot = prototype_loss.ibot_loss(student.patches, targets.patches, batch.mask_weights, crops, temperature)
    else:
        ibot = ibot_loss(student.patches, targets.patches, batch.mask_weights, crops, temperature, chunk)
    per_view = [koleo_loss(tokens, config.koleo_group) for tokens in student.global_cls.chunk(views)]  # each of B D
    koleo = torch.stack([loss for loss, _ in per_view]).sum()
    distance = torch.stack([distance for _, distance in per_view]).mean()
    total = config.dino * dino + config.ibot * ibot + config.koleo * koleo
    return Losses(total, dino_local, dino_global, ibot, koleo, distance)


@torch.no_grad()
def update_centres(centres: Centres, output: TeacherOutput, momentum: float) -> Centres:
    """Centres for the next step."""
    return Centres(
        moved_centre(centres.cls, output.cls, momentum),
        moved_centre(centres.patches, output.patches, momentum, output.valid),
    )


@torch.no_grad()
def update_teacher(teacher: Network, student: Network, momentum: float, skip: Tensor | None = None) -> None:
    """Each teacher parameter becomes momentum * itself + (1 - momentum) * the student's; one pass over memory.

    Args:
        teacher: changed in place.
        student: read.
        momentum: share that stays, 0 to 1.
        skip: 0-dimensional, on the device; where it is 1 the teacher stays as it is, bit for bit, whatever the student
            holds. The host does not wait for it.
    """
    before, after = local_parameters(teacher), local_parameters(student)
    if skip is None:
        torch._foreach_lerp_(before, after, 1.0 - momentum)
        return
    # A step of gradient descent, p - rate (gradient + decay p), is an average with gradient = student, decay = -1 and
    # rate = momentum - 1; torch's fused step is one pass too, and the one that a flag on the device can cancel.
    torch._fused_sgd_(
        before, after, [], weight_decay=-1.0, momentum=0.0, lr=momentum - 1.0, dampening=0.0, nesterov=False,
        maximize=False, is_first_step=False, grad_scale=None, found_inf=skip.to(torch.float32),
    )  # fmt: skip


def clip_gradients(student: Network, limit: float) -> dict[str, Tensor]:
    """Scale the gradient of each part to norm `limit` at most, each part by itself; returns the norms before."""
    clip: Callable[..., Tensor] = nn.utils.clip_grad_norm_
    return {part: whole(clip(getattr(student, part).parameters(), limit or float("inf"))) for part in PARTS}


@torch.no_grad()
def health(output: TeacherOutput, targets: Targets) -> dict[str, Tensor]:
    """Signs of collapse or of targets that say nothing, cheap enough for every logged step. All ranks call it.

    Rank and deviation are of the [CLS] of all ranks, up to some `_ROWS`: one image on each says nothing of a collapse.
    Usage is of all ranks, entropies are this rank's.
    """
    features = rows_of_all_ranks(output.global_cls.float(), _ROWS)  # rows D
    unit = nn.functional.normalize(features, dim=-1)
    cls_usage, cls_entropy = _usage_and_entropy(targets.cls, None)
    patch_usage, patch_entropy = _usage_and_entropy(targets.patches, output.valid)
    return {
        "cls_prototype_usage": cls_usage,
        "patch_prototype_usage": patch_usage,
        "cls_target_entropy": cls_entropy,
        "patch_target_entropy": patch_entropy,
        "teacher_feature_deviation": unit.std(dim=0).mean() * features.shape[1] ** 0.5,
        "teacher_effective_rank": effective_rank(features),
    }


def _usage_and_entropy(targets: Tensor | Assignment, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    if isinstance(targets, Assignment):
        return prototype_loss.usage_and_entropy(targets)
    return prototype_usage(targets, valid), target_entropy(targets, valid)
