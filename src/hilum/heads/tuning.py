"""Beyond a frozen backbone: low-rank updates, the last blocks or all of it, with a head that has converged before.

A head that starts from noise would first destroy what pretraining has learned, so tuning begins where search and refit
have ended, at a small rate that shrinks from layer to layer towards the pixels. What is tuned is a copy; low-rank
updates are added into the weights when it is finished, so a tuned model is an ordinary one. When to stop, and whether
tuning helped at all, is decided by the caller (`commands/fit_tune.py`).
"""

import copy
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hilum.backbones.layer_rates import layer_multiplier, takes_weight_decay
from hilum.backbones.vit import VisionTransformer
from hilum.core.errors import ConfigError, NonFiniteLossError
from hilum.core.seeding import forked, torch_stream
from hilum.core.tracking import Bar
from hilum.heads.batches import Batch
from hilum.heads.decoder_parts import dropout_mask
from hilum.heads.features import Features, FeatureSource, freeze, read_tokens
from hilum.heads.losses import Loss
from hilum.heads.registry import Head
from hilum.heads.training import LearningSet, Prepare
from hilum.heads.tune_settings import TuneSettings


class LowRankLinear(nn.Module):
    """A linear map that stays, plus a trained update of low rank (Hu 2021, "LoRA", eq. 3): W x + (alpha / r) B A x.

    A starts from Kaiming's uniform, B from 0, so that nothing changes at first.

    Args:
        linear: the map that stays.
        rank: r.
        alpha: scale of the update.
        dropout: probability of dropping an input of the update, in training mode, by `generator`.
        generator: of the dropout.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.linear, self.scale, self.dropout, self.generator = linear, alpha / rank, dropout, generator
        self.down = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.up = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, inputs: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """The map with its update."""
        kept = inputs
        if self.training and self.dropout:
            kept = inputs * dropout_mask(tuple(inputs.shape), self.dropout, self.generator).to(inputs.dtype)
        return self.linear(inputs) + self.scale * nn.functional.linear(nn.functional.linear(kept, self.down), self.up)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One linear map that gives the same outputs."""
        self.linear.weight.add_(self.scale * (self.up.double() @ self.down.double()).to(self.linear.weight.dtype))
        return self.linear


def unfreeze(backbone: VisionTransformer, config: TuneSettings, seed: int, phase: str) -> VisionTransformer:
    """A copy of a frozen backbone in which what is to be tuned asks for gradients; still in evaluation mode.

    Raises:
        ConfigError: more blocks than the backbone has.
    """
    tuned = freeze(copy.deepcopy(backbone))
    if config.method == "full":
        tuned.requires_grad_(True)
        tuned.mask_token.requires_grad_(False)
    elif config.method == "blocks":
        if config.blocks > tuned.config.depth:
            raise ConfigError(f"tune.blocks: {config.blocks} of a backbone that has {tuned.config.depth}.")
        for module in (*tuned.blocks[-config.blocks :], tuned.norm):
            module.requires_grad_(True)
    elif config.method == "lora":
        device = tuned.cls_token.device
        generator = torch_stream(seed, "low-rank dropout", phase, device=str(device))
        with forked(seed, "low-rank initialisation"):
            for block in tuned.blocks:
                for name in ("qkv", "proj"):
                    linear = getattr(block.attn, name)
                    setattr(
                        block.attn, name, LowRankLinear(linear, config.rank, config.alpha, config.dropout, generator)
                    )
    return tuned.eval()  # new modules would drop out in evaluation too


def merge(tuned: VisionTransformer) -> VisionTransformer:
    """A frozen copy with every low-rank update added into its map: an ordinary backbone."""
    merged = copy.deepcopy(tuned)
    for block in merged.blocks:
        for name in ("qkv", "proj"):
            update = getattr(block.attn, name)
            if isinstance(update, LowRankLinear):
                setattr(block.attn, name, update.merged())
    return freeze(merged)


def parameter_groups(backbone: VisionTransformer, head: nn.Module, config: TuneSettings) -> list[dict[str, Any]]:
    """Optimiser groups of what asks for gradients; `rate` is each group's own at the peak.

    A backbone parameter learns at learning_rate x layer_decay^(layers between it and the top).
    """
    depth = backbone.config.depth
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    named = [(f"backbone.{name}", parameter) for name, parameter in backbone.named_parameters()]
    named += [(f"head.{name}", parameter) for name, parameter in head.named_parameters()]
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        rate = config.head_learning_rate
        if name.startswith("backbone."):
            rate = config.learning_rate * layer_multiplier(name, depth, config.layer_decay)
        decay = config.weight_decay if takes_weight_decay(name) else 0.0
        group = groups.setdefault(
            (rate, decay), {"params": [], "names": [], "rate": rate, "lr": 0.0, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def warm_cosine(step: int, total: int, warmup: float) -> float:
    """Factor of the rates at a step (0-based): from 0 over the warm-up share, then a cosine to 0."""
    rising = round(total * warmup)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * min(step - rising, total - rising) / max(total - rising, 1)))


class Tuner:
    """Backbone and head trained together, an epoch at a time.

    Args:
        config: how.
        backbone: from `unfreeze`.
        head: converged; trained in place, dropout by masks.
        blocks: n, last blocks that it reads.
        source: where crops and normalisation come from.
        total_steps: length of the cosine.
        precision: "bf16" runs both under autocast; losses are float32.
        seed: root of the dropout stream.
        phase: its name.
    """

    def __init__(
        self,
        config: TuneSettings,
        backbone: VisionTransformer,
        head: Head,
        blocks: int,
        source: FeatureSource,
        total_steps: int,
        *,
        precision: str,
        seed: int,
        phase: str,
    ) -> None:
        self.config, self.backbone, self.head, self.blocks, self.source = config, backbone, head, blocks, source
        self.total_steps, self.steps, self.precision = max(total_steps, 1), 0, precision
        self.groups = parameter_groups(backbone, head, config)
        self.optimiser = torch.optim.AdamW(self.groups)
        self.generator = torch_stream(seed, "tuning dropout", phase, device=str(source.device))

    def epoch(
        self, view: int, batches: list[Batch], data: LearningSet, prepare: Prepare, loss: Loss, bar: Bar
    ) -> float:
        """Train on the batches of one epoch; returns the mean loss of a step.

        Args:
            view: which augmented view.
            batches: images, whole studies where the head looks at them.
            data: for targets and what is attached.
            prepare: what features go through before the head sees them.
            loss: of logits and targets.
            bar: told of every step.

        Raises:
            NonFiniteLossError: the loss or a gradient is not finite; no weight has moved.
        """
        losses = []
        self._train_updates(True)
        try:
            crops = self.source.squares(view, [batch.images for batch in batches])
            for batch, (_, images) in zip(batches, crops, strict=True):
                losses.append(self._step(batch, images, data, prepare, loss))
                bar.advance()
        finally:
            self._train_updates(False)
        return float(np.mean(losses))

    def _step(self, batch: Batch, images: Tensor, data: LearningSet, prepare: Prepare, loss: Loss) -> float:
        source = self.source
        tokens = read_tokens(self.backbone, images, source.recipe, self.blocks, source.patches, self.precision)
        features: Features = batch.attach(prepare(tokens), data.views, data.sources)
        masks = self.head.draw_masks(features, self.generator)
        with torch.autocast(source.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.head(features, masks)
        value = loss(logits, data.targets(batch, features))
        self.optimiser.zero_grad(set_to_none=True)
        value.backward()
        trained = [parameter for group in self.groups for parameter in group["params"]]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
        if not bool(torch.isfinite(value) & torch.isfinite(norm)):
            raise NonFiniteLossError(
                f"Tuning step {self.steps}: loss {float(value):.4g} or gradient norm {float(norm):.4g} is not finite. "
                "No weight has moved. Lower tune.learning_rate, or look for damaged weights."
            )
        if self.config.clip:
            nn.utils.clip_grads_with_norm_(trained, self.config.clip, norm)
        factor = warm_cosine(self.steps, self.total_steps, self.config.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = group["rate"] * factor
        self.optimiser.step()
        self.steps += 1
        return float(value.detach())

    def _train_updates(self, on: bool) -> None:
        """Dropout in the low-rank updates, and nothing else, knows that this is training."""
        for module in self.backbone.modules():
            if isinstance(module, LowRankLinear):
                module.training = on
