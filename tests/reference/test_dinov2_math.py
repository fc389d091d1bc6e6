"""The losses, targets and schedules of DINOv2 against float64 versions written from the formulas, loop by loop."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hilum.core.errors import ConfigError
from hilum.pretraining import losses
from hilum.pretraining.projection import DINOHead, Projection
from hilum.pretraining.schedules import Schedules, cosine


def naive_sinkhorn(logits: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """Q is K x B as in the paper: total mass 1, rows to 1/K, columns to 1/B, repeated; columns end at 1."""
    q = np.exp(logits.astype(np.float64).T / temperature)
    prototypes, samples = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True) * prototypes
        q /= q.sum(axis=0, keepdims=True) * samples
    return (q * samples).T


def naive_cross_entropy(student: np.ndarray, target: np.ndarray, temperature: float) -> float:
    """Mean over rows of -sum_k t log softmax(s / T)."""
    total = 0.0
    for row, wanted in zip(student / temperature, target, strict=True):
        log_probability = row - (row.max() + math.log(np.exp(row - row.max()).sum()))
        total -= float((wanted * log_probability).sum())
    return total / len(student)


def random_projection(generator: np.random.Generator, rows: int, prototypes: int, dim: int = 8) -> Projection:
    features = F.normalize(torch.from_numpy(generator.normal(size=(rows, dim))), dim=-1)
    return Projection(features, F.normalize(torch.from_numpy(generator.normal(size=(prototypes, dim))), dim=-1))


@pytest.mark.parametrize(("rows", "prototypes", "temperature"), [(6, 10, 0.04), (40, 32, 0.07), (3, 500, 0.04)])
@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_is_the_naive_algorithm(rows: int, prototypes: int, temperature: float, iterations: int) -> None:
    logits = np.random.default_rng(rows).uniform(-1, 1, size=(rows, prototypes))
    expected = naive_sinkhorn(logits, temperature, iterations)
    double = losses.sinkhorn_targets(torch.from_numpy(logits), temperature, iterations)
    np.testing.assert_allclose(double.numpy(), expected, rtol=1e-10, atol=1e-14)
    single = losses.sinkhorn_targets(torch.from_numpy(logits).float(), temperature, iterations)
    np.testing.assert_allclose(single.numpy(), expected, rtol=2e-4, atol=2e-7)


def test_sinkhorn_rows_sum_to_one_and_prototypes_are_used_alike() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(256, 16)) * 0.2)
    logits[:, 0] += 1.0  # softmax would put nearly everything on prototype 0
    targets = losses.sinkhorn_targets(logits, 0.07)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(256, dtype=torch.float64))
    mass = targets.mean(dim=0) * 16
    assert mass.min() > 0.9
    assert mass.max() < 1.1
    assert torch.softmax(logits / 0.07, dim=1).mean(dim=0)[0] > 0.9


def test_sinkhorn_survives_logits_whose_exponentials_overflow() -> None:
    logits = torch.tensor([[8.0, -8.0, 0.0], [-8.0, 8.0, 0.5], [2.0, 2.5, 3.0], [-30.0, -31.0, -29.5]])
    targets = losses.sinkhorn_targets(logits, 0.04)  # exp(200) is infinite in float32, exp(-750) is 0
    assert torch.isfinite(targets).all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))


@pytest.mark.parametrize("chunk", [0, 2, 3])
@pytest.mark.parametrize(("views", "local_crops", "images"), [(2, 8, 3), (2, 0, 2), (3, 4, 2)])
def test_dino_loss_pairs_every_view_with_every_other(views: int, local_crops: int, images: int, chunk: int) -> None:
    generator = np.random.default_rng(views + local_crops)
    student = random_projection(generator, (views + local_crops) * images, 12)
    targets = torch.softmax(torch.from_numpy(generator.normal(size=(views, images, 12))), dim=-1)
    logits = student.logits().numpy().reshape(views + local_crops, images, 12)
    pairs = {
        (teacher, crop): naive_cross_entropy(logits[crop], targets[teacher].numpy(), 0.1)
        for teacher in range(views)
        for crop in range(views + local_crops)
        if crop != teacher
    }
    expected_global = sum(loss for (_, crop), loss in pairs.items() if crop < views) / len(pairs)
    expected_local = sum(loss for (_, crop), loss in pairs.items() if crop >= views) / len(pairs)
    local_loss, global_loss = losses.dino_losses(student, targets, 0.1, chunk)
    assert float(local_loss) == pytest.approx(expected_local, rel=1e-12)
    assert float(global_loss) == pytest.approx(expected_global, rel=1e-12)


def test_initial_values_for_uniform_predictions() -> None:
    prototypes, images, tokens = 1024, 4, 6
    flat = Projection(torch.zeros(10 * images, 5), torch.ones(prototypes, 5))
    uniform = torch.full((2, images, prototypes), 1 / prototypes)
    local_loss, global_loss = losses.dino_losses(flat, uniform)
    assert float(local_loss) == pytest.approx(16 / 18 * math.log(prototypes), rel=1e-5)
    assert float(global_loss) == pytest.approx(2 / 18 * math.log(prototypes), rel=1e-5)
    masked_crops = images  # half of the 2B global crops
    masked = Projection(torch.zeros(masked_crops * tokens, 5), torch.ones(prototypes, 5))
    targets = torch.full((masked_crops * tokens, prototypes), 1 / prototypes)
    weights = torch.full((masked_crops * tokens,), 1 / tokens)
    patch_loss = losses.ibot_loss(masked, targets, weights, 2 * images)
    assert float(patch_loss) == pytest.approx(math.log(prototypes) / 2, rel=1e-5)


@pytest.mark.parametrize("chunk", [0, 4])
def test_ibot_loss_averages_within_a_crop_then_over_all_crops(chunk: int) -> None:
    generator = np.random.default_rng(3)
    counts = [0, 5, 1, 0]  # masked tokens of each of the 2B crops
    student = random_projection(generator, sum(counts), 9)
    targets = torch.softmax(torch.from_numpy(generator.normal(size=(sum(counts), 9))), dim=-1)
    weights = torch.tensor([1 / count for count in counts for _ in range(count)], dtype=torch.float64)
    logits = student.logits().numpy()
    expected, start = 0.0, 0
    for count in counts:
        if count:
            rows = slice(start, start + count)
            expected += naive_cross_entropy(logits[rows], targets[rows].numpy(), 0.1)
        start += count
    loss = losses.ibot_loss(student, targets, weights, len(counts), 0.1, chunk)
    assert float(loss) == pytest.approx(expected / len(counts), rel=1e-12)


def test_cross_entropy_is_torch_cross_entropy_for_soft_labels() -> None:
    generator = np.random.default_rng(5)
    logits = torch.from_numpy(generator.normal(size=(7, 11))).requires_grad_()
    targets = torch.softmax(torch.from_numpy(generator.normal(size=(7, 11))), dim=-1)
    ours = losses.cross_entropy_rows(logits, targets, 0.1)
    theirs = F.cross_entropy(logits / 0.1, targets, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    [gradient] = torch.autograd.grad(ours.sum(), logits)
    expected = (torch.softmax(logits / 0.1, dim=-1) - targets) / 0.1
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-10, atol=1e-12)


def test_chunks_change_neither_loss_nor_gradient() -> None:
    generator = np.random.default_rng(6)
    targets = torch.softmax(torch.from_numpy(generator.normal(size=(23, 14))), dim=-1)
    weights = torch.from_numpy(generator.uniform(size=23))
    found = []
    for chunk in (0, 5, 100):
        base = random_projection(np.random.default_rng(7), 23, 14)
        student = Projection(base.features.requires_grad_(), base.prototypes.requires_grad_())
        loss = losses.ibot_loss(student, targets, weights, 8, 0.1, chunk)
        found.append([loss, *torch.autograd.grad(loss, [student.features, student.prototypes])])
    for other in found[1:]:
        for left, right in zip(found[0], other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_koleo_is_minus_mean_log_nearest_distance() -> None:
    points = np.random.default_rng(8).normal(size=(9, 4))
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    nearest = [min(np.linalg.norm(unit[i] - unit[j]) for j in range(9) if j != i) for i in range(9)]
    loss, distance = losses.koleo_loss(torch.from_numpy(points))
    assert float(loss) == pytest.approx(-np.mean(np.log(nearest)), abs=1e-6)
    assert float(distance) == pytest.approx(np.mean(nearest), abs=1e-6)


@pytest.mark.parametrize("group", [2, 3, 4, 6, 12])
def test_koleo_in_groups_is_the_mean_of_its_groups(group: int) -> None:
    points = torch.from_numpy(np.random.default_rng(group).normal(size=(12, 4))).requires_grad_()
    parts = [losses.koleo_loss(part) for part in points.split(group)]
    loss, distance = losses.koleo_loss(points, group)
    torch.testing.assert_close(loss, torch.stack([part for part, _ in parts]).mean())
    torch.testing.assert_close(distance, torch.stack([part for _, part in parts]).mean())
    expected = torch.autograd.grad(torch.stack([part for part, _ in parts]).mean(), points)
    torch.testing.assert_close(torch.autograd.grad(loss, points), expected)


def test_koleo_refuses_images_that_do_not_divide_into_groups() -> None:
    with pytest.raises(ConfigError, match=r"koleo_group=5.*12 images"):
        losses.koleo_loss(torch.ones(12, 4), 5)


def test_koleo_without_a_neighbour_is_zero_and_twins_stay_finite() -> None:
    alone = torch.ones(1, 4, requires_grad=True)
    loss, distance = losses.koleo_loss(alone)
    loss.backward()
    assert loss.item() == 0.0
    assert distance.item() == 0.0
    assert torch.equal(alone.grad, torch.zeros(1, 4))
    twins = torch.ones(3, 4, requires_grad=True)
    loss, _ = losses.koleo_loss(twins)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(twins.grad).all()


def test_centring_is_softmax_around_a_moving_mean() -> None:
    generator = np.random.default_rng(9)
    centre = np.zeros(6)
    ours, identity = torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    for _ in range(4):
        logits = generator.normal(size=(5, 6))
        expected = np.exp((logits - centre) / 0.05)
        expected /= expected.sum(axis=1, keepdims=True)
        found = losses.centred_targets(torch.from_numpy(logits), ours, 0.05)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
        centre = 0.9 * centre + 0.1 * logits.mean(axis=0)
        ours = losses.moved_centre(ours, Projection(torch.from_numpy(logits), identity), 0.9)
        np.testing.assert_allclose(ours.numpy(), centre, rtol=1e-12)
    assert torch.equal(losses.moved_centre(ours, Projection(torch.zeros(0, 6, dtype=torch.float64), identity)), ours)


def test_no_masked_patch_gives_zero_loss_and_zero_gradient() -> None:
    head = DINOHead(4, 10, 8, 3)
    targets = losses.sinkhorn_targets(torch.zeros(0, 10), 0.04)
    assert targets.shape == (0, 10)
    loss = losses.ibot_loss(head(torch.zeros(0, 4)), targets, torch.zeros(0), 4)
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in head.parameters())


def test_projection_head_is_torch_weight_norm() -> None:
    head = DINOHead(6, 12, 16, 5).double()
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2)
    names = set(head.state_dict())
    assert {"mlp.0.weight", "mlp.2.bias", "mlp.4.weight", "last_layer.weight_g", "last_layer.weight_v"} <= names
    assert head.state_dict()["last_layer.weight_g"].shape == (12, 1)
    oracle = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, 12, bias=False).double())
    with torch.no_grad():
        oracle.parametrizations.weight.original0.copy_(head.last_layer.weight_g)
        oracle.parametrizations.weight.original1.copy_(head.last_layer.weight_v)
    tokens = torch.from_numpy(np.random.default_rng(1).normal(size=(4, 6)))
    inner = tokens
    for index in (0, 2, 4):
        inner = inner @ head.mlp[index].weight.T + head.mlp[index].bias
        if index < 4:
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    expected = oracle(inner / inner.norm(dim=1, keepdim=True))
    torch.testing.assert_close(head(tokens).logits(), expected, rtol=1e-10, atol=1e-12)


def test_head_parameter_counts_of_the_released_model() -> None:
    with torch.device("meta"):
        dino, ibot = DINOHead(1024, 131072, 2048, 384), DINOHead(1024, 131072, 2048, 256)
    assert sum(parameter.numel() for parameter in dino.parameters()) == 57_545_088
    assert sum(parameter.numel() for parameter in ibot.parameters()) == 40_505_600


def test_schedules_of_the_published_run() -> None:
    run = Schedules(steps=250_000, learning_rate=2e-4)
    assert run.at(0).learning_rate == 0.0
    assert run.at(25_000).learning_rate == pytest.approx(2e-4)
    assert run.at(249_999).learning_rate == pytest.approx(1e-6, rel=1e-4)
    assert run.at(250_000).learning_rate == 1e-6
    middle = 25_000 + 225_000 // 2
    assert run.at(middle).learning_rate == pytest.approx((2e-4 + 1e-6) / 2)
    assert run.at(2_499).last_layer_learning_rate == 0.0
    assert run.at(2_500).last_layer_learning_rate == run.at(2_500).learning_rate > 0
    assert (run.at(0).momentum, run.at(250_000).momentum) == pytest.approx((0.994, 1.0))
    assert (run.at(0).weight_decay, run.at(250_000).weight_decay) == pytest.approx((0.04, 0.2))
    assert run.at(0).teacher_temperature == 0.04
    assert run.at(74_999).teacher_temperature == pytest.approx(0.07)
    assert run.at(75_000).teacher_temperature == 0.07
    assert run.at(37_500).teacher_temperature == pytest.approx(0.055, abs=1e-6)


def test_schedules_are_the_published_tables() -> None:
    """DINOv2 builds a table: linspace to the base value, then a half cosine over what is left."""
    total, warmup, base, final = 200, 20, 3e-4, 1e-6
    steps = np.arange(total - warmup)
    table = np.concatenate([
        np.linspace(0, base, warmup), final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / len(steps))),
    ])  # fmt: skip
    np.testing.assert_allclose([cosine(step, total, base, final, warmup) for step in range(total)], table, rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 40])
def test_a_short_run_compresses_every_schedule(steps: int) -> None:
    run = Schedules(steps=steps, learning_rate=1e-3)
    values = [run.at(step) for step in range(steps)]
    assert all(math.isfinite(number) for value in values for number in value)
    assert max(value.learning_rate for value in values) <= 1e-3
    assert values[-1].teacher_temperature == 0.07 or steps == 1
    assert all(0.994 <= value.momentum <= 1 for value in values)
