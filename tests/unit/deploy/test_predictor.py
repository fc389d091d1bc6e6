import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from scipy.special import expit

import hilum
from hilum.core.errors import (
    CheckpointError,
    EmptyStudyError,
    ImageError,
    PreprocessingMismatchError,
    StoreError,
    UnsupportedImageError,
)
from hilum.data.store import Store
from hilum.data.transforms import evaluation_crop
from hilum.deploy import model_files as files
from hilum.deploy.ensemble_model import combine_models
from hilum.deploy.predictor import load
from hilum.evaluation.calibration import Calibrator
from hilum.evaluation.ensemble import mean_over_models
from hilum.evaluation.studies import mean_over_studies
from hilum.heads.features import Features

NAMES = ("linear", "decoder", "ensemble")
ALL = pytest.mark.parametrize("name", NAMES)


def edit(folder: Path, **changes) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


@ALL
def test_two_passes_are_identical(fitted: Path, store: Store, name: str) -> None:
    """Defect C2: dropout stayed on in validation, selection and export."""
    model = load(fitted / name, "cpu")
    for network in model.networks:
        network.head.train()  # whatever mode it is put in
    first, second = (model.predict_store(store, range(40, 60)) for _ in range(2))
    assert np.array_equal(first.probabilities, second.probabilities)
    assert np.array_equal(
        load(fitted / name, "cpu").predict_store(store, range(40, 60)).probabilities, first.probabilities
    )


@ALL
def test_batch_size_order_and_company_do_not_matter(fitted: Path, store: Store, name: str) -> None:
    model = load(fitted / name, "cpu")
    whole = model.predict_store(store, range(50, 62), raw=True, batch_size=32)
    parts = model.predict_store(store, [61, 55, 50], raw=True, batch_size=2)
    rows = [whole.image_uid.tolist().index(uid) for uid in parts.image_uid]
    assert rows == [11, 5, 0]
    np.testing.assert_allclose(parts.probabilities, whole.probabilities[rows], atol=1e-6)


def test_raw_probabilities_are_backbone_head_sigmoid_and_flip_mean_written_out(fitted: Path, store: Store) -> None:
    for name in ("linear", "decoder"):
        content = files.read_config(fitted / name)
        config = files.read_network(fitted / name, content)
        backbone, head = files.read_weights(fitted / name, config, content["weights"]["sha256"])
        expected = []
        for index in range(56, 60):
            square = evaluation_crop(store.read(index), config.resolution).astype(np.float64)
            views = [square, square[:, ::-1]] if config.flip_average else [square]
            values = []
            for view in views:
                image = torch.from_numpy((view / 255 - 0.5) / 0.25).float()[None, None]
                tokens = backbone.intermediate(image, 2)
                cls = torch.cat([block.cls for block in tokens], dim=1)
                patches = torch.cat([block.patches for block in tokens], dim=2)
                features = Features(cls, patches.mean(dim=1), patches, (2, 2))
                logits = head.linear(cls) if name == "linear" else head.decoder(features)
                values.append(expit(logits.double().numpy()[0]))
            expected.append(np.mean(values, axis=0))
        found = load(fitted / name, "cpu").predict_store(store, range(56, 60), raw=True)
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
        assert (found.stage, found.unit) == ("raw", "image")


def test_order_of_operations_studies_then_models_then_the_calibrator_of_that_stage(fitted: Path, store: Store) -> None:
    members = [load(fitted / name, "cpu").predict_store(store, range(56, 68), raw=True) for name in NAMES[:2]]
    model = load(fitted / "ensemble", "cpu")
    calibration = files.read_config(fitted / "ensemble")["calibration"]
    image, study = (Calibrator.from_dict(calibration[unit]) for unit in ("image", "study"))
    assert (image.stage, image.unit, study.stage, study.unit) == ("ensemble", "image", "ensemble", "study")
    by_image = model.predict_store(store, range(56, 68))
    np.testing.assert_allclose(
        by_image.probabilities, image.apply((members[0].probabilities + members[1].probabilities) / 2), atol=1e-12
    )
    by_study = model.predict_store(store, range(56, 68), unit="study")
    means = [mean_over_studies(member, unit="study") for member in members]
    expected = study.apply((means[0].probabilities + means[1].probabilities) / 2)
    np.testing.assert_allclose(by_study.probabilities, expected, atol=1e-12)
    assert len(by_study) == 10
    assert by_study.stage == by_image.stage == "calibrated"
    assert by_study.metadata["model"] == model.digest


@ALL
def test_a_study_from_files_equals_the_same_study_from_the_store(fitted: Path, store: Store, name: str) -> None:
    model = load(fitted / name, "cpu")
    views = [store.read(56), store.read(57)]
    assert store.studies[56] == store.studies[57]
    for raw in (False, True):
        table = model.predict_store(store, [56, 57], raw=raw, unit="study")
        result = model.predict(views, raw=raw)
        assert list(result.probabilities.values()) == pytest.approx(table.probabilities[0].tolist(), abs=1e-9)
        images = model.predict_store(store, [56, 57], raw=raw)
        for row, found in zip(images.probabilities, result.image_probabilities, strict=True):
            assert list(found.values()) == pytest.approx(row.tolist(), abs=1e-6)
        assert result.calibrated is not raw


@ALL
def test_the_order_of_views_does_not_matter_and_maps_follow_their_view(fitted: Path, store: Store, name: str) -> None:
    model = load(fitted / name, "cpu")
    views = [store.read(index) for index in (56, 60, 57)]
    first, second = model.predict(views), model.predict(views[::-1])
    assert first.probabilities == pytest.approx(second.probabilities, abs=1e-6)
    assert first.image_probabilities[0] == pytest.approx(second.image_probabilities[2], abs=1e-6)
    twice = model.predict([views[0], views[0]])
    assert twice.probabilities == pytest.approx(model.predict([views[0]]).probabilities, abs=1e-6)
    if name != "linear":
        assert np.allclose(first.attention["Mass"][0], second.attention["Mass"][2], atol=1e-6)


def test_attention_has_a_map_per_view_on_the_grid_or_none(fitted: Path, store: Store) -> None:
    views = [store.read(56), store.read(58)]
    for name, side in (("linear", 3), ("decoder", 2), ("ensemble", 3)):
        result = load(fitted / name, "cpu").predict(views)
        for maps in result.attention.values():
            assert [one.shape for one in maps] == [(side, side), (side, side)]
            assert all(one.sum() == pytest.approx(1) and (one >= 0).all() for one in maps)
    assert load(fitted / "decoder", "cpu").predict(views, attention=False).attention["Mass"] is None


def test_boxes_say_what_was_looked_at(fitted: Path) -> None:
    result = load(fitted / "linear", "cpu").predict([np.zeros((40, 80), np.uint8), np.zeros((50, 40), np.uint8)])
    assert result.boxes == [(0.0, 0.25, 1.0, 0.5), pytest.approx((0.1, 0.0, 0.8, 1.0))]


def test_png_jpeg_bytes_and_arrays_agree(fitted: Path, store: Store, tmp_path: Path) -> None:
    model = hilum.load(fitted / "decoder")
    pixels = store.read(57)
    cv2.imwrite(str(tmp_path / "image.png"), pixels)
    cv2.imwrite(str(tmp_path / "image.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 100])
    exact = model.predict(pixels).probabilities
    assert model.predict(str(tmp_path / "image.png")).probabilities == exact
    assert model.predict([(tmp_path / "image.png").read_bytes()]).probabilities == exact
    assert model.predict([tmp_path / "image.jpg"]).probabilities == pytest.approx(exact, abs=0.02)


def test_dicom_is_read_as_its_header_says(fitted: Path, store: Store, tmp_path: Path) -> None:
    model = hilum.load(fitted / "decoder")
    pixels = store.read(57)
    wide = pixels.astype(np.uint16) * 16 + 7  # 12 bits, the window of which is the 8-bit image
    window = {"WindowCenter": 2047.5 + 0.5, "WindowWidth": 4081.0}
    write_dicom(tmp_path / "plain.dcm", pixels, WindowCenter=128.0, WindowWidth=256.0)
    write_dicom(tmp_path / "inverse.dcm", 255 - pixels, "MONOCHROME1", WindowCenter=128.0, WindowWidth=256.0)
    write_dicom(tmp_path / "wide.dcm", wide, **window)
    exact = model.predict(pixels).probabilities
    for name in ("plain", "inverse"):
        assert model.predict([tmp_path / f"{name}.dcm"]).probabilities == exact
    assert model.predict([tmp_path / "wide.dcm"]).probabilities == pytest.approx(exact, abs=0.02)
    study = model.predict([tmp_path / "plain.dcm", tmp_path / "inverse.dcm"])
    assert study.probabilities == pytest.approx(exact, abs=1e-6)
    write_dicom(tmp_path / "empty.dcm", None)
    with pytest.raises(ImageError, match=r"view 2 \(empty.dcm\).*without pixel data") as raised:
        model.predict([tmp_path / "plain.dcm", tmp_path / "empty.dcm"])
    assert raised.value.reason == "no_pixel_data"


def write_dicom(path: Path, pixels: np.ndarray | None, photometric: str = "MONOCHROME2", **elements) -> None:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.PatientID, dataset.StudyInstanceUID = "P1", "1.2.3"
    if pixels is not None:
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
        dataset.BitsAllocated, dataset.BitsStored = 8 * pixels.itemsize, 8 if pixels.itemsize == 1 else 12
        dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, 0
        dataset.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("value", [0, 128, 255])
@ALL
def test_a_constant_image_gives_finite_numbers(fitted: Path, name: str, value: int) -> None:
    """Defect C10: per-crop min-max divided by zero, and the NaN was silently set to zero."""
    result = load(fitted / name, "cpu").predict([np.full((30, 30), value, np.uint8)])
    assert all(0 <= probability <= 1 for probability in result.probabilities.values())
    if result.attention["Mass"] is not None:
        assert np.isfinite(result.attention["Mass"][0]).all()


def test_brightness_is_not_normalised_away(fitted: Path) -> None:
    """Defect C10: with a crop's own min and max, an image and the same image at half contrast were one."""
    model = load(fitted / "linear", "cpu")
    pixels = np.random.default_rng(0).integers(0, 120, (30, 30), np.uint8)
    dark, bright = model.predict([pixels], raw=True), model.predict([pixels * 2], raw=True)
    assert abs(dark.probabilities["Edema"] - bright.probabilities["Edema"]) > 1e-4


def test_no_image_is_an_error(fitted: Path, store: Store) -> None:
    model = load(fitted / "linear", "cpu")
    with pytest.raises(EmptyStudyError, match="at least one image"):
        model.predict([])
    with pytest.raises(EmptyStudyError):
        model.predict_store(store, [])


def test_a_view_that_cannot_be_used_is_named(fitted: Path, tmp_path: Path) -> None:
    model = load(fitted / "linear", "cpu")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    good = np.zeros((20, 20), np.uint8)
    with pytest.raises(ImageError, match=r"view 2 \(broken.png\)"):
        model.predict([good, tmp_path / "broken.png"])
    with pytest.raises(UnsupportedImageError, match=r"View 1.*float64"):
        model.predict([np.zeros((4, 4))])


def test_thresholds_belong_to_the_stage(fitted: Path, store: Store) -> None:
    model = load(fitted / "decoder", "cpu")
    calibrated, raw = model.predict([store.read(56)]), model.predict([store.read(56)], raw=True)
    calibrator = model.calibrators["study"]
    assert calibrated.thresholds["Mass"] == calibrator.thresholds["Mass"]
    assert raw.thresholds["Mass"] == calibrator.raw_thresholds["Mass"]


def test_a_large_image_goes_through_the_size_that_the_store_had(fitted: Path, tmp_path: Path) -> None:
    shutil.copytree(fitted / "linear", tmp_path / "model")
    content = files.read_config(tmp_path / "model")
    edit(tmp_path / "model", preprocessing=content["preprocessing"] | {"short_side": 26})
    model = load(tmp_path / "model", "cpu")
    pixels = np.random.default_rng(1).integers(0, 255, (104, 80), np.uint8)
    shrunk = cv2.resize(pixels, (26, 34), interpolation=cv2.INTER_AREA)
    direct = load(fitted / "linear", "cpu")
    assert model.predict([pixels], raw=True).probabilities == direct.predict([shrunk], raw=True).probabilities
    assert model.predict([pixels], raw=True).probabilities != direct.predict([pixels], raw=True).probabilities


def test_an_unknown_recipe_is_refused(fitted: Path, tmp_path: Path, store: Store) -> None:
    shutil.copytree(fitted / "linear", tmp_path / "model")
    content = files.read_config(tmp_path / "model")
    edit(tmp_path / "model", preprocessing=content["preprocessing"] | {"id": "hilum-grey-9"})
    with pytest.raises(PreprocessingMismatchError, match="hilum-grey-9"):
        load(tmp_path / "model")
    other = Store.open(store.path)
    other.preprocess_id = "other-1"
    with pytest.raises(PreprocessingMismatchError, match="other-1"):
        load(fitted / "linear").predict_store(other, [0])


@pytest.mark.parametrize("file", ["model.safetensors", "exposure.npz", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_model_is_refused(fitted: Path, tmp_path: Path, file: str, damage: str) -> None:
    shutil.copytree(fitted / "decoder", tmp_path / "model")
    target = tmp_path / "model" / file
    content = target.read_bytes()
    target.unlink()
    if damage == "truncated":
        target.write_bytes(content[: len(content) // 2])
    if damage == "flipped":
        target.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
    if (file, damage) in {("config.json", "flipped"), ("exposure.npz", "flipped")}:
        return  # one bit of text or of the archive's directory may mean the same
    with pytest.raises(CheckpointError):
        load(tmp_path / "model")


def test_a_folder_that_is_no_model_is_refused(fitted: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="hilum-backbone-1"):
        load(fitted / "run")
    with pytest.raises(CheckpointError, match="not a model directory"):
        load(tmp_path / "nothing")


def test_a_description_that_does_not_fit_the_weights_is_refused(fitted: Path, tmp_path: Path) -> None:
    shutil.copytree(fitted / "decoder", tmp_path / "model")
    content = files.read_config(tmp_path / "model")
    content["architecture"]["head"]["decoder_dim"] = 10
    edit(tmp_path / "model", **content)
    with pytest.raises(CheckpointError, match=r"head\..*expected"):
        load(tmp_path / "model")


def test_a_damaged_record_of_the_store_is_named(fitted: Path, tmp_path: Path) -> None:
    shutil.copytree(fitted / "store", tmp_path / "store")
    store = Store.open(tmp_path / "store")
    shard = tmp_path / "store" / "shards" / store.shards[0].name
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(StoreError, match=str(store.uids[3])):
        load(fitted / "linear").predict_store(store, [3])


def test_mean_over_models_is_what_the_ensemble_predicts_raw(fitted: Path, store: Store) -> None:
    members = [load(fitted / name, "cpu").predict_store(store, range(5), raw=True) for name in NAMES[:2]]
    together = load(fitted / "ensemble", "cpu").predict_store(store, range(5), raw=True)
    assert np.array_equal(together.probabilities, mean_over_models(members).probabilities)
    assert together.stage == "ensemble"


def test_one_members_accepted_leak_excuses_no_other_member(fitted: Path, store: Store, tmp_path: Path) -> None:
    def accept(name: str) -> None:
        content = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**content, "accepted_leak": "siblings on both sides"}))

    def told(*names: str) -> tuple[int, str]:
        place = tmp_path / names[0]
        if len(names) > 1:
            place = tmp_path / f"of {len(list(tmp_path.iterdir()))}"
            combine_models([tmp_path / name for name in names], place)
        metadata = load(place, "cpu").predict_store(store, [0, 1]).metadata
        return metadata["exposed_images"], metadata.get("accepted_leak") or ""

    for name in ("linear", "decoder"):
        shutil.copytree(fitted / name, tmp_path / name)
    accept("linear")
    assert told("linear") == (2, "siblings on both sides")
    assert told("linear", "decoder") == (2, "")  # the decoder has met them, and nobody has accepted that
    accept("decoder")
    assert told("linear", "decoder") == (2, "siblings on both sides")
