"""Decoders with what they may have beyond the slides' form, alone and over studies, against torch's own decoder layer
in float64 with the memory of each study put together and padded."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from hilum.core.errors import ConfigError
from hilum.heads.decoder_parts import DropoutMasks
from hilum.heads.features import Features
from hilum.heads.ml_decoder import DecoderOptions, Masks, MLDecoder
from hilum.heads.multiview import MultiViewDecoder
from hilum.heads.registry import HeadConfig, build_head

DIM, BLOCKS, FINDINGS, WIDTH, HEADS = 6, 2, 5, 8, 2
STUDY, VIEW = [0, 1, 0, 2, 1, 0, 3], [0, 2, 2, 1, 3, 1, 0]
CONFIG = HeadConfig(
    "ml_decoder", DIM, FINDINGS, BLOCKS, decoder_dim=WIDTH, decoder_feed_forward=12, decoder_heads=HEADS
)
OPTIONS = {
    "slides": {},
    "layers": {"decoder_layers": 3},
    "groups": {"query_groups": 2},
    "groups_cat_cls": {"query_groups": 3, "cat_cls": True},
    "text": {"text_dim": 7},
    "cls_memory": {"cls_memory": True},
    "positions": {"positions": "sincos"},
    "temperature": {"attention_temperature": True},
    "pyramid": {"pyramid": True},
    "shared_output": {"shared_output": True},
    "zero_shot": {"text_dim": 7, "shared_output": True, "cat_cls": True},
    "all": {
        "decoder_layers": 2, "cat_cls": True, "cls_memory": True, "positions": "sincos", "attention_temperature": True,
        "pyramid": True, "text_dim": 7, "learnable_queries": True,
    },
}  # fmt: skip
EACH = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
BOTH = pytest.mark.parametrize("views", ["single", "memory"])


def make(views: str = "single", seed: int = 1, **options) -> MLDecoder:
    """A head with weights that let every part matter."""
    torch.manual_seed(seed)
    text = torch.randn(FINDINGS, options["text_dim"]) if options.get("text_dim") else None
    head = build_head(replace(CONFIG, views=views, **options), text)
    for parameter in head.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.5)
    assert isinstance(head, MLDecoder)
    return head


def coarse(levels: nn.ModuleList, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The pyramid, one patch and window at a time."""
    rows = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            parts = []
            for level, size in zip(levels, (8, 4, 2), strict=True):
                top, left = row // size * size, column // size * size
                window = [
                    patches[y * grid[1] + x]
                    for y in range(top, min(top + size, grid[0]))
                    for x in range(left, min(left + size, grid[1]))
                ]
                parts.append(level(torch.stack(window).mean(dim=0)))
            rows.append(torch.cat(parts))
    return torch.stack(rows)


def positions(grid: tuple[int, int], dim: int) -> torch.Tensor:
    rows = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            code = []
            for place, cells in ((row, grid[0]), (column, grid[1])):
                angles = [(place + 0.5) * 32 / cells * 10_000 ** -(k / (dim // 4)) for k in range(dim // 4)]
                code += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            rows.append(code)
    return torch.tensor(rows, dtype=torch.float64)


def torch_layer(layer: nn.Module, sharpness: torch.Tensor) -> nn.TransformerDecoderLayer:
    """torch's decoder layer with the same weights, whose self-attention gives back what it is given."""
    width = layer.norm1.weight.shape[0]
    twin = nn.TransformerDecoderLayer(width, HEADS, layer.linear1.out_features, 0.0, batch_first=True).double()
    state = dict(layer.state_dict())
    state["self_attn.in_proj_weight"] = torch.eye(width).repeat(3, 1)
    state["self_attn.in_proj_bias"] = torch.zeros(3 * width)
    state["self_attn.out_proj.weight"], state["self_attn.out_proj.bias"] = torch.eye(width), torch.zeros(width)
    twin.load_state_dict(state)
    twin.multihead_attn.in_proj_weight.data[:width] *= sharpness
    twin.multihead_attn.in_proj_bias.data[:width] *= sharpness
    return twin.eval()


@torch.no_grad()
def reference(head: MLDecoder, features: Features, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, C) and attention (B, C, N) in float64, study by study (or image by image), findings from a loop."""
    decoder = copy.deepcopy(head.decoder).double()
    several = isinstance(head, MultiViewDecoder)
    count, tokens = len(features.cls), features.patches.shape[1]
    study = features.study.tolist() if several else list(range(count))
    logits = torch.zeros(count, FINDINGS, dtype=torch.float64)
    maps = torch.zeros(count, FINDINGS, tokens, dtype=torch.float64)
    options = decoder.options
    for number in set(study):
        images = [image for image in range(count) if study[image] == number]
        memory, fine = [], []
        for image in images:
            patches, cls = features.patches[image].double(), features.cls[image].double()
            part = torch.relu(patches @ decoder.embed_standart.weight.T + decoder.embed_standart.bias)
            fine.append(part)
            if options.pyramid:
                part = part + coarse(decoder.pyramid.levels, patches, features.grid)
            if options.positions == "sincos":
                part = part + positions(features.grid, WIDTH)
            if options.cls_memory:
                part = torch.cat([part, torch.relu(decoder.embed_cls(cls))[None]])
            if several:
                part = part + head.view_embed.weight[features.view[image]].double()
            memory.append(part)
        sharpness = torch.ones((), dtype=torch.float64)
        if options.temperature:
            inner = decoder.temperature
            pooled = torch.cat(fine).mean(dim=0)
            sharpness = torch.exp(torch.tanh(inner.output(nn.functional.gelu(inner.hidden(pooled)))))[0]
            assert 1 / math.e < sharpness < math.e
            assert abs(float(sharpness) - 1) > 0.01
        joined = torch.cat([*memory, torch.full((padding, WIDTH), 1e3, dtype=torch.float64)])
        ignored = torch.arange(len(joined)) >= len(joined) - padding
        if options.text_dim:
            projection = decoder.text_queries.projection
            queries = decoder.text_queries.vectors @ projection.weight.T + projection.bias
        else:
            queries = decoder.query_embed.weight
        itself = torch.full((len(queries), len(queries)), -math.inf, dtype=torch.float64).fill_diagonal_(0)
        for layer in decoder.layers:
            twin = torch_layer(layer, sharpness)
            before = twin.norm1(2 * queries)
            weights = twin.multihead_attn(before, joined, joined, key_padding_mask=ignored)[1]
            queries = twin(queries[None], joined[None], tgt_mask=itself, memory_key_padding_mask=ignored[None])[0]
        cls = features.cls[images].double().mean(dim=0)
        factor = math.ceil(FINDINGS / len(queries))
        length = tokens + options.cls_memory
        kept = [weights[:, place * length : place * length + tokens] for place in range(len(images))]
        total = sum(part.sum(dim=1) for part in kept)
        for finding in range(FINDINGS):
            query, copied = divmod(finding, factor)
            row = decoder.duplicate_pooling[0 if options.shared_output else query, :, copied]
            inputs = torch.cat([cls, queries[query]]) if head.cat_cls else queries[query]
            bias = decoder.duplicate_pooling_bias[0 if options.shared_output else finding]
            for image, part in zip(images, kept, strict=True):
                logits[image, finding] = inputs @ row + bias
                maps[image, finding] = part[query] / total[query]
    return logits, maps


def close_to_reference(head: MLDecoder, features: Features, padding: int) -> None:
    logits, maps = reference(head, features, padding)
    torch.testing.assert_close(head(features).double(), logits, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(head.attention(features).flatten(2).double(), maps, atol=1e-6, rtol=1e-5)
    assert logits.std(dim=0).min() > 1e-3


@EACH
@BOTH
def test_equals_torch_on_each_study_put_together_and_padded(make_features, options, views) -> None:
    close_to_reference(make(views, **options), make_features(7, study=STUDY, view=VIEW), padding=5)


@BOTH
@pytest.mark.parametrize("padding", [0, 40])
def test_neither_padding_nor_the_grid_matters(make_features, views, padding) -> None:
    features = make_features(7, grid=(9, 5), study=STUDY, view=VIEW)
    close_to_reference(make(views, **OPTIONS["all"]), features, padding)


@EACH
@BOTH
def test_every_weight_is_used_and_trained(make_features, options, views) -> None:
    head, features = make(views, **options), make_features(7, study=STUDY, view=VIEW)
    (head(features) * torch.randn(7, FINDINGS)).sum().backward()
    for name, parameter in head.named_parameters():
        if name == "decoder.query_embed.weight":
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def by_layer(head: MLDecoder, features: Features) -> Sequence[DropoutMasks]:
    masks = head.draw_masks(features, torch.Generator().manual_seed(0))
    return (masks,) if isinstance(masks, DropoutMasks) else masks


def given(layers: Sequence[DropoutMasks]) -> Masks:
    return layers[0] if len(layers) == 1 else tuple(layers)


@EACH
@BOTH
def test_dropout_is_off_unless_masks_are_given(make_features, options, views) -> None:
    """Defect C2."""
    head, features = make(views, dropout=0.5, **options), make_features(7, study=STUDY, view=VIEW)
    head.train()
    first = head(features)
    assert torch.equal(first, head(features))
    assert torch.equal(first, head.eval()(features))
    layers = by_layer(head, features)
    assert len(layers) == head.decoder.options.layers
    dropped = head(features, given(layers))
    assert (dropped - first).abs().max() > 1e-3
    assert torch.equal(dropped, head(features, head.draw_masks(features, torch.Generator().manual_seed(0))))
    ones = [type(layer)(*(torch.ones_like(mask) for mask in layer)) for layer in layers]
    for place, layer in enumerate(ones):
        for name in layer._fields:
            holed = getattr(layer, name).clone()
            holed[..., ::2] = 0
            changed = [*ones]
            changed[place] = layer._replace(**{name: holed})
            assert (head(features, given(changed)) - first).abs().max() > 1e-5, (place, name)


@EACH
@BOTH
def test_other_studies_order_and_numbering_do_not_matter(make_features, only, options, views) -> None:
    head, features = make(views, **options), make_features(7, study=STUDY, view=VIEW)
    logits, maps = head(features).detach(), head.attention(features).detach()
    others = make_features(7, study=STUDY, view=[3, 0, 3, 3, 0, 3, 3], seed=9)
    mine = [1, 4]
    for one, other in zip(features, others, strict=True):
        if isinstance(one, torch.Tensor):
            other[mine] = one[mine]
    torch.testing.assert_close(head(others)[mine], logits[mine], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(head.attention(others)[mine], maps[mine], atol=1e-6, rtol=1e-6)
    order = [5, 3, 1, 0, 6, 2, 4]
    turned = only(features, order)._replace(study=torch.tensor([3, 2, 0, 1])[features.study[order]])
    torch.testing.assert_close(head(turned), logits[order], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(head.attention(turned), maps[order], atol=1e-6, rtol=1e-6)


@EACH
def test_one_image_to_a_study_and_no_view_embedding_is_the_single_view_decoder(make_features, options) -> None:
    single, several = make("single", **options), make("memory", **options)
    features = make_features(7, study=[3, 1, 0, 6, 5, 4, 2], view=VIEW)
    state = several.state_dict()
    assert set(state) - set(single.state_dict()) == {"view_embed.weight"}
    single.load_state_dict({name: value for name, value in state.items() if name != "view_embed.weight"})
    nn.init.zeros_(several.view_embed.weight)
    torch.testing.assert_close(several(features), single(features), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(several.attention(features), single.attention(features), atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(*(by_layer(head, features) for head in (single, several)), strict=True):
        assert torch.equal(ours.attention, theirs.attention)
        assert torch.equal(ours.hidden[features.study], theirs.hidden)


def test_all_images_of_a_study_get_one_answer_to_the_last_bit_in_training_too(make_features) -> None:
    head, features = make("memory", dropout=0.3, decoder_layers=2), make_features(7, study=STUDY, view=VIEW)
    for masks in (None, head.draw_masks(features, torch.Generator().manual_seed(0))):
        logits = head(features, masks)
        assert torch.equal(logits[0], logits[2])
        assert torch.equal(logits[0], logits[5])
        assert torch.equal(logits[1], logits[4])
        assert not torch.equal(logits[0], logits[1])


def test_rounding_that_differs_from_row_to_row_does_not_part_a_study(make_features) -> None:
    head, features = make("memory"), make_features(7, study=STUDY, view=VIEW)
    head.decoder.register_forward_hook(lambda module, given, logits: logits + 1e-7 * torch.arange(7)[:, None])
    logits = head(features)
    assert torch.equal(logits[0].expand(3, -1), logits[[0, 2, 5]])


def test_the_second_view_matters_and_so_does_its_kind(make_features) -> None:
    """Defect C9: the released decoder took the first view and left the second unread."""
    head, features = make("memory"), make_features(7, study=STUDY, view=VIEW)
    logits = head(features)
    patches = features.patches.clone()
    patches[4] += 1
    assert (head(features._replace(patches=patches)) - logits)[1].abs().max() > 1e-3
    view = features.view.clone()
    view[4] = 0
    assert (head(features._replace(view=view)) - logits)[1].abs().max() > 1e-3
    assert (head(features._replace(study=torch.arange(7))) - logits)[1].abs().max() > 1e-3
    for part in ("study", "view"):
        with pytest.raises(AssertionError, match=part):
            head(features._replace(**{part: None}))


def test_options_leave_the_rest_as_it_starts() -> None:
    options = DecoderOptions(cls_memory=True, positions="sincos", temperature=True, pyramid=True)
    torch.manual_seed(1)
    plain = MLDecoder(DIM, BLOCKS, FINDINGS, WIDTH, 12, HEADS).state_dict()
    torch.manual_seed(1)
    rich = MLDecoder(DIM, BLOCKS, FINDINGS, WIDTH, 12, HEADS, options=options).state_dict()
    assert all(torch.equal(rich[name], value) for name, value in plain.items())


def test_a_temperature_starts_at_one_and_sharpens(make_features) -> None:
    torch.manual_seed(1)
    head = build_head(replace(CONFIG, attention_temperature=True))
    plain, features = make(), make_features(4)
    plain.load_state_dict({n: v for n, v in head.state_dict().items() if ".temperature." not in n})
    torch.testing.assert_close(head(features), plain(features), atol=1e-6, rtol=1e-6)
    nn.init.constant_(head.decoder.temperature.output.bias, 2.0)
    assert (head.attention(features).amax(dim=(2, 3)) > plain.attention(features).amax(dim=(2, 3))).all()


def test_positions_tell_places_apart_and_not_resolutions(make_features) -> None:
    head, features = make(positions="sincos"), make_features(3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    moved = features._replace(patches=features.patches[:, order])
    assert (head(moved) - head(features)).abs().max() > 1e-3
    assert torch.allclose(make()(moved), make()(features), atol=1e-6)


def test_shared_output_scores_findings_it_was_never_built_for(make_features) -> None:
    options = {"text_dim": 7, "shared_output": True, "cls_memory": True}
    head, features = make(**options), make_features(4)
    seen = head.decoder.text_queries.vectors
    wider = build_head(replace(CONFIG, **options, findings=7), torch.cat([seen, torch.randn(2, 7)]))
    state = {name: value for name, value in head.state_dict().items() if not name.endswith("text_queries.vectors")}
    missing, unexpected = wider.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["decoder.text_queries.vectors"], [])
    logits = wider(features)
    torch.testing.assert_close(logits[:, :FINDINGS], head(features), atol=1e-6, rtol=1e-6)
    assert (logits[:, 5] - logits[:, 6]).abs().max() > 1e-3
    assert head.bias.shape == (1,)


@pytest.mark.parametrize("learnable", [False, True])
def test_text_vectors_are_kept_trained_where_asked_and_never_guessed(make_features, learnable: bool) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(FINDINGS, 7)
    head = build_head(replace(CONFIG, text_dim=7, learnable_queries=learnable), vectors)
    assert torch.equal(head.state_dict()["decoder.text_queries.vectors"], vectors)
    trained = {name for name, parameter in head.named_parameters() if parameter.requires_grad}
    assert ("decoder.text_queries.vectors" in trained) == learnable
    assert "decoder.query_embed.weight" not in head.state_dict()
    forgotten = build_head(replace(CONFIG, text_dim=7, learnable_queries=learnable))
    assert forgotten(make_features(2)).isnan().all()
    for wrong in (vectors[:4], vectors[:, :6], vectors.clone().fill_(torch.nan)):
        with pytest.raises(ConfigError, match="in their order"):
            build_head(replace(CONFIG, text_dim=7), wrong)
    with pytest.raises(ConfigError, match="without text queries"):
        build_head(CONFIG, vectors)


@pytest.mark.parametrize(("findings", "groups"), [(5, 2), (5, 4), (40, 7), (5, 9)])
def test_groups_count_as_ml_decoder_counts(make_features, findings: int, groups: int) -> None:
    """Alibaba-MIIL/ML_Decoder: queries are at most the classes, each serves int(classes / queries + 0.999)."""
    head = build_head(replace(CONFIG, findings=findings, query_groups=groups))
    queries = min(groups, findings)
    assert head.decoder.query_embed.weight.shape == (queries, WIDTH)
    assert head.decoder.duplicate_pooling.shape == (queries, WIDTH, int(findings / queries + 0.999))
    assert head.decoder.duplicate_pooling_bias.shape == (findings,)
    features = make_features(3)
    assert head(features).shape == (3, findings)
    maps, factor = head.attention(features), math.ceil(findings / queries)
    assert torch.equal(maps[:, 0], maps[:, factor - 1])
    assert factor == 1 or not torch.equal(maps[:, 0], maps[:, factor])


def test_bf16_is_near_and_returns_float32(make_features) -> None:
    features = make_features(7, study=STUDY, view=VIEW)
    for views in ("single", "memory"):
        head = make(views, **OPTIONS["all"])
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(features)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, head(features), atol=0.15, rtol=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"decoder_layers": 0}, {"query_groups": 0}, {"positions": "sincos", "decoder_dim": 6},
        {"query_groups": 2, "shared_output": True}, {"query_groups": 2, "text_dim": 3},
    ],
)  # fmt: skip
def test_impossible_options_are_refused(options) -> None:
    with pytest.raises(ConfigError):
        build_head(replace(CONFIG, **options))


def test_parameters_of_options_at_full_size() -> None:
    """Beside method.md 4.3's 8,692,776 trained parameters of ViT-L, n = 4, width 768."""

    def count(**options) -> int:
        with torch.device("meta"):
            head = build_head(HeadConfig("ml_decoder", 1024, 40, 4, **options))
        return sum(parameter.numel() for parameter in head.parameters() if parameter.requires_grad)

    plain = count()
    assert plain == 8_692_776
    assert count(decoder_layers=2) - plain == 4 * 768 * 769 + 768 * 2048 + 2048 + 2048 * 768 + 768 + 6 * 768
    assert count(cls_memory=True) - plain == count(pyramid=True) - plain == 768 * 4097
    assert count(attention_temperature=True) - plain == 192 * 769 + 193
    assert count(positions="sincos") == plain
    assert count(views="memory") - plain == 4 * 768
    assert plain - count(shared_output=True) == 39 * 769
    assert count(text_dim=384) - plain == 385 * 768
    assert plain - count(query_groups=20) == 0  # 20 rows twice as many outputs; the queries are not trained
