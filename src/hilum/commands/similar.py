"""`hilum similar`: an index and the images of one study in, the most similar studies out: a table, a picture."""

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hilum.commands.embed import write_quarantine
from hilum.commands.predict_account import quarantine_of
from hilum.core.errors import CheckpointError, ConfigError, EmptyStudyError, ImageError, StoreError
from hilum.core.files import write_bytes, write_json, write_text
from hilum.core.tracking import say, warn
from hilum.core.types import RESEARCH_NOTICE
from hilum.data.images import read_image
from hilum.deploy.case_sheet import Case, draw_sheet, encode_png
from hilum.deploy.embeddings import embed_finding, embed_study
from hilum.deploy.encoder import Encoder, load_encoder
from hilum.deploy.inputs import FileImage, Inputs, Refused, refuse_overwriting, resolve
from hilum.deploy.similar import Index, Match

FORMAT = "hilum-similar-1"
COLUMNS = ("rank", "similarity", "study_id", "image_uid", "image_id", "dataset", "view", "findings")

MOST_IMAGES = 20
"""Of one study: a folder with more is that of many."""


def run(
    index: Path,
    inputs: list[str],
    out: Path | None = None,
    finding: str | None = None,
    count: int = 8,
    sheet: Path | None = None,
    model: str | None = None,
    exclude: list[str] | None = None,
    device: str = "auto",
) -> None:
    """Find studies like one study.

    Args:
        index: made by `hilum index`.
        inputs: the images of the study: files, a folder, or a CSV of paths.
        out: `.csv` or `.json`; None: the table is only printed.
        finding: search by what this finding's query pools; None: by the whole image.
        count: how many.
        sheet: a PNG with the query and what was found.
        model: where the model is; None: as the index says.
        exclude: ids of patients or studies to leave out, beside the query's own.
        device: auto, cpu or cuda.

    Raises:
        ConfigError: options that mean nothing, no index, or one without this finding.
        CheckpointError: the model is not the one that the index was made with.
        EmptyStudyError: no image could be read.
    """
    if out is not None and out.suffix not in (".csv", ".json"):
        raise ConfigError(f"--out {out}: expected a name that ends in .csv or .json.")
    if sheet is not None and sheet.suffix != ".png":
        raise ConfigError(f"--sheet {sheet}: expected a name that ends in .png.")
    if out is not None:
        refuse_overwriting((out, quarantine_of(out)), inputs)
    opened = Index.open(index)
    opened = opened if finding is None else opened.finding(finding)
    encoder = load_encoder(model or _model_of(opened), device)
    opened.matches(encoder)
    found = resolve(inputs)
    if found.store is not None:
        raise ConfigError(f"{inputs[0]} is a part of a store; expected the image files of one study.")
    if len(found.images) > MOST_IMAGES:
        raise ConfigError(f"{len(found.images)} images; expected those of one study, {MOST_IMAGES} at most. Name them.")
    pixels, images = _read(found, encoder)
    views = [image.view for image in images]
    query = (
        embed_study(encoder, pixels) if finding is None else embed_finding(encoder, pixels, finding, view_names=views)
    )
    own = _own(opened, images)
    cases = opened.search(query, count, [*own, *(exclude or [])])
    left_out = int(opened.left_out([*own, *(exclude or [])]).sum())
    _print(cases, finding, left_out, "of its own patient or excluded" if exclude else "of its own patient")
    if out is not None:
        write_quarantine(found, out)
        _write(out, cases, opened, finding, len(images), left_out)
        say(f"{out}: {len(cases)} similar studies")
    if sheet is not None:
        shown = [_case(opened, case) for case in cases]
        asked = [
            Case(one, "query" if image.view == "UNKNOWN" else f"query, {image.view}")
            for one, image in zip(pixels, images, strict=True)
        ]
        write_bytes(sheet, encode_png(draw_sheet(asked, shown, finding)))
        say(f"{sheet}: the query and {len(shown)} similar studies")


def _model_of(index: Index) -> str:
    recorded = index.header["model_path"]
    places = [index.path / recorded["relative"], Path(recorded["path"])] if recorded else []
    there = next((place for place in places if place.exists()), None)
    if there is None:
        where = f"not at {places[1]} any more" if places else "not recorded in it"
        raise CheckpointError(f"The model that {index.path} was made with is {where}. Say where: --model MODEL.")
    return str(there)


def _read(found: Inputs, encoder: Encoder) -> tuple[list[np.ndarray], list[FileImage]]:
    """Pixels of the images that can be read, all taken for one study."""
    pixels, images = [], []
    for image in found.images:
        try:
            read = read_image(image.path, image.path.name, encoder.short_side, recipe=encoder.preprocess_id)
        except ImageError as error:
            found.refused.append(Refused(image.path, error.reason, str(error)))
            warn(str(error))
            continue
        pixels.append(read.pixels)
        images.append(replace(image, view=encoder.view_of(read.pixels, image.view)))
    if not images:
        raise EmptyStudyError(f"None of {len(found.refused)} images could be read; there is nothing to search with.")
    studies = {image.study for image in images if image.study != image.image_id}
    if len(studies) > 1:
        warn(f"the images name {len(studies)} studies; all of them are taken for one")
    return pixels, images


def _own(index: Index, images: list[FileImage]) -> list[str]:
    """Patients and studies that the images say they are of, and those of indexed images with their names."""
    said = [one for image in images for one in (image.patient, image.study) if one != image.image_id]
    return [*said, *index.own([image.path.resolve() for image in images]), *index.own([i.image_id for i in images])]


def _case(index: Index, case: Match) -> Case:
    try:
        pixels = index.thumbnail(case.row)
    except StoreError as error:
        warn(str(error))
        pixels = None
    return Case(pixels, f"{case.similarity:.3f}  {case.dataset}, {case.view}", tuple(case.positive))


def _print(cases: list[Match], finding: str | None, left_out: int, whose: str) -> None:
    say(f"by {finding or 'the whole image'}{f'; {left_out} studies {whose} left out' if left_out else ''}")
    for rank, case in enumerate(cases, 1):
        labels = ", ".join(case.positive) or "-"
        say(f"{rank:3d}  {case.similarity:.4f}  {case.study_id}  {case.view}  {labels}")


def _write(out: Path, cases: list[Match], index: Index, finding: str | None, images: int, left_out: int) -> None:
    rows: list[dict[str, Any]] = [
        dict(zip(COLUMNS, (rank, case.similarity, case.study_id, case.image_uid, case.image_id, case.dataset, case.view,
                           case.positive), strict=True))
        for rank, case in enumerate(cases, 1)
    ]  # fmt: skip
    if out.suffix == ".json":
        write_json(out, {
            "format": FORMAT, "notice": RESEARCH_NOTICE, "model": index.header["model"], "index": str(index.path),
            "studies": len(index), "finding": finding, "query_images": images, "left_out": left_out, "cases": rows,
        })  # fmt: skip
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([*(row[name] for name in COLUMNS[:-1]), "|".join(row["findings"])] for row in rows)
    write_text(out, text.getvalue())
