"""`hilum explain`: where a model looked, as pictures of studies, or as a map file of a store's split.

A command of its own, and no option of `predict`: that writes one table of any number of studies, this a folder of
pictures for each, and asks other things (which findings, above which threshold). Both read files through
`deploy/inputs.py` and studies through `Model.predict`, so that they show the same images and numbers.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hilum
from hilum.core.errors import ConfigError, EmptyStudyError, ImageError, UnknownNameError
from hilum.core.files import write_bytes, write_text
from hilum.core.tracking import next_step, progress, say, warn
from hilum.data.images import read_image
from hilum.deploy.inputs import FileImage, Inputs, Refused, resolve
from hilum.deploy.overlays import SheetRow, contact_sheet, of_study, overlay_png, png, scale_of
from hilum.deploy.predictor import Model, load
from hilum.deploy.study_result import StudyResult
from hilum.evaluation.map_files import write_maps
from hilum.evaluation.predictions import bare_ids
from hilum.evaluation.studies import study_uids

LONGEST = 1024
"""Longer side of the pictures that are written, pixels; smaller images stay as they are."""
INDEX = (
    "study", "image", "file", "view", "finding", "probability", "threshold", "contribution", "picture",
)  # fmt: skip


def run(
    model: Path,
    inputs: list[str],
    out: Path | None = None,
    findings: Sequence[str] = (),
    threshold: str | None = None,
    maps: Path | None = None,
    regions: Path | None = None,
    together: bool = False,
    batch_size: int = 32,
    device: str = "auto",
) -> None:
    """Write pictures of studies, or the maps of a store's split.

    Args:
        model: a MODEL or an ensemble directory.
        inputs: files, folders, CSV files of paths; or one STORE:split, for `maps`.
        out: folder of the pictures.
        findings: names; empty: those whose probability is above their threshold.
        threshold: which one, by name; None: the model's first.
        maps: `.npz` for the maps of a store's split: of the pairs that `regions` has, or that are labelled positive.
        regions: masks or boxes (`data/regions.py`).
        together: all files are one study; otherwise as DICOM headers or a table say, and any other file is its own.
        batch_size: images at a time, of a store.
        device: auto, cpu or cuda.

    Raises:
        ConfigError: inputs and options that do not go together, or nothing to show.
        UnknownNameError: a finding or a threshold that does not exist.
        EmptyStudyError: no input could be read.
    """
    if (out is None) == (maps is None):
        raise ConfigError("Say --out FOLDER for pictures of files, or --maps FILE.npz for the maps of STORE:split.")
    if regions is not None and maps is None:
        raise ConfigError("--regions chooses which maps of a store are kept; it goes with --maps.")
    if together and maps is not None:
        raise ConfigError("--together makes one study of files; the images of a store know theirs. Leave it out.")
    if maps is not None and maps.suffix != ".npz":
        raise ConfigError(f"--maps {maps}: expected a name that ends in .npz.")
    loaded = load(model, device)
    for name in findings:
        if name not in loaded.findings:
            raise UnknownNameError("finding", name, loaded.findings)
    found = resolve(inputs)
    if (found.store is None) != (maps is None):
        raise ConfigError(
            "Maps of a whole split go to one file: hilum explain MODEL STORE:test --maps maps.npz. Pictures are made "
            "of files: hilum explain MODEL pa.dcm lateral.dcm --out explained."
        )
    if maps is not None:
        _maps_of_store(loaded, found, maps, findings, regions, batch_size)
    elif out is not None:
        known = loaded.operating_points or ("f1",)
        if threshold is not None and threshold not in known:
            raise UnknownNameError("threshold of this model", threshold, known)
        _pictures(loaded, found, out, findings, threshold or known[0], together)


def _maps_of_store(
    model: Model, found: Inputs, out: Path, findings: Sequence[str], regions: Path | None, batch_size: int
) -> None:
    from hilum.data.regions import read_regions, sizes_of
    from hilum.deploy.store_maps import labelled_positive, needed, store_maps

    store = found.store
    assert store is not None
    names = set(findings or model.findings)
    if regions is None:
        wanted: Mapping[int, Collection[str]] = labelled_positive(store, found.indices, names)
    else:
        names_of = bare_ids(store.image_ids[found.indices], store.datasets[found.indices]).tolist()
        place = dict(zip(names_of, found.indices.tolist(), strict=True))
        repeated = {name for name, count in Counter(names_of).items() if count > 1}
        pairs: dict[int, list[str]] = {}
        for image, name in read_regions(regions, sizes_of(store.path)).keys:
            if image in place and name in names:
                if image in repeated:
                    raise ConfigError(
                        f"Image id {image!r} occurs in several datasets of {store.path}, and regions know images by "
                        "their id alone. Build a store of one dataset."
                    )
                pairs.setdefault(place[image], []).append(name)
        wanted = pairs
    together = any(network.needs_studies for network in model.networks)
    count = len(needed(store, np.asarray(found.indices), wanted, together))
    with progress("maps", count, "images") as bar:
        made = store_maps(model, store, found.indices, wanted, batch_size, done=bar.advance)
    made.metadata["hilum"] = hilum.__version__
    write_maps(made, out)
    say(
        f"{out}: {len(made)} maps of {len(made.image_uid)} images, {len(made.findings)} findings, "
        f"{made.metadata['kind']}, {made.maps.shape[1]} x {made.maps.shape[2]} patches"
    )
    judged = f"--regions {regions}" if regions else "--regions MASKS_OR_BOXES.csv"
    next_step(f"hilum evaluate PREDICTIONS --labels {store.path} --maps {out} {judged} --out evaluation")


def _pictures(model: Model, found: Inputs, out: Path, findings: Sequence[str], threshold: str, together: bool) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already and is not an empty folder. Choose another one.")
    identity = found.identity()
    keys = study_uids(*(identity[name] for name in ("dataset", "patient_id", "study_id", "image_uid")))
    studies = [np.flatnonzero(keys == key) for key in dict.fromkeys(keys.tolist())]
    studies = [np.arange(len(keys))] if together else studies
    rows: list[list[Any]] = []
    written, shown = 0, 0
    with progress("explain", len(studies), "studies") as bar:
        for number, positions in enumerate(studies, 1):
            images = [found.images[position] for position in positions]
            folder = out if len(studies) == 1 else out / f"study_{number}"
            lines = _study(model, images, folder, findings, threshold, found)
            rows += [[number, *line] for line in lines]
            shown += bool(lines)
            written += len(lines)
            bar.advance()
    for refused in found.refused:
        warn(f"left out {refused.path}: {refused.message}")
    if not shown and found.refused:
        raise EmptyStudyError(f"None of {len(found.refused)} inputs could be read. Nothing was written.")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(INDEX)
    writer.writerows(rows)
    write_text(out / "index.csv", text.getvalue())
    drawn = sum(row[-1] != "" for row in rows)
    say(f"{out}: {drawn} overlays and {shown} contact sheets of {len(studies)} studies, listed in index.csv")


def _study(
    model: Model, images: Sequence[FileImage], folder: Path, findings: Sequence[str], threshold: str, found: Inputs
) -> list[list[Any]]:
    """Explain one study; the lines of the index, the first for each view without a finding."""
    pictures: list[np.ndarray] = []
    readable: list[FileImage] = []
    for image in images:
        try:
            decoded = read_image(image.path, image.path.name, recipe=model.preprocess_id)
        except ImageError as error:
            found.refused.append(Refused(image.path, error.reason, str(error)))
            continue
        pictures.append(_at_most(decoded.pixels))
        readable.append(image)
    if not readable:
        return []
    result = model.predict([image.path for image in readable], view_names=[image.view for image in readable])
    for number, (flags, scored) in enumerate(zip(result.image_flags, result.scored, strict=True), 1):
        for flag in flags * (not scored):
            warn(f"{folder.name}, image {number} takes no part: {flag.message}")
    names = _chosen(result, findings, threshold) if any(result.scored) else []
    lines: list[list[Any]] = []
    rows: list[SheetRow] = []
    file_names = _file_names(names)
    for number, (image, view, pixels) in enumerate(zip(readable, result.views, pictures, strict=True), 1):
        name = f"image_{number}_{view}.png"
        write_bytes(folder / name, png(pixels))
        lines.append([number, image.path, view, "", "", "", "", ""])
    for finding in names:
        maps = result.attention[finding]
        probability, cut = result.probabilities[finding], (result.thresholds[finding] or {}).get(threshold)
        parts = result.contributions[finding]
        if maps is None:
            warn(f"{finding}: this model was never trained for it; it has no map.")
            continue
        maps = of_study(maps, parts)
        scale = scale_of(maps)
        captions = []
        for number, (image, view, pixels, values, box) in enumerate(
            zip(readable, result.views, pictures, maps, result.boxes, strict=True), 1
        ):
            name = f"{file_names[finding]}_{number}_{view}.png"
            write_bytes(folder / name, overlay_png(pixels, values, box, scale))
            part = None if parts is None else parts[number - 1]
            captions.append(view if part is None else f"{view}, {100 * part:.0f} % of the answer")
            lines.append([number, image.path, view, finding, probability, cut, part, folder / name])
        words = f"{finding}   {probability:.3f}" + (f"   (threshold {cut:.3f})" if cut is not None else "")
        rows.append(SheetRow(words, maps, captions))
    write_bytes(folder / "sheet.png", png(contact_sheet(pictures, result.boxes, result.views, rows)))
    if not names and any(result.scored):
        say(f"{folder / 'sheet.png'}: no finding is above its threshold ({threshold}); name some with --finding")
    return lines


def _file_names(findings: Sequence[str]) -> dict[str, str]:
    """Names in letters and digits; where that leaves two alike, or nothing, a number goes behind them."""
    names: dict[str, str] = {}
    for finding in findings:
        name = bare = re.sub(r"[^A-Za-z0-9]+", "_", finding).strip("_") or "finding"
        number = 1
        while name.casefold() in {one.casefold() for one in names.values()} | {"image"}:
            number += 1
            name = f"{bare}_no{number}"
        names[finding] = name
    return names


def _chosen(result: StudyResult, findings: Sequence[str], threshold: str) -> list[str]:
    """The findings to show, the most probable beside its threshold first; those named in their order."""
    if findings:
        return list(dict.fromkeys(findings))
    above = {}
    for name in result.findings:
        probability, cut = result.probabilities[name], (result.thresholds[name] or {}).get(threshold)
        if probability is not None and cut is not None and probability > cut:
            above[name] = probability
    return sorted(above, key=lambda name: -above[name])


def _at_most(pixels: np.ndarray) -> np.ndarray:
    from hilum.data.images import shrink

    longer, shorter = max(pixels.shape), min(pixels.shape)
    return pixels if longer <= LONGEST else shrink(pixels, max(round(shorter * LONGEST / longer), 1))
