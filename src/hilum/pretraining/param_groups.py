"""Which parameter learns at which rate: layer-wise decay, patch-embedding factor, weight decay on or off.

Takes the student (backbone, dino_head, ibot_head), gives optimizer groups that carry multipliers; `set_values` turns
the scheduled values of a step into each group's own. Rules of facebookresearch/dinov2 utils/param_groups.py.
"""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from hilum.backbones.layer_rates import layer_multiplier, takes_weight_decay
from hilum.pretraining.schedules import Values


def parameter_groups(
    student: nn.Module, depth: int, layer_decay: float = 0.9, patch_embed_factor: float = 0.2
) -> list[dict[str, Any]]:
    """Optimizer groups of a student, one per distinct treatment, each parameter in exactly one.

    Args:
        student: module whose backbone parameters are named `backbone.*`.
        depth: number of blocks of the backbone.
        layer_decay: factor per layer below the top, backbone only.
        patch_embed_factor: further factor on the learning rate of the patch embedding.

    Returns:
        Dicts with `params`, `names`, `learning_rate_factor`, `weight_decay_factor`, `backbone` and `last_layer`.
    """
    groups: dict[tuple[float, float, bool, bool], dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        backbone = name.startswith("backbone.")
        factor = layer_multiplier(name, depth, layer_decay) if backbone else 1.0
        if "patch_embed" in name:
            factor *= patch_embed_factor
        decay, last_layer = 1.0 if takes_weight_decay(name) else 0.0, "last_layer" in name
        treatment = (factor, decay, backbone, last_layer)
        if treatment not in groups:
            groups[treatment] = {
                "params": [], "names": [], "learning_rate_factor": factor, "weight_decay_factor": decay,
                "backbone": backbone, "last_layer": last_layer,
            }  # fmt: skip
        groups[treatment]["params"].append(parameter)
        groups[treatment]["names"].append(name)
    return list(groups.values())


def set_values(optimizer: Optimizer, values: Values) -> None:
    """Give every group its learning rate and weight decay of this step."""
    for group in optimizer.param_groups:
        rate = values.last_layer_learning_rate if group["last_layer"] else values.learning_rate
        if group["backbone"]:
            rate = values.backbone_learning_rate
        group["lr"] = rate * group["learning_rate_factor"]
        group["weight_decay"] = values.weight_decay * group["weight_decay_factor"]
