"""Published checksums: read strictly, and compared with every image that they list."""

import hashlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from hilum.commands import build, manifest
from hilum.core.errors import ManifestError, PathError, StoreError
from hilum.data.build import build_store
from hilum.data.checksums import NAME, read_checksums
from hilum.data.images import read_image
from hilum.data.shards import IN_PLACE
from hilum.data.store import Store

DIGEST = hashlib.sha256(b"x").hexdigest()


def test_the_forms_that_sha256sum_and_physionet_write(tmp_path):
    lines = [
        f"{DIGEST} files/p10/a.jpg", f"{DIGEST}  b b.jpg", f"{DIGEST.upper()} *c.jpg", f"{DIGEST}  ./d/ü.jpg", "",
        f"{DIGEST} e..f.jpg\r",
    ]  # fmt: skip
    (tmp_path / NAME).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    found = read_checksums(tmp_path / NAME)
    assert list(found) == ["files/p10/a.jpg", "b b.jpg", "c.jpg", "d/ü.jpg", "e..f.jpg"]
    assert set(found.values()) == {hashlib.sha256(b"x").digest()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{DIGEST} a\n{DIGEST[:-1]} b\n", "row 2: expected 64"),
        (f"{DIGEST} a\n{DIGEST[:-1]}g b\n", "row 2: expected 64"),
        (f"{DIGEST}\n", "row 1"),
        (f"{DIGEST} \n", "row 1"),
        (f"{DIGEST}\ta\n", "row 1"),
        (f"{DIGEST} /etc/passwd\n", "row 1"),
        (f"{DIGEST} ../a\n", "row 1"),
        (f"{DIGEST} a/../../b\n", "row 1"),
        (f"\\{DIGEST} a\\nb\n", "row 1"),
        (f"{DIGEST} a\\b\n", "row 1"),
        (f"{DIGEST} a\n{DIGEST} ./a\n", "row 2: the file is listed a second time"),
        ("<html>403</html>\n", "row 1"),
        ("", "lists no file"),
        ("\n\n", "lists no file"),
        (b"\xff\xfe" + f"{DIGEST} a\n".encode("utf-16-le"), "not UTF-8"),
    ],
)
def test_anything_else_names_its_row_and_not_the_path(tmp_path, content, message):
    (tmp_path / NAME).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ManifestError, match=message) as caught:
        read_checksums(tmp_path / NAME)
    assert "passwd" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(PathError, match="cannot be read"):
        read_checksums(tmp_path / NAME)


def pool(root: Path, count: int = 6) -> Path:
    (root / "files").mkdir(parents=True)
    for number in range(count):
        grain = np.random.default_rng(number).integers(60, 190, (40, 40), dtype=np.uint8)
        Image.fromarray(grain).save(root / "files" / f"p{number}.jpg", quality=90)
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()} files/{path.name}" for path in (root / "files").iterdir()
    ]
    (root / NAME).write_text("\n".join(sorted(lines)) + "\n")
    manifest.run([f"folder={root}"], root / "manifest.parquet")
    return root / "manifest.parquet"


def flip_a_byte_that_still_decodes(path: Path) -> None:
    """The kind of damage that nothing but a checksum can see."""
    content, before = bytearray(path.read_bytes()), read_image(path).pixels
    for at in range(len(content) // 2, len(content) - 2):
        for bit in range(8):
            changed = bytes([*content[:at], content[at] ^ 1 << bit, *content[at + 1 :]])
            path.write_bytes(changed)
            try:
                after = read_image(path).pixels
            except Exception:
                continue
            if not np.array_equal(after, before):
                return
    raise AssertionError("no such byte")


def refused(store: Path) -> dict[int, str]:
    table = pl.read_csv(store / "quarantine.csv")
    return dict(zip(table["row"], table["reason"], strict=True))


@pytest.mark.parametrize("encoding", ["raw", IN_PLACE])
def test_a_flipped_byte_that_still_decodes_is_quarantined(tmp_path, encoding):
    path = pool(tmp_path / "raw")
    flip_a_byte_that_still_decodes(tmp_path / "raw" / "files" / "p3.jpg")
    summary = build_store(path, tmp_path / "store", 32, encoding, workers=1)
    assert summary.quarantined == {"checksum_mismatch": 1}
    assert (summary.inputs, summary.stored) == (6, 5)
    assert refused(tmp_path / "store") == {3: "checksum_mismatch"}
    assert len(Store.open(tmp_path / "store")) == 5
    without = build_store(path, tmp_path / "without", 32, encoding, workers=1, checksums=False)
    assert (without.stored, without.checksums) == (6, {})  # nothing else sees it


def test_files_that_are_not_listed_are_counted_and_said(tmp_path, capsys):
    path = pool(tmp_path / "raw")
    sums = tmp_path / "raw" / NAME
    sums.write_text("\n".join(sums.read_text().splitlines()[2:]) + "\n")
    capsys.readouterr()
    build.run(path, tmp_path / "store", 32, workers=1)
    assert "published checksums of folder: 4 images compared, 2 not listed" in capsys.readouterr().out
    assert len(Store.open(tmp_path / "store")) == 6


def test_without_published_checksums_nothing_is_said_and_old_stores_stay(tmp_path, capsys):
    path = pool(tmp_path / "raw")
    sums = (tmp_path / "raw" / NAME).read_text()
    (tmp_path / "raw" / NAME).unlink()
    build.run(path, tmp_path / "store", 32, workers=1)
    assert "checksums" not in capsys.readouterr().out
    (tmp_path / "raw" / NAME).write_text(sums)
    again = build_store(path, tmp_path / "store", 32, workers=1)  # they arrive later: compared now
    assert (again.shards_kept, again.checksums) == (0, {"folder": (6, 0)})
    assert build_store(path, tmp_path / "store", 32, workers=1).shards_kept == again.shards


def test_a_repaired_file_is_taken(tmp_path):
    path = pool(tmp_path / "raw")
    film = tmp_path / "raw" / "files" / "p1.jpg"
    content = film.read_bytes()
    film.write_bytes(content + b"\0")  # harmless, and not what was published
    with pytest.raises(StoreError, match="1 of 6"):
        build.run(path, tmp_path / "store", 32, workers=1)
    assert refused(tmp_path / "store") == {1: "checksum_mismatch"}
    film.write_bytes(content)
    build.run(path, tmp_path / "store", 32, workers=1)
    assert len(Store.open(tmp_path / "store")) == 6


def test_a_damaged_list_stops_the_build_by_name(tmp_path):
    path = pool(tmp_path / "raw")
    (tmp_path / "raw" / NAME).write_text("<html>\n")
    with pytest.raises(ManifestError, match=r"SHA256SUMS\.txt, row 1.*--no-checksums"):
        build_store(path, tmp_path / "store", 32, workers=1)
    assert not (tmp_path / "store" / "store.json").exists()
