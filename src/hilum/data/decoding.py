"""Decoding many files in parallel: tasks in, outcomes out, in the order of the tasks.

`build` hands over what its plan asks for. Results come back encoded, few at a time, so memory does not grow with the
number of images. This module imports no table library: the processes it starts import it again.
"""

import hashlib
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from hilum.core.children import end_with_parent
from hilum.core.errors import ImageError, StoreError
from hilum.data.checksums import check_content
from hilum.data.greys import grey_histogram
from hilum.data.hashing import perceptual_hash, pixel_sha256, thumbnail
from hilum.data.images import NO_MEMORY, DecodedImage, read_file, read_image
from hilum.data.intensity import PREPROCESS_ID
from hilum.data.raw import RawFormat
from hilum.data.shards import IN_PLACE, encode
from hilum.data.tar import read_span

CHUNK_PIXELS = 2**22
"""Stored pixels handed over at a time."""
IMAGES_PER_WORKER = 64
"""Starting a process costs as much as decoding about so many small images."""


ENVIRONMENT = ("missing_decoder", "unreadable", "decoder_crashed")
"""Reasons that may be the machine's and not the file's: of a decoder that is not installed, of rights, of a network
file system, of memory."""


@dataclass(frozen=True, slots=True)
class Task:
    """One image to decode."""

    uid: str
    path: str
    root: str
    span: tuple[int, int] | None = None
    """Offset and length where the image is a member of the tar at `path`; None where it is the whole file."""
    exact: bool = False
    """The member is a record that `hilum convert` wrote: its bytes are kept where nothing would change."""
    refused: str = ""
    """A reason that was found before decoding (a member of a tar that is a link, ...)."""
    raw: RawFormat | None = None
    """What a file without a header holds; None for files that say so themselves."""
    sha256: bytes = b""
    """What its publisher says that the file's SHA-256 is; empty where nobody says."""


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a record."""

    size: int
    encoding: str
    refuse: tuple[str, ...]
    preprocess_id: str = PREPROCESS_ID


@dataclass(frozen=True)
class Outcome:
    """What became of one image: a record, or a reason."""

    uid: str
    record: bytes = b""
    source: tuple[Any, ...] = ()
    """Stored height and width; the file's rows, cols, bits_stored, photometric, mode, intensity, quality and hashes."""
    greys: np.ndarray | None = None
    """Histogram of the stored pixels."""
    reason: str = ""
    message: str = ""
    found: list[int] | None = None
    """Size and modification time of a refused file, so that a repaired one is tried again."""


def environment_fault(reason: str, message: str) -> bool:
    """Whether a refusal may be the machine's fault: then the same file can be read another time."""
    return reason in ENVIRONMENT or (reason == "too_large" and message.endswith(NO_MEMORY))


def fingerprint(task: Task) -> list[int] | None:
    """Size and modification time of a task's file; None where there is none."""
    try:
        status = (Path(task.root) / task.path).stat()
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def decode_one(task: Task, settings: Settings) -> Outcome:
    """Decode, shrink and encode one image, or say why not."""
    try:
        content = _content(task)
        image = read_image(content, task.uid, settings.size, task.raw, settings.preprocess_id)
        refused = sorted(set(image.quality) & set(settings.refuse))
        if refused:
            raise ImageError(refused[0], f"{task.uid}: refused for its quality: {', '.join(refused)}.")
    except ImageError as error:
        return Outcome(task.uid, reason=error.reason, message=str(error), found=fingerprint(task))
    source = (*image.pixels.shape, image.rows, image.cols, image.bits_stored, image.photometric, image.mode,
              image.intensity, list(image.quality), pixel_sha256(image.sample, image.rows),
              perceptual_hash(thumbnail(image.pixels)))  # fmt: skip
    return Outcome(task.uid, _record(task, settings, content, image), source, grey_histogram(image.pixels))


def _record(task: Task, settings: Settings, content: bytes, image: DecodedImage) -> bytes:
    if settings.encoding == IN_PLACE:
        return hashlib.sha256(content).digest()
    unchanged = image.mode == "jpeg:L" and image.pixels.shape == (image.rows, image.cols)
    if task.exact and settings.encoding == "jpeg95" and unchanged:
        return content  # encoding a JPEG again would lose a little each time
    return encode(image.pixels, settings.encoding)


def _content(task: Task) -> bytes:
    try:
        if task.refused:
            raise ImageError(task.refused, "refused before it was decoded.")
        path = _inside(task)
        content = read_file(path) if task.span is None else read_span(path, *task.span)
        if task.sha256:
            check_content(content, task.sha256)
        return content
    except ImageError as error:
        raise type(error)(error.reason, f"{task.uid}: {error}") from error.__cause__


def _inside(task: Task) -> Path:
    """The file of a task, which must lie under its root also after links are followed."""
    path = Path(task.root) / task.path
    try:
        within = not Path(task.path).is_absolute() and path.resolve().is_relative_to(task.root)
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL
        within = False
    if not within:
        raise ImageError("path_leaves_root", "the path does not stay inside its root.")
    return path


def _decode_chunk(tasks: Sequence[Task], settings: Settings) -> list[Outcome]:
    return [decode_one(task, settings) for task in tasks]


def _prepare_process() -> None:
    """One thread a process; a stop is the parent's to handle; when the parent is killed, end too."""
    cv2.setNumThreads(1)
    reuse_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def reuse_memory() -> None:
    """Have malloc keep the memory of one image for the next: fresh pages cost a seventh of an image's time.

    glibc asks the system for each block above a threshold, and gives it back when it is freed; freeing a larger one,
    of up to 32 MiB, moves the threshold there. The block is never touched. Other allocators are not affected.
    """
    np.empty(2**25 - 2**16, np.uint8)


def _ready() -> bool:
    return True


class Decoders:
    """Decodes tasks in this process or in several, always in order, with few results in memory.

    A file that kills its process (a fault in a decoder's native code) is found by halving in processes of their own,
    and is refused like any other.
    """

    def __init__(self, settings: Settings, workers: int) -> None:
        self.settings, self.workers = settings, workers
        self.pool: ProcessPoolExecutor | None = None

    def in_order(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """Outcomes in the order of `tasks`."""
        length = max(1, min(16, CHUNK_PIXELS // self.settings.size**2))
        chunks = [tasks[start : start + length] for start in range(0, len(tasks), length)]
        if self.workers == 1:
            for chunk in chunks:
                yield from _decode_chunk(chunk, self.settings)
            return
        pending: deque[tuple[Sequence[Task], Future[list[Outcome]]]] = deque()
        upcoming = deque(chunks)
        while upcoming or pending:
            while upcoming and len(pending) < 3 * self.workers:
                chunk = upcoming.popleft()
                pending.append((chunk, self._submit(chunk)))
            chunk, future = pending.popleft()
            try:
                outcomes = future.result()
            except BrokenProcessPool:
                self.close()
                outcomes = self.isolated(chunk)
                pending = deque((other, self._again(other, result)) for other, result in pending)
            yield from outcomes

    def again(self, refused: Sequence[tuple[Task, str]]) -> Iterator[Outcome]:
        """Outcomes of tasks that were refused before, with the reason; what has ended a process may end another."""
        crashed = [task for task, reason in refused if reason == "decoder_crashed"]
        yield from self.in_order([task for task, reason in refused if reason != "decoder_crashed"])
        if crashed:
            yield from self.isolated(crashed)

    def _submit(self, chunk: Sequence[Task]) -> "Future[list[Outcome]]":
        if self.pool is None:
            self.pool = _pool(self.workers)
            try:
                self.pool.submit(_ready).result()
            except BrokenProcessPool as error:
                raise StoreError(
                    "The decoding processes do not start. In a script of your own, put the call under "
                    'if __name__ == "__main__":, or use workers=1.'
                ) from error
        try:
            return self.pool.submit(_decode_chunk, chunk, self.settings)
        except BrokenProcessPool as error:
            failed: Future[list[Outcome]] = Future()
            failed.set_exception(error)
            return failed

    def _again(self, chunk: Sequence[Task], result: "Future[list[Outcome]]") -> "Future[list[Outcome]]":
        """The result, where it came before the processes ended; otherwise another attempt."""
        return result if result.done() and result.exception() is None else self._submit(chunk)

    def isolated(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Decode in a process of its own; where that ends too, by halves, down to the file that ends it."""
        try:
            with _pool(1) as pool:
                return pool.submit(_decode_chunk, tasks, self.settings).result()
        except BrokenProcessPool:
            if len(tasks) > 1:
                middle = len(tasks) // 2
                return [*self.isolated(tasks[:middle]), *self.isolated(tasks[middle:])]
        task = tasks[0]
        message = f"{task.uid}: the decoder stopped abnormally on this file."
        return [Outcome(task.uid, reason="decoder_crashed", message=message, found=fingerprint(task))]

    def close(self) -> None:
        """Stop the processes; what has not started is dropped."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None


def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawned, not forked: the table library's threads do not survive a fork.
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_prepare_process)


@contextmanager
def decoders(settings: Settings, workers: int | None, images: int) -> Iterator[Decoders]:
    """Decoders for about `images` images; their processes end with the block."""
    chosen = workers or min(len(os.sched_getaffinity(0)), max(1, images // IMAGES_PER_WORKER))
    pool, threads = Decoders(settings, chosen), cv2.getNumThreads()
    cv2.setNumThreads(1)
    reuse_memory()
    try:
        yield pool
    finally:
        pool.close()
        cv2.setNumThreads(threads)
