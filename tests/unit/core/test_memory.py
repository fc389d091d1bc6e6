import os
from pathlib import Path

from hilum.core.memory import LIMITS, usable_memory

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_smaller_of_machine_and_container_counts(tmp_path: Path) -> None:
    limit, unlimited, high, broken = (tmp_path / name for name in ("limit", "unlimited", "high", "broken"))
    limit.write_text("1048576\n")
    unlimited.write_text("max\n")  # version 2 without a limit
    high.write_text("9223372036854771712\n")  # version 1 without a limit
    broken.write_bytes(b"\xff\xfe")
    assert usable_memory([unlimited, limit]) == usable_memory([limit, high]) == 1048576
    assert usable_memory([unlimited, high, broken, tmp_path / "absent"]) == usable_memory([]) == MACHINE


def test_what_is_usable_here_is_no_more_than_the_machine_has() -> None:
    assert 0 < usable_memory() <= MACHINE
    assert all(path.is_absolute() for path in LIMITS)
