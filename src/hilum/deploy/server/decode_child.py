"""The process that decodes: `python -m hilum.deploy.server.decode_child`. Files in, pixels out, and nothing else.

Image decoders are old C, and the files are anybody's. So they run here: without network where the kernel allows that,
unable to write any file, with little memory and processor time, and silent, because decoders print what they find. The
server kills this process when it takes too long, replaces it when it dies, and trusts nothing that it says beyond sizes
that it checks (`decoding.py`). Requests and answers are a line of JSON behind its length, then bytes: no pickle.
"""

import hashlib
import json
import os
import resource
import struct
import sys
from pathlib import Path
from typing import IO, Any

LENGTH = struct.Struct(">I")
MODALITIES = ("CR", "DX", "RG", "RF", "MG", "CT", "MR", "US", "NM", "PT", "XA", "OT", "SC", "XC")
"""What may be said of a header's Modality; anything else is "other"."""
LONGEST_ID = 256
"""Characters of an id that is passed on; DICOM allows 64."""


def write_frame(stream: IO[bytes], header: dict[str, Any], *parts: bytes) -> None:
    """Send a line of JSON and bytes behind it."""
    line = json.dumps(header).encode()
    stream.write(LENGTH.pack(len(line)) + line)
    for part in parts:
        stream.write(part)
    stream.flush()


def read_exactly(stream: IO[bytes], count: int) -> bytes:
    """So many bytes.

    Raises:
        EOFError: the other side has gone.
    """
    content = stream.read(count)
    if len(content) != count:
        raise EOFError
    return content


def read_frame(stream: IO[bytes], most: int = 2**16) -> dict[str, Any]:
    """The next line of JSON.

    Raises:
        EOFError: the other side has gone.
        ValueError: not JSON, or longer than `most` bytes.
    """
    length = LENGTH.unpack(read_exactly(stream, LENGTH.size))[0]
    if length > most:
        raise ValueError("a line is too long")
    header = json.loads(read_exactly(stream, length))
    if not isinstance(header, dict):
        raise ValueError("a line is no object")
    return header


def main() -> None:
    """Confine this process, say that it is ready, and decode until the other side has gone."""
    memory, seconds, salt = int(sys.argv[1]), float(sys.argv[2]), bytes.fromhex(sys.argv[3])
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    from hilum.backbones.pickled import isolate

    isolate()
    _load_decoders()
    _confine(memory)
    write_frame(answers, {"ready": True})
    while True:
        try:
            request = read_frame(requests)
            content = read_exactly(requests, int(request["size"]))
        except EOFError:
            return
        _allow_seconds(seconds)
        header, parts = _decode(content, request, salt)
        del content
        write_frame(answers, header, *parts)


def _load_decoders() -> None:
    """Everything that a file could need, imported while files can still be opened."""
    import cv2
    import gdcm  # noqa: F401 - a decoder of pydicom's, which would import it when it meets the first file
    import openjpeg  # noqa: F401
    import pydicom.pixels.decoders  # noqa: F401

    import hilum.data.dicom  # noqa: F401

    cv2.setNumThreads(1)


def _confine(memory: int) -> None:
    """From here on: no file grows, few are open, no core dump, and so much memory beyond what there is."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + memory)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, 32)
    _limit(resource.RLIMIT_CORE, 0)


def _limit(what: int, most: int) -> None:
    """Set a limit for good; one that is already lower stays."""
    already = resource.getrlimit(what)[1]
    most = most if already == resource.RLIM_INFINITY else min(most, already)
    resource.setrlimit(what, (most, most))


def _allow_seconds(seconds: float) -> None:
    """So much processor time from now on; the kernel ends the process that takes more."""
    used, hard = resource.getrusage(resource.RUSAGE_SELF), resource.getrlimit(resource.RLIMIT_CPU)[1]
    most = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _decode(content: bytes, request: dict[str, Any], salt: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """One file: what it is, its pixels as the model wants them, and as a person looks at them."""
    from hilum.core.errors import ImageError
    from hilum.data.images import read_image, shrink

    try:
        image = read_image(content, "the image", request["short_side"], recipe=request["recipe"])
        most, longer = int(request["display"]), max(image.rows, image.cols)
        wanted = max(1, round(min(image.rows, image.cols) * most / longer))
        shown = image.pixels
        if max(shown.shape) < min(most, longer):  # the model's reading is smaller than a person wants: once more
            shown = read_image(content, "the image", wanted, recipe=request["recipe"]).pixels
        elif max(shown.shape) > most:
            shown = shrink(shown, wanted)
        facts = _facts(content, salt, request["whose"]) if image.mode.startswith("dicom") else {}
    except ImageError as error:
        return {"reason": error.reason, "message": str(error).removeprefix("the image: ")}, []
    except MemoryError:
        return {"reason": "too_large", "message": "Not enough memory to decode it."}, []
    header = {
        "rows": image.rows, "columns": image.cols, "quality": list(image.quality),
        "kind": image.mode.partition(":")[0], "pixels": image.pixels.shape, "display": shown.shape, **facts,
    }  # fmt: skip
    return header, [image.pixels.tobytes(), shown.tobytes()]


def _facts(content: bytes, salt: bytes, whose: bool) -> dict[str, Any]:
    """What a DICOM header says that names nobody: view, modality, whether text may be burnt in, and a salted digest of
    whose it is, which tells two patients apart and cannot be turned back. Whose it is itself, only where it is asked.
    """
    from hilum.core.errors import ImageError
    from hilum.core.types import VIEWS
    from hilum.data.images import read_dicom_header

    try:
        found = read_dicom_header(content)
    except ImageError:
        return {}
    view, modality = found["ViewPosition"].upper(), found["Modality"].upper()
    ids = (found["PatientID"], found["StudyInstanceUID"])
    subject = "\x1f".join(ids)
    digest = hashlib.blake2b(subject.encode(), key=salt, digest_size=16).hexdigest()
    return {
        "view": view if view in VIEWS else "",
        "modality": modality if modality in MODALITIES else "other" if modality else "",
        "burned_in": {"YES": "yes", "NO": "no"}.get(found["BurnedInAnnotation"].upper(), "unknown"),
        "subject": digest if subject.strip("\x1f") else "",
        "ids": [one for one in ids if len(one) <= LONGEST_ID] if whose else [],
    }


if __name__ == "__main__":
    main()
