"""`hilum manifest` and `hilum audit` from start to end, on folders and on the real sample."""

import polars as pl
import pytest

from hilum.commands import audit, manifest
from hilum.core.errors import HilumError, LeakageError
from hilum.data.schema import read_manifest, write_manifest


@pytest.fixture
def clinic(tmp_path):
    root = tmp_path / "clinic"
    root.mkdir()
    lines = ["path,patient_id,study_id,view,Edema,Normal"]
    for patient in range(40):
        for view in ("PA", "LL"):
            (root / f"{patient}{view}.png").write_bytes(f"{patient}{view}".encode())
            lines.append(f"{patient}{view}.png,SECRET{patient},1,{view},{int(patient < 10)},{int(patient >= 10)}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


def test_manifest_then_audit(clinic, tmp_path, capsys):
    out = tmp_path / "m.parquet"
    manifest.run([f"folder={clinic}"], out)
    audit.run(out, hash_files=True)
    printed = capsys.readouterr()
    assert f"Next: hilum audit {out}" in printed.out
    assert f"Next: hilum build {out} --out STORE" in printed.out
    assert "head (2 findings" in printed.out
    assert "SECRET" not in printed.out + printed.err
    table = read_manifest(out)
    assert table.frame.height == 80
    splits = table.frame.group_by("split_project").len().sort("split_project")
    assert splits.rows() == [("test", 16), ("train", 56), ("val", 8)]


def test_the_same_command_gives_the_same_table(clinic, tmp_path):
    for name in ("1", "2"):
        manifest.run([f"folder={clinic}"], tmp_path / name, seed=4)
    assert read_manifest(tmp_path / "1").frame.equals(read_manifest(tmp_path / "2").frame)
    manifest.run([f"folder={clinic}"], tmp_path / "3", seed=5)
    assert not read_manifest(tmp_path / "1").frame.equals(read_manifest(tmp_path / "3").frame)


def test_a_leak_is_printed_and_raised(clinic, tmp_path, capsys):
    out = tmp_path / "m.parquet"
    manifest.run([f"folder={clinic}"], out)
    table = read_manifest(out)
    first = pl.col("image_id") == "0PA.png"
    leaking = table.frame.with_columns(split_project=pl.when(first).then(pl.lit("test")).otherwise("split_project"))
    other = leaking.filter(pl.col("image_id") == "0LL.png")["split_project"][0]
    if other == "test":
        leaking = table.frame.with_columns(
            split_project=pl.when(first).then(pl.lit("train")).otherwise("split_project")
        )
    write_manifest(type(table)(leaking, table.findings, table.metadata), out)
    capsys.readouterr()
    with pytest.raises(LeakageError, match="patient across splits"):
        audit.run(out)
    printed = capsys.readouterr().out
    assert "the same patient is in more than one split" in printed
    assert leaking.filter(first)["image_uid"][0] in printed
    assert "SECRET" not in printed


def test_a_refused_manifest_leaves_the_old_one(clinic, tmp_path):
    out = tmp_path / "m.parquet"
    manifest.run([f"folder={clinic}"], out)
    before = out.read_bytes()
    (clinic / "0PA.png").unlink()
    with pytest.raises(HilumError):
        manifest.run([f"folder={clinic}"], out)
    assert out.read_bytes() == before
    manifest.run([f"folder={clinic}"], out, allow_missing=True)
    assert read_manifest(out).frame.height == 79


def test_pictures_without_labels_are_for_pretraining(tmp_path, capsys):
    (tmp_path / "pool").mkdir()
    for index in range(20):
        (tmp_path / "pool" / f"{index}.png").touch()
    manifest.run([f"folder={tmp_path / 'pool'}"], tmp_path / "m.parquet", val_fraction=0, test_fraction=0)
    audit.run(tmp_path / "m.parquet")
    printed = capsys.readouterr()
    assert "No labels" in printed.out
    assert "20 images name no patient" in printed.err
    assert read_manifest(tmp_path / "m.parquet").frame["ssl_ok"].all()


def test_the_real_sample(nih_sample, tmp_path, capsys):
    out = tmp_path / "nih.parquet"
    manifest.run([f"nih={nih_sample}"], out)
    audit.run(out)
    table = read_manifest(out)
    assert len(table.findings) == 15
    assert {"Pleural Effusion", "Pleural Thickening", "Normal"} <= set(table.findings)
    assert dict(table.frame.group_by("split_project").len().rows()) == {"train": 546, "val": 78, "test": 156}
    assert (table.labels() >= 0).all()
    assert "no leak" in capsys.readouterr().out.lower()
