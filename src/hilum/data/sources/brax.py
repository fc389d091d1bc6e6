"""BRAX 1.1.0: `master_spreadsheet_update.csv` (or the older `master_spreadsheet.csv`), PNGs, and DICOM where they lack.

Columns are found by name: Lung Lesion stands before Lung Opacity here, the reverse of CheXpert. In some copies
`PngPath` goes on after `.png`: the path is taken as it stands where there is such a file, else up to its first `.png`.
Where ROOT has no folder `images`, the DICOM files of `Anonymized_DICOMs` are read. An accession number names a study
only together with the patient. Ages are bins: the middle of the bin, flagged. Dates are made up and order nothing.
Two PNGs are known not to open; as any such file, they are found by the build, which reads every image.
Source: Reis et al., Scientific Data 9:487; PhysioNet brax 1.1.0.
"""

from pathlib import Path

import polars as pl

from hilum.core.errors import PathError
from hilum.data.label_cells import cell_values, finding_columns, raw_cells
from hilum.data.label_maps import load_map
from hilum.data.rows import (
    Scan,
    SourceOptions,
    SourceRows,
    existing_folder,
    flags,
    keep_existing,
    located,
    relative_paths,
    scan,
    spelled,
)
from hilum.data.tables import check_filled, read_csv, unique

TABLES = ("master_spreadsheet_update.csv", "master_spreadsheet.csv")
PATHS = {"images": "PngPath", "Anonymized_DICOMs": "DicomPath"}
SUFFIXES = {"images": ".png", "Anonymized_DICOMs": ".dcm"}
IDS = ("PatientID", "AccessionNumber")
LABELS = load_map("chexpert")
SEXES = {"MALE": "M", "FEMALE": "F", "": None}
OLDEST = 85.0
"""Of everyone in the last bin, "85 or more"."""


def read(options: SourceOptions) -> SourceRows:
    """Read the spreadsheet and check that every listed image is there.

    Raises:
        ManifestError: a subclass for each kind of fault; see `tables` and `rows`.
    """
    root = existing_folder(options.root, "brax=ROOT holds master_spreadsheet_update.csv and images/")
    home = existing_folder(options.images, "--images brax=FOLDER") if options.images else root
    path = options.table or next((root / name for name in TABLES if (root / name).is_file()), None)
    if path is None:
        raise PathError(f"{root} holds neither {' nor '.join(TABLES)}.")
    kind, below = _kind(home)
    table = read_csv(path, (*IDS, PATHS[kind], *LABELS.labels, "ViewPosition"))
    for name in (*IDS, PATHS[kind]):
        check_filled(table.frame[name], path)
    found = scan(home, [kind] if below else [""])
    listed = relative_paths(table.frame[PATHS[kind]], path)
    if not below:  # --images may name the folder `images` itself
        listed = listed.str.strip_prefix(f"{kind}/")
    paths = _paths(listed, found, SUFFIXES[kind])
    unique(paths.alias(PATHS[kind]), path)
    columns, conflicts = finding_columns(cell_values(table.frame, LABELS.labels, path), LABELS, options.policy)
    frame = located(_rows(table.frame, paths, kind).hstack(columns), path)
    frame, notes = keep_existing(frame, found, home, options, studies=True)
    if kind != "images":
        notes.insert(0, "no folder `images`: the DICOM files are read")
    return SourceRows(
        frame, LABELS.findings, home, False, {path.name: table.sha256}, tuple(notes), origin="brax", conflicts=conflicts
    )


def _kind(home: Path) -> tuple[str, bool]:
    """Which of the two trees is read, and whether it lies below `home` (else `home` is itself that folder)."""
    for kind in PATHS:
        if (home / kind).is_dir():
            return kind, True
    return ("Anonymized_DICOMs" if home.name == "Anonymized_DICOMs" else "images"), False


def _paths(listed: pl.Series, found: Scan, suffix: str) -> pl.Series:
    """As listed where that is there, else without what follows the first `.png`."""
    cut = listed.str.extract(rf"(?i)^(.*?\{suffix})", 1).fill_null(listed)
    return spelled(cut.zip_with(~listed.is_in(found.files), listed), found, (suffix,))


def _rows(frame: pl.DataFrame, paths: pl.Series, kind: str) -> pl.DataFrame:
    given = [name for name in ("PatientSex", "PatientAge", "StudyDate", "Rows", "Columns") if name in frame.columns]
    cells = {name: pl.col(name) if name in given else pl.lit("") for name in ("PatientSex", "PatientAge", "StudyDate")}
    sex, age = cells["PatientSex"].str.to_uppercase(), cells["PatientAge"]
    sizes = {new: name for new, name in (("rows", "Rows"), ("cols", "Columns")) if name in given}
    return frame.select(
        image_id=paths.str.strip_prefix(f"{kind}/").str.replace(r"\.[^./]*$", ""),
        patient_id=pl.col("PatientID"),
        study_id=pl.col("AccessionNumber"),
        source_relpath=paths,
        view_raw=pl.col("ViewPosition"),
        split_official=pl.lit(""),
        sex=sex.replace_strict(SEXES, default=sex, return_dtype=pl.String),
        age_raw=pl.when(age != "").then(age),
        age_years=_age(age),
        study_date_raw=pl.when(cells["StudyDate"] != "").then(cells["StudyDate"]),
        quality=flags(age_binned=_age(age).is_not_null(), age_capped=age.str.contains("more")),
        raw_labels=raw_cells(frame, LABELS.labels),
        label_source=pl.lit("brax"),
        label_trust=pl.lit("text_mined"),
        release=pl.lit("1.1.0"),
        licence_tag=pl.lit("physionet-credentialed"),
        **{new: pl.col(name).cast(pl.Float64, strict=False).cast(pl.Int32) for new, name in sizes.items()},
    )


def _age(text: pl.Expr) -> pl.Expr:
    """The middle of a bin of ages in whole years ("45-49" is 45.0 to 49.9 years); a number alone is taken as it is."""
    ends = text.str.extract_all(r"\d+").list.eval(pl.element().cast(pl.Float32))
    low, high = ends.list.get(0, null_on_oob=True), ends.list.get(1, null_on_oob=True)
    whole = pl.when((high - low) % 5 == 4).then(high + 1).otherwise(high)
    alone = pl.when(text.str.contains("more")).then(pl.lit(OLDEST, dtype=pl.Float32)).otherwise(low)
    years = pl.when(high.is_null()).then(alone).otherwise((low + whole) / 2)
    return pl.when(years.is_between(0, 120)).then(years)
