"""hilum build and hilum verify as a person runs them, from a folder with a table."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from hilum import cli
from hilum.commands import build, manifest, verify
from hilum.core.errors import ConfigError, StoreError
from hilum.data.store import Store


def pool(root: Path, count: int = 8) -> Path:
    """A folder of PNG and JPEG files, its table, and the manifest made from it."""
    (root / "films").mkdir(parents=True)
    lines = ["path,patient_id,study_id,view,split,Edema,Mass"]
    for number in range(count):
        name = f"films/{number}.{'png' if number % 2 else 'jpg'}"
        grain = np.random.default_rng(number).integers(90, 160, (60 + number, 50), dtype=np.uint8)
        Image.fromarray(grain).save(root / name)
        lines.append(f"{name},p{number},s{number},PA,{('train', 'val')[number % 2]},{number % 2},")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    manifest.run([f"folder={root}"], root / "manifest.parquet")
    return root / "manifest.parquet"


def test_build_prints_counts_and_the_next_command(tmp_path, capsys):
    path = pool(tmp_path / "raw")
    capsys.readouterr()
    build.run(path, tmp_path / "store", 32, workers=1)
    out = capsys.readouterr().out
    assert "8 images in the manifest: 8 stored, 0 in quarantine." in out
    assert f"Next: hilum pretrain RECIPE --data {tmp_path / 'store'} --out RUN" in out
    verify.run(tmp_path / "store")
    out = capsys.readouterr().out
    assert "8 of 8 images read and decoded" in out
    assert "by split: train 4, val 4" in out


def test_more_refused_than_the_budget_is_an_error_after_everything_is_written(tmp_path, capsys):
    path = pool(tmp_path / "raw")
    (tmp_path / "raw" / "films" / "3.png").write_bytes(b"")
    with pytest.raises(StoreError, match=r"1 of 8 images \(12\.5%\)"):
        build.run(path, tmp_path / "store", 32, workers=1)
    printed = capsys.readouterr()
    assert "refused, zero_bytes: 1" in printed.out
    assert printed.err.endswith("1 refused\n")
    assert len(Store.open(tmp_path / "store")) == 7
    assert pl.read_csv(tmp_path / "store" / "quarantine.csv").height == 1
    build.run(path, tmp_path / "store", 32, workers=1, budget=0.2)
    assert f"each with its reason: {tmp_path / 'store' / 'quarantine.csv'}" in capsys.readouterr().out


def test_shares_of_an_array_job(tmp_path, capsys):
    path = pool(tmp_path / "raw")
    build.run(path, tmp_path / "store", 32, shard="1/2", workers=1)
    assert "once the other jobs are through" in capsys.readouterr().out
    assert not (tmp_path / "store" / "store.json").exists()
    build.run(path, tmp_path / "store", 32, shard="0/2", workers=1)
    assert len(Store.open(tmp_path / "store")) == 8


@pytest.mark.parametrize("options", [{"shard": "2/2"}, {"roots": ["nowhere"]}, {"budget": 2.0}])
def test_options_that_make_no_sense(tmp_path, options):
    with pytest.raises(ConfigError):
        build.run(pool(tmp_path / "raw", 2), tmp_path / "store", 32, workers=1, **options)


def test_the_images_have_moved(tmp_path):
    path = pool(tmp_path / "raw", 4)
    (tmp_path / "raw" / "films").rename(tmp_path / "films")
    with pytest.raises(StoreError, match="4 of 4"):  # every image is missing, and says so
        build.run(path, tmp_path / "store", 32, workers=1)
    key = pl.read_parquet(path)["source_root_key"][0]
    build.run(path, tmp_path / "store", 32, workers=1, roots=[f"{key}={tmp_path}"])
    assert len(Store.open(tmp_path / "store")) == 4


def test_verify_lists_what_is_damaged(tmp_path, capsys):
    build.run(pool(tmp_path / "raw"), tmp_path / "store", 32, workers=1)
    store = Store.open(tmp_path / "store")
    file = tmp_path / "store" / "shards" / store.shards[0].name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    capsys.readouterr()
    with pytest.raises(StoreError, match="damaged"):
        verify.run(tmp_path / "store")
    out = capsys.readouterr().out
    assert "7 of 8 images" in out
    assert out.count(store.shards[0].name) == 2  # the record, and the shard's SHA-256


def test_a_store_goes_out_as_tars_and_comes_back_on_the_command_line(tmp_path, capsys, monkeypatch):
    build.run(pool(tmp_path / "raw"), tmp_path / "store", 32, workers=1)

    def hilum(*words: str | Path, code: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["hilum", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == code
        return "".join(capsys.readouterr())

    for extra in ("--size=64", "--encoding=png", "--dataset=d", "--licence=x", "--workers=2", "--budget=0"):
        refusal = hilum("convert", tmp_path / "store", "--out", tmp_path / "tars", extra, code=1)
        assert extra.partition("=")[0] in refusal
    out = hilum("convert", tmp_path / "store", "--out", tmp_path / "tars", "--split", "val", "--accept-licence")
    assert "4 images in 1 tars" in out
    assert f"Next: hilum verify {tmp_path / 'tars'}" in out
    assert "4 images in 1 tars, 0 faults." in hilum("verify", tmp_path / "tars")
    for extra in ("--with-ids", "--accept-licence"):
        assert extra in hilum("convert", tmp_path / "tars", "--out", tmp_path / "back", extra, code=1)
    (tmp_path / "tars" / "shards").mkdir()  # no store yet
    out = hilum("convert", tmp_path / "tars", "--out", tmp_path / "back", "--workers", "1")
    assert "4 samples in 1 tars: 4 to read, 0 copies of another left out." in out
    back, store = Store.open(tmp_path / "back"), Store.open(tmp_path / "store")
    chosen = store.indices("val")
    assert back.fingerprint(range(4)) == store.fingerprint(chosen)
    for index, other in enumerate(chosen):
        np.testing.assert_array_equal(back.read(index), store.read(int(other)))
