"""CXR-LT label releases 2023 and 2024 on MIMIC-CXR-JPG images.

The tables lie in ROOT, ROOT/cxr-lt-2024 or ROOT/cxr-lt-2023, in either naming family: the PhysioNet release
(`train_labeled.csv`, `development_labeled_task1.csv`, ...) or the challenge kits (`train.csv`, `development.csv`,
`test_task1.csv`, ...; without labels these give unknown). Images lie under ROOT/files, or elsewhere with
`--images cxrlt=FOLDER`. Columns are found by name: task 2 orders Normal and Nodule unlike task 1. The gold labels of
task 2 contradict task 1 on the same images by design, so they are not mixed in.
Source: PhysioNet cxr-lt-iccv-workshop-cvamd 1.1.0 and 2.0.0.
"""

from pathlib import Path

import polars as pl

from hilum.core.errors import LeakageError, ManifestError, PathError
from hilum.core.types import NEGATIVE, POSITIVE, UNKNOWN
from hilum.data.labels import CXRLT_2023, CXRLT_2024_TASK1, CXRLT_2024_TASK3, canonical, ordered
from hilum.data.rows import (
    SourceOptions,
    SourceRows,
    existing_folder,
    keep_existing,
    label_columns,
    located,
    relative_paths,
    scan,
    unknown_label,
)
from hilum.data.schema import label_column
from hilum.data.tables import Table, check_filled, check_values, read_csv, require, row_of

FOLDERS = ("", "cxr-lt-2024", "cxr-lt-2023")
FILES = {
    "train": ("train_labeled.csv", "train.csv"),
    "val": ("development_labeled_task1.csv", "development.csv", "development_task1.csv"),
    "test": ("test_labeled_task1.csv", "test.csv", "test_task1.csv"),
}
TASK3_FILES = ("development_labeled_task3.csv", "test_labeled_task3.csv")
TASK2_FILES = ("development_labeled_task2.csv", "test_labeled_task2.csv")
WHOLE = "labels.csv"
"""2024's one table of all images: 45 labels and a column `split`."""
# Narrower than core.types.SPLIT_NAMES: a table of one known dataset; another word there means another table.
SPLIT_CELLS = {"train": "train", "development": "val", "dev": "val", "validate": "val", "val": "val", "test": "test"}
IDS = ("dicom_id", "subject_id", "study_id")
VIEW_COLUMNS = {"ViewPosition": "stated", "ViewCodeSequence_CodeMeaning": "derived"}
NOT_LABELS = (*IDS, *VIEW_COLUMNS, "path", "fpath", "split", "Unnamed: 0")
CELLS = {"0": NEGATIVE, "1": POSITIVE, "0.0": NEGATIVE, "1.0": POSITIVE}
KNOWN = (*CXRLT_2024_TASK1, *CXRLT_2024_TASK3, "No Finding")


def read(options: SourceOptions) -> SourceRows:
    """Read the tables of one release and check that every listed image is there.

    Raises:
        ManifestError: a subclass for each kind of fault; see `tables` and `rows`.
    """
    root = existing_folder(options.root, "cxrlt=ROOT holds the CXR-LT tables")
    home = existing_folder(options.images, "--images cxrlt=FOLDER") if options.images else root
    folder = _folder(root)
    read_files = {split: table for split in FILES if (table := _first(folder, split)) is not None}
    notes: list[str] = []
    if read_files:
        frames = [_rows(table, split) for split, table in read_files.items()]
    else:
        read_files = {"all": read_csv(folder / WHOLE, (*IDS, "split"), key="dicom_id")}
        frames = [_rows(read_files["all"], None)]
    release = _release(next(iter(read_files.values())).columns)
    frame = _together(frames, folder)
    frame, task3 = _with_task3(frame, folder)
    labelled = {name.removeprefix("label.") for name in frame.columns if name.startswith("label.")}
    findings = ordered(labelled)
    frame = frame.with_columns(pl.col(label_column(name)).fill_null(UNKNOWN) for name in findings)
    others = [name for name in TASK2_FILES if (folder / name).is_file()]
    notes += [f"{name} holds other annotators' labels of the same images: left out" for name in others]
    notes += [f"{name}: no labels, kept as unknown" for name in _unlabelled(read_files)]
    if not (home / "files").is_dir():  # --images may name the folder `files` itself
        frame = frame.with_columns(pl.col("source_relpath").str.strip_prefix("files/"))
    found = scan(home, ["files"] if (home / "files").is_dir() else [""])
    frame, missing = keep_existing(frame, found, home, options, studies=True)
    return SourceRows(
        frame.with_columns(
            release=pl.lit(release),
            licence_tag=pl.lit("physionet-credentialed"),
            label_source=pl.lit(f"cxr-lt-{release}"),
            label_trust=pl.lit("text_mined"),
        ),
        findings,
        home,
        official=True,
        tables={table.path.name: table.sha256 for table in [*read_files.values(), *task3]},
        notes=(*notes, *missing),
        origin="mimic",
        native=True,
    )


def _folder(root: Path) -> Path:
    names = [name for files in FILES.values() for name in files] + [WHOLE]
    for folder in FOLDERS:
        if any((root / folder / name).is_file() for name in names):
            return root / folder
    raise PathError(
        f"{root} holds no CXR-LT table. Expected one of {', '.join(names)}, there or in {', '.join(FOLDERS[1:])}."
    )


def _first(folder: Path, split: str) -> Table | None:
    path = next((folder / name for name in FILES[split] if (folder / name).is_file()), None)
    return read_csv(path, IDS, key="dicom_id") if path else None


def _release(columns: list[str]) -> str:
    """2023 says "No Finding" and `path`; 2024 says "Normal" and `fpath`."""
    names = {canonical(name) for name in columns}
    return "2023" if "No Finding" in names or ("path" in names and "Normal" not in names) else "2024"


def _labels_of(table: Table) -> dict[str, str]:
    """Column -> finding. A column of zeros and ones that is no finding is a misspelt one."""
    columns = {name: canonical(name) for name in table.columns if canonical(name) in KNOWN}
    for name in table.columns:
        if name not in (*columns, *NOT_LABELS) and table.frame[name].is_in(list(CELLS)).all():
            raise unknown_label(name, KNOWN, f"{table.path}, header")
    if len(set(columns.values())) < len(columns):
        raise ManifestError(f"{table.path}: a finding has two columns (names are matched without regard to case).")
    return columns


def _rows(table: Table, split: str | None) -> pl.DataFrame:
    """Ids, path, view, split and labels of one table; labels that it does not have are left to the caller."""
    frame, path = table.frame, table.path
    location = next((name for name in ("fpath", "path") if name in table.columns), None)
    if location is None:
        require(table.columns, ("fpath",), path)
    for name in IDS:
        check_filled(frame[name], path)
    for name in IDS[1:]:  # as "10000001.0" it would be another person than MIMIC's
        bad = ~frame[name].str.contains(r"^s?\d+$")
        if bad.any():
            raise ManifestError(f"{path}, row {row_of(bad)}: {name!r} is not a number ({bad.sum()} such rows).")
    columns = _labels_of(table)
    if columns:
        complete = CXRLT_2023 if _release(table.columns) == "2023" else CXRLT_2024_TASK1
        require(list(columns.values()), complete, path)
    if split is None:
        names = frame["split"].str.to_lowercase().alias("split")
        check_values(names, SPLIT_CELLS, path, ManifestError)
        official = names.replace_strict(SPLIT_CELLS, return_dtype=pl.String)
    else:
        official = pl.repeat(split, frame.height, eager=True)
    views = {origin: pl.col(name) for name, origin in VIEW_COLUMNS.items() if name in table.columns}
    filled = [pl.when(view != "").then(view) for view in views.values()]
    origins = [pl.when(view != "").then(pl.lit(origin)) for origin, view in views.items()]
    kept = frame.select(
        image_id=pl.col("dicom_id"),
        patient_id=pl.col("subject_id"),
        study_id=pl.lit("s") + pl.col("study_id").str.strip_prefix("s"),
        source_relpath=relative_paths(frame[location or ""], path),
        view_raw=pl.coalesce(*filled, pl.lit("")),
        view_source=pl.coalesce(*origins, pl.lit("unknown")),
        split_official=official,
    )
    return located(kept.hstack(label_columns(frame.select(list(columns)), columns, CELLS, path)), path)


def _together(frames: list[pl.DataFrame], folder: Path) -> pl.DataFrame:
    frame = pl.concat(frames, how="diagonal")
    repeated = frame["image_id"].is_duplicated()
    if repeated.any():
        raise LeakageError(
            f"{folder}: {frame['image_id'].filter(repeated).n_unique()} images are listed in two of the files for "
            "train, development and test. Each image belongs to one; keep the files of one release apart."
        )
    return frame


def _with_task3(frame: pl.DataFrame, folder: Path) -> tuple[pl.DataFrame, list[Table]]:
    """Add the zero-shot findings of task 3, by dicom_id, to images that task 1 lists."""
    present = [folder / name for name in TASK3_FILES if (folder / name).is_file()]
    tables = [read_csv(path, ("dicom_id",), key="dicom_id") for path in present]
    parts = []
    for table in tables:
        columns = {name: finding for name, finding in _labels_of(table).items() if finding in CXRLT_2024_TASK3}
        require(list(columns.values()), CXRLT_2024_TASK3, table.path)
        labels = label_columns(table.frame.select(list(columns)), columns, CELLS, table.path)
        parts.append(table.frame.select(image_id="dicom_id").hstack(labels))
    if not parts or label_column(CXRLT_2024_TASK3[0]) in frame.columns:
        return frame, []
    labels = pl.concat(parts)
    if labels["image_id"].is_duplicated().any():
        raise LeakageError(f"{folder}: an image is listed in both {' and '.join(TASK3_FILES)}.")
    return frame.join(labels, on="image_id", how="left", maintain_order="left"), tables


def _unlabelled(tables: dict[str, Table]) -> list[str]:
    return [table.path.name for table in tables.values() if not any(canonical(name) in KNOWN for name in table.columns)]
