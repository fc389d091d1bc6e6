"""Training on several datasets at once: how much each counts, and what each calls present.

Datasets differ in who labelled them and how: a label read off a report is not one given by a radiologist, and a blank
means one thing here and another there. A weight makes a whole dataset count less. A bias per dataset and finding lets
a dataset call a finding present more or less often than the one that is predicted for, without the weights of the head
having to explain that.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.heads.features import Features
from hilum.heads.losses import Targets
from hilum.heads.standardise import Standardisation

INNER, BIASES = "head.", "source_bias"


class SourceBiased(nn.Module):
    """A head in training, plus a bias for every finding and every dataset but the target (number 0), whose bias is 0.

    The biases are left away when training is over (`plain_state`), and act in training mode alone: what is judged on
    validation is what will be saved, a prediction for the target, whatever datasets the images are from. They start at
    0 and come under weight decay as everything else; a finding that is unknown in a dataset keeps 0 there.

    Args:
        head: what is trained; named `head` in the state.
        sources: S, how many datasets, the target among them.
        findings: C; None: the number of the head's biases.

    Raises:
        ConfigError: less than two sources.
    """

    def __init__(self, head: nn.Module, sources: int, findings: int | None = None) -> None:
        super().__init__()
        if sources < 2:
            raise ConfigError(f"Biases by dataset need at least two datasets, found {sources}.")
        self.head: Any = head
        self.needs_patches: bool = head.needs_patches  # type: ignore[assignment]
        self.needs_studies: bool = head.needs_studies  # type: ignore[assignment]
        self.source_bias = nn.Parameter(torch.zeros(sources - 1, findings or _findings(self.head)))
        self.register_load_state_dict_pre_hook(_take_plain)

    @property
    def bias(self) -> nn.Parameter:
        """Of the head: what the target has."""
        return self.head.bias

    def absorb(self, scaling: Standardisation) -> None:
        """As the head does; the biases by dataset stay."""
        self.head.absorb(scaling)

    def draw_masks(self, features: Features, generator: torch.Generator) -> Any:
        """Masks of the head."""
        return self.head.draw_masks(features, generator)

    def forward(self, features: Features, masks: Any = None) -> Float[Tensor, "B C"]:
        """Logits; in evaluation, or where `features.source` is None, those of the target."""
        logits = self.head(features, masks)
        if features.source is None or not self.training:
            return logits
        biases = torch.cat([torch.zeros_like(self.source_bias[:1]), self.source_bias])  # S C
        return logits + biases[features.source]


def _findings(head: Any) -> int:
    """Outputs of a head; one with an output row for all findings has a single bias and says their number in `shape`."""
    inner = getattr(head, "inner", head)
    shape = getattr(inner, "shape", None)
    return head.bias.numel() if shape is None else int(shape[0])


def _take_plain(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Let a state without biases by dataset, as heads are saved, be loaded: the biases start from 0."""
    assert isinstance(module, SourceBiased)
    if prefix + BIASES in state:
        return
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(prefix + INNER)]:
        state[prefix + INNER + name.removeprefix(prefix)] = state.pop(name)
    state[prefix + BIASES] = torch.zeros_like(module.source_bias)


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the head alone, from that of a `SourceBiased`; that of any other head comes back as it is."""
    if BIASES not in state:
        return dict(state)
    return {name.removeprefix(INNER): value for name, value in state.items() if name != BIASES}


def weigh_sources(targets: Targets, source: Int64[Tensor, " B"], weights: Float[Tensor, " S"]) -> Targets:
    """Targets whose entries count as much more or less as their image's dataset does."""
    return targets._replace(weights=targets.weights * weights[source, None])


def parse_source_weights(texts: Sequence[str], sources: Sequence[str]) -> Float32[np.ndarray, " S"]:
    """Weights of datasets from texts such as chexpert=0.5; those that are not named have 1.

    Args:
        texts: NAME=WEIGHT each.
        sources: names of the datasets, in the order of the result.

    Raises:
        ConfigError: a text of another form, a dataset twice, or a weight that is negative or not finite.
        UnknownNameError: a dataset that is not among the sources.
    """
    weights, named = np.ones(len(sources), np.float32), set[str]()
    for text in texts:
        name, separator, value = text.partition("=")
        if name not in sources:
            raise UnknownNameError("training dataset", name, sources)
        try:
            weight = float(value)
        except ValueError:
            weight = -1.0
        if not separator or name in named or not 0 <= weight < float("inf"):
            raise ConfigError(f"source_weights: expected NAME=WEIGHT, once each and 0 or more, found {text!r}.")
        named.add(name)
        weights[list(sources).index(name)] = weight
    return weights
