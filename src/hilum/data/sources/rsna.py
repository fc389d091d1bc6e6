"""RSNA Pneumonia Detection Challenge 2018: DICOM copies of NIH images, read again by radiologists.

`stage_2_train_labels.csv` has a row for each box, `stage_2_detailed_class_info.csv` the class of the image in as many
rows; `patientId` in both is the id of an image, not of a person. Images are `stage_2_train_images/<patientId>.dcm`;
view, sex and age are in their headers only. Who the patients are, and which NIH images these are, says the challenge's
own map (`pneumonia-challenge-dataset-mappings_2018.json`): with it the manifest knows both, without it each image
counts as a patient of its own and the pictures must be compared.
Source: Shih et al., Radiology: Artificial Intelligence 2019.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from hilum.core.errors import ManifestError, PathError, UnknownLabelError
from hilum.core.files import read_json, sha256_file
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
from hilum.data.tables import Table, check_filled, check_values, read_csv, row_of

BOXES, CLASSES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
MAP = "pneumonia*mappings*.json"
LARGEST_MAP = 2**26
"""Bytes; the real map has some 10 million."""
TRAIN, TEST = "stage_2_train_images", "stage_2_test_images"
EDGES = ("x", "y", "width", "height")
OPACITY = "Lung Opacity"
HEADER_FIELDS = {"view_raw": "ViewPosition", "sex": "PatientSex", "age_raw": "PatientAge"}
LABELS = load_map("rsna")


def read(options: SourceOptions) -> SourceRows:
    """Read both tables, the map where it is, and the headers of the images.

    Raises:
        ManifestError: a subclass for each kind of fault; see `tables` and `rows`.
    """
    root = existing_folder(options.root, f"rsna=ROOT holds {BOXES} and {CLASSES}")
    home = existing_folder(options.images, "--images rsna=FOLDER") if options.images else root
    boxes = read_csv(root / BOXES, ("patientId", *EDGES, "Target"))
    classes = read_csv(root / CLASSES, ("patientId", "class"))
    frame = _images(boxes, classes)
    tokens = frame.select(pl.concat_list("class").alias("class")).to_series()
    columns, conflicts = finding_columns(token_values(tokens, LABELS, classes.path), LABELS, options.policy)
    found = scan(home)
    there = paths_by_name(frame["image_id"], found, home, options)
    listed = f"{TRAIN}/" + frame["image_id"] + ".dcm"
    rows = frame.hstack(columns).with_columns(source_relpath=there.fill_null(listed))
    rows = located(rows, boxes.path, pl.col("row")).drop("row")
    rows, missing = keep_existing(rows, found, home, options, studies=False)
    headers, unread = header_columns(rows["source_relpath"], home, HEADER_FIELDS)
    rows = rows.hstack(headers).with_columns(pl.col("sex", "age_raw").replace("", None))
    rows, hashes, notes = _ancestry(rows, root)
    unlabelled = sum(f"/{TEST}/" in f"/{path}" for path in found.files)
    notes += [f"{unlabelled} images in {TEST} have no labels: left out"] if unlabelled else []
    return SourceRows(
        rows.drop("class").with_columns(
            age_years=ages(pl.col("age_raw")),
            split_official=pl.lit(""),
            release=pl.lit("stage-2"),
            licence_tag=pl.lit("kaggle-rules"),
            label_source=pl.lit("rsna-pneumonia-2018"),
            label_trust=pl.lit("physician"),
        ),
        LABELS.findings,
        home,
        official=False,
        tables={BOXES: boxes.sha256, CLASSES: classes.sha256, **hashes},
        notes=(*notes, *missing, *unread),
        conflicts=conflicts,
    )


def _images(boxes: Table, classes: Table) -> pl.DataFrame:
    """One row per image: its id, its class, its first `row` in the table of boxes, and what the tables say as JSON.

    Raises:
        ManifestError: the tables contradict themselves or each other; names table and row.
    """
    for table in (boxes, classes):
        check_filled(table.frame["patientId"], table.path)
        bad = ~table.frame["patientId"].str.contains(r"^[0-9A-Za-z.-]+$")
        if bad.any():
            raise PathError(f"{table.path}, row {row_of(bad)}: 'patientId' is not the name of a file.")
    check_values(boxes.frame["Target"], ("0", "1"), boxes.path, UnknownLabelError)
    check_values(classes.frame["class"], LABELS.labels, classes.path, UnknownLabelError)
    _check_boxes(boxes)
    for table, column in ((boxes, "Target"), (classes, "class")):
        bad = table.frame.select(pl.col(column).n_unique().over("patientId") > 1).to_series()
        if bad.any():
            raise ManifestError(f"{table.path}, row {row_of(bad)}: the rows of one image differ in {column!r}.")
    one = classes.frame.unique("patientId", keep="first", maintain_order=True)
    joined = boxes.frame.with_columns(ROW).join(one, on="patientId", how="left", maintain_order="left")
    bad = joined["class"].is_null() | ((joined["class"] == OPACITY) != (joined["Target"] == "1"))
    if bad.any():
        raise ManifestError(
            f"{boxes.path}, row {row_of(bad)}: 'Target' does not agree with the class in {CLASSES} "
            f"({bad.sum()} such rows). The two files are of one release, or they are not these."
        )
    alone = (~one["patientId"].is_in(boxes.frame["patientId"].implode())).sum()
    if alone:
        raise ManifestError(f"{classes.path}: {alone} images are not in {BOXES}.")
    box = pl.concat_list([pl.col(name) for name in EDGES])
    grouped = joined.group_by("patientId", maintain_order=True).agg(
        pl.col("row", "class", "Target").first(), box.filter(pl.col("Target") == "1").alias("boxes")
    )
    said = grouped.select("Target", "class", "boxes").iter_rows(named=True)
    raw = pl.Series("raw_labels", [json.dumps(one) for one in said], dtype=pl.String)
    return grouped.select(pl.col("patientId").alias("image_id"), "class", "row", raw)


def _check_boxes(boxes: Table) -> None:
    target = boxes.frame["Target"] == "1"
    edges = boxes.frame.select(pl.col(EDGES).cast(pl.Float64, strict=False))
    x, y, width, height = (edges[name] for name in EDGES)
    good = ((x >= 0) & (y >= 0) & (width > 0) & (height > 0)).fill_null(False) & edges.sum_horizontal().is_finite()
    empty = boxes.frame.select(pl.all_horizontal(pl.col(EDGES).is_in(["", "NaN", "nan"]))).to_series()
    bad = (target & ~good) | (~target & ~empty)
    if bad.any():
        raise ManifestError(
            f"{boxes.path}, row {row_of(bad)}: Target 1 with a box that is none, or Target 0 with a box "
            f"({bad.sum()} such rows)."
        )


def _ancestry(frame: pl.DataFrame, root: Path) -> tuple[pl.DataFrame, dict[str, str], list[str]]:
    """Who the patients are, and which NIH image each is, by the challenge's map where it is there."""
    path = next(iter(sorted(root.glob(MAP))), None)
    own = frame.with_columns(patient_id=pl.col("image_id"), study_id=pl.lit("0"))
    if path is None:
        return own, {}, [
            f"no map to NIH ({MAP}): these are NIH images of patients that are not known, 73 % of them in NIH's train "
            "list. Get the map, or compare the pictures (`hilum audit --pixels`) before both are used"
        ]  # fmt: skip
    names = _map(path)
    known = pl.col("image_id").replace_strict(names, default=None, return_dtype=pl.String).alias("nih")
    frame = frame.with_columns(known)
    unknown = int(frame["nih"].is_null().sum())
    patient = pl.col("nih").str.slice(0, 8)
    frame = frame.with_columns(
        patient_id=pl.coalesce(patient, "image_id"),
        study_id=pl.coalesce(pl.col("nih").str.slice(9, 3), pl.lit("0")),
        study_seq=pl.col("nih").str.slice(9, 3).cast(pl.Int32),
        origin_image=pl.lit("nih/") + pl.col("nih"),
        origin_patient=pl.lit("nih/") + patient,
    ).drop("nih")
    notes = [f"{unknown} images are not in {path.name}: each counts as a patient of its own"] if unknown else []
    return frame, {path.name: sha256_file(path)}, notes


def _map(path: Path) -> Mapping[str, str]:
    """Id of an image -> NIH file name."""
    size = path.stat().st_size
    if size > LARGEST_MAP:
        raise ManifestError(f"{path}: {size} bytes; the map has some 10 million.")
    entries: Any = read_json(path, ManifestError)
    wanted = f"{path}: expected a list of objects with 'subset_img_id' and 'img_id' (00000001_000.png)"
    if not isinstance(entries, list):
        raise ManifestError(f"{wanted}, found {type(entries).__name__}.")
    frame = pl.DataFrame(
        [
            (str(entry.get("subset_img_id")), str(entry.get("img_id"))) if isinstance(entry, dict) else ("", "")
            for entry in entries
        ],
        schema={"image": pl.String, "nih": pl.String},
        orient="row",
    )
    bad = ~frame["nih"].str.contains(r"^\d{8}_\d{3}\.png$") | (frame["image"] == "")
    if bad.any():
        raise ManifestError(f"{wanted}; entry {int(bad.arg_max() or 0) + 1} is not ({bad.sum()} such entries).")
    for column in ("image", "nih"):
        twice = frame[column].is_duplicated().sum()
        if twice:
            raise ManifestError(
                f"{path}: {twice} entries repeat {'an image' if column == 'image' else 'an NIH image'}."
            )
    return dict(frame.iter_rows())
