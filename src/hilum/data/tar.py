"""Tar files: what is in one, strictly, without extracting anything.

Only headers are read here (`scan`), and the bytes of one member (`read_span`). Nothing is ever written under a name
that a tar gives. Old, ustar, GNU and pax headers are understood as far as names and sizes go. Unlike readers that
stop quietly at the first header they cannot read, `scan` says how a tar ends: a tar that was cut is never whole.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hilum.core.errors import UnreadableImageError

BLOCK = 512
MAX_NAME_BYTES = 2**16
"""A longer name, or a longer pax header, belongs to no tar of images."""
_REGULAR, _FOLDER = (b"0", b"\0", b"7"), b"5"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _SPARSE = b"L", b"K", b"x", b"g", b"S"
_PAX_RECORD = re.compile(rb"(\d{1,6}) ([^=]+)=")


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a tar."""

    name: str
    offset: int
    """Of its first byte in the tar."""
    length: int
    fault: str = ""
    """Why it is not used: path_leaves_root, not_a_file (a link, a device, a sparse file), truncated."""


@dataclass(frozen=True, slots=True)
class End:
    """How a tar ends: the last thing that `scan` yields."""

    offset: int
    fault: str = ""
    """"" for a whole tar; tar_truncated (no end mark: something may be missing) or tar_damaged (a header that is
    none: what follows cannot be found)."""


def scan(path: Path) -> Iterator[Member | End]:
    """Members of a tar in order, folders left out, then its end.

    Raises:
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        position, name, pax = 0, None, {}
        while True:
            if position + BLOCK > size:  # a header may say any size; it is not followed past the end
                yield End(min(position, size), "tar_truncated")
                return
            file.seek(position)
            header = file.read(BLOCK)
            if not any(header):
                second = file.read(BLOCK)
                whole = len(second) == BLOCK and not any(second)
                yield End(position, "" if whole else "tar_truncated")
                return
            length = _number(header[124:136])
            if length is None or not _sum_matches(header):
                yield End(position, "tar_damaged")
                return
            kind, start = header[156:157], position + BLOCK
            if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
                if length > MAX_NAME_BYTES:
                    yield End(position, "tar_damaged")
                    return
                text = file.read(length)
                if kind == _LONG_NAME:
                    name = text.split(b"\0")[0]
                elif kind == _PAX:
                    pax = _pax(text)
                position = start + _padded(length)
                continue
            stated = pax.get(b"size", b"")
            length = int(stated) if stated.isdigit() and len(stated) < 16 else length
            raw = pax.get(b"path", name if name is not None else _name(header))
            sparse = any(key.startswith(b"GNU.sparse") for key in pax)
            name, pax = None, {}
            position = start + _padded(length)
            if kind == _FOLDER:
                position = start
            elif kind not in _REGULAR or sparse:
                # A link or a device has no data whatever its header says; a sparse file has, behind its maps.
                if kind == _SPARSE:
                    position += _more_maps(file, header, start)
                elif not sparse:
                    position = start
                yield Member(_text(raw), start, 0, "not_a_file")
            elif _leaves(raw):
                yield Member(_text(raw), start, length, "path_leaves_root")
            else:
                yield Member(_text(raw), start, length, "truncated" if start + length > size else "")


def read_span(path: Path, offset: int, length: int) -> bytes:
    """The bytes of one member.

    Raises:
        UnreadableImageError: missing, unreadable, or truncated (the tar has become shorter).
    """
    try:
        with path.open("rb") as file:
            content = _read_at(file, offset, length)
    except FileNotFoundError as error:
        raise UnreadableImageError("missing", "no such tar.") from error
    except OSError as error:
        raise UnreadableImageError("unreadable", f"the tar cannot be read: {error.strerror or error}.") from error
    if len(content) != length:
        raise UnreadableImageError("truncated", f"expected {length} bytes in the tar, found {len(content)}.")
    return content


def _read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    length = min(length, max(0, os.fstat(file.fileno()).st_size - offset))  # memory is never promised by a header
    file.seek(offset)
    return file.read(length)


def _more_maps(file: BinaryIO, header: bytes, start: int) -> int:
    """Bytes of the blocks that go on with the map of an old GNU sparse file."""
    file.seek(start)
    count, more = 0, bool(header[482])
    while more:
        block = file.read(BLOCK)
        count, more = count + 1, len(block) == BLOCK and bool(block[504])
    return count * BLOCK


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _number(field: bytes) -> int | None:
    """An octal field, or GNU's base 256 for large numbers; None where it is neither."""
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
        return value if value < 2**63 else None
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _sum_matches(header: bytes) -> bool:
    """The header's checksum: bytes added up, its own field counted as blanks; old tars added them as signed."""
    stated = _number(header[148:156])
    blanked = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(blanked)
    return stated in (unsigned, unsigned - 256 * sum(byte > 127 for byte in blanked))


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if header[257:263] == b"ustar\0" and prefix else name


def _pax(text: bytes) -> dict[bytes, bytes]:
    """The records of a pax header (LENGTH KEY=VALUE and a newline); what is malformed is not read on."""
    records, position = {}, 0
    while found := _PAX_RECORD.match(text, position):
        end = position + int(found[1])
        if not found.end() < end <= len(text):
            break
        records[found[2]] = text[found.end() : end - 1]
        position = end
    return records


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _leaves(name: bytes) -> bool:
    parts = re.split(rb"[/\\]", name)
    return not name or name[:1] in (b"/", b"\\") or b".." in parts or re.match(rb"[A-Za-z]:", name) is not None
