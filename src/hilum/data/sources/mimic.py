"""MIMIC-CXR-JPG 2.0.0 and 2.1.0, and MIMIC-CXR as DICOM; which of them is recognised by what is there.

ROOT holds `mimic-cxr-2.0.0-metadata.csv.gz` (release 2.1.0 kept the names of 2.0.0) or, of the DICOM release,
`cxr-record-list.csv.gz`; each table packed or not. Images lie under ROOT/files, or elsewhere with
`--images mimic=FOLDER`. Beside them, where they are there: the split list, the labels (CheXpert's labeller; NegBio's
with `--table mimic=.../mimic-cxr-2.0.0-negbio.csv.gz`), 2.1.0's radiologists' labels of test studies, which replace
the text-mined ones, and MIMIC-IV's `patients.csv.gz` (also in ROOT/hosp) for sex and age.
Labels are of studies: laterals carry those of their frontals. Ids are those of CXR-LT, so that the two are known to be
the same pictures. Source: Johnson et al., arXiv:1901.07042; PhysioNet mimic-cxr-jpg and mimic-cxr.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Int8

from hilum.core.errors import ManifestError, PathError
from hilum.core.types import UNKNOWN
from hilum.data.label_cells import cell_values, finding_columns, raw_cells
from hilum.data.label_maps import LabelPolicy, load_map
from hilum.data.rows import (
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
from hilum.data.tables import Table, check_filled, check_values, read_csv, require, row_of

METADATA = "mimic-cxr-2.0.0-metadata.csv"
RECORDS = "cxr-record-list.csv"
SPLIT = "mimic-cxr-2.0.0-split.csv"
STUDY_LABELS = ("mimic-cxr-2.0.0-chexpert.csv", "mimic-cxr-2.0.0-negbio.csv")
TEST_LABELS = "mimic-cxr-2.1.0-test-set-labeled.csv"
PATIENTS = ("patients.csv", "hosp/patients.csv")
IDS = ("dicom_id", "subject_id", "study_id")
SPLIT_CELLS = {"train": "train", "validate": "val", "test": "test"}
LABELS = load_map("chexpert")
ALIASES = {"Lung Opacity": ("Lung Opacity", "Airspace Opacity")}
"""The radiologists' table has CheXpert's category under the name of its definition."""
NO_FINDING = "No Finding"
PROCEDURES = ("PerformedProcedureStepDescription", "ProcedureCodeSequence_CodeMeaning")
CHEST = r"\b(?:CHEST|CXR|THORAX|BABYGRAM|LUNGS?)\b"
ELSEWHERE = (
    r"\b(?:ABDOM\w*|KUB|PELVI\w*|HIPS?|SHOULDER|CLAVICLE|SCAPULA|HUMERUS|ELBOW|FOREARM|WRIST|HAND|FINGERS?|FEMUR|KNEES?"
    r"|TIBIA|ANKLE|FOOT|TOES?|SPINE|SKULL|FACIAL|NECK|RIBS?|STERNUM|ESOPHAG\w*|BOWEL)\b"
)
PROCEDURE_VIEWS = {
    "DECUBITUS": r"\bDECUB\w*\b", "PA": r"\bPA\b", "AP": r"\bAP\b", "LATERAL": r"\bLAT(?:ERALS?)?\b",
    "OBLIQUE": r"\bOBL(?:S|IQUES?)?\b",
}  # fmt: skip
"""Words of a procedure that name a projection; "LAT DECUB" is one, a decubitus."""
OLDEST = "91"
"""MIMIC-IV's age of everyone older than 89."""


def read(options: SourceOptions) -> SourceRows:
    """Read the tables that are there and check that every listed image is.

    Raises:
        ManifestError: a subclass for each kind of fault; see `tables` and `rows`.
    """
    root = existing_folder(options.root, "mimic=ROOT holds the tables of MIMIC-CXR-JPG or MIMIC-CXR")
    home = existing_folder(options.images, "--images mimic=FOLDER") if options.images else root
    table = _images_table(root)
    frame = _ordered(_images(table))
    frame, split = _with_split(frame, root)
    frame, patients = _with_patients(frame, root)
    labels = _study_labels(root, options)
    labelled = _with_labels(frame, labels, options.policy)
    frame = labelled.frame
    if not (home / "files").is_dir():  # --images may name the folder `files` itself
        frame = frame.with_columns(pl.col("source_relpath").str.strip_prefix("files/"))
    found = scan(home, ["files"] if (home / "files").is_dir() else [""])
    frame = frame.with_columns(spelled(frame["source_relpath"], found, (".jpg", ".jpeg", ".png", ".dcm")))
    frame, missing = keep_existing(located(frame, table.path), found, home, options, studies=True)
    others = int(frame["non_chest"].sum())
    notes = [f"{others} images are of procedures elsewhere than at the chest: flagged non_chest"] if others else []
    unlisted = int((frame["split_official"] == "").sum()) if split is not None else 0
    notes += [f"{unlisted} images are not in {SPLIT}: in no split"] if unlisted else []
    read_tables = [part for part in (table, split, patients, *(labels.tables if labels else ())) if part is not None]
    return SourceRows(
        frame.with_columns(
            quality=flags(non_chest=pl.col("non_chest"), age_capped=pl.col("age_raw") == OLDEST),
            release=pl.lit("2.1.0" if _existing(root, TEST_LABELS) else "2.0.0"),
            licence_tag=pl.lit("physionet-credentialed"),
        ).drop("non_chest"),
        labelled.findings,
        home,
        official=split is not None,
        tables={part.path.name: part.sha256 for part in read_tables},
        notes=(*labelled.notes, *notes, *missing),
        origin="mimic",
        conflicts=labelled.conflicts,
    )


def _existing(root: Path, *names: str) -> Path | None:
    return next((path for name in names for path in (root / f"{name}.gz", root / name) if path.is_file()), None)


def _images_table(root: Path) -> Table:
    path = _existing(root, METADATA, RECORDS)
    if path is None:
        raise PathError(
            f"{root} holds neither {METADATA}.gz (MIMIC-CXR-JPG) nor {RECORDS}.gz (MIMIC-CXR), packed or not."
        )
    listed = path.name.startswith(METADATA)
    return read_csv(path, (*IDS, "ViewPosition", "StudyDate", "StudyTime") if listed else (*IDS, "path"), key=IDS[0])


def _images(table: Table) -> pl.DataFrame:
    frame, path = table.frame, table.path
    for name in IDS:
        check_filled(frame[name], path)
    for name in IDS[1:]:
        _check_number(frame[name], path)
    study = pl.col("study_id").str.strip_prefix("s")
    built = pl.format("files/p{}/p{}/s{}/{}.jpg", pl.col("subject_id").str.slice(0, 2), "subject_id", study, "dicom_id")
    paths = frame["path"] if "path" in table.columns else frame.select(path=built).to_series()
    rows = frame.select(
        image_id=pl.col("dicom_id"),
        patient_id=pl.col("subject_id"),
        study_id=pl.lit("s") + study,
        source_relpath=relative_paths(paths, path),
    )
    if "ViewPosition" not in table.columns:  # the DICOM release lists paths alone
        return rows.with_columns(view_raw=pl.lit(""), view_source=pl.lit("unknown"), non_chest=pl.lit(False))
    return rows.hstack(frame.select(_described(table.columns)))


def _check_number(ids: pl.Series, path: Path) -> None:
    """Raise unless all are digits, perhaps after an "s": "50000001.0" would join nothing."""
    bad = ~ids.str.contains(r"^s?\d+$")
    if bad.any():
        raise ManifestError(f"{path}, row {row_of(bad)}: {ids.name!r} is not a number ({bad.sum()} such rows).")


def _described(columns: Sequence[str]) -> list[pl.Expr]:
    """View, date, size and flags from the metadata table."""
    texts = [pl.col(name).str.to_uppercase() for name in PROCEDURES if name in columns]
    procedure = pl.concat_str(texts, separator=" ") if texts else pl.lit("")
    words = {view: procedure.str.contains(pattern) for view, pattern in PROCEDURE_VIEWS.items()}
    words["LATERAL"] &= ~words["DECUBITUS"]
    only = pl.sum_horizontal(words.values()) == 1
    in_procedure = pl.coalesce(pl.when(only & present).then(pl.lit(view)) for view, present in words.items())
    code = "ViewCodeSequence_CodeMeaning"
    coded = pl.col(code) if code in columns else pl.lit("")
    stated = pl.when(pl.col("ViewPosition") != "").then(pl.col("ViewPosition"))
    derived = pl.coalesce(pl.when(coded != "").then(coded), in_procedure)
    sizes = {"rows": "Rows", "cols": "Columns"}  # for orientation only: the build writes what the file itself says
    return [
        pl.coalesce(stated, derived, pl.lit("")).alias("view_raw"),
        pl.when(stated.is_not_null()).then(pl.lit("stated"))
        .when(derived.is_not_null()).then(pl.lit("derived"))
        .otherwise(pl.lit("unknown")).alias("view_source"),
        pl.col("StudyDate").alias("study_date_raw"),
        _moment(pl.col("StudyDate"), pl.col("StudyTime")).alias("moment"),
        *(pl.col(name).cast(pl.Int32, strict=False).alias(new) for new, name in sizes.items() if name in columns),
        (procedure.str.contains(ELSEWHERE) & ~procedure.str.contains(CHEST)).alias("non_chest"),
    ]  # fmt: skip


def _moment(date: pl.Expr, time: pl.Expr) -> pl.Expr:
    """An integer that orders `21800506` and `80556.875`, a time of day that lost its leading zero; null for others."""
    clock = time.str.extract(r"^(\d{1,6})(?:\.\d*)?$", 1).cast(pl.Int64)
    day = date.str.extract(r"^(\d{8})$", 1).cast(pl.Int64)
    thousandths = pl.lit("0.") + time.str.extract(r"\.(\d+)$", 1).fill_null("0")
    return (day * 1_000_000 + clock) * 1000 + (thousandths.cast(pl.Float64) * 1000).cast(pl.Int64)


def _ordered(frame: pl.DataFrame) -> pl.DataFrame:
    """Give each study its place among the patient's, by the time of its first image."""
    if "moment" not in frame.columns:
        return frame
    first = pl.col("moment").min().over("patient_id", "study_id")
    return frame.with_columns(study_seq=first.rank("dense").over("patient_id").cast(pl.Int32)).drop("moment")


def _with_split(frame: pl.DataFrame, root: Path) -> tuple[pl.DataFrame, Table | None]:
    path = _existing(root, SPLIT)
    if path is None:
        return frame.with_columns(split_official=pl.lit("")), None
    table = read_csv(path, ("dicom_id", "split"), key="dicom_id")
    check_values(table.frame["split"], SPLIT_CELLS, path, ManifestError)
    parts = table.frame.select(image_id="dicom_id", split_official=pl.col("split").replace_strict(SPLIT_CELLS))
    frame = frame.join(parts, on="image_id", how="left", maintain_order="left")
    if frame["split_official"].is_null().all():
        raise ManifestError(f"{path} names none of the images of the table. The two are not of one release.")
    return frame.with_columns(pl.col("split_official").fill_null("")), table


def _with_patients(frame: pl.DataFrame, root: Path) -> tuple[pl.DataFrame, Table | None]:
    """Sex and age from MIMIC-IV: years in the anchor year, and the years from then to the study."""
    path = _existing(root, *PATIENTS)
    if path is None:
        return frame.with_columns(age_raw=pl.lit(None, dtype=pl.String)), None
    table = read_csv(path, ("subject_id", "gender", "anchor_age"), key="subject_id")
    anchor = pl.col("anchor_year") if "anchor_year" in table.columns else pl.lit("")
    people = table.frame.select(
        patient_id="subject_id",
        sex=pl.when(pl.col("gender") != "").then(pl.col("gender")),
        age_raw=pl.when(pl.col("anchor_age") != "").then(pl.col("anchor_age")),
        anchor=anchor.cast(pl.Int32, strict=False),
    )
    frame = frame.join(people, on="patient_id", how="left", maintain_order="left")
    dated = pl.col("study_date_raw") if "study_date_raw" in frame.columns else pl.lit("")
    since = dated.str.slice(0, 4).cast(pl.Int32, strict=False) - pl.col("anchor")
    years = pl.col("age_raw").cast(pl.Float32, strict=False) + since.fill_null(0)
    return frame.with_columns(age_years=pl.when(years.is_between(0, 120)).then(years)).drop("anchor"), table


@dataclass(frozen=True)
class _StudyLabels:
    """Labels of studies, the radiologists' in place of the text-mined where both are there.

    Args:
        frame: `study_id`, `row` of `values`, `subject`, `raw_labels`, `label_source`, `label_trust`; a study once.
        values: columns in the order of `LABELS.labels`.
        tables: read for it.
    """

    frame: pl.DataFrame
    values: Int8[np.ndarray, "S L"]
    tables: tuple[Table, ...]


def _study_labels(root: Path, options: SourceOptions) -> _StudyLabels | None:
    found = {
        options.table or _existing(root, *STUDY_LABELS): "text_mined",
        _existing(root, TEST_LABELS): "physician",
    }
    paths = {path: trust for path, trust in found.items() if path}
    if not paths:
        return None
    tables = [read_csv(path, ("study_id",), key="study_id") for path in paths]
    made = [_labels_of(table, trust) for table, trust in zip(tables, paths.values(), strict=True)]
    frame = pl.concat([part for part, _ in made]).with_row_index("row")
    frame = frame.unique("study_id", keep="last", maintain_order=True)
    return _StudyLabels(frame, np.concatenate([values for _, values in made]), tuple(tables))


def _labels_of(table: Table, trust: str) -> tuple[pl.DataFrame, Int8[np.ndarray, "S L"]]:
    _check_number(table.frame["study_id"], table.path)
    columns = {
        label: next((name for name in ALIASES.get(label, (label,)) if name in table.columns), label)
        for label in LABELS.labels
    }
    if trust == "physician" and NO_FINDING not in table.columns:
        del columns[NO_FINDING]
    require(table.columns, columns.values(), table.path)
    values = np.full((table.frame.height, len(LABELS.labels)), UNKNOWN, np.int8)
    places = [LABELS.labels.index(label) for label in columns]
    values[:, places] = cell_values(table.frame, list(columns.values()), table.path)
    kind = table.path.name.removesuffix(".gz").removesuffix(".csv").removeprefix("mimic-cxr-")
    frame = table.frame.select(
        study_id=pl.lit("s") + pl.col("study_id").str.strip_prefix("s"),
        subject="subject_id" if "subject_id" in table.columns else pl.lit(None, dtype=pl.String),
        raw_labels=raw_cells(table.frame, list(columns.values())),
        label_source=pl.lit(f"mimic-cxr-{kind}"),
        label_trust=pl.lit(trust),
    )
    return frame, values


@dataclass(frozen=True)
class _Labelled:
    frame: pl.DataFrame
    findings: tuple[str, ...]
    conflicts: Mapping[str, int]
    notes: tuple[str, ...]


def _with_labels(frame: pl.DataFrame, labels: _StudyLabels | None, policy: LabelPolicy) -> _Labelled:
    """Give each image the labels of its study; an image whose study has none is unknown in every finding."""
    if labels is None:
        return _Labelled(frame, (), {}, (f"no table of labels ({STUDY_LABELS[0]}.gz): images without labels",))
    frame = frame.join(labels.frame, on="study_id", how="left", maintain_order="left")
    others = (frame["subject"] != frame["patient_id"]).fill_null(False)
    if others.any():
        raise ManifestError(
            f"{labels.tables[0].path}: the studies of {others.sum()} images have another subject_id than in the table "
            "of images. The two tables are not of one release."
        )
    annotated = frame["row"].is_not_null().to_numpy()
    columns, conflicts = finding_columns(labels.values[frame["row"].fill_null(0).to_numpy()], LABELS, policy, annotated)
    alone = frame.filter(pl.col("row").is_null())
    notes = []
    if alone.height:
        notes += [f"{alone['study_id'].n_unique()} studies ({alone.height} images) have no labels: unknown"]
    read_by = int((frame["label_trust"] == "physician").sum())
    notes += [f"{read_by} images have radiologists' labels ({TEST_LABELS})"] if read_by else []
    return _Labelled(frame.drop("row", "subject").hstack(columns), LABELS.findings, conflicts, tuple(notes))
