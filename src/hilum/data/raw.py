"""Files without a header: rows of big-endian words of 16 bits, as in JSRT.

Nothing in such a file says what it is, so its source says it, in the manifest's column `mode`:
"raw:2048x2048:uint16be:12:inverted" is height x width, type of a word, bits that count, and white lowest. The number
of bytes must be exactly that of the picture, and no word may use a bit that does not count.
"""

import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt16

from hilum.core.errors import ManifestError, UnreadableImageError
from hilum.data.containers import check_pixels

PREFIX = "raw:"
_PATTERN = re.compile(r"raw:(\d{1,5})x(\d{1,5}):uint16be:(\d{1,2})(:inverted)?")


@dataclass(frozen=True)
class RawFormat:
    """What a file without a header holds.

    Args:
        rows: height.
        cols: width.
        bits: that count, the lowest of 16.
        inverted: the lowest value is white.
    """

    rows: int
    cols: int
    bits: int
    inverted: bool

    def __str__(self) -> str:
        """As the manifest's column `mode` has it."""
        return f"{PREFIX}{self.rows}x{self.cols}:uint16be:{self.bits}{':inverted' if self.inverted else ''}"

    def words(self, content: bytes) -> UInt16[np.ndarray, "H W"]:
        """Stored values, 0 black: already turned round where the file is inverted.

        Raises:
            UnreadableImageError: zero_bytes, truncated, size_mismatch (more bytes than the picture has), damaged (a
                value that is too large).
            UnsupportedImageError: too_large.
        """
        check_pixels(self.rows, self.cols)
        expected = 2 * self.rows * self.cols
        what = f"{len(content)} bytes; {self.rows} x {self.cols} words of 16 bits are {expected}."
        if not content:
            raise UnreadableImageError("zero_bytes", "the file is empty (0 bytes).")
        if len(content) < expected:
            raise UnreadableImageError("truncated", what)
        if len(content) > expected:
            raise UnreadableImageError("size_mismatch", what)
        values = np.frombuffer(content, ">u2").astype(np.uint16).reshape(self.rows, self.cols)
        top = 2**self.bits - 1
        if int(values.max()) > top:
            raise UnreadableImageError("damaged", f"a value of {int(values.max())}; {self.bits} bits end at {top}.")
        return np.uint16(top) - values if self.inverted else values


def raw_format(mode: str | None) -> RawFormat | None:
    """The format that a manifest's `mode` names; None where it names a file with a header, or nothing.

    Raises:
        ManifestError: it starts like one of a raw file and is none.
    """
    if mode is None or not mode.startswith(PREFIX):
        return None
    found = _PATTERN.fullmatch(mode)
    if found is None or not 8 < int(found[3]) <= 16:
        raise ManifestError(f"mode {mode[:60]!r}: expected raw:HEIGHTxWIDTH:uint16be:BITS, then :inverted or nothing.")
    return RawFormat(int(found[1]), int(found[2]), int(found[3]), found[4] is not None)
