import numpy as np
import pytest
import torch

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.seeding import forked
from hilum.heads.decoupling import classifier_parameters
from hilum.heads.loss_settings import LossSettings
from hilum.heads.losses import build_loss, known_targets
from hilum.heads.registry import HeadConfig, build_head
from hilum.heads.sources import SourceBiased, parse_source_weights, plain_state, weigh_sources
from hilum.heads.sweep import Sweep

LINEAR = HeadConfig("linear", embed_dim=6, findings=4, blocks=2)
DECODER = HeadConfig("ml_decoder", 6, 4, 2, decoder_dim=8, decoder_feed_forward=12, decoder_heads=2)
BOTH = pytest.mark.parametrize("config", [LINEAR, DECODER], ids=["linear", "ml_decoder"])
SOURCE = torch.tensor([0, 1, 2, 1, 0])
LABELS = torch.tensor([[1, 0, -1, 0], [0, -1, 1, 0], [1, 1, -1, -1], [0, 0, 1, -1], [-1, 0, -2, 1]], dtype=torch.int8)


def wrapped(config: HeadConfig, sources: int = 3) -> SourceBiased:
    with forked(0, "test"):
        head = build_head(config)
    return SourceBiased(head, sources)


@BOTH
def test_it_adds_the_bias_of_the_images_dataset_and_nothing_for_the_target(make_features, config: HeadConfig) -> None:
    head, features = wrapped(config), make_features(5)
    plain = head.head(features)
    assert torch.equal(head(features), plain)
    assert torch.equal(head(features._replace(source=SOURCE)), plain)
    with torch.no_grad():
        head.source_bias.copy_(torch.arange(8.0).reshape(2, 4))
    expected = plain + torch.stack([torch.zeros(4), torch.arange(4.0), torch.arange(4.0, 8.0)])[SOURCE]
    assert torch.equal(head(features._replace(source=SOURCE)), expected)
    assert torch.equal(head(features), plain)
    assert torch.equal(head.eval()(features._replace(source=SOURCE)), plain)


@BOTH
def test_only_known_entries_of_a_dataset_train_its_biases(make_features, config: HeadConfig) -> None:
    head, features = wrapped(config), make_features(5)._replace(source=SOURCE)
    build_loss(LossSettings())(head(features), known_targets(LABELS)).backward()
    known = torch.stack([(LABELS[source == SOURCE] >= 0).any(dim=0) for source in (1, 2)])
    assert torch.equal(head.source_bias.grad != 0, known)
    before = {name: value.grad.clone() for name, value in head.head.named_parameters() if value.grad is not None}
    # Moved by its own bias alone: the target's images have the slopes that they have without the wrapper.
    plain = wrapped(config).head
    build_loss(LossSettings())(plain(features), known_targets(LABELS)).backward()
    for name, value in plain.named_parameters():
        if value.grad is not None:
            assert torch.equal(before[name], value.grad)


@BOTH
def test_what_is_saved_is_the_head(make_features, config: HeadConfig) -> None:
    head, features = wrapped(config), make_features(5)
    with torch.no_grad():
        head.source_bias.fill_(3.0)
    saved = plain_state(head.state_dict())
    with forked(1, "other"):
        fresh = build_head(config)
    assert saved.keys() == fresh.state_dict().keys()
    assert plain_state(saved).keys() == saved.keys()
    fresh.load_state_dict(saved)
    assert torch.equal(fresh(features), head(features))
    other = wrapped(config)
    with torch.no_grad():
        other.source_bias.fill_(7.0)
        other.bias.fill_(1.0)
    for strict in (True, False):  # as heads are saved: the biases by dataset start anew
        other.load_state_dict(saved, strict=strict)
        assert torch.equal(other.head.bias, head.head.bias)
        assert not other.source_bias.any()
    other.load_state_dict(head.state_dict())
    assert (other.source_bias == 3).all()


@BOTH
def test_a_biased_dataset_teaches_the_head_the_target(make_features, config: HeadConfig) -> None:
    """A dataset that calls everything present three times as often: without biases it pulls the target's logits up."""
    generator = torch.Generator().manual_seed(0)
    features, source = make_features(200, seed=2), torch.arange(200) % 2
    rate = torch.where(source == 0, 0.15, 0.6)[:, None].expand(200, 4)
    targets = known_targets((torch.rand(200, 4, generator=generator) < rate).to(torch.int8))
    loss, means = build_loss(LossSettings("masked_bce_mean")), []
    for biased in (True, False):
        head = wrapped(config, 2)
        given, moving = features._replace(source=source if biased else None), [head.bias, head.source_bias]
        for _ in range(30):
            cost = loss(head(given), targets)
            slopes = torch.autograd.grad(cost, moving, materialize_grads=True)
            with torch.no_grad():
                for parameter, slope in zip(moving, slopes, strict=True):
                    parameter -= 12 * slope
        means.append(head(features).sigmoid().mean().item())
    assert means[0] == pytest.approx(0.15, abs=0.07)
    assert means[1] == pytest.approx(0.375, abs=0.07)


@BOTH
def test_it_is_a_head_like_the_others(make_features, config: HeadConfig) -> None:
    head = wrapped(config)
    assert head.needs_patches == head.head.needs_patches
    assert head.needs_studies == head.head.needs_studies
    assert head.bias is head.head.bias
    features = make_features(5)._replace(source=SOURCE)
    masks = head.draw_masks(features, torch.Generator().manual_seed(0))
    assert torch.equal(head(features, masks), head.head(features, masks))
    with pytest.raises(ConfigError, match="at least two datasets, found 1"):
        SourceBiased(head.head, 1)


def test_a_single_output_row_has_a_bias_for_each_finding_all_the_same(make_features) -> None:
    config = HeadConfig(
        "ml_decoder", 6, 4, 2, decoder_dim=8, decoder_feed_forward=12, decoder_heads=2, shared_output=True
    )
    head = wrapped(config)
    assert head.source_bias.shape == (2, 4)
    assert head(make_features(5)._replace(source=SOURCE)).shape == (5, 4)


@BOTH
def test_it_runs_over_a_leading_axis_of_parameters(make_features, config: HeadConfig) -> None:
    heads, features = [wrapped(config) for _ in range(3)], make_features(5)._replace(source=SOURCE)
    masks = heads[0].draw_masks(features, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for number, head in enumerate(heads):
            head.source_bias.fill_(float(number))
    stacked = {name: torch.stack([dict(head.named_parameters())[name] for head in heads]) for name, _ in
               heads[0].named_parameters()}  # fmt: skip
    together = torch.func.vmap(lambda weights: torch.func.functional_call(heads[0], weights, (features, masks)))(
        stacked
    )
    for number, head in enumerate(heads):
        assert torch.allclose(together[number], head(features, masks), atol=1e-5)


@BOTH
@pytest.mark.parametrize("way", ["together", "in turn"])
def test_a_sweep_trains_it_and_goes_on_from_what_is_saved(make_features, config: HeadConfig, way) -> None:
    rates, features = (1e-3, 1e-2), make_features(5)._replace(source=SOURCE)
    candidates = [(config, rate) for rate in rates]

    def build(described: HeadConfig) -> SourceBiased:
        return SourceBiased(build_head(described), 3)

    sweep = Sweep(candidates, 6, build=build, weight_decay=0.0, way=way)
    for _ in range(3):
        sweep.step(features, known_targets(LABELS))
    states = [sweep.state(place) for place in range(2)]
    known = torch.stack([(LABELS[source == SOURCE] >= 0).any(dim=0) for source in (1, 2)])
    for state in states:
        assert torch.equal(state["source_bias"] != 0, known)
    target = features._replace(source=None)
    for place, state in enumerate(states):
        with forked(5, "other"):
            head = build_head(config)
        head.load_state_dict(plain_state(state))
        assert torch.allclose(sweep.logits(target)[place], head(target), atol=1e-5)
        assert torch.equal(sweep.logits(features)[place], sweep.logits(target)[place])  # judged as it will be saved
    second = Sweep(
        candidates, 6, build=build, initial=[plain_state(state) for state in states], way=way,
        trainable=classifier_parameters,
    )  # fmt: skip
    assert torch.equal(second.logits(target), sweep.logits(target))
    second.step(features, known_targets(LABELS))
    for place, state in enumerate(states):
        moved = {name for name, value in second.state(place).items() if not torch.equal(value, state[name])}
        assert moved == set(classifier_parameters(build(config)))


def test_weights_of_datasets_scale_their_entries() -> None:
    targets = known_targets(LABELS)
    weighed = weigh_sources(targets, SOURCE, torch.tensor([1.0, 0.5, 0.0]))
    expected = targets.weights.numpy() * np.array([1, 0.5, 0, 0.5, 1])[:, None]
    assert np.array_equal(weighed.weights.numpy(), expected)
    assert weighed.values is targets.values
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    build_loss(LossSettings())(logits, weighed).backward()
    assert not logits.grad[2].any()
    assert not logits.grad[LABELS < 0].any()


def test_weights_are_read_from_text() -> None:
    names = ("mimic", "chexpert", "nih")
    assert parse_source_weights((), names).tolist() == [1, 1, 1]
    assert parse_source_weights(("nih=0", "chexpert=0.5"), names).tolist() == [1, 0.5, 0]
    with pytest.raises(UnknownNameError, match="Did you mean 'chexpert'"):
        parse_source_weights(("chexprt=1",), names)
    for wrong in ("nih", "nih=", "nih=-1", "nih=nan", "nih=inf", "nih=much"):
        with pytest.raises(ConfigError, match="expected NAME=WEIGHT"):
            parse_source_weights((wrong,), names)
    with pytest.raises(ConfigError, match="once each"):
        parse_source_weights(("nih=1", "nih=2"), names)
