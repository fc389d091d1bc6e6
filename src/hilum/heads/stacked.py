"""Heads of one architecture trained side by side: their parameters stacked on a leading axis R.

There are two ways through the same heads. *Together*: one forward and one backward of all, batched with `torch.vmap`;
the products that read the patch tokens (the largest part of a decoder: 4096 -> 768 channels of every token) become one
product of width R·d, so that the tokens are read, rounded to bf16 and transposed once and not R times. *In turn*: one
head after another on the same rounded tokens, each graph freed before the next.

Together is for GPUs, where small kernels are what a loop waits for. On a CPU a head's products fill the cores anyway,
while tensors R times as large leave the caches: in turn is faster there (`benchmarks/sweep.py`), holds one head's graph
at a time, and gives each head the bits that it gets alone. It is also where a GPU goes on whose memory all heads
together do not fit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from hilum.core.tracking import warn
from hilum.heads.features import Features
from hilum.heads.losses import Loss, Targets

Way = Literal["together", "in turn"]


class Stepped(NamedTuple):
    """Of one forward and backward, not yet a move."""

    losses: list[Tensor]
    """One for each head."""
    gradients: list[list[Tensor]]
    """Of each head, in the order of `StackedHeads.trained`."""


class StackedHeads:
    """R heads of one architecture.

    Args:
        template: the architecture, on the device where heads live; holds whatever is the same in all of them.
        states: where each head starts: one state dict for each.
        trained: names of the parameters that move.
        precision: "bf16" runs heads under autocast.
        way: together or in turn.
    """

    def __init__(
        self,
        template: nn.Module,
        states: Sequence[Mapping[str, Tensor]],
        trained: Sequence[str],
        precision: str,
        way: Way,
    ) -> None:
        self.template = template.requires_grad_(False)
        self.trained, self.precision, self.way = tuple(trained), precision, way
        self.count = len(states)
        self._readers: list[str] | None = None
        self.values: dict[str, Tensor] = {}
        """What moves or differs between heads, (R, ...)."""
        for name, own in template.state_dict().items():
            rows = [state[name].to(own.device) for state in states]
            if name in self.trained or any(row is not rows[0] and not torch.equal(row, rows[0]) for row in rows):
                self.values[name] = torch.stack(rows)
            else:
                own.copy_(rows[0])

    @property
    def moving(self) -> dict[str, Tensor]:
        """The parameters that move, (R, ...) each, in the order of `trained`."""
        return {name: self.values[name] for name in self.trained}

    def backward(self, features: Features, masks: Any, targets: Targets, loss: Loss) -> Stepped:
        """Losses of all heads on a batch and their gradients; nothing moves.

        Args:
            features: of this architecture's number of blocks.
            masks: what the heads' `draw_masks` gave, the same for all.
            targets: of the batch.
            loss: (logits (B, C), targets) -> scalar.
        """
        self.template.train()
        features = self._rounded(features)
        if self.way == "together":
            try:
                return self._backward_together(features, masks, targets, loss)
            except torch.OutOfMemoryError:
                self._too_large()
        return self._backward_in_turn(features, masks, targets, loss)

    def _backward_together(self, features: Features, masks: Any, targets: Targets, loss: Loss) -> Stepped:
        leaves = {name: value.detach().requires_grad_() for name, value in self.moving.items()}
        logits = self._together({**self.values, **leaves}, features, masks)
        losses = [loss(one, targets) for one in logits]
        found = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()), materialize_grads=True)
        gradients = [list(rows) for rows in zip(*(part.unbind() for part in found), strict=True)]
        return Stepped([one.detach() for one in losses], gradients)

    def _backward_in_turn(self, features: Features, masks: Any, targets: Targets, loss: Loss) -> Stepped:
        losses, gradients = [], []
        for row in range(self.count):  # one graph at a time
            values = {name: value[row].detach() for name, value in self.values.items()}
            leaves = {name: values[name].requires_grad_() for name in self.trained}
            value = loss(self._one(values, features, masks), targets)
            gradients.append(list(torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)))
            losses.append(value.detach())
        return Stepped(losses, gradients)

    @torch.no_grad()
    def logits(self, features: Features, means: Mapping[str, Tensor]) -> Float[Tensor, "R B C"]:
        """Logits of all heads, without dropout.

        Args:
            features: of this architecture's number of blocks.
            means: values to use in place of those that move; may be empty.
        """
        self.template.eval()
        features, values = self._rounded(features), {**self.values, **means}
        if self.way == "together":
            try:
                return self._together(values, features, None)
            except torch.OutOfMemoryError:
                self._too_large()
        rows = [{name: value[row] for name, value in values.items()} for row in range(self.count)]
        return torch.stack([self._one(row, features, None) for row in rows])

    def state(self, row: int, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy, on the CPU, of a head's weights and buffers; `means` as in `logits`."""
        values = {**self.values, **means}
        whole = self.template.state_dict()
        return {name: (values[name][row] if name in values else own).cpu().clone() for name, own in whole.items()}

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all heads but these."""
        self.count = len(rows)
        self.values = {name: value[list(rows)] for name, value in self.values.items()}

    def _too_large(self) -> None:
        """Nothing has moved: the same batch goes on in turn, as all that follow."""
        warn(
            f"{self.count} heads together do not fit the device's memory; they are trained in turn, which takes longer."
        )
        self.way = "in turn"

    def _autocast(self, features: Features) -> torch.autocast:
        return torch.autocast(features.cls.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _rounded(self, features: Features) -> Features:
        """In bf16, round the tokens once for all heads; the product that reads them would do so in each."""
        if self.precision != "bf16" or features.patches is None:
            return features
        return features._replace(patches=features.patches.to(torch.bfloat16))

    def _one(self, values: dict[str, Tensor], features: Features, masks: Any) -> Float[Tensor, "B C"]:
        with self._autocast(features):
            return functional_call(self.template, values, (features, masks))

    def _together(self, values: dict[str, Tensor], features: Features, masks: Any) -> Float[Tensor, "R B C"]:
        tokens, readers = features.patches, self._token_readers(features)
        # The CPU's fused attention has no batched form; the GPU's have.
        kernels = sdpa_kernel(SDPBackend.MATH) if features.cls.device.type == "cpu" else nullcontext()
        with self._autocast(features), kernels:
            projected = [
                _project_for_all(tokens, values[f"{name}.weight"], values.get(f"{name}.bias")) for name in readers
            ]

            def run(values: dict[str, Tensor], *projected: Tensor) -> Tensor:
                with ExitStack() as stack:
                    for linear, own in zip(readers.values(), projected, strict=True):
                        stack.enter_context(_given(linear, tokens, own))
                    return functional_call(self.template, values, (features, masks))

            return vmap(run, in_dims=(0, *(2 for _ in projected)))(values, *projected)

    @torch.no_grad()
    def _token_readers(self, features: Features) -> dict[str, nn.Linear]:
        """The linear maps, different in every head, that read the tokens as they are; found by running one head."""
        linears = {name: module for name, module in self.template.named_modules() if isinstance(module, nn.Linear)}
        if self._readers is None:
            reading: set[nn.Module] = set()
            hooks = [
                linear.register_forward_pre_hook(
                    lambda module, inputs: reading.add(module) if inputs[0] is features.patches else None
                )
                for linear in linears.values()
            ]
            with self._autocast(features):
                self.template(features)
            for hook in hooks:
                hook.remove()
            self._readers = [
                name
                for name, linear in linears.items()
                if linear in reading and f"{name}.weight" in self.values
                if linear.bias is None or f"{name}.bias" in self.values
            ]
        return {name: linears[name] for name in self._readers}


def _project_for_all(
    tokens: Float[Tensor, "B N E"] | None, weight: Float[Tensor, "R d E"], bias: Float[Tensor, "R d"] | None
) -> Float[Tensor, "B N R d"]:
    """One product for all heads."""
    assert tokens is not None, "no head reads tokens that are not there"
    flat = F.linear(tokens, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return flat.unflatten(-1, weight.shape[:2])


@contextmanager
def _given(linear: nn.Linear, tokens: Tensor | None, projected: Tensor) -> Iterator[None]:
    """Let a linear map answer these very tokens with what was computed for all heads at once."""

    def forward(inputs: Tensor) -> Tensor:
        return projected if inputs is tokens else F.linear(inputs, linear.weight, linear.bias)

    linear.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del linear.forward


def choose_way(device: torch.device, heads: int) -> Way:
    """How heads are run where nothing else is said."""
    return "together" if device.type == "cuda" and heads > 1 else "in turn"
