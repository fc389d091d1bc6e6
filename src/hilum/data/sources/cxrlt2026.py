"""CXR-LT 2026: labels in PadChest's words on images of PadChest and NIH.

ROOT holds `CXRLT_2026_training.csv` (or `train.csv`) and, where they are there, `CXRLT_2026_TEST_ALL_TASK1.csv`, its
twin for task 2 (or `development.csv`, `test.csv`) and `Removal.csv`. An image is `ImageID` or `filename`; its labels
are one column of 0 and 1 each, or a Python list written as text in `label`. Images lie anywhere under ROOT (or
`--images`) by name, which no other image has.
The column PatientID is a number that a spreadsheet rounded: it merges patients, and is not read. Each PadChest image
counts as a patient of its own; NIH's file names say whose image it is. Evaluation images have no labels here, whatever
their tables hold, and nothing is joined with PadChest's own table: it has the answers, and the rules forbid it.
Source: arXiv:2602.22092, arXiv:2604.15555.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Int8

from hilum.core.errors import LeakageError, PathError
from hilum.core.types import NEGATIVE, POSITIVE, UNKNOWN
from hilum.data.label_cells import cell_values, finding_columns, label_lists, raw_cells, token_values
from hilum.data.label_maps import LabelPolicy, load_map
from hilum.data.labels import ordered
from hilum.data.rows import (
    SourceOptions,
    SourceRows,
    existing_folder,
    keep_existing,
    located,
    paths_by_name,
    relative_paths,
    scan,
    unknown_label,
)
from hilum.data.schema import label_column
from hilum.data.tables import Table, check_filled, read_csv, require, unique

TRAIN = ("CXRLT_2026_training.csv", "train.csv")
EVALUATION = {
    "CXRLT_2026_development.csv": "val", "development.csv": "val", "CXRLT_2026_TEST_ALL_TASK1.csv": "test",
    "CXRLT_2026_TEST_ALL_TASK2.csv": "test", "test.csv": "test",
}  # fmt: skip
REMOVED = "Removal.csv"
IMAGES, LISTS = ("ImageID", "filename"), ("label", "labels")
NOT_LABELS = (*IMAGES, "StudyDate_DICOM", "PatientID", "Unnamed: 0")
CELLS = {"0": NEGATIVE, "1": POSITIVE, "0.0": NEGATIVE, "1.0": POSITIVE}
NIH_NAME = r"^(\d{8})_(\d{3})\.png$"
CLASSES = load_map("cxrlt2026")
UNSEEN = ("Scoliosis", "Osteopenia", "Bulla", "Infarction", "Adenopathy", "goiter")
"""Classes of task 2: nobody was asked about them on training images."""


def read(options: SourceOptions) -> SourceRows:
    """Read the tables that are there and find every listed image.

    Raises:
        ManifestError: a subclass for each kind of fault; see `tables` and `rows`.
    """
    root = existing_folder(options.root, f"cxrlt2026=ROOT holds {TRAIN[0]}")
    home = existing_folder(options.images, "--images cxrlt2026=FOLDER") if options.images else root
    path = options.table or next((root / name for name in TRAIN if (root / name).is_file()), None)
    splits = {path: "train"} if path else {}
    splits |= {root / name: split for name, split in EVALUATION.items() if (root / name).is_file()}
    if not splits:
        raise PathError(f"{root} holds no table of CXR-LT 2026. Expected {TRAIN[0]}.")
    tables = [read_csv(path) for path in splits]
    frame = pl.concat([_rows(table, split) for table, split in zip(tables, splits.values(), strict=True)])
    frame = _each_once(frame, root)
    labels, conflicts = _labels(tables[0], options.policy) if path else (pl.DataFrame({"image_id": []}), {})
    frame = frame.join(labels.cast({"image_id": pl.String}), on="image_id", how="left", maintain_order="left")
    findings = ordered(name.removeprefix("label.") for name in labels.columns if name.startswith("label."))
    frame = frame.with_columns(pl.col(label_column(name)).fill_null(UNKNOWN) for name in findings)
    frame, removed = _without_removed(frame, root)
    found = scan(home)
    there = paths_by_name(frame["image_id"].str.replace(r"\.[^.]*$", ""), found, home, options)
    frame = frame.with_columns(source_relpath=there.fill_null(frame["image_id"]))
    frame, missing = keep_existing(frame, found, home, options, studies=False)
    alone = (
        "each PadChest image counts as a patient of its own, since PatientID merges patients: images of one person may "
        "be on both sides of a split"
    )
    return SourceRows(
        frame.with_columns(
            release=pl.lit("2026"), licence_tag=pl.lit("padchest-form"),
            label_source=pl.when(split_official="train").then(pl.lit("cxr-lt-2026")),
            label_trust=pl.when(split_official="train").then(pl.lit("text_mined")),
        ),
        findings,
        home,
        official=bool((frame["split_official"] != "train").any()),
        tables={table.path.name: table.sha256 for table in tables},
        notes=(alone, *removed, *missing),
        conflicts=conflicts,
    )  # fmt: skip


def _rows(table: Table, split: str) -> pl.DataFrame:
    names = _names(table)
    base = names.str.extract(r"([^/]*)$", 1).alias("image_id")
    nih = base.str.contains(NIH_NAME)
    own = base.str.replace(r"\.[^.]*$", "")
    kept = ("StudyDate_DICOM",) if "StudyDate_DICOM" in table.columns else ()
    frame = table.frame.select(
        image_id=base,
        patient_id=pl.when(nih).then(base.str.slice(0, 8)).otherwise(own),
        study_id=pl.when(nih).then(base.str.slice(9, 3)).otherwise(pl.lit("0")),
        view_raw=pl.lit(""),
        split_official=pl.lit(split),
        study_date_raw=pl.col(kept[0]) if kept else pl.lit(None, dtype=pl.String),
        origin_image=pl.when(nih).then(pl.lit("nih/")).otherwise(pl.lit("padchest/")) + base,
        origin_patient=pl.when(nih).then(pl.lit("nih/") + base.str.slice(0, 8)),
    )
    return located(frame, table.path)


def _names(table: Table) -> pl.Series:
    column = next((name for name in IMAGES if name in table.columns), IMAGES[0])
    require(table.columns, (column,), table.path)
    check_filled(table.frame[column], table.path)
    unique(table.frame[column], table.path)
    return relative_paths(table.frame[column], table.path)


def _each_once(frame: pl.DataFrame, root: Path) -> pl.DataFrame:
    """The two tasks test on some images in common; an image of two splits is a leak."""
    splits = frame.group_by("image_id").agg(pl.col("split_official").n_unique())
    both = int((splits["split_official"] > 1).sum())
    if both:
        raise LeakageError(f"{root}: {both} images are listed in tables of two splits. Keep each image in one.")
    return frame.unique("image_id", keep="first", maintain_order=True)


def _labels(table: Table, policy: LabelPolicy) -> tuple[pl.DataFrame, Mapping[str, int]]:
    """Label columns, and the cells as they are, of the training images by name."""
    policy = replace(policy, blank="mask")  # what nobody was asked about is no blank cell
    names = _names(table).str.extract(r"([^/]*)$", 1).alias("image_id")
    column = next((name for name in LISTS if name in table.columns), None)
    if column is None:
        values, raw = _one_column_each(table)
        columns, conflicts = finding_columns(values, CLASSES, policy)
        return names.to_frame().hstack([raw, *columns]), conflicts
    lists = label_lists(table.frame[column], table.path)
    said = set(lists.explode().drop_nulls())
    padchest = load_map("padchest")
    words = padchest if said - set(CLASSES.labels) and said <= set(padchest.labels) else CLASSES
    values = token_values(lists, words, table.path)
    asked = [label in said or (words is CLASSES and label not in UNSEEN) for label in words.labels]
    values[:, ~np.array(asked)] = UNKNOWN
    columns, conflicts = finding_columns(values, words, policy, lists.is_not_null().to_numpy())
    return names.to_frame().hstack([raw_cells(table.frame, [column]), *columns]), conflicts


def _one_column_each(table: Table) -> tuple[Int8[np.ndarray, "N L"], pl.Series]:
    labels = [name for name in table.columns if name in CLASSES.labels]
    for name in table.columns:
        if name not in (*labels, *NOT_LABELS) and table.frame[name].is_in(list(CELLS)).all():
            raise unknown_label(name, CLASSES.labels, f"{table.path}, header")
    require(table.columns, [label for label in CLASSES.labels if label not in UNSEEN], table.path)
    values = np.full((table.frame.height, len(CLASSES.labels)), UNKNOWN, np.int8)
    places = [CLASSES.labels.index(label) for label in labels]
    values[:, places] = cell_values(table.frame, labels, table.path, CELLS)
    return values, raw_cells(table.frame, labels)


def _without_removed(frame: pl.DataFrame, root: Path) -> tuple[pl.DataFrame, list[str]]:
    """Leave out the images that the organisers took back."""
    if not (root / REMOVED).is_file():
        return frame, []
    table = read_csv(root / REMOVED, IMAGES[:1])
    removed = frame["image_id"].is_in(table.frame[IMAGES[0]].implode())
    return frame.filter(~removed), [f"{removed.sum()} images that the organisers removed ({REMOVED}) are left out"]
