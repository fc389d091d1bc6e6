"""What people give to `hilum predict`: files, folders, tables of paths, a split of a store -> a list of images.

DICOM headers are read for their study and view; pixels only by whom `Inputs.reader` is handed to. Files that cannot be
used are listed with a reason and the rest goes on: every file is an image, refused, or a repeat of one.
A little past 300 lines: one way from texts to images, and what tells whether they are still the same.
"""

import csv
import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hilum.core.errors import ConfigError, ImageError, MissingColumnError, UnknownNameError
from hilum.core.tracking import warn
from hilum.core.types import LOOSE_FILES, SPLITS, VIEWS, image_uid
from hilum.data.images import kind_of, read_dicom_header, read_image
from hilum.data.store import Store

STUDY_COLUMN = "study_id"
TABLES = (".csv", ".parquet")
SUFFIXES = frozenset({".dcm", ".dicom", ".png", ".jpg", ".jpeg"})
"""What is taken from a folder, upper or lower case. A file without a suffix, or whose suffix is a number (an UID as a
name), is taken when its content is an image."""
HEADER_BYTES = 4096


@dataclass(frozen=True)
class FileImage:
    """One image file to predict."""

    path: Path
    image_id: str
    """SOP instance UID, or the path as given (within its folder)."""
    study: str
    patient: str
    view: str
    view_source: str = "unknown"
    """Where the view is known from: given (a table), header or unknown."""

    @property
    def uid(self) -> str:
        """Identity in a prediction table."""
        return image_uid(LOOSE_FILES, self.image_id)


@dataclass(frozen=True)
class Refused:
    """One input that was left out."""

    path: Path
    reason: str
    """Short code, as in `ImageError`."""
    message: str


@dataclass
class Inputs:
    """Everything to predict: images of files, or a part of a store."""

    images: list[FileImage] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    repeated: int = 0
    """How often a file was given again."""
    store: Store | None = None
    split: str = ""
    """Of the store; empty where all of it was asked for, and of files."""
    indices: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def files(self) -> int:
        """Everything that was given: images, what was refused, and repeats."""
        return len(self.images) + len(self.refused) + self.repeated

    def reader(self, short_side: int | None, recipe: str) -> Callable[[int], np.ndarray | None]:
        """What decodes the image of a number, uint8 (H, W), from any thread; None, and it is listed, where it cannot.

        Args:
            short_side: shrink to it, pixels; None: the size stays.
            recipe: one of `intensity.RECIPES`.
        """
        lock = threading.Lock()

        def read(index: int) -> np.ndarray | None:
            path = self.images[index].path
            try:
                return read_image(path, path.name, short_side, recipe=recipe).pixels
            except ImageError as error:
                with lock:
                    self.refused.append(Refused(path, error.reason, str(error)))
                return None

        return read

    def refused_of(self, job: int, jobs: int) -> list[Refused]:
        """What was refused, as one of several jobs lists it: every one is listed by one job."""
        return [one for one in self.refused if zlib.crc32(os.fsencode(one.path)) % jobs == job]

    @property
    def view_sources(self) -> np.ndarray:
        """(N,) where each view is known from; those of a store are given."""
        stored = np.full(len(self.indices), "given")
        return stored if self.store else np.array([one.view_source for one in self.images], dtype=str)

    @property
    def places(self) -> list[Any]:
        """(N) of each image, its file, or its index in the store."""
        return self.indices.tolist() if self.store else [one.path for one in self.images]

    def identity(self) -> dict[str, np.ndarray]:
        """Identity columns of the images of files."""
        rows = [(one.uid, one.image_id, one.study, one.patient, LOOSE_FILES, one.view) for one in self.images]
        names = ("image_uid", "image_id", "study_id", "patient_id", "dataset", "view")
        return {name: np.array([row[place] for row in rows], dtype=str) for place, name in enumerate(names)}


def fingerprint(places: Iterable[Any], store: Store | None = None) -> str:
    """SHA-256 that changes when another image takes the place of one of these: what was made of them holds no longer.

    Args:
        places: of each image, its file, or its index in the store. Of a file count path, size and time of change.
        store: where the images are in one; of its records count uid and checksum.
    """
    digest = hashlib.sha256()
    for place in places:
        if store is not None:
            digest.update(f"{store.uids[place]} {store.checksums[place]}\x1e".encode())
            continue
        path = os.path.abspath(place)  # noqa: PTH100 (as below)
        try:
            status = Path(path).stat()
            told = f"{status.st_size}\x1f{status.st_mtime_ns}"
        except OSError:
            told = "gone"
        digest.update(os.fsencode(path) + f"\x1f{told}\x1e".encode())
    return digest.hexdigest()


def resolve(inputs: list[str], study_column: str | None = None) -> Inputs:
    """Find the images that the given texts stand for.

    Args:
        inputs: files, folders (searched to the bottom), CSV or Parquet files with a column `path` (and `study_id`,
            `patient_id`, `view`), or one "STORE:split".
        study_column: the column of tables that says which images form a study, in place of `study_id`.

    Raises:
        ConfigError: nothing there, an empty folder, no image among the inputs, a store beside other inputs, or a study
            column without a table.
        UnknownNameError: a split that does not exist.
        MissingColumnError: a table without `path`, or without the study column that was named.
    """
    if not inputs:
        raise ConfigError("Nothing to predict: name files, folders, a table of paths, or STORE:split.")
    if study_column is not None and not any(Path(text).suffix.lower() in TABLES for text in inputs):
        raise ConfigError(
            f"--study-column {study_column}: no CSV or Parquet table is among the inputs. DICOM files are grouped by "
            "their StudyInstanceUID; list other files in a table."
        )
    result = Inputs()
    for text in inputs:
        folder, split = _store_and_split(text)
        if folder is not None:
            if len(inputs) > 1:
                raise ConfigError(f"{text} is a part of a store and is predicted alone; found {len(inputs)} inputs.")
            result.store = Store.open(folder)
            result.indices, result.split = result.store.indices(split), split
            if not len(result.indices):
                raise ConfigError(f"{folder} has no images of split {split!r}.")
            return result
        _add(result, Path(text), study_column)
    _drop_repeats(result)
    return result


def refuse_overwriting(written: Iterable[Path], given: Iterable[str]) -> None:
    """Refuse to write over what is read.

    Args:
        written: files that will be written or removed.
        given: inputs, as `resolve` takes them.

    Raises:
        ConfigError: one of the former is one of the latter.
    """
    read = {Path(text).resolve() for text in given}
    for path in written:
        if path.resolve() in read:
            raise ConfigError(f"{path} is an input and would be written over. Choose another --out.")


def _drop_repeats(result: Inputs) -> None:
    """A file given twice is one image; another file under the same id is refused, never left out in silence."""
    kept: dict[str, FileImage] = {}
    paths: set[str] = set()
    for image in result.images:
        path = os.path.abspath(image.path)  # noqa: PTH100 (twice as fast, and there may be a million)
        first = kept.get(image.uid)
        if path in paths or (first is not None and first.path.resolve() == image.path.resolve()):
            result.repeated += 1
        elif first is not None:
            message = f"{image.path.name}: another input has the same id. Leave one out, or name a folder above both."
            result.refused.append(Refused(image.path, "repeated_id", message))
        else:
            kept[image.uid] = image
            paths.add(path)
    result.images = list(kept.values())


def _store_and_split(text: str) -> tuple[Path | None, str]:
    name, colon, split = text.rpartition(":")
    if colon and (Path(name) / "store.json").is_file():
        if split not in SPLITS or not split:
            raise UnknownNameError("split", split, [known for known in SPLITS if known])
        return Path(name), split
    if (Path(text) / "store.json").is_file():
        raise ConfigError(f"{text} is a store: say which split, for example {text}:test.")
    return None, ""


def _add(result: Inputs, path: Path, study_column: str | None) -> None:
    if path.is_dir():
        found = [file for file in _files(path) if _is_wanted(file)]
        if not found:
            raise ConfigError(f"{path} holds no DICOM, PNG or JPEG file.")
        for file in found:
            _add_file(result, file, file.relative_to(path).as_posix())
    elif path.suffix.lower() in TABLES and path.is_file():
        _add_table(result, path, study_column)
    elif path.is_file():
        _add_file(result, path, path.as_posix())
    else:
        raise ConfigError(f"{path} does not exist; expected a file, a folder, a table of paths, or STORE:split.")


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _is_wanted(path: Path) -> bool:
    nameless = not path.suffix or path.suffix[1:].isdigit()
    return _kind(path) != "" if nameless else path.suffix.lower() in SUFFIXES


def _kind(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return kind_of(file.read(HEADER_BYTES))
    except (ImageError, OSError):
        return ""


def _add_file(result: Inputs, path: Path, name: str, study: str = "", patient: str = "", view: str = "UNKNOWN") -> None:
    """One file; DICOM says its own study and patient where the caller did not. Damaged headers wait for decoding."""
    written = os.fsencode(path).decode("utf-8", "backslashreplace")
    if written != str(path):  # no table can hold it
        result.refused.append(Refused(Path(written), "bad_name", f"{written}: the name is not UTF-8. Rename the file."))
        return
    image_id, source = name, "unknown" if view == "UNKNOWN" else "given"
    if _kind(path) == "dicom":
        try:
            header = read_dicom_header(path)
        except ImageError as error:
            result.refused.append(Refused(path, error.reason, str(error)))
            return
        image_id = header["SOPInstanceUID"] or name
        study = study or header["StudyInstanceUID"]
        patient = patient or header["PatientID"]
        position = header["ViewPosition"].upper()
        if source == "unknown" and position in VIEWS and position != "UNKNOWN":
            view, source = position, "header"
    study = study or image_id
    result.images.append(FileImage(path, image_id, study, patient or study, view, source))


def _add_table(result: Inputs, path: Path, study_column: str | None) -> None:
    rows, columns = (_read_csv if path.suffix.lower() == ".csv" else _read_parquet)(path)
    study = study_column or STUDY_COLUMN
    _refuse_misspelt(path, columns, ("path", study, "patient_id", "view"))
    if "path" not in columns:
        hint = " It is a manifest: build a store of it, and predict STORE:split." * ("source_relpath" in columns)
        raise MissingColumnError(f"{path}: expected a column 'path'; found {', '.join(columns) or 'no header'}.{hint}")
    if study_column is not None and study_column not in columns:
        raise MissingColumnError(f"{path}: expected the column {study_column!r}; found {', '.join(columns)}.")
    if not rows:
        raise ConfigError(f"{path} lists no images.")
    unknown: set[str] = set()
    for row in rows:
        values = {name: _text(row.get(name)) for name in ("path", study, "patient_id", "view")}
        listed = path.parent / values["path"]
        if not values["path"] or not listed.is_file():
            result.refused.append(Refused(listed, "missing", f"{path}: no file {values['path']!r}."))
            continue
        view = values["view"].upper() or "UNKNOWN"
        if view not in VIEWS:
            unknown.add(view)
            view = "UNKNOWN"
        _add_file(result, listed, values["path"], values[study], values["patient_id"], view)
    if unknown:
        warn(f"{path}: {len(unknown)} names of views are not known and count as none; known are {', '.join(VIEWS)}")


def _refuse_misspelt(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a column that differs from a wanted one by no letter: left out, it would take studies apart in silence."""

    def bare(name: str) -> str:
        return "".join(letter for letter in name.casefold() if letter.isalnum())

    for name in wanted:
        for column in columns:
            if name not in columns and bare(column) == bare(name):
                raise MissingColumnError(f"{path}: expected the column {name!r}, found {column!r}. Rename it.")


def _text(value: object) -> str:
    """A cell as text; a whole number of a column that has gaps is one all the same."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _read_csv(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            return list(reader), list(reader.fieldnames)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as a CSV: {error}.") from error


def _read_parquet(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    import polars as pl  # only where there is a Parquet table

    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as Parquet: {error}.") from error
    return frame.to_dicts(), frame.columns
