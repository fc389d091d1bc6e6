"""Findings that imply others (`data.labels.IMPLIES`), for predictions: a penalty in training, or a maximum afterwards.

Labels are filled along the same hierarchy by `data.label_maps.apply_hierarchy`. In text-mined labels children without
their parents are common (`hilum audit` counts them), so none of this is on by default.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hilum.data.labels import IMPLIES


def hierarchy_pairs(findings: Sequence[str]) -> Int64[np.ndarray, "P 2"]:
    """Columns (child, parent) of every pair of which both are among the findings."""
    place = {name: column for column, name in enumerate(findings)}
    pairs = [
        (place[child], place[parent])
        for child, parents in IMPLIES.items()
        for parent in parents
        if child in place and parent in place
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def hierarchy_penalty(logits: Float[Tensor, "B C"], pairs: Int64[Tensor, "P 2"]) -> Float[Tensor, ""]:
    """By how much children are more probable than their parents: mean over images and pairs of max(0, p_c - p_p).

    It needs no labels, and so also moves findings that are unknown. 0 without pairs.
    """
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    excess = (probabilities[:, pairs[:, 0]] - probabilities[:, pairs[:, 1]]).clamp(min=0)
    return excess.sum() / max(excess.numel(), 1)


def raise_parents(probabilities: Float[np.ndarray, "N C"], findings: Sequence[str]) -> Float[np.ndarray, "N C"]:
    """Every parent at least as probable as the most probable of its children; a new array.

    Args:
        probabilities: in [0, 1]; NaN where a finding was never trained, which stays so and raises nobody.
        findings: names of the columns.
    """
    raised = probabilities.copy()
    pairs = hierarchy_pairs(findings)
    for _ in range(len(pairs)):  # once for each level that a hierarchy of so many pairs can have
        for child, parent in pairs:
            known = ~np.isnan(raised[:, parent])
            raised[known, parent] = np.fmax(raised[known, parent], raised[known, child])
    return raised
