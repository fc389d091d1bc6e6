"""A head with later heads beside it: how findings are added without touching the outputs that were there.

The first head is called as it was, on the same features, and its logits come first. Every extension is a head of its
own; tensors that it takes over from the first one unchanged are shared, not copied.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hilum.core.errors import ConfigError
from hilum.core.meta import without_weights
from hilum.heads.features import Features
from hilum.heads.registry import Head, HeadConfig, build_head


class ExtendedHead(nn.Module):
    """Logits of a head, then those of each extension.

    Args:
        main: the first head; its forward call is the one it has alone.
        extensions: further heads on the same blocks of the same backbone, in the order in which they were added.
        outputs: findings of each head, the first one first.
    """

    def __init__(self, main: Head, extensions: Iterable[Head], outputs: Sequence[int]) -> None:
        super().__init__()
        self.main, self.outputs = main, tuple(outputs)
        self.extensions = nn.ModuleList(extensions)
        self.needs_patches = any(head.needs_patches for head in self.heads)
        self.needs_studies = any(head.needs_studies for head in self.heads)

    @property
    def heads(self) -> list[Head]:
        """All of them, the first one first."""
        return [self.main, *self.extensions]  # type: ignore[list-item]

    def forward(self, features: Features) -> Float[Tensor, "B C"]:
        """Logits, float32, columns in the order of `heads`; without dropout."""
        return torch.cat([head(features) for head in self.heads], dim=1)

    def attention(self, features: Features) -> Float[Tensor, "B C h w"] | None:
        """Maps of every finding, NaN for those of a head that has none; None where no head has any."""
        maps = []
        for head in self.heads:
            attend = getattr(head, "attention", None)
            maps.append(None if attend is None else attend(features))
        if all(one is None for one in maps):
            return None
        batch, grid = features.cls.shape[0], features.grid
        return torch.cat([
            torch.full((batch, count, *grid), torch.nan, device=features.cls.device) if one is None else one
            for count, one in zip(self.outputs, maps, strict=True)
        ], dim=1)  # fmt: skip


def per_finding(config: HeadConfig) -> dict[str, int]:
    """Tensors of a head that have an entry for each finding, with the axis that counts findings.

    Found by building the head for one finding more and comparing shapes, so that it holds for every kind of head. What
    is not listed does not depend on how many findings there are, and can be taken over by an extension.
    """
    with without_weights():
        one, more = (build_head(replace(config, findings=config.findings + extra)).state_dict() for extra in (0, 1))
    axes = {}
    for name, value in one.items():
        differing = [axis for axis, size in enumerate(value.shape) if more[name].shape[axis] != size]
        if len(differing) == 1:
            [axes[name]] = differing
    return axes


def grown_state(
    fresh: Mapping[str, Tensor], trained: Mapping[str, Tensor], axes: Mapping[str, int], parents: Mapping[int, int]
) -> dict[str, Tensor]:
    """Initial weights of an extension that takes over everything but its findings' own entries.

    Args:
        fresh: weights of a newly initialised head of the extension's shape.
        trained: weights of the head that it grows from.
        axes: `per_finding` of the extension's head.
        parents: by position of a new finding, the position of the old one whose entries it starts from (Rib Fracture
            from Fracture); others start as a fresh head does.

    Raises:
        ConfigError: the heads are not of one architecture.
    """
    state = {}
    for name, value in fresh.items():
        old = trained.get(name)
        if name not in axes:
            if old is None or old.shape != value.shape:
                raise ConfigError(
                    f"The model's head has no tensor {name!r} of shape {tuple(value.shape)} to take over."
                )
            state[name] = old.detach().clone()
            continue
        grown, axis = value.detach().clone(), axes[name]
        for new, parent in parents.items():
            there = old is not None and old.ndim == value.ndim and parent < old.shape[axis]  # not with a shared row
            source = old.select(axis, parent) if there and old is not None else None
            if source is not None and source.shape == grown.select(axis, new).shape:
                grown.select(axis, new).copy_(source)
        state[name] = grown
    return state


def norms_and_biases(names: Iterable[str]) -> tuple[str, ...]:
    """Tensors of normalisation layers and biases: a small adapter that leaves every matrix as it is.

    Training these alone adapts a network to a new task with few labels (Ben Zaken et al. 2022, "BitFit").
    """
    return tuple(name for name in names if "norm" in name or name.endswith("bias"))
