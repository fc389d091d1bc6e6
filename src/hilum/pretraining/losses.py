"""The losses of DINOv2 and the targets they need, as functions of logits and features; float32 whatever comes in.

Teacher logits become targets by Sinkhorn-Knopp or by centring; the student is compared with them by cross-entropy, on
[CLS] between views (DINO) and at masked patches of the same view (iBOT); KoLeo spreads [CLS] over the sphere. Formulas:
`docs/explanation/pretraining.md`. Which tokens go where is `dinov2.py`'s business.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hilum.core.distributed import max_over_ranks, mean_over_ranks, sum_over_ranks
from hilum.core.errors import ConfigError
from hilum.pretraining.projection import Projection, at_least_float32


@torch.no_grad()
def sinkhorn_targets(
    logits: Float[Tensor, "rows K"],
    temperature: float,
    iterations: int = 3,
    valid: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "rows K"]:
    """Soft assignments of rows to prototypes that use all prototypes about equally (Sinkhorn-Knopp, SwAV appendix).

    Alternately scales the columns of exp(logits / temperature), over the rows of all ranks, and the rows, which end
    with sum 1. The matrix is never rescaled: Q = diag(c) exp(z / T) diag(r) with one factor per row and per prototype,
    so an iteration is two matrix-vector products and one sum over ranks. A row's own maximum is taken out before the
    exponential and put back into the initial c: only a shift common to all rows would leave the result unchanged.

    Args:
        logits: of the teacher; zero rows are allowed on a rank, in which case it still takes part in the sums.
        temperature: T.
        iterations: 3 in DINOv2.
        valid: 1, or 0 for rows of padding, which then weigh nothing.
    """
    with torch.autocast(logits.device.type, enabled=False):
        scaled = at_least_float32(logits) / temperature
        rows, count = scaled.shape
        peak = scaled.amax(dim=1) if rows else scaled.new_empty(0)
        highest = peak.max() if rows else scaled.new_tensor(-torch.inf)
        highest = max_over_ranks(highest.clone())
        similarity = scaled.sub_(peak[:, None]).exp_()  # rows K
        tiny = torch.finfo(scaled.dtype).tiny
        row_factor = torch.exp(peak - highest)  # rows
        prototype_factor = scaled.new_ones(count)
        for _ in range(iterations):
            weights = row_factor if valid is None else row_factor * valid
            mass = sum_over_ranks(weights @ similarity)  # K
            prototype_factor = 1 / (count * mass).clamp_min(tiny)
            row_factor = 1 / (similarity @ prototype_factor).clamp_min(tiny)
        return similarity.mul_(prototype_factor).mul_(row_factor[:, None])


@torch.no_grad()
def centred_targets(
    logits: Float[Tensor, "rows K"], centre: Float[Tensor, " K"], temperature: float
) -> Float[Tensor, "rows K"]:
    """softmax((logits - centre) / temperature) (DINO, Caron 2021)."""
    return torch.softmax((at_least_float32(logits) - centre) / temperature, dim=-1)


@torch.no_grad()
def moved_centre(
    centre: Float[Tensor, " K"], teacher: Projection, momentum: float = 0.9, valid: Float[Tensor, " rows"] | None = None
) -> Float[Tensor, " K"]:
    """The exponential moving average of the mean teacher logits, over the rows of all ranks.

    The mean of logits is the product of the prototypes with the mean of the features; no logits are needed.
    """
    with torch.autocast(centre.device.type, enabled=False):
        features, prototypes = at_least_float32(teacher.features), at_least_float32(teacher.prototypes)
        weights = features.new_ones(features.shape[0]) if valid is None else valid.to(features.dtype)
        total = sum_over_ranks(torch.cat([weights @ features, weights.sum()[None]]))  # E + 1
        mean = prototypes @ (total[:-1] / total[-1].clamp_min(1))
        return torch.where(total[-1] > 0, torch.lerp(mean, centre, momentum), centre)


def cross_entropy_rows(
    logits: Float[Tensor, "rows K"], targets: Float[Tensor, "rows K"], temperature: float
) -> Float[Tensor, " rows"]:
    """-sum_k targets_k log softmax(logits / temperature)_k of each row; targets need not sum to 1."""
    scaled = at_least_float32(logits) / temperature
    return targets.sum(dim=-1) * torch.logsumexp(scaled, dim=-1) - (targets * scaled).sum(dim=-1)


def _projected_cross_entropy(
    features: Tensor, prototypes: Tensor, targets: Tensor, temperature: float
) -> Float[Tensor, " rows"]:
    return cross_entropy_rows(F.linear(features, prototypes), targets, temperature)


def _projection_cross_entropy(
    student: Projection, targets: Tensor, temperature: float, chunk: int
) -> Float[Tensor, " rows"]:
    """Cross-entropy of a projection's logits, `chunk` rows at a time: logits live only while their chunk is used.

    They are computed again in the backward pass; same values, less memory. 0: all rows at once.
    """
    if chunk < 1 or student.features.shape[0] <= chunk:
        return _projected_cross_entropy(student.features, student.prototypes, targets, temperature)
    pieces = [
        checkpoint(
            _projected_cross_entropy, features, student.prototypes, target, temperature,
            use_reentrant=False, preserve_rng_state=False,
        )
        for features, target in zip(student.features.split(chunk), targets.split(chunk), strict=True)
    ]  # fmt: skip
    return torch.cat(pieces)


def dino_losses(
    student: Projection, targets: Float[Tensor, "G B K"], temperature: float = 0.1, chunk: int = 0
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """[CLS] cross-entropies (local, global): every teacher view supervises every student view but itself.

    Each pair counts the mean over its B images divided by the number of pairs, G (G - 1) + G L: 2 + 16 = 18 for two
    global and eight local crops. Prototypes used uniformly give 16/18 ln K and 2/18 ln K.

    Args:
        student: rows of the global crops, then of the local crops, each crop-major: (G + L) B rows.
        targets: of the teacher's global crops.
        temperature: of the student.
        chunk: rows at a time, 0 for all at once.
    """
    views, images, _ = targets.shape
    local_count = student.features.shape[0] // images - views
    pairs = views * (views - 1) + views * local_count
    others = [targets[[other for other in range(views) if other != view]].sum(dim=0) for view in range(views)]
    crop_targets = others + [targets.sum(dim=0)] * local_count  # of each crop: B K
    if chunk < 1:
        logits = student.logits().unflatten(0, (views + local_count, images))  # G+L B K
        rows = [cross_entropy_rows(logits[crop], target, temperature) for crop, target in enumerate(crop_targets)]
    else:
        features = student.features.unflatten(0, (views + local_count, images))  # G+L B E
        rows = [
            _projection_cross_entropy(Projection(features[crop], student.prototypes), target, temperature, chunk)
            for crop, target in enumerate(crop_targets)
        ]
    per_crop = torch.stack([losses.mean() for losses in rows])  # G+L
    return per_crop[views:].sum() / pairs, per_crop[:views].sum() / pairs


def ibot_loss(
    student: Projection,
    targets: Float[Tensor, "M K"],
    weights: Float[Tensor, " M"],
    crops: int,
    temperature: float = 0.1,
    chunk: int = 0,
) -> Float[Tensor, ""]:
    """Cross-entropy at masked patches: mean over the masked tokens of a crop, then sum over crops / all crops.

    Crops without a mask count as 0, so with half of them masked, prototypes used uniformly give ln K / 2.

    Args:
        student: masked patch tokens of all global crops.
        targets: of the teacher at the same positions.
        weights: 1 / (masked tokens in that token's crop).
        crops: number of global crops, masked or not (2B).
        temperature: of the student.
        chunk: rows at a time, 0 for all at once.
    """
    return (_projection_cross_entropy(student, targets, temperature, chunk) * weights).sum() / crops


def koleo_loss(tokens: Float[Tensor, "B D"], group: int = 0) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Minus the mean log distance of each unit vector to its nearest neighbour; and the mean distance.

    Kozachenko-Leonenko estimator of entropy (Sablayrolles 2019). Without a second image there is no neighbour: both
    are 0.

    Args:
        tokens: [CLS] of one view.
        group: neighbours are looked for among this many consecutive images, 0: among all of this process.

    Raises:
        ConfigError: the images do not divide into groups.
    """
    images = tokens.shape[0]
    size = group or images
    if size and images % size:
        raise ConfigError(
            f"losses.koleo_group={group}: the {images} images of this process do not divide into groups of {group}. "
            "Choose a divisor of the images that each process has in a step, or 0."
        )
    if size < 2:
        return at_least_float32(tokens * 0.0).sum(), torch.zeros((), device=tokens.device)
    with torch.autocast(tokens.device.type, enabled=False):
        points = F.normalize(at_least_float32(tokens), dim=-1, eps=1e-8)
        with torch.no_grad():
            grouped = points.unflatten(0, (-1, size))  # groups size D
            similarity = grouped @ grouped.transpose(1, 2)  # groups size size
            similarity.diagonal(dim1=1, dim2=2).fill_(-1)
            first = torch.arange(0, images, size, device=tokens.device)
            nearest = (similarity.argmax(dim=2) + first[:, None]).flatten()
        distances = F.pairwise_distance(points, points[nearest], eps=1e-8)
        return -torch.log(distances + 1e-8).mean(), distances.detach().mean()


@torch.no_grad()
def prototype_usage(targets: Float[Tensor, "rows K"], valid: Float[Tensor, " rows"] | None = None) -> Float[Tensor, ""]:
    """Entropy of the mean target over ln K, over the rows of all ranks: 1 all prototypes used alike, 0 collapse."""
    weights = _row_weights(targets, valid)
    mean = mean_over_ranks((weights @ targets.float()) / weights.sum().clamp_min(1))
    return torch.special.entr(mean).sum() / math.log(mean.shape[0])


@torch.no_grad()
def target_entropy(targets: Float[Tensor, "rows K"], valid: Float[Tensor, " rows"] | None = None) -> Float[Tensor, ""]:
    """Mean entropy of a target over ln K: 1 says nothing (no gradient), 0 a hard label. 0 when there are no rows."""
    weights = _row_weights(targets, valid)
    entropies = torch.special.entr(targets.float()).sum(dim=1)
    return (weights @ entropies) / weights.sum().clamp_min(1) / math.log(targets.shape[1])


def _row_weights(targets: Tensor, valid: Tensor | None) -> Float[Tensor, " rows"]:
    return targets.new_ones(targets.shape[0], dtype=torch.float32) if valid is None else valid.float()


@torch.no_grad()
def effective_rank(features: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """The exponential of the entropy of the singular values of the centred features (Roy and Vetterli 2007)."""
    centred = features.float() - features.float().mean(dim=0)
    share = torch.linalg.svdvals(centred)
    return torch.special.entr(share / share.sum().clamp_min(1e-12)).sum().exp()
