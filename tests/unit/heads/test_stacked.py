"""Heads trained together, heads in turn, and a plain loop over heads and torch's own optimisers: the same heads."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hilum.core.errors import ConfigError, NonFiniteLossError
from hilum.core.seeding import forked, torch_stream
from hilum.heads.candidates import grid, last_blocks, last_blocks_scaling
from hilum.heads.decoupling import classifier_parameters
from hilum.heads.features import Features
from hilum.heads.losses import known_targets, masked_bce_sum
from hilum.heads.registry import HEADS, VIEWS_OF_HEADS, HeadConfig, build_head
from hilum.heads.sources import SourceBiased
from hilum.heads.stacked import StackedHeads
from hilum.heads.standardise import measure
from hilum.heads.sweep import Sweep, cosine

LINEAR = HeadConfig("linear", 6, 4, blocks=2, decoder_dim=12, decoder_feed_forward=16, decoder_heads=2)
DECODER, CSRA = replace(LINEAR, name="ml_decoder"), replace(LINEAR, name="csra")
KINDS = [replace(LINEAR, name=name, views=views) for name in HEADS for views in VIEWS_OF_HEADS[name]]  # type: ignore[arg-type]
KINDS += [
    replace(LINEAR, patch_mean=True),
    replace(CSRA, csra_temperatures=(1.0, 4.0, 99.0)),
    replace(DECODER, cat_cls=True, learnable_queries=True),
    replace(DECODER, decoder_layers=2, query_groups=3),
    replace(DECODER, cls_memory=True, positions="sincos"),
    replace(DECODER, pyramid=True, attention_temperature=True),
    replace(DECODER, shared_output=True, dropout=0.0),
    replace(DECODER, views="memory", decoder_layers=2, cls_memory=True),
]


def named(config: HeadConfig) -> str:
    """What sets a configuration apart."""
    plain = replace(LINEAR, name=config.name)
    different = [name for name in vars(config) if getattr(config, name) != getattr(plain, name)]
    return "-".join([config.name, *(config.views if name == "views" else name for name in different)])


ALL = pytest.mark.parametrize("config", KINDS, ids=named)
WAYS = pytest.mark.parametrize("way", ["together", "in turn"])
RATES = (1e-4, 1e-2, 1e-3)
STUDY, VIEW = [0, 0, 1, 2, 2, 2, 3, 4], [0, 1, 2, 0, 1, 1, 0, 0]


@pytest.fixture
def batch(make_features):
    def batch(step: int, blocks: int = 2) -> tuple[Features, torch.Tensor]:
        features = make_features(8, blocks=blocks, seed=step, study=STUDY, view=VIEW)
        return features, torch.from_numpy(np.random.default_rng(step).choice([1, 0, -1], (8, 4)).astype(np.int8))

    return batch


class PlainLoop:
    """One head after another, each with an optimiser of torch's: what a sweep has to be equal to."""

    def __init__(self, config: HeadConfig, rates, total: int, seed: int) -> None:
        self.generator = torch_stream(seed, "head dropout", "search")
        self.rates, self.total, self.steps, self.heads = rates, total, 0, []
        for _ in rates:
            with forked(seed, "head initialisation"):
                self.heads.append(build_head(config))
        moving = [[one for one in head.parameters() if one.requires_grad] for head in self.heads]
        self.optimisers = [torch.optim.AdamW(some, weight_decay=1e-4, fused=True) for some in moving]

    def step(self, features: Features, labels: torch.Tensor) -> list[float]:
        targets = known_targets(labels, features.study)
        masks = self.heads[0].draw_masks(features, self.generator)
        losses = []
        for head, optimiser, rate in zip(self.heads, self.optimisers, self.rates, strict=True):
            loss = masked_bce_sum(head(features, masks), targets)
            optimiser.zero_grad()
            loss.backward()
            optimiser.param_groups[0]["lr"] = rate * cosine(self.steps, self.total)
            optimiser.step()
            losses.append(loss.item())
        self.steps += 1
        return losses


def without_key_bias(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A bias of attention keys moves no output (softmax takes it away), so its gradient is rounding, which AdamW
    scales up to whole steps: of it there is nothing to compare."""
    kept = dict(state)
    for name in state:
        if name.endswith("in_proj_bias"):
            query, _, value = state[name].chunk(3)
            kept[name] = torch.cat([query, value])
    return kept


def difference(found: torch.Tensor, expected: torch.Tensor, least: float = 1e-6) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=least))


@ALL
@WAYS
def test_every_kind_together_equals_a_plain_loop(batch, config: HeadConfig, way) -> None:
    sweep, loop = Sweep(grid([config], RATES), 6, seed=3, way=way), PlainLoop(config, RATES, 6, seed=3)
    for step in range(3):
        features, labels = batch(step)
        np.testing.assert_allclose(sweep.step(features, labels), loop.step(features, labels), rtol=1e-6)
    features, _ = batch(99)
    logits = sweep.logits(features)
    for place, head in enumerate(loop.heads):
        head.eval()
        with torch.no_grad():
            assert difference(logits[place], head(features)) < 1e-6
        state, expected = without_key_bias(sweep.state(place)), without_key_bias(head.state_dict())
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            assert difference(state[name], value, 1e-3) < (1e-6 if way == "in turn" else 2e-5), name
        if way == "in turn":
            assert all(torch.equal(state[name], value) for name, value in expected.items())


@ALL
@WAYS
def test_heads_together_equal_heads_alone_and_the_same_is_chosen(batch, config: HeadConfig, way) -> None:
    together = Sweep(grid([config], RATES), 6, seed=3, way=way)
    alone = [Sweep(grid([config], [rate]), 6, seed=3, way=way) for rate in RATES]
    for step in range(3):
        features, labels = batch(step)
        losses = together.step(features, labels)
        assert losses == pytest.approx([one.step(features, labels)[0] for one in alone], rel=1e-6)
    features, labels = batch(99)
    logits = together.logits(features)
    apart = torch.cat([one.logits(features) for one in alone])
    assert all(difference(left, right) < 1e-6 for left, right in zip(logits, apart, strict=True))
    targets = known_targets(labels)
    chosen = [np.argmin([float(masked_bce_sum(row, targets)) for row in rows]) for rows in (logits, apart)]
    assert chosen[0] == chosen[1]


@ALL
def test_bf16_together_is_bf16_in_turn_but_for_rounding(batch, config: HeadConfig) -> None:
    sweeps = [Sweep(grid([config], RATES), 6, seed=3, way=way, precision="bf16") for way in ("together", "in turn")]
    features, labels = batch(0)
    left, right = (sweep.step(features, labels) for sweep in sweeps)
    np.testing.assert_allclose(left, right, rtol=1e-2)
    left, right = (sweep.logits(features) for sweep in sweeps)
    assert left.dtype == torch.float32
    assert difference(left, right) < 3e-2


@WAYS
def test_architectures_in_one_sweep_equal_each_alone(batch, way) -> None:
    """Several numbers of blocks, pooling or not, several kinds: all on features of the most blocks."""
    configs = [replace(LINEAR, blocks=3), replace(LINEAR, blocks=1, patch_mean=True), DECODER, replace(CSRA, blocks=1)]
    candidates = grid(configs, RATES[:2])
    mixed = [candidates[place] for place in (5, 0, 2, 7, 1, 4, 3, 6)]
    sweep = Sweep(mixed, 4, seed=1, way=way)
    alone = [Sweep([candidate], 4, seed=1, way=way) for candidate in mixed]
    for step in range(3):
        features, labels = batch(step, blocks=3)
        apart = [one.step(last_blocks(features, one.candidates[0].config.blocks, 6), labels)[0] for one in alone]
        np.testing.assert_allclose(sweep.step(features, labels), apart, rtol=1e-6)
    features, _ = batch(9, blocks=3)
    together = sweep.logits(features)
    for place, one in enumerate(alone):
        assert difference(together[place], one.logits(features)[0]) < 1e-6
        assert sweep.state(place).keys() == one.state(0).keys()


def test_a_head_of_fewer_blocks_reads_the_last_ones(make_features) -> None:
    features = make_features(4, blocks=3)
    assert last_blocks(features, 3, 6) is features
    last = last_blocks(features, 1, 6)
    assert torch.equal(last.cls, features.cls[:, 12:])
    assert torch.equal(last.patches, features.patches[:, :, 12:])
    assert torch.equal(last.patch_mean, features.patch_mean)
    with pytest.raises(ConfigError, match="4 blocks"):
        last_blocks(features, 4, 6)
    scaling = last_blocks_scaling(measure([features]), 1, 6)
    expected = measure([last])
    assert all(torch.allclose(scaling.cls[part], expected.cls[part]) for part in (0, 1))
    assert all(torch.allclose(scaling.patches[part], expected.patches[part]) for part in (0, 1))


@pytest.mark.parametrize("config", [DECODER, CSRA], ids=["ml_decoder", "csra"])
def test_tokens_are_projected_for_all_heads_in_one_product(batch, config: HeadConfig) -> None:
    features, labels = batch(0)
    counts = []
    for way in ("together", "in turn"):
        sweep = Sweep(grid([config], RATES), 6, way=way)
        sweep.step(features, labels)
        with FlopCounterMode(display=False) as counter:
            sweep.step(features, labels)
        counts.append(counter.get_flop_counts()["Global"])
        if way == "together":
            [reader] = sweep._groups[0].heads._token_readers(features).values()
    whole = 2 * 8 * 12 * len(RATES) * reader.out_features * reader.in_features
    product = torch.ops.aten.mm if reader.bias is None else torch.ops.aten.addmm  # one that is batched would be a bmm
    assert counts[0][product] >= whole
    assert sum(counts[0].values()) == sum(counts[1].values()), "and in no other"
    assert "forward" not in vars(reader), "the module is left as it was"


@ALL
@WAYS
def test_a_non_finite_loss_moves_no_head_of_any_kind(batch, config: HeadConfig, way) -> None:
    sweep = Sweep([*grid([config], RATES), (replace(LINEAR, blocks=1), 1e-3)], 4, way=way)
    features, labels = batch(0)
    sweep.step(features, labels)
    before = [sweep.state(place) for place in range(4)]
    features.cls[0, 1] = features.patches[0, 1, 1] = torch.nan
    labels[0] = 1
    with pytest.raises(NonFiniteLossError, match=r"Step 1: .* rate 0\.0001, 0\.01, 0\.001 is not finite"):
        sweep.step(features, labels)
    for place, state in enumerate(before):
        assert all(torch.equal(value, state[name]) for name, value in sweep.state(place).items())


@WAYS
def test_who_is_kept_goes_on_as_if_nothing_had_happened(batch, way) -> None:
    candidates = grid([DECODER, replace(LINEAR, blocks=1), CSRA], RATES)
    pruned, whole = (Sweep(candidates, 6, seed=2, way=way, ema=0.9) for _ in range(2))
    for step in range(6):
        features, labels = batch(step)
        losses, expected = pruned.step(features, labels), whole.step(features, labels)
        if step == 2:
            pruned.keep([4, 0, 2, 3])
            assert [candidates.index(one) for one in pruned.candidates] == [4, 0, 2, 3]
        if step > 2:
            np.testing.assert_allclose(losses, expected[[4, 0, 2, 3]], rtol=1e-6)
    features, _ = batch(99)
    left, right = pruned.logits(features), whole.logits(features)[[4, 0, 2, 3]]
    assert all(difference(*pair) < 1e-6 for pair in zip(left, right, strict=True))
    state, expected = pruned.state(0), whole.state(4)
    assert all(difference(state[name], value, 1e-3) < 2e-5 for name, value in expected.items())


@pytest.mark.parametrize("positions", [[], [0, 0], [3], [-1]])
def test_who_is_not_there_is_not_kept(positions) -> None:
    with pytest.raises(ConfigError, match="Cannot go on"):
        Sweep(grid([LINEAR], RATES), 3).keep(positions)


@WAYS
def test_running_means_of_weights_are_judged_and_kept(batch, way) -> None:
    plain, averaged = (Sweep(grid([DECODER], RATES), 20, seed=2, way=way, ema=ema) for ema in (0.0, 0.5))
    mean = {name: value.double() for name, value in plain.state(1).items()}
    for step in range(12):
        features, labels = batch(step)
        np.testing.assert_array_equal(plain.step(features, labels), averaged.step(features, labels))
        decay = min(0.5, (2 + step) / (11 + step))
        mean = {name: decay * value + (1 - decay) * plain.state(1)[name] for name, value in mean.items()}
    assert all(torch.allclose(averaged.state(1)[name].double(), value, atol=1e-6) for name, value in mean.items())
    head = build_head(DECODER)
    head.load_state_dict(averaged.state(1))
    features, _ = batch(99)
    with torch.no_grad():
        assert torch.allclose(averaged.logits(features)[1], head(features), atol=1e-5)
    assert not torch.allclose(averaged.logits(features), plain.logits(features), atol=1e-3)


@WAYS
def test_only_named_parts_move_and_the_rest_keeps_its_bits(batch, way) -> None:
    start = [Sweep(grid([DECODER], [1e-2]), 4, seed=seed).state(0) for seed in range(3)]
    sweep = Sweep(grid([DECODER], RATES), 4, way=way, initial=start, trainable=classifier_parameters)
    for step in range(3):
        sweep.step(*batch(step))
    for place, before in enumerate(start):
        moved = {name for name, value in sweep.state(place).items() if not torch.equal(value, before[name])}
        assert moved == {"decoder.duplicate_pooling", "decoder.duplicate_pooling_bias"}
    by_prefix = Sweep(grid([DECODER], RATES), 4, initial=start, trainable=["decoder.layers.0.norm1"])
    assert list(by_prefix._groups[0].heads.moving) == ["decoder.layers.0.norm1.weight", "decoder.layers.0.norm1.bias"]


def test_what_does_not_move_and_is_the_same_is_held_once() -> None:
    heads = Sweep(grid([DECODER], RATES), 4, trainable=["decoder.duplicate_pooling"])._groups[0].heads
    assert list(heads.values) == ["decoder.duplicate_pooling"]


@pytest.mark.parametrize("trainable", [["decoder.nowhere"], [], ["decoder.query_embed.weight"]])
def test_parts_that_cannot_move_are_an_error(trainable) -> None:
    with pytest.raises(ConfigError, match="trainable"):
        Sweep(grid([DECODER], RATES), 4, trainable=trainable)


@WAYS
def test_clipping_is_that_of_torch_for_each_head(batch, way) -> None:
    """Of one step, before AdamW forgets the size of gradients: by their first moments."""
    limit = 3.0
    features, labels = batch(0)
    clipped, free = (Sweep(grid([LINEAR], RATES), 4, way=way, clip=clip) for clip in (limit, None))
    for sweep in (clipped, free):
        sweep.step(features, labels)
    moments = [torch.cat([part[1].flatten() for part in s._groups[0].optimiser._state[0]]) for s in (clipped, free)]
    assert moments[1].norm() > 0.1 * limit
    assert moments[0].norm() == pytest.approx(0.1 * limit, rel=1e-5)
    assert torch.allclose(moments[0] / moments[0].norm(), moments[1] / moments[1].norm(), atol=1e-6)
    loose = Sweep(grid([LINEAR], RATES), 4, way=way, clip=1e6)
    loose.step(features, labels)
    assert all(torch.equal(value, free.state(1)[name]) for name, value in loose.state(1).items())


def test_wrapped_heads_go_on_from_plain_weights(batch) -> None:
    def build(config: HeadConfig) -> nn.Module:
        return SourceBiased(build_head(config), 2)

    start = Sweep(grid([DECODER], [1e-2]), 4, seed=5).state(0)
    features, labels = batch(0)
    features = features._replace(source=torch.tensor([0, 1] * 4))
    for way in ("together", "in turn"):
        sweep = Sweep(grid([DECODER], RATES), 4, build=build, initial=start, way=way)
        assert all(torch.equal(sweep.state(2)[f"head.{name}"], value) for name, value in start.items())
        sweep.step(features, labels)
        assert sweep.state(2)["source_bias"].any()


@pytest.mark.parametrize(
    "settings", [{"ema": 1.0}, {"ema": -0.1}, {"clip": 0.0}, {"clip": -1.0}, {"initial": [{}]}, {"initial": {}}]
)
def test_impossible_settings_are_refused(settings) -> None:
    with pytest.raises(ConfigError):
        Sweep(grid([LINEAR], RATES), 4, **settings)


def test_a_weight_decays_where_its_gradient_is_zero(batch) -> None:
    """Copies of a stacked head must not share memory: each row decays at its own rate."""
    features, _ = batch(0)
    sweep = Sweep(grid([LINEAR], RATES), 4, weight_decay=0.5)
    before = copy.deepcopy(sweep.state(0))["linear.weight"]
    sweep.step(features, torch.full((8, 4), -1, dtype=torch.int8))
    for place, rate in enumerate(RATES):
        torch.testing.assert_close(sweep.state(place)["linear.weight"], before * (1 - 0.5 * rate))


def test_heads_that_do_not_fit_together_go_on_in_turn(batch, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def too_large(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    sweep, expected = (Sweep(grid([DECODER], RATES), 6, way=way) for way in ("together", "in turn"))
    monkeypatch.setattr(StackedHeads, "_together", too_large)
    for step in range(2):
        features, labels = batch(step)
        np.testing.assert_array_equal(sweep.step(features, labels), expected.step(features, labels))
    assert "3 heads together do not fit" in capsys.readouterr().err
    fresh = Sweep(grid([DECODER], RATES), 6, way="together", initial=[expected.state(place) for place in range(3)])
    assert torch.equal(fresh.logits(features), expected.logits(features))


@pytest.mark.gpu
@ALL
def test_gpu_together_equals_the_cpu(batch, config: HeadConfig) -> None:
    """No dropout, whose masks each device draws by itself."""
    plain = replace(config, dropout=0.0)
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        here, there = (Sweep(grid([plain], RATES), 6, seed=3, device=device) for device in ("cpu", "cuda"))
        for step in range(4):
            features, labels = batch(step)
            on_device = Features(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in features))
            np.testing.assert_allclose(there.step(on_device, labels), here.step(features, labels), rtol=1e-4)
        assert difference(there.logits(on_device), here.logits(features)) < 1e-3
    finally:
        torch.backends.cuda.matmul.allow_tf32 = kept
