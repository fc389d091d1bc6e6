"""The few studies that are remembered, in memory only: the last ones, for a while, under random names of ours."""

import dataclasses
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool

from hilum.deploy.server.settings import Limits


def new_name() -> str:
    """A name for a study that nobody can guess: 22 letters, digits, - and _."""
    return secrets.token_urlsafe(16)


@dataclass(frozen=True)
class Study:
    """What is kept of a study: what the page shows, and nothing of its files."""

    name: str
    document: Mapping[str, Any]
    """`hilum-study-1`."""
    pictures: tuple[bytes, ...]
    """PNG of each image, as a person looks at it."""
    shapes: tuple[tuple[int, int], ...]
    """Height and width of each of them, pixels."""
    maps: Mapping[str, list[np.ndarray] | None]
    """Per finding, a map for each image, on the patch grid; None where there is none."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """The part of each image that was looked at, as shares of its sides."""
    scored: tuple[bool, ...] = ()
    """Which images take part."""
    embedding: np.ndarray | None = None
    """Of the study, float32 (D,), for similar cases."""
    model_views: tuple[tuple[np.ndarray, str], ...] = ()
    """Pixels as the model read them and the view's name, where one finding's similar cases need them again."""
    own_cases: Bool[np.ndarray, " N"] | None = None
    """Which cases of the index are of its own patient, as its files said; the ids themselves are not kept."""
    digest: bytes = b""
    """Of what was sent: the same again is not computed again."""

    def renamed(self) -> "Study":
        """The same under a name of its own, so that who forgets one leaves the other."""
        name = new_name()
        document = {**self.document, "study": {**self.document["study"], "id": name}}
        return dataclasses.replace(self, name=name, document=document)

    @property
    def size(self) -> int:
        """Bytes, about."""
        maps = sum(one.nbytes for views in self.maps.values() if views is not None for one in views)
        views = sum(pixels.nbytes for pixels, _ in self.model_views)
        own = 0 if self.own_cases is None else self.own_cases.nbytes
        return sum(len(picture) for picture in self.pictures) + maps + views + own + 4096


@dataclass
class _Kept:
    study: Study
    since: float = field(default_factory=time.monotonic)


class Results:
    """Studies by name; the one that was looked at longest ago goes first.

    Args:
        limits: how many, how many bytes, how long.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._by_digest: dict[bytes, str] = {}
        self._lock = threading.Lock()

    def add(self, study: Study) -> None:
        """Remember a study, and forget what is too much."""
        with self._lock:
            self._kept[study.name] = _Kept(study)
            if study.digest:
                self._by_digest[study.digest] = study.name
            self._forget_old()
            limits = self.limits
            while len(self._kept) > 1 and (len(self._kept) > limits.results or self._size > limits.result_bytes):
                self._drop(next(iter(self._kept)))

    def get(self, name: str) -> Study | None:
        """A study by name; None where there is none any more."""
        with self._lock:
            self._forget_old()
            if name not in self._kept:
                return None
            self._kept.move_to_end(name)
            return self._kept[name].study

    def find(self, digest: bytes) -> Study | None:
        """The study that the same files with the same views made before."""
        name = self._by_digest.get(digest)
        return None if name is None else self.get(name)

    def remove(self, name: str) -> bool:
        """Forget a study; whether it was there."""
        with self._lock:
            there = name in self._kept
            if there:
                self._drop(name)
            return there

    def __len__(self) -> int:
        with self._lock:
            self._forget_old()
            return len(self._kept)

    @property
    def _size(self) -> int:
        return sum(kept.study.size for kept in self._kept.values())

    def _forget_old(self) -> None:
        oldest = time.monotonic() - self.limits.result_seconds
        for name in [name for name, kept in self._kept.items() if kept.since < oldest]:
            self._drop(name)

    def _drop(self, name: str) -> None:
        digest = self._kept.pop(name).study.digest
        if self._by_digest.get(digest) == name:
            del self._by_digest[digest]
