"""A recipe from `hilum build` to `hilum predict`: a model reads DICOM as the dataset it was trained on was made."""

import json
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest

import hilum
from hilum.commands import build, convert, fit, manifest, predict
from hilum.core.errors import ManifestError, PreprocessingMismatchError, StoreError, UnknownNameError
from hilum.core.types import image_uid
from hilum.data.phantoms.encoding import dicom, png, png16, spread
from hilum.data.schema import Manifest, complete, label_column, write_manifest
from hilum.data.store import Store
from hilum.data.webdataset import ExportOptions
from hilum.deploy.ensemble_model import combine_models
from hilum.deploy.predictor import Model
from hilum.evaluation.predictions import read_predictions
from hilum.heads.config import FitConfig

RECIPE = "mimic-cxr-jpg-1"
FIT = FitConfig(
    head="linear", resolution=32, blocks=1, learning_rates=(1e-2,), search_epochs=1, refit_epochs=1, batch_size=16,
    threads=1, workers=1,
)  # fmt: skip


def film(seed: int) -> np.ndarray:
    """A smooth grey picture without a mean of its own, 90 x 70."""
    rough = np.random.default_rng(seed).normal(110, 700, (90, 70))
    return np.clip(cv2.GaussianBlur(rough, (0, 0), 5), 0, 255).astype(np.uint8)


def published(picture: np.ndarray, bits: int) -> np.ndarray:
    """What MIMIC-CXR-JPG would have made of it (MIT-LCP/mimic-cxr#16), in float64 and with OpenCV."""
    values = spread(picture, bits).astype(np.float64)
    values -= values.min()
    return cv2.equalizeHist((values / values.max() * 255).astype(np.uint8))


def pool(root: Path) -> Path:
    """A third each of DICOM, 16-bit PNG and 8-bit PNG, and the manifest."""
    (root / "films").mkdir(parents=True)
    lines = ["path,patient_id,study_id,view,split,Edema"]
    for number in range(36):
        name = f"films/{number}.{('dcm', 'png', 'png')[number % 3]}"
        content = (
            dicom(film(number), str(number), photometric=("MONOCHROME1", "MONOCHROME2")[number % 2]),
            png16(film(number)),
            png(published(film(number), 12)),
        )[number % 3]
        (root / name).write_bytes(content)
        lines.append(f"{name},p{number},s{number},PA,{('train', 'train', 'val')[number // 12]},{number // 3 % 2}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    manifest.run([f"folder={root}"], root / "manifest.parquet")
    return root / "manifest.parquet"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """`store` and `model` of the recipe, `plain` and `plain_model` of the default one."""
    path = tmp_path_factory.mktemp("recipe")
    table = pool(path / "raw")
    build.run(table, path / "store", 64, "png", workers=1, intensity=RECIPE)
    build.run(table, path / "plain", 64, "png", workers=1)
    fit.run(FIT, path / "store", "random:demo16", path / "model", device="cpu")
    fit.run(FIT, path / "plain", "random:demo16", path / "plain_model", device="cpu")
    return path


def shrunk(picture: np.ndarray) -> np.ndarray:
    return np.rint(cv2.resize(picture.astype(np.float64), (64, 82), interpolation=cv2.INTER_AREA))


def test_the_store_holds_what_was_published_and_says_so(made: Path) -> None:
    store, plain = Store.open(made / "store"), Store.open(made / "plain")
    assert (store.preprocess_id, plain.preprocess_id) == (RECIPE, "hilum-grey-1")
    assert store.header["intensity"] == {"as_is": 12, "equalised": 24}
    numbers = [int(Path(image_id.decode()).stem) for image_id in store._columns["image_id"]]
    for index, number in enumerate(numbers):
        bits = 16 if number % 3 == 1 else 12
        expected = published(film(number), bits)
        if number % 3 == 0 and number % 2 == 0:  # MONOCHROME1: truncated before it is turned round
            stored = 4095.0 - spread(film(number), 12)
            grey = ((stored - stored.min()) / (stored.max() - stored.min()) * 255).astype(np.uint8)
            expected = cv2.equalizeHist(cv2.bitwise_not(grey))
        assert np.abs(store.read(index) - shrunk(expected)).max() <= 1, number
        if number % 3 == 2:  # 8 bits: as they were
            np.testing.assert_array_equal(store.read(index), plain.read(index))
        else:
            assert np.abs(store.read(index).astype(int) - plain.read(index)).mean() > 5


def test_a_model_reads_dicom_as_its_recipe_says(made: Path, tmp_path: Path) -> None:
    """The DICOM, and the picture that the authors would have published: the same probabilities, to the last bit."""
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.dcm").write_bytes(dicom(film(100), "a", StudyInstanceUID="1.2.3"))
    (tmp_path / "films" / "b.png").write_bytes(png(published(film(100), 12)))
    values = {}
    for name in ("model", "plain_model"):
        model = hilum.load(made / name, "cpu")
        one, other = (model.predict([tmp_path / "films" / file], raw=True) for file in ("a.dcm", "b.png"))
        predict.run(made / name, [str(tmp_path / "films")], tmp_path / f"{name}.parquet", raw=True, device="cpu")
        rows = read_predictions(tmp_path / f"{name}.parquet")
        values[name] = (one.probabilities["Edema"], other.probabilities["Edema"], sorted(rows.probabilities[:, 0]))
    dicom_value, png_value, rows = values["model"]
    assert dicom_value == png_value
    assert rows[0] == rows[1] == pytest.approx(dicom_value, abs=1e-6)
    dicom_value, png_value, rows = values["plain_model"]  # which does not equalise: another picture
    assert dicom_value != png_value
    assert rows[0] != rows[1]


def test_other_recipes_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(PreprocessingMismatchError, match=RECIPE):
        predict.run(made / "model", [f"{made / 'plain'}:val"], tmp_path / "p.parquet", device="cpu")
    with pytest.raises(PreprocessingMismatchError, match="hilum-grey-1"):
        predict.run(made / "plain_model", [f"{made / 'store'}:val"], tmp_path / "p.parquet", device="cpu")
    with pytest.raises(StoreError, match=RECIPE):  # the recipe of a store cannot be changed
        build.run(made / "raw" / "manifest.parquet", made / "store", 64, "png", workers=1)
    with pytest.raises(UnknownNameError, match=f"'{RECIPE}'"):
        build.run(made / "raw" / "manifest.parquet", tmp_path / "new", 64, intensity="mimic-cxr-jpg")
    assert not (tmp_path / "new").exists()
    config = (made / "model" / "config.json").read_text()
    (made / "model" / "config.json").write_text(config.replace(RECIPE, "mimic-cxr-jpg-9"))
    try:
        with pytest.raises(PreprocessingMismatchError, match=r"'mimic-cxr-jpg-9'.*knows .*chexpert-1"):
            hilum.load(made / "model")
    finally:
        (made / "model" / "config.json").write_text(config)


def test_members_of_other_recipes_are_no_ensemble(made: Path, tmp_path: Path) -> None:
    with pytest.raises(PreprocessingMismatchError, match=f"hilum-grey-1 and {RECIPE}"):
        combine_models([made / "model", made / "plain_model"], tmp_path / "ensemble")
    assert not (tmp_path / "ensemble").exists()
    networks = [network for name in ("model", "plain_model") for network in hilum.load(made / name, "cpu").networks]
    whole = hilum.load(made / "model", "cpu")
    with pytest.raises(PreprocessingMismatchError, match=f"hilum-grey-1, {RECIPE}"):
        Model(networks, whole.calibrators, whole.digest, whole.exposure, whole.groups)


def test_the_recipe_goes_with_tars_and_back(made: Path, tmp_path: Path) -> None:
    for name in ("store", "plain"):
        convert.to_tars(made / name, tmp_path / f"{name}_tars", ExportOptions(accept_licence=True))
    options = convert.ImportOptions(size=64, encoding="png", workers=1)
    convert.to_store([tmp_path / "store_tars"], tmp_path / "back", options)
    back, store = Store.open(tmp_path / "back"), Store.open(made / "store")
    assert back.preprocess_id == RECIPE
    by_uid = {uid: index for index, uid in enumerate(store.uids.tolist())}
    for index, uid in enumerate(back.uids.tolist()):
        np.testing.assert_array_equal(back.read(index), store.read(by_uid[uid]))
    with pytest.raises(ManifestError, match=f"hilum-grey-1 and {RECIPE}"):
        convert.to_store([tmp_path / "store_tars", tmp_path / "plain_tars"], tmp_path / "both", options)


def two_datasets(root: Path, second: str) -> Path:
    """A manifest of eight 8-bit films, and of the same ones as a second dataset, 15 greys brighter or equalised."""
    rows = []
    for number in range(16):
        dataset, name = ("one", second)[number // 8], f"{number}.png"
        picture = film(number % 8) // 2 + np.uint8(20)
        if dataset == "equalised":
            picture = cv2.equalizeHist(picture)
        elif dataset == "brighter":
            picture = picture + np.uint8(15)
        (root / name).write_bytes(png(picture))
        rows.append(
            {
                "image_uid": image_uid(dataset, name), "dataset": dataset, "source_relpath": name,
                "source_root_key": "pool", "patient_id": f"{dataset}/{number}", "study_id": f"{dataset}/{number}",
                "image_id": name, "view": "PA", "split_project": "train", "ssl_ok": True, "ssl_reason": "",
                label_column("Edema"): number % 2,
            }
        )  # fmt: skip
    table = Manifest(complete(pl.DataFrame(rows), ("Edema",)), ("Edema",), {"roots": json.dumps({"pool": str(root)})})
    write_manifest(table, root / "manifest.parquet")
    return root / "manifest.parquet"


def test_the_build_says_how_far_apart_the_greys_of_datasets_are(tmp_path: Path, capsys) -> None:
    path = two_datasets(tmp_path, "brighter")
    for _ in range(2):  # the second time from the markers alone
        build.run(path, tmp_path / "store", 128, workers=1)
        out = capsys.readouterr().out
        assert "greys, brighter and one: 15.0 of 255 levels apart" in out
        assert "equalised" not in out


def test_a_pool_that_mixes_equalised_and_plain_sources_is_flagged(tmp_path: Path, capsys) -> None:
    path = two_datasets(tmp_path, "equalised")
    build.run(path, tmp_path / "store", 128, workers=1)
    out = " ".join(capsys.readouterr().out.split())
    assert "Histogram-equalised: equalised; not: one." in out
    assert "shown DICOM by hilum-grey-1, which does not equalise" in out
    build.run(path, tmp_path / "other", 128, workers=1, intensity=RECIPE)
    out = " ".join(capsys.readouterr().out.split())
    assert "Histogram-equalised: equalised; not: one." in out
    assert "which does not equalise" not in out


def test_markers_of_an_older_version_are_read_and_say_nothing_of_greys(tmp_path: Path, capsys) -> None:
    path = two_datasets(tmp_path, "brighter")
    build.run(path, tmp_path / "store", 128, workers=1)
    marker = next((tmp_path / "store" / "shards").glob("*-one.done"))
    said = json.loads(marker.read_text())
    del said["greys"]
    marker.write_text(json.dumps(said))
    capsys.readouterr()
    build.run(path, tmp_path / "store", 128, workers=1)
    out = capsys.readouterr().out
    assert "2 already there" in out
    assert "greys" not in out


def test_in_place_reads_by_the_recipe(made: Path, tmp_path: Path) -> None:
    build.run(made / "raw" / "manifest.parquet", tmp_path / "store", 64, workers=1, in_place=True, intensity=RECIPE)
    files, store = Store.open(tmp_path / "store"), Store.open(made / "store")
    for index in range(len(store)):
        np.testing.assert_array_equal(files.read(index), store.read(index))
