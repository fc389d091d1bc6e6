"""`hilum manifest` of 500,000 images, as a whole process, beside pandas and beside a plain read of the same tables.

Two datasets, laid out as the real ones are: CXR-LT on MIMIC's folders (276,352 images, 40 findings) and CheXpert (the
223,648 images of its pool, 14 findings). All is drawn from a seed; the image files are empty, since `hilum manifest`
reads the tables and lists the folders. What it does besides joining: every cell checked, ids namespaced and hashed,
every listed file looked for, splits by patient with rare findings shared out, eligibility for pretraining, the file
written and flushed to disk.

The peer reads the same tables with pandas, joins them, groups by patient for a random 70 / 10 / 20 split and writes a
CSV; it looks for no file and checks nothing (pandas is not a dependency: the row is there where it is installed). The
floor is polars reading the same bytes. Each is a process of its own; seconds by the clock and of CPU, and the largest
resident memory. Listing the folders with `os.scandir` alone is timed apart: it is the file system's share, and longer
the first time, when the system reads them from the disk (printed, and not counted: it depends on the disk alone).

    python benchmarks/manifest.py [ROWS]
"""

import importlib.util
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from hilum.core.seeding import stream
from hilum.data.labels import CXRLT_2024_TASK1

ROWS, ROUNDS = 500_000, 3
CHEXPERT_SHARE = 223_648 / 500_000
CHEXPERT_FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
PANDAS = """
import sys
import numpy as np
import pandas as pd
cxrlt, chexpert, out = sys.argv[1:]
a, b = pd.read_csv(cxrlt, dtype={"study_id": str}), pd.read_csv(chexpert)
a["patient"] = "cxrlt/" + a.subject_id.astype(str)
b["patient"] = "chexpert/" + b.Path.str.extract(r"(patient\\d+)", expand=False)
names = {"No Finding": "Normal"}
both = pd.concat([a.rename(columns={"fpath": "path"}), b.rename(columns={"Path": "path", **names})])
patients = both.groupby("patient", sort=True).size().index
split = pd.Series(np.random.default_rng(0).choice(["train", "val", "test"], len(patients), p=[0.7, 0.1, 0.2]), patients)
both["split"] = both.patient.map(split)
print(both.groupby("split")[list(set(a.columns) & set(both.columns) - {"patient", "fpath"})].count().shape)
both.to_csv(out, index=False)
"""
FLOOR = """
import sys
import polars as pl
print([pl.read_csv(path, infer_schema=False).shape for path in sys.argv[1:]])
"""
LISTING = """
import os, sys
waiting, files = sys.argv[1:], 0
while waiting:
    with os.scandir(waiting.pop()) as entries:
        for entry in entries:
            if entry.is_dir():
                waiting.append(entry.path)
            else:
                files += 1
print(files)
"""


def patients_and_studies(count: int, per_patient: float, per_study: float, rng: np.random.Generator) -> np.ndarray:
    """Patient and study of each image (N, 2): geometric numbers of images of both, as in hospitals."""
    new_study = rng.random(count) < 1 / per_study
    new_patient = new_study & (rng.random(count) < per_study / per_patient)
    new_study[0] = new_patient[0] = True
    return np.stack([np.cumsum(new_patient), np.cumsum(new_study | new_patient)], axis=1)


def long_tail(count: int, findings: int, rng: np.random.Generator) -> np.ndarray:
    """Labels (N, C): from a third of the images down to one in a thousand."""
    return (rng.random((count, findings)) < np.geomspace(0.33, 0.001, findings)).astype(np.int8)


def write_cxrlt(root: Path, count: int) -> list[str]:
    """The table of CXR-LT 2024; returns the paths that it lists."""
    rng = stream(0, "manifest benchmark", "cxrlt")
    numbers = patients_and_studies(count, 5.8, 1.66, rng)
    subjects, studies = 10_000_000 + numbers[:, 0] * 113, 50_000_000 + numbers[:, 1] * 31
    hexes = rng.bytes(20 * count).hex()
    ids = ["-".join(hexes[40 * n + 8 * k : 40 * n + 8 * k + 8] for k in range(5)) for n in range(count)]
    paths = [
        f"files/p{str(subject)[:2]}/p{subject}/s{study}/{name}.jpg"
        for subject, study, name in zip(subjects.tolist(), studies.tolist(), ids, strict=True)
    ]
    labels = long_tail(count, len(CXRLT_2024_TASK1), rng)
    frame = pl.DataFrame(
        {
            "dicom_id": ids, "subject_id": subjects, "study_id": [f"s{study}" for study in studies.tolist()],
            "ViewPosition": rng.choice(["PA", "AP", "LATERAL", ""], count).tolist(), "fpath": paths,
        }
    )  # fmt: skip
    frame = frame.hstack([pl.Series(name, labels[:, column]) for column, name in enumerate(CXRLT_2024_TASK1)])
    (root / "cxr-lt-2024").mkdir(parents=True)
    frame.write_csv(root / "cxr-lt-2024" / "train_labeled.csv", quote_style="never")
    return paths


def write_chexpert(root: Path, count: int) -> list[str]:
    """The table of CheXpert; returns the paths that it lists, relative to the folder above the release."""
    rng = stream(0, "manifest benchmark", "chexpert")
    numbers = patients_and_studies(count, 3.46, 1.19, rng)
    view = np.arange(count) - np.searchsorted(numbers[:, 1], numbers[:, 1])
    frontal = np.where(rng.random(count) < 0.85, "frontal", "lateral").tolist()
    paths = [
        f"CheXpert-v1.0/train/patient{patient:05d}/study{study}/view{order + 1}_{kind}.jpg"
        for (patient, study), order, kind in zip(numbers.tolist(), view.tolist(), frontal, strict=True)
    ]
    cells = np.where(long_tail(count, len(CHEXPERT_FINDINGS), rng) == 1, "1.0", "").astype("<U4")
    other = rng.random(cells.shape)
    cells = np.where((cells == "") & (other < 0.1), "0.0", np.where((cells == "") & (other < 0.14), "-1.0", cells))
    cells[(cells[:, 1:] == "1.0").any(axis=1), 0] = ""
    table = {
        "Path": paths, "Sex": rng.choice(["Male", "Female"], count).tolist(), "Age": rng.integers(18, 90, count),
        "Frontal/Lateral": [kind.capitalize() for kind in frontal],
        "AP/PA": [str(rng.choice(["AP", "PA"])) if kind == "frontal" else "" for kind in frontal],
    }  # fmt: skip
    columns = [pl.Series(name, cells[:, column].tolist()) for column, name in enumerate(CHEXPERT_FINDINGS)]
    (root / "CheXpert-v1.0").mkdir(parents=True)
    pl.DataFrame(table).hstack(columns).write_csv(root / "CheXpert-v1.0" / "train.csv", quote_style="never")
    return paths


def make(cxrlt: Path, cxrlt_rows: int, chexpert: Path, chexpert_rows: int) -> None:
    touch(cxrlt, write_cxrlt(cxrlt, cxrlt_rows))
    touch(chexpert, write_chexpert(chexpert, chexpert_rows))


def touch(root: Path, paths: list[str]) -> None:
    """An empty file for each path."""
    for folder in dict.fromkeys(path.rpartition("/")[0] for path in paths):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for path in paths:
        os.close(os.open(f"{root}/{path}", os.O_CREAT | os.O_WRONLY))


def run(command: list[str]) -> tuple[float, float, float]:
    """Seconds by the clock, of CPU, and the largest resident memory in MB of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[:3]} ended with status {process.returncode}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main(rows: int = ROWS) -> dict[str, dict[str, float]]:
    """Print one table; return its figures."""
    python, hilum = sys.executable, str(Path(sys.executable).with_name("hilum"))
    chexpert_rows = round(rows * CHEXPERT_SHARE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        roots = {"cxrlt": folder / "mimic", "chexpert": folder / "chexpert"}
        start = time.perf_counter()
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # the largest memory of a parent counts for children
            pool.apply(make, (roots["cxrlt"], rows - chexpert_rows, roots["chexpert"], chexpert_rows))
        tables = [
            roots["cxrlt"] / "cxr-lt-2024" / "train_labeled.csv",
            roots["chexpert"] / "CheXpert-v1.0" / "train.csv",
        ]
        size = sum(table.stat().st_size for table in tables) / 1e6
        print(f"{rows:,} images, tables of {size:.0f} MB; made in {time.perf_counter() - start:.0f} s (not counted)")
        read = [str(table) for table in tables]
        sources = [f"{name}={root}" for name, root in roots.items()]
        out = str(folder / "manifest.parquet")
        sides = {
            "hilum manifest": [hilum, "manifest", *sources, "--split", "project", "--out", out],
            "folders listed, os.scandir": [python, "-c", LISTING, *map(str, roots.values())],
            "pandas, join and split": [python, "-c", PANDAS, *read, str(folder / "pandas.csv")],
            "floor: polars reads the tables": [python, "-c", FLOOR, *read],
        }
        if importlib.util.find_spec("pandas") is None:
            sides.pop("pandas, join and split")
        first = run(sides["folders listed, os.scandir"])[0]  # from here on the system has the folders in memory
        print(f"first listing of the folders, os.scandir: {first:.1f} s")
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in sides}
        for _ in range(ROUNDS):
            for name, command in sides.items():
                found[name].append(run(command))
        images = pl.scan_parquet(out).select(pl.len()).collect().item()
        if images != rows:
            raise RuntimeError(f"expected {rows} images in the manifest, found {images}")
    print(f"{'':34}{'seconds':>9}{'of CPU':>9}{'peak MB':>9}   median of {ROUNDS}, whole processes")
    results = {}
    for name, values in found.items():
        seconds, cpu, memory = (statistics.median(column) for column in zip(*values, strict=True))
        results[name] = {"seconds": seconds, "cpu": cpu, "peak_mb": memory}
        print(f"{name:34}{seconds:9.2f}{cpu:9.2f}{memory:9.0f}")
    return results


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROWS)
