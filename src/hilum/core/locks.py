"""The lock that keeps two processes off one run folder."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hilum.core.errors import HilumError

LOCK_NAME = ".lock"
_SECONDS_FOR_A_DEAD_OWNER = 10.0


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the lock ends with the process, however it ends.

    Raises:
        HilumError: another process has it; names its id. Or no folder can be made there.
    """
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+")
    except OSError as error:
        raise HilumError(f"{folder} cannot be written as a folder: {error.strerror or error}.") from error
    with opened as file:
        waited = time.monotonic()
        while not _try_lock(file.fileno()):
            file.seek(0)
            owner = file.read().strip() or "unknown"
            # The children of a killed process (data workers) hold its lock until they notice, seconds later.
            if _is_alive(owner) or time.monotonic() - waited > _SECONDS_FOR_A_DEAD_OWNER:
                raise HilumError(
                    f"{folder} is in use by process {owner}. Two programs must not write one run: wait for it, stop "
                    "it, or choose another folder."
                )
            time.sleep(0.2)
        try:  # past the file's buffer, which would be written once more at the end
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()}\n".encode())
        except OSError as error:
            raise HilumError(f"Could not write {path}: {error.strerror or error}.") from error
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _is_alive(owner: str) -> bool:
    if not owner.isdigit():
        return True
    try:
        os.kill(int(owner), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
