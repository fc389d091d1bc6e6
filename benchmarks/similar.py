"""Exact search among 700,000 studies x 768 numbers in float16, on disk through a memory map, by 2 processors.

A random index is written once: 1.1 GB in a temporary folder, or in the folder that INDEX names, where it is kept.
Ours is `Index.search` as the server and the command line call it: 8 nearest, one patient left out, labels looked up.
Peer: numpy's plain product of the same vectors in float32 in memory (2.2 GB, twice the bytes; widened beforehand,
which is not counted) and argpartition, what people write. Floor: one sum over the bytes of the mapped file by numpy,
one processor. All take turns in one process, after one turn that is not counted; medians, of seconds and of
processor seconds over all threads (what a machine that does nothing else would need, twice over). What the two find
must be the same studies, or the run fails: the peer's products are in float32, so among random vectors, where the
nearest are some 10^-3 apart, they agree.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROWS, DIM, COUNT, TURNS = 700_000, 768, 8, 7


def write_index(path: Path, rows: int, dim: int) -> None:
    """A random index: vectors of length 1 in all directions, two studies to a patient, 40 findings."""
    from hilum.deploy.nearest import BLOCK
    from hilum.deploy.similar import FORMAT, HEADER_NAME, ROWS_NAME, STUDIES_NAME

    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    vectors = np.lib.format.open_memmap(path / STUDIES_NAME, mode="w+", dtype=np.float16, shape=(rows, dim))
    lengths = np.empty(rows, np.float32)
    for start in range(0, rows, 16 * BLOCK):
        part = rng.standard_normal((min(16 * BLOCK, rows - start), dim), dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
        vectors[start : start + len(part)] = part
        lengths[start : start + len(part)] = np.linalg.norm(
            vectors[start : start + len(part)].astype(np.float32), axis=1
        )
    vectors.flush()
    names = np.char.add("bench/s", np.arange(rows).astype(str)).astype("S")
    patients = np.sort(np.char.add("bench/p", np.arange((rows + 1) // 2).astype(str)).astype("S"))
    with (path / ROWS_NAME).open("wb") as file:
        np.savez(
            file, image_uid=names, image_id=names, study=names, store_index=np.arange(rows),
            images=np.ones(rows, np.int32), label=(rng.random((rows, 40)) < 0.05).astype(np.int8),
            every_image_id=np.sort(names), every_row=np.arange(rows, dtype=np.int32), patient_names=patients,
            patient=np.repeat(np.arange(len(patients), dtype=np.int32), 2)[:rows], dataset_names=np.array([b"bench"]),
            dataset=np.zeros(rows, np.int32), view_names=np.array([b"PA"]), view=np.zeros(rows, np.int32),
            **{"length.studies": lengths, "centre.studies": np.zeros(dim, np.float32)},
        )  # fmt: skip
    header = {
        "format": FORMAT, "model": "", "backbone": "", "head": "", "rows": rows, "dim": dim, "queries": [],
        "labels": [f"finding {number}" for number in range(40)], "store": {"path": "", "relative": ""},
    }  # fmt: skip
    (path / HEADER_NAME).write_text(json.dumps(header))


def timed(work: Callable[[], object]) -> tuple[float, float, object]:
    start, work_start = time.perf_counter(), time.process_time()
    found = work()
    return time.perf_counter() - start, time.process_time() - work_start, found


def compare(path: Path, turns: int = TURNS, count: int = COUNT) -> dict[str, float]:
    """Median seconds and processor seconds of ours, the peer and the floor, and the share of answers that agree.

    Args:
        path: of an index.
        turns: counted turns.
        count: neighbours.
    """
    from hilum.deploy.similar import Index

    index = Index.open(path)
    rng = np.random.default_rng(1)
    wide = np.empty(index.vectors.shape, np.float32)
    for start in range(0, len(wide), 4096):
        wide[start : start + 4096] = index.vectors[start : start + 4096]
    mapped = np.load(path / "studies.npy", mmap_mode="r").view(np.uint64)
    taken: dict[str, list[float]] = {name: [] for one in ("ours", "peer", "floor") for name in (one, f"{one}_cpu")}
    agree = 0
    for turn in range(turns + 1):
        query = rng.standard_normal(wide.shape[1], dtype=np.float32)
        query /= np.linalg.norm(query)

        def plain(query: np.ndarray = query) -> list[int]:
            scores = wide @ query
            best = np.argpartition(scores, len(scores) - count)[-count:]
            return best[np.argsort(-scores[best])].tolist()

        def search(query: np.ndarray = query) -> list[int]:
            return [match.row for match in index.search(query, count, exclude=["no such patient"])]

        row = {"ours": timed(search), "peer": timed(plain), "floor": timed(mapped.sum)}
        if turn:
            for name, (seconds, processor, _) in row.items():
                taken[name].append(seconds)
                taken[f"{name}_cpu"].append(processor)
        agree += row["ours"][2] == row["peer"][2]
    return {name: float(np.median(values)) for name, values in taken.items()} | {"agree": agree / (turns + 1)}


def main(rows: int = ROWS, dim: int = DIM, kept: Path | None = None) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as temporary:
        path = kept or Path(temporary) / "index"
        if not (path / "index.json").exists():
            write_index(path, rows, dim)
        row = compare(path)
    print(
        f"{rows} studies x {dim}, {COUNT} nearest, {len(os.sched_getaffinity(0))} processors, "
        f"load {os.getloadavg()[0]:.1f}\n"
        f"Index.search, float16 mapped       {row['ours']:8.3f} s, {row['ours_cpu']:.3f} s of CPU (goal 0.5 s)\n"
        f"numpy, float32 in memory, product  {row['peer']:8.3f} s, {row['peer_cpu']:.3f} s of CPU: "
        f"{row['peer'] / row['ours']:.1f}x, {row['peer_cpu'] / row['ours_cpu']:.1f}x\n"
        f"floor, one sum of the mapped bytes {row['floor']:8.3f} s, {row['floor_cpu']:.3f} s of CPU\n"
        f"same answers                       {row['agree']:8.0%}"
    )
    if row["agree"] < 1:
        raise SystemExit("The two sides disagree.")
    return row


if __name__ == "__main__":
    main(kept=Path(os.environ["INDEX"]) if "INDEX" in os.environ else None)
