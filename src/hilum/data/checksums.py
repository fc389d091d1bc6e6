"""Published checksums: the SHA256SUMS.txt that PhysioNet puts beside a release (MIMIC-CXR-JPG, BRAX, VinDr-CXR).

A file whose bytes changed and that still decodes shows another picture, and nothing but its checksum tells. `build`
compares each image that is listed, with the bytes that it reads to decode anyway.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from hilum.core.errors import ManifestError, PathError, UnreadableImageError

NAME = "SHA256SUMS.txt"
Published = Mapping[str, Mapping[str, bytes]]
"""Root key -> path relative to that root -> SHA-256."""
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *]?(?:\./)?([^\s\\/](?:[^\\\x00-\x1f]*[^\s\\])?)")
_REMEDY = "Download it again, or leave the checksums out with --no-checksums."


def read_checksums(path: Path) -> dict[str, bytes]:
    """Read the output of sha256sum: path relative to its folder -> SHA-256 (32 bytes).

    Raises:
        PathError: the file cannot be read.
        ManifestError: not UTF-8, nothing in it, a line of another form, a path that leaves the folder or is there
            twice; names the row, never the path.
    """
    try:
        lines = path.read_bytes().decode().splitlines()
    except OSError as error:
        raise PathError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 text. {_REMEDY}") from error
    found: dict[str, bytes] = {}
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None or ".." in match[2].split("/"):
            raise ManifestError(
                f"{path}, row {row}: expected 64 hexadecimal digits, a space and a path under this folder. {_REMEDY}"
            )
        if match[2] in found:
            raise ManifestError(f"{path}, row {row}: the file is listed a second time. {_REMEDY}")
        found[match[2]] = bytes.fromhex(match[1])
    if not found:
        raise ManifestError(f"{path} lists no file. {_REMEDY}")
    return found


def published_checksums(roots: Mapping[str, Path]) -> dict[str, dict[str, bytes]]:
    """The checksums of every root that has a SHA256SUMS.txt, by root key; raises as `read_checksums`."""
    return {key: read_checksums(root / NAME) for key, root in roots.items() if (root / NAME).is_file()}


def check_content(content: bytes, expected: bytes) -> None:
    """Raise UnreadableImageError (checksum_mismatch) unless these are the published bytes."""
    found = hashlib.sha256(content).digest()
    if found != expected:
        raise UnreadableImageError(
            "checksum_mismatch",
            f"its SHA-256 begins {found.hex()[:12]}, {NAME} says {expected.hex()[:12]}. Download the file again.",
        )
