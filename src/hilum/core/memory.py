"""How much memory this process may use: the machine's, or less in a container."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says what a container may use: control groups of version 2, of version 1."""


def usable_memory(limits: Sequence[Path] = LIMITS) -> int:
    """Bytes of physical memory, or the smallest limit that one of the files sets."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in limits:
        with suppress(OSError, ValueError):  # no such file, or "max"
            sizes.append(int(path.read_text(encoding="ascii")))
    return min(sizes)
