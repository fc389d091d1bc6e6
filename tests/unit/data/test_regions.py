"""Regions: what the files say, and how much of them lies in each patch, against other ways of computing it."""

from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest

from hilum.core.errors import ManifestError, MissingColumnError, PathError
from hilum.data.regions import (
    Region,
    area_in_cells,
    distance_of_cells,
    read_regions,
    seen_box,
    sizes_of,
    union,
)
from hilum.data.transforms import evaluation_crop

WHOLE = (0.0, 0.0, 1.0, 1.0)


def of_mask(mask: np.ndarray) -> Region:
    return Region(mask, np.linspace(0, 1, mask.shape[0] + 1), np.linspace(0, 1, mask.shape[1] + 1))


def test_areas_are_means_over_a_fine_raster() -> None:
    """Against counting points: 400 a patch and more, for odd sizes and boxes."""
    rng = np.random.default_rng(0)
    for shape, box, grid in (((37, 53), WHOLE, (4, 5)), ((60, 41), (0.1, 0.07, 0.7, 0.81), (3, 3))):
        mask = cv2.resize(rng.random((5, 6)).astype(np.float32), shape[::-1]) > 0.5
        found = area_in_cells(of_mask(mask), box, grid)
        y = (np.arange(grid[0] * 300) + 0.5) / (grid[0] * 300) * box[2] + box[0]
        x = (np.arange(grid[1] * 300) + 0.5) / (grid[1] * 300) * box[3] + box[1]
        points = mask[(y * shape[0]).astype(int)][:, (x * shape[1]).astype(int)]
        expected = points.reshape(grid[0], 300, grid[1], 300).mean(axis=(1, 3))
        np.testing.assert_allclose(found, expected, atol=6e-3)
        assert found.mean() == pytest.approx(points.mean(), abs=3e-3)


def test_areas_are_those_of_opencv_where_patches_divide_the_pixels() -> None:
    mask = np.random.default_rng(1).random((48, 36)) < 0.3
    expected = cv2.resize(mask.astype(np.float64), (9, 12), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(area_in_cells(of_mask(mask), WHOLE, (12, 9)), expected, atol=1e-9)


def test_boxes_are_exact_and_overlaps_count_once() -> None:
    region = union([[0.1, 0.1, 0.4, 0.6], [0.3, 0.2, 0.5, 0.7], [0.3, 0.2, 0.35, 0.3]])
    area = area_in_cells(region, WHOLE, (7, 3)).mean()
    assert area == pytest.approx(0.3 * 0.5 + 0.2 * 0.5 - 0.1 * 0.4, abs=1e-12)
    assert area_in_cells(union([[0.25, 0.5, 0.5, 0.75]]), WHOLE, (4, 4)).tolist() == [
        [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0],
    ]  # fmt: skip


def test_distances_are_those_of_every_point_of_the_region() -> None:
    mask = np.zeros((40, 30), bool)
    mask[3:5, 20:22] = mask[30:33, 2:9] = True
    box, grid = (0.05, 0.1, 0.9, 0.8), (6, 5)
    found = distance_of_cells(of_mask(mask), box, grid)
    ys, xs = ((np.arange(side * 40) + 0.5) / (side * 40) for side in (40, 30))
    fine = np.repeat(np.repeat(mask, 40, axis=0), 40, axis=1)
    y, x = np.nonzero(fine)
    points = np.stack([(ys[y] - box[0]) / box[2], (xs[x] - box[1]) / box[3]], axis=1)
    points = points[((points >= 0) & (points <= 1)).all(axis=1)]
    for row in range(6):
        for column in range(5):
            centre = np.array([(row + 0.5) / 6, (column + 0.5) / 5])
            expected = np.sqrt(((points - centre) ** 2).sum(axis=1).min())
            assert found[row, column] == pytest.approx(expected, abs=2e-3), (row, column)


def test_what_lies_outside_the_square_is_not_there() -> None:
    region = union([[0.0, 0.0, 0.1, 1.0]])
    box = (0.2, 0.0, 0.6, 1.0)
    assert not area_in_cells(region, box, (4, 4)).any()
    assert np.isinf(distance_of_cells(region, box, (4, 4))).all()


@pytest.mark.parametrize(("rows", "columns", "size"), [(308, 256, 128), (212, 177, 160), (100, 333, 64), (50, 50, 64)])
def test_the_seen_box_is_what_the_crop_keeps(rows: int, columns: int, size: int) -> None:
    """A ramp shows where the crop begins and ends, to a tenth of a pixel of the image."""
    for axis, side in ((0, rows), (1, columns)):
        ramp = np.linspace(0, 250, side)
        picture = np.broadcast_to(ramp[:, None] if axis == 0 else ramp, (rows, columns)).round().astype(np.uint8)
        line = evaluation_crop(np.ascontiguousarray(picture), size).astype(float).mean(axis=1 - axis)
        slope, start = np.polyfit((np.arange(size) + 0.5) / size, line, 1)
        box = seen_box(rows, columns, size)
        per_pixel = 250 / (side - 1)
        assert start / per_pixel + 0.5 == pytest.approx(box[axis] * side, abs=0.75)
        assert slope / per_pixel == pytest.approx(box[axis + 2] * side, abs=1.5)
    assert seen_box(rows, columns, size)[2:] != (0, 0)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_masks_of_phantoms(tmp_path: Path) -> None:
    mask = np.zeros((20, 10), np.uint8)
    mask[5:10, :5] = 255
    cv2.imwrite(str(tmp_path / "m.png"), mask)
    found = read_regions(write(tmp_path / "masks.csv", "image_id,finding,path,area_fraction\na,Mass,m.png,0.125\n"))
    assert (found.kind, len(found), list(found.keys)) == ("phantom masks", 1, [("a", "Mass")])
    assert area_in_cells(found.region("a", "Mass"), WHOLE, (4, 2)).tolist() == [[0, 0], [1, 0], [0, 0], [0, 0]]
    assert found.region("a", "Nodule") is None
    twice = write(tmp_path / "masks.csv", "image_id,finding,path\na,Mass,m.png\na,Mass,m.png\n")
    with pytest.raises(ManifestError, match="Mass of image a has two masks"):
        read_regions(twice)
    outside = write(tmp_path / "masks.csv", "image_id,finding,path\na,Mass,../m.png\n")
    with pytest.raises(PathError, match="outside"):
        read_regions(outside)


NIH = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"


def test_boxes_of_nih_count_in_the_published_pixels(tmp_path: Path) -> None:
    rows = "1_0.png,Infiltrate,256,512,256,128\n1_0.png,Effusion,0,0,1024,512\n1_0.png,Infiltrate,0,0,256,256\n"
    found = read_regions(write(tmp_path / "BBox_List_2017.csv", NIH + rows))
    assert found.kind == "NIH boxes"
    assert set(found.keys) == {("1_0.png", "Infiltration"), ("1_0.png", "Pleural Effusion")}
    cells = area_in_cells(found.region("1_0.png", "Infiltration"), WHOLE, (4, 4))
    assert cells.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0, 0]]
    (tmp_path / "phantom.json").write_text("{}")  # drawn patients have pictures of another size
    half = read_regions(tmp_path / "BBox_List_2017.csv", {"1_0.png": (2048, 2048)})
    assert half.region("1_0.png", "Pleural Effusion").rows.tolist() == [0, 0.25]


def test_boxes_of_vindr_are_the_union_of_readers_in_the_images_own_pixels(tmp_path: Path) -> None:
    text = (
        "image_id,rad_id,class_name,x_min,y_min,x_max,y_max\n"
        "a,R1,Clavicle fracture,0,0,50,100\na,R2,Clavicle fracture,50,0,100,100\na,R3,No finding,,,,\n"
        "a,R1,Nodule/Mass,0,0,5,5\nb,R1,Cardiomegaly,0,0,5,5\n"
    )
    path = write(tmp_path / "annotations_train.csv", text)
    found = read_regions(path, {"a": (400, 200)})
    assert set(found.keys) == {("a", "Clavicle Fracture"), ("a", "Fracture")}
    region = found.region("a", "Fracture")
    assert area_in_cells(region, WHOLE, (4, 2)).tolist() == [[1, 0], [0, 0], [0, 0], [0, 0]]
    assert found.left_out == {
        "label Nodule/Mass: no one finding": 1,
        "image not among those judged, or its id is that of two": 1,
    }
    with pytest.raises(ManifestError, match="sizes are not known"):
        read_regions(path)


def test_sizes_of_an_id_that_two_datasets_have_are_not_known(tmp_path: Path) -> None:
    pl.DataFrame({
        "image_id": ["a", "b", "b", "c", "c"], "rows": [4, 5, 6, 7, 7], "cols": [1, 2, 2, 3, 3],
    }).write_parquet(tmp_path / "manifest.parquet")  # fmt: skip
    assert sizes_of(tmp_path) == {"a": (4, 1), "c": (7, 3)}


def test_boxes_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path / "b.csv", "image_id,finding,x_min,y_min,x_max,y_max\na,My finding,0,10,20,20\n")
    found = read_regions(path, {"a": (20, 20)})
    assert area_in_cells(found.region("a", "My finding"), WHOLE, (2, 1)).tolist() == [[0], [1]]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("a,b\n1,2\n", MissingColumnError, "expected image_id, finding and path"),
        (NIH + "1_0.png,Mass,1,2,0,4\n", ManifestError, "no boxes"),
        (NIH + "1_0.png,Mass,1,two,3,4\n", ManifestError, r"box 1 \(image 1_0.png\): .*four numbers"),
        (NIH + "1_0.png,Lump,1,2,3,4\n", ManifestError, "no finding of NIH's boxes"),
        ("image_id,finding,x_min,y_min,x_max,y_max\na,M,30,1,40,5\n", ManifestError, "outside its 20 x 20 pixels"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_regions(write(tmp_path / "r.csv", text), {"a": (20, 20)})
