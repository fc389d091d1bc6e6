"""The body of an upload, counted while it arrives: files in memory, never on disk, and never more than is allowed.

The parser is python-multipart's, with our own callbacks in front of memory, because frameworks spool uploads to
temporary files under names of their own. Names that a client gives to files are not even read.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from hilum.core.types import VIEWS
from hilum.deploy.server.errors import RefusedError, busy
from hilum.deploy.server.settings import MEBIBYTE, Limits

Receive = Callable[[], Awaitable[Any]]
FRAMING = 64 * 1024
"""Bytes that boundaries and headers of parts may take beyond the files."""
VIEW_BYTES = 16
DRAIN_SECONDS, DRAIN_BYTES = 1.0, 4 * MEBIBYTE
"""How long a refused client is listened to, so that it comes to read the refusal."""


class Held:
    """Bytes that all uploads hold together.

    Args:
        most: of them.
    """

    def __init__(self, most: int) -> None:
        self.most, self.now = most, 0

    def take(self, count: int) -> None:
        """Count bytes that have arrived.

        Raises:
            RefusedError: 503; there is no room for them.
        """
        if self.now + count > self.most:
            raise busy("busy", "The server holds as many images as it can. Try again in a moment.", 2)
        self.now += count

    def give_back(self, count: int) -> None:
        """Count bytes that are gone."""
        self.now -= count


class Upload:
    """What a client sent for one study."""

    def __init__(self, held: Held) -> None:
        self.files: list[bytes] = []
        self.views: list[str] = []
        self.size = 0
        """Bytes that this upload holds of `held`."""
        self._held = held

    def release(self) -> None:
        """Let go of the files; may be called again."""
        self.files = []
        self._held.give_back(self.size)
        self.size = 0

    def hold(self, count: int) -> None:
        """Count bytes that came in; raises as `Held.take`."""
        self._held.take(count)
        self.size += count


def boundary_of(headers: Mapping[str, str]) -> bytes:
    """The boundary of a multipart body, from headers in lower case.

    Raises:
        RefusedError: 415; another kind of body. 400; no boundary, or one that cannot be.
    """
    kind, options = parse_options_header(headers.get("content-type", ""))
    if kind.lower() != b"multipart/form-data":
        raise RefusedError(415, "content_type", "Images are sent as multipart/form-data, in parts named files.")
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        raise RefusedError(400, "boundary", "The multipart body has no boundary of 1 to 70 characters.")
    return boundary


def declared_size(headers: Mapping[str, str], limits: Limits) -> int | None:
    """Content-Length, or None for a chunked body; one that is too large is refused before anything is read.

    Raises:
        RefusedError: 411 neither of the two, 400 not a number, 413 too large.
    """
    declared = headers.get("content-length")
    if declared is None:
        if "transfer-encoding" not in headers:
            raise RefusedError(411, "length_required", "Say how long the body is, or send it in chunks.")
        return None
    if not declared.isascii() or not declared.isdigit() or len(declared) > 19:
        raise RefusedError(400, "content_length", "Content-Length is not a length.")
    if int(declared) > limits.study_bytes + FRAMING:
        raise _study_too_large(limits)
    return int(declared)


async def receive_upload(receive: Receive, headers: Mapping[str, str], limits: Limits, held: Held) -> Upload:
    """Read the body of one request.

    Args:
        receive: of ASGI.
        headers: of the request, names in lower case.
        limits: on files, bytes and seconds.
        held: what all requests hold; the caller gives this one's bytes back with `Upload.release`.

    Raises:
        RefusedError: 400 malformed or the client goes away, 408 too slow, 411 without length, 413 too much, 415 another
            kind of body, 422 views that do not fit, 503 no room.
    """
    declared_size(headers, limits)
    upload = Upload(held)
    parts = _Parts(upload, limits)
    try:
        parser = MultipartParser(boundary_of(headers), parts.callbacks())
        await _feed(receive, parser, limits)
        if not parts.ended:
            raise _malformed()
        parts.check()
    except FormParserError as error:
        upload.release()
        raise _malformed() from error
    except BaseException:
        upload.release()
        raise
    return upload


async def _feed(receive: Receive, parser: MultipartParser, limits: Limits) -> None:
    start, total = time.monotonic(), 0
    while True:
        left = start + limits.body_seconds + total / MEBIBYTE - time.monotonic()
        try:
            message = await asyncio.wait_for(receive(), max(left, 0.001))
        except TimeoutError:
            raise RefusedError(
                408, "too_slow", "The body did not arrive in time.", headers={"Connection": "close"}
            ) from None
        if message["type"] == "http.disconnect":
            raise client_gone()
        chunk = message.get("body", b"")
        total += len(chunk)
        if total > limits.study_bytes + FRAMING:
            raise _study_too_large(limits)
        if chunk:
            parser.write(chunk)
        if not message.get("more_body", False):
            parser.finalize()
            return


class Intake:
    """`receive` of ASGI that knows whether the body has ended.

    Args:
        scope: of the request.
        receive: of ASGI.
    """

    def __init__(self, scope: Any, receive: Receive) -> None:
        names = dict(scope["headers"])
        self.ended = b"transfer-encoding" not in names and names.get(b"content-length", b"0") == b"0"
        self._expects = b"expect" in names
        self._receive = receive

    async def __call__(self) -> Any:
        """The next message."""
        message = await self._receive()
        self.ended = self.ended or message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Listen a little longer to a client that was refused, so that it comes to read why; one that waits to be asked
        for its body, or sends for ever, is left alone.
        """
        total = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self.ended and not self._expects and total < DRAIN_BYTES:
                    total += len((await self()).get("body", b""))


class _Parts:
    """Callbacks of the parser: the part that is being read, held against the limits before a byte of it is kept."""

    def __init__(self, upload: Upload, limits: Limits) -> None:
        self.upload, self.limits = upload, limits
        self.ended = False
        self._field, self._value = b"", b""
        self._disposition = b""
        self._name = b""
        self._content = bytearray()

    def callbacks(self) -> Any:
        """By the names that the parser knows."""
        return {
            "on_part_begin": self._begin, "on_header_field": self._header_field, "on_header_value": self._header_value,
            "on_header_end": self._header_end, "on_headers_finished": self._headers_finished,
            "on_part_data": self._data, "on_part_end": self._part_end, "on_end": self._end,
        }  # fmt: skip

    def check(self) -> None:
        """Hold the finished upload against what one study can be."""
        upload = self.upload
        if not upload.files:
            raise RefusedError(422, "no_image", "A study needs at least one image, in a part named files.")
        if upload.views and len(upload.views) != len(upload.files):
            raise RefusedError(422, "views", "Give as many views as files, in the same order, or none.")

    def _begin(self) -> None:
        self._disposition = self._name = self._field = self._value = b""
        self._content = bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        field = self._field.lower()
        if field == b"content-disposition":
            self._disposition = self._value
        if field == b"content-transfer-encoding" and self._value.strip().lower() not in (b"binary", b"8bit", b"7bit"):
            raise RefusedError(415, "transfer_encoding", "Files are sent as they are, without an encoding.")
        self._field = self._value = b""

    def _headers_finished(self) -> None:
        self._name = parse_options_header(self._disposition)[1].get(b"name", b"")
        if self._name not in (b"files", b"views"):
            raise RefusedError(400, "unknown_field", "Parts are named files or views.")
        if self._name == b"files" and len(self.upload.files) >= self.limits.files:
            raise RefusedError(413, "too_many_files", f"A study has at most {self.limits.files} images here.")
        if self._name == b"views" and len(self.upload.views) >= self.limits.files:
            raise RefusedError(422, "views", "Give as many views as files, in the same order, or none.")

    def _data(self, data: bytes, start: int, end: int) -> None:
        most = self.limits.file_bytes if self._name == b"files" else VIEW_BYTES
        if len(self._content) + end - start > most:
            if self._name == b"views":
                raise _unknown_view()
            size = self.limits.file_bytes // MEBIBYTE
            raise RefusedError(413, "file_too_large", f"A file is larger than {size} MiB.", len(self.upload.files) + 1)
        if self._name == b"files":
            self.upload.hold(end - start)
        self._content += data[start:end]

    def _part_end(self) -> None:
        if self._name == b"files":
            self.upload.files.append(bytes(self._content))
        else:
            view = self._content.decode("ascii", "replace").strip().upper()
            if view and view not in VIEWS:
                raise _unknown_view()
            self.upload.views.append(view)
        self._content = bytearray()

    def _end(self) -> None:
        self.ended = True


def client_gone() -> RefusedError:
    """For the log alone: nobody hears it."""
    return RefusedError(400, "gone", "The client went away.")


def _malformed() -> RefusedError:
    return RefusedError(400, "multipart", "The multipart body is malformed or ends early.")


def _unknown_view() -> RefusedError:
    return RefusedError(422, "unknown_view", f"A view is one of {', '.join(VIEWS)}, or nothing.")


def _study_too_large(limits: Limits) -> RefusedError:
    return RefusedError(413, "study_too_large", f"A study is larger than {limits.study_bytes // MEBIBYTE} MiB.")
