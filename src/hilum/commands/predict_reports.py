"""Reports of studies for `hilum predict --reports DIR`: one folder for each, under names of ours.

    DIR/studies.csv                  which folder is which study of the input, as a prediction table calls it
    DIR/study_0001/study.json        the document (docs/reference/study-report.md); written last, so it says "finished"
    DIR/study_0001/study.html, study.fhir.json, study.sr.dcm, capture_<finding>_<image>.dcm
    DIR/not_written.csv              what could not be made, and why: of all studies, whichever job or run had them
    DIR/not_written/study_0001.csv   the same of one study, from which the list is made
    DIR/options.json                 what was asked for that changes what a report says

Study by study, as a server would answer. A folder that holds everything that is asked for, made by the same model, is
left as it is, so that an interrupted run goes on. Images are counted as they were given, also where one cannot be read.
Past 300 lines: the way from a list of files to each file of a study.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from hilum.commands.predict_report_folder import LeftOut, left_out_path, write_index, write_left_out, write_options
from hilum.commands.predict_report_options import DICOM_FORMATS, FORMATS, ReportOptions
from hilum.core.errors import ConfigError, ImageError
from hilum.core.files import atomic_path, read_json, write_json, write_text
from hilum.core.tracking import progress, say, warn
from hilum.data.images import kind_of, read_image
from hilum.deploy.fhir import NOBODY, fhir_bundle
from hilum.deploy.finding_codes import local_code
from hilum.deploy.inputs import HEADER_BYTES, Inputs, fingerprint
from hilum.deploy.network import store_identity
from hilum.deploy.overlays import of_study
from hilum.deploy.predictor import Model
from hilum.deploy.study_page import drawn_point, study_page
from hilum.deploy.study_report import ImageFacts, study_document
from hilum.evaluation.studies import study_uids

DOCUMENT_NAME = "study.json"
PICTURE_FORMATS = ("html", "sc")
_FILES = {
    "json": DOCUMENT_NAME, "html": "study.html", "fhir": "study.fhir.json", "fhir-r4b": "study.fhir-r4b.json",
    "sr": "study.sr.dcm",
}  # fmt: skip


class _Study(NamedTuple):
    """One study of the input."""

    name: str
    """Of its folder."""
    study_id: str
    patient_id: str
    positions: list[int]
    """Of its images among those of the input."""
    files: str
    """Digest of what its images are read from (`inputs.fingerprint`)."""


class _View(NamedTuple):
    """One image of a study, ready for the model."""

    number: int
    """Among those that were given, from 1."""
    pixels: UInt8[np.ndarray, "H W"]
    facts: ImageFacts
    quality: tuple[str, ...]
    view: str
    view_source: str
    path: Path | None
    """None: of a store."""


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
        ConfigError: as `prepare_reports`.
    """
    chosen_by_hand = score_flagged or found.store is not None  # somebody has put it into the store
    studies = prepare_reports(model, found, options, raw, score_flagged, correct_inverted)
    _warn_of_strangers(options, studies)
    mine = set(np.asarray(part).tolist())
    chosen = [study for study in studies if study.positions[0] in mine]
    finished = 0
    with progress("reports", sum(len(study.positions) for study in chosen), "images") as bar:
        for study in chosen:
            folder = options.folder / study.name
            if _is_finished(folder, model, raw, options):
                finished += 1
            else:
                left_out = LeftOut()
                views = _views(model, found, study, left_out)
                if views:
                    _write_study(model, study, views, options, left_out, raw, chosen_by_hand, correct_inverted)
                    finished += 1
                else:
                    left_out.write(left_out_path(options.folder, study.name))
            bar.advance(len(study.positions))
    write_left_out(options.folder, {study.name for study in chosen})
    say(f"{options.folder}: reports of {finished} of {len(chosen)} studies ({', '.join(_formats(options))})")
    return finished


def prepare_reports(
    model: Model,
    found: Inputs,
    options: ReportOptions,
    raw: bool = False,
    score_flagged: bool = False,
    correct_inverted: bool = False,
) -> list[_Study]:
    """Everything that can be refused before anything is predicted; arguments as `write_reports`.

    Returns:
        all studies of the input.

    Raises:
        ConfigError: a folder that holds reports of other inputs, options or another model, DICOM formats without one
            DICOM file, or references that may be of several studies.
    """
    if set(options.formats) & set(DICOM_FORMATS):
        _need_dicom(found)
    studies = _studies(found)
    _refuse_ambiguous(options, studies)
    write_index(options.folder, ((one.name, one.study_id, len(one.positions), one.files) for one in studies))
    write_options(options, str(model.composition.study), score_flagged or found.store is not None, correct_inverted)
    first = next((study for study in studies if (options.folder / study.name / DOCUMENT_NAME).exists()), None)
    if first is not None:
        _is_finished(options.folder / first.name, model, raw, options)
    return studies


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
    ids, patients, files = identity["study_id"].tolist(), identity["patient_id"].tolist(), found.places
    return [
        _Study(
            f"study_{number:0{digits}d}",
            ids[places[0]],
            patients[places[0]],
            places,
            fingerprint([files[place] for place in places], found.store)[:16],
        )
        for number, places in enumerate(positions.values(), 1)
    ]


def _keys(study: _Study) -> list[tuple[str, str]]:
    """By which references may name a study: with its patient, or without any."""
    return [(study.study_id, study.patient_id), (study.study_id, "")]


def _refuse_ambiguous(options: ReportOptions, studies: Sequence[_Study]) -> None:
    """References by id of the study alone, where several patients have one of that id, would be of the wrong one."""
    meant = Counter(key for study in studies for key in _keys(study) if key in options.references)
    several = sum(count > 1 for count in meant.values())
    if several:
        raise ConfigError(
            f"--references: {several} of {len(options.references)} rows name a study_id that several studies of the "
            "inputs have, of several patients. Add a column patient_id that says whose is meant."
        )


def _warn_of_strangers(options: ReportOptions, studies: Sequence[_Study]) -> None:
    strangers = set(options.references) - {key for study in studies for key in _keys(study)}
    if strangers:
        warn(f"{len(strangers)} of {len(options.references)} references are of studies that are not among the inputs")


def _is_finished(folder: Path, model: Model, raw: bool, options: ReportOptions) -> bool:
    path = folder / DOCUMENT_NAME
    if not path.exists():
        return False
    document = read_json(path, ConfigError)
    made_by = document.get("model", {}) if isinstance(document, dict) else {}
    calibrated = not raw and not model.reservations.uncalibrated
    if (made_by.get("digest"), made_by.get("calibrated")) != (model.digest, calibrated):
        raise ConfigError(f"{path} was written by another model, or with and without --raw. Choose another folder.")
    wanted = [folder / _FILES[name] for name in options.formats if name != "sc"]
    if "sc" in options.formats and document["status"] == "scored":
        wanted += [
            folder / _capture_name(one["name"], image["number"])
            for one in _captured(document, options.captures)
            for image in document["study"]["images"]
            if image["scored"]
        ]
    return all(path.exists() for path in wanted)


def _views(model: Model, found: Inputs, study: _Study, left_out: LeftOut) -> list[_View]:
    """The images of a study that can be read. Files are called by their number: names may hold those of people."""
    views = []
    for number, position in enumerate(study.positions, 1):
        if found.store is not None:
            index = int(found.indices[position])
            pixels = found.store.read(index)
            view = str(found.store.views[index])
            views.append(_View(number, pixels, ImageFacts(*pixels.shape), (), view, "given", None))
            continue
        image = found.images[position]
        try:
            decoded = read_image(image.path, f"image {number}", model.short_side, recipe=model.preprocess_id)
        except ImageError as error:
            left_out.add(study.name, f"image {number}", error)
            continue
        facts = ImageFacts.of(decoded.rows, decoded.cols, decoded.pixels.shape)
        views.append(_View(number, decoded.pixels, facts, decoded.quality, image.view, image.view_source, image.path))
    return views


def _write_study(
    model: Model,
    study: _Study,
    views: Sequence[_View],
    options: ReportOptions,
    left_out: LeftOut,
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
    unread = set(range(1, len(study.positions) + 1)) - {view.number for view in views}
    document = study_document(result, model, study_id=study.name, images=[view.facts for view in views], unread=unread)
    folder, formats = options.folder / study.name, _formats(options)
    maps = {
        name: None if views_of is None else of_study(views_of, result.contributions[name])
        for name, views_of in result.attention.items()
    }
    references = next((options.references[key] for key in _keys(study) if key in options.references), NOBODY)
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
    left_out.write(left_out_path(options.folder, study.name))
    write_json(folder / DOCUMENT_NAME, document)


def _write_dicom(
    folder: Path,
    document: Mapping[str, Any],
    maps: Mapping[str, Sequence[np.ndarray] | None],
    views: Sequence[_View],
    pixels: Sequence[np.ndarray],
    options: ReportOptions,
    left_out: LeftOut,
) -> None:
    """What can be made of it; a study that is no DICOM, or was withheld, is listed with the reason."""
    from hilum.deploy.dicom_pictures import pictures
    from hilum.deploy.dicom_report import structured_report
    from hilum.deploy.dicom_source import read_source

    chosen = [one["name"] for one in _captured(document, options.captures)]
    made: dict[str, Callable[[list[Any]], None]] = {
        "sr": lambda sources: _save(structured_report(document, sources), folder / _FILES["sr"]),
        "sc": lambda sources: _save_all(pictures(document, sources, pixels, maps, chosen), document, folder),
    }
    for name in DICOM_FORMATS:
        if name not in options.formats:
            continue
        try:
            made[name]([read_source(view.path, view.number) for view in views if view.path])
        except (ImageError, ConfigError) as error:
            left_out.add(folder.name, name, error)


def _captured(document: Mapping[str, Any], captures: str) -> list[Mapping[str, Any]]:
    """The findings that secondary captures are made of."""
    point = drawn_point(document)
    return [
        one for one in document["findings"] if one["has_map"] and (captures == "all" or (one["above"] or {}).get(point))
    ]


def _capture_name(finding: str, image: int) -> str:
    return f"capture_{local_code(finding).value}_{image}.dcm"


def _save_all(captures: Any, document: Mapping[str, Any], folder: Path) -> None:
    for one in captures:
        _save(one.dataset, folder / _capture_name(document["findings"][one.finding]["name"], one.image))


def _save(dataset: Any, path: Path) -> None:
    from hilum.deploy.dicom_writing import without_complaints

    with atomic_path(path) as temporary, without_complaints():
        dataset.save_as(temporary, enforce_file_format=True)
