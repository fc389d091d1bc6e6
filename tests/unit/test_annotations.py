"""Annotations are checked while the tests run (tests/conftest.py): what they say of shapes and types is true."""

import jaxtyping
import numpy as np
import pytest
import torch

from hilum.core.tracking import duration
from hilum.data.transforms import evaluation_crop
from hilum.evaluation.metrics import average_precision
from hilum.heads.losses import known_targets, masked_bce_sum
from hilum.heads.sweep import prior_log_odds
from hilum.pretraining.losses import koleo_loss

LABELS = np.array([[1], [0], [1]], np.int8)


@pytest.mark.parametrize(
    ("call", "parameter"),
    [
        (lambda: average_precision(np.full((3, 1), 0.5), LABELS), "scores"),
        (lambda: average_precision(np.full(3, 0.5), LABELS[:2, 0]), "labels"),
        (lambda: masked_bce_sum(torch.zeros(3), known_targets(torch.zeros(3, 2, dtype=torch.int8))), "logits"),
        (lambda: prior_log_odds(np.zeros((2, 2))), "labels"),
        (lambda: koleo_loss(torch.ones(2, 3, 4)), "tokens"),
        (lambda: evaluation_crop(np.zeros((8, 8, 3), np.uint8), 4), "pixels"),
        (lambda: evaluation_crop(np.zeros((8, 8)), 4), "pixels"),
        (lambda: duration("8"), "seconds"),
    ],
    ids=[
        "rank",
        "length",
        "rank of a tensor",
        "dtype of a count",
        "rank of another layer",
        "rank of an image",
        "dtype",
        "type",
    ],
)
def test_what_an_annotation_forbids_is_an_error(call, parameter) -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match=f"parameter '{parameter}'"):
        call()


@pytest.mark.usefixtures("unchecked")
def test_without_the_check_a_wrong_rank_passes_silently() -> None:
    assert average_precision(np.full((3, 1), 0.5), LABELS) is not None
