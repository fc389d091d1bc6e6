"""The server's side of the decoding process: hands a file over, waits for a limited time, checks what comes back.

One `Decoder` has one process, and one thread at a time uses it. A process that crashed, hung or answered nonsense is
ended and replaced, and the image is refused; the server goes on.
"""

import math
import os
import secrets
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import UInt8

from hilum.core.errors import HilumError
from hilum.core.types import VIEWS
from hilum.deploy.server.decode_child import LONGEST_ID, MODALITIES, read_exactly, read_frame, write_frame
from hilum.deploy.server.errors import REASONS, RefusedError
from hilum.deploy.server.settings import Limits

START_SECONDS = 60.0
"""For a new process to import its decoders, on a machine that does something else too."""
_CRASHED = "The image made the decoder fail, so it was refused."
_SLOW = "Decoding the image took too long, so it was refused."


class DecoderError(HilumError):
    """The process that decodes cannot be had."""


@dataclass(frozen=True)
class Picture:
    """One decoded image and the little that is kept of its file."""

    pixels: UInt8[np.ndarray, "H W"]
    """As the model reads source files."""
    display: UInt8[np.ndarray, "h w"]
    """As a person looks at it."""
    rows: int
    """In the file."""
    columns: int
    quality: tuple[str, ...]
    """Flags of the reader (`DecodedImage.quality`)."""
    kind: str
    """png, jpeg or dicom."""
    view: str = ""
    """What a DICOM header says, one of `VIEWS`; "" where nothing does."""
    modality: str = ""
    """One of `MODALITIES`, "other", or "" where nothing says."""
    burned_in: str = ""
    """Whether a DICOM header says that text is burnt into the pixels: yes, no or unknown; "" of other files."""
    subject: str = ""
    """The same for files of one patient's study, another for any other, "" where the file does not say."""
    ids: tuple[str, ...] = field(default=(), repr=False)
    """Of the patient and of the study, as a DICOM header has them, where they were asked for. They identify people:
    for looking up which cases of an index are this patient's, and for nothing else."""


class Decoder:
    """A process that decodes, and its replacement when it fails.

    Args:
        short_side: what the model shrinks source files to, pixels; None: nothing.
        recipe: intensity recipe, one of `data.intensity.RECIPES`.
        limits: memory and seconds.
        whose: also what a header says of whose a file is.
    """

    def __init__(self, short_side: int | None, recipe: str, limits: Limits, whose: bool = False) -> None:
        self.short_side, self.recipe, self.limits, self.whose = short_side, recipe, limits, whose
        self.replaced = 0
        """Processes that had to be replaced."""
        self._salt = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, content: bytes, number: int) -> Picture:
        """Decode one file.

        Args:
            content: its bytes.
            number: which image of the request it is, counted from 1.

        Raises:
            RefusedError: 422; the file cannot be used, or the process failed on it.
        """
        process = self._running()
        assert process.stdin is not None, "it was started with pipes"
        assert process.stdout is not None, "it was started with pipes"
        overdue = threading.Event()

        def end() -> None:
            overdue.set()
            process.kill()

        alarm = threading.Timer(self.limits.decode_seconds, end)
        alarm.start()
        try:
            request = {
                "size": len(content), "short_side": self.short_side, "recipe": self.recipe,
                "display": self.limits.display_pixels, "whose": self.whose,
            }  # fmt: skip
            write_frame(process.stdin, request, content)
            header = read_frame(process.stdout)
            if "reason" in header:
                raise _refusal(header, number)
            return self._picture(header, process)
        except RefusedError:
            raise
        except Exception as error:  # whatever a process that was taken over or died can lead to: it is replaced
            self._end()
            self.replaced += 1
            slow = overdue.is_set()
            raise RefusedError(
                422, "decoder_slow" if slow else "decoder_crashed", _SLOW if slow else _CRASHED, number
            ) from error
        finally:
            alarm.cancel()

    def start(self) -> None:
        """Start the process now, so that the first image does not wait for it.

        Raises:
            DecoderError: it does not start.
        """
        self._running()

    def close(self) -> None:
        """End the process."""
        self._end()

    @property
    def pid(self) -> int | None:
        """Of the process, where there is one."""
        return None if self._process is None else self._process.pid

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        command = [
            sys.executable, "-m", "hilum.deploy.server.decode_child", str(self.limits.decode_memory),
            str(self.limits.decode_seconds), self._salt,
        ]  # fmt: skip
        # Of this process's environment, which may hold secrets, only where code is; one thread for every library.
        environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(one for one in sys.path if one)
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        assert process.stdout is not None, "it was started with pipes"
        self._process = process
        alarm = threading.Timer(START_SECONDS, process.kill)
        alarm.start()
        try:
            read_frame(process.stdout)
        except (EOFError, ValueError) as error:
            self._end()
            raise DecoderError("The process that decodes images does not start.") from error
        finally:
            alarm.cancel()
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                if stream is not None:
                    stream.close()
        process.wait()

    def _picture(self, header: dict[str, Any], process: "subprocess.Popen[bytes]") -> Picture:
        """What the process said, each value held against what it may be."""
        assert process.stdout is not None, "it was started with pipes"
        shapes = [_shape(header["pixels"], self.limits.pixels), _shape(header["display"], self.limits.pixels)]
        pixels, display = (
            np.frombuffer(read_exactly(process.stdout, math.prod(shape)), np.uint8).reshape(shape) for shape in shapes
        )
        rows, columns = _shape([header["rows"], header["columns"]], self.limits.pixels)
        return Picture(
            pixels=pixels,
            display=display,
            rows=rows,
            columns=columns,
            quality=tuple(one for one in header["quality"] if isinstance(one, str) and one.isidentifier()),
            kind=_one_of(header["kind"], ("png", "jpeg", "dicom")),
            view=_one_of(header.get("view", ""), ("", *VIEWS)),
            modality=_one_of(header.get("modality", ""), ("", "other", *MODALITIES)),
            burned_in=_one_of(header.get("burned_in", ""), ("", "yes", "no", "unknown")),
            subject=_hexadecimal(header.get("subject", "")),
            ids=_ids(header.get("ids", [])),
        )


def _refusal(header: dict[str, Any], number: int) -> RefusedError:
    reason, message = str(header["reason"]), str(header.get("message", ""))[:300]
    if reason not in REASONS:
        raise ValueError("a reason that does not exist")
    status = 413 if reason == "too_large" else 422
    return RefusedError(status, reason, "".join(one for one in message if one.isprintable()), number)


def _shape(value: Any, most: int) -> tuple[int, int]:
    height, width = (int(one) for one in value)
    if height < 1 or width < 1 or height * width > most:
        raise ValueError("an impossible size")
    return height, width


def _one_of(value: Any, possible: tuple[str, ...]) -> str:
    if value not in possible:
        raise ValueError("an impossible value")
    return str(value)


def _hexadecimal(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 64:
        raise ValueError("an impossible value")
    return bytes.fromhex(value).hex()


def _ids(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > 2 or not all(isinstance(one, str) for one in value):
        raise ValueError("an impossible value")
    return tuple(one.encode("utf-8", "replace").decode() for one in value if one and len(one) <= LONGEST_ID)
