"""Alarms on curves: healthy ones stay silent, every planted fault is named, and its advice names real settings."""

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest

from hilum.core.config import to_dict
from hilum.pretraining import alarms as module
from hilum.pretraining.alarms import alarms, initial_losses, probe_guard
from hilum.pretraining.config import PretrainConfig
from hilum.pretraining.crops import CropConfig
from hilum.pretraining.dinov2 import HeadConfig, LossConfig

CONFIG = PretrainConfig(
    architecture="demo16", crops=CropConfig(128, 48, local_crops=4), heads=HeadConfig(prototypes=256),
    batch_size=64, steps=1200, momentum=(0.95, 1.0), teacher_temperature=(0.02, 0.02), log_every=10,
)  # fmt: skip
SHOWN = CONFIG.steps // CONFIG.log_every


def healthy(seed: int = 0, count: int = SHOWN) -> list[dict[str, Any]]:
    """Curves as the laptop recipe has them on real X-rays (measured: first, 60th and last lines of such runs)."""
    rng = np.random.default_rng(seed)
    lines = []

    def noise(size: float = 0.02) -> float:
        return 1 + size * rng.normal()

    for number in range(count):
        step = (number + 1) * CONFIG.log_every
        part = step / CONFIG.steps
        fall = 1 - math.exp(-6 * part)
        lines.append(
            {
                "step": step,
                "loss": (14.4 - 6 * fall) * noise(),
                "dino_local": (4.6 - 0.8 * fall) * noise(0.005),
                "dino_global": (1.16 - 0.2 * fall) * noise(0.005),
                "ibot": (2.67 - 1.7 * fall) * noise(),
                "koleo": 5 - 4 * fall,
                "nearest_distance": (0.08 + 0.6 * fall) * noise(),
                "gradient_norm_backbone": (1.5 + 12 * (1 - fall)) * noise(0.3) ** 2,
                "gradient_norm_dino_head": (0.2 + 7 * (1 - fall)) * noise(0.3) ** 2,
                "gradient_norm_ibot_head": (1.1 + 10 * (1 - fall)) * noise(0.3) ** 2,
                "cls_prototype_usage": 0.999, "patch_prototype_usage": 0.97,
                "cls_target_entropy": 0.9 - 0.1 * fall, "patch_target_entropy": 0.7 - 0.4 * fall,
                "teacher_feature_deviation": 0.37 + 0.5 * fall, "teacher_effective_rank": 11 + 6 * fall,
                "momentum": 1 - 0.05 * (1 + math.cos(math.pi * part)) / 2,
                "damaged_share": 0.0,
            }
        )  # fmt: skip
    return lines


def changed(lines: list[dict[str, Any]], last: int, **columns: Any) -> list[dict[str, Any]]:
    """The last lines with other values."""
    return [line | (columns if number >= len(lines) - last else {}) for number, line in enumerate(lines)]


def names(lines: list[dict[str, Any]], config: PretrainConfig = CONFIG) -> list[str]:
    return [alarm.name for alarm in alarms(lines, config)]


@pytest.mark.parametrize("seed", range(5))
def test_healthy_curves_raise_no_alarm_at_any_line(seed: int) -> None:
    lines = healthy(seed)
    for last in range(len(lines) + 1):
        assert names(lines[:last]) == []


def test_no_lines_and_lines_without_columns_are_silent() -> None:
    assert alarms([], CONFIG) == []
    assert alarms([{"step": 0, "knn_mAP": 0.3}], CONFIG) == []
    assert alarms([{"step": step, "loss": 1.0} for step in range(1, 400)], CONFIG) == []
    assert alarms([{"step": step, "loss": 1.0, "ibot": None} for step in range(1, 400)], CONFIG) == []


@pytest.mark.parametrize("patch_size", [None, 14])
def test_a_network_that_the_weights_decide_is_judged_too(patch_size: int | None) -> None:
    config = dataclasses.replace(CONFIG, architecture="init", patch_size=patch_size)
    assert names(healthy(), config) == []
    assert names(changed(healthy(), 10, patch_prototype_usage=0.1), config) == ["patch_prototypes_collapse"]


@pytest.mark.parametrize("changes", [{"losses": LossConfig(ibot=0.0)}, {"mask_probability": 0.0}])
def test_a_loss_that_is_switched_off_raises_no_alarm(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    idle = changed(
        healthy(), 40, ibot=0.5 * math.log(256), gradient_norm_ibot_head=0.0, patch_target_entropy=1.0,
        patch_prototype_usage=0.0,
    )  # fmt: skip
    assert names(idle, config) == []
    assert len(names(idle)) == 4


PLANTED = [
    ("cls_collapse", {"teacher_effective_rank": 1.02}),
    ("cls_collapse", {"teacher_feature_deviation": 0.004}),
    ("cls_neighbours_meet", {"nearest_distance": 1e-4}),
    ("cls_prototypes_collapse", {"cls_prototype_usage": 0.1}),
    ("patch_prototypes_collapse", {"patch_prototype_usage": 0.1}),
    ("cls_targets_say_nothing", {"cls_target_entropy": 0.9999}),
    ("patch_targets_say_nothing", {"patch_target_entropy": 0.9999}),
    ("losses_flat", {"ibot": 0.5 * math.log(256)}),
    ("losses_flat", {"dino_local": 0.8 * math.log(256)}),
    ("gradient_grows_backbone", {"gradient_norm_backbone": 400.0}),
    ("gradient_grows_ibot_head", {"gradient_norm_ibot_head": 400.0}),
    ("gradient_vanishes_dino_head", {"gradient_norm_dino_head": 1e-5}),
    ("gradient_vanishes_backbone", {"gradient_norm_backbone": 0.0}),
    ("teacher_stands_still", {"momentum": 1.0, "step": 700}),
    ("damaged_images", {"damaged_share": 0.002}),
]


@pytest.mark.parametrize(("name", "columns"), PLANTED, ids=[f"{n}-{next(iter(c))}" for n, c in PLANTED])
def test_a_planted_fault_is_named_after_some_lines_and_clears_after_others(name: str, columns: dict[str, Any]) -> None:
    lines = healthy()
    assert names(changed(lines, module.RECENT, **columns)) == [name]
    assert name not in names(changed(lines, module.RECENT, **columns) + healthy()[-1:])
    if name != "damaged_images":  # a count, not a curve
        assert names(changed(lines, module.RECENT - 1, **columns)) == []


@pytest.mark.parametrize(("name", "columns"), [pair for pair in PLANTED if pair[0] != "damaged_images"])
def test_the_warm_up_is_never_judged(name: str, columns: dict[str, Any]) -> None:
    lines = changed(healthy(count=12), 12, **{key: value for key, value in columns.items() if key != "step"})
    assert lines[-1]["step"] == CONFIG.warmup * CONFIG.steps
    assert names(lines) == []


def test_flat_losses_and_empty_targets_are_given_time_after_the_warm_up() -> None:
    lines = healthy(count=12 + module.FLAT_STEPS // 10 + module.RECENT)
    flat = changed(lines, len(lines), ibot=0.5 * math.log(256), cls_target_entropy=1.0)
    assert names(flat) == ["cls_targets_say_nothing", "losses_flat"]
    assert names(flat[:-1]) == []


def test_one_high_loss_is_a_spike_and_noise_is_none() -> None:
    lines = healthy()
    assert names([*lines[:-1], lines[-1] | {"loss": 3 * lines[-1]["loss"]}]) == ["loss_spike"]
    assert names([*lines[:-1], lines[-1] | {"loss": 1.05 * lines[-1]["loss"]}]) == []
    steady = [line | {"loss": 9.0} for line in lines]  # no scatter at all: a hundredth more is no spike
    assert names([*steady[:-1], steady[-1] | {"loss": 9.09}]) == []


def test_many_prototypes_and_few_rows_are_no_collapse() -> None:
    """131,072 prototypes, 304 images: hard targets that all differ use 608 prototypes, usage 0.54."""
    config = PretrainConfig()
    used = math.log(2 * config.batch_size) / math.log(config.heads.prototypes)
    lines = [line | {"step": 30_000 + line["step"], "momentum": 0.995} for line in healthy()]
    assert used < 0.55
    assert names(changed(lines, 10, cls_prototype_usage=used), config) == []
    five = math.log(5) / math.log(config.heads.prototypes)
    assert names(changed(lines, 10, cls_prototype_usage=five), config) == ["cls_prototypes_collapse"]


def test_the_rank_of_one_image_is_no_collapse() -> None:
    """Two crops of one image span one direction, whatever the teacher says."""
    planted = changed(healthy(), 10, teacher_effective_rank=1.0)
    few = dataclasses.replace(CONFIG, batch_size=4, accumulate=4)
    assert names(planted, few) == []
    assert names(planted, dataclasses.replace(CONFIG, batch_size=4)) == ["cls_collapse"]


def test_a_momentum_that_ends_at_one_is_no_fault() -> None:
    assert names(changed(healthy(), 10, momentum=1.0)) == []


def test_losses_of_uniform_predictions_are_those_of_the_method() -> None:
    """reference values of method.md 2.3 for 2 + 8 crops and K = 131,072."""
    expected = initial_losses(PretrainConfig())
    assert expected["dino_local"] == pytest.approx(10.47, abs=0.01)
    assert expected["dino_global"] == pytest.approx(1.31, abs=0.01)
    assert expected["ibot"] == pytest.approx(5.89, abs=0.01)


def test_the_guard_needs_an_interval_below_zero() -> None:
    probe = {"step": 200, "knn_mAP": 0.3, "knn_change": -0.05, "knn_change_low": -0.09, "knn_change_high": -0.01}
    alarm = probe_guard([{"step": 0, "knn_mAP": 0.35}, probe, {"step": 210, "loss": 1.0}])
    assert alarm is not None
    assert "[-0.090, -0.010]" in str(alarm)
    assert probe_guard([probe, probe | {"step": 400, "knn_change_high": 0.001}]) is None
    assert probe_guard([probe | {"knn_change_high": 0.0}]) is None
    assert names([*healthy(), probe]) == ["features_worse_than_at_start"]


def test_advice_names_settings_that_exist() -> None:
    settings = to_dict(PretrainConfig())
    seen = set()
    for name, columns in PLANTED:
        for alarm in alarms(changed(healthy(), 40, **columns), CONFIG):
            seen.add(alarm.name)
            for setting in re.findall(r"`([a-z_.]+)`", alarm.what + alarm.try_):
                node: Any = settings
                for key in setting.split("."):
                    assert key in node, f"{name}: no setting {setting}"
                    node = node[key]
            assert "`" in alarm.try_
    assert seen >= {name for name, _ in PLANTED}


def test_long_histories_need_only_their_end() -> None:
    lines = changed(healthy(count=1000), module.RECENT, nearest_distance=1e-5)
    config = dataclasses.replace(CONFIG, steps=10_000)
    assert alarms(lines, config) == alarms(lines[-module.LOOK_BACK - module.RECENT :], config)
