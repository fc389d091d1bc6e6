"""`hilum embed`, `hilum index` and `hilum similar` as people run them: files, shards, interruptions, refusals."""

import contextlib
import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest
from PIL import Image

from hilum.backbones.vit import SIZES, VisionTransformer
from hilum.backbones.weights import save_backbone
from hilum.commands import embed, fit, index, similar
from hilum.core.errors import CheckpointError, ConfigError, EmptyStudyError, PredictionError, UnknownNameError
from hilum.data.store import Store, write_arrays
from hilum.deploy import embedding_parts
from hilum.deploy.embedding_files import read_embeddings
from hilum.deploy.embeddings import embed_images
from hilum.deploy.encoder import Encoder
from hilum.deploy.index_building import build_index
from hilum.deploy.predictor import load
from hilum.deploy.similar import Index
from hilum.heads.config import FitConfig

FINDINGS = ("Edema", "Mass", "Never")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A store of 44 images in 22 studies of 11 patients, a decoder, and the test images as files."""
    path = tmp_path_factory.mktemp("similar")
    rng = np.random.default_rng(0)
    labels = (rng.random((44, 3)) < 0.5).astype(np.int8)
    labels[:24, 2] = 0
    images = [rng.integers(0, 90, (32, 36), np.uint8) + np.uint8(100 * int(y)) for y in labels[:, 0]]
    write_arrays(
        path / "store", images, labels, FINDINGS, splits=["train"] * 24 + ["val"] * 8 + ["test"] * 12,
        studies=[f"arrays/s{n // 2}" for n in range(44)], patients=[f"arrays/p{n // 4}" for n in range(44)],
        views=["LATERAL", "PA"] * 22,
    )  # fmt: skip
    config = FitConfig(
        head="ml_decoder", decoder_dim=8, decoder_feed_forward=12, decoder_heads=2, resolution=32, blocks=1,
        learning_rates=(1e-2,), search_epochs=1, refit_epochs=1, batch_size=16, threads=1, workers=1,
    )  # fmt: skip
    fit.run(config, path / "store", "random:demo16", path / "model", device="cpu")
    (path / "films").mkdir()
    for number in range(32, 44):
        cv2.imwrite(str(path / "films" / f"{number:06d}.png"), images[number])
    index.run(str(path / "model"), str(path / "store"), path / "index", ["Mass"], device="cpu")
    return path


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_embed(folder: Path, out: Path, what: str = "cls", **options) -> None:
    embed.run(str(folder / "model"), [f"{folder}/store:test"], out, what, device="cpu", batch_size=5, **options)


def stop_at_part(monkeypatch: pytest.MonkeyPatch, number: int, images: int) -> None:
    """Parts of so many images, and an interruption in place of that part and no other."""
    monkeypatch.setattr(embedding_parts, "IMAGES", images)
    real, calls = embedding_parts.embed_many, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(embedding_parts, "embed_many", interrupted)


@pytest.mark.parametrize("suffix", [".parquet", ".npz", ".npy"])
@pytest.mark.parametrize("what", ["cls", "patch-mean", "study"])
def test_a_split_of_a_store(folder: Path, tmp_path: Path, what: str, suffix: str) -> None:
    run_embed(folder, tmp_path / f"f{suffix}", what)
    store, found = Store.open(folder / "store"), read_embeddings(tmp_path / f"f{suffix}")
    test = store.indices("test")
    encoder = Encoder.of(load(folder / "model", "cpu"))
    unit = embed_images(encoder, [store.read(number) for number in test.tolist()]).astype(np.float64)
    if what == "study":
        means = unit[0::2] + unit[1::2]
        np.testing.assert_allclose(found.vectors, means / np.linalg.norm(means, axis=1, keepdims=True), atol=2e-6)
        assert found.identity["view"].tolist() == ["LATERAL+PA"] * 6
        assert found.identity["image_id"].tolist() == store.studies[test][::2].tolist()
    else:
        assert found.identity["image_uid"].tolist() == store.uids[test].tolist()
        if what == "cls":
            lengths = np.linalg.norm(found.vectors, axis=1, keepdims=True)
            assert np.ptp(lengths) > 0
            np.testing.assert_allclose(found.vectors / lengths, unit, atol=2e-6)
    assert found.vectors.dtype == np.float32
    assert found.metadata["what"] == what
    assert found.metadata["backbone"] == encoder.digest
    assert not (tmp_path / f"f{suffix}.parts").exists()
    if suffix == ".parquet":  # as another library reads it
        frame = pl.read_parquet(tmp_path / "f.parquet")
        np.testing.assert_array_equal(np.stack(frame["embedding"].to_list()), found.vectors)


def test_shards_are_one_set_again_and_never_divide_a_study(folder: Path, tmp_path: Path) -> None:
    run_embed(folder, tmp_path / "all.npz")
    whole = read_embeddings(tmp_path / "all.npz")
    for job in range(2):
        run_embed(folder, tmp_path / f"{job}.npz", shard=f"{job}/2")
    parts = [set(read_embeddings(tmp_path / f"{job}.npz").identity["study_id"].tolist()) for job in range(2)]
    assert parts[0]
    assert parts[1]
    assert not parts[0] & parts[1]
    joined = read_embeddings([tmp_path / "0.npz", tmp_path / "1.npz"])
    place = {uid: row for row, uid in enumerate(whole.identity["image_uid"].tolist())}
    rows = [place[uid] for uid in joined.identity["image_uid"].tolist()]
    assert sorted(rows) == list(range(12))
    np.testing.assert_allclose(joined.vectors, whole.vectors[rows], atol=2e-6)
    with pytest.raises(PredictionError, match="more than once"):
        read_embeddings([tmp_path / "0.npz", tmp_path / "0.npz"])
    run_embed(folder, tmp_path / "other.npz", "study")
    with pytest.raises(PredictionError, match="not parts of one set"):
        read_embeddings([tmp_path / "0.npz", tmp_path / "other.npz"])


def test_files_that_cannot_be_read_are_listed_and_the_rest_goes_on(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "films", tmp_path / "films")
    (tmp_path / "films" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    embed.run(str(folder / "model"), [str(tmp_path / "films")], tmp_path / "f.parquet", device="cpu")
    found = read_embeddings(tmp_path / "f.parquet")
    assert found.identity["image_id"].tolist() == sorted(path.name for path in (folder / "films").iterdir())
    listed = table(tmp_path / "f.parquet.quarantine.csv")
    assert [Path(row["path"]).name for row in listed] == ["broken.png"]
    with pytest.raises(EmptyStudyError, match="None of 1 inputs"):
        embed.run(str(folder / "model"), [str(tmp_path / "films" / "broken.png")], tmp_path / "g.npz", device="cpu")
    assert not (tmp_path / "g.npz").exists()


def test_jobs_list_every_input_that_was_refused_once(folder: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "film.png"), np.full((40, 36), 9, np.uint8))
    missing = [f"missing{number}.png" for number in range(6)]
    (tmp_path / "t.csv").write_text("\n".join(["path", "film.png", *missing]) + "\n")
    listed, embedded = [], 0
    for job in range(3):
        out, left_out = tmp_path / f"{job}.npz", tmp_path / f"{job}.npz.quarantine.csv"
        with contextlib.suppress(EmptyStudyError):  # a job without an image
            embed.run(str(folder / "model"), [str(tmp_path / "t.csv")], out, device="cpu", shard=f"{job}/3")
            embedded += 1
        listed += [row["path"] for row in table(left_out)] if left_out.exists() else []
    assert sorted(listed) == [str(tmp_path / name) for name in missing]
    assert embedded == 1


def test_a_study_has_the_views_that_were_read(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "films" / "000036.png", tmp_path / "front.png")
    (tmp_path / "side.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "t.csv").write_text("path,study_id,view\nside.png,one,LATERAL\nfront.png,one,PA\n")
    embed.run(str(folder / "model"), [str(tmp_path / "t.csv")], tmp_path / "s.npz", "study", device="cpu")
    assert read_embeddings(tmp_path / "s.npz").identity["view"].tolist() == ["PA"]


def test_an_interrupted_run_goes_on_where_it_was(folder: Path, tmp_path: Path, monkeypatch) -> None:
    embed.run(str(folder / "model"), [f"{folder}/store"], tmp_path / "whole.npz", device="cpu")
    monkeypatch.setattr(embedding_parts, "IMAGES", 8)
    computed: list[int] = []
    real, limit = embedding_parts.embed_many, 3

    def counted(encoder, indices, *rest):
        if len(computed) == limit:
            raise KeyboardInterrupt
        computed.append(len(indices))
        return real(encoder, indices, *rest)

    monkeypatch.setattr(embedding_parts, "embed_many", counted)
    with pytest.raises(KeyboardInterrupt):
        embed.run(str(folder / "model"), [f"{folder}/store"], tmp_path / "f.npz", device="cpu")
    assert len(list((tmp_path / "f.npz.parts").glob("*.npz"))) == 3
    computed.clear()
    limit = 99
    embed.run(str(folder / "model"), [f"{folder}/store"], tmp_path / "f.npz", device="cpu")
    assert sum(computed) == 44 - 24
    resumed, whole = read_embeddings(tmp_path / "f.npz"), read_embeddings(tmp_path / "whole.npz")
    np.testing.assert_allclose(resumed.vectors, whole.vectors, atol=2e-6)
    assert not (tmp_path / "f.npz.parts").exists()


def test_an_interrupted_index_is_the_same_in_the_end(folder: Path, tmp_path: Path) -> None:
    store, encoder = Store.open(folder / "store"), Encoder.of(load(folder / "model", "cpu"))
    straight = build_index(encoder, store, range(44), tmp_path / "a", ["Mass"], 4, part=8)
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if sum(seen) > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(encoder, store, range(44), tmp_path / "b", ["Mass"], 4, done=stop, part=8)
    with pytest.raises(ConfigError, match="not a finished index"):
        Index.open(tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    (tmp_path / "c" / "finding_000.npy").unlink()  # begun again where a file is gone
    again = build_index(encoder, store, range(44), tmp_path / "c", ["Mass"], 4, part=8)
    np.testing.assert_array_equal(again.finding("Mass").vectors, straight.finding("Mass").vectors)
    after: list[int] = []
    resumed = build_index(encoder, store, range(44), tmp_path / "b", ["Mass"], 4, done=after.append, part=8)
    assert sum(after) == 44
    assert after[0] == 8  # a whole part that was there
    np.testing.assert_array_equal(resumed.vectors, straight.vectors)
    np.testing.assert_array_equal(resumed.finding("Mass").vectors, straight.finding("Mass").vectors)
    assert not (tmp_path / "b" / "progress.json").exists()


def test_parts_of_other_files_under_the_same_names_are_not_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    for number, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        for film in range(4):
            pixels = np.random.default_rng(10 * number + film).integers(0, 255, (48, 40), np.uint8)
            cv2.imwrite(str(tmp_path / name / f"{film}.png"), pixels)
    stop_at_part(monkeypatch, 2, images=2)
    with pytest.raises(KeyboardInterrupt):
        embed.run(str(folder / "model"), [str(tmp_path / "one")], tmp_path / "f.npz", device="cpu")
    for name in ("f", "g"):
        embed.run(str(folder / "model"), [str(tmp_path / "two")], tmp_path / f"{name}.npz", device="cpu")
    found, expected = (read_embeddings(tmp_path / f"{name}.npz").vectors for name in ("f", "g"))
    np.testing.assert_array_equal(found, expected)


def test_what_was_begun_for_something_else_is_not_gone_on_with(folder: Path, tmp_path: Path, monkeypatch) -> None:
    store, encoder = Store.open(folder / "store"), Encoder.of(load(folder / "model", "cpu"))

    build_index(encoder, store, range(44), tmp_path / "b", [], 8, part=8)
    (tmp_path / "b" / "index.json").unlink()  # as if it had been stopped before its last file
    (tmp_path / "b" / "progress.json").write_text(json.dumps({"key": "of another model", "parts": 6}))
    other = build_index(encoder, store, range(20, 40), tmp_path / "b", [], 8, part=8)
    expected = build_index(encoder, store, range(20, 40), tmp_path / "c", [], 8, part=8)
    np.testing.assert_array_equal(other.vectors, expected.vectors)

    stop_at_part(monkeypatch, 3, images=4)
    with pytest.raises(KeyboardInterrupt):
        embed.run(str(folder / "model"), [f"{folder}/store:train"], tmp_path / "f.npz", device="cpu")
    embed.run(str(folder / "model"), [f"{folder}/store:test"], tmp_path / "f.npz", device="cpu")
    found = read_embeddings(tmp_path / "f.npz")
    run_embed(folder, tmp_path / "g.npz")
    np.testing.assert_allclose(found.vectors, read_embeddings(tmp_path / "g.npz").vectors, atol=2e-6)


@pytest.mark.parametrize("finding", [None, "Mass"])
def test_a_study_finds_others_and_not_its_own_patient(
    folder: Path, tmp_path: Path, finding: str | None, capsys
) -> None:
    films = [str(folder / "films" / f"{number:06d}.png") for number in (36, 37)]
    for out in ("c.csv", "c.json"):
        similar.run(folder / "index", films, tmp_path / out, finding, count=30, sheet=tmp_path / "s.png", device="cpu")
    assert "2 studies of its own patient left out" in capsys.readouterr().out
    rows = table(tmp_path / "c.csv")
    content = json.loads((tmp_path / "c.json").read_text())
    assert [row["study_id"] for row in rows] == [case["study_id"] for case in content["cases"]]
    assert len(rows) == 20
    assert not {"arrays/s18", "arrays/s19"} & {row["study_id"] for row in rows}
    assert content["left_out"] == 2
    assert content["finding"] == finding
    store = Store.open(folder / "store")
    case = content["cases"][0]
    images = np.flatnonzero(store.studies == case["study_id"])
    present = {name for name, code in zip(FINDINGS, store.labels[images].max(axis=0), strict=True) if code == 1}
    assert set(case["findings"]) == present
    assert case["view"] == "LATERAL+PA"
    assert store.views[store.uids == case["image_uid"]].tolist() == ["PA"]
    picture = np.asarray(Image.open(tmp_path / "s.png"))
    assert picture.std() > 20


def test_whose_a_study_is_may_be_said_in_a_table(folder: Path, tmp_path: Path) -> None:
    """A renamed file is known by its patient, with or without the dataset before it, or by what is excluded by hand."""
    shutil.copy(folder / "films" / "000036.png", tmp_path / "renamed.png")
    for patient, exclude, left_out in (
        ("p9", [], 2), ("arrays/p9", [], 2), ("", [], 0), ("", ["arrays/s18"], 1), ("p9", ["p8", "s0"], 5)
    ):  # fmt: skip
        (tmp_path / "t.csv").write_text(f"path,patient_id\nrenamed.png,{patient}\n")
        similar.run(folder / "index", [str(tmp_path / "t.csv")], tmp_path / "c.json", exclude=exclude, device="cpu")
        content = json.loads((tmp_path / "c.json").read_text())
        assert content["left_out"] == left_out
        assert (content["cases"][0]["study_id"] == "arrays/s18") is (left_out == 0)


def test_what_cannot_be_is_said(folder: Path, tmp_path: Path, capsys) -> None:
    film = str(folder / "films" / "000040.png")
    with pytest.raises(ConfigError, match=r"\.csv or \.json"):
        similar.run(folder / "index", [film], tmp_path / "c.txt")
    with pytest.raises(ConfigError, match=r"\.png"):
        similar.run(folder / "index", [film], sheet=tmp_path / "c.jpg")
    with pytest.raises(UnknownNameError, match="Did you mean 'Mass'"):
        similar.run(folder / "index", [film], finding="Masss", device="cpu")
    with pytest.raises(ConfigError, match="part of a store"):
        similar.run(folder / "index", [f"{folder}/store:test"], device="cpu")
    many = shutil.copytree(folder / "films", tmp_path / "many")
    for path in sorted(many.iterdir()):
        shutil.copy(path, many / f"again{path.name}")
    with pytest.raises(ConfigError, match="24 images; expected those of one study"):
        similar.run(folder / "index", [str(many)], device="cpu")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(EmptyStudyError, match="could be read"):
        similar.run(folder / "index", [str(tmp_path / "broken.png")], device="cpu")
    with pytest.raises(ConfigError, match="already holds an index"):
        index.run(str(folder / "model"), str(folder / "store"), folder / "index", [], device="cpu")
    with pytest.raises(ConfigError, match="never trained"):
        index.run(str(folder / "model"), str(folder / "store"), tmp_path / "i", ["Never"], device="cpu")
    backbone = VisionTransformer(SIZES["demo16"])
    save_backbone(backbone, tmp_path / "backbone", Store.open(folder / "store").preprocess_id)
    with pytest.raises(ConfigError, match="has no trained findings"):
        index.run(str(tmp_path / "backbone"), str(folder / "store"), tmp_path / "i", ["all"], device="cpu")
    with pytest.raises(UnknownNameError, match="split"):
        index.run(str(folder / "model"), f"{folder}/store:tset", tmp_path / "i", [], device="cpu")
    with pytest.raises(ConfigError, match="ends in"):
        run_embed(folder, tmp_path / "f.csv")
    with pytest.raises(UnknownNameError, match="patch-mean"):
        run_embed(folder, tmp_path / "f.npz", "patch_mean")
    with pytest.raises(EmptyStudyError, match="nothing to do"):
        run_embed(folder, tmp_path / "f.npz", shard="0/1000")
    shutil.copytree(folder / "index", tmp_path / "elsewhere")
    header = json.loads((tmp_path / "elsewhere" / "index.json").read_text())
    for entry in ("model_path", "store"):
        header[entry] |= {"path": "/gone", "relative": "gone"}
    (tmp_path / "elsewhere" / "index.json").write_text(json.dumps(header))
    with pytest.raises(CheckpointError, match="Say where: --model"):
        similar.run(tmp_path / "elsewhere", [film], device="cpu")
    capsys.readouterr()
    similar.run(
        tmp_path / "elsewhere", [film], sheet=tmp_path / "s.png", model=str(folder / "model"), count=2, device="cpu"
    )
    assert "not at /gone any more" in capsys.readouterr().err  # the picture says so too, and the search goes on
