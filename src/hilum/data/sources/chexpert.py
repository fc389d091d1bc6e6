"""CheXpert v1.0, full and small, and CheXpert Plus.

v1.0: `train.csv`, `valid.csv` and, where they are there, the radiologists' labels of the test images
(`test_labels.csv`, `groundtruth.csv` or `test.csv`), in ROOT or in a folder of it called CheXpert... `--table` reads
another table of the training images (`train_cheXbert.csv`, `train_visualCheXbert.csv`).
Plus: `df_chexpert_plus_240401.csv` and the labels as lines of JSON; of those the impressions', which is what v1.0 was
labelled from, else the whole reports', else the findings'; another with `--table chexpert=.../report_fixed.json`.
An image is known by the end of its path, `patient00001/study1/view1_frontal`: the batches of the full release unpack
without `train/`, and Plus lists .jpg where it holds .png (or DICOM). Its id, `train/patient00001/study1/view1_frontal`,
is the same in all three, so that one picture is never taken for two. Labels are of studies: laterals carry those of
their frontals. (Over 300 lines: three layouts of one dataset, whose ids and labels must agree, are kept in one place.)
Source: Irvin et al., arXiv:1901.07031; Chambon et al., arXiv:2405.19538.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Int8

from hilum.core.errors import EmptyStudyError, LeakageError, ManifestError, PathError, UnknownLabelError
from hilum.core.files import sha256_file
from hilum.core.types import UNKNOWN
from hilum.data.label_cells import cell_values, finding_columns, raw_cells
from hilum.data.label_maps import load_map
from hilum.data.rows import (
    Scan,
    SourceOptions,
    SourceRows,
    ages,
    existing_folder,
    flags,
    keep_existing,
    located,
    relative_paths,
    scan,
)
from hilum.data.tables import Table, check_filled, check_values, read_csv, read_text, require, row_of

TABLES = {
    "train": ("train.csv",),
    "val": ("valid.csv",),
    "test": ("test_labels.csv", "groundtruth.csv", "test.csv"),
}
PLUS_TABLE = "df_chexpert_plus_240401.csv"
PLUS_LABELS = ("impression_fixed.json", "report_fixed.json", "findings_fixed.json")
PLUS_FOLDERS = ("", "chexbert_labels", "labels")
FOLDERS = {"train": "train", "valid": "val", "test": "test"}
DESCRIPTION = ("Sex", "Age", "Frontal/Lateral", "AP/PA")
PLUS_DESCRIPTION = {"sex": "Sex", "age": "Age", "frontal_lateral": "Frontal/Lateral", "ap_pa": "AP/PA"}
NO_FINDING = "No Finding"
LABELS = load_map("chexpert")
SEXES = {"Male": "M", "Female": "F", "Unknown": None, "": None}
IMAGE = r"(patient\d+/study\d+/view\d+_[A-Za-z]+)\.[A-Za-z0-9]+$"
STUDY = r"(patient\d+/study\d+)/?$"
SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm")
WRITTEN: dict[Any, str] = {None: "", 1: "1.0", 0: "0.0", -1: "-1.0"}
"""Values in the labels of Plus, as the cells of v1.0 have them."""
OLDEST = "90"
SMALL = "-small/"


def read(options: SourceOptions) -> SourceRows:
    """Read the tables that are there and find every listed image, whatever level its folder was unpacked at.

    Raises:
        ManifestError: a subclass for each kind of fault; see `tables` and `rows`.
    """
    root = existing_folder(options.root, "chexpert=ROOT holds train.csv, or the table of CheXpert Plus")
    home = existing_folder(options.images, "--images chexpert=FOLDER") if options.images else root
    found = scan(home)
    folder = _folder(root)
    plus = folder is None
    parts = [_plus(root, options)] if folder is None else _version_1(folder, options, found, home)
    values, annotated = (np.concatenate([getattr(part, name) for part in parts]) for name in ("values", "annotated"))
    frame = pl.concat([part.frame for part in parts])
    if frame["name"].is_duplicated().any():
        twice = frame["name"].filter(frame["name"].is_duplicated()).n_unique()
        raise LeakageError(f"{root}: {twice} images are listed in two tables. Keep the tables of one release together.")
    columns, conflicts = finding_columns(values, LABELS, options.policy, annotated)
    frame = frame.hstack(columns).with_columns(_paths(frame, found, home, options))
    frame = frame.with_columns(_described()).drop("name", "listed", *DESCRIPTION)
    frame, missing = keep_existing(frame, found, home, options, studies=True)
    of_small = frame["quality"].list.contains("low_resolution").fill_null(False)
    small = int(of_small.sum())
    notes = [note for part in parts for note in part.notes]
    if small:
        notes.append(f"{small} images are of the small release, short side about 320 pixels: flagged low_resolution")
    if not plus and (root / PLUS_TABLE).is_file():
        notes.append(f"{PLUS_TABLE} lists the same pictures: left out")
    release = pl.lit("plus") if plus else pl.when(of_small).then(pl.lit("v1.0-small")).otherwise(pl.lit("v1.0"))
    return SourceRows(
        frame.with_columns(release=release, licence_tag=pl.lit("stanford-rua")),
        LABELS.findings,
        home,
        official=bool(frame["split_official"].is_in(["val", "test"]).any()),
        tables={name: digest for part in parts for name, digest in part.tables.items()},
        notes=(*notes, *missing),
        origin="chexpert",
        conflicts=conflicts,
    )


@dataclass(frozen=True)
class _Part:
    """Rows of one table.

    Args:
        frame: `name` (patient, study and view, by which a file is known), `listed` path, ids, `split_official`, the
            columns of DESCRIPTION as they are written ("" where the table lacks one), labels' origin, `located`.
        values: labels in the order of `LABELS.labels`.
        annotated: rows that the labels say anything about.
        tables: SHA-256 by file name.
        notes: for a person.
    """

    frame: pl.DataFrame
    values: Int8[np.ndarray, "N L"]
    annotated: Bool[np.ndarray, " N"]
    tables: Mapping[str, str]
    notes: tuple[str, ...] = ()


def _folder(root: Path) -> Path | None:
    """The folder with the tables of v1.0; none where only those of Plus are there."""
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir() and path.name.startswith("CheXpert"))]
    holding = [path for path in folders if (path / "train.csv").is_file() or (path / "valid.csv").is_file()]
    if len(holding) > 1 and holding[0] != root:
        names = ", ".join(path.name for path in holding)
        raise ManifestError(
            f"{root} holds the tables of more than one release (in {names}). Give one: chexpert=FOLDER."
        )
    if not holding and not (root / PLUS_TABLE).is_file():
        raise PathError(
            f"{root} holds neither train.csv nor valid.csv (CheXpert v1.0), there or in a folder CheXpert..., nor "
            f"{PLUS_TABLE} (CheXpert Plus)."
        )
    return holding[0] if holding else None


def _version_1(folder: Path, options: SourceOptions, found: Scan, home: Path) -> list[_Part]:
    parts = []
    for split, names in TABLES.items():
        given = options.table if split == "train" else None
        path = given or next((folder / name for name in names if (folder / name).is_file()), None)
        if path is not None:
            table, notes = _by_image(read_csv(path), options, found, home)
            parts.append(replace(_labelled(table, split), notes=notes))
    return parts


def _by_image(table: Table, options: SourceOptions, found: Scan, home: Path) -> tuple[Table, tuple[str, ...]]:
    """A table of studies (column `Study`, as the test labels also come) with a row for each image that is there."""
    if "Path" in table.columns or "Study" not in table.columns:
        return table, ()
    # Here, where the rows are still those of the file, so that messages name the right one.
    cell_values(table.frame, [label for label in LABELS.labels if label in table.columns], table.path)
    study = table.frame["Study"].str.extract(STUDY, 1).alias("study")
    if study.is_null().any():
        raise ManifestError(
            f"{table.path}, row {row_of(study.is_null())}: 'Study' does not end like patient00001/study1 "
            f"({study.is_null().sum()} such rows)."
        )
    images = _pictures(found).with_columns(study=pl.col("name").str.extract(r"^(.*)/", 1))
    images = images.filter(pl.col("study").is_in(study.implode()))
    _refuse_copies(images, home, options)
    gone = ~study.is_in(images["study"].implode())
    if gone.any() and not options.allow_missing:
        raise EmptyStudyError(
            f"{table.path}, row {row_of(gone)}: no image of the study is under {home} ({gone.sum()} of {len(gone)} "
            "studies). Complete them, or leave them out with --allow-missing."
        )
    frame = table.frame.with_columns(study).join(
        images.select("study", Path="file"), on="study", maintain_order="left_right"
    )
    note = f"{gone.sum()} of {len(gone)} studies in {table.path.name} have no image under {home}: left out"
    return Table(table.path, frame.drop("study"), table.sha256), (note,) if gone.any() else ()


def _labelled(table: Table, split: str) -> _Part:
    needed = LABELS.labels if split != "test" else [label for label in LABELS.labels if label != NO_FINDING]
    require(table.columns, ("Path", *needed, *(DESCRIPTION if split != "test" else ())), table.path)
    labels = [label for label in LABELS.labels if label in table.columns]
    values = np.full((table.frame.height, len(LABELS.labels)), UNKNOWN, np.int8)
    values[:, [LABELS.labels.index(label) for label in labels]] = cell_values(table.frame, labels, table.path)
    frame = _named(table.frame, "Path", pl.lit(split), table.path).with_columns(
        raw_cells(table.frame, labels),
        label_source=pl.lit(f"chexpert-{table.path.stem}"),
        label_trust=pl.lit("text_mined" if split == "train" else "physician"),
    )
    return _Part(frame, values, np.ones(len(values), bool), {table.path.name: table.sha256})


def _named(frame: pl.DataFrame, column: str, split: pl.Expr, path: Path) -> pl.DataFrame:
    """Ids from the paths of a table, and its description of the images."""
    check_filled(frame[column], path)
    listed = relative_paths(frame[column], path)
    name = listed.str.extract(IMAGE, 1)
    if name.is_null().any():
        raise ManifestError(
            f"{path}, row {row_of(name.is_null())}: {column!r} does not end like patient00001/study1/view1_frontal.jpg "
            f"({name.is_null().sum()} such rows)."
        )
    twice = name.is_duplicated()
    if twice.any():
        raise ManifestError(f"{path}, row {row_of(twice)}: an image is listed twice ({twice.sum()} such rows).")
    said = listed.str.extract(r"(?:^|/)(train|valid|test)/patient\d+/", 1).replace_strict(FOLDERS, default=None)
    written = [pl.col(part) if part in frame.columns else pl.lit("").alias(part) for part in DESCRIPTION]
    described = frame.select(
        name.alias("name"), listed.alias("listed"), *written, split_official=pl.coalesce(said, split)
    )
    folders = {split: folder for folder, split in FOLDERS.items()}
    return located(
        described.with_columns(
            image_id=pl.col("split_official").replace_strict(folders) + "/" + pl.col("name"),
            patient_id=pl.col("name").str.extract(r"^(patient\d+)/", 1),
            study_id=pl.col("name").str.extract(r"/(study\d+)/", 1),
        ),
        path,
    )


def _described() -> list[pl.Expr]:
    """View, sex, age and flags; a projection that no column states is derived from the file name."""
    projection, side = pl.col("AP/PA"), pl.col("Frontal/Lateral")
    from_name = pl.when((side == "") & pl.col("name").str.to_lowercase().str.ends_with("lateral")).then(
        pl.lit("lateral")
    )
    stated = pl.when(projection != "").then(projection).when(side == "Lateral").then(side)
    age = pl.col("Age").str.strip_suffix(".0")
    return [
        pl.coalesce(stated, from_name, pl.lit("")).alias("view_raw"),
        pl.when(stated.is_not_null()).then(pl.lit("stated"))
        .when(from_name.is_not_null()).then(pl.lit("derived"))
        .otherwise(pl.lit("unknown")).alias("view_source"),
        pl.col("Sex").replace_strict(SEXES, default=pl.col("Sex"), return_dtype=pl.String).alias("sex"),
        pl.when(pl.col("Age") != "").then(pl.col("Age")).alias("age_raw"),
        pl.when(age != "0").then(ages(age)).alias("age_years"),  # 0 stands for unknown
        flags(
            low_resolution=pl.format("{}|{}", "listed", "source_relpath").str.contains(SMALL, literal=True),
            age_capped=age == OLDEST,
        ).alias("quality"),
    ]  # fmt: skip


def _paths(frame: pl.DataFrame, found: Scan, home: Path, options: SourceOptions) -> pl.Series:
    """Where each image is: at its listed path, at that without the first folder, or wherever its name is found."""
    files = pl.Series("file", found.files, dtype=pl.String)
    best = _pictures(found)
    listed = pl.DataFrame({"name": frame["name"], "listed": frame["listed"]})
    spellings = [pl.col("listed"), pl.col("listed").str.replace(r"^[^/]*/", "")]
    exact = listed.with_columns(
        exact=pl.coalesce(pl.when(path.is_in(files.implode())).then(path) for path in spellings)
    )
    searched = exact.filter(pl.col("exact").is_null())["name"]
    _refuse_copies(best.filter(pl.col("name").is_in(searched.implode())), home, options)
    matched = exact.join(best.unique("name"), on="name", how="left", maintain_order="left")
    return matched.select(source_relpath=pl.coalesce("exact", "file", "listed")).to_series()


def _pictures(found: Scan) -> pl.DataFrame:
    """`file` and `name` of the images that are there; of one in several formats only the first of `SUFFIXES`."""
    files = pl.Series("file", found.files, dtype=pl.String)
    ranks = {suffix: rank for rank, suffix in enumerate(SUFFIXES)}
    there = pl.DataFrame({"file": files, "name": files.str.extract(IMAGE, 1)}).with_columns(
        rank=pl.col("file").str.extract(r"(\.[^./]*)$", 1).str.to_lowercase().replace_strict(ranks, default=None)
    )
    return there.drop_nulls().filter(pl.col("rank") == pl.col("rank").min().over("name")).drop("rank")


def _refuse_copies(images: pl.DataFrame, home: Path, options: SourceOptions) -> None:
    twice = images.filter(pl.col("name").is_duplicated())
    if twice.height:
        folders = sorted({path.split("/")[0] for path in twice["file"]})
        raise ManifestError(
            f"{home}: {twice['name'].n_unique()} images are there more than once (in {', '.join(folders[:5])}). "
            f"Keep one copy, or name the folder to use with --images {options.dataset}=FOLDER."
        )


def _plus(root: Path, options: SourceOptions) -> _Part:
    """CheXpert Plus: its table, without the reports, and the labels beside it."""
    used = ("path_to_image", *PLUS_DESCRIPTION, "split", "patient_report_date_order")
    table = read_csv(root / PLUS_TABLE, used, only=used)
    check_values(table.frame["split"], FOLDERS, table.path, ManifestError)
    kept = table.frame.select(used)
    split = pl.col("split").replace_strict(FOLDERS, return_dtype=pl.String)
    frame = _named(kept.rename(PLUS_DESCRIPTION), "path_to_image", split, table.path)
    # An order that is no number orders nothing; nothing else depends on it.
    frame = frame.with_columns(kept["patient_report_date_order"].cast(pl.Int32, strict=False).alias("study_seq"))
    path = options.table or next(
        (root / folder / name for name in PLUS_LABELS for folder in PLUS_FOLDERS if (root / folder / name).is_file()),
        None,
    )
    if path is None:
        note = f"no labels ({', '.join(PLUS_LABELS)}): images without labels"
        values = np.full((frame.height, len(LABELS.labels)), UNKNOWN, np.int8)
        unlabelled = frame.with_columns(
            pl.lit(None, dtype=pl.String).alias(name) for name in ("raw_labels", "label_source", "label_trust")
        )
        return _Part(unlabelled, values, np.zeros(frame.height, bool), {table.path.name: table.sha256}, (note,))
    labels = _json_lines(path)
    frame = frame.join(labels.with_row_index("row"), on="name", how="left", maintain_order="left")
    annotated = frame["row"].is_not_null().to_numpy()
    values = cell_values(labels, LABELS.labels, path)[frame["row"].fill_null(0).to_numpy()]
    frame = frame.with_columns(
        raw_cells(frame.with_columns(pl.col(LABELS.labels).fill_null("")), LABELS.labels),
        label_source=pl.lit(f"chexpert-plus-{path.stem.removesuffix('_fixed')}"),
        label_trust=pl.lit("text_mined"),
    ).drop("row", *LABELS.labels)
    notes = [f"labels of {path.name}"]
    notes += [f"{(~annotated).sum()} images have no labels there: unknown"] if not annotated.all() else []
    tables = {table.path.name: table.sha256, path.name: sha256_file(path)}
    return _Part(frame, values, annotated, tables, tuple(notes))


def _json_lines(path: Path) -> pl.DataFrame:
    """One object a line, `path_to_image` and the 14 labels, as text cells; null is not annotated."""
    columns: dict[str, list[str]] = {"name": [], **{label: [] for label in LABELS.labels}}
    for number, line in enumerate(read_text(path).strip().split("\n"), start=1):
        try:
            record = json.loads(line)
            found = re.search(IMAGE, record["path_to_image"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ManifestError(f"{path}, line {number}: not a JSON object with path_to_image.") from error
        if found is None:
            raise ManifestError(
                f"{path}, line {number}: path_to_image does not end like patient1/study1/view1_frontal.jpg."
            )
        columns["name"].append(found[1])
        for label in LABELS.labels:
            value = record.get(label, "absent")
            if isinstance(value, (bool, str, list, dict)) or value not in WRITTEN:
                raise UnknownLabelError(f"{path}, line {number}: {label!r} is not 1, 0, -1 or null.")
            columns[label].append(WRITTEN[value])
    labels = pl.DataFrame(columns)
    if labels["name"].is_duplicated().any():
        raise ManifestError(
            f"{path}: {labels['name'].is_duplicated().sum()} lines are of an image that has another line."
        )
    return labels
