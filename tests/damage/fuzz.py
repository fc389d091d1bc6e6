"""Damaged images without end: `python tests/damage/fuzz.py dicom --count 100000` prints outcomes and counts failures.

Mutation number i of a seed is a function of (kind, seed, i) alone, so `--only i` shows one again. Files are read in
processes of their own: one that dies is counted as a crash, and the next goes on after the file that ended it. What is
accepted is held against pydicom or Pillow, never against hilum itself. Exit status 1 when anything failed.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
from damage_inputs import dicoms, mutate, rasters
from PIL import Image, JpegImagePlugin, PngImagePlugin
from pydicom import uid
from pydicom.encaps import generate_frames

from hilum.core.errors import ImageError
from hilum.data.images import DecodedImage, read_image

SEEDS = {"dicom": dicoms, "raster": rasters}
SECONDS = 10.0
ADDRESS_SPACE = 4 * 2**30

FAILURES = (
    "not_tried", "crashed", "uncaught", "slow", "undocumented_reason", "accepted_without_pixels",
    "accepted_of_another_size", "accepted_though_cut", "accepted_what_pillow_refuses", "message_names_the_patient",
)  # fmt: skip
ACCEPTED = ("read_as_before", "read_changed")
REASONS = (
    "zero_bytes", "not_an_image", "truncated", "damaged", "damaged_header", "too_large", "multi_frame",
    "unsupported_mode", "no_pixel_data", "size_mismatch", "unsupported_transfer_syntax", "missing_decoder",
    "unsupported_pixels",
)  # fmt: skip
OUTCOMES = FAILURES + ACCEPTED + REASONS
"""What can become of a file; the first ones are failures. Stored as one byte each, so that a crash loses nothing."""


def judge(content: bytes, cut: bool, original: np.ndarray) -> str:
    """Read one damaged file and say what became of it.

    Args:
        content: the damaged file.
        cut: nothing was done to it but to cut it off.
        original: pixels of the sound file.
    """
    try:
        image = read_image(content, name="x")
    except ImageError as error:
        if "MRN-77" in str(error) or "Doe" in str(error):
            return "message_names_the_patient"
        return error.reason if error.reason in REASONS else "undocumented_reason"
    except Exception:
        return "uncaught"
    wrong = fault(content, image)
    if wrong:
        return wrong
    same = np.array_equal(image.pixels, original)
    return "accepted_though_cut" if cut and not same else "read_as_before" if same else "read_changed"


def fault(content: bytes, image: DecodedImage) -> str:
    """What is wrong with an image that was accepted; "" where nothing is."""
    return _dicom_fault(content, image) if image.mode.startswith("dicom") else _raster_fault(content, image)


def _dicom_fault(content: bytes, image: DecodedImage) -> str:
    """What pydicom finds that the file declares, against what was read."""
    log = pydicom.config.logger
    log.disabled = True
    try:
        found = pydicom.dcmread(io.BytesIO(content), force=True)
        if not found and uid.DeflatedExplicitVRLittleEndian.encode() in content:
            found = pydicom.dcmread(io.BytesIO(_inflated(content)), force=True)
        if not found.get("PixelData"):
            return "accepted_without_pixels"
        rows, cols = int(found.Rows), int(found.Columns)
        syntax = found.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian)
        if (image.rows, image.cols) != (rows, cols) or image.pixels.ndim != 2 or image.pixels.dtype != np.uint8:
            return "accepted_of_another_size"
        height, width = image.pixels.shape
        if "aspect_corrected" in image.quality:
            if height > rows or width > cols or (height != rows and width != cols):
                return "accepted_of_another_size"
        elif (height, width) != (rows, cols):
            return "accepted_of_another_size"
        if not uid.UID(syntax).is_compressed or syntax == uid.DeflatedExplicitVRLittleEndian:
            bits = rows * cols * int(found.get("SamplesPerPixel") or 1) * int(found.BitsAllocated)
            if str(found.PhotometricInterpretation) == "YBR_FULL_422":
                bits = bits // 3 * 2
            return "" if bits // 8 <= len(found.PixelData) <= bits // 8 + 1 else "accepted_of_another_size"
        frame = next(generate_frames(found.PixelData, number_of_frames=1))
        if syntax in uid.JPEG2000TransferSyntaxes or syntax == uid.JPEGBaseline8Bit:
            with Image.open(io.BytesIO(frame)) as picture:
                return "" if picture.size == (cols, rows) else "accepted_of_another_size"
    finally:
        log.disabled = False
    return ""


def _inflated(content: bytes) -> bytes:
    """The deflated data set, wherever it starts: pydicom goes by a group length that may be damaged."""
    for start in range(132, min(len(content), 1000)):
        try:
            body = zlib.decompress(content[start:], -zlib.MAX_WBITS)
        except zlib.error:
            continue
        if body.startswith(b"\x08\x00"):
            return body
    return b""


def _raster_fault(content: bytes, image: DecodedImage) -> str:
    """Pillow, strict as it is by default, must be able to load whatever is accepted, at the same size."""
    opener = PngImagePlugin.PngImageFile if content.startswith(b"\x89PNG") else JpegImagePlugin.JpegImageFile
    try:
        picture = opener(io.BytesIO(content))
        picture.load()
    except Exception:
        return "accepted_what_pillow_refuses"
    turned = image.pixels.shape[::-1] if "exif_rotated" in image.quality else image.pixels.shape
    size = (image.rows, image.cols)
    fine = picture.size[::-1] == size and size in (image.pixels.shape, turned) and image.pixels.size > 0
    return "" if fine else "accepted_of_another_size"


def one(kind: str, seed: int, number: int, seeds: list[bytes]) -> tuple[bytes, bool, int]:
    """Mutation `number`, whether it was only cut, and which seed it came from."""
    which = number % len(seeds)
    content, cut = mutate(seeds[which], np.random.default_rng([seed, number]))
    return content, cut, which


def peak_memory() -> float:
    """The most memory that this process has held, in MB. (The figure of getrusage starts at that of the parent.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def work(kind: str, seed: int, start: int, stop: int, step: int, results: Path) -> None:
    """Judge mutations `start`, `start + step`, ... and write down each outcome at once."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    outcomes = np.memmap(results, np.uint8, "r+")
    seeds = list(SEEDS[kind]().values())
    originals = [read_image(content).pixels for content in seeds]
    before = peak_memory()
    slowest = 0.0
    for number in range(start, stop, step):
        content, cut, which = one(kind, seed, number, seeds)
        outcomes[number] = OUTCOMES.index("crashed")
        started = time.monotonic()
        outcome = judge(content, cut, originals[which])
        seconds = time.monotonic() - started
        slowest = max(slowest, seconds)
        outcomes[number] = OUTCOMES.index(outcome if seconds <= SECONDS else "slow")
    print(json.dumps({"slowest": slowest, "grown_mb": peak_memory() - before}))


def run(kind: str, count: int, seed: int = 0, workers: int = 1, seconds: float = 3000.0) -> dict[str, object]:
    """Judge `count` mutations in processes of their own.

    Returns counts by outcome, the numbers of those that failed, the slowest file in seconds, and by how many MB the
    memory of a process grew at most beyond what the sound files need.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "outcomes"
        np.zeros(count, np.uint8).tofile(results)
        deadline, slowest, grown = time.monotonic() + seconds, 0.0, 0.0
        starts = {process: process for process in range(workers)}
        running = {process: _spawn(kind, seed, start, count, workers, results) for process, start in starts.items()}
        while running:
            for process, child in list(running.items()):
                out, _ = child.communicate(timeout=max(deadline - time.monotonic(), 1.0))
                del running[process]
                if child.returncode == 0:
                    said = json.loads(out)
                    slowest, grown = max(slowest, said["slowest"]), max(grown, said["grown_mb"])
                    continue
                mine = np.fromfile(results, np.uint8)[process::workers]
                ended = np.flatnonzero(mine == OUTCOMES.index("crashed"))
                following = process + workers * (int(ended[-1]) + 1) if len(ended) else count
                if following <= starts[process]:
                    break  # the process does not even start
                starts[process] = following
                if following < count:
                    running[process] = _spawn(kind, seed, following, count, workers, results)
        outcomes = np.fromfile(results, np.uint8)
    failed = np.flatnonzero(outcomes < len(FAILURES))
    return {
        "count": count,
        "outcomes": {name: count for name, count in _counts(outcomes).items() if count},
        "failed": [(int(number), OUTCOMES[outcomes[number]]) for number in failed[:20]],
        "failures": len(failed),
        "slowest": round(slowest, 3),
        "grown_mb": round(grown, 1),
    }


def _counts(outcomes: np.ndarray) -> dict[str, int]:
    counted = Counter(outcomes.tolist())
    return {name: counted[code] for code, name in enumerate(OUTCOMES)}


def _spawn(kind: str, seed: int, start: int, count: int, step: int, results: Path) -> "subprocess.Popen[str]":
    words = [kind, "--seed", seed, "--count", count, "--range", start, step, "--results", results]
    command = [sys.executable, "-W", "ignore", __file__, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=SEEDS)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", type=int, help="show the outcome of this mutation, in this process")
    parser.add_argument("--save", type=Path, help="with --only: write the file here")
    parser.add_argument("--range", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.range:
        work(asked.kind, asked.seed, asked.range[0], asked.count, asked.range[1], asked.results)
        return 0
    if asked.only is not None:
        named = SEEDS[asked.kind]()
        seeds = list(named.values())
        content, cut, which = one(asked.kind, asked.seed, asked.only, seeds)
        if asked.save:
            asked.save.write_bytes(content)
        outcome = judge(content, cut, read_image(seeds[which]).pixels)
        print(f"{list(named)[which]}, {'cut' if cut else 'changed'} to {len(content)} bytes: {outcome}")
        return OUTCOMES.index(outcome) < len(FAILURES)
    found = run(asked.kind, asked.count, asked.seed, asked.workers)
    print(json.dumps(found, indent=1))
    return int(bool(found["failures"]))


if __name__ == "__main__":
    sys.exit(main())
