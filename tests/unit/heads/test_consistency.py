"""Agreement within studies and along the hierarchy, against sums written out study by study in float64."""

import math

import numpy as np
import pytest
import torch

from hilum.core.errors import ConfigError
from hilum.heads.consistency import consistency, with_consistency
from hilum.heads.hierarchy import hierarchy_pairs, hierarchy_penalty, raise_parents
from hilum.heads.loss_settings import LossSettings
from hilum.heads.losses import build_loss, known_targets

STUDY = torch.tensor([2, 0, 2, 1, 3, 3, 3])
KINDS = pytest.mark.parametrize("kind", ["squared", "jensen_shannon"])


def logits(seed: int = 0, *lead: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (*lead, 7, 3)))


def entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def by_hand(values: torch.Tensor, kind: str, counted: np.ndarray) -> tuple[float, int]:
    probabilities = 1 / (1 + np.exp(-values.numpy()))
    total, entries = 0.0, 0
    for study in range(4):
        for column in range(3):
            rows = [row for row in range(7) if STUDY[row] == study and counted[row, column]]
            if len(rows) < 2:
                continue
            inside = probabilities[rows, column]
            entries += len(rows)
            if kind == "squared":
                total += len(rows) * inside.var()
            else:  # Jensen-Shannon: entropy of the mean less mean of the entropies
                total += len(rows) * (entropy(inside.mean()) - np.mean([entropy(p) for p in inside]))
    return total, entries


@KINDS
def test_it_is_the_spread_within_studies(kind) -> None:
    everything = np.ones((7, 3), bool)
    total, entries = by_hand(logits(), kind, everything)
    assert entries == 15
    assert float(consistency(logits(), STUDY, kind=kind, reduction="sum")) == pytest.approx(total, rel=1e-9)
    assert float(consistency(logits(), STUDY, kind=kind)) == pytest.approx(total / entries, rel=1e-9)
    counted = np.random.default_rng(1).random((7, 3)) < 0.6
    total, entries = by_hand(logits(), kind, counted)
    weights = torch.from_numpy(counted * 0.3)
    values = logits().requires_grad_()
    found = consistency(values, STUDY, weights, kind)
    found.backward()
    assert found.item() == pytest.approx(total / entries, rel=1e-9)
    assert not values.grad[torch.from_numpy(~counted)].any()


@KINDS
def test_images_alone_cost_exactly_nothing(kind) -> None:
    values = logits().float().requires_grad_()
    alone = consistency(values, torch.tensor([3, 1, 0, 2, 6, 5, 4]), kind=kind)
    alone.backward()
    assert alone.item() == 0
    assert not values.grad.any()
    values = logits().float().requires_grad_()
    consistency(values, STUDY, kind=kind).backward()
    assert not values.grad[[1, 3]].any()
    assert values.grad[[0, 2, 4, 5, 6]].all()


@KINDS
def test_equal_images_agree(kind) -> None:
    same = torch.randn(4, 3)[[2, 0, 2, 1, 3, 3, 3]]
    assert consistency(same, STUDY, kind=kind) <= 1e-7


@KINDS
def test_the_slope_is_that_of_the_whole_term_although_the_mean_is_held(kind) -> None:
    assert torch.autograd.gradcheck(lambda z: consistency(z, STUDY, kind=kind), logits(3).requires_grad_(), rtol=1e-5)


@KINDS
def test_order_of_images_and_number_of_studies_do_not_matter(kind) -> None:
    turn = torch.tensor([6, 2, 0, 5, 3, 1, 4])
    renamed = torch.tensor([3, 0, 1, 2])[STUDY]
    before = consistency(logits(), STUDY, kind=kind)
    assert torch.allclose(consistency(logits()[turn], STUDY[turn], kind=kind), before, rtol=1e-12)
    assert torch.allclose(consistency(logits(), renamed, kind=kind), before, rtol=1e-12)


@KINDS
def test_another_study_does_not_change_the_slope_of_mine(kind) -> None:
    slopes = []
    for shift in (0.0, 5.0):
        values = logits()
        values[STUDY != 3] += shift * torch.arange(4)[:, None]
        values.requires_grad_()
        consistency(values, STUDY, kind=kind, reduction="sum").backward()
        slopes.append(values.grad[4:])
    assert torch.equal(*slopes)


@KINDS
@pytest.mark.parametrize("size", [50.0, 200.0, 1e4])
def test_extreme_logits_stay_finite(kind, size: float) -> None:
    values = (size * torch.tensor([[1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]])).requires_grad_()
    found = consistency(values, torch.tensor([0, 0, 0]), kind=kind)
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(values.grad).all()
    assert consistency(values.detach(), torch.tensor([0, 1, 0]), kind=kind) <= math.log(2)


@KINDS
def test_it_runs_over_a_leading_axis(kind) -> None:
    many = logits(0, 4)
    slopes, values = torch.func.vmap(torch.func.grad_and_value(lambda z: consistency(z, STUDY, kind=kind)))(many)
    for number, one in enumerate(many):
        slope, value = torch.func.grad_and_value(lambda z: consistency(z, STUDY, kind=kind))(one)
        assert torch.allclose(values[number], value, rtol=1e-12)
        assert torch.allclose(slopes[number], slope, rtol=1e-12)


def test_a_loss_with_it_is_the_sum_of_both() -> None:
    codes = torch.from_numpy(np.random.default_rng(0).choice([1, 0, -1, -2], (7, 3)).astype(np.int8))
    loss = build_loss(LossSettings("masked_bce_mean"))
    both = with_consistency(loss, 0.25, "jensen_shannon", "sum")
    targets = known_targets(codes, STUDY)
    term = consistency(logits(), STUDY, targets.weights, "jensen_shannon", "sum")
    assert torch.allclose(both(logits(), targets), loss(logits(), targets) + 0.25 * term)
    values = logits().requires_grad_()
    with_consistency(loss, 0.25)(values, targets).backward()
    assert not values.grad[codes < 0].any()
    with pytest.raises(ConfigError, match="no studies"):
        both(logits(), known_targets(codes))
    assert LossSettings("masked_bce_mean", "sum").reduced == "mean"
    assert LossSettings("masked_bce_sum", "mean").reduced == "sum"
    assert LossSettings("focal", "mean").reduced == "mean"


FINDINGS = ("Fracture", "Hydropneumothorax", "Pneumothorax", "Rib Fracture", "Pleural Effusion", "Nodule")


def test_pairs_are_those_of_the_hierarchy() -> None:
    named = {(FINDINGS[child], FINDINGS[parent]) for child, parent in hierarchy_pairs(FINDINGS)}
    assert named == {
        ("Rib Fracture", "Fracture"),
        ("Hydropneumothorax", "Pneumothorax"),
        ("Hydropneumothorax", "Pleural Effusion"),
    }
    assert hierarchy_pairs(("Nodule", "Rib Fracture")).shape == (0, 2)


def test_the_penalty_is_the_excess_of_children() -> None:
    values = torch.from_numpy(np.random.default_rng(2).normal(0, 2, (5, 6))).requires_grad_()
    pairs = torch.from_numpy(hierarchy_pairs(FINDINGS))
    p = 1 / (1 + np.exp(-values.detach().numpy()))
    excess = [max(0, p[row, child] - p[row, parent]) for row in range(5) for child, parent in ((3, 0), (1, 2), (1, 4))]
    found = hierarchy_penalty(values, pairs)
    found.backward()
    assert found.item() == pytest.approx(np.mean(excess), rel=1e-9)
    assert not values.grad[:, 5].any()
    assert hierarchy_penalty(values, torch.zeros(0, 2, dtype=torch.int64)) == 0
    lifted = torch.func.vmap(lambda z: hierarchy_penalty(z, pairs))(values.detach().expand(3, 5, 6))
    assert torch.allclose(lifted, found.detach().expand(3))


def test_parents_are_raised_to_their_children_and_no_more() -> None:
    probabilities = np.random.default_rng(3).random((20, 6))
    probabilities[0, 3], probabilities[1, 0] = np.nan, np.nan
    kept = probabilities.copy()
    raised = raise_parents(probabilities, FINDINGS)
    assert np.array_equal(probabilities, kept, equal_nan=True)
    assert (raised[2:, 0] >= raised[2:, 3]).all()
    assert np.array_equal(raised[:, 2], np.maximum(kept[:, 2], kept[:, 1]))
    assert np.array_equal(raised[:, 4], np.maximum(kept[:, 4], kept[:, 1]))
    assert np.array_equal(raised[:, [1, 3, 5]], kept[:, [1, 3, 5]], equal_nan=True)
    assert raised[0, 0] == kept[0, 0]
    assert np.isnan(raised[1, 0])


@pytest.mark.gpu
@KINDS
def test_agreement_on_a_gpu_is_that_on_a_cpu(kind) -> None:
    values = logits().float()
    assert torch.allclose(
        consistency(values.cuda(), STUDY.cuda(), kind=kind).cpu(), consistency(values, STUDY, kind=kind), rtol=1e-5
    )
