"""Images a second and core from a store, in random and windowed order, beside readers of the same bytes in a folder.

Everything is decoded to a full grey uint8 array, from files in the page cache, by one thread. Peers: a folder of JPEG
files opened with PIL or `cv2.imread` in random order, and a tar of them read in sequence (the layout of WebDataset)
with Python's tarfile and PIL. Floors: `cv2.imdecode` of bytes already in memory, and for raw pixels one read of a file
into new memory. Hilum's figures contain the sampler, the read, the CRC-32 of the record and the check of its size.

The tables show CPU time; the sides take turns, medians over the rounds. The last table is by the clock, undecoded
records whose pages were dropped from the cache before: what the orders do on the disk of the temporary folder.
"""

import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
from PIL import Image

from hilum.core.seeding import stream
from hilum.data.samplers import EndlessSampler, Window
from hilum.data.store import Store, write_arrays

SHAPES = ((512, 512), (512, 614))
IMAGES, DISTINCT, ROUNDS, A_ROUND = 1024, 32, 9, 128
DISK_COPIES, DISK_ROUNDS = 12, 5
ORDERS = {"random": None, "windowed": Window(16, 16)}


def example_images(shape: tuple[int, int]) -> list[np.ndarray]:
    """Smooth anatomy-like fields with film grain; about 1.6 bits a pixel as JPEG, like radiographs."""
    rng = stream(0, "benchmark images")
    images = []
    for _ in range(DISTINCT):
        field = rng.uniform(20, 235, (8, 8)).astype(np.float32)
        coarse = cv2.resize(field, shape[::-1], interpolation=cv2.INTER_CUBIC)
        fine = cv2.GaussianBlur(rng.normal(0, 60, shape).astype(np.float32), (0, 0), 4)
        images.append(np.clip(coarse + fine + rng.normal(0, 1.7, shape), 0, 255).astype(np.uint8))
    return [images[number % DISTINCT] for number in range(IMAGES)]


def from_store(store: Store, window: Window | None) -> Iterator[object]:
    sampler, step = EndlessSampler(np.arange(IMAGES), 16, 0, window=window), 0
    while True:
        for index in sampler.batch(step):
            yield store.read(int(index))
        step += 1


def in_turn(read: Callable[[int], object]) -> Iterator[object]:
    """In a random order."""
    numbers = random.Random(0)
    while True:
        yield read(numbers.randrange(IMAGES))


def with_pil(path: Path) -> object:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def from_tar(path: Path) -> Iterator[object]:
    while True:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                yield np.asarray(Image.open(file).convert("L"))


def read_raw(file: int, size: int, checked: bool = False) -> Callable[[int], object]:
    def read(number: int) -> object:
        buffer = np.empty(size, np.uint8)
        os.preadv(file, [buffer.data], number * size)
        if checked:
            zlib.crc32(buffer.data)
        return buffer

    return read


def write_folder(store: Store, folder: Path) -> list[Path]:
    """The store's own JPEG bytes as a file each, and all of them in a tar."""
    folder.mkdir()
    paths = [folder / f"{number:06d}.jpg" for number in range(IMAGES)]
    for number, path in enumerate(paths):
        path.write_bytes(store.record(number).tobytes())
    with tarfile.open(folder / "all.tar", "w") as tar:
        for path in paths:
            tar.add(path, path.name)
    return paths


def rates(sides: dict[str, Iterator[object]]) -> dict[str, float]:
    """Images a CPU second; the sides take turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(-1, ROUNDS):
        for name, side in sides.items():
            start = time.process_time()
            for _ in range(A_ROUND):
                next(side)
            if round_number >= 0:
                times[name].append((time.process_time() - start) / A_ROUND)
    return {name: 1 / statistics.median(values) for name, values in times.items()}


def table(title: str, sides: dict[str, Iterator[object]], floor: str) -> dict[str, float]:
    found = rates(sides)
    print(f"\n{title:44}{'images/s/core':>14}{'of the floor':>14}")
    for name, value in found.items():
        print(f"{name:44}{value:14,.0f}{value / found[floor]:14.0%}")
    return found


def measure(shape: tuple[int, int], folder: Path) -> dict[str, dict[str, float]]:
    images, labels = example_images(shape), np.zeros((IMAGES, 1), np.int8)
    jpeg = write_arrays(folder / "jpeg", images, labels, ["Normal"], encoding="jpeg95")
    raw = write_arrays(folder / "raw", images, labels, ["Normal"], encoding="raw")
    paths = write_folder(jpeg, folder / "files")
    in_memory = [jpeg.record(number) for number in range(IMAGES)]
    bits = 8 * statistics.mean(len(record) for record in in_memory) / (shape[0] * shape[1])
    size = f"{shape[0]} x {shape[1]}"
    found = table(
        f"JPEG quality 95, {size}, {bits:.1f} bits a pixel",
        {
            "folder, PIL": in_turn(lambda number: with_pil(paths[number])),
            "tar in sequence, tarfile and PIL": from_tar(folder / "files" / "all.tar"),
            "folder, cv2.imread": in_turn(lambda number: cv2.imread(str(paths[number]), cv2.IMREAD_GRAYSCALE)),
            **{f"hilum store, {name}": from_store(jpeg, window) for name, window in ORDERS.items()},
            "floor: cv2.imdecode of bytes in memory": in_turn(
                lambda number: cv2.imdecode(in_memory[number], cv2.IMREAD_GRAYSCALE)
            ),
        },
        "floor: cv2.imdecode of bytes in memory",
    )
    [shard] = (folder / "raw" / "shards").iterdir()
    file = os.open(shard, os.O_RDONLY)
    found_raw = table(
        f"raw, {size}",
        {
            **{f"hilum store, {name}": from_store(raw, window) for name, window in ORDERS.items()},
            "a read into new memory and zlib's CRC-32": in_turn(read_raw(file, shape[0] * shape[1], checked=True)),
            "floor: a read into new memory": in_turn(read_raw(file, shape[0] * shape[1])),
        },
        "floor: a read into new memory",
    )
    os.close(file)
    return {f"JPEG {size}": found, f"raw {size}": found_raw}


def from_disk(folder: Path) -> dict[str, float]:
    """Undecoded records a second, from a disk: a whole epoch of a store that is not in the page cache."""
    images = example_images(SHAPES[0]) * DISK_COPIES
    store = write_arrays(folder / "store", images, np.zeros((len(images), 1), np.int8), ["Normal"], encoding="jpeg95")
    [shard] = (folder / "store" / "shards").iterdir()
    file = os.open(shard, os.O_RDONLY)
    orders = {
        "in sequence": (None, False), "random": (None, False), "windowed": (Window(), False),
        "windowed, next window fetched meanwhile": (Window(), True),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in orders}
    for _ in range(DISK_ROUNDS):
        for name, (window, fetch) in orders.items():
            sampler = EndlessSampler(np.arange(len(store)), 32, 0, window=window)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            for step in range(len(store) // 32):
                if fetch:
                    store.expect(sampler.opens(step))
                batch = range(32 * step, 32 * step + 32) if name == "in sequence" else sampler.batch(step)
                for index in batch:
                    store.record(int(index))
            times[name].append((time.perf_counter() - start) / len(store))
    os.close(file)
    found = {name: 1 / statistics.median(values) for name, values in times.items()}
    print(f"\n{f'cold, {len(store)} records, {shard.stat().st_size / 1e6:.0f} MB':44}{'records/s':>14}{'range':>20}")
    for name, value in found.items():
        print(f"{name:44}{value:14,.0f}{1 / max(times[name]):12,.0f} -{1 / min(times[name]):7,.0f}")
    return found


def main() -> dict[str, dict[str, float]]:
    """Print the tables and return their figures."""
    cv2.setNumThreads(0)
    results = {}
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            results |= measure(shape, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        results["cold"] = from_disk(Path(folder))
    return results


if __name__ == "__main__":
    main()
    sys.stdout.flush()
