"""Each loss against the equation of its paper, written out in float64 from probabilities, entry by entry."""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hilum.core.config import from_dict, override, to_dict
from hilum.core.errors import ConfigError, UnknownNameError
from hilum.heads import losses
from hilum.heads.config import FitConfig
from hilum.heads.frequencies import Frequencies, count_labels
from hilum.heads.loss_settings import (
    AsymmetricSettings,
    ClassBalancedSettings,
    DistributionBalancedSettings,
    FocalSettings,
    LdamSettings,
    LogitAdjustedSettings,
    LossSettings,
    second_stage,
)
from hilum.heads.losses import LOSSES, Targets, adjust_logits, build_loss, known_targets
from hilum.heads.training import starting_bias

CODES = arrays(np.int8, (4, 3), elements=st.sampled_from([1, 0, -1, -2]))
LOGITS = arrays(np.float32, (4, 3), elements=st.floats(-30, 30, width=32))
POSITIVES, NEGATIVES = np.array([900.0, 40.0, 3.0]), np.array([100.0, 960.0, 497.0])
COUNTS = Frequencies(torch.tensor(POSITIVES).float(), torch.tensor(NEGATIVES).float())
BY_NAME = pytest.mark.parametrize("name", LOSSES)

Entry = Callable[[float, float, int, np.ndarray], tuple[float, float]]
"""(p, z, column, the row's known positives as labels) -> cost as a positive, cost as a negative."""


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def cross_entropy(p: float, z: float, c: int, row: np.ndarray) -> tuple[float, float]:
    return -math.log(p), -math.log(1 - p)


def asymmetric(gamma_negative: float, gamma_positive: float, margin: float, weighted: bool = False) -> Entry:
    def entry(p: float, z: float, c: int, row: np.ndarray) -> tuple[float, float]:
        shifted = max(p - margin, 0)
        positive = -((1 - p) ** gamma_positive) * math.log(p)
        negative = -(shifted**gamma_negative) * math.log(1 - shifted)
        prevalence = POSITIVES[c] / (POSITIVES[c] + NEGATIVES[c])
        weights = (math.exp(1 - prevalence), math.exp(prevalence)) if weighted else (1, 1)
        return weights[0] * positive, weights[1] * negative

    return entry


def focal(gamma: float, alpha: float | None) -> Entry:
    def entry(p: float, z: float, c: int, row: np.ndarray) -> tuple[float, float]:
        weights = (1, 1) if alpha is None else (alpha, 1 - alpha)
        return -weights[0] * (1 - p) ** gamma * math.log(p), -weights[1] * p**gamma * math.log(1 - p)

    return entry


def class_balanced(beta: float, over: str, gamma: float) -> Entry:
    def effective(n: float) -> float:
        return sum(beta**power for power in range(int(n)))  # E_n, Cui 2019, proposition 1, as its own series

    def entry(p: float, z: float, c: int, row: np.ndarray) -> tuple[float, float]:
        if over == "labels":
            weights = 1 / effective(POSITIVES[c]), 1 / effective(NEGATIVES[c])
            positive, negative = (2 * weight / sum(weights) for weight in weights)
        else:
            inverse = [1 / effective(n) for n in POSITIVES]
            positive = negative = inverse[c] * len(inverse) / sum(inverse)
        return -positive * (1 - p) ** gamma * math.log(p), -negative * p**gamma * math.log(1 - p)

    return entry


def distribution_balanced(alpha: float, beta: float, mu: float, scale: float, kappa: float, gamma: float) -> Entry:
    def entry(p: float, z: float, c: int, row: np.ndarray) -> tuple[float, float]:
        by_class = 1 / (3 * POSITIVES[c])
        by_instance = sum(y / n for y, n in zip(row, POSITIVES, strict=True)) / 3
        ratio = by_class / by_instance if by_instance else math.inf
        weight = alpha + (1 / (1 + math.exp(-beta * (ratio - mu))) if beta else 0.5)  # flat, at infinity too
        prior = POSITIVES[c] / (POSITIVES[c] + NEGATIVES[c])
        nu = kappa * math.log(1 / prior - 1)
        positive = sigmoid(z - nu)
        negative = sigmoid(scale * (z - nu))
        return (
            -weight * (1 - positive) ** gamma * math.log(positive),
            -weight / scale * negative**gamma * math.log(1 - negative),
        )

    return entry


def ldam(largest: float, scale: float, beta: float | None) -> Entry:
    """Softmax over two classes, of logits scale (z - margin) and 0 for a positive, 0 and -scale (z + ...) mirrored."""

    def entry(p: float, z: float, c: int, row: np.ndarray) -> tuple[float, float]:
        constant = largest * 3**0.25  # the rarest label has 3 images
        positive = math.exp(scale * (z - constant / POSITIVES[c] ** 0.25))
        negative = math.exp(scale * (-z - constant / NEGATIVES[c] ** 0.25))
        costs = -math.log(positive / (positive + 1)), -math.log(negative / (negative + 1))
        if beta is None:
            return costs
        weights = [(1 - beta) / (1 - beta**n) for n in (POSITIVES[c], NEGATIVES[c])]
        return costs[0] * 2 * weights[0] / sum(weights), costs[1] * 2 * weights[1] / sum(weights)

    return entry


def logit_adjusted(tau: float) -> Entry:
    """Softmax over two classes of logits z / 2 and -z / 2, each with tau times the log of its prior added."""

    def entry(p: float, z: float, c: int, row: np.ndarray) -> tuple[float, float]:
        prior = POSITIVES[c] / (POSITIVES[c] + NEGATIVES[c])
        present = math.exp(z / 2 + tau * math.log(prior))
        absent = math.exp(-z / 2 + tau * math.log(1 - prior))
        return -math.log(present / (present + absent)), -math.log(absent / (present + absent))

    return entry


CASES: list[tuple[LossSettings, Entry]] = [
    (LossSettings("masked_bce_sum"), cross_entropy),
    (LossSettings("asymmetric"), asymmetric(4, 0, 0.05)),
    (
        LossSettings("asymmetric", asymmetric=AsymmetricSettings(1.5, 0.5, 0.0, detach_focus=True)),
        asymmetric(1.5, 0.5, 0),
    ),
    (LossSettings("asymmetric", asymmetric=AsymmetricSettings(0, 2, 0.2)), asymmetric(0, 2, 0.2)),
    (LossSettings("weighted_asymmetric"), asymmetric(4, 1, 0.05, weighted=True)),
    (LossSettings("focal"), focal(2, 0.25)),
    (LossSettings("focal", focal=FocalSettings(0.5, None)), focal(0.5, None)),
    (LossSettings("class_balanced"), class_balanced(0.9999, "labels", 0)),
    (
        LossSettings("class_balanced", class_balanced=ClassBalancedSettings(0.99, "findings", 1.0)),
        class_balanced(0.99, "findings", 1),
    ),
    (LossSettings("distribution_balanced"), distribution_balanced(0.1, 10, 0.2, 2, 0.05, 0)),
    (
        LossSettings(
            "distribution_balanced", distribution_balanced=DistributionBalancedSettings(0.3, 4, 0.5, 5, 0.2, 2)
        ),
        distribution_balanced(0.3, 4, 0.5, 5, 0.2, 2),
    ),
    (
        LossSettings("distribution_balanced", distribution_balanced=DistributionBalancedSettings(beta=0)),
        distribution_balanced(0.1, 0, 0.2, 2, 0.05, 0),
    ),
    (LossSettings("ldam"), ldam(0.5, 1, None)),
    (LossSettings("ldam", ldam=LdamSettings(0.8, 3.0)), ldam(0.8, 3, None)),
    (second_stage(LossSettings("ldam")), ldam(0.5, 1, 0.9999)),
    (LossSettings("logit_adjusted"), logit_adjusted(1)),
    (LossSettings("logit_adjusted", logit_adjusted=LogitAdjustedSettings(0.5)), logit_adjusted(0.5)),
]
EVERY = pytest.mark.parametrize(("chosen", "entry"), CASES, ids=lambda value: getattr(value, "name", ""))


def batch(seed: int = 0, soft: bool = False, size: int = 6) -> tuple[np.ndarray, Targets]:
    """Logits and targets, some unknown, weighed if soft; a row without a positive, one without a known label."""
    rng = np.random.default_rng(seed)
    logits, codes = rng.normal(0, 3, (size, 3)), rng.choice([1, 0, -1, -2], (size, 3)).astype(np.int8)
    codes[0], codes[1] = [0, 0, -1], [-1, -1, -2]
    targets = known_targets(torch.from_numpy(codes))
    if soft:
        weights = targets.weights * torch.from_numpy(rng.uniform(0.2, 1.5, (size, 3))).float()
        targets = Targets(torch.from_numpy(rng.uniform(0, 1, (size, 3))).float(), weights)
    return logits, targets


def by_hand(entry: Entry, logits: np.ndarray, targets: Targets) -> tuple[float, float]:
    """Sum over known entries, and the sum of their weights."""
    values, weights = targets.values.double().numpy(), targets.weights.double().numpy()
    total = 0.0
    for row, column in np.ndindex(logits.shape):
        if weights[row, column] > 0:
            labels = np.where(weights[row] > 0, values[row], 0)
            z = float(logits[row, column])
            positive, negative = entry(sigmoid(z), z, column, labels)
            y = values[row, column]
            total += weights[row, column] * (y * positive + (1 - y) * negative)
    return total, weights.sum()


@EVERY
@pytest.mark.parametrize("soft", [False, True], ids=["codes", "soft"])
def test_a_loss_is_the_equation_of_its_paper(chosen: LossSettings, entry: Entry, soft: bool) -> None:
    """And nothing beside it: in RPIDIAL/CheXFound --focal-loss adds the asymmetric loss to cross-entropy (C12)."""
    for seed in range(3):
        logits, targets = batch(seed, soft)
        total, known = by_hand(entry, logits, targets)
        found = build_loss(chosen, COUNTS)(torch.from_numpy(logits), targets)
        assert float(found) == pytest.approx(total, rel=2e-6)
        single = build_loss(chosen, COUNTS)(torch.from_numpy(logits).float(), targets)
        assert single.dtype == torch.float32
        assert float(single) == pytest.approx(total, rel=1e-5)
        averaged = dataclasses.replace(chosen, reduction="mean")
        if chosen.name.startswith("masked_bce"):
            averaged = LossSettings("masked_bce_mean")
        assert float(build_loss(averaged, COUNTS)(torch.from_numpy(logits), targets)) == pytest.approx(
            total / known, rel=2e-6
        )


@EVERY
def test_gradients_are_finite_differences(chosen: LossSettings, entry: Entry) -> None:
    logits, targets = batch(5, soft=True)
    held = LossSettings("asymmetric", asymmetric=dataclasses.replace(chosen.asymmetric, detach_focus=False))
    loss = build_loss(held if chosen.asymmetric.detach_focus else chosen, COUNTS)
    values = torch.from_numpy(logits).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, targets), values, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_detached_focus_leaves_only_the_slope_of_the_logarithm() -> None:
    logits, targets = batch(2)
    values = torch.from_numpy(logits).requires_grad_()
    held = LossSettings("asymmetric", asymmetric=AsymmetricSettings(2, 1, 0.0, detach_focus=True))
    build_loss(held)(values, targets).backward()
    p, y = 1 / (1 + np.exp(-logits)), targets.values.numpy()
    slope = np.where(y == 1, (1 - p) * (p - 1), p**2 * p)
    assert np.allclose(values.grad.numpy(), np.where(targets.weights.numpy() > 0, slope, 0), rtol=1e-9)


@pytest.mark.parametrize("size", [1e2, 1e6])
@EVERY
def test_extreme_logits_have_finite_losses_and_slopes(chosen: LossSettings, entry: Entry, size: float) -> None:
    signs = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    logits = (size * signs).requires_grad_()
    codes = torch.tensor([[1, 1, 0], [0, 0, 1], [-1, -2, -1], [1, -1, 0]], dtype=torch.int8)
    loss = build_loss(chosen, COUNTS)(logits, known_targets(codes))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[codes < 0].any()
    right = (codes == 1) == (signs > 0)
    wrong_slopes = logits.grad[~right & (codes >= 0)]
    slope_stays = chosen.name in ("masked_bce_sum", "ldam", "class_balanced", "logit_adjusted")
    if slope_stays and chosen.class_balanced.gamma == 0:
        assert wrong_slopes.all()
    assert logits.grad[right & (codes >= 0)].abs().max() < 1e-6


@BY_NAME
@settings(max_examples=15, deadline=None)
@given(LOGITS, CODES)
def test_gradient_is_exactly_zero_where_unknown_or_uncertain(name: str, logits: np.ndarray, labels: np.ndarray) -> None:
    values = torch.from_numpy(logits).requires_grad_()
    build_loss(LossSettings(name), COUNTS)(values, known_targets(torch.from_numpy(labels))).backward()
    assert (values.grad.numpy()[labels < 0] == 0).all()
    decided = (labels >= 0) & (np.abs(logits) < 15)
    if "asymmetric" in name:  # negatives below the clip have none on purpose
        decided &= (labels == 1) | (logits > -2.9)
    assert (values.grad.numpy()[decided] != 0).all()


@BY_NAME
def test_an_unknown_entry_changes_nothing_for_the_others(name: str) -> None:
    logits, targets = batch(3)
    other = np.where(targets.weights.numpy() > 0, logits, 7.0)
    values = torch.where(targets.weights > 0, targets.values, 1.0)
    slopes = []
    for z, y in ((logits, targets.values), (other, values)):
        tensor = torch.from_numpy(z).requires_grad_()
        loss = build_loss(LossSettings(name), COUNTS)(tensor, Targets(y, targets.weights))
        loss.backward()
        slopes.append((loss.item(), tensor.grad))
    assert slopes[0][0] == slopes[1][0]
    assert torch.equal(slopes[0][1], slopes[1][1])


@BY_NAME
def test_a_batch_without_a_known_label_costs_nothing(name: str) -> None:
    labels = torch.full((2, 3), -1, dtype=torch.int8)
    for reduction in ("sum", "mean"):
        loss = build_loss(LossSettings(name, reduction), COUNTS)
        logits = torch.randn(2, 3).requires_grad_()
        cost = loss(logits, known_targets(labels))
        cost.backward()
        assert cost.item() == 0
        assert not logits.grad.any()


def test_labels_are_left_as_they_are() -> None:
    labels = torch.tensor([[1, 0, -1, -2]], dtype=torch.int8)
    known_targets(labels)
    assert labels.tolist() == [[1, 0, -1, -2]]


@BY_NAME
def test_a_non_finite_logit_of_a_known_entry_does_not_hide(name: str) -> None:
    labels = torch.tensor([[1, 0, 0]], dtype=torch.int8)
    logits = torch.tensor([[float("nan"), 0.0, 0.0]])
    assert not torch.isfinite(build_loss(LossSettings(name), COUNTS)(logits, known_targets(labels)))


@BY_NAME
def test_many_heads_see_the_same_targets(name: str) -> None:
    """Defect C1: a loop over heads overwrote the labels on its first turn (losses 1.386, then 2.773 for each head)."""
    labels = torch.tensor([[1, -1, 0], [-1, -2, 1]], dtype=torch.int8)
    targets = known_targets(labels)
    kept = [part.clone() for part in targets[:2]]
    loss = build_loss(LossSettings(name), COUNTS)
    heads = [torch.zeros(2, 3, requires_grad=True) for _ in range(4)]
    found = []
    for logits in heads:
        cost = loss(logits, targets)
        cost.backward()
        found.append(cost.item())
        assert not logits.grad[labels < 0].any()
        assert logits.grad[labels >= 0].all()
    assert len(set(found)) == 1
    if name == "masked_bce_sum":
        assert found[-1] == pytest.approx(3 * math.log(2))
    assert all(torch.equal(now, then) for now, then in zip(targets[:2], kept, strict=True))
    assert labels.tolist() == [[1, -1, 0], [-1, -2, 1]]


@BY_NAME
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_leading_axis_of_logits_is_as_many_losses(name: str, reduction: str) -> None:
    _, targets = batch(1, soft=True)
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (5, 6, 3))).float()
    loss = build_loss(LossSettings(name, reduction), COUNTS)
    together = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(0, None))(logits, targets)
    for number, one in enumerate(logits):
        slope, value = torch.func.grad_and_value(loss)(one, targets)
        assert torch.allclose(together[1][number], value, rtol=1e-6)
        assert torch.allclose(together[0][number], slope, rtol=1e-6, atol=1e-8)


@BY_NAME
def test_no_loss_touches_the_grad_mode(name: str) -> None:
    """Defect C12: the asymmetric loss of RPIDIAL/CheXFound switches gradients off and on for the whole process."""
    logits, targets = batch()
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            watched = torch.from_numpy(logits).requires_grad_()
            cost = build_loss(LossSettings(name), COUNTS)(watched, targets)
            assert torch.is_grad_enabled() is enabled
            assert cost.requires_grad is enabled
    assert "set_grad_enabled" not in inspect.getsource(losses)
    assert "no_grad" not in inspect.getsource(losses)


@BY_NAME
def test_bf16_logits_are_scored_in_float32(name: str) -> None:
    logits, targets = batch(4)
    low = torch.from_numpy(logits).bfloat16()
    loss = build_loss(LossSettings(name), COUNTS)
    assert torch.equal(loss(low, targets), loss(low.float(), targets))
    assert loss(low, targets).dtype == torch.float32


@BY_NAME
def test_findings_that_were_never_seen_do_not_break_a_loss(name: str) -> None:
    """No positive, no negative, and no known label at all."""
    counts = Frequencies(torch.tensor([0.0, 5.0, 0.0]), torch.tensor([7.0, 0.0, 0.0]))
    logits, targets = batch(6)
    values = torch.from_numpy(logits).float().requires_grad_()
    build_loss(LossSettings(name), counts)(values, targets).backward()
    assert torch.isfinite(values.grad).all()


def test_rare_findings_gain_and_common_ones_do_not() -> None:
    """What each loss is for: the slope of a missed positive, of the rarest finding over that of the commonest."""
    logits = torch.zeros(2, 3)
    codes = torch.tensor([[1, 0, 0], [0, 0, 1]], dtype=torch.int8)
    ratios = {}
    for name in LOSSES:
        values = logits.clone().requires_grad_()
        build_loss(LossSettings(name), COUNTS)(values, known_targets(codes)).backward()
        ratios[name] = float(values.grad[1, 2] / values.grad[0, 0])
    assert ratios["masked_bce_sum"] == ratios["asymmetric"] == ratios["focal"] == 1
    for name in ("weighted_asymmetric", "class_balanced", "ldam", "logit_adjusted", "distribution_balanced"):
        assert ratios[name] > 1.01, name


def test_post_hoc_adjustment_is_the_loss_read_backwards() -> None:
    """A head that cross-entropy has taken to the log-odds is what the adjusted loss would have taken to 0."""
    odds = COUNTS.log_odds.expand(4, 3)
    assert torch.allclose(adjust_logits(odds, COUNTS), torch.zeros(4, 3))
    logits = torch.randn(50, 3)
    moved = adjust_logits(logits, COUNTS, 0.7)
    assert torch.equal(moved.argsort(dim=0), logits.argsort(dim=0))
    prior = POSITIVES / (POSITIVES + NEGATIVES)
    expected = logits.double().numpy() - 0.7 * np.log(prior / (1 - prior))
    assert np.allclose(moved.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_counts_are_of_known_labels() -> None:
    labels = np.array([[1, 0], [1, -1], [0, -2], [-1, -2]], np.int8)
    counts = count_labels(labels)
    assert counts.positives.tolist() == [2, 0]
    assert counts.negatives.tolist() == [1, 1]
    assert counts.prevalence.tolist() == pytest.approx([2 / 3, 0])
    assert count_labels(np.full((2, 1), -1)).prevalence.tolist() == [0]
    assert counts.log_odds.tolist() == pytest.approx([math.log(2), 0])
    assert counts.to("cpu").positives.device.type == "cpu"


def test_names_and_ranges_are_checked() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'asymmetric'"):
        build_loss(LossSettings("asymetric"))
    for name in LOSSES:
        if name in ("masked_bce_sum", "masked_bce_mean", "asymmetric", "focal"):
            build_loss(LossSettings(name))
        else:
            with pytest.raises(ConfigError, match=f"'{name}' needs the frequencies"):
                build_loss(LossSettings(name))


@pytest.mark.parametrize(
    "make",
    [
        lambda: AsymmetricSettings(gamma_negative=0.5),
        lambda: AsymmetricSettings(gamma_positive=-1),
        lambda: AsymmetricSettings(clip=1.0),
        lambda: FocalSettings(gamma=float("nan")),
        lambda: FocalSettings(alpha=1.0),
        lambda: ClassBalancedSettings(beta=1.0),
        lambda: DistributionBalancedSettings(negative_scale=0),
        lambda: DistributionBalancedSettings(mu=-0.1),
        lambda: LdamSettings(scale=0),
        lambda: LdamSettings(max_margin=float("inf")),
        lambda: LogitAdjustedSettings(tau=-1),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        make()


def test_settings_are_read_from_text_and_kept_in_files() -> None:
    settings = override(LossSettings(), ["name=focal", "focal.gamma=1", "focal.alpha=null", "reduction=mean"])
    assert settings == LossSettings("focal", "mean", focal=FocalSettings(1.0, None))
    assert from_dict(LossSettings, to_dict(settings)) == settings
    with pytest.raises(ConfigError, match="of the loss 'ldam', found 'focal'"):
        second_stage(settings)
    first = LossSettings("ldam")
    assert second_stage(first).ldam.reweight
    assert not first.ldam.reweight


def minimiser(settings: LossSettings, posterior: float) -> float:
    """The probability that costs least where a finding is present with that probability; prevalence 1 % in training."""
    loss = build_loss(settings, Frequencies(torch.tensor([1000.0]), torch.tensor([99000.0])))
    logits = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    costs = [
        torch.func.vmap(lambda z, y=y: loss(z[None, None], Targets(torch.full((1, 1), y), torch.ones(1, 1))))(logits)
        for y in (1.0, 0.0)
    ]
    return logits[(posterior * costs[0] + (1 - posterior) * costs[1]).argmin()].sigmoid().item()


def test_what_a_loss_makes_of_probabilities_is_what_the_docs_say() -> None:
    text = (Path(__file__).parents[3] / "docs" / "explanation" / "long-tail.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`(, second stage)? ((?:\| 0\.\d+ ){4})\|$", text, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(LOSSES) - {"masked_bce_mean"}
    for name, stage, cells in rows:
        settings = second_stage(LossSettings(name)) if stage else LossSettings(name)
        found = [minimiser(settings, posterior) for posterior in (0.01, 0.05, 0.2, 0.5)]
        assert [float(cell) for cell in cells.strip("| ").split(" | ")] == pytest.approx(found, abs=6e-3), name
    balanced = 0.2 / 0.01 / (0.2 / 0.01 + 0.8 / 0.99)  # posterior under equal priors, Menon 2021
    assert minimiser(LossSettings("logit_adjusted"), 0.2) == pytest.approx(balanced, abs=1e-3)
    assert minimiser(LossSettings("masked_bce_sum"), 0.2) == pytest.approx(0.2, abs=1e-3)


def test_a_finding_without_a_positive_takes_no_weight_from_others() -> None:
    loss = ClassBalancedSettings(over="findings")
    present = losses.effective_weights(Frequencies(torch.tensor([900.0, 40.0]), torch.tensor([100.0, 960.0])), loss)
    counts = Frequencies(torch.tensor([900.0, 40.0, 0.0]), torch.tensor([100.0, 960.0, 1000.0]))
    torch.testing.assert_close(losses.effective_weights(counts, loss)[0][:2], present[0])
    torch.testing.assert_close(present[0].mean(), torch.tensor(1.0))
    nothing = Frequencies(torch.zeros(2), torch.full((2,), 9.0))
    assert torch.isfinite(losses.effective_weights(nothing, loss)[0]).all()


def test_a_bias_starts_where_the_loss_is_that_of_prevalences() -> None:
    """Whatever the loss adds to the logits: the first loss of a head of zeros is the entropy of the prevalences."""
    labels = np.zeros((1000, 2), np.int8)
    labels[:5, 0], labels[:300, 1] = 1, 1
    shares = np.array([0.005, 0.3])
    entropy = -(shares * np.log(shares) + (1 - shares) * np.log(1 - shares)).mean()
    for name, tau in (("masked_bce_mean", 1.0), ("logit_adjusted", 1.0), ("logit_adjusted", 0.5)):
        settings = LossSettings(reduction="mean", logit_adjusted=LogitAdjustedSettings(tau))
        config = FitConfig(prior_bias=True, loss=name, losses=settings)
        bias = starting_bias(config, labels)
        assert bias is not None
        loss = build_loss(config.describe_loss(), count_labels(labels))
        first = loss(bias.expand(1000, 2), known_targets(torch.from_numpy(labels)))
        assert float(first) == pytest.approx(entropy, rel=1e-3)
    assert starting_bias(FitConfig(), labels) is None
