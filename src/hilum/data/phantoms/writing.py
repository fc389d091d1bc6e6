"""Phantoms on disk, in the folder and CSV layouts of the real sources, lesion masks beside them.

`OUT/masks/<image id>/<finding>.png` (0 / 255), `OUT/masks.csv` and `OUT/phantom.json` are the same in all layouts.
A run is written to a folder beside OUT and takes its place at the end, so OUT is whole or untouched.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from hilum.core.children import end_with_parent
from hilum.core.errors import ConfigError, HilumError, UnknownNameError
from hilum.core.files import read_json, write_json, write_text
from hilum.core.tracking import progress
from hilum.data.phantoms.cohort import MORE, plan_cohort
from hilum.data.phantoms.encoding import encode
from hilum.data.phantoms.faults import FILE, plant
from hilum.data.phantoms.layouts import LAYOUTS
from hilum.data.phantoms.layouts.jobs import MaskRow, StudyJob, csv_text
from hilum.data.phantoms.prevalence import MINIMUM_PATIENTS
from hilum.data.phantoms.render import render_study

FORMAT = "hilum-phantom-1"
VERSION = 2
"""Of the generator: pictures of two versions differ for one seed."""
SMALLEST, LARGEST = 64, 2048
BY_SUFFIX = {".jpg": "jpeg", ".png": "png"}
"""How an image is encoded whose layout does not say."""
OWN = ("masks", "masks.csv", FILE)
"""What a run of any layout leaves in OUT besides phantom.json. A run over an earlier one of ours removes these and what
that run's layout calls its own, and nothing else."""


def write_phantoms(
    out: Path, layout: str, patients: int, seed: int, size: int = 320, minimum_patients: int = MINIMUM_PATIENTS,
    workers: int | None = None, faults: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write a cohort of synthetic patients.

    Args:
        out: a folder that is empty, absent, or holds an earlier run of this function (which is replaced).
        layout: one of `layouts.LAYOUTS`: "cxrlt" (CXR-LT 2024 on MIMIC-CXR-JPG), "cxrlt45" (with the five findings of
            its task 3), "nih" (ChestX-ray14), ...
        patients: how many.
        seed: same seed and arguments, same bytes, whatever the number of workers.
        size: short side of the images in pixels.
        minimum_patients: see `cohort.plan_cohort`.
        workers: processes; None takes the cores this process may use, up to 8.
        faults: kinds of faults to plant, see `faults.KINDS`; what must become of them is in `OUT/faults.csv`.

    Returns:
        What `OUT/phantom.json` holds: parameters and counts by finding.

    Raises:
        ConfigError: an argument out of range, faults that the layout cannot have, or `out` holds something else.
        UnknownNameError: no such layout.
    """
    if layout not in LAYOUTS:
        raise UnknownNameError("layout", layout, LAYOUTS)
    if patients < 1 or minimum_patients < 0 or not SMALLEST <= size <= LARGEST or (workers is not None and workers < 1):
        raise ConfigError(
            f"Phantoms need at least 1 patient, 1 worker and a size from {SMALLEST} to {LARGEST}; found "
            f"patients={patients}, size={size}, minimum_patients={minimum_patients}, workers={workers}."
        )
    out = Path(out)
    earlier = _earlier_run(out)
    _refuse_others(out, layout, earlier)
    findings = LAYOUTS[layout].findings
    cohort = plan_cohort(patients, seed, minimum_patients, more=set(MORE) <= set(findings))
    jobs = LAYOUTS[layout].jobs(cohort, seed, size)
    with _workplace(out, earlier) as folder:
        masks = _render_all(folder, jobs, workers or min(os.cpu_count() or 1, 8))
        LAYOUTS[layout].tables(folder, jobs, masks)
        rows = [[m.image_id, m.finding, m.path, f"{m.area:.6f}"] for m in masks]
        write_text(folder / "masks.csv", csv_text([["image_id", "finding", "path", "area_fraction"], *rows]))
        summary = _summary(layout, patients, seed, size, minimum_patients, jobs, masks)
        if faults:
            summary["faults"] = [fault.kind for fault in plant(folder, layout, jobs, faults, seed)]
        write_json(folder / "phantom.json", summary)
    return summary


def _earlier_run(out: Path) -> tuple[str, ...]:
    """Names that an earlier run of ours left in `out`.

    Raises:
        ConfigError: `out` holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return ()
    path = out / "phantom.json"
    record = read_json(path, ConfigError) if out.is_dir() and path.exists() else None
    if isinstance(record, dict) and record.get("format") == FORMAT:
        layout = LAYOUTS.get(str(record.get("layout")))
        return (*OWN, *(layout.own if layout else ()))
    raise ConfigError(
        f"{out} is not empty and was not made by this command (it has no phantom.json). Nothing was written. "
        "Name a new folder, or empty this one yourself."
    )


def _refuse_others(out: Path, layout: str, earlier: Sequence[str]) -> None:
    """Raise ConfigError where this layout's names are taken by what no earlier run left."""
    taken = [name for name in LAYOUTS[layout].own if name not in earlier and os.path.lexists(out / name)]
    if taken:
        raise ConfigError(
            f"{out} holds {' and '.join(taken)} that are not of the earlier run there. Nothing was written. Move them, "
            "or name a new folder."
        )


@contextmanager
def _workplace(out: Path, earlier: Sequence[str]) -> Iterator[Path]:
    """A folder beside `out`; on success its content takes the place of an earlier run in `out`."""
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder
        if not out.exists():
            folder.rename(out)
            return
        (out / "phantom.json").unlink(missing_ok=True)
        for name in earlier:
            old = out / name
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)
        for new in sorted(folder.iterdir(), key=lambda path: path.name == "phantom.json"):
            new.rename(out / new.name)
    except OSError as error:
        raise HilumError(f"Could not write phantoms to {out}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# Rendering


def _render_all(folder: Path, jobs: list[StudyJob], workers: int) -> list[MaskRow]:
    masks: list[MaskRow] = []
    with progress("phantoms", sum(len(job.images) for job in jobs), "images") as bar:
        if workers == 1:
            for job in jobs:
                masks += render_job(folder, job)
                bar.advance(len(job.images))
            return masks
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _prepare_process)
        with pool:
            done = pool.map(render_job, [folder] * len(jobs), jobs, chunksize=8)
            for job, rows in zip(jobs, done, strict=True):
                masks += rows
                bar.advance(len(job.images))
    return masks


def _prepare_process() -> None:
    cv2.setNumThreads(1)
    end_with_parent()


def render_job(folder: Path, job: StudyJob) -> list[MaskRow]:
    """Render and write the images and masks of one study."""
    images = render_study(
        job.seed, job.patient.number, job.study.number, [image.plan.position for image in job.images],
        job.study.findings, [image.shape for image in job.images], [image.plan.number for image in job.images],
    )  # fmt: skip
    rows = []
    for image, rendered in zip(job.images, images, strict=True):
        path = folder / image.path
        path.parent.mkdir(parents=True, exist_ok=True)
        form = image.form or BY_SUFFIX[path.suffix]
        path.write_bytes(encode(form, rendered.pixels, image.image_id, dict(image.elements)))
        own = f"masks/{image.image_id.removesuffix(path.suffix)}"  # CheXpert has many a view1_frontal.jpg
        if rendered.masks:
            (folder / own).mkdir(parents=True, exist_ok=True)
        for finding, mask in sorted(rendered.masks.items()):
            name = f"{own}/{mask_name(finding)}"
            pixels = mask.astype(np.uint8) * np.uint8(255)
            (folder / name).write_bytes(_mask_png(pixels))
            x, y, width, height = cv2.boundingRect(pixels)
            rows.append(MaskRow(image.image_id, finding, name, float(mask.mean()), (x, y, width, height)))
    return rows


def mask_name(finding: str) -> str:
    """File name of a finding's mask."""
    return re.sub(r"\W", "_", finding) + ".png"


def _mask_png(pixels: np.ndarray) -> bytes:
    written, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_BILEVEL, 1])
    assert written
    return data.tobytes()


def _summary(
    layout: str, patients: int, seed: int, size: int, minimum_patients: int, jobs: list[StudyJob], masks: list[MaskRow]
) -> dict[str, Any]:
    counts = {}
    for name in LAYOUTS[layout].findings:
        having = [job for job in jobs if name in job.study.findings]
        counts[name] = {
            "patients": len({job.patient.number for job in having}),
            "studies": len(having),
            "images": sum(len(job.images) for job in having),
            "masks": sum(mask.finding == name for mask in masks),
        }
    splits = {s: len({j.patient.number for j in jobs if j.patient.split == s}) for s in ("train", "val", "test")}
    return {
        "format": FORMAT,
        "generator_version": VERSION,
        "layout": layout,
        "seed": seed,
        "size": size,
        "minimum_patients": minimum_patients,
        "patients": patients,
        "studies": len(jobs),
        "images": sum(len(job.images) for job in jobs),
        "patients_by_split": splits,
        "findings": counts,
        "notice": "Synthetic images. They carry no information about real disease.",
    }
