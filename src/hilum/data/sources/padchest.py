"""PadChest: `PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv` (or `.csv.gz`) and 16-bit PNGs.

Layouts: ROOT/<ImageDir>/<ImageID> with the folders 0 to 54 of the archives, ROOT/images/<ImageID>, or all in ROOT; an
image is known by its name, which no other has. Columns are matched without regard to case (the README and the table
spell some differently); the first one has no name. Ids are numbers of up to 39 digits: text, or they are lost.
`Labels` is a Python list written as text. An empty list or cell says nothing: unknown, not healthy. The column
`LabelsLocalizationsBySentence` is not used, since it says "normal" for every normal sentence of a report; nor is
`labelCUIS`, whose lists have no commas. Unreadable files are found by the build, which reads every image.
Source: Bustos et al., PadChest, Medical Image Analysis 2020.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import polars as pl

from hilum.core.errors import ManifestError, PathError
from hilum.data.label_cells import finding_columns, label_lists, token_values
from hilum.data.label_maps import LabelPolicy, load_map
from hilum.data.rows import (
    SourceOptions,
    SourceRows,
    existing_folder,
    keep_existing,
    located,
    paths_by_name,
    scan,
)
from hilum.data.tables import check_filled, check_values, read_csv, require, row_of, unique

TABLES = (
    "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv",
    "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz",
)
USED = (
    "ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth", "PatientSex_DICOM", "Projection",
    "MethodProjection", "Pediatric", "BitsStored_DICOM", "Rows_DICOM", "Columns_DICOM", "MethodLabel", "Labels",
)  # fmt: skip
VIEW_SOURCES = {"Manual review of DICOM fields": "stated", "resnet-50.t7": "classifier", "": "unknown"}
TRUST = {"Physician": "physician", "RNN_model": "rnn", "": None}
LABELS = load_map("padchest")


def read(options: SourceOptions) -> SourceRows:
    """Read the table and check that every listed image is there.

    Raises:
        ManifestError: a subclass for each kind of fault; see `tables` and `rows`.
    """
    root = existing_folder(options.root, "padchest=ROOT holds the PadChest table")
    home = existing_folder(options.images, "--images padchest=FOLDER") if options.images else root
    path = options.table or next((root / name for name in TABLES if (root / name).is_file()), None)
    if path is None:
        raise PathError(f"{root} holds neither {' nor '.join(TABLES)}. Name another table with --table.")
    table = read_csv(path)
    rows, conflicts = _rows(_spelled(table.frame, path), path, options.policy)
    found = scan(home)
    there = paths_by_name(rows["image_id"].str.head(-len(".png")), found, home, options)
    parent = pl.lit("images") if (home / "images").is_dir() else pl.col("_folder")
    listed = rows.select(parent + "/" + pl.col("image_id")).to_series()
    frame = rows.with_columns(source_relpath=there.fill_null(listed))
    frame, missing = keep_existing(located(frame, path), found, home, options, studies=True)
    unlabelled = frame.height - int(frame["_labelled"].sum())
    notes = [f"{unlabelled} images have no labels: unknown, not healthy"] if unlabelled else []
    return SourceRows(
        frame.drop("_folder", "_labelled").with_columns(
            split_official=pl.lit(""),
            release=pl.lit("2019-02-01"),
            licence_tag=pl.lit("padchest-form"),
            label_source=pl.lit("padchest"),
        ),
        LABELS.findings,
        home,
        official=False,
        tables={path.name: table.sha256},
        notes=(*notes, *missing),
        origin="padchest",
        conflicts=conflicts,
    )


def _spelled(frame: pl.DataFrame, path: Path) -> pl.DataFrame:
    """The columns that are used, under one spelling."""
    folded = {name.casefold(): name for name in USED}
    names = {name: folded[name.casefold()] for name in frame.columns if name.casefold() in folded}
    if len(set(names.values())) < len(names):
        raise ManifestError(f"{path}: two columns have one name but for the case of its letters.")
    require(list(names.values()), USED, path)
    return frame.select(list(names)).rename(names)


def _rows(frame: pl.DataFrame, path: Path, policy: LabelPolicy) -> tuple[pl.DataFrame, Mapping[str, int]]:
    bad = ~frame["ImageID"].str.contains(r"^[^/\\\x00-\x1f]+\.png$")
    if bad.any():
        raise PathError(f"{path}, row {row_of(bad)}: 'ImageID' is not the name of a .png ({bad.sum()} such rows).")
    unique(frame["ImageID"], path)
    for name in ("PatientID", "StudyID"):
        check_filled(frame[name], path)
        _check_digits(frame[name], path)
    check_values(frame["MethodProjection"], VIEW_SOURCES, path, ManifestError)
    check_values(frame["MethodLabel"], TRUST, path, ManifestError)
    tokens = label_lists(frame["Labels"], path)
    # Nothing here is a blank cell of a table of labels, which the policy is about.
    labels, conflicts = finding_columns(token_values(tokens, LABELS, path), LABELS, replace(policy, blank="mask"))
    date, born = pl.col("StudyDate_DICOM"), pl.col("PatientBirth")
    years = date.str.extract(r"^(\d{4})\d{4}(?:\.0)?$", 1).cast(pl.Float32) - _whole(born).cast(pl.Float32)
    excluded = (pl.col("Projection") == "EXCLUDE") | _has(tokens, "exclude")
    flags = {
        "excluded_by_source": excluded,
        "rib_projection": pl.col("Projection") == "COSTAL",
        "suboptimal": _has(tokens, "suboptimal study"),
    }
    rows = frame.select(
        image_id=pl.col("ImageID"),
        patient_id=pl.col("PatientID"),
        study_id=pl.col("StudyID"),
        study_date_raw=date,
        study_seq=_whole(date).cast(pl.Int32),
        view_raw=pl.col("Projection"),
        view_source=pl.col("MethodProjection").replace_strict(VIEW_SOURCES),
        is_pediatric=pl.when(pl.col("Pediatric") == "PED").then(True),
        sex=pl.col("PatientSex_DICOM").str.to_uppercase().replace("", None),
        age_raw=born,
        age_years=pl.when(years.is_between(0, 120)).then(years),
        rows=_whole(pl.col("Rows_DICOM")).cast(pl.Int32),
        cols=_whole(pl.col("Columns_DICOM")).cast(pl.Int32),
        bits_stored=_whole(pl.col("BitsStored_DICOM")).cast(pl.Int32),
        label_trust=pl.col("MethodLabel").replace_strict(TRUST, return_dtype=pl.String),
        quality=pl.concat_list(pl.when(here).then(pl.lit(name)) for name, here in flags.items()).list.drop_nulls(),
        raw_labels=pl.col("Labels").map_elements(json.dumps, return_dtype=pl.String),
        _labelled=pl.lit(tokens.is_not_null()),
        _folder=_whole(pl.col("ImageDir")).fill_null(""),
    ).hstack(labels)
    return rows, conflicts


def _has(tokens: pl.Series, label: str) -> pl.Expr:
    return pl.lit(tokens.list.contains(label).fill_null(False))


def _whole(cell: pl.Expr) -> pl.Expr:
    """The digits of "15" and "15.0"; null where it is not a whole number of up to nine digits."""
    return cell.str.extract(r"^(\d{1,9})(?:\.0)?$", 1)


def _check_digits(ids: pl.Series, path: Path) -> None:
    bad = ~ids.str.contains(r"^\d+$")
    if bad.any():
        lost = ids.filter(bad).str.contains(r"^\d(\.\d+)?[eE]\+?\d+$").any()
        why = " A spreadsheet has rounded these long numbers; take the table as it was released." if lost else ""
        raise ManifestError(f"{path}, row {row_of(bad)}: {ids.name!r} is not digits ({bad.sum()} such rows).{why}")
