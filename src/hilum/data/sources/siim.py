"""SIIM-ACR Pneumothorax Segmentation 2019: DICOM copies of NIH images with regions of pneumothorax.

`train-rle.csv` has the columns `ImageId` and ` EncodedPixels` (with a space before it) and a row for each region;
` -1` means none. Images are DICOM files called by their `ImageId`, in a tree of any depth; view, sex and age are in
their headers. No public map says which NIH images these are.
Source: SIIM-ACR Pneumothorax Segmentation (Kaggle 2019), images of Wang et al. 2017.
"""

import json

import polars as pl

from hilum.core.errors import ManifestError, PathError, UnknownLabelError
from hilum.data.headers import header_columns
from hilum.data.label_cells import finding_columns, token_values
from hilum.data.label_maps import load_map
from hilum.data.rows import (
    ROW,
    SourceOptions,
    SourceRows,
    ages,
    existing_folder,
    keep_existing,
    located,
    paths_by_name,
    scan,
)
from hilum.data.tables import Table, read_csv, row_of

TABLES = ("train-rle.csv", "stage_2_train.csv", "stage_1_train.csv")
NONE = "-1"
SHOWN_RUNS = 64
"""Characters of a region kept in `raw_labels`; the whole is in the table."""
HEADER_FIELDS = {
    "patient_header": "PatientID", "study_header": "StudyInstanceUID", "view_raw": "ViewPosition", "sex": "PatientSex",
    "age_raw": "PatientAge",
}  # fmt: skip
LABELS = load_map("siim")


def read(options: SourceOptions) -> SourceRows:
    """Read the table and the headers of the images.

    Raises:
        ManifestError: a subclass for each kind of fault; see `tables` and `rows`.
    """
    root = existing_folder(options.root, f"siim=ROOT holds {TABLES[0]} and the DICOM files")
    home = existing_folder(options.images, "--images siim=FOLDER") if options.images else root
    path = options.table or next((root / name for name in TABLES if (root / name).is_file()), None)
    if path is None:
        raise PathError(f"{root} holds none of {', '.join(TABLES)}. Name the table with --table siim=CSV.")
    table = read_csv(path, ("ImageId", "EncodedPixels"))
    frame = _images(table)
    values = token_values(frame["tokens"], LABELS, path)
    columns, conflicts = finding_columns(values, LABELS, options.policy)
    found = scan(home)
    there = paths_by_name(frame["image_id"], found, home, options)
    rows = frame.drop("tokens").hstack(columns).with_columns(source_relpath=there.fill_null(frame["image_id"] + ".dcm"))
    rows = located(rows, path, pl.col("row")).drop("row")
    rows, missing = keep_existing(rows, found, home, options, studies=False)
    headers, unread = header_columns(rows["source_relpath"], home, HEADER_FIELDS)
    rows = rows.hstack(headers).with_columns(
        pl.col("patient_header", "study_header", "sex", "age_raw").replace("", None)
    )
    nameless = int(rows["patient_header"].is_null().sum())
    notes = [f"{nameless} images name no patient in their headers: each counts as one"] if nameless else []
    return SourceRows(
        rows.with_columns(
            patient_id=pl.coalesce("patient_header", "image_id"),
            study_id=pl.coalesce("study_header", "image_id"),
            age_years=ages(pl.col("age_raw")),
            split_official=pl.lit(""),
            release=pl.lit("2019"),
            licence_tag=pl.lit("kaggle-rules"),
            label_source=pl.lit("siim-acr-2019"),
            label_trust=pl.lit("physician"),
        ).drop("patient_header", "study_header"),
        LABELS.findings,
        home,
        official=False,
        tables={path.name: table.sha256},
        notes=(
            "these are NIH images, and no public map says which: compare the pictures (`hilum audit --pixels`) before "
            "both are used",
            *notes,
            *missing,
            *unread,
        ),
        conflicts=conflicts,
    )


def _images(table: Table) -> pl.DataFrame:
    """One row per image: `image_id`, its first `row` in the table, `tokens` ("mask", or none), `raw_labels`.

    Raises:
        UnknownLabelError: a region that is none; names the row.
        ManifestError: an image with a region and without.
        PathError: an id that is no file name.
    """
    frame, path = table.frame, table.path
    bad = ~frame["ImageId"].str.contains(r"^[0-9A-Za-z.-]+$")
    if bad.any():
        raise PathError(f"{path}, row {row_of(bad)}: 'ImageId' is not the name of a file ({bad.sum()} such rows).")
    runs = frame["EncodedPixels"].str.strip_chars()
    none = runs == NONE
    bad = ~none & ~runs.str.contains(r"^\d+ \d+( \d+ \d+)*$")
    if bad.any():
        raise UnknownLabelError(
            f"{path}, row {row_of(bad)}: 'EncodedPixels' is neither -1 nor pairs of numbers ({bad.sum()} such rows)."
        )
    cells = frame.select(ROW, none.alias("none"), image_id="ImageId", cell="EncodedPixels")
    mixed = cells.select(pl.col("none").n_unique().over("image_id") > 1).to_series()
    if mixed.any():
        raise ManifestError(f"{path}, row {row_of(mixed)}: one image has a region in one row and none in another.")
    grouped = cells.group_by("image_id", maintain_order=True).agg("cell", pl.col("none", "row").first())
    tokens = [[] if absent else ["mask"] for absent in grouped["none"]]
    raw = [json.dumps([cell[:SHOWN_RUNS] for cell in found]) for found in grouped["cell"]]
    return grouped.select("image_id", "row").with_columns(
        pl.Series("tokens", tokens, dtype=pl.List(pl.String)), pl.Series("raw_labels", raw, dtype=pl.String)
    )
