"""Many heads side by side on one pass over the features: a learning rate and a cosine for each.

Candidates are architectures (blocks, pooling, kind of head) at learning rates. All start from the same seed and see the
same batches; those of one architecture see the same dropout masks. They share nothing else: training them together
equals training each alone. This module knows no metric; `protocol.best` chooses by scores that others give.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hilum.core.errors import ConfigError, NonFiniteLossError
from hilum.core.seeding import forked, torch_stream
from hilum.heads.adamw import StackedAdamW
from hilum.heads.averaging import RunningMeans
from hilum.heads.candidates import Candidate, last_blocks
from hilum.heads.features import Features
from hilum.heads.loss_settings import LossSettings
from hilum.heads.losses import Loss, Targets, build_loss, known_targets
from hilum.heads.registry import HeadConfig, build_head
from hilum.heads.stacked import StackedHeads, Stepped, Way, choose_way

SLIDES_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
"""The nine learning rates of the slides."""

Trainable = Callable[[nn.Module], Collection[str]] | Collection[str]
"""Names of parameters, or of modules whose parameters all move; or what gives them for a head."""


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
class _Group:
    """Candidates of one architecture."""

    config: HeadConfig
    positions: list[int]
    """Among the candidates of the sweep."""
    heads: StackedHeads
    optimiser: StackedAdamW
    means: RunningMeans | None
    generator: torch.Generator

    def read(self, features: Features) -> Features:
        return last_blocks(features, self.config.blocks, self.config.embed_dim)

    def averages(self) -> Mapping[str, Tensor]:
        return {} if self.means is None else self.means.values


class Sweep:
    """Heads trained on the same features, each at its own learning rate.

    Args:
        candidates: architectures and rates, all different; rates positive.
        total_steps: length of the cosine, steps; training may stop before.
        loss: what `build_loss` made, or the name of one that needs no frequencies. May be replaced between steps.
        weight_decay: AdamW, on every parameter that moves.
        seed: root seed; heads start from its stream ("head initialisation"), dropout follows ("head dropout", phase).
        phase: name of the training phase ("search", "refit").
        device: where heads live.
        precision: "bf16" runs heads under autocast; losses are float32.
        bias: start the heads' biases from these values (`prior_log_odds`) instead of 0.
        initial: start from these weights (`state`) instead of the seed's: of all candidates, or one for each.
        ema: decay per step of a running mean of the weights, which `logits` and `state` then give; 0: the weights.
        trainable: which parameters move; None: all that require gradients. The others keep their start, to the bit.
        clip: largest norm of a candidate's gradient, larger ones are scaled down to it; None: no limit.
        build: makes a head from its description; None: `build_head`.
        way: how heads of one architecture are run (`stacked`); None: what is faster on the device.

    Raises:
        ConfigError: candidates that are not all different, rates or settings out of range, parameters to train that
            are not there.
    """

    loss: Loss

    def __init__(
        self,
        candidates: Sequence[tuple[HeadConfig, float]],
        total_steps: int,
        *,
        loss: str | Loss = "masked_bce_sum",
        weight_decay: float = 1e-4,
        seed: int = 0,
        phase: str = "search",
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        bias: Float[Tensor, " C"] | None = None,
        initial: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None,
        ema: float = 0.0,
        trainable: Trainable | None = None,
        clip: float | None = None,
        build: Callable[[HeadConfig], nn.Module] | None = None,
        way: Way | None = None,
    ) -> None:
        self.candidates = tuple(Candidate(*candidate) for candidate in candidates)
        _check(self.candidates, ema, clip)
        self.total_steps, self.steps, self.clip = max(total_steps, 1), 0, clip
        self.loss = build_loss(LossSettings(loss)) if isinstance(loss, str) else loss
        self.device = torch.device(device)
        starts = [initial] * len(self.candidates) if initial is None or isinstance(initial, Mapping) else list(initial)
        if len(starts) != len(self.candidates):
            raise ConfigError(f"Initial weights: found {len(starts)} for {len(self.candidates)} candidates.")
        self._groups = []
        for config in dict.fromkeys(candidate.config for candidate in self.candidates):
            positions = [place for place, candidate in enumerate(self.candidates) if candidate.config == config]
            with forked(seed, "head initialisation"):
                template = (build or build_head)(config)
            if bias is not None:
                own = template.bias
                assert isinstance(own, Tensor)
                own.data.copy_(bias if own.numel() == bias.numel() else bias.mean())
            template.to(self.device)
            names = _names(template, trainable)
            states = _states(template, [starts[place] for place in positions])
            heads = StackedHeads(template, states, names, precision, way or choose_way(self.device, len(positions)))
            self._groups.append(
                _Group(
                    config, positions, heads, StackedAdamW(list(heads.moving.values()), weight_decay),
                    RunningMeans(heads.moving, ema) if ema else None,
                    torch_stream(seed, "head dropout", phase, device=str(self.device)),
                )
            )  # fmt: skip

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates, in the order of everything this class returns."""
        return tuple(candidate.rate for candidate in self.candidates)

    def step(self, features: Features, targets: Targets | Int[Tensor, "B C"]) -> Float[np.ndarray, " R"]:
        """One optimiser step of every head; returns the losses before it, one per candidate.

        Args:
            features: of a batch, on this sweep's device, of the largest number of blocks; with patches if any head
                reads them.
            targets: of the batch; or label codes 1, 0, -1 unknown, -2 uncertain, of which only 1 and 0 train.

        Raises:
            NonFiniteLossError: a loss or gradient is NaN or infinite; no head has moved.
        """
        if isinstance(targets, Tensor):
            targets = known_targets(targets.to(self.device), features.study)
        found: list[Stepped] = []
        for group in self._groups:
            own = group.read(features)
            masks = group.heads.template.draw_masks(own, group.generator)  # type: ignore[operator]
            found.append(group.heads.backward(own, masks, targets, self.loss))
        norms = [[nn.utils.get_total_norm(gradients) for gradients in stepped.gradients] for stepped in found]
        values = self._in_order([stepped.losses for stepped in found]) + self._in_order(norms)
        losses, sizes = torch.stack(values).double().cpu().numpy().reshape(2, -1)  # the one wait for the device
        self._require_finite(losses, sizes)
        factor = cosine(self.steps, self.total_steps)
        for group, stepped, own_norms in zip(self._groups, found, norms, strict=True):
            if self.clip is not None:
                for gradients, norm in zip(stepped.gradients, own_norms, strict=True):
                    torch._foreach_mul_(gradients, (self.clip / norm).clamp(max=1))
            group.optimiser.step(stepped.gradients, [self.rates[place] * factor for place in group.positions])
            if group.means is not None:
                group.means.update(group.heads.moving)
        self.steps += 1
        return losses

    def logits(self, features: Features) -> Float[Tensor, "R B C"]:
        """Logits of every head, without dropout, on the CPU; features as for `step`."""
        rows = [list(group.heads.logits(group.read(features), group.averages()).cpu()) for group in self._groups]
        return torch.stack(self._in_order(rows))

    def state(self, position: int) -> dict[str, Tensor]:
        """A copy, on the CPU, of the weights of the head at a position in `candidates` (with `ema`, running means)."""
        [group] = [group for group in self._groups if position in group.positions]
        return group.heads.state(group.positions.index(position), group.averages())

    def keep(self, positions: Sequence[int]) -> None:
        """Go on with some candidates and free the others; the course of those that stay does not change.

        Args:
            positions: in `candidates`, which has them in this order afterwards.

        Raises:
            ConfigError: none, one twice, or one that is not there.
        """
        chosen = list(positions)
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(len(self.candidates))):
            raise ConfigError(f"Cannot go on with candidates {chosen} of {len(self.candidates)}.")
        left = []
        for group in self._groups:
            rows = [group.positions.index(place) for place in chosen if place in group.positions]
            if not rows:
                continue
            group.heads.keep(rows)
            group.optimiser.keep(list(group.heads.moving.values()), rows)
            if group.means is not None:
                group.means.keep(rows)
            group.positions = [new for new, old in enumerate(chosen) if old in group.positions]
            left.append(group)
        self._groups = left
        self.candidates = tuple(self.candidates[place] for place in chosen)

    def _in_order(self, rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """What groups have for their heads, in the order of the candidates."""
        pairs = [
            (place, value)
            for group, values in zip(self._groups, rows, strict=True)
            for place, value in zip(group.positions, values, strict=True)
        ]
        return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]

    def _require_finite(self, losses: Float[np.ndarray, " R"], norms: Float[np.ndarray, " R"]) -> None:
        bad = ~(np.isfinite(losses) & np.isfinite(norms))
        if bad.any():
            rates = ", ".join(f"{rate:g}" for rate, wrong in zip(self.rates, bad, strict=True) if wrong)
            raise NonFiniteLossError(
                f"Step {self.steps}: the loss or gradient of the head(s) at learning rate {rates} is not finite "
                f"(losses {[float(f'{value:.4g}') for value in losses]}). No weight has moved. Look for "
                "damaged backbone weights, or lower learning_rates."
            )


def _check(candidates: Sequence[Candidate], ema: float, clip: float | None) -> None:
    rates = [candidate.rate for candidate in candidates]
    if not rates or len(set(candidates)) < len(candidates) or not all(0 < rate < math.inf for rate in rates):
        raise ConfigError(
            f"Candidates must be all different and their learning rates positive, found {len(candidates)} at {rates}."
        )
    if not 0 <= ema < 1:
        raise ConfigError(f"ema: expected a decay in [0, 1), found {ema}.")
    if clip is not None and not clip > 0:
        raise ConfigError(f"clip: expected a norm above 0, found {clip}.")


def _names(head: nn.Module, trainable: Trainable | None) -> list[str]:
    """Parameters that move, in the order of the head."""
    able = [name for name, parameter in head.named_parameters() if parameter.requires_grad]
    if trainable is None:
        return able
    wanted = list(trainable(head) if callable(trainable) else trainable)
    found = {one: [name for name in able if name == one or name.startswith(f"{one}.")] for one in wanted}
    missing = [one for one, names in found.items() if not names]
    if missing or not wanted:
        raise ConfigError(f"trainable: {missing or 'nothing'} named, of parameters {able}.")
    chosen = {name for names in found.values() for name in names}
    return [name for name in able if name in chosen]


def _states(template: nn.Module, starts: Sequence[Mapping[str, Tensor] | None]) -> list[dict[str, Tensor]]:
    """Where each head starts: as the template does, or from given weights."""

    def snapshot() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in template.state_dict().items()}

    own, states = snapshot(), []
    for start in starts:
        if start is None:
            states.append(own)
            continue
        try:
            template.load_state_dict(dict(start))
        except RuntimeError as error:
            raise ConfigError(f"Initial weights are of another head: {error}") from error
        states.append(snapshot())
    return states
