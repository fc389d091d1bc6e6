import math

import numpy as np
import pytest
import torch

from hilum.core.errors import ConfigError, NonFiniteLossError
from hilum.heads.candidates import grid
from hilum.heads.frequencies import Frequencies
from hilum.heads.loss_settings import LossSettings
from hilum.heads.losses import LOSSES, build_loss
from hilum.heads.registry import HeadConfig
from hilum.heads.sweep import SLIDES_RATES, Sweep, cosine

LINEAR = HeadConfig("linear", embed_dim=6, findings=4, blocks=2, patch_mean=True)
DECODER = HeadConfig("ml_decoder", 6, 4, 2, decoder_dim=8, decoder_feed_forward=12, decoder_heads=2)
BOTH = pytest.mark.parametrize("config", [LINEAR, DECODER], ids=["linear", "ml_decoder"])
RATES = (1e-4, 1e-3, 1e-2)


def random_labels(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).choice([1, 0, -1, -2], (batch, 4)).astype(np.int8))


def state(sweep: Sweep, rate: float) -> dict[str, torch.Tensor]:
    return sweep.state(sweep.rates.index(rate))


def weights(sweep: Sweep, rate: float) -> torch.Tensor:
    return torch.cat([value.flatten() for value in state(sweep, rate).values()])


@BOTH
def test_higher_rates_move_further(make_features, config: HeadConfig) -> None:
    sweep = Sweep(grid([config], RATES), 5, seed=3)
    start = weights(sweep, RATES[0])
    for step in range(5):
        sweep.step(make_features(8, seed=step), random_labels(8, step))
    moved = [(weights(sweep, rate) - start).norm() for rate in RATES]
    assert 0 < moved[0] < moved[1] < moved[2]


@BOTH
@pytest.mark.parametrize("way", ["together", "in turn"])
@pytest.mark.parametrize("loss", LOSSES)
def test_unknown_entries_have_zero_gradient_in_every_head(make_features, config: HeadConfig, loss: str, way) -> None:
    """Defect C1: only the first head of the sweep masked unknown labels; the others learned them as negatives."""
    features = make_features(6)
    labels = random_labels(6)
    labels[:, 2] = torch.tensor([-1, -2, -1, -1, -2, -2], dtype=torch.int8)
    counts = Frequencies(torch.tensor([9.0, 2.0, 30.0, 50.0]), torch.tensor([91.0, 98.0, 40.0, 50.0]))
    built = build_loss(LossSettings(loss), counts)
    sweep = Sweep(grid([config], RATES), 4, loss=built, weight_decay=0.0, seed=0, way=way)
    before = {rate: state(sweep, rate) for rate in RATES}
    kept = labels.clone()
    for _ in range(3):
        sweep.step(features, labels)
    assert torch.equal(labels, kept)
    name = "linear.weight" if config.name == "linear" else "decoder.duplicate_pooling"
    for rate in RATES:
        after = state(sweep, rate)
        assert torch.equal(after[name][2], before[rate][name][2])
        assert not torch.equal(after[name][1], before[rate][name][1])


@BOTH
def test_an_unknown_entry_trains_no_shared_weight_either(make_features, config: HeadConfig) -> None:
    features = make_features(6)
    labels = torch.full((6, 4), -1, dtype=torch.int8)
    sweep = Sweep(grid([config], RATES), 4, weight_decay=0.0, seed=0)
    before = [weights(sweep, rate) for rate in RATES]
    assert not sweep.step(features, labels).any()
    assert all(torch.equal(weights(sweep, rate), old) for rate, old in zip(RATES, before, strict=True))


def test_linear_sweep_equals_adamw_written_out(make_features) -> None:
    rate, decay, total = 1e-2, 1e-4, 6
    sweep = Sweep(grid([LINEAR], (1e-3, rate)), total, weight_decay=decay, seed=1)
    weight = state(sweep, rate)["linear.weight"].double().numpy()
    bias = state(sweep, rate)["linear.bias"].double().numpy()
    first = [np.zeros_like(weight), np.zeros_like(bias)]
    second = [np.zeros_like(weight), np.zeros_like(bias)]
    for step in range(4):
        features, labels = make_features(5, seed=step), random_labels(5, step)
        sweep.step(features, labels)
        inputs = torch.cat([features.cls, features.patch_mean], dim=1).double().numpy()
        codes = labels.numpy()
        logits = inputs @ weight.T + bias
        error = np.where(codes >= 0, 1 / (1 + np.exp(-logits)) - np.maximum(codes, 0), 0.0)
        now = rate * 0.5 * (1 + math.cos(math.pi * step / total))
        for place, (values, gradient) in enumerate([(weight, error.T @ inputs), (bias, error.sum(axis=0))]):
            first[place] = 0.9 * first[place] + 0.1 * gradient
            second[place] = 0.999 * second[place] + 0.001 * gradient**2
            values *= 1 - now * decay
            values -= (
                now * (first[place] / (1 - 0.9 ** (step + 1)))
                / (np.sqrt(second[place] / (1 - 0.999 ** (step + 1))) + 1e-8)
            )  # fmt: skip
    np.testing.assert_allclose(state(sweep, rate)["linear.weight"].numpy(), weight, atol=2e-6)
    np.testing.assert_allclose(state(sweep, rate)["linear.bias"].numpy(), bias, atol=2e-6)


def test_heads_start_from_the_seed_and_global_generators_do_not_matter() -> None:
    torch.manual_seed(1)
    first = Sweep(grid([DECODER], RATES), 3, seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = Sweep(grid([DECODER], RATES), 3, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    reference = weights(first, RATES[0])
    assert all(torch.equal(weights(sweep, rate), reference) for sweep in (first, second) for rate in RATES)
    assert not torch.equal(weights(Sweep(grid([DECODER], RATES), 3, seed=6), RATES[0]), reference)


def test_a_warm_start_takes_the_given_weights() -> None:
    initial = Sweep(grid([LINEAR], RATES), 3, seed=5).state(0)
    warm = Sweep(grid([LINEAR], (1e-3,)), 3, seed=9, phase="refit", initial=initial)
    assert all(torch.equal(value, initial[name]) for name, value in state(warm, 1e-3).items())


@BOTH
def test_a_non_finite_loss_raises_and_moves_no_head(make_features, config: HeadConfig) -> None:
    sweep = Sweep(grid([config], RATES), 4, seed=0)
    features, labels = make_features(6), random_labels(6)
    sweep.step(features, labels)
    before = [weights(sweep, rate) for rate in RATES]
    broken = features._replace(cls=features.cls.clone(), patches=features.patches.clone())
    broken.cls[3, 1] = broken.patches[3, 1, 1] = float("nan")
    labels[3] = 1
    with pytest.raises(NonFiniteLossError, match=r"Step 1: .*No weight has moved"):
        sweep.step(broken, labels)
    assert all(torch.equal(weights(sweep, rate), old) for rate, old in zip(RATES, before, strict=True))


def test_logits_do_not_depend_on_training_mode_or_pass(make_features) -> None:
    sweep = Sweep(grid([DECODER], RATES), 4, seed=0)
    features = make_features(6)
    first = sweep.logits(features)
    assert first.shape == (3, 6, 4)
    assert torch.equal(first, sweep.logits(features))


def test_bf16_trains_and_returns_float32(make_features) -> None:
    exact, rounded = (Sweep(grid([DECODER], (1e-2,)), 4, seed=0, precision=precision) for precision in ("fp32", "bf16"))
    features, labels = make_features(6), random_labels(6)
    losses = [sweep.step(features, labels)[0] for sweep in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    logits = rounded.logits(features)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, exact.logits(features), atol=0.1)


def test_cosine_goes_from_one_to_zero() -> None:
    assert cosine(0, 10) == 1
    assert cosine(5, 10) == pytest.approx(0.5)
    assert cosine(10, 10) == pytest.approx(0, abs=1e-16)
    assert cosine(12, 10) == pytest.approx(0, abs=1e-16)


def test_the_nine_rates_are_those_of_the_slides() -> None:
    assert SLIDES_RATES == (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)


@pytest.mark.parametrize("rates", [(), (1e-3, 1e-3), (0.0, 1e-3)])
def test_impossible_rates_are_refused(rates) -> None:
    with pytest.raises(ConfigError):
        Sweep(grid([LINEAR], rates), 3)
