"""Reports of studies for `hilum predict --reports DIR`: one folder for each, under names of ours.

    DIR/studies.csv                  which folder is which study of the input, as a prediction table calls it
    DIR/study_0001/study.json        the document (docs/reference/study-report.md); written last, so it says "finished"
    DIR/study_0001/study.html, study.fhir.json, study.sr.dcm, capture_<finding>_<image>.dcm
    DIR/not_written.csv              what could not be made, and why

Study by study, as a server would answer. A folder that holds everything that is asked for, made by the same model, is
left as it is, so that an interrupted run goes on. Past 300 lines: the way from a list of files to each file of a study.
"""

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from hilum.commands.predict_report_options import DICOM_FORMATS, FORMATS, ReportOptions
from hilum.core.errors import ConfigError, HilumError, ImageError
from hilum.core.files import atomic_path, read_json, write_json, write_text
from hilum.core.tracking import progress, say, warn
from hilum.data.images import kind_of, read_image
from hilum.deploy.fhir import NOBODY, fhir_bundle
from hilum.deploy.finding_codes import local_code
from hilum.deploy.inputs import HEADER_BYTES, Inputs
from hilum.deploy.network import store_identity
from hilum.deploy.overlays import of_study
from hilum.deploy.predictor import Model
from hilum.deploy.study_page import POINT, study_page
from hilum.deploy.study_report import ImageFacts, study_document
from hilum.evaluation.studies import study_uids

INDEX_NAME, LEFT_OUT_NAME, DOCUMENT_NAME = "studies.csv", "not_written.csv", "study.json"
PICTURE_FORMATS = ("html", "sc")
_FILES = {
    "json": DOCUMENT_NAME, "html": "study.html", "fhir": "study.fhir.json", "fhir-r4b": "study.fhir-r4b.json",
    "sr": "study.sr.dcm", "sc": "capture_*.dcm",
}  # fmt: skip


class _Study(NamedTuple):
    """One study of the input."""

    name: str
    """Of its folder."""
    study_id: str
    positions: list[int]
    """Of its images among those of the input."""


class _View(NamedTuple):
    """One image of a study, ready for the model."""

    pixels: UInt8[np.ndarray, "H W"]
    facts: ImageFacts
    quality: tuple[str, ...]
    view: str
    view_source: str
    path: Path | None
    """None: of a store."""


@dataclass
class _LeftOut:
    """What could not be made, for the list at the end."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(self, folder: str, what: str, error: HilumError) -> None:
        reason = error.reason if isinstance(error, ImageError) else type(error).__name__
        self.rows.append((folder, what, reason, str(error)))


def write_reports(
    model: Model,
    found: Inputs,
    part: np.ndarray,
    options: ReportOptions,
    raw: bool = False,
    score_flagged: bool = False,
    correct_inverted: bool = False,
) -> int:
    """Write the reports of the studies to which these images belong.

    Args:
        model: the model.
        found: everything that was given.
        part: positions of the images of this job among them; a study is never divided.
        options: what to write.
        raw: without calibration.
        score_flagged: as `Model.predict`; images of a store always are.
        correct_inverted: as there.

    Returns:
        how many studies have a report, those that had one before among them.

    Raises:
        ConfigError: a folder that holds reports of other inputs, or DICOM formats without one DICOM file.
    """
    if set(options.formats) & set(DICOM_FORMATS):
        _need_dicom(found)
    studies = _studies(found)
    _write_index(options.folder, studies)
    mine = set(np.asarray(part).tolist())
    chosen = [study for study in studies if study.positions[0] in mine]
    left_out, finished = _LeftOut(), 0
    with progress("reports", sum(len(study.positions) for study in chosen), "images") as bar:
        for study in chosen:
            folder = options.folder / study.name
            if _is_finished(folder, model, raw, options.formats):
                finished += 1
            else:
                views = _views(model, found, study, left_out)
                if views:
                    chosen_by_hand = score_flagged or found.store is not None  # somebody has put it into the store
                    _write_study(model, study, views, options, left_out, raw, chosen_by_hand, correct_inverted)
                    finished += 1
            bar.advance(len(study.positions))
    _write_left_out(options.folder, left_out)
    say(f"{options.folder}: reports of {finished} of {len(chosen)} studies ({', '.join(_formats(options))})")
    return finished


def _formats(options: ReportOptions) -> list[str]:
    return [name for name in FORMATS if name in (*options.formats, "json")]


def _need_dicom(found: Inputs) -> None:
    if found.store is not None:
        raise ConfigError(
            f"{found.store.path} is a store: it keeps pictures and no DICOM headers, so there is nothing that a DICOM "
            "report (sr, sc) could refer to. Give the DICOM files."
        )
    for image in found.images:
        try:
            with image.path.open("rb") as file:
                if kind_of(file.read(HEADER_BYTES)) == "dicom":
                    return
        except (ImageError, OSError):
            continue
    raise ConfigError(
        "None of the inputs is DICOM: a DICOM report (sr, sc) goes into the study of the images that it is about, and "
        "PNG or JPEG files do not say which that is. Use the formats json, html or fhir."
    )


def _studies(found: Inputs) -> list[_Study]:
    """All studies of the input in the order in which they come, whatever this job's part is."""
    identity = store_identity(found.store, found.indices) if found.store else found.identity()
    uids = study_uids(*(identity[name] for name in ("dataset", "patient_id", "study_id", "image_uid")))
    positions: dict[str, list[int]] = {}
    for position, uid in enumerate(uids.tolist()):
        positions.setdefault(uid, []).append(position)
    digits = max(4, len(str(len(positions))))
    ids = identity["study_id"].tolist()
    return [
        _Study(f"study_{number:0{digits}d}", ids[places[0]], places)
        for number, places in enumerate(positions.values(), 1)
    ]


def _write_index(folder: Path, studies: Sequence[_Study]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["folder", "study_id", "images"])
    writer.writerows([study.name, study.study_id, len(study.positions)] for study in studies)
    path = folder / INDEX_NAME
    if path.exists() and path.read_text(encoding="utf-8") != text.getvalue():
        raise ConfigError(
            f"{path} lists other studies than these inputs: their reports would be mixed. Choose another folder."
        )
    write_text(path, text.getvalue())


def _is_finished(folder: Path, model: Model, raw: bool, formats: Sequence[str]) -> bool:
    path = folder / DOCUMENT_NAME
    if not path.exists():
        return False
    document = read_json(path, ConfigError)
    made_by = document.get("model", {}) if isinstance(document, dict) else {}
    calibrated = not raw and not model.reservations.uncalibrated
    if (made_by.get("digest"), made_by.get("calibrated")) != (model.digest, calibrated):
        raise ConfigError(f"{path} was written by another model, or with and without --raw. Choose another folder.")
    return all(any(folder.glob(_FILES[name])) for name in formats)


def _views(model: Model, found: Inputs, study: _Study, left_out: _LeftOut) -> list[_View]:
    """The images of a study that can be read. Files are called by their number: names may hold those of people."""
    views = []
    for number, position in enumerate(study.positions, 1):
        if found.store is not None:
            index = int(found.indices[position])
            pixels = found.store.read(index)
            views.append(_View(pixels, ImageFacts(*pixels.shape), (), str(found.store.views[index]), "given", None))
            continue
        image = found.images[position]
        try:
            decoded = read_image(image.path, f"image {number}", model.short_side, recipe=model.preprocess_id)
        except ImageError as error:
            left_out.add(study.name, f"image {number}", error)
            continue
        facts = ImageFacts(decoded.rows, decoded.cols)
        views.append(_View(decoded.pixels, facts, decoded.quality, image.view, image.view_source, image.path))
    return views


def _write_study(
    model: Model,
    study: _Study,
    views: Sequence[_View],
    options: ReportOptions,
    left_out: _LeftOut,
    raw: bool,
    score_flagged: bool,
    correct_inverted: bool,
) -> None:
    names = ["" if view.view == "UNKNOWN" else view.view for view in views]
    result = model.predict(
        [view.pixels for view in views], raw=raw, view_names=names, score_flagged=score_flagged,
        correct_inverted=correct_inverted,
    )  # fmt: skip
    known = [
        view.view_source if source == "given" else source
        for view, source in zip(views, result.view_sources, strict=True)
    ]
    result = dataclasses.replace(result, view_sources=known, quality=[view.quality for view in views])
    document = study_document(result, model, study_id=study.name, images=[view.facts for view in views])
    folder, formats = options.folder / study.name, _formats(options)
    maps = {
        name: None if views_of is None else of_study(views_of, result.contributions[name])
        for name, views_of in result.attention.items()
    }
    references = options.references.get(study.study_id, NOBODY)
    pixels: list[np.ndarray] = []
    if set(formats) & set(PICTURE_FORMATS):
        pixels = [
            view.pixels if view.path is None else read_image(view.path, recipe=model.preprocess_id).pixels
            for view in views
        ]
    if "html" in formats:
        write_text(folder / _FILES["html"], study_page(document, pixels, maps))
    if "fhir" in formats:
        write_json(folder / _FILES["fhir"], fhir_bundle(document, references))
    if "fhir-r4b" in formats:
        write_json(folder / _FILES["fhir-r4b"], fhir_bundle(document, references, "R4B"))
    if set(formats) & set(DICOM_FORMATS):
        _write_dicom(folder, document, maps, views, pixels, options, left_out)
    write_json(folder / DOCUMENT_NAME, document)


def _write_dicom(
    folder: Path,
    document: Mapping[str, Any],
    maps: Mapping[str, Sequence[np.ndarray] | None],
    views: Sequence[_View],
    pixels: Sequence[np.ndarray],
    options: ReportOptions,
    left_out: _LeftOut,
) -> None:
    """What can be made of it; a study that is no DICOM, or was withheld, is listed with the reason."""
    from hilum.deploy.dicom_pictures import pictures
    from hilum.deploy.dicom_report import structured_report
    from hilum.deploy.dicom_source import read_source

    chosen = [
        one["name"] for one in document["findings"] if options.captures == "all" or (one["above"] or {}).get(POINT)
    ]
    made: dict[str, Callable[[list[Any]], None]] = {
        "sr": lambda sources: _save(structured_report(document, sources), folder / _FILES["sr"]),
        "sc": lambda sources: _save_all(pictures(document, sources, pixels, maps, chosen), document, folder),
    }
    for name in DICOM_FORMATS:
        if name not in options.formats:
            continue
        try:
            made[name]([read_source(view.path, number) for number, view in enumerate(views, 1) if view.path])
        except (ImageError, ConfigError) as error:
            left_out.add(folder.name, name, error)


def _save_all(captures: Any, document: Mapping[str, Any], folder: Path) -> None:
    for one in captures:
        code = local_code(document["findings"][one.finding]["name"]).value
        _save(one.dataset, folder / f"capture_{code}_{one.image}.dcm")


def _save(dataset: Any, path: Path) -> None:
    from hilum.deploy.dicom_writing import without_complaints

    with atomic_path(path) as temporary, without_complaints():
        dataset.save_as(temporary, enforce_file_format=True)


def _write_left_out(folder: Path, left_out: _LeftOut) -> None:
    path = folder / LEFT_OUT_NAME
    path.unlink(missing_ok=True)  # of an earlier run
    if not left_out.rows:
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["folder", "what", "reason", "message"])
    writer.writerows(sorted(left_out.rows))
    write_text(path, text.getvalue())
    reasons = Counter(f"{what.split()[0]}: {reason}" for _, what, reason, _ in left_out.rows)
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    warn(f"{len(left_out.rows)} reports or images were left out ({listed}); {path} says why")
