"""Scoring findings from text: queries projected from sentence vectors, one output row for all, classes dropped.

The zero-shot form of ML-Decoder (Ridnik et al. 2021, section 3.4): nothing in the head belongs to a finding but its
text vector, so a finding that was never labelled is scored by giving its vector. In training a random part of the
findings is left out of every step's loss, so that the projection does not settle on one fixed set.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from hilum.core.errors import ConfigError
from hilum.core.seeding import stream
from hilum.heads.batches import Batch
from hilum.heads.features import Features
from hilum.heads.losses import Targets
from hilum.heads.registry import Head, HeadConfig, build_head
from hilum.heads.training import LearningSet

VECTORS = "decoder.text_queries.vectors"
"""The only tensor of such a head that has a row for each finding."""


def is_open(config: HeadConfig) -> bool:
    """Whether a head scores any finding that it is given a vector of."""
    return config.text_dim > 0 and config.shared_output


@dataclass(frozen=True)
class DroppedClasses(LearningSet):
    """A learning set of which every batch leaves out a random part of the findings.

    Queries do not look at each other, so leaving a finding out of the loss is leaving it out altogether.
    """

    drop: float = 0.3
    """Share of the findings that a batch does without."""
    generator: np.random.Generator = field(default_factory=lambda: stream(0, "class dropout"))

    def targets(self, batch: Batch, features: Features) -> Targets:
        """As `LearningSet.targets`, with weight 0 for the findings that are dropped; never for all of them."""
        targets = super().targets(batch, features)
        count = targets.weights.shape[1]
        dropped = self.generator.permutation(count)[: min(round(self.drop * count), count - 1)]
        kept = torch.ones(count, device=targets.weights.device)
        kept[torch.from_numpy(dropped)] = 0
        return targets._replace(weights=targets.weights * kept)


def held_out_findings(scored: Sequence[int], share: float, seed: int) -> list[int]:
    """Positions of the findings on which generalisation to unseen ones is tested; at least one, never all.

    Args:
        scored: findings with positives in training and validation.
        share: of these.
        seed: of the draw.

    Raises:
        ConfigError: fewer than two findings.
    """
    if len(scored) < 2:
        raise ConfigError(
            f"Scoring from text is learned on findings with labels, some of which are held out for a test; found "
            f"{len(scored)} with positives in both train and val, expected at least 2."
        )
    count = min(max(round(share * len(scored)), 1), len(scored) - 1)
    return sorted(int(place) for place in stream(seed, "held-out findings").permutation(scored)[:count])


def give_vectors(head: Head, config: HeadConfig, vectors: Float32[np.ndarray, "K T"]) -> tuple[HeadConfig, Head]:
    """The same head for other findings: all tensors but the text vectors are taken over.

    Raises:
        ConfigError: a head that does not score from text, or vectors of another width.
    """
    if not is_open(config):
        raise ConfigError("This head has tensors of its own for each finding; it cannot score others from text.")
    if vectors.shape[1] != config.text_dim:
        raise ConfigError(
            f"The text vectors have {vectors.shape[1]} numbers, those that the head was trained with "
            f"{config.text_dim}. Encode the new findings with the same sentence encoder."
        )
    described = replace(config, findings=len(vectors))
    made = build_head(described, torch.from_numpy(vectors))
    state = dict(made.state_dict())
    state |= {name: value.detach().clone() for name, value in head.state_dict().items() if name != VECTORS}
    made.load_state_dict(state)
    return described, made.eval().requires_grad_(False)


def same_encoder(
    known: Float[Tensor, "C T"], given: Float32[np.ndarray, "C T"], names: Sequence[str], least: float = 0.99
) -> None:
    """Refuse vectors of another encoder, or of other texts, than the head was trained with.

    Args:
        known: vectors in the head.
        given: vectors of the same findings in the file.
        names: these findings.
        least: cosine that they must reach.

    Raises:
        ConfigError: names the first that differs.
    """
    own = known.detach().double().cpu().numpy()
    if own.shape != given.shape:
        raise ConfigError(f"The text vectors have {given.shape[1]} numbers, those of the head {own.shape[1]}.")
    lengths = np.linalg.norm(own, axis=1) * np.linalg.norm(given, axis=1)
    cosine = (own * given).sum(axis=1) / lengths
    for name, value in zip(names, cosine.tolist(), strict=True):
        if value < least:
            raise ConfigError(
                f"The vector of {name!r} is not the one that the head was trained with (cosine {value:.3f}). Encode "
                "all findings with the same sentence encoder and the same wording."
            )
