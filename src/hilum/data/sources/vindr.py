"""VinDr-CXR 1.0.0, and the part of it that the VinBigData challenge gave out.

VinDr-CXR: ROOT/annotations/image_labels_train.csv (three readers, a row each) and image_labels_test.csv (the consensus
of five, without `rad_id`, and with "Other disease" in place of "Other diseases"); images in ROOT/train and ROOT/test.
VinBigData: ROOT/train.csv, a row for each box or "No finding" of each reader; 14 of the 28 labels, the others unknown.
Images are `<image_id>.dicom`, or copies of them in another format under the same name.

What most of the readers say is the label; what each said is kept in `raw_labels`. There are no patient ids: every image
counts as a patient of its own. All images are postero-anterior as the release says; no file or table does. Boxes are
counted and left out. Source: Nguyen et al., VinDr-CXR, Scientific Data 9:429, 2022.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Int8

from hilum.core.errors import LeakageError, ManifestError, PathError
from hilum.core.types import NEGATIVE, POSITIVE, UNKNOWN
from hilum.data.label_cells import cell_values, finding_columns
from hilum.data.label_maps import LabelPolicy, load_map
from hilum.data.rows import (
    ROW,
    SourceOptions,
    SourceRows,
    existing_folder,
    keep_existing,
    located,
    paths_by_name,
    scan,
    unknown_label,
)
from hilum.data.tables import Table, check_filled, read_csv, require, row_of

READERS = 3
TABLES = {"train": "image_labels_train.csv", "test": "image_labels_test.csv"}
BOXES = ("annotations_train.csv", "annotations_test.csv")
CHALLENGE_TABLE = "train.csv"
CONSENSUS = "consensus"
CELLS = {"1": POSITIVE, "1.0": POSITIVE, "0": NEGATIVE, "0.0": NEGATIVE}
IDS = ["image_id", "rad_id"]
LABELS = load_map("vindr")
SPELLED = {label.casefold(): label for label in LABELS.labels} | {"other disease": "Other diseases"}
CHALLENGE_LABELS = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation", "ILD", "Infiltration",
    "Lung Opacity", "Nodule/Mass", "Other lesion", "Pleural effusion", "Pleural thickening", "Pneumothorax",
    "Pulmonary fibrosis", "No finding",
)  # fmt: skip


def read(options: SourceOptions) -> SourceRows:
    """Read the tables of either release and check that every listed image is there.

    Raises:
        ManifestError: a subclass for each kind of fault; see `tables` and `rows`.
    """
    root = existing_folder(
        options.root, "vindr=ROOT holds annotations/image_labels_train.csv, or the challenge's table"
    )
    home = existing_folder(options.images, "--images vindr=FOLDER") if options.images else root
    folder = root / "annotations" if (root / "annotations").is_dir() else root
    tables = {split: read_csv(folder / name) for split, name in TABLES.items() if (folder / name).is_file()}
    notes = ["no patient ids: every image counts as a patient of its own, so a split cannot keep people apart"]
    if tables:
        parts = {split: _labels(table, split) for split, table in tables.items()}
        notes += _box_notes(folder)
    elif (root / CHALLENGE_TABLE).is_file():
        tables = {"train": read_csv(root / CHALLENGE_TABLE, ("image_id", "class_name", "rad_id"))}
        parts = {"train": _challenge_labels(tables["train"])}
        notes.append(_boxes_left_out(tables["train"]))
    else:
        raise PathError(
            f"{root} holds none of annotations/{', annotations/'.join(TABLES.values())}, {CHALLENGE_TABLE}."
        )
    challenge = tables["train"].path.name == CHALLENGE_TABLE if "train" in tables else False
    frames, conflicts = [], dict[str, int]()
    for split, (ids, values) in parts.items():
        frame, contradicted = _images(ids, values, tables[split].path, split, options.policy)
        frames.append(frame)
        conflicts |= {name: conflicts.get(name, 0) + count for name, count in contradicted.items()}
    frame = _together(frames)
    found = scan(home)
    there = paths_by_name(frame["image_id"], found, home, options)
    listed = pl.format("{}/{}.dicom", "split_official", "image_id")
    frame = frame.with_columns(source_relpath=pl.coalesce(there, listed))
    frame, missing = keep_existing(frame, found, home, options, studies=False)
    return SourceRows(
        frame.with_columns(
            patient_id=pl.col("image_id"),
            study_id=pl.col("image_id"),
            view_raw=pl.lit("PA"),
            view_source=pl.lit("derived"),
            release=pl.lit("vinbigdata" if challenge else "1.0.0"),
            licence_tag=pl.lit("kaggle-rules" if challenge else "physionet-credentialed"),
            label_source=pl.lit("vinbigdata" if challenge else "vindr-cxr"),
        ),
        LABELS.findings,
        home,
        official="test" in tables,
        tables={table.path.name: table.sha256 for table in tables.values()},
        notes=(*notes, *missing),
        origin="vindr",
        conflicts=conflicts,
    )


def _labels(table: Table, split: str) -> tuple[pl.DataFrame, Int8[np.ndarray, "N L"]]:
    """Image and reader of each row of VinDr-CXR's own tables, and what the reader said."""
    names = {name: SPELLED[name.casefold()] for name in table.columns if name.casefold() in SPELLED}
    if len(set(names.values())) < len(names):
        raise ManifestError(f"{table.path}: a label has two columns (names are matched without regard to case).")
    keys = IDS if split == "train" else ("image_id",)
    require([*table.columns, *names.values()], (*keys, *LABELS.labels), table.path)
    frame = table.frame.rename(names)
    values = cell_values(frame, LABELS.labels, table.path, CELLS)
    if split == "test":
        frame = frame.with_columns(rad_id=pl.lit(CONSENSUS))
    _check_ids(frame, table.path)
    return frame.select(*IDS, ROW), values


def _challenge_labels(table: Table) -> tuple[pl.DataFrame, Int8[np.ndarray, "N L"]]:
    """The same of the challenge's table, where a reader has a row for each box: those not asked for are unknown."""
    names = table.frame["class_name"]
    known = {label.casefold(): label for label in CHALLENGE_LABELS}
    bad = ~names.str.to_lowercase().is_in(list(known))
    if bad.any():
        raise unknown_label(names.filter(bad)[0], CHALLENGE_LABELS, f"{table.path}, row {row_of(bad)}, 'class_name'")
    _check_ids(table.frame, table.path)
    said = table.frame.select(*IDS, ROW)
    ids = said.unique(IDS, keep="first", maintain_order=True)
    places = ids.select(IDS).with_row_index("place")
    rows = said.join(places, on=IDS, how="left", maintain_order="left")["place"]
    columns = names.str.to_lowercase().replace_strict(
        {name: LABELS.labels.index(label) for name, label in known.items()}, return_dtype=pl.Int64
    )
    asked = np.array([label in CHALLENGE_LABELS for label in LABELS.labels])
    values = np.where(asked, NEGATIVE, UNKNOWN).astype(np.int8)[None].repeat(ids.height, axis=0)
    values[rows.to_numpy(), columns.to_numpy()] = POSITIVE
    return ids, values


def _images(
    ids: pl.DataFrame, values: Int8[np.ndarray, "N L"], path: Path, split: str, policy: LabelPolicy
) -> tuple[pl.DataFrame, Mapping[str, int]]:
    """One row per image: the label of most readers, and what each said."""
    _check_readers(ids, path, READERS if split == "train" else 1)
    images = ids["image_id"].unique(maintain_order=True)
    place = ids["image_id"].replace_strict(images, pl.int_range(len(images), eager=True)).to_numpy()
    votes, readers = np.zeros((len(images), values.shape[1]), np.int64), np.bincount(place)[:, None]
    np.add.at(votes, place, values == POSITIVE)
    asked = (values != UNKNOWN).any(axis=0)
    most = np.where(asked, 2 * votes > readers, UNKNOWN).astype(np.int8)
    # The labels that were not asked for are no blank cells, which the policy is about.
    labels, conflicts = finding_columns(most, LABELS, replace(policy, blank="mask"))
    frame = pl.DataFrame({"image_id": images, "raw_labels": _said(ids["rad_id"], values, place, len(images))}).hstack(
        labels
    )
    first = ids.unique("image_id", keep="first", maintain_order=True)["row"]
    trust = "physician" if split == "train" else CONSENSUS
    frame = frame.with_columns(split_official=pl.lit(split), label_trust=pl.lit(trust))
    return located(frame, path, pl.lit(first)), conflicts


def _check_ids(frame: pl.DataFrame, path: Path) -> None:
    for name in IDS:
        check_filled(frame[name], path)
    bad = ~frame["image_id"].str.contains(r"^[0-9A-Za-z_-]+$")
    if bad.any():
        raise PathError(f"{path}, row {row_of(bad)}: 'image_id' is not letters and digits ({bad.sum()} such rows).")


def _check_readers(ids: pl.DataFrame, path: Path, readers: int) -> None:
    twice = ids.filter(ids.select(IDS).is_duplicated())
    if twice.height:
        raise ManifestError(
            f"{path}, row {twice['row'][0]}: an image has two rows of one reader ({twice.height} such rows)."
        )
    wrong = ids.with_columns(found=pl.len().over("image_id")).filter(pl.col("found") != readers)
    if wrong.height:
        raise ManifestError(
            f"{path}, row {wrong['row'][0]}: the image has {wrong['found'][0]} readers, expected {readers} "
            f"({wrong['image_id'].n_unique()} such images). The table is not whole."
        )


def _said(readers: pl.Series, values: Int8[np.ndarray, "N L"], place: np.ndarray, images: int) -> list[str]:
    """JSON of reader -> labels, for each image."""
    said: list[dict[str, list[str]]] = [{} for _ in range(images)]
    for reader, row, image in zip(readers, values, place, strict=True):
        said[image][reader] = [LABELS.labels[number] for number in np.flatnonzero(row == POSITIVE)]
    return [json.dumps(one) for one in said]


def _together(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    frame = pl.concat(frames)
    both = frame["image_id"].is_duplicated()
    if both.any():
        raise LeakageError(
            f"{frame['image_id'].filter(both).n_unique()} images are in both {' and '.join(TABLES.values())}."
        )
    return frame


def _box_notes(folder: Path) -> list[str]:
    return [
        _boxes_left_out(read_csv(folder / name, ("image_id", "x_min"))) for name in BOXES if (folder / name).is_file()
    ]


def _boxes_left_out(table: Table) -> str:
    boxes = int((table.frame["x_min"] != "").sum()) if "x_min" in table.columns else 0
    return f"{table.path.name}: {boxes:,} boxes left out"
