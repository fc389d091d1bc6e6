"""NIH ChestX-ray14: `Data_Entry_2017.csv` (12 columns, the last unnamed) or `Data_Entry_2017_v2020.csv` (11).

Layouts: ROOT/images/*.png, or Kaggle's ROOT/images_0NN/images/*.png. One image per study: the number after the
patient's in the file name is the follow-up. (The column `Follow-up #` differs from it in the 2020 table.) Boxes
(`BBox_List_2017.csv`) are checked and counted; `data/regions.py` reads them. Other readers' labels of the same images
(Majkowska 2020) are left out: they know four findings, on a few thousand images of the official test list and others.
Source: Wang et al., ChestX-ray8, CVPR 2017.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from hilum.core.errors import LeakageError, ManifestError, PathError, UnknownLabelError
from hilum.core.files import sha256_file
from hilum.data.label_cells import finding_columns, token_values
from hilum.data.label_maps import LabelPolicy, load_map
from hilum.data.rows import (
    SourceOptions,
    SourceRows,
    ages,
    existing_folder,
    keep_existing,
    located,
    scan,
)
from hilum.data.tables import Table, check_values, read_csv, read_list, row_of

TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
REQUIRED = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position")
LISTS = {"train_val_list.txt": "train", "test_list.txt": "test"}
NO_FINDING = "No Finding"
LABELS = load_map("nih")
BOXES = "BBox_List_2017.csv"
BOX_COLUMNS = ("Bbox [x", "y", "w", "h]")
"""The header says `Bbox [x,y,w,h]`: four columns."""
BOXED = {
    "Atelectasis": "Atelectasis", "Cardiomegaly": "Cardiomegaly", "Effusion": "Effusion", "Infiltrate": "Infiltration",
    "Mass": "Mass", "Nodule": "Nodule", "Pneumonia": "Pneumonia", "Pneumothorax": "Pneumothorax",
}  # fmt: skip
"""The box file's words and the table's."""
OTHER_READERS = ("*expert_labels*.csv", "google2019_nih-chest-xray-labels.csv*")


def read(options: SourceOptions) -> SourceRows:
    """Read the NIH table, its split lists where present, and check that every listed image is there.

    Raises:
        ManifestError: a subclass for each kind of fault; see `tables` and `rows`.
    """
    root = existing_folder(options.root, "nih=ROOT holds Data_Entry_2017_v2020.csv and images/")
    image_root = existing_folder(options.images, "--images nih=FOLDER") if options.images else root
    path = options.table or next((root / name for name in TABLES if (root / name).is_file()), None)
    if path is None:
        raise PathError(f"{root} holds neither {TABLES[0]} nor {TABLES[1]}.")
    table = read_csv(path, REQUIRED, key="Image Index")
    found = scan(image_root, _image_folders(image_root))
    rows, conflicts = _rows(table, options.policy)
    frame = located(rows, path).join(
        _locations(found.files, image_root), on="image_id", how="left", maintain_order="left"
    )
    frame = frame.with_columns(pl.col("source_relpath").fill_null("images/" + pl.col("image_id")))
    frame, lists, unlisted = _official_split(frame, root)
    boxes, remarks = _boxes(root, table.frame)
    frame, notes = keep_existing(frame, found, image_root, options, studies=False)
    return SourceRows(
        frame.with_columns(
            release=pl.lit("v2020" if "v2020" in path.name else "v2017"),
            licence_tag=pl.lit("nih-open"),
            label_source=pl.lit("nih-chestxray14"),
            label_trust=pl.lit("text_mined"),
        ),
        LABELS.findings,
        image_root,
        official=False,
        tables={path.name: table.sha256, **lists, **boxes},
        notes=(*notes, *unlisted, *remarks, *_left_out(root)),
        origin="nih",
        conflicts=conflicts,
    )


def _rows(table: Table, policy: LabelPolicy) -> tuple[pl.DataFrame, Mapping[str, int]]:
    frame, path = table.frame, table.path
    name = frame["Image Index"]
    bad = ~name.str.contains(r"^\d{8}_\d{3}\.png$")
    if bad.any():
        raise ManifestError(
            f"{path}, row {row_of(bad)}: 'Image Index' is not of the form 00000001_000.png ({bad.sum()} such rows)."
        )
    other = name.str.slice(0, 8) != frame["Patient ID"].str.zfill(8)
    if other.any():
        raise ManifestError(f"{path}, row {row_of(other)}: 'Patient ID' is not the patient of the file name.")
    labels, conflicts = _labels(frame["Finding Labels"], path, policy)
    rows = frame.select(
        image_id=pl.col("Image Index"),
        patient_id=name.str.slice(0, 8),
        study_id=name.str.slice(9, 3),
        study_seq=name.str.slice(9, 3).cast(pl.Int32),
        view_raw=pl.col("View Position"),
        sex=pl.col("Patient Gender").str.to_uppercase().replace("", None),
        age_raw=pl.col("Patient Age"),
        age_years=ages(pl.col("Patient Age")),
        raw_labels=pl.col("Finding Labels").map_elements(json.dumps, return_dtype=pl.String),
    ).hstack(labels)
    return rows, conflicts


def _labels(cells: pl.Series, path: Path, policy: LabelPolicy) -> tuple[list[pl.Series], Mapping[str, int]]:
    """One column per finding: exact tokens, all fifteen known for every image."""
    tokens = cells.str.split("|")
    values = token_values(tokens, LABELS, path)
    combined = tokens.list.contains(NO_FINDING) & (tokens.list.len() > 1)
    if combined.any():
        raise ManifestError(f"{path}, row {row_of(combined)}: {NO_FINDING!r} stands beside another finding.")
    return finding_columns(values, LABELS, policy)


def _image_folders(root: Path) -> list[str]:
    """`images`, and Kaggle's `images_001` to `images_012`; the folder itself where there is neither."""
    folders = sorted(folder.name for folder in root.glob("images*") if folder.is_dir())
    return folders or [""]


def _locations(files: list[str], root: Path) -> pl.DataFrame:
    """File name -> path relative to the root."""
    paths = pl.Series("source_relpath", files, dtype=pl.String)
    found = pl.DataFrame({"image_id": paths.str.extract(r"([^/]*)$", 1), "source_relpath": paths})
    found = found.filter(pl.col("image_id").str.ends_with(".png"))
    twice = found.filter(pl.col("image_id").is_duplicated())
    if twice.height:
        folders = sorted({path.rpartition("/")[0] for path in twice["source_relpath"]})
        raise ManifestError(
            f"{root}: {twice['image_id'].n_unique()} images are there more than once (in {', '.join(folders)}). "
            "Keep one copy, or name the folder to use with --images nih=FOLDER."
        )
    return found


def _official_split(frame: pl.DataFrame, root: Path) -> tuple[pl.DataFrame, dict[str, str], list[str]]:
    """`split_official` from the lists; hashes of these; notes.

    With one list, an image that it does not name is on the other side. With both, one that neither names is on none.
    """
    members, hashes = [], {}
    for name, split in LISTS.items():
        if (root / name).is_file():
            members.append(
                pl.DataFrame({"image_id": read_list(root / name)}).with_columns(split_official=pl.lit(split))
            )
            hashes[name] = sha256_file(root / name)
    if not members:
        return frame.with_columns(split_official=pl.lit("")), {}, []
    listed = pl.concat(members)
    both = listed["image_id"].is_duplicated()
    if both.any():
        raise LeakageError(f"{root}: {both.sum() // 2} images are in both {' and '.join(LISTS)}.")
    frame = frame.join(listed, on="image_id", how="left", maintain_order="left")
    unlisted = int(frame["split_official"].is_null().sum())
    if unlisted == frame.height:
        raise ManifestError(
            f"{root}: {', '.join(hashes)} name none of the images of the table. Expected a name such as "
            "00000001_000.png on each line."
        )
    other, note = "", f"{unlisted} images are in none of {', '.join(hashes)}: the lists hold none of them back"
    if len(hashes) == 1:
        (name,) = hashes
        other = next(split for listing, split in LISTS.items() if listing != name)
        note = f"{name} is the only list: the {unlisted} images that it does not name count as {other}"
    return frame.with_columns(pl.col("split_official").fill_null(other)), hashes, [note] if unlisted else []


def _boxes(root: Path, entries: pl.DataFrame) -> tuple[dict[str, str], list[str]]:
    """Check the boxes, where there are any, against the table: its hash, and how many there are as a note.

    Raises:
        UnknownLabelError, ManifestError: a word or a number that is none; names the row.
    """
    if not (root / BOXES).is_file():
        return {}, []
    table = read_csv(root / BOXES, ("Image Index", "Finding Label", *BOX_COLUMNS))
    frame, path = table.frame, table.path
    check_values(frame["Finding Label"], BOXED, path, UnknownLabelError)
    edges = frame.select(pl.col(BOX_COLUMNS).cast(pl.Float64, strict=False))
    x, y, width, height = (edges[name] for name in BOX_COLUMNS)
    bad = ~((x >= 0) & (y >= 0) & (width > 0) & (height > 0)).fill_null(False) | ~edges.sum_horizontal().is_finite()
    if bad.any():
        raise ManifestError(
            f"{path}, row {row_of(bad)}: not a box ({bad.sum()} such rows). Expected x and y from 0, w and h above 0."
        )
    word = frame["Finding Label"].replace_strict(BOXED, return_dtype=pl.String)
    pairs = frame.select("Image Index", word=word).join(
        entries.select("Image Index", tokens=pl.col("Finding Labels").str.split("|")), on="Image Index", how="left"
    )
    absent = int(pairs["tokens"].is_null().sum())
    denied = int((~pairs["tokens"].list.contains(pairs["word"])).sum())
    note = f"{path.name}: {frame.height} boxes on {frame['Image Index'].n_unique()} images"
    note += f"; {absent} of images that the table does not list" if absent else ""
    note += f"; {denied} of findings that the table does not give the image" if denied else ""
    return {path.name: table.sha256}, [note]


def _left_out(root: Path) -> list[str]:
    names = sorted({file.name for pattern in OTHER_READERS for file in root.glob(pattern)})
    return [f"{name} holds other readers' labels of some of the images: left out" for name in names]
