"""`hilum audit` with pixels, from files and from a store: planted copies, unreadable files, weights that have seen."""

import json

import cv2
import numpy as np
import polars as pl
import pytest

from hilum.commands import audit
from hilum.core.errors import CheckpointError, ConfigError, LeakageError, UnknownNameError
from hilum.data.build import build_store
from hilum.data.phantoms.render import render_study
from hilum.data.schema import Manifest, complete, read_manifest, write_manifest
from hilum.deploy.model_files import Exposure, write_exposure
from hilum.pretraining.exposure import Seen, write_seen

PATIENTS = 15
COPIES = {
    "as it is": lambda pixels: cv2.imdecode(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], 0),
    "mirrored": lambda pixels: np.ascontiguousarray(pixels[:, ::-1]),
    "inverted": lambda pixels: 255 - pixels,
    "mirrored and inverted": lambda pixels: np.ascontiguousarray(255 - pixels[:, ::-1]),
}


@pytest.fixture(scope="module")
def films():
    return [render_study(9, patient, 0, ("PA",), {}, [(160, 160)])[0].pixels for patient in range(PATIENTS)]


def write_pool(folder, films, **changes):
    """A manifest of one film a patient: eleven in train, two in val, two in test."""
    root = folder / "films"
    root.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(films):
        cv2.imwrite(str(root / f"{number}.png"), pixels)
    split = ["train"] * 11 + ["val"] * 2 + ["test"] * 2
    columns = {
        "image_uid": [f"{number:016x}" for number in range(PATIENTS)],
        "dataset": ["d"] * PATIENTS,
        "source_relpath": [f"{number}.png" for number in range(PATIENTS)],
        "source_root_key": ["d"] * PATIENTS,
        "patient_id": [f"d/SECRET{number}" for number in range(PATIENTS)],
        "study_id": [f"d/SECRET{number}/1" for number in range(PATIENTS)],
        "image_id": [f"{number}.png" for number in range(PATIENTS)],
        "view": ["PA"] * PATIENTS,
        "split_project": split,
        "ssl_ok": [name == "train" for name in split],
        "ssl_reason": [""] * PATIENTS,
        "label.Edema": [number % 2 for number in range(PATIENTS)],
    } | changes
    frame = complete(pl.DataFrame(columns), ("Edema",))
    path = folder / "manifest.parquet"
    write_manifest(Manifest(frame, ("Edema",), {"roots": json.dumps({"d": str(root)})}), path)
    return path


def with_copy(films, way, of=0, at=14):
    copied = list(films)
    copied[at] = COPIES[way](films[of])
    return copied


def test_distinct_films_do_not_leak_and_the_audit_says_what_it_compared(tmp_path, films, capsys):
    path = write_pool(tmp_path, films)
    audit.run(path)
    assert "pixels were not: add --pixels" in capsys.readouterr().out
    audit.run(path, hash_pixels=True, within=True, workers=1)
    assert "All 15 images were compared by their pixels too." in capsys.readouterr().out
    build_store(path, tmp_path / "store", size=96, workers=1)
    audit.run(tmp_path / "store" / "manifest.parquet", within=True)
    printed = capsys.readouterr().out
    assert "All 15 images were compared" in printed
    assert f"Next: hilum pretrain RECIPE --data {tmp_path / 'store'}" in printed


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_in_test_is_a_leak_from_files_and_from_a_store(tmp_path, films, way, capsys):
    path = write_pool(tmp_path, with_copy(films, way))
    build_store(path, tmp_path / "store", size=96, workers=1)
    evidence = tmp_path / "pairs.csv"
    for manifest, options in (
        (path, {"hash_pixels": True, "workers": 1}),
        (tmp_path / "store" / "manifest.parquet", {"evidence": evidence}),
    ):
        capsys.readouterr()
        with pytest.raises(LeakageError, match="near duplicate across splits"):
            audit.run(manifest, **options)
        printed = capsys.readouterr().out
        assert f"{14:016x} (test) and {0:016x} (train): {way}, distance " in printed
        assert "correlation 0.9" in printed or "correlation 1.000" in printed
        assert "SECRET" not in printed
    pairs = pl.read_csv(evidence, schema_overrides={"first": pl.String, "second": pl.String})
    assert pairs.select("first", "second", "way").rows() == [(f"{14:016x}", f"{0:016x}", way)]
    assert pairs["correlation"][0] > 0.95


def test_val_against_test_counts_too(tmp_path, films):
    path = write_pool(tmp_path, with_copy(films, "mirrored", of=11, at=14))
    with pytest.raises(LeakageError, match="near duplicate across splits"):
        audit.run(path, hash_pixels=True, workers=1)


def test_equal_pixels_are_named_as_such(tmp_path, films):
    """The same pixels in another file: not a near duplicate but the picture itself."""
    copied = list(films)
    copied[14] = films[0]
    path = write_pool(tmp_path, copied)
    cv2.imwrite(str(tmp_path / "films" / "14.png"), films[0], [cv2.IMWRITE_PNG_COMPRESSION, 9])
    with pytest.raises(LeakageError, match=r"leaks \(pixels across splits\)"):
        audit.run(path, hash_pixels=True, workers=1)


def test_a_copy_within_a_split_is_a_warning(tmp_path, films, capsys):
    path = write_pool(tmp_path, with_copy(films, "inverted", of=0, at=5))
    audit.run(path, hash_pixels=True, workers=1)
    assert "copy in their split" not in capsys.readouterr().out
    audit.run(path, hash_pixels=True, within=True, workers=1)
    printed = capsys.readouterr().out
    assert (
        "2 images: pictures that have a copy in their split: 1 pairs (inverted 1); 1 pairs of two patients" in printed
    )


def test_files_that_cannot_be_read_are_counted_by_reason(tmp_path, films, capsys):
    path = write_pool(tmp_path, films)
    (tmp_path / "films" / "3.png").write_bytes(b"")
    (tmp_path / "films" / "4.png").unlink()
    audit.run(path, hash_pixels=True, workers=1)
    printed = capsys.readouterr().out
    assert "2 images: images that could not be decoded (" in printed
    assert "zero_bytes 1" in printed
    assert "missing 1" in printed
    assert "13 of 15 images were compared by their pixels too." in printed
    assert "2 images: images without hashes of their pixels, not compared" in printed


def test_a_candidate_whose_pixels_are_gone_still_leaks(tmp_path, films, capsys):
    """The hashes say that it may be a copy; the original cannot be read to tell: fail closed."""
    path = write_pool(tmp_path, with_copy(films, "mirrored"))
    build_store(path, tmp_path / "store", size=96, workers=1)
    table = read_manifest(tmp_path / "store" / "manifest.parquet")
    hashed = tmp_path / "hashed.parquet"
    write_manifest(table, hashed)
    (tmp_path / "films" / "0.png").unlink()
    with pytest.raises(LeakageError, match="possible near duplicate across splits"):
        audit.run(hashed, workers=1)
    assert "pixels not read" in capsys.readouterr().out
    (tmp_path / "films").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="--root d=FOLDER"):
        audit.run(hashed, workers=1)
    with pytest.raises(LeakageError, match="possible near duplicate"):
        audit.run(hashed, workers=1, roots=[f"d={tmp_path / 'moved'}"])


def test_a_damaged_record_of_a_store_still_leaks(tmp_path, films):
    path = write_pool(tmp_path, with_copy(films, "mirrored"))
    build_store(path, tmp_path / "store", size=96, workers=1)
    (shard,) = (tmp_path / "store" / "shards").glob("*.bin")
    content = bytearray(shard.read_bytes())
    content[100] ^= 255
    shard.write_bytes(bytes(content))
    with pytest.raises(LeakageError, match="possible near duplicate across splits"):
        audit.run(tmp_path / "store" / "manifest.parquet")


def test_blank_pictures_are_no_copies_of_each_other(tmp_path, films):
    """Two blank pictures of different size: no structure, so no perceptual hash, and no claim."""
    blank = list(films)
    blank[0], blank[14] = np.full((100, 100), 7, np.uint8), np.full((120, 100), 9, np.uint8)
    audit.run(write_pool(tmp_path, blank), hash_pixels=True, workers=1)


def test_the_store_carries_the_same_pixel_hash_whatever_its_size(tmp_path, films):
    path = write_pool(tmp_path, films)
    tables = []
    for size, encoding in ((64, "jpeg95"), (128, "png"), (512, "raw")):
        build_store(path, tmp_path / f"{size}", size=size, encoding=encoding, workers=1)
        tables.append(read_manifest(tmp_path / f"{size}" / "manifest.parquet").frame)
    assert len({tuple(frame["pixel_sha256"]) for frame in tables}) == 1
    assert tables[0]["pixel_sha256"].n_unique() == PATIENTS
    for frame in tables[1:]:
        for one, other in zip(tables[0]["phash256"], frame["phash256"], strict=True):
            assert (int(one, 16) ^ int(other, 16)).bit_count() <= 16


def test_a_store_from_before_there_were_hashes_is_still_read(tmp_path, films, capsys):
    path = write_pool(tmp_path, films)
    build_store(path, tmp_path / "store", size=96, workers=1)
    for marker in (tmp_path / "store" / "shards").glob("*.done"):
        content = json.loads(marker.read_text())
        for name in ("pixel_sha256", "phash256"):
            del content["stored"][name]
        marker.write_text(json.dumps(content))
    summary = build_store(path, tmp_path / "store", size=96, workers=1)
    assert summary.shards_kept == summary.shards
    audit.run(tmp_path / "store" / "manifest.parquet")
    assert "pixels were not" in capsys.readouterr().out
    audit.run(tmp_path / "store" / "manifest.parquet", hash_pixels=True, workers=1)
    assert "All 15 images were compared" in capsys.readouterr().out


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def test_a_run_that_has_seen_test_is_a_leak(tmp_path, films, capsys):
    path, run = write_pool(tmp_path, films), tmp_path / "run"
    run.mkdir()
    write_seen(run, Seen(numbers(*range(11)), numbers(*range(11))))
    audit.run(path, weights=str(run))
    assert f"nor into {run}" in capsys.readouterr().out
    write_seen(run, Seen(numbers(*range(11), 13), numbers(*range(11), 13)))
    (run / "teacher.safetensors").write_bytes(b"")
    for weights in (run, run / "teacher.safetensors"):
        capsys.readouterr()
        with pytest.raises(LeakageError, match="image seen by the weights"):
            audit.run(path, weights=str(weights))
        assert f"run: it was trained on these evaluation images (1 in test) (image_uid {13:016x})" in (
            capsys.readouterr().out
        )


def test_a_model_may_have_met_val_in_its_fit_but_not_in_pretraining_and_never_test(tmp_path, films):
    path, model = write_pool(tmp_path, films), tmp_path / "model"
    model.mkdir()

    def met(**uses: np.ndarray) -> None:
        (model / "config.json").write_text(json.dumps({"exposure": write_exposure(model, Exposure(**uses))}))

    val, train, test = numbers(11, 12), numbers(*range(11)), numbers(14)
    met(pretraining=train, train=train, val=val, pictures=np.union1d(train, val))
    audit.run(path, weights=str(model))
    for wrong in (
        {"pretraining": np.union1d(train, val), "train": train, "val": val},
        {"pretraining": train, "train": np.union1d(train, test), "val": val},
        {"pretraining": train, "train": train, "val": np.union1d(val, test)},
        {"pretraining": train, "train": train, "val": val, "pictures": test},
    ):
        met(**wrong)
        with pytest.raises(LeakageError, match="image seen by the weights"):
            audit.run(path, weights=str(model))


def test_weights_without_a_record_or_a_name_are_refused(tmp_path, films):
    path = write_pool(tmp_path, films)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointError, match=r"neither seen.npz nor exposure.npz"):
        audit.run(path, weights=str(tmp_path / "nothing"))
    with pytest.raises(UnknownNameError, match="RAD-DINO"):
        audit.run(path, weights="no such weights")


def test_known_weights_by_name(tmp_path, films, capsys):
    path = write_pool(tmp_path, films)
    audit.run(path, weights="RAD-DINO")
    assert "nor into RAD-DINO" in capsys.readouterr().out
    nih = write_pool(tmp_path / "nih", films, dataset=["nih"] * PATIENTS)
    with pytest.raises(LeakageError, match="evaluation set known to the weights"):
        audit.run(nih, weights="RAD-DINO")
    table = read_manifest(path)
    (name,) = table.frame["dataset"].unique()
    said = {**table.metadata, "sources": json.dumps({name: "cxrlt"})}
    write_manifest(Manifest(table.frame, table.findings, said), path)
    with pytest.raises(LeakageError, match="evaluation set known to the weights"):
        audit.run(path, weights="CXR-LT-2023")
