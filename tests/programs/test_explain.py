"""`hilum explain`: pictures of studies, maps of a split, and their judgement by `hilum evaluate`."""

import csv
import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from fit_stores import DECODER, SMALL
from PIL import Image

from hilum.commands import build, combine_models, evaluate, explain, fit, manifest, predict
from hilum.core.config import override
from hilum.core.errors import ConfigError, EmptyStudyError, UnknownNameError
from hilum.data.phantoms.writing import write_phantoms
from hilum.data.regions import area_in_cells, read_regions, sizes_of
from hilum.data.store import Store, write_arrays
from hilum.deploy.admission import Admission, Gate
from hilum.deploy.predictor import Model, load
from hilum.deploy.store_maps import store_maps
from hilum.evaluation.map_files import read_maps
from hilum.evaluation.study_rules import StudyRule

FINDINGS = ("Edema", "Mass")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A store whose Edema is a bright upper left quarter, its masks, and three models."""
    path = tmp_path_factory.mktemp("explain")
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 2)) < 0.5).astype(np.int8)
    images, rows = [], []
    (path / "masks").mkdir()
    for number, (edema, mass) in enumerate(labels.tolist()):
        pixels = rng.integers(0, 60, (36, 32), np.uint8)
        mask = np.zeros((36, 32), np.uint8)
        if edema:
            pixels[2:18, :16] += 120
            mask[2:18, :16] = 255
        images.append(pixels)
        for name, there, part in (("Edema", edema, mask), ("Mass", mass, 255 - mask)):
            if there:
                cv2.imwrite(str(path / "masks" / f"{number}_{name}.png"), part)
                rows.append(f"{number:06d},{name},masks/{number}_{name}.png")
    (path / "masks.csv").write_text("\n".join(["image_id,finding,path", *rows]) + "\n")
    write_arrays(
        path / "store", images, labels, FINDINGS, splits=["train"] * 32 + ["val"] * 12 + ["test"] * 16,
        studies=[f"arrays/s{n // 2}" for n in range(60)], patients=[f"arrays/p{n // 4}" for n in range(60)],
        views=["PA", "LATERAL"] * 30,
    )  # fmt: skip
    quick = ["search_epochs=1", "refit_epochs=1", "learning_rates=[0.01]", "blocks=1", "resolution=32",
             "augmented_views=1"]  # fmt: skip
    for name, config in (
        ("linear", override(SMALL, ["patch_mean=true", *quick])),
        ("study", override(DECODER, ["views=memory", *quick])),
        ("decoder", override(DECODER, quick)),
    ):
        fit.run(config, path / "store", "random:demo8", path / name, device="cpu")
    combine_models.run([path / "decoder", path / "study"], path / "ensemble")
    return path


def write_pictures(folder: Path, out: Path, numbers: list[int]) -> list[str]:
    store = Store.open(folder / "store")
    out.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        cv2.imwrite(str(out / f"{number}.png"), store.read(number))
    return [str(out / f"{number}.png") for number in numbers]


def read_index(out: Path) -> list[dict[str, str]]:
    with (out / "index.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["linear", "study"])
def test_a_study_becomes_an_overlay_for_each_finding_and_view_and_a_sheet(folder: Path, tmp_path: Path, name) -> None:
    files = write_pictures(folder, tmp_path / "in", [44, 45])
    explain.run(folder / name, files, tmp_path / "out", ["Mass", "Edema"], together=True, device="cpu")
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [
        "Edema_1_UNKNOWN.png", "Edema_2_UNKNOWN.png", "Mass_1_UNKNOWN.png", "Mass_2_UNKNOWN.png",
        "image_1_UNKNOWN.png", "image_2_UNKNOWN.png", "index.csv", "sheet.png",
    ]  # fmt: skip
    plain = np.asarray(Image.open(tmp_path / "out" / "image_1_UNKNOWN.png").convert("RGB")).astype(int)
    mixed = np.asarray(Image.open(tmp_path / "out" / "Edema_1_UNKNOWN.png")).astype(int)
    assert plain.shape == mixed.shape == (36, 32, 3)
    assert not (plain - mixed)[:2].any()  # outside the square that was seen
    assert (plain - mixed)[2:34].any()
    result = load(folder / name, "cpu").predict(files)
    lines = [row for row in read_index(tmp_path / "out") if row["finding"] == "Edema"]
    assert [float(row["probability"]) for row in lines] == pytest.approx([result.probabilities["Edema"]] * 2)
    assert [float(row["contribution"]) for row in lines] == pytest.approx(result.contributions["Edema"])
    assert sum(result.contributions["Edema"]) == pytest.approx(1)
    assert [row["file"] for row in lines] == files


def test_without_names_the_findings_above_their_threshold_are_shown(folder: Path, tmp_path: Path, capsys) -> None:
    model = load(folder / "linear", "cpu")
    files = write_pictures(folder, tmp_path / "in", list(range(44, 49)))
    explain.run(folder / "linear", files, tmp_path / "out", device="cpu")
    shown = {(int(row["study"]), row["finding"]) for row in read_index(tmp_path / "out") if row["finding"]}
    expected = set()
    for number, file in enumerate(files, 1):
        result = model.predict(file)
        for name in FINDINGS:
            if result.probabilities[name] > result.thresholds[name]["f1"]:
                expected.add((number, name))
    assert shown == expected
    assert len(list((tmp_path / "out").glob("study_*"))) == 5
    assert "5 contact sheets of 5 studies" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_is_left_out_and_named(folder: Path, tmp_path: Path, capsys) -> None:
    files = write_pictures(folder, tmp_path / "in", [44])
    (tmp_path / "in" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n123")
    explain.run(folder / "linear", [*files, str(tmp_path / "in" / "bad.png")], tmp_path / "out", ["Mass"], device="cpu")
    assert "left out" in capsys.readouterr().err
    assert (tmp_path / "out" / "study_1" / "Mass_1_UNKNOWN.png").is_file()
    with pytest.raises(EmptyStudyError, match="None of 1 inputs"):
        explain.run(folder / "linear", [str(tmp_path / "in" / "bad.png")], tmp_path / "none", ["Mass"], device="cpu")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"out": "o", "maps": "m.npz"}, ConfigError, "Say --out FOLDER"),
        ({}, ConfigError, "Say --out FOLDER"),
        ({"maps": "m.csv"}, ConfigError, "ends in .npz"),
        ({"maps": "m.npz", "together": True}, ConfigError, "--together makes one study of files"),
        ({"out": "o", "regions": "r.csv"}, ConfigError, "goes with --maps"),
        ({"out": "o", "threshold": "best"}, UnknownNameError, "threshold"),
        ({"out": "o", "findings": ["Oedema"]}, UnknownNameError, "Did you mean 'Edema'"),
        ({"maps": "m.npz"}, ConfigError, "Maps of a whole split go to one file"),
    ],
)
def test_options_that_do_not_go_together_are_refused(folder: Path, tmp_path: Path, options, error, message) -> None:
    files = write_pictures(folder, tmp_path / "in", [44])
    paths = {name: tmp_path / value if name in ("out", "maps", "regions") else value for name, value in options.items()}
    with pytest.raises(error, match=message):
        explain.run(folder / "linear", files, device="cpu", **paths)


def test_pictures_are_called_by_the_views_that_were_recognised_and_never_written_over(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    assert explain._file_names(["Pleural Effusion", "A/B", "A B", "肺炎", "結核"]) == {
        "Pleural Effusion": "Pleural_Effusion", "A/B": "A_B", "A B": "A_B_no2", "肺炎": "finding",
        "結核": "finding_no2",
    }  # fmt: skip
    predicted = Model.predict
    monkeypatch.setattr(
        Model, "predict", lambda *given, **more: dataclasses.replace(predicted(*given, **more), views=["LATERAL"])
    )
    files = write_pictures(folder, tmp_path / "in", [44])
    explain.run(folder / "linear", files, tmp_path / "out", ["Mass", "Mass"], device="cpu")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "Mass_1_LATERAL.png", "image_1_LATERAL.png", "index.csv", "sheet.png",
    }  # fmt: skip
    assert [row["view"] for row in read_index(tmp_path / "out")] == ["LATERAL"] * 2


def test_regions_of_an_id_that_two_datasets_have_are_refused(folder: Path, tmp_path: Path) -> None:
    write_arrays(
        tmp_path / "store", [np.zeros((36, 32), np.uint8)] * 4, np.ones((4, 2), np.int8), FINDINGS,
        splits=["test"] * 4, image_ids=["1", "2", "1", "3"], datasets=["a", "a", "b", "b"],
    )  # fmt: skip
    (tmp_path / "r.csv").write_text("image_id,finding,path\n1,Edema,a.png\n")
    with pytest.raises(ConfigError, match="'1' occurs in several datasets"):
        explain.run(
            folder / "linear", [f"{tmp_path / 'store'}:test"], maps=tmp_path / "m.npz", regions=tmp_path / "r.csv",
            device="cpu",
        )  # fmt: skip


def test_a_folder_that_holds_something_is_left_alone(folder: Path, tmp_path: Path) -> None:
    files = write_pictures(folder, tmp_path / "in", [44])
    with pytest.raises(ConfigError, match="not an empty folder"):
        explain.run(folder / "linear", files, tmp_path / "in", device="cpu")
    assert Path(files[0]).is_file()


@pytest.mark.parametrize(
    ("name", "kind", "over"),
    [("linear", "evidence", "image"), ("study", "attention", "study"), ("decoder", "attention", "image"),
     ("ensemble", "attention", "study")],
)  # fmt: skip
def test_maps_of_a_split_are_those_of_the_predictor(folder: Path, tmp_path: Path, name, kind, over) -> None:
    explain.run(folder / name, [f"{folder / 'store'}:test"], maps=tmp_path / "maps.npz", batch_size=5, device="cpu")
    found, store = read_maps(tmp_path / "maps.npz"), Store.open(folder / "store")
    rows = store.indices("test")
    assert (found.metadata["kind"], found.metadata["over"]) == (kind, over)
    assert found.metadata["model"] == load(folder / name, "cpu").digest
    pairs = {(store.uids[i], n) for i in rows for c, n in enumerate(store.findings) if store.labels[i, c] == 1}
    have = {(found.image_uid[i], found.findings[c]): m for i, c, m in
            zip(found.image, found.finding, found.maps, strict=True)}  # fmt: skip
    assert set(have) == pairs
    model = load(folder / name, "cpu")
    for first in rows[::2]:
        views = [int(first), int(first) + 1]
        result = model.predict([store.read(i) for i in views], view_names=[store.views[i] for i in views])
        for place, index in enumerate(views):
            for finding in FINDINGS:
                own = have.get((store.uids[index], finding))
                if own is not None:
                    alone = result.attention[finding][place]
                    np.testing.assert_allclose(own, alone, rtol=2e-3, atol=1e-5)
    assert found.boxes[0].tolist() == [2 / 36, 0, 32 / 36, 1]


def test_views_that_a_store_does_not_name_are_recognised_for_its_maps_too(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    named = Store.open(folder / "store")
    rows = named.indices("test").tolist()
    images = [named.read(row) for row in rows]
    nameless = write_arrays(
        tmp_path / "store", images, named.labels[rows], FINDINGS, splits=["test"] * len(rows),
        studies=named.studies[rows].tolist(), patients=named.patients[rows].tolist(), views=["UNKNOWN"] * len(rows),
    )  # fmt: skip
    model = load(folder / "ensemble", "cpu")
    model.composition = dataclasses.replace(model.composition, study=StudyRule("frontal_weighted", {"frontal": 0.9}))
    expected = store_maps(model, named, rows, dict.fromkeys(rows, FINDINGS), 5).maps
    every = dict.fromkeys(range(len(rows)), FINDINGS)
    unknown = store_maps(model, nameless, every, every, 5).maps  # there is no screening in it
    views = {image.tobytes(): str(named.views[row]) for row, image in zip(rows, images, strict=True)}

    def recognised(gate: Gate, pixels: np.ndarray, view: str, source: str) -> Admission:
        assert gate.score_flagged
        return Admission(pixels, views[pixels.tobytes()], "classifier", ())

    monkeypatch.setattr(Gate, "admit", recognised)
    np.testing.assert_array_equal(store_maps(model, nameless, every, every, 5).maps, expected)
    assert np.abs(unknown - expected).max() > 1e-4


def test_maps_are_judged_by_masks_and_compared(folder: Path, tmp_path: Path, capsys) -> None:
    store = folder / "store"
    for name in ("linear", "decoder"):
        explain.run(
            folder / name, [f"{store}:test"], maps=tmp_path / f"{name}.npz", regions=folder / "masks.csv", device="cpu"
        )
    predict.run(folder / "decoder", [f"{store}:test"], tmp_path / "test.parquet", device="cpu")
    result = evaluate.run(
        tmp_path / "test.parquet", store, tmp_path / "out", split="test", bootstraps=50, by=["none"],
        maps=[tmp_path / "decoder.npz", tmp_path / "linear.npz"], regions=folder / "masks.csv",
    )  # fmt: skip
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["localisation"]
    assert found == result["localisation"]
    labels = Store.open(store).labels[Store.open(store).indices("test")]
    assert found["n_pairs"] == int((labels == 1).sum())
    assert [file["name"] for file in found["maps"]] == ["decoder", "linear"]
    area = found["maps"][0]["findings"]["Edema"]["area"]
    assert area == pytest.approx(16 * 16 / 32**2)  # the mask begins where the square does
    assert found["maps"][1]["findings"]["Edema"]["energy"] > area  # brightness is what there is to see
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Where it looked" in page
    assert "decoder - linear" in page
    assert "decoder (attention)" in capsys.readouterr().out
    again = evaluate.run(
        tmp_path / "test.parquet", store, tmp_path / "again", split="test", bootstraps=50, by=["none"],
        maps=[tmp_path / "decoder.npz", tmp_path / "linear.npz"], regions=folder / "masks.csv",
    )  # fmt: skip
    assert again["localisation"] == found
    assert (tmp_path / "again" / "metrics.json").read_bytes() == (tmp_path / "out" / "metrics.json").read_bytes()


def test_maps_and_regions_go_together(folder: Path, tmp_path: Path) -> None:
    arguments = (tmp_path / "t.parquet", folder / "store", tmp_path / "out")
    twice = {"maps": [tmp_path / "m.npz"] * 2, "regions": folder / "masks.csv"}
    for options in (twice, {"maps": [tmp_path / "m.npz"]}, {"regions": folder / "masks.csv"}, {"tolerance": 0.1}):
        with pytest.raises(ConfigError, match=r"go together|--tolerance|named twice"):
            evaluate.run(*arguments, **options)


def test_no_image_with_a_region_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("image_id,finding,path\nnobody,Edema,a.png\n")
    with pytest.raises(ConfigError, match="no map to make"):
        explain.run(
            folder / "linear", [f"{folder / 'store'}:test"], maps=tmp_path / "m.npz", regions=tmp_path / "r.csv",
            device="cpu",
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "table"), [("nih", "BBox_List_2017.csv"), ("vindr", "annotations/annotations_test.csv")]
)
def test_boxes_of_drawn_patients_hold_their_masks(tmp_path: Path, layout: str, table: str) -> None:
    """From the folder to the manifest: ids, sizes and coordinates of the boxes are those of the masks beside them."""
    write_phantoms(tmp_path / "data", layout, 60, 3, 96)
    manifest.run([f"{layout}={tmp_path / 'data'}"], tmp_path / "manifest.parquet", split="official", seed=0)
    build.run(tmp_path / "manifest.parquet", tmp_path / "store", 64, "raw")
    boxes = read_regions(tmp_path / "data" / table, sizes_of(tmp_path / "store"))
    masks = read_regions(tmp_path / "data" / "masks.csv")
    ids = set(Store.open(tmp_path / "store").image_ids.tolist())
    both = [key for key in boxes.keys if key in set(masks.keys)]
    assert len(both) > 10
    assert {image for image, _ in both} <= ids
    for image, finding in both:
        box, mask = (area_in_cells(one.region(image, finding), (0, 0, 1, 1), (64, 64)) for one in (boxes, masks))
        assert (box >= mask - 1e-9).all(), (image, finding)
        if layout == "nih":  # elsewhere a label can stand for several findings, with a box for each
            extents = [np.ptp(np.flatnonzero(mask.any(axis=axis))) + 1 for axis in (0, 1)]
            assert box.sum() <= extents[0] * extents[1] + 1e-9
