"""What the name of a backbone's parameter says of how it learns: its layer's rate, and whether it decays.

Rules of facebookresearch/dinov2 utils/param_groups.py; pretraining and tuning share them.
"""

import re

_EMBEDDING = re.compile(r"pos_embed|patch_embed|mask_token|cls_token|register_tokens")
_BLOCK = re.compile(r"\bblocks\.(\d+)\.")


def layer_multiplier(name: str, depth: int, decay: float) -> float:
    """decay^(depth + 1 - layer): embeddings are layer 0, block i is layer i + 1, the rest (final norm) is depth + 1.

    Args:
        name: of a parameter inside the backbone.
        depth: number of blocks.
        decay: factor per layer; 1 treats all layers alike.
    """
    block = _BLOCK.search(name)
    layer = 0 if _EMBEDDING.search(name) else int(block[1]) + 1 if block else depth + 1
    return decay ** (depth + 1 - layer)


def takes_weight_decay(name: str) -> bool:
    """False for biases, norms and LayerScale; true for the rest: position table, tokens and prototypes included.

    A bias is known by the end of its name, as in `proj.bias`, `in_proj_bias` and `duplicate_pooling_bias`.
    """
    return not (name.endswith("bias") or "norm" in name or "gamma" in name)
