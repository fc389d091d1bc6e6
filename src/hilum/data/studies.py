"""Which images of a store belong together: a study's images, and an image's siblings, each in one look-up.

A study is (dataset, patient, study). The table is made once, from the store's index; images that name no study are
studies of their own.
"""

import numpy as np
from jaxtyping import Int64

from hilum.data.store import Store


class StudyIndex:
    """The studies of a store, numbered from 0 in the order of their first image.

    Args:
        store: only its index is read.
    """

    def __init__(self, store: Store) -> None:
        keys = np.char.add(np.char.add(store.datasets, "\x1f"), np.char.add(store.patients, "\x1f"))
        keys = np.char.add(keys, np.where(store.studies == "", store.uids, store.studies))
        _, first, number = np.unique(keys, return_index=True, return_inverse=True)
        order_of_first = np.argsort(first, kind="stable")
        renumbered = np.empty(len(first), np.int64)
        renumbered[order_of_first] = np.arange(len(first))
        self.of_image: Int64[np.ndarray, " N"] = renumbered[number.reshape(-1)].astype(np.int64)
        """Study of each image of the store."""
        self._members = np.argsort(self.of_image, kind="stable").astype(np.int64)
        self._starts = np.searchsorted(self.of_image[self._members], np.arange(len(first) + 1)).astype(np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def images(self, study: int) -> Int64[np.ndarray, " n"]:
        """Store indices of a study's images, ascending.

        Raises:
            IndexError: no such study.
        """
        if not 0 <= study < len(self):
            raise IndexError(f"study {study} of {len(self)}")
        return self._members[self._starts[study] : self._starts[study + 1]]

    def siblings(self, image: int) -> Int64[np.ndarray, " n"]:
        """Store indices of the other images of an image's study."""
        together = self.images(int(self.of_image[image]))
        return together[together != image % len(self.of_image)]
