"""The order in which heads see their images, epoch by epoch: each once, or images of rare findings more often."""

from collections.abc import Iterator
from itertools import count

import numpy as np
from jaxtyping import Int, Int64

from hilum.core.seeding import derive, stream
from hilum.core.types import POSITIVE
from hilum.data.samplers import WeightedDraw, class_weights
from hilum.heads.config import FitConfig


def epoch_orders(
    config: FitConfig,
    phase: str,
    images: Int64[np.ndarray, " n"],
    labels: Int[np.ndarray, "n C"],
    train_labels: Int[np.ndarray, "m C"],
) -> Iterator[Int64[np.ndarray, " n"]]:
    """The images of one epoch after another, shuffled, without end.

    Args:
        config: `sampling` and the seed.
        phase: "search" or "refit"; each has orders of its own.
        images: store indices of the images to learn from.
        labels: their label codes.
        train_labels: of the training split, where frequencies of findings are taken.
    """
    draw = None
    if config.sampling == "class_aware":
        # Images of one rarest finding lie side by side, so that it too is drawn as often as expected, to the image.
        groups = np.argsort(_rarest(labels, train_labels), kind="stable")
        images = images[groups]
        weights = class_weights(labels[groups], train_labels, config.sampling_power, config.sampling_over)
        draw = WeightedDraw(weights, derive(config.seed, "class-aware", phase))
    for epoch in count():
        drawn = images if draw is None else images[draw.places(epoch)]
        yield stream(config.seed, "head order", phase, epoch).permutation(drawn)


def _rarest(labels: Int[np.ndarray, "n C"], train_labels: Int[np.ndarray, "m C"]) -> Int64[np.ndarray, " n"]:
    """Column of each image's positive finding with the fewest training images; -1: it has none."""
    has = labels == POSITIVE
    positives = (train_labels == POSITIVE).sum(axis=0)
    column = np.where(has, positives, len(train_labels) + 1).argmin(axis=1)
    return np.where(has.any(axis=1), column, -1)
