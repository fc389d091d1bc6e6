import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hilum.heads.losses import LOSSES, known_targets

CODES = arrays(np.int8, (4, 3), elements=st.sampled_from([1, 0, -1, -2]))
LOGITS = arrays(np.float32, (4, 3), elements=st.floats(-30, 30, width=32))


def by_hand(logits: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
    """The sum in float64, entry by entry: softplus(z) - y z where y is known."""
    total, known = 0.0, 0
    for z, y in zip(logits.astype(np.float64).ravel(), labels.ravel(), strict=True):
        if y in (0, 1):
            total += np.logaddexp(0, z) - y * z
            known += 1
    return total, known


@given(LOGITS, CODES)
def test_sum_and_mean_are_those_of_the_known_entries(logits: np.ndarray, labels: np.ndarray) -> None:
    total, known = by_hand(logits, labels)
    targets = known_targets(torch.from_numpy(labels))
    assert float(LOSSES["masked_bce_sum"](torch.from_numpy(logits), targets)) == pytest.approx(
        total, rel=1e-5, abs=1e-5
    )
    mean = float(LOSSES["masked_bce_mean"](torch.from_numpy(logits), targets))
    assert mean == pytest.approx(total / max(known, 1), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@given(LOGITS, CODES)
def test_gradient_is_exactly_zero_where_unknown_or_uncertain(name: str, logits: np.ndarray, labels: np.ndarray) -> None:
    values = torch.from_numpy(logits).requires_grad_()
    LOSSES[name](values, known_targets(torch.from_numpy(labels))).backward()
    assert (values.grad.numpy()[labels < 0] == 0).all()
    decided = (labels >= 0) & (np.abs(logits) < 15)
    assert (values.grad.numpy()[decided] != 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_a_known_label_costs_nothing(name: str) -> None:
    labels = torch.full((2, 3), -1, dtype=torch.int8)
    assert float(LOSSES[name](torch.randn(2, 3), known_targets(labels))) == 0


def test_labels_are_left_as_they_are() -> None:
    labels = torch.tensor([[1, 0, -1, -2]], dtype=torch.int8)
    known_targets(labels)
    assert labels.tolist() == [[1, 0, -1, -2]]


@pytest.mark.parametrize("name", LOSSES)
def test_a_non_finite_logit_of_an_unknown_entry_does_not_hide(name: str) -> None:
    labels = torch.tensor([[1, 0]], dtype=torch.int8)
    assert not torch.isfinite(LOSSES[name](torch.tensor([[float("nan"), 0.0]]), known_targets(labels)))
