"""What a model has met follows it: under another dataset's name, and as a leak by design that somebody accepted."""

import json
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import pytest

from hilum.commands import evaluate, fit, predict, pretrain
from hilum.commands.extend_inputs import check_sides, open_base
from hilum.core.config import override
from hilum.core.errors import LeakageError
from hilum.data import manifest as manifest_module
from hilum.data.build import build_store
from hilum.data.manifest import ManifestOptions, SourceSpec, build_manifest
from hilum.data.rows import SourceRows
from hilum.data.schema import write_manifest
from hilum.data.store import Store
from hilum.heads.config import FitConfig
from hilum.pretraining.config import PretrainConfig
from hilum.pretraining.crops import CropConfig
from hilum.pretraining.dinov2 import HeadConfig
from hilum.pretraining.exposure import read_seen, uid_numbers

FIT = FitConfig(
    blocks=1, learning_rates=(1e-2,), search_epochs=1, refit_epochs=1, batch_size=16, threads=1, workers=1,
    augmented_views=1,
)  # fmt: skip


@pytest.fixture
def make_store(monkeypatch, tmp_path):
    """A store of 40 images of 20 patients, read by a source whose table is in memory."""

    def make(source: str, options: ManifestOptions, origin: str, official: list[str], **columns: pl.Expr) -> Store:
        root = tmp_path / source
        root.mkdir()
        rng = np.random.default_rng(3)
        for number in range(40):
            cv2.imwrite(str(root / f"{number:02d}.png"), rng.integers(0, 256, (20, 20), np.uint8))
        frame = pl.DataFrame({"image_id": [f"{number:02d}" for number in range(40)], "split_official": official})
        number = pl.int_range(40)
        frame = frame.with_columns(
            patient_id=(number // 2).cast(pl.String), study_id=pl.col("image_id"), view_raw=pl.lit("PA"),
            source_relpath=pl.col("image_id") + ".png", **{"label.Edema": (number % 3 == 0).cast(pl.Int8)}, **columns,
        )  # fmt: skip
        rows = SourceRows(frame, ("Edema",), root, True, {}, origin=origin)
        monkeypatch.setitem(manifest_module.SOURCES, source, lambda _: rows)
        manifest, _ = build_manifest([SourceSpec(source, source, root)], options)
        write_manifest(manifest, tmp_path / f"{source}.parquet")
        build_store(tmp_path / f"{source}.parquet", tmp_path / f"{source}_store", size=20, encoding="raw", workers=1)
        return Store.open(tmp_path / f"{source}_store")

    return make


def train(data: Path, out: Path) -> None:
    """Two steps of pretraining, and a linear head."""
    config = PretrainConfig(
        architecture="demo8", embed_dim=16, depth=2, num_heads=2, registers=1, layer_scale=0.1,
        crops=CropConfig(global_size=32, local_size=16, local_crops=2), heads=HeadConfig(16, 16, 8, 8),
        batch_size=4, steps=2, precision="fp32", accelerator="cpu", threads=1,
    )  # fmt: skip
    pretrain.run(config, data, out / "run")
    fit.run(FIT, data, out / "run", out / "model", device="cpu")


OFFICIAL = ["train"] * 24 + ["val"] * 8 + ["test"] * 8


def test_a_picture_is_known_under_another_datasets_name(make_store, tmp_path):
    """`small` holds the pictures of `big` under names of its own: a model trained on one has met the other."""
    big = make_store("nih", ManifestOptions(), "nih", OFFICIAL)
    mapped = pl.format("nih/{}", "image_id")
    small = make_store(
        "rsna",
        ManifestOptions(),
        "",
        ["test"] * 40,
        origin_image=mapped,
        origin_patient=pl.format("nih/{}", "image_id"),
    )
    assert (big.pictures == big.uids).all()  # ids of the release itself
    assert set(big.view_sources) == {"stated"}
    assert (small.pictures != small.uids).all()
    assert sorted(small.pictures) == sorted(big.uids)
    train(big.path, tmp_path)
    seen = read_seen(tmp_path / "run")
    assert set(seen.pictures.tolist()) <= set(uid_numbers(big.uids).tolist())
    predict.run(tmp_path / "model", [f"{small.path}:test"], tmp_path / "p.parquet", device="cpu")
    result = evaluate.run(tmp_path / "p.parquet", small.path, tmp_path / "out", bootstraps=0, accept_exposed=True)
    assert result["exposed_images"] == 32  # train and val of the head; test of `big` was never met
    assert "32 of the predicted images were in the model" in (tmp_path / "out/report.html").read_text()


def test_sides_are_kept_under_another_datasets_name(make_store, tmp_path):
    """A head fitted on `small`, then shown `big`: the same pictures, the sides swapped or as they were."""
    mapped = pl.format("nih/{}", "image_id")
    small = make_store("rsna", ManifestOptions(), "", OFFICIAL, origin_image=mapped, origin_patient=pl.lit(None))
    big = make_store("nih", ManifestOptions(), "nih", OFFICIAL)
    assert not np.isin(big.uids, small.uids).any()
    train(small.path, tmp_path)
    for name, refit in (("model", True), ("searched", False)):
        if not refit:
            fit.run(override(FIT, ["refit=false"]), small.path, tmp_path / "run", tmp_path / name, device="cpu")
        base, nobody = open_base(tmp_path / name), big.indices("test")[:0]
        with pytest.raises(LeakageError, match="was validated on images of 4 patients"):
            check_sides(base, big, big.indices("val"), nobody)
        with pytest.raises(LeakageError, match="was trained on images of 12 patients"):
            check_sides(base, big, nobody, big.indices("train"))
        check_sides(base, big, big.indices("train"), big.indices("val"))
        learned = base.exposure.learned_from(big.uids, big.pictures)
        assert int(learned.sum()) == (32 if refit else 24)

    # a teacher that has seen validation, under another name
    teaching = override(FIT, [f"pseudo_labels={tmp_path / 'model'}"])
    with pytest.raises(LeakageError, match="trained on 8 of 8 validation images"):
        fit.run(teaching, big.path, tmp_path / "run", tmp_path / "taught", device="cpu")


def test_an_accepted_leak_is_stamped_into_everything(make_store, tmp_path, capsys):
    store = make_store("cxrlt", ManifestOptions(pool="slides-710k", accept_leak=True), "mimic", OFFICIAL)
    assert "cut by image" in store.accepted_leak
    train(store.path, tmp_path)
    assert "leak accepted: slides-710k" in " ".join(capsys.readouterr().err.split())
    for folder in ("run", "model"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["accepted_leak"] == store.accepted_leak
    assert "Leak accepted: slides-710k" in (tmp_path / "model/README.md").read_text()
    predict.run(tmp_path / "model", [f"{store.path}:test"], tmp_path / "p.parquet", device="cpu")
    result = evaluate.run(tmp_path / "p.parquet", store.path, tmp_path / "out", bootstraps=0)
    assert result["accepted_leak"] == store.accepted_leak
    assert "Leak accepted when the model was made: slides-710k" in (tmp_path / "out/report.html").read_text()
