"""Files that are either whole or absent: write to a temporary name, flush to disk, rename.

Used for every output of every program. Raw data is never opened for writing.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from hilum.core.errors import HilumError


@contextmanager
def atomic_path(path: Path, failure: type[Exception] = OSError) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and takes the name of `path`.

    For writers that want a file name. On any error the temporary file is removed and `path` stays as it was.

    Args:
        path: the file.
        failure: what the writer raises where it cannot write, if not an OSError.

    Raises:
        HilumError: the disk is full or the folder cannot be written; the message names the path.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask gives; some writers make files that only their owner may read
        yield temporary
        temporary.chmod(mode)
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    except (OSError, failure) as error:
        reason = getattr(error, "strerror", None) or error
        raise HilumError(f"Could not write {path}: {reason}. What was there before is unchanged.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """As `atomic_path`, yielding an open binary file."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder under temporary names, safetensors' own among them.

    For a folder that no other process writes. What cannot be removed stays.
    """
    for pattern in (".*.tmp", ".tmp??????"):
        for path in folder.glob(pattern):
            with suppress(OSError):
                path.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step that cannot be seen half done."""
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text to `path` in one step that cannot be seen half done."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON (`json_text`)."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """Strict JSON (NaN becomes an error, not a token) with a final newline."""
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_json(path: Path, error: Callable[[str], Exception]) -> Any:
    """Read JSON; `error` makes the exception to raise when the file is absent or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist.") from None
    except (OSError, ValueError) as cause:
        raise error(f"{path} cannot be read as JSON: {cause}.") from cause


def flush_to_disk(path: Path) -> None:
    """Force to disk a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
