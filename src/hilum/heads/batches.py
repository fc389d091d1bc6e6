"""An epoch's images in batches; whole studies, where a head or a loss looks at studies.

What a batch needs to say beside features (studies, views, sources) is attached here, in one place for training,
validation and prediction.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64

from hilum.heads.config import FitConfig
from hilum.heads.features import Features
from hilum.heads.orders import epoch_orders


class Batch(NamedTuple):
    """Images that go through a head together."""

    images: Int64[np.ndarray, " B"]
    """Store indices."""
    study: Int64[np.ndarray, " B"] | None = None
    """Study of each image, 0 .. S-1; a study that is drawn twice is two. None: nobody looks at studies."""

    def attach(
        self,
        features: Features,
        views: Int64[np.ndarray, " N"] | None = None,
        sources: Int64[np.ndarray, " N"] | None = None,
    ) -> Features:
        """The features of these images, with what is known of the images.

        Args:
            features: of `images`, in their order.
            views: position in `VIEW_KINDS`, by store index; attached where there are studies.
            sources: number of the dataset, by store index.
        """
        device = features.cls.device

        def put(values: np.ndarray | None) -> torch.Tensor | None:
            return None if values is None else torch.from_numpy(values.astype(np.int64)).to(device)

        return features._replace(
            study=put(self.study),
            view=None if views is None or self.study is None else put(views[self.images]),
            source=None if sources is None else put(sources[self.images]),
        )


class Studies:
    """Some images of a store, grouped by study.

    Args:
        images: store indices.
        study_of_image: study of every image of the store.
    """

    def __init__(self, images: Int64[np.ndarray, " n"], study_of_image: Int64[np.ndarray, " N"]) -> None:
        order = np.argsort(study_of_image[images], kind="stable")
        self.places = order
        """Positions in `images`, sorted by study."""
        self._images = images[order]
        _, self.starts = np.unique(study_of_image[images][order], return_index=True)
        """First of `places` of each study."""
        self._sizes = np.diff(np.append(self.starts, len(images)))

    def __len__(self) -> int:
        return len(self.starts)

    def batches(self, order: Int64[np.ndarray, " S"], size: int) -> list[Batch]:
        """The studies in an order, cut so that a new batch starts with the first study at or past every `size` images.

        A batch has at most `size` images and the rest of its last study.
        """
        sizes = self._sizes[order]
        firsts = np.cumsum(sizes) - sizes
        batch_of_study = firsts // size
        cuts = np.flatnonzero(np.diff(batch_of_study, prepend=-1))
        found = []
        for members in np.split(order, cuts[1:]):
            counts = self._sizes[members]
            study = np.repeat(np.arange(len(members)), counts)
            within = np.arange(len(study)) - np.repeat(np.cumsum(counts) - counts, counts)
            found.append(Batch(self._images[self.starts[members][study] + within], study))
        return found


def epoch_batches(
    config: FitConfig,
    phase: str,
    images: Int64[np.ndarray, " n"],
    labels: Int[np.ndarray, "n C"],
    train_labels: Int[np.ndarray, "m C"],
    study_of_image: Int64[np.ndarray, " N"] | None = None,
    size: int | None = None,
) -> Iterator[list[Batch]]:
    """The batches of one epoch after another, without end.

    Args:
        config: batch size, `sampling` and the seed.
        phase: "search", "refit", ...; each has orders of its own.
        images: store indices of the images to learn from.
        labels: their label codes.
        train_labels: of the training split, where frequencies of findings are taken.
        study_of_image: study of every image of the store; studies are then drawn instead of images, and stay whole. A
            study counts as positive where any of its images does.
        size: images in a batch; None: the settings' own.
    """
    size = size or config.batch_size
    if study_of_image is None:
        for order in epoch_orders(config, phase, images, labels, train_labels):
            yield [Batch(part) for part in _cut(order, size)]
        return
    studies = Studies(images, study_of_image)
    merged = np.maximum.reduceat(labels[studies.places], studies.starts, axis=0)
    for order in epoch_orders(config, phase, np.arange(len(studies)), merged, train_labels):
        yield studies.batches(order, size)


def count_steps(
    epochs: int,
    config: FitConfig,
    phase: str,
    images: Int64[np.ndarray, " n"],
    labels: Int[np.ndarray, "n C"],
    train_labels: Int[np.ndarray, "m C"],
    study_of_image: Int64[np.ndarray, " N"] | None = None,
    size: int | None = None,
) -> int:
    """Steps of so many epochs; arguments as `epoch_batches`.

    Studies that are drawn class-aware hold more or fewer images than there are: their batches are counted.
    """
    if study_of_image is None or config.sampling == "natural":
        return epochs * -(-len(images) // (size or config.batch_size))
    drawn = epoch_batches(config, phase, images, labels, train_labels, study_of_image, size)
    return sum(len(batches) for batches in islice(drawn, epochs))


def in_order(
    images: Int64[np.ndarray, " n"], size: int, study_of_image: Int64[np.ndarray, " N"] | None = None
) -> list[Batch]:
    """All images once, in batches: as they come, or study by study."""
    if study_of_image is None:
        return [Batch(part) for part in _cut(images, size)]
    studies = Studies(images, study_of_image)
    return studies.batches(np.arange(len(studies)), size)


def _cut(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images), size):
        yield images[start : start + size]
