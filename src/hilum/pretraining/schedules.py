"""What changes over a run, as functions of the step: learning rate, weight decay, EMA momentum, teacher temperature.

Lengths are fractions of the run, so that a short stage compresses every schedule (DINOv2 appendix B.2). The numbers are
those of DINOv2 and CheXFound; the shapes are those of facebookresearch/dinov2 utils/utils.py CosineScheduler.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple


def cosine(step: int, total: int, start: float, end: float, warmup: int = 0) -> float:
    """Linear from 0 to `start` over `warmup` steps, half a cosine from `start` to `end`, then `end`.

    The last warm-up step and the first cosine step both have the value `start`, as in DINOv2.
    """
    if step < warmup:
        return start * step / (warmup - 1) if warmup > 1 else 0.0
    if step >= total:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def linear_then_constant(step: int, length: int, start: float, end: float) -> float:
    """Linear from `start` at step 0 to `end` at step `length - 1`, then `end`."""
    if step >= length - 1:
        return end
    return start + (end - start) * step / (length - 1)


def scaled_learning_rate(base: float, batch_size: int) -> float:
    """Square-root rule: `base` is meant for a global batch of 1024."""
    return base * math.sqrt(batch_size / 1024)


class Values(NamedTuple):
    """Everything scheduled, at one step."""

    learning_rate: float
    backbone_learning_rate: float
    """0 while the heads warm up, then grows linearly to the learning rate."""
    last_layer_learning_rate: float
    """0 while the prototypes are frozen, then the learning rate."""
    weight_decay: float
    momentum: float
    """Share of the teacher that stays at an EMA update."""
    teacher_temperature: float


@dataclass(frozen=True)
class Schedules:
    """The schedules of one run; `at(step)` for steps 0 to `steps - 1`."""

    steps: int
    learning_rate: float
    """Peak, after the batch-size rule."""
    final_learning_rate: float = 1e-6
    warmup: float = 0.1
    """Fraction of the run; 10 of 100 epochs in CheXFound."""
    weight_decay: tuple[float, float] = (0.04, 0.2)
    """First and last value of a half cosine."""
    momentum: tuple[float, float] = (0.994, 1.0)
    """First and last value of a half cosine."""
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    """First and constant value."""
    teacher_temperature_warmup: float = 0.3
    """Fraction of the run; 30 of 100 epochs in CheXFound."""
    freeze_last_layer: float = 0.01
    """Fraction of the run in which the prototypes do not move; 1 of 100 epochs in CheXFound."""
    head_warmup: float = 0.0
    """Fraction of the run in which the backbone does not move, so that new heads learn on features that are good
    already; then the backbone's rate grows over `warmup` of the run. No other schedule waits for it."""

    def at(self, step: int) -> Values:
        """The values with which step `step` (from 0) is made."""
        rate = cosine(step, self.steps, self.learning_rate, self.final_learning_rate, self._length(self.warmup))
        frozen = step < self._length(self.freeze_last_layer)
        return Values(
            learning_rate=rate,
            backbone_learning_rate=rate * self._backbone_share(step),
            last_layer_learning_rate=0.0 if frozen else rate,
            weight_decay=cosine(step, self.steps, *self.weight_decay),
            momentum=cosine(step, self.steps, *self.momentum),
            teacher_temperature=linear_then_constant(
                step, self._length(self.teacher_temperature_warmup), *self.teacher_temperature
            ),
        )

    def _backbone_share(self, step: int) -> float:
        """Of the learning rate: 0 in the heads' warm-up, then linear to 1; 1 throughout when there is none."""
        waiting = self._length(self.head_warmup)
        if waiting == 0:
            return 1.0
        growing = max(self._length(self.warmup), 1)
        return min(max(step - waiting + 1, 0) / growing, 1.0)

    def _length(self, fraction: float) -> int:
        return round(fraction * self.steps)
