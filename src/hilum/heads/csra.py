"""Class-specific residual attention: each finding's mean score over the patches, plus its score where it is highest."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hilum.core.errors import ConfigError
from hilum.heads.features import Features
from hilum.heads.standardise import Standardisation

LARGEST = 99.0
"""From this temperature on attention is all on the patch with the largest score (as Kevinz-code/CSRA has it)."""


class CSRAHead(nn.Module):
    """CSRA on patch tokens (Zhu & Wu 2021, arXiv 2108.02456, eq. 2 to 6; several heads: 3.4; Kevinz-code/CSRA).

    Patch p has for finding c and head t the score s = w_tc . x_p. A head's logit is mean_p s + lambda · sum_p a_p s_p
    with a = softmax_p(T_t s); the logits of the heads are added, then a bias for each finding. Scores are not divided
    by the length of their row as in the released code: standardised features could not be folded into such rows.

    Weights start from N(0, 0.01), biases from 0, as in the linear head.

    Args:
        embed_dim: D, channels of a backbone token.
        blocks: n, how many last blocks' patch tokens are concatenated on channels.
        findings: C, outputs.
        weight: lambda, of the attended score beside the mean score; 0 is a linear head on mean tokens.
        temperatures: T of each head; `LARGEST` and more: the largest score.

    Raises:
        ConfigError: no temperature, one that is not positive, or a negative weight.
    """

    needs_patches = True
    needs_studies = False

    def __init__(
        self, embed_dim: int, blocks: int, findings: int, weight: float = 0.1, temperatures: Sequence[float] = (1.0,)
    ) -> None:
        super().__init__()
        if not temperatures or not all(one > 0 for one in temperatures) or not weight >= 0:
            raise ConfigError(
                f"csra_temperatures: expected one or more above 0, found {list(temperatures)}; csra_lambda: expected 0 "
                f"or more, found {weight}."
            )
        self.weight, self.temperatures = weight, tuple(temperatures)
        self.scores = nn.ModuleList(nn.Linear(embed_dim * blocks, findings, bias=False) for _ in self.temperatures)
        self.bias = nn.Parameter(torch.zeros(findings))
        for one in self._linears:
            nn.init.normal_(one.weight, std=0.01)

    @torch.no_grad()
    def absorb(self, scaling: Standardisation) -> None:
        """Give for raw features the logits that it gives for standardised ones."""
        assert scaling.patches is not None, "CSRA was trained on patch tokens"
        mean, deviation = (part.double().cpu() for part in scaling.patches)
        for one in self._linears:
            weight = one.weight.double() / deviation
            # What standardising takes from all of a finding's scores alike moves no attention: the bias takes it up.
            self.bias.copy_((self.bias.double() - (1 + self.weight) * (weight @ mean)).float())
            one.weight.copy_(weight.float())

    def draw_masks(self, features: Features, generator: torch.Generator) -> None:
        """Nothing: CSRA has no dropout."""

    def forward(self, features: Features, masks: None = None) -> Float[Tensor, "B C"]:
        """Logits, float32."""
        logits: Tensor = self.bias
        for temperature, scores in zip(self.temperatures, self._scores(features), strict=True):
            if temperature >= LARGEST:
                attended = scores.amax(dim=1)
            else:
                attended = (scores * (scores * temperature).softmax(dim=1)).sum(dim=1)
            logits = logits + scores.mean(dim=1) + self.weight * attended
        return logits

    def attention(self, features: Features) -> Float[Tensor, "B C h w"]:
        """Residual attention of each finding, mean over heads, on the patch grid; sums to 1."""
        return torch.stack(self._attended(features)).mean(dim=0).unflatten(-1, features.grid)

    def evidence(self, features: Features) -> Float[Tensor, "B C N"]:
        """What each patch adds to a finding's logit, in log-odds, signed: s_p (1 / N + lambda a_p), over all heads.

        Exact: it sums to the logit without its bias.
        """
        total = torch.zeros(())
        attended = self._attended(features)
        for weights, scores in zip(attended, self._scores(features), strict=True):
            total = total + scores.transpose(1, 2) * (1 / scores.shape[1] + self.weight * weights)
        return total

    def _attended(self, features: Features) -> list[Float[Tensor, "B C N"]]:
        """Residual attention of each head."""
        return [
            nn.functional.one_hot(scores.argmax(dim=1), scores.shape[1]).float()  # B C N
            if temperature >= LARGEST
            else (scores * temperature).softmax(dim=1).transpose(1, 2)
            for temperature, scores in zip(self.temperatures, self._scores(features), strict=True)
        ]

    @property
    def _linears(self) -> list[nn.Linear]:
        return [one for one in self.scores if isinstance(one, nn.Linear)]

    def _scores(self, features: Features) -> list[Float[Tensor, "B N C"]]:
        """Scores of each patch, float32, for each head."""
        assert features.patches is not None, "CSRA reads patch tokens"
        return [one(features.patches).float() for one in self._linears]
