"""How the backbone is tuned after a head has converged on it; `tuning.py` does it."""

import math
from dataclasses import dataclass
from typing import Literal

from hilum.core.errors import ConfigError


@dataclass(frozen=True)
class TuneSettings:
    """How the backbone is tuned after the head has converged."""

    method: Literal["none", "lora", "blocks", "full"] = "none"
    """none: it stays frozen. lora: low-rank updates of the attention (Hu 2021). blocks: the last ones. full: all."""
    blocks: int = 4
    """blocks: how many last blocks, and the final norm."""
    rank: int = 16
    """lora: rank of an update (RPIDIAL/CheXFound)."""
    alpha: float = 16.0
    """lora: an update is scaled by alpha / rank."""
    dropout: float = 0.1
    """lora: probability of dropping an input of an update, in training."""
    epochs: int = 5
    """Of tuning, and length of its cosine; fewer are taken where validation says so, none where it never helped."""
    learning_rate: float = 1e-5
    """Of the top of the backbone."""
    layer_decay: float = 0.75
    """Factor on the rate for each block below the top."""
    head_learning_rate: float = 1e-5
    """Of the head."""
    weight_decay: float = 0.05
    """AdamW; biases, norms and LayerScale do not decay."""
    warmup: float = 0.1
    """Share of the steps over which the rates grow from 0."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: not clipped."""
    batch_size: int = 32
    """Images a step."""

    def __post_init__(self) -> None:
        for name in ("blocks", "rank", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"tune.{name}: expected at least 1, found {getattr(self, name)}.")
        for name in ("alpha", "learning_rate", "head_learning_rate", "layer_decay"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"tune.{name}: expected a positive number, found {getattr(self, name)}.")
        if not 0 <= self.dropout < 1 or not 0 <= self.warmup < 1 or self.clip < 0 or self.weight_decay < 0:
            raise ConfigError(
                f"tune: expected dropout and warmup in [0, 1), clip and weight_decay from 0, found {self.dropout}, "
                f"{self.warmup}, {self.clip} and {self.weight_decay}."
            )
