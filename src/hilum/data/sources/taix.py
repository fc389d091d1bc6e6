"""TAIX-Ray: chest X-rays taken at the bedside in intensive care, graded by radiologists in a template.

Layout of the dataset card's own script: ROOT/data/<UID>.png (16 bits), ROOT/metadata/annotation.csv (the authors' code
calls it annotations.csv) and ROOT/metadata/split.csv, five folds of which the first is used, as in the hub's own
train, val and test; or all in one folder, the split in columns `Fold` and `Split`. The hub's Parquet files, which hold
the pictures themselves, are not read.

Grades: 0 none, 1 questionable (the heart: borderline), from 2 present. 1 is the source's own uncertain, so that
`--uncertain one` gives the authors' yes and no. `Age` is in days and exact; `StudyDate` was moved by up to 100 days for
each image alone, so the order of a patient's images is that of `Age`. One image is one study. No table names the view;
all images are antero-posterior. Source: Truhn et al., Scientific Data 13:632, 2026, and the card TLAIM/TAIX-Ray.
"""

import json
from dataclasses import replace
from pathlib import Path

import polars as pl

from hilum.core.errors import LeakageError, ManifestError, PathError
from hilum.core.types import NEGATIVE, POSITIVE, UNCERTAIN, UNKNOWN
from hilum.data.label_cells import cell_values, finding_columns
from hilum.data.label_maps import load_map
from hilum.data.rows import (
    SourceOptions,
    SourceRows,
    existing_folder,
    keep_existing,
    located,
    paths_by_name,
    scan,
)
from hilum.data.tables import Table, check_filled, check_values, read_csv, row_of

FOLDERS = ("metadata", "", "images")
TABLES = ("annotation.csv", "annotations.csv")
SPLIT_TABLE = "split.csv"
FOLD = "0"
SPLITS = ("train", "val", "test")
LABELS = load_map("taix")
REQUIRED = ("UID", "PatientID", "StudyDate", "Age", "Sex", *LABELS.labels)
# -1 and -2: what the authors' code writes for "not assessable" and "not in the report".
GRADES = {"": UNKNOWN, "-1": UNKNOWN, "-2": UNKNOWN, "0": NEGATIVE, "1": UNCERTAIN, "2": POSITIVE, "3": POSITIVE}
WORST = {"4": POSITIVE}
DAYS_IN_YEAR = 365.25


def read(options: SourceOptions) -> SourceRows:
    """Read the annotations and the split, and check that every listed image is there.

    Raises:
        ManifestError: a subclass for each kind of fault; see `tables` and `rows`.
    """
    root = existing_folder(options.root, "taix=ROOT holds metadata/annotation.csv and data/")
    home = existing_folder(options.images, "--images taix=FOLDER") if options.images else root
    table = read_csv(options.table or _table(root), REQUIRED, key="UID")
    frame, path = table.frame, table.path
    for name in ("UID", "PatientID"):
        check_filled(frame[name], path)
    bad = ~frame["UID"].str.contains(r"^[0-9A-Za-z_-]+$")
    if bad.any():
        raise PathError(f"{path}, row {row_of(bad)}: 'UID' is not letters and digits ({bad.sum()} such rows).")
    whole = frame.with_columns(pl.col(LABELS.labels).str.strip_suffix(".0"))
    heart = cell_values(whole, ["HeartSize"], path, GRADES)  # has no fifth grade
    values = cell_values(whole.with_columns(HeartSize=pl.lit("")), LABELS.labels, path, GRADES | WORST)
    values[:, LABELS.labels.index("HeartSize")] = heart[:, 0]
    labels, conflicts = finding_columns(values, LABELS, replace(options.policy, blank="mask"))
    split, splits = _split(table)
    days = pl.col("Age").str.extract(r"^(\d{1,5})(?:\.0)?$", 1).cast(pl.Int32)
    years = days.cast(pl.Float32) / DAYS_IN_YEAR
    found = scan(home)
    there = paths_by_name(frame["UID"], found, home, options)
    rows = frame.select(
        image_id=pl.col("UID"),
        patient_id=pl.col("PatientID"),
        study_id=pl.col("UID"),
        study_date_raw=pl.col("StudyDate"),
        study_seq=days,
        source_relpath=there.fill_null("data/" + frame["UID"] + ".png"),
        view_raw=pl.lit("AP"),
        view_source=pl.lit("derived"),
        split_official=split,
        sex=pl.col("Sex").str.to_uppercase().replace("", None),
        age_raw=pl.col("Age"),
        age_years=pl.when(years <= 120).then(years),
        raw_labels=pl.struct(LABELS.labels).map_elements(json.dumps, return_dtype=pl.String),
        licence_tag=pl.lit("cc-by-nc-4.0"),
        label_source=pl.lit("taix-ray"),
        label_trust=pl.lit("physician"),
    ).hstack(labels)
    rows, missing = keep_existing(located(rows, path), found, home, options, studies=False)
    return SourceRows(
        rows,
        LABELS.findings,
        home,
        official=bool((rows["split_official"] != "").any()),
        tables={path.name: table.sha256, **splits},
        notes=tuple(missing),
        origin="taix",
        conflicts=conflicts,
    )


def _table(root: Path) -> Path:
    for folder in FOLDERS:
        for name in TABLES:
            if (root / folder / name).is_file():
                return root / folder / name
    if next(root.rglob("*.parquet"), None):
        raise PathError(
            f"{root} holds Parquet files and no {' or '.join(TABLES)}. Write the pictures out with the script of the "
            "dataset's card (data/<UID>.png and metadata/annotation.csv)."
        )
    raise PathError(f"{root} holds no metadata/{' or metadata/'.join(TABLES)}.")


def _split(table: Table) -> tuple[pl.Series, dict[str, str]]:
    """The split of each image in the first fold, "" where none is given; and the hash of its table."""
    ids, source, hashes = table.frame["UID"], table, {}
    path = table.path.parent / SPLIT_TABLE
    if path.is_file():
        source = read_csv(path, ("UID", "Fold", "Split"))
        hashes[path.name] = source.sha256
    elif "Split" not in table.columns:
        return pl.Series("split_official", [""] * len(ids)), {}
    frame = source.frame.with_columns(Split=pl.col("Split").str.to_lowercase())
    check_values(frame["Split"], SPLITS, source.path, ManifestError)
    if "Fold" in frame.columns:
        frame = frame.filter(pl.col("Fold").str.strip_suffix(".0") == FOLD)
    twice = frame["UID"].is_duplicated()
    if twice.any():
        raise LeakageError(
            f"{source.path}: {frame['UID'].filter(twice).n_unique()} images are there twice in one fold."
        )
    named = frame.select("UID", "Split")
    split = ids.to_frame().join(named, on="UID", how="left", maintain_order="left")["Split"].fill_null("")
    return split.alias("split_official"), hashes
