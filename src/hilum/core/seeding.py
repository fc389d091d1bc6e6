"""One root seed, named independent streams. The only module that touches global generators.

`stream(7, "masking", rank, step)` is the same generator wherever it is asked for, and independent of
`stream(7, "masking", rank, step + 1)`. Nothing depends on the order in which streams are made.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive(root: int, *names: str | int) -> int:
    """A 63-bit seed that is a function of the root seed and the names, in order."""
    text = "\x1f".join([str(int(root)), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(root: int, *names: str | int) -> np.random.Generator:
    """An independent numpy generator for the named purpose."""
    return np.random.default_rng(derive(root, *names))


def torch_stream(root: int, *names: str | int, device: str = "cpu") -> "torch.Generator":
    """An independent torch generator for the named purpose."""
    import torch

    return torch.Generator(device=device).manual_seed(derive(root, *names))


@contextmanager
def forked(root: int, *names: str | int) -> Iterator[None]:
    """Inside, the global generators (random, numpy, torch) follow the named stream; outside, they are untouched.

    For code that takes no generator: parameter initialisation of torch modules, third-party functions.
    """
    import torch

    seed = derive(root, *names)
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
