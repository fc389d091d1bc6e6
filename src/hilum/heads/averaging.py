"""Running means of weights (EMA): what is judged and kept instead of the weights themselves.

Polyak averaging with a decay per step, as ML-Decoder is trained (Alibaba-MIIL/ML_Decoder train.py: 0.9997).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class RunningMeans:
    """Exponential means of tensors that change in place.

    In the first steps the decay is (1 + t) / (10 + t) where that is less (tensorflow/tensorflow
    python/training/moving_averages.py), so that a short training is not a mean over its start.

    Args:
        values: where the means start.
        decay: of a mean per step, in (0, 1).
    """

    def __init__(self, values: Mapping[str, Tensor], decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.values = {name: value.clone() for name, value in values.items()}

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor]) -> None:
        """Take a step's values in."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        means = list(self.values.values())
        torch._foreach_lerp_(means, [values[name] for name in self.values], 1 - decay)

    def keep(self, positions: Sequence[int]) -> None:
        """Of some slices of the leading axis only."""
        self.values = {name: value[list(positions)] for name, value in self.values.items()}
