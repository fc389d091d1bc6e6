"""Many learning rates side by side on one pass over the features: a head, an optimiser and a cosine for each.

All heads start from the same weights and see the same batches and dropout masks, and share nothing else: training
them together equals training each alone. This module knows no metric; whoever runs it passes scores to `select`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hilum.core.errors import ConfigError, NonFiniteLossError
from hilum.core.seeding import forked, torch_stream
from hilum.heads.features import Features
from hilum.heads.loss_settings import LossSettings
from hilum.heads.losses import Loss, build_loss, known_targets
from hilum.heads.registry import Head, HeadConfig, build_head

SLIDES_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
"""The nine learning rates of the slides."""


def cosine(step: int, total: int) -> float:
    """Factor of the learning rate at a step (0-based) of a cosine from 1 to 0 over `total` steps, no warm-up."""
    return 0.5 * (1 + math.cos(math.pi * min(step, total) / total))


def prior_log_odds(labels: Int[np.ndarray, "N C"]) -> Float[Tensor, " C"]:
    """Log-odds of each finding among its known labels, half a positive and half a negative added.

    A head that starts there predicts prevalences and spends no step on learning them (Lin 2017, "Focal Loss", 4.1).
    """
    positives, negatives = (labels == 1).sum(axis=0), (labels == 0).sum(axis=0)
    return torch.from_numpy(np.log((positives + 0.5) / (negatives + 0.5))).float()


@dataclass
class _Candidate:
    rate: float
    head: Head
    optimiser: torch.optim.AdamW


class Sweep:
    """Heads of one architecture, one per learning rate, trained on the same features.

    Args:
        config: the head.
        rates: learning rates, all different.
        total_steps: length of the cosine, steps; training may stop before.
        loss: what `build_loss` made, or the name of one that needs no frequencies.
        weight_decay: AdamW, on every parameter.
        seed: root seed; heads start from its stream ("head initialisation"), dropout follows ("head dropout", phase).
        phase: name of the training phase ("search", "refit").
        device: where heads live.
        precision: "bf16" runs heads under autocast; losses are float32.
        bias: start the heads' biases from these values (`prior_log_odds`) instead of 0.
        initial: start from these weights (`state`) instead of the seed's.
    """

    def __init__(
        self,
        config: HeadConfig,
        rates: Sequence[float],
        total_steps: int,
        *,
        loss: str | Loss = "masked_bce_sum",
        weight_decay: float = 1e-4,
        seed: int = 0,
        phase: str = "search",
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        bias: Float[Tensor, " C"] | None = None,
        initial: dict[str, Tensor] | None = None,
    ) -> None:
        if not rates or len(set(rates)) < len(rates) or min(rates) <= 0:
            raise ConfigError(f"Learning rates must be positive and all different, found {list(rates)}.")
        self.total_steps, self.steps = max(total_steps, 1), 0
        self.loss = build_loss(LossSettings(loss)) if isinstance(loss, str) else loss
        self.precision, self.device = precision, torch.device(device)
        self.generator = torch_stream(seed, "head dropout", phase, device=self.device.type)
        self.candidates = []
        for rate in rates:
            with forked(seed, "head initialisation"):
                head = build_head(config)
            if bias is not None:
                head.bias.data.copy_(bias)
            if initial is not None:
                head.load_state_dict(initial)
            head.to(self.device).train()
            trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
            optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=weight_decay, fused=True)
            self.candidates.append(_Candidate(rate, head, optimiser))

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates, in the order of everything this class returns."""
        return tuple(candidate.rate for candidate in self.candidates)

    def step(self, features: Features, labels: Int[Tensor, "B C"]) -> Float[np.ndarray, " R"]:
        """One optimiser step of every head; returns the losses before it, one per rate.

        Args:
            features: of a batch, on this sweep's device.
            labels: codes 1, 0, -1 unknown, -2 uncertain; only 1 and 0 train.

        Raises:
            NonFiniteLossError: a loss or gradient is NaN or infinite; no head has moved.
        """
        targets = known_targets(labels.to(self.device), features.study)
        masks = self.candidates[0].head.draw_masks(features, self.generator)
        losses, norms = [], []
        for candidate in self.candidates:  # one graph at a time: backward frees it before the next head's
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                logits = candidate.head(features, masks)  # type: ignore[arg-type]
            loss = self.loss(logits, targets)
            candidate.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            losses.append(loss.detach())
            norms.append(nn.utils.get_total_norm(_gradients(candidate.head)))
        self._require_finite(torch.stack(losses + norms).double().cpu().numpy())
        for candidate in self.candidates:
            candidate.optimiser.param_groups[0]["lr"] = candidate.rate * cosine(self.steps, self.total_steps)
            candidate.optimiser.step()
        self.steps += 1
        return torch.stack(losses).double().cpu().numpy()

    @torch.no_grad()
    def logits(self, features: Features) -> Float[Tensor, "R B C"]:
        """Logits of every head, without dropout, on the CPU."""
        rows = []
        for candidate in self.candidates:
            candidate.head.eval()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                rows.append(candidate.head(features).cpu())
            candidate.head.train()
        return torch.stack(rows)

    def state(self, rate: float) -> dict[str, Tensor]:
        """A copy, on the CPU, of the weights of the head at a rate."""
        head = self.candidates[self.rates.index(rate)].head
        return {name: value.detach().cpu().clone() for name, value in head.state_dict().items()}

    def _require_finite(self, values: Float[np.ndarray, " values"]) -> None:
        bad = ~np.isfinite(values).reshape(2, -1).all(axis=0)
        if bad.any():
            rates = ", ".join(f"{rate:g}" for rate, wrong in zip(self.rates, bad, strict=True) if wrong)
            raise NonFiniteLossError(
                f"Step {self.steps}: the loss or gradient of the head(s) at learning rate {rates} is not finite "
                f"(losses {[float(f'{value:.4g}') for value in values[: len(bad)]]}). No weight has moved. Look for "
                "damaged backbone weights, or lower learning_rates."
            )


def _gradients(head: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in head.parameters() if parameter.grad is not None]


def select(scores: Sequence[float], rates: Sequence[float]) -> float:
    """The rate with the highest score; of equal ones, the lowest.

    Raises:
        ConfigError: a score that is not finite, or nothing to choose from.
    """
    if len(scores) != len(rates) or not rates or not np.isfinite(scores).all():
        raise ConfigError(f"Cannot choose among learning rates {list(rates)} by scores {list(scores)}.")
    return min(zip(scores, rates, strict=True), key=lambda pair: (-pair[0], pair[1]))[1]
