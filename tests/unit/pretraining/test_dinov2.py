"""Which tokens meet in which loss, what learns and what does not, and the EMA."""

import dataclasses
import importlib.util
import math
from typing import Any

import pytest
import torch

from hilum.backbones.vit import ViTConfig
from hilum.core.errors import ConfigError
from hilum.pretraining import dinov2, prototype_loss
from hilum.pretraining.dinov2 import Batch, HeadConfig, LossConfig, Network
from hilum.pretraining.projection import Projection
from hilum.pretraining.prototype_loss import Assignment

TINY = ViTConfig(16, 2, 2, patch_size=4, image_size=16, registers=1, layer_scale=1.0)
HEADS = HeadConfig(prototypes=12, hidden=16, dino_bottleneck=8, ibot_bottleneck=6)
IMAGES, LOCALS, PATCHES = 3, 4, 16


@pytest.fixture
def networks() -> tuple[Network, Network]:
    return dinov2.make_networks(TINY, HEADS, seed=0)


def make_batch(masked_crops: int = IMAGES, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(2 * IMAGES, PATCHES, dtype=torch.bool)
    for crop in range(masked_crops):
        masks[crop, torch.randperm(PATCHES, generator=generator)[: 2 + crop]] = True
    counts = masks.sum(dim=1)
    return Batch(
        torch.randn(2 * IMAGES, 1, 16, 16, generator=generator),
        torch.randn(LOCALS * IMAGES, 1, 8, 8, generator=generator),
        masks,
        masks.flatten().nonzero().flatten(),
        torch.repeat_interleave(1 / counts.clamp_min(1), counts),
    )


def step(networks: tuple[Network, Network], batch: Batch, config: LossConfig = LossConfig()) -> dinov2.Losses:  # noqa: B008
    student, teacher = networks
    taught = dinov2.teacher_forward(teacher, batch)
    centres = dinov2.make_centres(HEADS.prototypes, torch.device("cpu"))
    targets = dinov2.teacher_targets(taught, centres, 0.05, config)
    return dinov2.compute_losses(student(batch, 0.0, None), targets, batch, config)


def test_student_and_teacher_start_equal_and_only_the_student_learns(networks: tuple[Network, Network]) -> None:
    student, teacher = networks
    assert list(student.state_dict()) == list(teacher.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    step(networks, make_batch()).total.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_seed_decides_the_start_and_no_global_generator_moves() -> None:
    before = torch.get_rng_state()
    first, again, other = (dinov2.make_networks(TINY, HEADS, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.backbone.pos_embed, again.backbone.pos_embed)
    assert not torch.equal(first.backbone.pos_embed, other.backbone.pos_embed)


def test_rows_of_the_student(networks: tuple[Network, Network]) -> None:
    student, _ = networks
    batch = make_batch()
    said = student(batch, 0.0, None)
    globals_, locals_ = student.backbone.forward_crops([batch.global_crops, batch.local_crops], [batch.masks, None])
    cls = student.dino_head(torch.cat([globals_.cls, locals_.cls]))
    patches = student.ibot_head(globals_.patches[batch.masks])  # boolean indexing is row-major, as the weights are
    torch.testing.assert_close(said.cls.features, cls.features)
    torch.testing.assert_close(said.patches.features, patches.features)
    assert said.global_cls.shape == (2 * IMAGES, 16)


def test_the_teacher_sees_no_mask_and_no_local_crop(networks: tuple[Network, Network]) -> None:
    _, teacher = networks
    batch = make_batch()
    changed = batch._replace(local_crops=batch.local_crops + 1)
    torch.testing.assert_close(
        dinov2.teacher_forward(teacher, batch), dinov2.teacher_forward(teacher, changed), rtol=0, atol=0
    )
    tokens = teacher.backbone(batch.global_crops)
    torch.testing.assert_close(
        dinov2.teacher_forward(teacher, batch).patches.logits(),
        teacher.ibot_head(tokens.patches[batch.masks]).logits(),
    )


def test_masked_pixels_do_not_reach_the_student(networks: tuple[Network, Network]) -> None:
    student, _ = networks
    batch = make_batch()
    pixels = batch.masks.view(-1, 1, 4, 4).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    painted = batch._replace(global_crops=torch.where(pixels, 9.0, batch.global_crops))
    torch.testing.assert_close(
        student(batch, 0.0, None).global_cls, student(painted, 0.0, None).global_cls, rtol=0, atol=0
    )


def test_uniform_networks_give_the_published_initial_values(networks: tuple[Network, Network]) -> None:
    student, teacher = networks
    for network in networks:
        for head in (network.dino_head, network.ibot_head):
            with torch.no_grad():
                head.last_layer.weight_g.zero_()
    losses = step((student, teacher), make_batch())
    log_k = math.log(HEADS.prototypes)
    pairs = 2 + 2 * LOCALS
    assert losses.dino_local.item() == pytest.approx(2 * LOCALS / pairs * log_k, rel=1e-5)
    assert losses.dino_global.item() == pytest.approx(2 / pairs * log_k, rel=1e-5)
    assert losses.ibot.item() == pytest.approx(log_k / 2, rel=1e-5)
    weighted = losses.dino_local + losses.dino_global + 3 * losses.ibot + 0.1 * losses.koleo
    assert losses.total.item() == pytest.approx(weighted.item(), rel=1e-6)


@pytest.mark.parametrize("centering", ["sinkhorn", "centre"])
@pytest.mark.parametrize("masked_crops", [0, IMAGES])
def test_step_with_and_without_masks(
    networks: tuple[Network, Network], centering: dinov2.Centering, masked_crops: int
) -> None:
    losses = step(networks, make_batch(masked_crops), LossConfig(centering=centering))
    losses.total.backward()
    assert all(torch.isfinite(value) for value in losses)
    assert (losses.ibot.item() > 0) == (masked_crops > 0)
    assert all(torch.isfinite(parameter.grad).all() for parameter in networks[0].parameters())


def test_no_local_crops(networks: tuple[Network, Network]) -> None:
    batch = make_batch()
    losses = step(networks, batch._replace(local_crops=batch.local_crops[:0]))
    assert losses.dino_local.item() == 0.0
    assert losses.dino_global.item() > 0.0


def test_chunks_change_nothing(networks: tuple[Network, Network]) -> None:
    student, _ = networks
    found = []
    for chunk in (0, 2):
        losses = step(networks, make_batch(), LossConfig(chunk=chunk))
        student.zero_grad()
        losses.total.backward()
        found.append([losses.total.detach(), *[parameter.grad.clone() for parameter in student.parameters()]])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("centering", ["sinkhorn", "centre"])
@pytest.mark.parametrize("masked_crops", [0, IMAGES])
def test_chunked_losses_are_the_plain_ones(
    networks: tuple[Network, Network], centering: dinov2.Centering, masked_crops: int
) -> None:
    student, teacher = networks
    batch = make_batch(masked_crops)
    batch = batch._replace(  # two rows that only fill the batch up
        masked=torch.cat([batch.masked, torch.tensor([0, 5])]),
        mask_weights=torch.cat([batch.mask_weights, torch.zeros(2)]),
    )
    with torch.no_grad():
        for network in networks:
            for head in (network.dino_head, network.ibot_head):
                head.last_layer.weight_g.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(3))
    centres = dinov2.Centres(torch.linspace(-0.1, 0.1, 12), torch.linspace(0.2, 0, 12))
    found = []
    for form, chunk in (("plain", 0), ("chunked", 0), ("chunked", 3)):
        config = LossConfig(centering=centering, prototype_loss=form, chunk=chunk)  # type: ignore[arg-type]
        taught = dinov2.teacher_forward(teacher, batch)
        targets = dinov2.teacher_targets(taught, centres, 0.05, config)
        assert isinstance(targets.cls, Assignment) == (form == "chunked")
        losses = dinov2.compute_losses(student(batch, 0.0, None), targets, batch, config)
        student.zero_grad()
        losses.total.backward()
        gradients = [parameter.grad.clone() for parameter in student.parameters()]
        found.append([*[loss.detach() for loss in losses], *dinov2.health(taught, targets).values(), *gradients])
    for other in found[1:]:
        for left, right in zip(found[0], other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5 * max(1.0, float(left.abs().max())))


def test_large_matrices_are_never_made_by_default(
    networks: tuple[Network, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, teacher = networks
    taught = dinov2.teacher_forward(teacher, make_batch())
    assert dinov2.prototype_method(LossConfig(), taught) == "plain"
    monkeypatch.setattr(dinov2, "_LARGE", 2 * IMAGES * HEADS.prototypes)
    assert dinov2.prototype_method(LossConfig(), taught) == "chunked"
    assert dinov2.prototype_method(LossConfig(prototype_loss="plain"), taught) == "plain"
    with pytest.raises(ConfigError, match=r"prototype_loss=triton.*CUDA"):
        dinov2.prototype_method(LossConfig(prototype_loss="triton"), taught)


def test_losses_are_float32_under_autocast(networks: tuple[Network, Network]) -> None:
    exact = step(networks, make_batch())
    with torch.autocast("cpu", torch.bfloat16):
        losses = step(networks, make_batch())
    assert all(value.dtype == torch.float32 for value in losses)
    assert losses.total.item() == pytest.approx(exact.total.item(), rel=0.05)


def test_teacher_moves_by_the_momentum(networks: tuple[Network, Network]) -> None:
    student, teacher = networks
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    before = [parameter.clone() for parameter in teacher.parameters()]
    dinov2.update_teacher(teacher, student, 0.75)
    for old, new, other in zip(before, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * other)
    dinov2.update_teacher(teacher, student, 1.0)
    torch.testing.assert_close(next(teacher.parameters()), 0.75 * before[0] + 0.25 * next(student.parameters()))


def test_a_skipped_step_leaves_the_teacher_bit_for_bit(networks: tuple[Network, Network]) -> None:
    student, teacher = networks
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    before = [parameter.clone() for parameter in teacher.parameters()]
    dinov2.update_teacher(teacher, student, 0.75, skip=torch.tensor(0))
    for old, new, other in zip(before, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new, torch.lerp(old, other, 0.25), rtol=0, atol=1e-7)
    moved = [parameter.clone() for parameter in teacher.parameters()]
    with torch.no_grad():
        next(student.parameters()).fill_(torch.nan)
    dinov2.update_teacher(teacher, student, 0.75, skip=torch.tensor(1))
    assert all(torch.equal(old, new) for old, new in zip(moved, teacher.parameters(), strict=True))


def test_each_part_is_clipped_by_itself(networks: tuple[Network, Network]) -> None:
    student, _ = networks
    for part, value in zip(dinov2.PARTS, (10.0, 1e-3, 10.0), strict=True):
        for parameter in getattr(student, part).parameters():
            parameter.grad = torch.full_like(parameter, value)
    before = {
        part: math.sqrt(sum(parameter.grad.square().sum().item() for parameter in getattr(student, part).parameters()))
        for part in dinov2.PARTS
    }
    norms = dinov2.clip_gradients(student, 3.0)
    for part in dinov2.PARTS:
        assert norms[part].item() == pytest.approx(before[part], rel=1e-5)
        after = math.sqrt(sum(p.grad.square().sum().item() for p in getattr(student, part).parameters()))
        assert after == pytest.approx(min(before[part], 3.0), rel=1e-4)
    assert dinov2.clip_gradients(student, 0.0)["backbone"].item() == pytest.approx(3.0, rel=1e-4)
    assert next(student.backbone.parameters()).grad.abs().sum() > 0


def test_training_the_student_on_one_batch_lowers_the_loss(networks: tuple[Network, Network]) -> None:
    student, teacher = networks
    batch, config = make_batch(), LossConfig(koleo=0.0)
    targets = dinov2.teacher_targets(
        dinov2.teacher_forward(teacher, batch), dinov2.make_centres(12, torch.device("cpu")), 0.05, config
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    totals = []
    for _ in range(30):
        losses = dinov2.compute_losses(student(batch, 0.0, None), targets, batch, config)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        totals.append(losses.total.item())
    assert totals[-1] < 0.8 * totals[0]


def test_health_tells_a_collapse_from_spread_features() -> None:
    generator = torch.Generator().manual_seed(0)
    spread, uniform = torch.randn(64, 8, generator=generator), torch.full((64, 10), 0.1)
    hard = torch.zeros(64, 10)
    hard[..., 3] = 1.0
    none = Projection(spread, spread)  # health looks at targets, not at what they were made of
    good = dinov2.health(dinov2.TeacherOutput(none, none, spread), dinov2.Targets(uniform, uniform[:32]))
    flat = torch.ones(64, 8) + 1e-4 * spread[:, :1] * torch.ones(8)
    bad = dinov2.health(dinov2.TeacherOutput(none, none, flat), dinov2.Targets(hard, hard[:0]))
    assert good["cls_prototype_usage"].item() == pytest.approx(1.0)
    assert good["patch_target_entropy"].item() == pytest.approx(1.0)
    assert good["teacher_effective_rank"].item() > 7
    assert good["teacher_feature_deviation"].item() == pytest.approx(1.0, abs=0.1)
    assert bad["cls_prototype_usage"].item() == pytest.approx(0.0, abs=1e-6)
    assert bad["cls_target_entropy"].item() == pytest.approx(0.0, abs=1e-6)
    assert bad["patch_prototype_usage"].item() == 0.0
    assert bad["teacher_effective_rank"].item() < 1.5
    assert bad["teacher_feature_deviation"].item() < 1e-3


@pytest.mark.parametrize(
    "setting",
    [
        {"koleo_group": 1}, {"koleo_group": -2}, {"chunk": -1}, {"sinkhorn_iterations": 0}, {"dino": -1.0},
        {"ibot": math.nan}, {"koleo": -0.1}, {"student_temperature": 0.0}, {"centre_momentum": 1.1},
    ],
)  # fmt: skip
def test_unusable_loss_settings_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        LossConfig(**setting)


def test_unusable_head_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="prototypes"):
        dataclasses.replace(HEADS, prototypes=0)


def test_fused_kernels_are_used_only_where_they_agree(
    networks: tuple[Network, Network], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a device that looks like a GPU, with kernels that work, crash, or compute something else."""
    pretended = torch.device("cuda:0")
    real, fault = prototype_loss._example, ""

    def example(device: torch.device, method: prototype_loss.Method) -> tuple[torch.Tensor, ...]:
        loss, *gradients = real(torch.device("cpu"), "chunked")
        if method == "triton" and fault == "crash":
            raise RuntimeError("no kernel image is available\nfor this device")
        return (loss, *(gradient * (1.1 if method == "triton" and fault == "wrong" else 1.0) for gradient in gradients))

    monkeypatch.setattr(prototype_loss, "_example", example)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    expected = {
        "": "", "crash": "RuntimeError: no kernel image is available",
        "wrong": "on a small example they differ from plain PyTorch by 0.1, relative",
    }  # fmt: skip
    for fault in expected:  # `example` reads it
        prototype_loss.triton_failure.cache_clear()
        assert prototype_loss.triton_failure(pretended) == expected[fault]
    assert prototype_loss.triton_failure(torch.device("cpu")) == "they need a CUDA device"
    prototype_loss.triton_failure.cache_clear()


def test_the_example_of_the_kernels_says_the_same_as_the_plain_losses() -> None:
    with torch.no_grad():  # as where it is asked for first: among the teacher's targets
        loss, features, prototypes = prototype_loss._example(torch.device("cpu"), "chunked")
    assert 0 < loss.item() < 10
    assert features.shape == (100, 64)
    assert prototypes.shape == (300, 64)
    assert min(features.norm().item(), prototypes.norm().item()) > 0
