"""What a source hands over, and the steps that every source shares: paths, presence of files, labels, ages.

A source reads one layout and returns `SourceRows`; `manifest` gives them namespaced ids, splits and one schema.
Past 300 lines: small steps that sixteen sources share, one beside the other.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import polars as pl

from hilum.core.errors import EmptyStudyError, ManifestError, PathError, UnknownLabelError
from hilum.data.label_maps import LabelPolicy
from hilum.data.schema import label_column, leaves_root
from hilum.data.tables import FIRST_ROW, check_values, row_of

EXAMPLES = 3
"""How many of the offending files a message names."""
NAMED_IMAGE = r"(?i)([^/]+)\.(?:png|jpe?g|dcm|dicom)$"
"""The name of an image's file before its suffix."""
AGE = r"^\s*(\d{1,3}(?:\.\d+)?)\s*([YyMmWwDd]?)\s*$"
"""As tables write an age, and as DICOM does (Age String, with its unit)."""
UNITS_A_YEAR = {"": 1.0, "Y": 1.0, "M": 12.0, "W": 365.25 / 7, "D": 365.25}
VOCABULARY_SHOWN = 50
"""Longer vocabularies are not listed in messages."""
ROW_COLUMNS = ("\x1ftable", "\x1frow")
ROW = pl.int_range(FIRST_ROW, pl.len() + FIRST_ROW).alias("row")
"""Spreadsheet row of a table that is as it was read, for messages."""


@dataclass(frozen=True)
class SourceOptions:
    """What a source is asked to read."""

    dataset: str
    """Name that the ids are put under."""
    root: Path
    """Folder with the tables, and with the images unless `images` says otherwise."""
    images: Path | None = None
    """Folder with the images, where they lie apart from the tables."""
    table: Path | None = None
    """Another table than the one the source looks for; for `mimic` and `chexpert`, other labels of the same images."""
    allow_missing: bool = False
    """Leave out listed images that are not there, and count them, in place of an error."""
    policy: LabelPolicy = field(default_factory=LabelPolicy)
    """How cells that are not plainly yes or no are read."""


@dataclass(frozen=True)
class SourceRows:
    """Rows of one dataset, before ids are namespaced and splits are made.

    Args:
        frame: one row per image: `image_id`, `patient_id`, `study_id` (the source's own, the study unique within its
            patient), `source_relpath`, `view_raw`, `split_official`, `label.*`, and any optional manifest column.
        findings: what the source labels, in the release's order.
        root: the folder that `source_relpath` is relative to.
        official: whether `split_official` is meant to be used when nobody says which split.
        tables: SHA-256 of each table read, by file name.
        notes: what a person should know (files left out, guesses made); no patient identifiers.
        origin: the public release whose image and patient ids these are ("mimic" for CXR-LT), so that two datasets that
            hold the same pictures or people are known to; "" for ids of nobody else's. A source whose images descend
            from another release one by one fills the columns `origin_image` and `origin_patient` itself.
        conflicts: images whose labels contradict each other, by finding (see `label_maps`).
        native: the labels are the release's own in every finding; rules between findings are never applied to them.
    """

    frame: pl.DataFrame
    findings: tuple[str, ...]
    root: Path
    official: bool
    tables: Mapping[str, str]
    notes: tuple[str, ...] = ()
    origin: str = ""
    conflicts: Mapping[str, int] = field(default_factory=dict)
    native: bool = False


@dataclass(frozen=True)
class Scan:
    """The files under a folder.

    Args:
        files: paths relative to the folder, with "/".
        outside: links whose target lies outside the folder.
        links: links whose target lies inside it.
        unnamed: entries whose names are not UTF-8, which no table can list.
        others: pipes, sockets, devices, and links that lead nowhere.
    """

    files: list[str]
    outside: frozenset[str]
    links: frozenset[str]
    unnamed: int = 0
    others: int = 0


def scan(root: Path, under: Sequence[str] = ("",)) -> Scan:
    """List all files under some sub-folders of `root` in one pass, without a system call for each file.

    Links are followed where they stay inside `root`; where they leave it they are only recorded.
    """
    home = os.path.realpath(root)
    files: list[str] = []
    outside: set[str] = set()
    links: set[str] = set()
    unnamed = others = 0
    waiting: list[tuple[str, tuple[str, ...]]] = []
    for folder in under:
        target = os.path.realpath(Path(root) / folder)
        if os.path.commonpath([home, target]) == home:
            waiting.append((folder, (home, target)))
        else:
            outside.add(folder)
    while waiting:
        folder, trail = waiting.pop()
        try:
            entries = list(os.scandir(f"{root}/{folder}"))  # text: half a million `Path`s take longer than the listing
        except FileNotFoundError:
            continue
        except OSError as error:
            raise PathError(f"{Path(root) / folder} cannot be listed: {error.strerror or error}.") from error
        for entry in entries:
            if not _is_text(entry.name):
                unnamed += 1
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if os.path.commonpath([home, target]) != home:
                    outside.add(name)
                    continue
                kind = _kind_behind(entry)
                if not kind:
                    others += 1
                    continue
                links.add(name)
                if kind == "file":
                    files.append(name)
                elif target not in trail:  # a loop comes back to a target already followed
                    waiting.append((name, (*trail, target)))
            elif entry.is_dir():
                waiting.append((name, trail))
            elif entry.is_file():
                files.append(name)
            else:
                others += 1
    return Scan(sorted(files), frozenset(outside), frozenset(links), unnamed, others)


def _kind_behind(link: "os.DirEntry[str]") -> Literal["folder", "file", ""]:
    """What a link leads to; nothing where it is broken or goes in a circle."""
    try:
        return "folder" if link.is_dir() else "file" if link.is_file() else ""
    except OSError:
        return ""


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def relative_paths(paths: pl.Series, table: Path) -> pl.Series:
    """Paths of a table with `./` and doubled slashes removed.

    Raises:
        PathError: a path is absolute, has a `..` or a backslash, or holds a control character; names the row.
    """
    bad = pl.select(leaves_root(pl.lit(paths)) | pl.lit(paths).str.contains(r"[\\\x00-\x1f]")).to_series()
    if bad.any():
        raise PathError(
            f"{table}, row {row_of(bad)}: the path is absolute, leaves its folder (..) or uses backslashes "
            f"({bad.sum()} such rows). Write paths relative to the root, with '/'."
        )
    return paths.str.replace_all(r"(^|/)(\./)+", "$1").str.replace_all("/+", "/")


def paths_by_name(names: pl.Series, found: Scan, root: Path, options: SourceOptions) -> pl.Series:
    """Where the images are whose files are called by their ids, in whatever folder, with an image's suffix in any case.

    Args:
        names: file names without suffix.
        found: the scan of `root`.
        root: for messages.
        options: for messages.

    Returns:
        Paths relative to `root`, null where there is no such file.

    Raises:
        ManifestError: an image is there more than once (a copy of another size, say); names the folders.
    """
    files = pl.Series("path", found.files, dtype=pl.String)
    there = pl.DataFrame({"name": files.str.extract(NAMED_IMAGE, 1), "path": files})
    there = there.filter(pl.col("name").is_in(names.implode()))
    twice = there.filter(pl.col("name").is_duplicated())
    if twice.height:
        folders = sorted({path.rpartition("/")[0] or "the folder itself" for path in twice["path"]})
        raise ManifestError(
            f"{root}: {twice['name'].n_unique()} images are there more than once (in {_some(folders)}). "
            f"Keep one copy, or name the folder to use with --images {options.dataset}=FOLDER."
        )
    return names.to_frame("name").join(there, on="name", how="left", maintain_order="left")["path"]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:EXAMPLES]) + (", ..." if len(names) > EXAMPLES else "")


def located(frame: pl.DataFrame, table: Path, row: pl.Expr = ROW) -> pl.DataFrame:
    """Note for each row the table and spreadsheet row it came from: messages name these, never a patient's path.

    Args:
        frame: the rows.
        table: where they were read.
        row: their spreadsheet rows, where these are not all rows of the table in its order.
    """
    return frame.with_columns(pl.lit(table.name).alias(ROW_COLUMNS[0]), row.alias(ROW_COLUMNS[1]))


def keep_existing(
    frame: pl.DataFrame, found: Scan, root: Path, options: SourceOptions, studies: bool
) -> tuple[pl.DataFrame, list[str]]:
    """Drop (with `allow_missing`) or refuse rows whose file is not there.

    Args:
        frame: with `source_relpath`, `patient_id`, `study_id`, and the columns of `located`, which are dropped.
        found: the scan of `root`.
        root: for messages.
        options: `allow_missing`.
        studies: the source has studies of several images, so that a study can be left without any.

    Returns:
        The rows whose files exist, and notes.

    Raises:
        EmptyStudyError: files are missing and some study has none left.
        PathError: files are missing, none is there, or one is a link that leaves the root.
    """
    present = frame["source_relpath"].is_in(found.files)
    where = frame.select(ROW_COLUMNS).filter(~present)
    frame = frame.drop(ROW_COLUMNS)
    if present.all():
        return frame, []
    gone = frame.filter(~present)
    _refuse_outside_links(gone["source_relpath"], where, found, root)
    kept = frame.filter(present)
    names = ", ".join(f"{table} row {row}" for table, row in where.head(EXAMPLES).iter_rows())
    count = f"{gone.height} of {frame.height} listed images are not under {root}"
    if kept.height == 0:
        raise PathError(
            f"None of the {frame.height} listed images is under {root} ({len(found.files)} files there). "
            f"Say where the images are with --images {options.dataset}=FOLDER."
        )
    keys = [name for name in ("patient_id", "study_id") if name in frame.columns]
    empty = gone.select(keys).unique().join(kept.select(keys), on=keys, how="anti").height if studies else 0
    lost = f" {empty} studies have no image left." if empty else ""
    if options.allow_missing:
        return kept, [f"{count}: left out.{lost}"]
    kind = EmptyStudyError if empty else PathError
    raise kind(f"{count} (first: {names}).{lost} Complete them, or leave them out with --allow-missing.")


def _refuse_outside_links(paths: pl.Series, where: pl.DataFrame, found: Scan, root: Path) -> None:
    if not found.outside:
        return
    for path, (table, row) in zip(paths, where.iter_rows(), strict=True):
        parts = path.split("/")
        if any("/".join(parts[: end + 1]) in found.outside for end in range(len(parts))):
            raise PathError(
                f"{table}, row {row}: the image is, or lies behind, a link that leaves {root}. "
                "Give the folder that really holds the images (--images SOURCE=FOLDER)."
            )


def label_columns(
    frame: pl.DataFrame, findings: Mapping[str, str], codes: Mapping[str, int], table: Path
) -> pl.DataFrame:
    """Replace text columns by int8 label columns.

    Args:
        frame: text columns.
        findings: column in `frame` -> finding.
        codes: accepted text -> label code.
        table: for messages.

    Raises:
        UnknownLabelError: a cell holds anything else; names row, column and value.
    """
    for column in findings:
        check_values(frame[column], codes, table, UnknownLabelError)
    made = [
        pl.col(column).replace_strict(dict(codes), return_dtype=pl.Int8).alias(label_column(finding))
        for column, finding in findings.items()
    ]
    return frame.with_columns(made).drop(list(findings))


def unknown_label(name: str, known: Sequence[str], where: str) -> UnknownLabelError:
    """The error for a label that a vocabulary does not have, with the nearest one that it has."""
    near = difflib.get_close_matches(name.casefold(), [other.casefold() for other in known], n=1, cutoff=0.6)
    spelled = next((other for other in known if near and other.casefold() == near[0]), None)
    hint = f" Did they mean {spelled!r}?" if spelled else ""
    listed = f"Known: {', '.join(known)}." if len(known) <= VOCABULARY_SHOWN else f"{len(known)} labels are known."
    return UnknownLabelError(f"{where}: unknown label {name!r}.{hint} {listed}")


def ages(raw: pl.Expr) -> pl.Expr:
    """Years from "58", "58.5", "058Y", "011M", "006W" or "005D"; null where it is no human age (NIH 2017 has 414)."""
    number = raw.str.extract(AGE, 1).cast(pl.Float32)
    a_year = raw.str.extract(AGE, 2).str.to_uppercase().replace_strict(UNITS_A_YEAR, return_dtype=pl.Float32)
    years = number / a_year
    return pl.when(years.is_between(0, 120)).then(years)


def spelled(paths: pl.Series, found: Scan, suffixes: Sequence[str]) -> pl.Series:
    """Listed paths as the files that are there, where these differ by their suffix alone.

    A path that is there is kept. Else the file of the same name with one of `suffixes` (".png", ".dcm"), the first of
    them that there is, in whatever case; else the path comes back as it was, to be reported as missing.
    """
    there = pl.DataFrame({"file": pl.Series(found.files, dtype=pl.String)}).with_columns(
        stem=pl.col("file").str.replace(r"\.[^./]*$", ""),
        rank=pl.col("file").str.extract(r"(\.[^./]*)$", 1).str.to_lowercase().replace_strict(
            list(suffixes), list(range(len(suffixes))), default=None, return_dtype=pl.Int32
        ),
    )  # fmt: skip
    nearest = there.drop_nulls("rank").sort("rank", "file").unique("stem", keep="first", maintain_order=True)
    listed = pl.DataFrame({"path": paths}).with_columns(stem=pl.col("path").str.replace(r"\.[^./]*$", ""))
    matched = listed.join(nearest.select("stem", "file"), on="stem", how="left", maintain_order="left")
    here = pl.col("path").is_in(found.files)
    return (
        matched.select(pl.when(here).then("path").otherwise(pl.coalesce("file", "path"))).to_series().rename(paths.name)
    )


def flags(**conditions: pl.Expr) -> pl.Expr:
    """List of the names whose condition holds, as the manifest's `quality` has it; null where none does."""
    named = [pl.when(condition).then(pl.lit(name)) for name, condition in conditions.items()]
    found = pl.concat_list(named).list.drop_nulls()
    return pl.when(found.list.len() > 0).then(found)


def existing_folder(path: Path, what: str) -> Path:
    """The folder, absolute; raises `PathError` when it is not one."""
    if not Path(path).is_dir():
        raise PathError(f"{path} is not a folder ({what}).")
    return Path(path).resolve()


def check_dataset_name(name: str) -> str:
    """A dataset name that is safe in ids, file names and JSON; raises `ManifestError` otherwise."""
    if not name or not all(letter.isalnum() or letter in "-_." for letter in name) or name.startswith("."):
        raise ManifestError(f"Dataset name {name!r}: use letters, digits, '-', '_' and '.'.")
    return name
