"""The manifest: one row per image, one int8 column per finding, in Parquet with its provenance in the header.

`hilum manifest` writes it, `hilum audit` and `hilum build` read it. This module knows columns, types and what makes
a manifest invalid; it does not know datasets (`sources/`), splits (`splits`) or pixels (`images`, `store`).
The meaning of every column is in docs/reference/manifest.md. Just past 300 lines: the columns alone take 70.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl

from hilum.core.errors import LeakageError, ManifestError, MissingColumnError, PathError, UnknownLabelError
from hilum.core.files import write_bytes
from hilum.core.types import NEGATIVE, POSITIVE, SPLITS, UNCERTAIN, UNKNOWN, VIEWS
from hilum.data.labels import findings_hash

SCHEMA_VERSION = "hilum-manifest-1"
LABEL_PREFIX = "label."
LABEL_CODES = (POSITIVE, NEGATIVE, UNKNOWN, UNCERTAIN)

REQUIRED: dict[str, type[pl.DataType] | pl.DataType] = {
    "image_uid": pl.String,
    "dataset": pl.String,
    "source_relpath": pl.String,
    "source_root_key": pl.String,
    "patient_id": pl.String,
    "study_id": pl.String,
    "image_id": pl.String,
    "view": pl.String,
    "split_project": pl.String,
    "ssl_ok": pl.Boolean,
    "ssl_reason": pl.String,
}
"""Columns without which nothing can be built; none of them holds a null."""

OPTIONAL: dict[str, type[pl.DataType] | pl.DataType] = {
    "release": pl.String,
    "licence_tag": pl.String,
    "source_size": pl.Int64,
    "source_sha256": pl.String,
    "study_seq": pl.Int32,
    "study_date_raw": pl.String,
    "study_order": pl.Int32,
    "view_raw": pl.String,
    "view_source": pl.String,
    "is_frontal": pl.Boolean,
    "is_pediatric": pl.Boolean,
    "sex": pl.String,
    "age_years": pl.Float32,
    "age_raw": pl.String,
    "rows": pl.Int32,
    "cols": pl.Int32,
    "bits_stored": pl.Int32,
    "photometric": pl.String,
    "mode": pl.String,
    "orientation_fix": pl.Int32,
    "origin_image": pl.String,
    "origin_patient": pl.String,
    "split_official": pl.String,
    "fold": pl.Int32,
    "label_source": pl.String,
    "label_trust": pl.String,
    "label_policy_id": pl.String,
    "raw_labels": pl.String,
    "quality": pl.List(pl.String),
    "pixel_sha256": pl.String,
    "phash256": pl.String,
    "store_shard": pl.Int32,
    "store_offset": pl.Int64,
    "store_len": pl.Int64,
    "store_h": pl.Int32,
    "store_w": pl.Int32,
    "preprocess_id": pl.String,
}
"""Columns that a source fills where it can; null elsewhere. `hilum build` fills the last group."""

COLUMNS = REQUIRED | OPTIONAL
STUDY = ("dataset", "patient_id", "study_id")
"""What identifies a study: the same study id under two patients is two studies."""
ORDER = ("dataset", "patient_id", "study_id", "image_id")
"""Rows are sorted by these, so that the same input gives the same file."""


@dataclass(frozen=True)
class Manifest:
    """A table of images, the findings it labels, and where it came from.

    Args:
        frame: one row per image, the columns of docs/reference/manifest.md.
        findings: the findings in order; column `label.<finding>` holds 1, 0, -1 unknown or -2 uncertain.
        metadata: texts kept in the file's header: schema version, tool version, counts, policies, roots, hashes.
    """

    frame: pl.DataFrame
    findings: tuple[str, ...]
    metadata: dict[str, str]

    def __len__(self) -> int:
        return self.frame.height

    def labels(self) -> np.ndarray:
        """Labels as int8 (N, C), findings in order."""
        columns = [self.frame[label_column(name)].to_numpy() for name in self.findings]
        return np.stack(columns, axis=1) if columns else np.zeros((len(self), 0), np.int8)

    @property
    def accepted_leak(self) -> str:
        """The leak by design that was accepted when the manifest was made, in words; "" for none."""
        return self.metadata.get("accepted_leak", "")

    def roots(self) -> dict[str, Path]:
        """Folder of each `source_root_key`, as it was when the manifest was made."""
        return {key: Path(folder) for key, folder in json.loads(self.metadata.get("roots", "{}")).items()}


def label_column(finding: str) -> str:
    """Name of the column that holds a finding."""
    return f"{LABEL_PREFIX}{finding}"


def complete(frame: pl.DataFrame, findings: Sequence[str]) -> pl.DataFrame:
    """Add the optional columns that are absent (null), give every column its type and the documented order.

    Columns that the schema does not know are kept, at the end.
    """
    absent = [pl.lit(None, dtype=dtype).alias(name) for name, dtype in OPTIONAL.items() if name not in frame.columns]
    frame = frame.with_columns(absent)
    known = [*COLUMNS, *(label_column(name) for name in findings)]
    others = [name for name in frame.columns if name not in set(known)]
    types = {name: dtype for name, dtype in COLUMNS.items() if name in frame.columns}
    types |= {label_column(name): pl.Int8 for name in findings}
    return frame.select(*(name for name in known if name in frame.columns), *others).cast(types)  # type: ignore[arg-type]


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest as Parquet, whole or not at all. The findings and their hash go into the header.

    Raises:
        ManifestError: columns, types or label codes are not those of the schema.
        HilumError: the disk is full, or the folder cannot be written; what was there before is unchanged.
    """
    check_structure(manifest.frame, manifest.findings, str(path))
    metadata = {
        **manifest.metadata,
        "schema_version": SCHEMA_VERSION,
        "findings": json.dumps(list(manifest.findings), ensure_ascii=False),
        "findings_sha256": findings_hash(manifest.findings),
    }
    content = BytesIO()  # polars reports a full disk as a damaged file; through memory it is named for what it is
    manifest.frame.write_parquet(content, metadata=metadata)
    write_bytes(Path(path), content.getvalue())


def read_manifest(path: Path, check: bool = True) -> Manifest:
    """Read and check a manifest; columns that the schema does not know are kept.

    Args:
        path: file written by `write_manifest`.
        check: also check what rows say together (unique ids, one split per patient). `hilum audit` turns this off to
            report everything that is wrong at once.

    Raises:
        ManifestError: not a manifest, another schema version, or inconsistent; a subclass names the kind.
        LeakageError: a patient is in two splits, or evaluation material is open to self-supervision.
    """
    path = Path(path)
    if path.is_dir():
        raise ManifestError(f"{path} is a folder; expected a manifest. A store keeps its own in manifest.parquet.")
    if not path.is_file():
        raise ManifestError(f"{path} is not a file. Make a manifest with `hilum manifest SOURCE=ROOT --out {path}`.")
    try:
        metadata = pl.read_parquet_metadata(path)
        frame = pl.read_parquet(path, hive_partitioning=False, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ManifestError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}.") from error
    version = metadata.get("schema_version", "none")
    if version != SCHEMA_VERSION:
        raise ManifestError(
            f"{path} has schema version {version!r}; this Hilum reads {SCHEMA_VERSION!r}. "
            "Make it again with `hilum manifest`."
        )
    findings = _findings_in_header(metadata, path)
    metadata.pop("ARROW:schema", None)
    check_structure(frame, findings, str(path))
    if check:
        check_rows(frame, str(path), metadata.get("accepted_leak", ""))
    return Manifest(frame, findings, metadata)


def _findings_in_header(metadata: dict[str, str], path: Path) -> tuple[str, ...]:
    try:
        findings = tuple(json.loads(metadata["findings"]))
    except (KeyError, ValueError, TypeError) as error:
        raise ManifestError(f"{path}: the header has no readable list of findings. Make it again.") from error
    if metadata.get("findings_sha256") != findings_hash(findings):
        raise ManifestError(f"{path}: the findings in the header do not match their hash; the file was edited by hand.")
    return findings


def check_structure(frame: pl.DataFrame, findings: Sequence[str], where: str) -> None:
    """Check columns, types, nulls and label codes.

    Raises:
        MissingColumnError, UnknownLabelError, ManifestError: named by column.
    """
    missing = [name for name in (*REQUIRED, *map(label_column, findings)) if name not in frame.columns]
    if missing:
        raise MissingColumnError(f"{where}: missing columns {', '.join(missing)}. Found: {', '.join(frame.columns)}.")
    expected = {name: dtype for name, dtype in COLUMNS.items() if name in frame.columns}
    expected |= {label_column(name): pl.Int8 for name in findings}
    wrong = [name for name, kind in expected.items() if frame.schema[name] != kind]
    if wrong:
        described = "; ".join(f"{name} is {frame.schema[name]}, expected {expected[name]}" for name in wrong)
        raise ManifestError(f"{where}: {described}.")
    labels = [name for name in frame.columns if name.startswith(LABEL_PREFIX)]
    stray = [name for name in labels if name.removeprefix(LABEL_PREFIX) not in findings]
    if stray:
        raise UnknownLabelError(f"{where}: {', '.join(stray)} not among the findings of the header.")
    nulls = [name for name in REQUIRED if frame[name].null_count()]
    if nulls:
        raise ManifestError(f"{where}: empty values in {', '.join(nulls)}; these columns need one for every image.")
    for finding in findings:
        column = frame[label_column(finding)]
        bad = column.is_null() | ~column.is_in(LABEL_CODES)
        if bad.any():
            uid = frame["image_uid"].filter(bad)[0]
            raise UnknownLabelError(
                f"{where}: {label_column(finding)} holds {column.filter(bad)[0]} for image {uid} "
                f"(and {bad.sum() - 1} more); expected 1, 0, -1 (unknown) or -2 (uncertain)."
            )


def check_rows(frame: pl.DataFrame, where: str, accepted_leak: str = "") -> None:
    """Check what rows say together: unique ids, relative paths, known views and splits, no leakage.

    Args:
        frame: of a manifest.
        where: for messages.
        accepted_leak: a leak by design that somebody has accepted, in words; patients may then be on two sides.

    Raises:
        PathError, LeakageError, ManifestError: with a count and the first image_uid.
    """
    repeated = frame["image_uid"].is_duplicated()
    if repeated.any():
        uid = frame["image_uid"].filter(repeated)[0]
        raise ManifestError(
            f"{where}: {repeated.sum()} rows share an image_uid, first {uid}. Each image may appear once."
        )
    for column, allowed in (("view", VIEWS), ("split_project", SPLITS)):
        bad = ~frame[column].is_in(allowed)
        if bad.any():
            raise ManifestError(
                f"{where}: {column} {frame[column].filter(bad)[0]!r} in {bad.sum()} rows; expected one of {allowed}."
            )
    outside = frame.filter(leaves_root(pl.col("source_relpath")))
    if outside.height:
        raise PathError(
            f"{where}: {outside.height} paths are absolute or leave their root, first that of image "
            f"{outside['image_uid'][0]}. Paths are relative; roots are in the header."
        )
    if accepted_leak:
        return
    crossing = patients_across_splits(frame)
    if crossing.height:
        raise LeakageError(
            f"{where}: {crossing.select(person(crossing)).n_unique()} patients have images in more than one split, "
            f"e.g. image {crossing['image_uid'][0]}. A patient belongs to one split; see `hilum audit`."
        )
    open_evaluation = evaluation_in_pretraining(frame)
    if open_evaluation.height:
        raise LeakageError(
            f"{where}: {open_evaluation.height} images of patients in val or test are marked ssl_ok, "
            f"first {open_evaluation['image_uid'][0]}."
        )


def leaves_root(path: pl.Expr) -> pl.Expr:
    """True where a path is absolute (POSIX or Windows), has a `..`, or is empty."""
    return path.str.contains(r"^$|^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)")


def person(frame: pl.DataFrame) -> pl.Expr:
    """Who an image is of: the patient of the release it descends from where known, else the dataset's own."""
    own = pl.col("patient_id")
    return (pl.coalesce("origin_patient", own) if "origin_patient" in frame.columns else own).alias("person")


def patients_across_splits(frame: pl.DataFrame) -> pl.DataFrame:
    """Rows of patients that have images in more than one of train, val and test."""
    placed = frame.filter(pl.col("split_project") != "")
    return placed.filter(pl.col("split_project").n_unique().over(person(frame)) > 1)


def evaluation_in_pretraining(frame: pl.DataFrame) -> pl.DataFrame:
    """Rows open to self-supervision whose patient has an image in val or test."""
    evaluated = pl.col("split_project").is_in(["val", "test"]).any().over(person(frame))
    return frame.filter(evaluated & pl.col("ssl_ok"))
