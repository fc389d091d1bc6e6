import numpy as np
import pytest
import torch
from torch import nn

from hilum.core.errors import ConfigError
from hilum.heads.ml_decoder import MLDecoder, dropout_mask
from hilum.heads.registry import HeadConfig, build_head

SMALL = {"decoder_dim": 8, "feed_forward": 12, "attention_heads": 2}


def small(**options) -> MLDecoder:
    torch.manual_seed(1)
    return MLDecoder(6, 2, 5, **{**SMALL, **options})


def trained_count(head: nn.Module) -> int:
    return sum(parameter.numel() for parameter in head.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("embed_dim", "blocks", "decoder_dim", "cat_cls", "expected"),
    [
        (1024, 4, 768, False, 8_692_776),
        (1024, 4, 768, True, 8_856_616),
        (1024, 4, 384, False, 3_757_608),
        (1024, 4, 384, True, 3_921_448),
        (1024, 1, 768, True, 6_374_440),
        (768, 4, 768, False, 7_906_344),
        (768, 4, 768, True, 8_029_224),
    ],
)
def test_parameter_counts_of_the_published_heads(embed_dim, blocks, decoder_dim, cat_cls, expected) -> None:
    config = HeadConfig("ml_decoder", embed_dim, 40, blocks, decoder_dim=decoder_dim, cat_cls=cat_cls)
    with torch.device("meta"):
        head = build_head(config)
    assert trained_count(head) == expected


def test_queries_are_frozen_unless_asked_for() -> None:
    with torch.device("meta"):
        frozen, learnable = MLDecoder(1024, 4, 40), MLDecoder(1024, 4, 40, learnable_queries=True)
    assert trained_count(learnable) - trained_count(frozen) == 40 * 768 == 30_720


def test_parameter_names_are_the_released_ones() -> None:
    layer = ("norm1", "multihead_attn.out_proj", "norm2", "linear1", "linear2", "norm3")
    expected = {f"decoder.layers.0.{name}.{kind}" for name in layer for kind in ("weight", "bias")}
    expected |= {f"decoder.layers.0.multihead_attn.in_proj_{kind}" for kind in ("weight", "bias")}
    expected |= {"decoder.embed_standart.weight", "decoder.embed_standart.bias", "decoder.query_embed.weight"}
    expected |= {"decoder.duplicate_pooling", "decoder.duplicate_pooling_bias"}
    state = small().state_dict()
    assert set(state) == expected
    assert state["decoder.duplicate_pooling"].shape == (5, 8, 1)


def test_initialisation_is_that_of_the_released_head() -> None:
    torch.manual_seed(0)
    decoder = MLDecoder(1024, 4, 40, cat_cls=True).decoder
    assert float(decoder.duplicate_pooling.detach().std()) == pytest.approx((2 / (40 + 4864)) ** 0.5, rel=0.02)
    assert float(decoder.query_embed.weight.std()) == pytest.approx(1.0, rel=0.02)
    assert not decoder.duplicate_pooling_bias.detach().any()


def test_without_options_every_number_is_that_of_the_first_version(make_features) -> None:
    """Bit for bit: the order in which weights are drawn, and the operations from features to logits."""
    head, features = small(), make_features(3)
    torch.manual_seed(1)
    project, queries = nn.Linear(12, 8), nn.Embedding(5, 8)
    attention_weight, attention_out = torch.empty(24, 8), nn.Linear(8, 8)
    nn.init.xavier_uniform_(attention_weight)
    first, second, rows = nn.Linear(8, 12), nn.Linear(12, 8), torch.empty(5, 8, 1)
    nn.init.xavier_normal_(rows)
    nn.init.zeros_(attention_out.bias)
    drawn = {
        "embed_standart.weight": project.weight, "embed_standart.bias": project.bias,
        "query_embed.weight": queries.weight, "layers.0.multihead_attn.in_proj_weight": attention_weight,
        "layers.0.multihead_attn.in_proj_bias": torch.zeros(24),
        "layers.0.multihead_attn.out_proj.weight": attention_out.weight,
        "layers.0.multihead_attn.out_proj.bias": attention_out.bias, "layers.0.linear1.weight": first.weight,
        "layers.0.linear1.bias": first.bias, "layers.0.linear2.weight": second.weight,
        "layers.0.linear2.bias": second.bias, "duplicate_pooling": rows, "duplicate_pooling_bias": torch.zeros(5),
    }  # fmt: skip
    state = head.state_dict()
    assert all(torch.equal(state[f"decoder.{name}"], value) for name, value in drawn.items())

    memory = torch.relu(project(features.patches))
    tokens = queries.weight.expand(3, -1, -1)
    tokens = nn.functional.layer_norm(tokens + tokens, (8,))
    parts = attention_weight.chunk(3)
    q, k, v = (
        nn.functional.linear(x, w, torch.zeros(8)).unflatten(-1, (2, 4)).transpose(1, 2)
        for x, w in zip((tokens, memory, memory), parts, strict=True)
    )
    attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    tokens = nn.functional.layer_norm(tokens + attention_out(attended), (8,))
    tokens = nn.functional.layer_norm(tokens + second(torch.relu(first(tokens))), (8,))
    assert torch.equal(head(features), torch.einsum("bcd,cd->bc", tokens, rows[:, :, 0]))


def reference(head: MLDecoder, features, masks=None) -> np.ndarray:
    """The head written out with torch's own attention, in float64, one finding at a time."""
    decoder = head.decoder.double()
    layer = decoder.layers[0]
    dim, heads = head.shape[1], head.shape[3]
    memory = torch.relu(decoder.embed_standart(features.patches.double()))
    batch, queries = len(memory), decoder.query_embed.weight.unsqueeze(0).expand(len(memory), -1, -1)
    ones = [torch.ones(())] * 5
    first, attention_mask, second, hidden, third = [m.double() for m in masks] if masks else ones
    queries = layer.norm1(queries + queries * first)
    attention = layer.multihead_attn
    q, k, v = (
        torch.nn.functional.linear(tokens, attention.in_proj_weight[i * dim : (i + 1) * dim], None)
        + attention.in_proj_bias[i * dim : (i + 1) * dim]
        for i, tokens in enumerate((queries, memory, memory))
    )
    outputs = torch.zeros(batch, queries.shape[1], dim, dtype=torch.float64)
    width = dim // heads
    for image in range(batch):
        for a in range(heads):
            part = slice(a * width, (a + 1) * width)
            weights = torch.softmax(q[image, :, part] @ k[image, :, part].T / width**0.5, dim=-1)
            weights = weights * (attention_mask[image, a] if masks else 1)
            outputs[image, :, part] = weights @ v[image, :, part]
    queries = layer.norm2(queries + attention.out_proj(outputs) * second)
    queries = layer.norm3(queries + layer.linear2(torch.relu(layer.linear1(queries)) * hidden) * third)
    logits = torch.zeros(batch, queries.shape[1], dtype=torch.float64)
    for finding in range(queries.shape[1]):
        inputs = queries[:, finding]
        if head.cat_cls:
            inputs = torch.cat([features.cls.double(), inputs], dim=1)
        weight, bias = decoder.duplicate_pooling[finding, :, 0], decoder.duplicate_pooling_bias[finding]
        logits[:, finding] = inputs @ weight + bias
    head.float()
    return logits.detach().numpy()


@pytest.mark.parametrize("cat_cls", [False, True])
@pytest.mark.parametrize("dropping", [False, True])
def test_equals_the_head_written_out_in_float64(make_features, cat_cls: bool, dropping: bool) -> None:
    head, features = small(cat_cls=cat_cls), make_features(4)
    torch.nn.init.normal_(head.decoder.duplicate_pooling_bias)
    torch.nn.init.normal_(head.decoder.layers[0].multihead_attn.in_proj_bias)
    masks = head.draw_masks(features, torch.Generator().manual_seed(3)) if dropping else None
    logits = head(features, masks).detach().numpy()
    np.testing.assert_allclose(logits, reference(head, features, masks), atol=2e-6)


def test_prediction_has_no_dropout_even_in_training_mode(make_features) -> None:
    """Defect C2: heads left in training mode, so that predictions differed from one pass to the next."""
    head, features = small(dropout=0.5), make_features(4)
    head.train()
    first = head(features)
    assert torch.equal(first, head(features))
    assert torch.equal(first, head.eval()(features))
    masked = head(features, head.draw_masks(features, torch.Generator().manual_seed(0)))
    assert (masked - first).abs().max() > 1e-3


def test_dropout_masks_reach_all_five_places(make_features) -> None:
    head, features = small(), make_features(4)
    masks = head.draw_masks(features, torch.Generator().manual_seed(0))
    ones = type(masks)(*(torch.ones_like(mask) for mask in masks))
    plain = head(features, ones)
    assert torch.allclose(plain, head(features), atol=1e-6)
    for name in masks._fields:
        dropped = getattr(ones, name).clone()
        dropped[..., ::2] = 0
        changed = head(features, ones._replace(**{name: dropped}))
        assert (changed - plain).abs().max() > 1e-4, name


def test_another_image_in_the_batch_does_not_change_mine(make_features, only) -> None:
    head, features = small(), make_features(5)
    alone = head(only(features, [2]))
    assert torch.allclose(head(features)[2:3], alone, atol=1e-6)
    assert torch.allclose(head.attention(features)[2:3], head.attention(only(features, [2])), atol=1e-7)


def test_memory_is_a_set_of_patches(make_features) -> None:
    head, features = small(), make_features(3)
    order = torch.randperm(12)
    assert torch.allclose(head(features._replace(patches=features.patches[:, order])), head(features), atol=1e-6)


def test_attention_is_a_distribution_over_the_grid_and_what_the_head_uses(make_features) -> None:
    head, features = small(), make_features(3)
    maps = head.attention(features)
    assert maps.shape == (3, 5, 3, 4)
    assert torch.allclose(maps.sum(dim=(2, 3)), torch.ones(3, 5))
    # a patch whose key every query prefers takes the attention
    layer = head.decoder.layers[0].multihead_attn
    torch.nn.init.zeros_(layer.in_proj_weight[:8])
    uniform = head.attention(features)
    assert torch.allclose(uniform, torch.full_like(uniform, 1 / 12))


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5])
def test_dropout_masks_drop_as_often_as_asked_and_keep_the_mean(probability: float) -> None:
    mask = dropout_mask((7, 30_001), probability, torch.Generator().manual_seed(0))
    dropped = float((mask == 0).float().mean())
    assert dropped == pytest.approx(probability, abs=4 * (probability * (1 - probability) / mask.numel()) ** 0.5)
    assert float(mask.mean()) == pytest.approx(1.0, abs=0.01)
    kept = mask[mask > 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - probability)), rtol=1e-4)
    bits = (mask == 0).double()
    lagged = (bits[:, :-1] * bits[:, 1:]).mean() - bits.mean() ** 2
    assert abs(float(lagged)) < 4e-3  # four neighbours share a draw and must not share a fate


def test_masks_follow_the_generator_alone(make_features) -> None:
    head, features = small(), make_features(3)
    torch.manual_seed(5)
    first = head.draw_masks(features, torch.Generator().manual_seed(9))
    torch.manual_seed(6)
    second = head.draw_masks(features, torch.Generator().manual_seed(9))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert small(dropout=0.0).draw_masks(features, torch.Generator()) is None


@pytest.mark.parametrize("options", [{"attention_heads": 3}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_impossible_settings_are_refused(options) -> None:
    with pytest.raises(ConfigError):
        small(**options)
