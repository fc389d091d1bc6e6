"""Any folder of PNG, JPEG or DICOM files, with or without a table.

The table is `labels.csv` in the folder, or one given by hand: `path`, and where known `patient_id`, `study_id`,
`view`, `split`, `sex`, `age`; every other column is a finding holding 1, 0, -1 (uncertain) or nothing. Without a
table all files are taken, without labels. Where no table names the patient, a DICOM header does, for the
other images of its study too; any other study, or file that is of none, counts as a patient of its own, and the notes
say so.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from hilum.core.errors import EmptyStudyError, ManifestError, PathError
from hilum.core.types import SPLIT_NAMES
from hilum.data.headers import read_headers
from hilum.data.label_cells import CELLS
from hilum.data.labels import canonical, ordered
from hilum.data.rows import (
    ROW,
    Scan,
    SourceOptions,
    SourceRows,
    ages,
    existing_folder,
    keep_existing,
    label_columns,
    located,
    relative_paths,
    scan,
)
from hilum.data.tables import check_filled, check_values, read_csv, unique
from hilum.data.views import view_notes

TABLE = "labels.csv"
PICTURES = (".png", ".jpg", ".jpeg")
DICOM_SUFFIXES = (".dcm", ".dicom")
HEADER_FIELDS = {
    "patient_id": "PatientID",
    "study_id": "StudyInstanceUID",
    "view_raw": "ViewPosition",
    "sex": "PatientSex",
    "age_raw": "PatientAge",
}
RESERVED = ("path", "patient_id", "study_id", "view", "split", "sex", "age")
SPLIT_CELLS = {**SPLIT_NAMES, "": ""}


def read(options: SourceOptions) -> SourceRows:
    """Read a folder and its table, if it has one.

    Raises:
        PathError: no folder, no image in it, or a path that leaves it.
        EmptyStudyError: the table names a study without an image.
        ManifestError: a subclass for each other fault; see `tables` and `rows`.
    """
    root = existing_folder(options.root, f"folder={options.root}")
    image_root = existing_folder(options.images, "--images") if options.images else root
    path = options.table or (root / TABLE if (root / TABLE).is_file() else None)
    found = scan(image_root)
    findings: tuple[str, ...] = ()
    tables: dict[str, str] = {}
    if path is None:
        frame, notes = _files(found, image_root), ["no table: images without labels"]
        notes += [f"{len(found.links)} links inside the folder are not counted again"] if found.links else []
    else:
        frame, findings, digest = _table(path, options)
        frame, notes = keep_existing(frame, found, image_root, options, studies="study_id" in frame.columns)
        tables = {path.name: digest}
        unlisted = len(set(_images(found.files, image_root)) - set(frame["source_relpath"]))
        notes += [f"{unlisted} images in the folder are not in {path.name}: left out"] if unlisted else []
    notes += _not_pictures(found, image_root, path, frame["source_relpath"])
    notes += [f"{found.unnamed} entries whose names are not UTF-8: left out"] if found.unnamed else []
    frame, more = _identify(frame, image_root, path)
    frame = frame.drop("row", strict=False)  # only a table has rows
    frame = frame.with_columns(pl.col("sex", "age_raw").replace("", None), age_years=ages(pl.col("age_raw")))
    notes += _unread_ages(frame) + view_notes(frame["view_raw"])
    has_split = "split_official" in frame.columns
    if not has_split:
        frame = frame.with_columns(split_official=pl.lit(""))
    frame = frame.with_columns(
        image_id=pl.col("source_relpath"), label_trust=pl.lit("given"), label_source=pl.lit(path.name if path else None)
    )
    return SourceRows(frame, findings, image_root, has_split, tables, (*notes, *more))


def _files(found: Scan, root: Path) -> pl.DataFrame:
    if found.outside:
        raise PathError(
            f"{root} holds {len(found.outside)} links that leave it (see `find {root} -type l`). "
            "Give the folder that really holds the images."
        )
    names = [name for name in _images(found.files, root) if not _behind(name, found.links)]
    if not names:
        raise PathError(f"{root} holds no image: {len(found.files)} files, none of them PNG, JPEG or DICOM.")
    return pl.DataFrame({"source_relpath": names})


def _not_pictures(found: Scan, root: Path, table: Path | None, taken: pl.Series) -> list[str]:
    """Notes on what else lies in the folder: nothing is passed over in silence."""
    names = {name for name in found.files if table is None or root / name != table}
    rest = len(names.difference(_images(found.files, root), taken))
    notes = [f"{rest} other files, hidden or no images by their names: left out"] if rest else []
    return notes + ([f"{found.others} pipes, devices or broken links: left out"] if found.others else [])


def _behind(name: str, links: frozenset[str]) -> bool:
    parts = name.split("/")
    return bool(links) and any("/".join(parts[: end + 1]) in links for end in range(len(parts)))


def _images(files: Sequence[str], root: Path) -> list[str]:
    """Files with an image suffix, and files named by a UID or without a suffix that begin as DICOM does."""
    chosen = []
    for name in files:
        base = name.rsplit("/", 1)[-1]
        if base.startswith("."):
            continue
        bare = "." not in base or base.rsplit(".", 1)[-1].isdigit()
        if base.lower().endswith((*PICTURES, *DICOM_SUFFIXES)) or (bare and _is_dicom(root / name)):
            chosen.append(name)
    return chosen


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _table(path: Path, options: SourceOptions) -> tuple[pl.DataFrame, tuple[str, ...], str]:
    table = read_csv(path, ("path",))
    frame = table.frame.with_columns(pl.col("^(patient|study)_id$").str.strip_chars())
    check_filled(frame["path"], path, EmptyStudyError, " Each row is one image; remove studies that have none.")
    paths = relative_paths(frame["path"], path)
    unique(paths.alias("path"), path)
    for name in ("patient_id", "study_id"):
        if name in frame.columns:
            check_filled(frame[name], path, hint=" Fill it for every image, or leave the column out.")
    columns = {name: canonical(name) for name in frame.columns if name not in RESERVED}
    twice = sorted({finding for finding in columns.values() if list(columns.values()).count(finding) > 1})
    if twice:
        raise ManifestError(f"{path}: two columns for {', '.join(twice)} (names are matched without regard to case).")
    _check_findings(frame, columns, path)
    read = np.array(list(CELLS.values()), np.int8)[:, None]
    codes = dict(zip(CELLS, options.policy.settle(read)[:, 0].tolist(), strict=True))
    raw = pl.struct(list(columns)).struct.json_encode() if columns else pl.lit(None, dtype=pl.String)
    frame = frame.with_columns(raw_labels=raw, source_relpath=paths).drop("path")
    frame = located(_rename(label_columns(frame, columns, codes, path), path), path)
    frame = frame.with_columns(ROW)  # beside the columns of `located`, which last until files are looked for
    return frame, ordered(columns.values()), table.sha256


def _check_findings(frame: pl.DataFrame, columns: dict[str, str], path: Path) -> None:
    """A column of anything but labels is most likely a misspelt `patient_id` or a remark: say which are read how."""
    for name in columns:
        bad = ~frame[name].is_in(list(CELLS))
        if bad.all():
            raise ManifestError(
                f"{path}: column {name!r} holds no labels. Columns other than {', '.join(RESERVED)} are findings "
                "with 1, 0, -1 or nothing. Rename or remove it."
            )


def _rename(frame: pl.DataFrame, path: Path) -> pl.DataFrame:
    if "split" in frame.columns:
        split = frame["split"].str.strip_chars().str.to_lowercase().alias("split")
        check_values(split, SPLIT_CELLS, path, ManifestError)
        official = split.replace_strict(SPLIT_CELLS, return_dtype=pl.String)
        frame = frame.with_columns(split_official=official).drop("split")
    return frame.rename({"age": "age_raw", "view": "view_raw"}, strict=False)  # both are optional


def _unread_ages(frame: pl.DataFrame) -> list[str]:
    unread = frame.select(pl.col("age_raw").is_not_null() & pl.col("age_years").is_null()).to_series().sum()
    forms = "58, 63.5, 058Y, 006M, 003W, 012D can be"
    return [f"{unread} ages cannot be read, or are no human age: unknown ({forms})"] if unread else []


def _identify(frame: pl.DataFrame, root: Path, table: Path | None) -> tuple[pl.DataFrame, list[str]]:
    """Fill patient, study, view, sex and age from DICOM headers where the table did not give them."""
    absent = [name for name in HEADER_FIELDS if name not in frame.columns]
    if not absent:
        return frame, []
    paths = frame["source_relpath"].to_list()
    headers, unreadable = read_headers([path for path in paths if not path.lower().endswith(PICTURES)], root)
    path = pl.col("source_relpath")
    fields = {name: path.replace_strict(_field(headers, name), default="", return_dtype=pl.String) for name in absent}
    notes = [f"{unreadable} DICOM headers cannot be read"] if unreadable else []
    frame = frame.with_columns(**fields)
    if "patient_id" in absent:
        frame, more = _patients(frame, None if "study_id" in absent else table)
        notes += more
    if "study_id" in absent:
        frame = frame.with_columns(study_id=pl.when(pl.col("study_id") == "").then(path).otherwise("study_id"))
    return frame, notes


def _patients(frame: pl.DataFrame, table: Path | None) -> tuple[pl.DataFrame, list[str]]:
    """A patient for each image whose header names none: the one that its study has, else a stand-in for the study.

    Settled by study and not by image, since a study of two patients could be learned from and judged on.

    Args:
        frame: `patient_id` as headers have it, "" where none does; `study_id`, "" where it is not known; `row`.
        table: the table that names the studies; none where headers do.

    Raises:
        ManifestError: a study of the table has several patients; names its first row.
    """
    study, patient = pl.col("study_id"), pl.col("patient_id")
    alone = pl.when(study == "").then("source_relpath").otherwise(pl.lit("study:") + study)
    frame = frame.with_columns(alone.alias("alone"), patient.replace("", None))
    frame = frame.with_columns(people=patient.drop_nulls().n_unique().over("alone"))
    several = frame.filter(pl.col("people") > 1)
    studies = several["alone"].n_unique()
    if studies and table is not None:
        raise ManifestError(
            f"{table}, row {several['row'][0]}: the DICOM headers of this study name {several['people'][0]} patients "
            f"({studies} such studies), which could fall into different splits. Add a column patient_id; or, where "
            "studies are numbered anew for each patient, give each study a study_id of its own."
        )
    notes = []
    if studies:
        notes.append(
            f"{studies} studies name several patients in their DICOM headers: each counts as one, which cannot rule "
            "out leakage"
        )
    of_study = pl.when(pl.col("people") == 1).then(patient.drop_nulls().first().over("alone"))
    nameless = frame["patient_id"].is_null()
    frame = frame.with_columns(pl.coalesce("patient_id", of_study))
    unnamed = frame["patient_id"].is_null()
    settled = nameless & ~unnamed
    if settled.any():
        notes.append(f"{settled.sum()} images name no patient: theirs is the one that other images of their study name")
    if unnamed.any():
        unit = "image" if (frame["study_id"].filter(unnamed) == "").all() else "study"
        notes.append(
            f"{unnamed.sum()} images name no patient: each {unit} counts as one, which cannot rule out leakage"
        )
    return frame.with_columns(pl.coalesce("patient_id", "alone")).drop("alone", "people"), notes


def _field(headers: dict[str, dict[str, str]], name: str) -> dict[str, str]:
    return {path: header.get(HEADER_FIELDS[name], "") for path, header in headers.items()}
