"""Faults planted into phantoms, and a list of what a pipeline must do with each: `faults.csv`.

Its columns: `kind`; `path` of the image or table, relative to the folder; `row` of the table, as in a spreadsheet;
`expected`; `note`. Expected is "quarantine:<reason>" (`hilum build` refuses this image with that reason, and goes on),
"refuse:<error>" (`hilum manifest` makes no manifest, and says why), or "read" (nothing is lost). Faults of the second
sort hide those behind them: plant them one at a time. Which images and rows are hit depends on the seed.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.files import write_text
from hilum.core.seeding import stream
from hilum.data.images import read_image
from hilum.data.phantoms.encoding import encode
from hilum.data.phantoms.layouts.jobs import ImageJob, StudyJob, csv_text

FILE = "faults.csv"


@dataclass(frozen=True)
class Fault:
    """One line of `faults.csv`."""

    kind: str
    path: str
    row: int | None
    expected: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Where a layout says what its images show: a CSV file, a column of labels, a cell that is none, a view column."""

    path: str
    labels: str
    wrong: str
    view: str = ""


TABLES = {
    "brax": Table("master_spreadsheet_update.csv", "Edema", "2", "ViewPosition"),
    "chexpert": Table("CheXpert-v1.0/train.csv", "Edema", "2.0"),
    "chexpert-small": Table("CheXpert-v1.0-small/train.csv", "Edema", "2.0"),
    "cxrlt": Table("cxr-lt-2024/train_labeled.csv", "Edema", "2", "ViewPosition"),
    "cxrlt2023": Table("cxr-lt-2023/train.csv", "Edema", "2", "ViewPosition"),
    "nih": Table("Data_Entry_2017_v2020.csv", "Finding Labels", "Efusion", "View Position"),
    "padchest": Table(
        "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", "Labels", "['cardiomegally']", "Projection"
    ),
    "rsna": Table("stage_2_detailed_class_info.csv", "class", "Lung Opacities"),
    "siim": Table("train-rle.csv", "EncodedPixels", "none"),
}
LISTS = {
    "nih": ("train_val_list.txt", "test_list.txt", "with --split official"),
    "cxrlt": ("cxr-lt-2024/train_labeled.csv", "cxr-lt-2024/test_labeled_task1.csv", ""),
    "cxrlt2023": ("cxr-lt-2023/train.csv", "cxr-lt-2023/test.csv", ""),
}
"""The files of training and test images, and what makes them count."""
BY_NAME = frozenset({"jsrt", "montgomery", "openi", "padchest", "rsna", "shenzhen", "siim"})
"""Layouts whose images are found by name, whatever the case of the suffix; elsewhere a table has the path."""
ONE_EACH = frozenset({"jsrt", "montgomery", "shenzhen"})
"""Layouts without studies of several images."""

UNLISTED = {"vinbigdata": "test/"}
"""Layouts with images that no table lists, and where: nobody would read a fault there."""

ImageFault = Callable[[bytes, ImageJob], bytes | None]


def _cut(content: bytes, image: ImageJob) -> bytes:
    return content[: len(content) * 9 // 10]


def _emptied(content: bytes, image: ImageJob) -> bytes:
    return b""


def _again(form: str, suffixes: Sequence[str]) -> ImageFault:
    """Encode the picture in another form; None where the file is of another kind."""

    def change(content: bytes, image: ImageJob) -> bytes | None:
        if not image.path.lower().endswith(tuple(suffixes)):
            return None
        kind = image.form or "png"
        if kind == form or kind in ("dicom_no_pixels", "png12", "png16"):
            return None
        return encode(form, read_image(content).pixels, image.image_id, dict(image.elements))

    return change


_DICOM = (".dcm", ".dicom")
IMAGE_FAULTS: dict[str, tuple[ImageFault, str]] = {
    "truncated": (_cut, "quarantine:truncated"),
    "zero_bytes": (_emptied, "quarantine:zero_bytes"),
    "sixteen_bit": (_again("png16", (".png",)), "read"),
    "rgba": (_again("png_rgba", (".png",)), "read"),
    "monochrome1": (_again("dicom_monochrome1", _DICOM), "read"),
    "no_transfer_syntax": (_again("dicom_no_syntax", _DICOM), "read"),
    "no_pixel_data": (_again("dicom_no_pixels", _DICOM), "quarantine:no_pixel_data"),
}
"""Kind -> what is done to the bytes of a file, and what is expected."""
READABLE = (*IMAGE_FAULTS, "duplicate", "suffix_in_capitals", "blank_view")
"""Faults that leave a manifest to be made: all of them are planted for `images`."""
REFUSED = ("missing_image", "unknown_label", "missing_column", "patient_in_two_splits")
KINDS = (*READABLE, *REFUSED)


def parse_kinds(text: str) -> tuple[str, ...]:
    """Kinds from a text with commas; `images` stands for all that leave a manifest to be made, "" for none.

    Raises:
        UnknownNameError: no such kind.
    """
    chosen: list[str] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name != "images" and name not in KINDS:
            raise UnknownNameError("kind of fault", name, ("images", *KINDS))
        chosen += READABLE if name == "images" else [name]
    return tuple(dict.fromkeys(chosen))


def plant(folder: Path, layout: str, jobs: Sequence[StudyJob], kinds: Sequence[str], seed: int) -> list[Fault]:
    """Plant one fault of each kind, each in another image, and write `faults.csv`.

    Kinds that the layout cannot have are left out, unless they were all that was asked for.

    Args:
        folder: written phantoms.
        layout: their name in `layouts.LAYOUTS`.
        jobs: what was written.
        kinds: some of `KINDS`.
        seed: of the choice.

    Raises:
        ConfigError: the layout can have none of them, or it has too few images.
    """
    rng = stream(seed, "phantom", "faults", layout)
    unlisted = UNLISTED.get(layout, "\0")
    images = [image for job in jobs for image in job.images if not image.path.startswith(unlisted)]
    order = [images[place] for place in rng.permutation(len(images))]
    planted: list[Fault] = []
    for kind in kinds:
        if kind in IMAGE_FAULTS:
            fault = _image_fault(folder, kind, order)
        elif kind == "duplicate":
            fault = _duplicate(folder, jobs, order)
        elif kind == "suffix_in_capitals":
            fault = _capitals(folder, order) if layout in BY_NAME else None
        elif kind == "missing_image":
            fault = _missing(folder, jobs, order, layout)
        elif kind == "patient_in_two_splits":
            fault = _straddle(folder, layout)
        else:
            fault = _table_fault(folder, kind, layout, rng)
        planted += [fault] if fault else []
    if not planted:
        raise ConfigError(
            f"The layout {layout} of {len(images)} images can have none of these faults: {', '.join(kinds)}."
        )
    rows = [[field.name for field in fields(Fault)], *(["" if v is None else v for v in astuple(f)] for f in planted)]
    write_text(folder / FILE, csv_text(rows))
    return planted


def _image_fault(folder: Path, kind: str, order: list[ImageJob]) -> Fault | None:
    """Spoil the first image that can be, and take it out of `order`, so that no image has two faults."""
    change, expected = IMAGE_FAULTS[kind]
    for place, image in enumerate(order):
        content = (folder / image.path).read_bytes()
        spoilt = None if image.form == "dicom_no_pixels" else change(content, image)
        if spoilt is not None:
            (folder / image.path).write_bytes(spoilt)
            del order[place]
            return Fault(kind, image.path, None, expected)
    return None


def _duplicate(folder: Path, jobs: Sequence[StudyJob], order: list[ImageJob]) -> Fault | None:
    """Put the picture of one patient in the place of another's, of the same kind of file."""
    patient = {image.path: job.subject_id for job in jobs for image in job.images}
    for first in order:
        for second in order:
            if patient[first.path] != patient[second.path] and first.form == second.form:
                (folder / second.path).write_bytes((folder / first.path).read_bytes())
                order.remove(first)
                order.remove(second)
                note = f"the file is also {first.path}; `hilum audit --pixels` finds it"
                return Fault("duplicate", second.path, None, "read", note)
    return None


def _capitals(folder: Path, order: list[ImageJob]) -> Fault | None:
    if not order:
        return None
    path = Path(order.pop(0).path)
    renamed = path.with_suffix(path.suffix.swapcase())
    (folder / path).rename(folder / renamed)
    return Fault("suffix_in_capitals", str(renamed), None, "read")


def _missing(folder: Path, jobs: Sequence[StudyJob], order: list[ImageJob], layout: str) -> Fault | None:
    """Remove an image whose study keeps another."""
    in_company = {image.path for job in jobs if len(job.images) > 1 for image in job.images}
    for place, image in enumerate(order):
        if image.path in in_company or layout in ONE_EACH:
            (folder / image.path).unlink()
            del order[place]
            return Fault("missing_image", image.path, None, "refuse:PathError", "read with --allow-missing")
    return None


def _table_fault(folder: Path, kind: str, layout: str, rng: np.random.Generator) -> Fault | None:
    table = TABLES.get(layout)
    if table is None or (kind == "blank_view" and not table.view):
        return None
    rows = _read(folder / table.path)
    header = [name.strip() for name in rows[0]]
    row = 1 + int(rng.integers(len(rows) - 1))
    if kind == "blank_view":
        rows[row][header.index(table.view)] = ""
        fault = Fault(kind, table.path, row + 1, "read")
    elif kind == "unknown_label":
        rows[row][header.index(table.labels)] = table.wrong
        fault = Fault(kind, table.path, row + 1, "refuse:UnknownLabelError")
    else:
        place = header.index(table.labels)
        rows = [cells[:place] + cells[place + 1 :] for cells in rows]
        fault = Fault(kind, table.path, None, "refuse:MissingColumnError", f"without {table.labels}")
    write_text(folder / table.path, csv_text(rows))
    return fault


def _straddle(folder: Path, layout: str) -> Fault | None:
    """Move an image of a patient who has several from the training file to the test file."""
    if layout not in LISTS:
        return None
    source, target, note = LISTS[layout]
    train, test = _read(folder / source), _read(folder / target)
    listed = Path(source).suffix == ".txt"
    first = 0 if listed else 1
    people = [row[0][:8] if listed else row[train[0].index("subject_id")] for row in train]
    for place in range(first, len(train)):
        if people.count(people[place]) > 1:
            test.append(train.pop(place))
            write_text(folder / source, csv_text(train))
            write_text(folder / target, csv_text(test))
            return Fault("patient_in_two_splits", target, len(test), "refuse:LeakageError", note)
    return None


def _read(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
