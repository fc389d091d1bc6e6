"""Where a finding truly is: masks and boxes of several sources, and how much of them lies in each patch that was seen.

Read are the masks of phantoms (`masks.csv`), NIH's `BBox_List_2017.csv`, the boxes of VinDr-CXR and VinBigData, and a
table of boxes of one's own. A region is a mask on lines at given shares of the image's height and width, so that pixels
and boxes are the same thing and nothing is rounded to a raster. Labels become findings by the sources' own tables; a
label that means no one finding ("Nodule/Mass") gives no region. Judges nothing: `evaluation/localisation.py`. Past
300 lines: one reader for each source.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Float64

from hilum.core.errors import ManifestError, MissingColumnError, PathError
from hilum.data.area import shrunk_size
from hilum.data.images import read_image
from hilum.data.label_maps import load_map
from hilum.data.sources.nih import BOX_COLUMNS, BOXED
from hilum.data.tables import Table, read_csv, require

NIH_SIDE = 1024
"""Pixels of the published images of NIH, which its boxes count in."""
CORNERS = ("x_min", "y_min", "x_max", "y_max")
Box = tuple[float, float, float, float]
"""Top, left, height, width, as shares of an image's sides."""
Sizes = Mapping[str, tuple[int, int]]
"""image_id -> rows and columns of the image as its source published it."""
Key = tuple[str, str]
"""image_id, finding."""


class Region(NamedTuple):
    """One finding in one image: the cells of a grid of lines that it takes."""

    mask: Bool[np.ndarray, "R K"]
    rows: Float64[np.ndarray, " R1"]
    """R + 1 lines as shares of the image's height, ascending."""
    columns: Float64[np.ndarray, " K1"]
    """K + 1 lines as shares of its width."""


@dataclass(frozen=True)
class Regions:
    """The regions of a file; those of masks are read when they are asked for."""

    source: str
    """The file's name."""
    kind: str
    """What was recognised: "phantom masks", "NIH boxes", "VinDr boxes" or "boxes"."""
    sha256: str
    left_out: Mapping[str, int]
    """What the file has and this does not, with the reason, and how often."""
    _readers: Mapping[Key, Callable[[], Region]] = field(repr=False)

    def __len__(self) -> int:
        return len(self._readers)

    @property
    def keys(self) -> Collection[Key]:
        """What there are regions of: (image_id, finding)."""
        return self._readers.keys()

    def region(self, image_id: str, finding: str) -> Region | None:
        """One of them, or None.

        Raises:
            ImageError: a mask cannot be read.
        """
        reader = self._readers.get((image_id, finding))
        return None if reader is None else reader()


def read_regions(path: Path, sizes: Sizes | None = None) -> Regions:
    """Read a file of regions; its kind is told by its columns.

    Args:
        path: `masks.csv` (image_id, finding, path), `BBox_List_2017.csv`, VinDr's `annotations_test.csv` or
            `annotations_train.csv`, VinBigData's `train.csv` (class_name, x_min, y_min, x_max, y_max), or boxes of
            one's own (image_id, finding, x_min, y_min, x_max, y_max), in pixels of the published image.
        sizes: of the published images; needed for boxes, but for those of NIH, which count in 1,024 pixels.

    Raises:
        PathError: no such file, or a mask outside its folder.
        MissingColumnError: none of these kinds.
        ManifestError: a row that is no box, or boxes of images whose size is not known.
    """
    path = Path(path)
    table = read_csv(path)
    columns = set(table.columns)
    if {"image_id", "finding", "path"} <= columns:
        return _masks(table)
    if {"Image Index", "Finding Label"} <= columns:
        return _nih(table, sizes)
    if {"image_id", "class_name", *CORNERS} <= columns:
        return _vindr(table, sizes)
    if {"image_id", "finding", *CORNERS} <= columns:
        frame = table.frame.filter(pl.col("x_min") != "")
        pairs = [(finding,) for finding in frame["finding"].to_list()]
        return _boxes(table, "boxes", frame, pairs, _corners(frame, table.path), sizes, Counter())
    raise MissingColumnError(
        f"{path}: expected image_id, finding and path (masks), the columns of NIH's BBox_List_2017.csv or VinDr's "
        f"annotations, or image_id, finding, {', '.join(CORNERS)}; found {', '.join(table.columns)}."
    )


def _masks(table: Table) -> Regions:
    folder = table.path.parent
    readers: dict[Key, Callable[[], Region]] = {}
    for image, finding, name in table.frame.select("image_id", "finding", "path").iter_rows():
        if (image, finding) in readers:
            raise ManifestError(f"{table.path}: {finding} of image {image} has two masks; put them into one.")
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise PathError(f"{table.path}: the mask {name!r} lies outside the folder of the table.")
        readers[image, finding] = _mask_reader(path)
    return Regions(table.path.name, "phantom masks", table.sha256, {}, readers)


def _mask_reader(path: Path) -> Callable[[], Region]:
    def read() -> Region:
        mask = read_image(path).pixels > 127
        return Region(mask, np.linspace(0, 1, mask.shape[0] + 1), np.linspace(0, 1, mask.shape[1] + 1))

    return read


def _nih(table: Table, sizes: Sizes | None) -> Regions:
    require(table.columns, BOX_COLUMNS, table.path)
    frame = table.frame.rename({"Image Index": "image_id"})
    findings = {row.label: row.finding for row in load_map("nih").rows if row.present == "1"}
    edges = _numbers(frame, BOX_COLUMNS, table.path)
    corners = np.concatenate([edges[:, :2], edges[:, :2] + edges[:, 2:]], axis=1)
    _check(corners, table.path)
    unknown = [word for word in frame["Finding Label"].to_list() if word not in BOXED]
    if unknown:
        raise ManifestError(f"{table.path}: {unknown[0]!r} is no finding of NIH's boxes: {', '.join(BOXED)}.")
    pairs = [(findings[BOXED[word]],) for word in frame["Finding Label"].to_list()]
    drawn = (table.path.parent / "phantom.json").is_file()  # phantoms in this layout count in their own pixels
    side = None if drawn else dict.fromkeys(frame["image_id"].to_list(), (NIH_SIDE, NIH_SIDE))
    return _boxes(table, "NIH boxes", frame, pairs, corners, sizes if drawn else side, Counter())


def _vindr(table: Table, sizes: Sizes | None) -> Regions:
    frame = table.frame.filter(pl.col("x_min") != "")  # "No finding" has none
    meaning: dict[str, list[str]] = {}
    for row in load_map("vindr").rows:
        meaning.setdefault(row.label.casefold(), [])
        if row.present == "1" and row.tier == "strict":
            meaning[row.label.casefold()].append(row.finding)
    words = [word.casefold() for word in frame["class_name"].to_list()]
    left_out = Counter(f"label {name}: no one finding" for name, word in
                       zip(frame["class_name"].to_list(), words, strict=True) if not meaning.get(word))  # fmt: skip
    pairs = [tuple(meaning.get(word, ())) for word in words]
    return _boxes(table, "VinDr boxes", frame, pairs, _corners(frame, table.path), sizes, left_out)


def _corners(frame: pl.DataFrame, path: Path) -> Float[np.ndarray, "N 4"]:
    corners = _numbers(frame, CORNERS, path)
    _check(corners, path)
    return corners


def _numbers(frame: pl.DataFrame, names: tuple[str, ...], path: Path) -> Float[np.ndarray, "N 4"]:
    values = frame.select(pl.col(names).cast(pl.Float64, strict=False))
    bad = values.select(pl.any_horizontal(pl.all().is_null() | ~pl.all().is_finite()))[:, 0]
    if bad.any():
        row = int(bad.arg_max() or 0)
        image = frame["image_id"][row]
        raise ManifestError(f"{path}, box {row + 1} (image {image}): {', '.join(names)} are not four numbers.")
    return values.to_numpy()


def _check(corners: Float[np.ndarray, "N 4"], path: Path) -> None:
    bad = (corners[:, :2] < 0).any(axis=1) | (corners[:, 2:] <= corners[:, :2]).any(axis=1)
    if bad.any():
        box = corners[int(bad.argmax())].tolist()
        raise ManifestError(f"{path}: {int(bad.sum())} rows are no boxes, the first {box}: left, top, right, bottom.")


def _boxes(
    table: Table,
    kind: str,
    frame: pl.DataFrame,
    findings: Sequence[tuple[str, ...]],
    corners: Float[np.ndarray, "N 4"],
    sizes: Sizes | None,
    left_out: Counter[str],
) -> Regions:
    """Regions of boxes: the union of those of one finding in one image, of all readers."""
    if sizes is None:
        raise ManifestError(
            f"{table.path} counts in pixels of the published images, whose sizes are not known here. Give a store with "
            "its manifest, or a manifest, that has their rows and cols."
        )
    grouped: dict[Key, list[list[float]]] = {}
    for image, names, (left, top, right, bottom) in zip(
        frame["image_id"].to_list(), findings, corners.tolist(), strict=True
    ):
        if image not in sizes:
            left_out["image not among those judged, or its id is that of two"] += len(names)
            continue
        rows, columns = sizes[image]
        shares = [top / rows, left / columns, min(bottom / rows, 1.0), min(right / columns, 1.0)]
        if shares[0] >= 1 or shares[1] >= 1:
            raise ManifestError(
                f"{table.path}: a box of image {image} lies outside its {rows} x {columns} pixels. Is it counted in "
                "pixels of the published image?"
            )
        for name in names:
            grouped.setdefault((image, name), []).append(shares)
    readers = {key: partial(union, boxes) for key, boxes in grouped.items()}
    return Regions(table.path.name, kind, table.sha256, dict(left_out), readers)


def union(boxes: list[list[float]]) -> Region:
    """The union of boxes (top, left, bottom, right, as shares), on the lines of their edges: exact."""
    edges = np.asarray(boxes, np.float64)
    rows, columns = np.unique(edges[:, [0, 2]]), np.unique(edges[:, [1, 3]])
    mask = np.zeros((len(rows) - 1, len(columns) - 1), bool)
    for top, left, bottom, right in edges:
        mask |= ((rows[:-1] >= top) & (rows[1:] <= bottom))[:, None] & ((columns[:-1] >= left) & (columns[1:] <= right))
    return Region(mask, rows, columns)


def seen_box(rows: int, columns: int, size: int, short_side: int | None = None) -> Box:
    """The part of an image that `transforms.evaluation_crop` keeps, exactly, after its store's shrinking.

    Args:
        rows: of the image.
        columns: of the image.
        size: of the square that the network sees, pixels.
        short_side: of the store; None: the image as it is.
    """
    rows, columns = shrunk_size((rows, columns), short_side)
    short = min(rows, columns)
    height, width = max(round(rows * size / short), size), max(round(columns * size / short), size)
    return (height - size) // 2 / height, (width - size) // 2 / width, size / height, size / width


def _within(region: Region, box: Box) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The region in the box: mask, row lines and column lines in 0 .. 1 of the box, without what lies outside."""
    top, left, height, width = box
    rows = np.clip((region.rows - top) / height, 0, 1)
    columns = np.clip((region.columns - left) / width, 0, 1)
    keep_rows, keep_columns = np.flatnonzero(np.diff(rows) > 0), np.flatnonzero(np.diff(columns) > 0)
    if not len(keep_rows) or not len(keep_columns):
        return np.zeros((0, 0), bool), np.zeros(1), np.zeros(1)
    mask = region.mask[keep_rows[0] : keep_rows[-1] + 1, keep_columns[0] : keep_columns[-1] + 1]
    return mask, rows[keep_rows[0] : keep_rows[-1] + 2], columns[keep_columns[0] : keep_columns[-1] + 2]


def area_in_cells(region: Region, box: Box, grid: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """The share of each patch that the region takes, by area, without rounding.

    Args:
        region: in shares of the image.
        box: the part of the image that the patches divide.
        grid: rows and columns of patches.
    """
    mask, rows, columns = _within(region, box)
    if not mask.size:
        return np.zeros(grid)
    return _overlap(rows, grid[0]) @ mask.astype(np.float64) @ _overlap(columns, grid[1]).T


def _overlap(lines: Float[np.ndarray, " L"], cells: int) -> Float[np.ndarray, "cells _"]:
    """How much of each of `cells` even parts of 0 .. 1 lies between each two lines, as a share of the part."""
    edges = np.arange(cells + 1) / cells
    low = np.maximum(edges[:-1, None], lines[None, :-1])
    high = np.minimum(edges[1:, None], lines[None, 1:])
    return np.maximum(high - low, 0) * cells


def distance_of_cells(region: Region, box: Box, grid: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """How far the centre of each patch is from the region, in sides of the box; 0 inside, infinite without a region."""
    mask, rows, columns = _within(region, box)
    if not mask.any():
        return np.full(grid, np.inf)
    down = _apart(rows, grid[0])  # h R
    across = _apart(columns, grid[1])  # w K
    nearest = np.full((grid[1], len(mask)), np.inf)  # for each column of patches, in each row of the mask
    for row, line in enumerate(mask):
        if line.any():
            nearest[:, row] = across[:, line].min(axis=1)
    return np.sqrt(np.min(down[:, None, :] ** 2 + nearest[None] ** 2, axis=2))


def _apart(lines: Float[np.ndarray, " L"], cells: int) -> Float[np.ndarray, "cells _"]:
    """Distance from the middle of each cell to each interval between lines."""
    middle = (np.arange(cells) + 0.5) / cells
    return np.maximum(np.maximum(lines[None, :-1] - middle[:, None], middle[:, None] - lines[None, 1:]), 0)


def sizes_of(labels: Path) -> Sizes | None:
    """Rows and columns of the published images, from a manifest or a store's copy of it; None where there is none.

    Ids of images of different sizes in several datasets are left out: a table of boxes does not say whose it is.
    """
    path = labels / "manifest.parquet" if labels.is_dir() else labels
    if path.suffix != ".parquet" or not path.is_file():
        return None
    try:
        frame = pl.read_parquet(path, columns=["image_id", "rows", "cols"]).drop_nulls()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ManifestError(f"{path} cannot be read ({error}).") from error
    known = frame.unique()
    known = known.filter(known["image_id"].is_unique())
    return {image: (rows, columns) for image, rows, columns in known.iter_rows()}
