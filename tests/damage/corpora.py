"""Public files of odd and broken images: `python tests/damage/corpora.py [FOLDER]` reads all that are at hand.

Fetches nothing. It takes the image files of installed packages (pydicom's own test files; pydicom_data, Pillow's and
others' pictures where they are installed) and every file under FOLDER or the folders of HILUM_CORPORA (separated as in
PATH; copies of libjpeg-turbo's seed corpora, PngSuite, Pillow's Tests/images, ...). It says how many files it found in
each, what became of them, and which of the known corpora are not here. Exit status 1 when any file failed.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from fuzz import ADDRESS_SPACE, FAILURES, OUTCOMES, REASONS, SECONDS, fault, peak_memory

from hilum.core.errors import ImageError
from hilum.data.images import read_image

PACKAGES = {
    "pydicom": ("data/test_files", "data/charset_files"),
    "data_store": ("data",),  # what the wheel pydicom-data installs
    "skimage": ("data",),
    "sklearn": ("datasets/images",),
    "scipy": ("ndimage/tests", "datasets"),
    "matplotlib": ("mpl-data",),
    "networkx": ("drawing/tests/baseline",),
}
"""Installed packages that bring image files, and where."""
KNOWN = {
    "libjpeg-turbo seed corpora": ("seed-corpora", "libjpeg"),
    "zune-image fuzz corpus": ("zune",),
    "PngSuite": ("pngsuite",),
    "Pillow Tests/images": ("pillow",),
    "pydicom-data": ("pydicom-data", "pydicom_data", "data_store"),
    "pylibjpeg-data": ("pylibjpeg",),
    "dicom-test-files": ("dicom-test-files",),
    "exif-orientation-examples": ("exif-orientation",),
    "go-fuzz corpus": ("go-fuzz",),
    "image-rs tests": ("image-rs", "image-png"),
}
"""Public corpora of docs/reference/damage.md, and what a folder that holds one is called."""
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp")
EXTRA = ("not_a_file", "missing", "unreadable")


def sources(folders: list[Path]) -> dict[str, Path]:
    """Name and folder of all that is at hand."""
    found: dict[str, Path] = {}
    for package, places in PACKAGES.items():
        spec = find_spec(package)
        for place in places:
            for location in spec.submodule_search_locations or () if spec else ():
                if (Path(location) / place).is_dir():
                    found[f"{package}/{place}"] = Path(location) / place
    for folder in folders:
        for inside in sorted(path for path in folder.iterdir() if path.is_dir()) or [folder]:
            found[f"{folder.name}/{inside.name}"] = inside
    return found


def files(folder: Path, everything: bool) -> list[Path]:
    """Regular files, in order; of installed packages only those that are images or DICOM."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return [path for path in found if everything or path.suffix.lower() in PICTURES or not _is_code(path)]


def _is_code(path: Path) -> bool:
    return path.suffix in (".py", ".pyc", ".pyi", ".md", ".rst", ".toml", ".mplstyle", ".ttf", ".afm", ".css", ".js")


def judge(path: Path) -> str:
    """Read one file and say what became of it; what is accepted is held against pydicom or Pillow, as in fuzz.py."""
    try:
        image = read_image(path)
    except ImageError as error:
        return error.reason if error.reason in REASONS + EXTRA else "undocumented_reason"
    except Exception:
        return "uncaught"
    return fault(path.read_bytes(), image) or "read_changed"


def work(listed: Path, results: Path, start: int) -> None:
    """Judge the files of a list from number `start` on, and write down each outcome at once."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    paths = [Path(line) for line in json.loads(listed.read_text())]
    outcomes, names = np.memmap(results, np.uint8, "r+"), OUTCOMES + EXTRA
    slowest = 0.0
    for number in range(start, len(paths)):
        outcomes[number] = names.index("crashed")
        started = time.monotonic()
        outcome = judge(paths[number])
        seconds = time.monotonic() - started
        slowest = max(slowest, seconds)
        outcomes[number] = names.index(outcome if seconds <= SECONDS else "slow")
    print(json.dumps({"slowest": slowest, "peak_mb": peak_memory()}))


def run(paths: list[Path]) -> dict[str, object]:
    """Judge files in a process of its own, which is started again behind a file that ends it."""
    with tempfile.TemporaryDirectory() as folder:
        listed, results = Path(folder) / "paths.json", Path(folder) / "outcomes"
        listed.write_text(json.dumps([str(path) for path in paths]))
        np.zeros(len(paths), np.uint8).tofile(results)
        start, slowest, peak = 0, 0.0, 0.0
        while start < len(paths):
            words = [sys.executable, "-W", "ignore", __file__, "--work", listed, results, start]
            done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
            if done.returncode == 0:
                said = json.loads(done.stdout)
                slowest, peak = max(slowest, said["slowest"]), max(peak, said["peak_mb"])
                break
            ended = np.flatnonzero(np.fromfile(results, np.uint8) == OUTCOMES.index("crashed"))
            if not len(ended) or ended[-1] < start:
                break  # the process does not even start: the rest counts as not tried
            start = int(ended[-1]) + 1
        outcomes = [(OUTCOMES + EXTRA)[code] for code in np.fromfile(results, np.uint8)]
    failed = [(path.name, outcome) for path, outcome in zip(paths, outcomes, strict=True) if outcome in FAILURES]
    counted = Counter("read" if outcome == "read_changed" else outcome for outcome in outcomes)
    return {
        "files": len(paths),
        "outcomes": dict(counted.most_common()),
        "failed": failed,
        "slowest": round(slowest, 2),
        "peak_mb": round(peak),
    }


def lines(folders: list[Path], limit: int | None = None) -> Iterator[tuple[str, int, int]]:
    """A line for each corpus, with the numbers of its files and of those that failed; then what is absent."""
    found = sources(folders)
    for name, folder in found.items():
        paths = files(folder, everything=not any(name.startswith(package) for package in PACKAGES))[:limit]
        if paths:
            said = run(paths)
            failed = said["failed"]
            assert isinstance(failed, list)
            yield f"{name}: {json.dumps(said)}", len(paths), len(failed)
    for corpus, words in KNOWN.items():
        if not any(word in name.lower() for name in found for word in words):
            yield f"{corpus}: skipped, not here (nothing is fetched; put a copy under HILUM_CORPORA)", 0, 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(Path(asked.work[0]), Path(asked.work[1]), int(asked.work[2]))
        return 0
    given = [Path(folder) for folder in os.environ.get("HILUM_CORPORA", "").split(os.pathsep) if folder]
    total = failures = 0
    for line, count, failed in lines([*asked.folders, *given]):
        print(line)
        total, failures = total + count, failures + failed
    print(f"{total} files, {failures} failures")
    return int(failures > 0 or total == 0)


if __name__ == "__main__":
    sys.exit(main())
