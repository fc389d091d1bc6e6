import importlib
import sys
import zlib

import numpy as np
import pytest

from hilum.core import checksum


def test_both_implementations_give_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    records = [rng.integers(0, 256, length, np.uint8) for length in (0, 1, 7, 8, 4095, 70_001)]
    fast = [checksum.crc32(record.data) for record in records]
    assert checksum.crc32 is not zlib.crc32
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "isal.isal_zlib", None)  # importing it fails
        plain = importlib.reload(checksum)
        assert plain.crc32 is zlib.crc32
        assert [plain.crc32(record.data) for record in records] == fast
    importlib.reload(checksum)
    assert checksum.crc32(b"123456789") == 0xCBF43926  # the check value of CRC-32
