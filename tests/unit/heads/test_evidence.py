"""Maps of heads: what is taken apart adds up again, in float64 and by other ways of computing it."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from hilum.backbones.contributions import cls_contributions
from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.heads.evidence import as_maps, kind_of_maps, linear_terms, maps_of
from hilum.heads.extension import ExtendedHead
from hilum.heads.features import Features
from hilum.heads.registry import HeadConfig, build_head

DIM, BLOCKS, FINDINGS = 16, 2, 3
STUDY, VIEW = [0, 1, 0, 2, 1, 0, 3], [0, 2, 2, 1, 3, 1, 0]


@pytest.fixture(scope="module", params=["mlp", "swiglu"])
def backbone(request) -> VisionTransformer:
    torch.manual_seed(0)
    config = ViTConfig(DIM, 3, 2, patch_size=8, image_size=32, layer_scale=0.7, registers=2, feed_forward=request.param)
    made = VisionTransformer(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(7, 1, 32, 24, generator=torch.Generator().manual_seed(1))


def features_of(backbone: VisionTransformer, images: torch.Tensor, blocks: int = BLOCKS) -> Features:
    with torch.no_grad():
        tokens = backbone.intermediate(images, blocks)
    return Features(
        torch.cat([one.cls for one in tokens], dim=1), tokens[-1].patches.mean(dim=1),
        torch.cat([one.patches for one in tokens], dim=2), (4, 3), torch.tensor(STUDY), torch.tensor(VIEW),
    )  # fmt: skip


def make(name: str, seed: int = 3, **settings):
    torch.manual_seed(seed)
    head = build_head(HeadConfig(name, DIM, FINDINGS, BLOCKS, decoder_dim=8, decoder_feed_forward=8, decoder_heads=2,
                                 **settings))  # fmt: skip
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head.eval()


def softmax(values: np.ndarray) -> np.ndarray:
    raised = np.exp(values - values.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def test_contributions_are_the_attention_written_out_in_float64(backbone, images) -> None:
    """Another derivation: residual streams from hooks, attention by numpy, one token, head and block at a time."""
    inputs, outputs = [], []
    hooks = [block.register_forward_hook(lambda *call: inputs.append(call[1][0])) for block in backbone.blocks]
    hooks += [block.register_forward_hook(lambda *call: outputs.append(call[2])) for block in backbone.blocks]
    with torch.no_grad():
        tokens = backbone.intermediate(images, BLOCKS)
    [hook.remove() for hook in hooks]
    directions = torch.randn(4, BLOCKS * DIM, generator=torch.Generator().manual_seed(2))
    found = cls_contributions(backbone, images, directions, BLOCKS)
    torch.testing.assert_close(found.tokens.patches, tokens[-1].patches, atol=1e-5, rtol=1e-5)

    numbers = {name: value.detach().double().numpy() for name, value in backbone.named_parameters()}
    length, heads = 1 + 2 + 12, 2
    expected = np.zeros((7, 4, length))
    for last in range(BLOCKS):
        depth = 3 - BLOCKS + last
        cls = outputs[depth].double().numpy().reshape(7, length, DIM)[:, 0]
        deviation = np.sqrt(cls.var(axis=1) + 1e-6)
        weight = directions.double().numpy()[:, last * DIM : (last + 1) * DIM] * numbers["norm.weight"]
        weight = weight - weight.mean(axis=1, keepdims=True)
        for index in range(depth + 1):
            x = inputs[index].double().numpy().reshape(7, length, DIM)
            part = {
                name.split(".", 2)[2]: value for name, value in numbers.items() if name.startswith(f"blocks.{index}.")
            }
            normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            normed = normed * part["norm1.weight"] + part["norm1.bias"]
            q, k, v = np.split(normed @ part["attn.qkv.weight"].T + part["attn.qkv.bias"], 3, axis=2)
            for head in range(heads):
                own = slice(head * DIM // heads, (head + 1) * DIM // heads)
                scores = softmax(np.einsum("be,bse->bs", q[:, 0, own], k[:, :, own]) / np.sqrt(DIM / heads))
                for token in range(length):
                    added = (scores[:, token, None] * v[:, token, own]) @ part["attn.proj.weight"][:, own].T
                    expected[:, :, token] += (added * part["ls1.gamma"]) @ weight.T / deviation[:, None]
    np.testing.assert_allclose(found.values.numpy(), expected, atol=2e-4, rtol=2e-4)


def test_all_parts_of_a_linear_logit_add_up_to_it(backbone, images) -> None:
    """What attention adds, what else is added, and the biases, are the logit: nothing is counted twice or lost."""
    streams, attended = [], []
    hooks = [block.register_forward_hook(lambda *call: streams.append(call[2])) for block in backbone.blocks]
    hooks += [block.ls1.register_forward_hook(lambda *call: attended.append(call[2])) for block in backbone.blocks]
    features = features_of(backbone, images)
    [hook.remove() for hook in hooks]
    head = make("linear", patch_mean=True)
    directions = head.directions()[0]
    values = cls_contributions(backbone, images, directions[:, : BLOCKS * DIM], BLOCKS).values.double()
    rest = torch.zeros(7, FINDINGS, dtype=torch.double)
    gain, shift = backbone.norm.weight.double(), backbone.norm.bias.double()
    for last in range(BLOCKS):
        depth = 3 - BLOCKS + last
        weight = directions[:, last * DIM : (last + 1) * DIM].double()
        cls = streams[depth].double().view(7, 15, DIM)[:, 0]
        other = cls - sum(
            attended[index].double().view(7, 15, DIM)[:, 0]
            - (backbone.blocks[index].attn.proj.bias * backbone.blocks[index].ls1.gamma).double()
            for index in range(depth + 1)
        )
        deviation = (cls.var(dim=1, unbiased=False) + 1e-6).sqrt()
        rest += ((other - other.mean(dim=1, keepdim=True)) / deviation[:, None] * gain) @ weight.T + shift @ weight.T
    mean = features.patch_mean.double() @ directions[:, BLOCKS * DIM :].double().T
    logits = values.sum(dim=2) + rest + mean + head.bias.double()
    torch.testing.assert_close(logits.detach(), head(features).double().detach(), atol=2e-4, rtol=2e-4)


def test_mean_patch_tokens_are_class_activation_exactly(backbone, images) -> None:
    head = make("linear", patch_mean=True)
    with torch.no_grad():
        head.linear.weight[:, : BLOCKS * DIM] = 0
    features = features_of(backbone, images)
    [evidence] = linear_terms(head, features, backbone, images).unbind(dim=1)
    torch.testing.assert_close(evidence.sum(dim=2) + head.bias, head(features), atol=1e-4, rtol=1e-4)
    weight, last = head.linear.weight[:, BLOCKS * DIM :], features.patches[:, :, -DIM:]
    torch.testing.assert_close(evidence, (last @ weight.T).transpose(1, 2) / 12, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("views", ["single", "concat", "set"])
def test_shares_of_images_make_the_mean_logit_of_a_study(backbone, images, views) -> None:
    """With [CLS] and mean patches whole in place of their patches: sum over a study of share . direction . own."""
    head, features = make("linear", patch_mean=True, views=views), features_of(backbone, images)
    own = torch.cat([features.cls, features.patch_mean], dim=1)
    each = torch.einsum("bi,rci,br->bc", own, head.directions(), head.share_of_image(features))
    logits = head(features)
    for study in set(STUDY):
        rows = [place for place, one in enumerate(STUDY) if one == study]
        absent = torch.zeros(FINDINGS)
        if views == "set":
            groups = {0: 0, 1: 0, 2: 1, 3: 2}
            missing = {0, 1, 2} - {groups[VIEW[row]] for row in rows}
            absent = sum((head.directions()[1 + group] @ head.absent[group] for group in missing), absent)
        total = (each[rows].mean(dim=0) if views == "single" else each[rows].sum(dim=0)) + absent + head.bias
        torch.testing.assert_close(total, logits[rows].mean(dim=0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weight", [0.1, 3.0])
def test_evidence_of_csra_adds_up_to_the_logit(backbone, images, weight) -> None:
    head = make("csra", csra_lambda=weight, csra_temperatures=(1.0, 4.0, 99.0))
    features = features_of(backbone, images)
    torch.testing.assert_close(head.evidence(features).sum(dim=2) + head.bias, head(features), atol=1e-3, rtol=1e-4)


HEADS = [
    ("linear", {}), ("linear", {"patch_mean": True}), ("linear", {"views": "concat"}),
    ("linear", {"views": "set", "patch_mean": True}), ("linear", {"views": "attention"}), ("csra", {}),
    ("csra", {"views": "attention"}), ("ml_decoder", {}), ("ml_decoder", {"views": "memory"}),
    ("ml_decoder", {"views": "attention"}),
]  # fmt: skip


NAMES = [f"{name}-{'-'.join(map(str, settings.values()))}" for name, settings in HEADS]


@pytest.mark.parametrize(("name", "settings"), HEADS, ids=NAMES)
def test_every_head_has_maps_that_sum_to_one(backbone, images, name, settings) -> None:
    head, features = make(name, **settings), features_of(backbone, images)
    maps = maps_of(head, features, backbone, images)
    assert maps.shape == (7, FINDINGS, 4, 3)
    assert (maps >= 0).all()
    sums = maps.sum(dim=(2, 3))
    if head.needs_studies:
        sums = torch.stack([sums[torch.tensor(STUDY) == study].sum(dim=0) for study in range(4)])
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=1e-5)
    assert float(maps.std()) > 0
    # Other studies in the batch change nothing.
    rows = [0, 2, 5]
    alone = features._replace(**{key: value[rows] for key, value in features._asdict().items() if key in
                                 ("cls", "patch_mean", "patches", "study", "view")})  # fmt: skip
    torch.testing.assert_close(maps_of(head, alone, backbone, images[rows]), maps[rows], atol=1e-5, rtol=1e-4)


def test_heads_of_other_kinds_have_the_maps_that_they_say_they_have(backbone, images) -> None:
    """As docs/how-to/add-a-head.md has it: `attention`, `evidence`, or neither."""
    features, mean = features_of(backbone, images)._replace(study=None, view=None), make("linear")

    class Other(nn.Module):
        needs_patches, needs_studies = True, False
        bias = mean.bias

    plain = maps_of(Other(), features, backbone, images)
    assert plain.shape == (7, FINDINGS, 4, 3)
    assert plain.isnan().all()

    class Terms(Other):
        def evidence(self, features: Features) -> torch.Tensor:
            return features.patches[:, :, :FINDINGS].transpose(1, 2)

    blank = features_of(backbone, torch.zeros_like(images[:1])).patches[:, :, :FINDINGS].transpose(1, 2)
    expected = as_maps(features.patches[:, :, :FINDINGS].transpose(1, 2) - blank).unflatten(-1, (4, 3))
    torch.testing.assert_close(maps_of(Terms(), features, backbone, images), expected, atol=1e-5, rtol=1e-4)


def test_constants_that_a_bias_could_hold_do_not_move_a_map() -> None:
    evidence = torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(0))
    shifted = evidence + torch.tensor([5.0, -7.0, 0.3])[:, None, None]
    torch.testing.assert_close(as_maps(shifted), as_maps(evidence), atol=1e-5, rtol=1e-5)
    assert as_maps(torch.full((1, 1, 4), 3.0)).tolist() == [[[0.25] * 4]]
    same = torch.tensor([[True, True], [True, True]])
    assert as_maps(torch.zeros(2, 1, 4), same).tolist() == [[[0.125] * 4]] * 2
    one_sided = torch.zeros(2, 1, 4)
    one_sided[1, 0, 2] = 1
    maps = as_maps(one_sided, same)
    assert maps[0].abs().sum() == 0
    assert maps[1, 0].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("name", ["linear", "csra"])
def test_what_a_place_adds_to_a_blank_image_is_no_evidence(backbone, images, name) -> None:
    """Maps of a blank image are even, and a constant of the place (a position) in the tokens moves no map."""
    head, features = make(name, **({"patch_mean": True} if name == "linear" else {})), features_of(backbone, images)
    blank = torch.zeros_like(images)
    even = maps_of(head, features_of(backbone, blank), backbone, blank)
    torch.testing.assert_close(even, torch.full_like(even, 1 / 12), atol=1e-6, rtol=1e-5)
    if name == "csra":
        plain = as_maps(head.evidence(features)).unflatten(-1, (4, 3))
        assert not torch.allclose(maps_of(head, features, backbone, images), plain, atol=1e-3)
        return
    terms = linear_terms(head, features, backbone, images)[:, 0]
    of_blank = linear_terms(head, features, backbone, blank[:1])[:, 0]
    expected = as_maps(terms - of_blank).unflatten(-1, (4, 3))
    torch.testing.assert_close(maps_of(head, features, backbone, images), expected, atol=1e-6, rtol=1e-5)


def test_an_extended_head_has_the_maps_of_its_heads_side_by_side(backbone, images) -> None:
    features = features_of(backbone, images)
    main, decoder, study = make("linear"), make("ml_decoder", 5), make("linear", 6, views="concat")
    head = ExtendedHead(main, [decoder], [FINDINGS, FINDINGS])
    maps = maps_of(head, features, backbone, images)
    torch.testing.assert_close(maps[:, :FINDINGS], maps_of(main, features, backbone, images))
    torch.testing.assert_close(maps[:, FINDINGS:], maps_of(decoder, features, backbone, images))
    mixed = maps_of(ExtendedHead(main, [study], [FINDINGS, FINDINGS]), features, backbone, images).sum(dim=(2, 3))
    of_images, of_study = mixed.split(FINDINGS, dim=1)
    torch.testing.assert_close(of_images, torch.ones_like(of_images), atol=1e-5, rtol=1e-5)
    totals = torch.stack([of_study[torch.tensor(STUDY) == one].sum(dim=0) for one in range(4)])
    torch.testing.assert_close(totals, torch.ones_like(totals), atol=1e-5, rtol=1e-5)
    assert [kind_of_maps(one) for one in (head, decoder, make("csra", views="attention"))] == [
        "evidence", "attention", "evidence",
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "settings"), HEADS, ids=NAMES)
def test_maps_on_a_gpu_are_those_on_the_cpu(backbone, images, name, settings) -> None:
    head, features = make(name, **settings), features_of(backbone, images)
    expected = maps_of(head, features, backbone, images)
    there = Features(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in features))
    try:
        found = maps_of(head.cuda(), there, backbone.cuda(), images.cuda()).cpu()
    finally:
        backbone.cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_planted_patch_is_found(images) -> None:
    """A backbone that copies the brightest patch into [CLS]: the linear head's map is on that patch."""
    torch.manual_seed(0)
    backbone = VisionTransformer(
        dataclasses.replace(ViTConfig(DIM, 1, 1, patch_size=8, image_size=32), layer_scale=1.0)
    )
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
        backbone.patch_embed.proj.weight[0] = 0.05  # channel 0: how bright a patch is
        backbone.cls_token[..., 1] = 3.0
        block = backbone.blocks[0]
        for norm in (block.norm1, block.norm2, backbone.norm):
            norm.weight.fill_(1)
        block.ls1.gamma.fill_(1)
        weight = block.attn.qkv.weight.view(3, DIM, DIM)
        weight[0, 0, 1], weight[1, 0, 0], weight[2, 2, 0] = 1, 1, 1  # [CLS] asks for channel 0, which goes to channel 2
        block.attn.proj.weight.copy_(torch.eye(DIM))
    pictures = torch.zeros(2, 1, 32, 24)
    pictures[0, 0, 8:16, 16:24] = 1
    pictures[1, 0, 24:, :8] = 1
    head = build_head(HeadConfig("linear", DIM, 1, 1))
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.weight[0, 2] = 1
    features = features_of(backbone.eval(), pictures, 1)._replace(study=None, view=None)
    maps = maps_of(head, features, backbone, pictures)[:, 0].flatten(1)
    assert maps.argmax(dim=1).tolist() == [1 * 3 + 2, 3 * 3 + 0]
    assert (maps.max(dim=1).values > 0.9).all()
