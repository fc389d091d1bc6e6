"""What is going wrong in a run, said from its own lines of `metrics.jsonl`, with what to try.

Pure functions of logged numbers: nothing here looks at a network. Healthy runs stay clear of every threshold by a wide
margin, and tests show both sides. Nearly every alarm needs several lines in a row, past the warm-up, so that the first
steps of a healthy run (features still close together, targets still flat) stay silent. Columns: docs/reference/run.md.

A little past 300 lines: one short function an alarm.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hilum.pretraining.config import FROM_INIT, PretrainConfig

Line = Mapping[str, Any]
"""One line of `metrics.jsonl`."""

LOOK_BACK = 100
"""Lines before the recent ones that they are compared with."""
RECENT = 5
"""Lines in a row that must show a fault."""
FLAT_STEPS = 100
"""Steps past the warm-up after which losses at their start, or targets that say nothing, are a fault: both are normal
for the first tens of steps, whatever the length of the run."""
SMALLEST_RANK = 1.5
SMALLEST_DEVIATION = 0.05
SMALLEST_ROWS = 8
"""[CLS] of a micro-batch from which a collapse is judged: the rank of the two crops of one image is always 1."""
SMALLEST_DISTANCE = 0.01
SMALLEST_USE = 0.02
"""Prototypes in use, as a share of those that the rows of a batch could use."""
LARGEST_TARGET_ENTROPY = 0.99
FLAT = 0.005
"""Relative distance of a loss from its value at uniform predictions."""
GRADIENT_GROWTH, GRADIENT_LOSS = 30.0, 1e-3
SMALLEST_GRADIENT = 1e-7
SPIKE = 12.0
"""Robust standard deviations (1.4826 median absolute deviations) above the median."""
SMALLEST_SPIKE = 0.1
"""Relative rise below which nothing is called a spike."""
LARGEST_DAMAGE = 1e-3


@dataclass(frozen=True)
class Alarm:
    """One thing that is wrong."""

    name: str
    """Short, as in the column `alarms`."""
    what: str
    """What has happened, in one sentence."""
    evidence: str
    """The numbers that say so."""
    try_: str
    """What to change; settings in backquotes, by their names in the configuration."""

    def __str__(self) -> str:
        return f"{self.what} ({self.evidence}). Try: {self.try_}"


def alarms(history: Sequence[Line], config: PretrainConfig) -> list[Alarm]:
    """Everything that is wrong at the last line.

    Args:
        history: lines of `metrics.jsonl`, oldest first; the last `LOOK_BACK + RECENT` of them are enough. Lines of a
            probe before the first step, and lines without a column, are passed over.
        config: of the run.

    Returns:
        One alarm of a kind at most, the most serious first.
    """
    lines = [line for line in history if "loss" in line]
    found = [_damaged(lines), probe_guard(history)]
    if lines:
        step, warm = int(lines[-1]["step"]), math.ceil(config.warmup * config.steps)
        trained = [line for line in lines if line["step"] > warm]
        long = [line for line in lines if line["step"] > warm + FLAT_STEPS]
        heads = {"cls": "dino_head", "patch": "ibot_head"}
        kinds = [kind for kind in heads if _counts(config, kind)]
        found = [
            _collapse(trained, config), _neighbours(trained), *(_prototypes(trained, config, kind) for kind in kinds),
            *(_empty_targets(long, kind) for kind in kinds), _flat_losses(long, config, kinds),
            *(_gradient(trained, part) for part in ("backbone", *(heads[kind] for kind in kinds))), _spike(lines),
            _still_teacher(trained, step, config), *found,
        ]  # fmt: skip
    return [alarm for alarm in found if alarm is not None]


def probe_guard(history: Sequence[Line]) -> Alarm | None:
    """Whether the features carry findings worse than at the first probe, by more than noise.

    Reads the newest probe in the history: the difference of knn_mAP to the first probe (`knn_change`), on the same
    queries, whose 95 % interval over resampled patients must lie below 0. State is in the lines alone.
    """
    last = next((line for line in reversed(history) if "knn_change_high" in line), None)
    if last is None or not last["knn_change_high"] < 0:
        return None
    return Alarm(
        "features_worse_than_at_start",
        f"After step {last['step']} the nearest neighbours tell findings worse than {when_first_probed(last)}",
        f"knn_mAP {last.get('knn_mAP', math.nan):.3f}, change {last['knn_change']:+.3f}, 95 % interval "
        f"[{last['knn_change_low']:+.3f}, {last['knn_change_high']:+.3f}]",
        "from public weights: a lower `learning_rate`, `layer_decay` 0.9, a longer `warmup`, heads trained first with "
        "the backbone at rest; otherwise more images a step (`batch_size`), or stop at the best probe",
    )


def when_first_probed(line: Line) -> str:
    """When the probe was that a line's change is measured from, in words: a probe may be turned on late."""
    since = line.get("knn_change_since")
    if since is None:
        return "at the first probe"
    return f"after step {since:.0f}" if since else "before the first step"


def _counts(config: PretrainConfig, kind: str) -> bool:
    """Whether the loss of a kind of token is trained at all."""
    if kind == "cls":
        return config.losses.dino > 0
    return config.losses.ibot > 0 and config.mask_probability > 0


def _collapse(lines: Sequence[Line], config: PretrainConfig) -> Alarm | None:
    if config.crops.global_crops * config.batch_size // config.accumulate < SMALLEST_ROWS:
        return None
    rank, deviation = _recent(lines, "teacher_effective_rank"), _recent(lines, "teacher_feature_deviation")
    flat = bool(len(rank)) and rank.max() < SMALLEST_RANK
    small = bool(len(deviation)) and deviation.max() < SMALLEST_DEVIATION
    if not flat and not small:
        return None
    return Alarm(
        "cls_collapse",
        "[CLS] has collapsed: the teacher gives nearly the same vector to every image",
        f"effective rank {_last(rank)}, deviation {_last(deviation)} of 1, in {RECENT} lines in a row",
        "start again from a checkpoint before it, with a lower `learning_rate`, a longer `warmup`, `losses.koleo` at "
        "0.1 or more, a lower `teacher_temperature` and a `momentum` closer to 1",
    )


def _neighbours(lines: Sequence[Line]) -> Alarm | None:
    distance = _recent(lines, "nearest_distance")
    if not len(distance) or distance.max() >= SMALLEST_DISTANCE or not distance.any():
        return None  # exactly 0: one image on each process, and no neighbour
    return Alarm(
        "cls_neighbours_meet",
        "The student's [CLS] of different images have come together",
        f"mean distance to the nearest neighbour {_last(distance)}, of at most 2",
        "`losses.koleo` at 0.1 or more, a lower `learning_rate`; and look for copies among the images: "
        "`hilum audit --pixels`",
    )


def _prototypes(lines: Sequence[Line], config: PretrainConfig, kind: str) -> Alarm | None:
    usage = _recent(lines, f"{kind}_prototype_usage")
    if not len(usage):
        return None
    prototypes = config.heads.prototypes
    rows = config.crops.global_crops * config.batch_size // config.accumulate  # one micro-batch is looked at
    if kind == "patch":
        patches = (config.crops.global_size // _patch_size(config)) ** 2
        rows = int(rows * config.mask_probability * sum(config.mask_ratio) / 2 * patches)
    possible = min(rows, prototypes)
    used = float(prototypes ** usage.max())
    if possible < 2 or used >= max(SMALLEST_USE * possible, 1.5):
        return None
    token, loss = ("[CLS]", "dino") if kind == "cls" else ("patches", "ibot")
    return Alarm(
        f"{kind}_prototypes_collapse",
        f"The targets of {token} use about {used:.0f} of {prototypes} prototypes, where {possible} could be in use",
        f"{kind}_prototype_usage {_last(usage)} of 1",
        "`losses.centering` sinkhorn, fewer prototypes (`heads.prototypes`), a higher `teacher_temperature`, a lower "
        f"`learning_rate` or weight `losses.{loss}`, a longer `freeze_last_layer`",
    )


def _patch_size(config: PretrainConfig) -> int:
    """Side of a patch, pixels; with architecture=init the weights know it, and 16 is near enough to count rows."""
    if config.architecture == FROM_INIT:
        return config.patch_size or 16
    return config.vit().patch_size


def _empty_targets(lines: Sequence[Line], kind: str) -> Alarm | None:
    entropy = _recent(lines, f"{kind}_target_entropy")
    if not len(entropy) or entropy.min() <= LARGEST_TARGET_ENTROPY:
        return None
    token, loss = ("[CLS]", "dino") if kind == "cls" else ("patches", "ibot")
    return Alarm(
        f"{kind}_targets_say_nothing",
        f"The targets of {token} are uniform long after the warm-up, so `losses.{loss}` has no gradient",
        f"{kind}_target_entropy {_last(entropy)} of 1",
        "a lower `teacher_temperature`, fewer prototypes (`heads.prototypes`), a larger `batch_size`, a smaller "
        "`momentum`, so that the teacher follows faster",
    )


def _flat_losses(lines: Sequence[Line], config: PretrainConfig, kinds: Sequence[str]) -> Alarm | None:
    initial = initial_losses(config)
    numbers = {name: _recent(lines, name) for kind, name in (("cls", "dino_local"), ("patch", "ibot")) if kind in kinds}
    flat = [
        name
        for name, values in numbers.items()
        if len(values) and initial[name] > 0 and (np.abs(values / initial[name] - 1) < FLAT).all()
    ]
    if not flat:
        return None
    evidence = ", ".join(f"{name} {_last(numbers[name])}, at the start {initial[name]:.4g}" for name in flat)
    return Alarm(
        "losses_flat",
        f"Learning has not begun: {' and '.join(flat)} still at the value of uniform predictions",
        evidence,
        "a higher `learning_rate`, a larger `batch_size`, fewer prototypes (`heads.prototypes`), a lower "
        "`teacher_temperature`; few images may need weights to start from (--init)",
    )


def _gradient(lines: Sequence[Line], part: str) -> Alarm | None:
    values = _values(lines, f"gradient_norm_{part}")
    if len(values) < RECENT:
        return None
    recent, before = values[-RECENT:], values[-RECENT - LOOK_BACK : -RECENT]
    usual, high = np.quantile(before, (0.5, 0.9)).tolist() if len(before) >= RECENT else (math.nan, math.nan)
    if recent.min() > GRADIENT_GROWTH * usual and recent.min() > 1:
        return Alarm(
            f"gradient_grows_{part}",
            f"The gradient of {part} has grown by orders of magnitude",
            f"norm {_last(recent)}, usually {usual:.3g}",
            "a lower `learning_rate`, `clip` at 3 or less, `precision` fp32; it often comes before a loss that is not "
            "finite",
        )
    if recent.max() < SMALLEST_GRADIENT or recent.max() < GRADIENT_LOSS * high:  # a median would soon get used to it
        return Alarm(
            f"gradient_vanishes_{part}",
            f"The gradient of {part} has all but vanished",
            f"norm {_last(recent)}, before up to {high:.3g}",
            "see whether targets still differ (cls_target_entropy, patch_target_entropy); a higher loss weight "
            "(`losses.dino`, `losses.ibot`), a lower `teacher_temperature`",
        )
    return None


def _spike(lines: Sequence[Line]) -> Alarm | None:
    values = _values(lines, "loss")
    before, now = values[-LOOK_BACK - 1 : -1], values[-1:]
    if len(before) < 4 * RECENT:
        return None
    middle = float(np.median(before))
    spread = 1.4826 * float(np.median(np.abs(before - middle)))
    rise = float(now[0]) - middle
    if rise <= SPIKE * spread or rise <= SMALLEST_SPIKE * abs(middle):
        return None
    return Alarm(
        "loss_spike",
        f"The loss has jumped at step {lines[-1]['step']}",
        f"{now[0]:.4g}, median of the {len(before)} lines before {middle:.4g}",
        "one alone is harmless; where they come back, a lower `learning_rate`, a longer `warmup`, or `clip` at 1",
    )


def _still_teacher(lines: Sequence[Line], step: int, config: PretrainConfig) -> Alarm | None:
    momentum = _recent(lines, "momentum")
    if not len(momentum) or momentum.min() < 1 - 1e-6 or step > 0.9 * config.steps:
        return None
    return Alarm(
        "teacher_stands_still",
        "The teacher does not follow the student, so its features stay those of the start",
        f"momentum {momentum[-1]:.8g} after {step} of {config.steps} steps",
        "a first value of `momentum` below 1: 0.994 for long runs, 0.95 for hundreds of steps",
    )


def _damaged(lines: Sequence[Line]) -> Alarm | None:
    share = _values(lines[-1:], "damaged_share")
    if not len(share) or share[0] <= LARGEST_DAMAGE:
        return None
    return Alarm(
        "damaged_images",
        "Many images of the store are damaged; others are drawn in their place",
        f"{share[0]:.2%} of the images drawn by this process",
        "`hilum verify STORE`, and the same `hilum build` again for the shards that it names",
    )


def initial_losses(config: PretrainConfig) -> dict[str, float]:
    """Values of the losses while the predictions are uniform, by column: where learning has not begun.

    dino_local G L / P ln K, dino_global G (G - 1) / P ln K with P = G (G - 1) + G L pairs; ibot the share of masked
    crops times ln K (docs/explanation/pretraining.md).
    """
    views, local, most = config.crops.global_crops, config.crops.local_crops, math.log(config.heads.prototypes)
    pairs = views * (views - 1) + views * local
    return {
        "dino_local": views * local / pairs * most,
        "dino_global": views * (views - 1) / pairs * most,
        "ibot": config.mask_probability * most,
    }


def _values(lines: Iterable[Line], column: str) -> np.ndarray:
    """The finite numbers of a column, oldest first."""
    given = [line.get(column) for line in lines]
    values = np.array([value for value in given if isinstance(value, int | float)], np.float64)
    return values[np.isfinite(values)]


def _recent(lines: Sequence[Line], column: str) -> np.ndarray:
    """The last `RECENT` numbers of a column; nothing where there are fewer."""
    values = _values(lines[-RECENT:], column)
    return values if len(values) == RECENT else values[:0]


def _last(values: np.ndarray) -> str:
    return f"{values[-1]:.3g}" if len(values) else "unknown"
