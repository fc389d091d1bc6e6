"""How often each finding is present and absent among the known training labels; what long-tailed losses are shaped by.

Counted once, from the training split: what validation or test hold changes no loss.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hilum.core.types import NEGATIVE, POSITIVE


class Frequencies(NamedTuple):
    """Counts of known labels; unknown and uncertain ones count nowhere."""

    positives: Float[Tensor, " C"]
    """Images in which the finding is present."""
    negatives: Float[Tensor, " C"]
    """Images in which it is absent."""

    def to(self, device: torch.device | str) -> "Frequencies":
        """The same counts on a device; a loss lives where its frequencies do."""
        return Frequencies(self.positives.to(device), self.negatives.to(device))

    @property
    def prevalence(self) -> Float[Tensor, " C"]:
        """Positives over known labels; 0 for a finding without a known label."""
        return self.positives / (self.positives + self.negatives).clamp(min=1)

    @property
    def log_odds(self) -> Float[Tensor, " C"]:
        """ln(positives / negatives), a count of 0 taken as 1, so that it is finite."""
        return (self.positives.clamp(min=1) / self.negatives.clamp(min=1)).log()


def count_labels(labels: Int[np.ndarray, "N C"]) -> Frequencies:
    """Count the codes 1 and 0 of each finding; float32, on the CPU."""
    return Frequencies(
        *(torch.from_numpy((labels == code).sum(axis=0)).to(torch.float32) for code in (POSITIVE, NEGATIVE))
    )
