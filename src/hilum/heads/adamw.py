"""AdamW for heads that are trained side by side: a learning rate for each, all else in common.

Parameters and moments of R heads are stacked on a leading axis, so that heads can be dropped by an index. The update of
each head is torch's own fused one on its slices: equal to `torch.optim.AdamW(fused=True)` on that head alone, bit for
bit (tests/unit/heads/test_adamw.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

BETAS = (0.9, 0.999)
EPS = 1e-8


class StackedAdamW:
    """Loshchilov 2019, "Decoupled Weight Decay Regularization", algorithm 2, on every given parameter.

    Args:
        parameters: each of shape (R, ...), contiguous; changed in place by `step`.
        weight_decay: per unit of rate, on all of them.
    """

    def __init__(self, parameters: Sequence[Tensor], weight_decay: float) -> None:
        self.weight_decay = weight_decay
        self._place(
            list(parameters),
            [torch.zeros_like(parameter) for parameter in parameters],
            [torch.zeros_like(parameter) for parameter in parameters],
            [torch.zeros(len(parameter), device=parameter.device) for parameter in parameters],
        )

    def step(self, gradients: Sequence[Sequence[Tensor]], rates: Sequence[float]) -> None:
        """Move every head.

        Args:
            gradients: of each head, one for each parameter, in their order.
            rates: learning rate of each head, now.
        """
        with torch.no_grad():
            for rows, gradient, rate in zip(self._rows, gradients, rates, strict=True):
                parameters, first, second, steps = rows
                dense = [part.contiguous() for part in gradient]  # the fused update reads memory in the order it lies
                adamw(
                    parameters, dense, first, second, [], steps, fused=True, amsgrad=False, beta1=BETAS[0],
                    beta2=BETAS[1], lr=rate, weight_decay=self.weight_decay, eps=EPS, maximize=False,
                )  # fmt: skip

    def keep(self, parameters: Sequence[Tensor], positions: Sequence[int]) -> None:
        """Go on with some of the heads.

        Args:
            parameters: theirs, (len(positions), ...) each.
            positions: where they were.
        """
        index = list(positions)
        first, second, steps = ([part[index] for part in kind] for kind in self._state)
        self._place(list(parameters), first, second, steps)

    def _place(self, parameters: list[Tensor], *state: list[Tensor]) -> None:
        assert all(parameter.is_contiguous() for parameter in parameters), "slices must share the stacked memory"
        self._state = state
        heads = len(parameters[0]) if parameters else 0
        self._rows = [tuple([part[row] for part in kind] for kind in (parameters, *state)) for row in range(heads)]
