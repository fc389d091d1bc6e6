"""Tar files as Python's own tarfile writes them are read alike; what is cut or unsafe is said, never skipped."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from hilum.core.errors import UnreadableImageError
from hilum.data.tar import End, Member, read_span, scan

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "folder/" * 20 + "ünïcode." + "x" * 60


def write(path: Path, members: dict[str, bytes], kind: str = "ustar") -> Path:
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def special(path: Path, name: str, kind: bytes, **facts: object) -> Path:
    """One ordinary file, one special member, one ordinary file."""
    with tarfile.open(path, "w") as tar:
        for ordinary in ("before.png", name, "after.png"):
            member = tarfile.TarInfo(ordinary)
            if ordinary == name:
                member.type = kind
                for key, value in facts.items():
                    setattr(member, key, value)
                tar.addfile(member)
            else:
                member.size = 700
                tar.addfile(member, io.BytesIO(b"o" * 700))
    return path


def members(path: Path) -> list[Member]:
    return [found for found in scan(path) if isinstance(found, Member)]


def end(path: Path) -> End:
    *_, last = scan(path)
    assert isinstance(last, End)
    return last


@pytest.mark.parametrize("kind", FORMATS)
def test_names_places_and_sizes_are_those_of_tarfile(tmp_path, kind):
    rng = np.random.default_rng(0)
    names = [
        "a.png",
        "b/c.json",
        "d" * 99,
        "empty.txt",
        *([LONG, "é.png"] if kind != "ustar" else ["p" * 90 + "/q.png"]),
    ]
    path = write(tmp_path / "x.tar", {name: rng.bytes(int(rng.integers(0, 2000))) for name in names}, kind)
    with tarfile.open(path) as tar:
        expected = [(item.name, item.offset_data, item.size) for item in tar.getmembers()]
        contents = [tar.extractfile(item).read() for item in tar.getmembers()]
    found = members(path)
    assert [(item.name, item.offset, item.length) for item in found] == expected
    assert {item.fault for item in found} == {""}
    assert [read_span(path, item.offset, item.length) for item in found] == contents
    assert end(path).fault == ""


def test_folders_are_no_files(tmp_path):
    path = special(tmp_path / "x.tar", "folder", tarfile.DIRTYPE)
    assert [item.name for item in members(path)] == ["before.png", "after.png"]


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        (tarfile.SYMTYPE, {"linkname": "/etc/passwd"}),
        (tarfile.LNKTYPE, {"linkname": "before.png"}),
        (tarfile.LNKTYPE, {"linkname": "before.png", "size": 5000}),
        (tarfile.CHRTYPE, {}),
        (tarfile.BLKTYPE, {}),
        (tarfile.FIFOTYPE, {}),
        (b"V", {}),
        (b"M", {}),
    ],
)
def test_links_and_devices_are_no_files_and_what_follows_is_found(tmp_path, kind, facts):
    path = special(tmp_path / "x.tar", "odd.png", kind, **facts)
    assert [(item.name, item.fault) for item in members(path)] == [
        ("before.png", ""), ("odd.png", "not_a_file"), ("after.png", ""),
    ]  # fmt: skip
    assert end(path).fault == ""


def header(name: bytes, size: int, kind: bytes, **bytes_at: bytes) -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[124:136] = b"0000644\0", b"%011o\0" % size
    block[156:157], block[257:265] = kind, b"ustar  \0"
    for place, content in bytes_at.items():
        start = int(place.removeprefix("at"))
        block[start : start + len(content)] = content
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_sparse_files_are_no_files_and_what_follows_is_found(tmp_path):
    after = header(b"after.png", 3, b"0") + b"abc".ljust(512, b"\0") + bytes(1024)
    old = header(b"old.png", 600, b"S", at482=b"\1") + bytes(504) + b"\1" + bytes(7) + bytes(512) + b"d" * 1024
    (tmp_path / "old.tar").write_bytes(old + after)
    record = b"22 GNU.sparse.major=1\n"
    pax = header(b"PaxHeaders/new.png", len(record), b"x") + record.ljust(512, b"\0")
    (tmp_path / "pax.tar").write_bytes(pax + header(b"new.png", 600, b"0") + b"d" * 1024 + after)
    for name in ("old", "pax"):
        path = tmp_path / f"{name}.tar"
        assert [(item.name, item.fault) for item in members(path)][1:] == [("after.png", "")]
        assert members(path)[0].fault == "not_a_file"
        assert read_span(path, members(path)[1].offset, 3) == b"abc"
        assert end(path).fault == ""


@pytest.mark.parametrize(
    "name", ["/etc/x.png", "../x.png", "a/../../x.png", "..", "C:\\x.png", "c:x.png", "..\\x.png", "\\\\host\\x.png"]
)
def test_names_that_lead_outside(tmp_path, name):
    path = write(tmp_path / "x.tar", {"before.png": b"1", name: b"2", "after.png": b"3"})
    assert [item.fault for item in members(path)] == ["", "path_leaves_root", ""]
    assert write(tmp_path / "y.tar", {"a..b/c..png": b"1"}).stat().st_size
    assert [item.fault for item in members(tmp_path / "y.tar")] == [""]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cut_tar_is_never_whole(tmp_path, kind):
    path = write(tmp_path / "x.tar", {f"{n}.png": bytes([n]) * (300 * n) for n in range(1, 8)}, kind)
    content, whole = path.read_bytes(), members(path)
    last = whole[-1].offset + whole[-1].length
    blocks_end = -(-last // 512) * 512 + 1024  # behind it there is only padding
    for length in [*range(0, blocks_end, 331), *range(0, blocks_end, 512)]:
        path.write_bytes(content[:length])
        assert end(path).fault == "tar_truncated", length
        for found, original in zip(members(path), whole, strict=False):
            assert (found.name, found.offset) == (original.name, original.offset)
            assert (found.fault == "truncated") == (original.offset + original.length > length)
    path.write_bytes(content[:blocks_end])
    assert end(path).fault == ""


def test_every_flipped_bit_of_a_header_is_noticed(tmp_path):
    path = write(tmp_path / "x.tar", {"a.png": b"1" * 600, "b.png": b"2"})
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.choice(512, 120, replace=False) + 1536:  # the header of b.png
        changed = bytearray(content)
        changed[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        *before, last = scan(path)
        if last.fault:
            assert last.fault == "tar_damaged"
            assert [item.name for item in before] == ["a.png"]
        else:  # in the checksum's own field, blanks and zeros are one
            assert 148 <= position - 1536 < 156
            assert [item.name for item in before] == ["a.png", "b.png"]


def test_what_is_no_tar(tmp_path):
    for number, content in enumerate((b"", b"PK\3\4" * 200, b"\x1f\x8b" + bytes(2000), b"\xff" * 600, b"x" * 100)):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(content)
        assert end(path).fault
        assert members(path) == []


def test_sizes_and_names_made_to_exhaust_memory(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(header(b"big.png", 0, b"0", at124=b"\x80" + (2**60).to_bytes(11, "big")) + bytes(2048))
    found, last = scan(path)
    assert (found.name, found.length, found.fault, last.fault) == ("big.png", 2**60, "truncated", "tar_truncated")
    with pytest.raises(UnreadableImageError):
        read_span(path, found.offset, found.length)
    for kind in (b"L", b"x", b"g"):
        path.write_bytes(header(b"name", 2**32, kind) + bytes(2048))
        assert [item.fault for item in scan(path)] == ["tar_damaged"]
    path.write_bytes(header(b"negative.png", 0, b"0", at124=b"\xff" * 12) + bytes(2048))
    assert [item.fault for item in scan(path)] == ["tar_damaged"]


@pytest.mark.slow
def test_random_bytes_never_stop_the_reader(tmp_path):
    path = write(tmp_path / "x.tar", {LONG: b"1" * 600, "é.png": b"2", "c.png": b"3"}, "pax")
    content, rng = path.read_bytes(), np.random.default_rng(1)
    for _ in range(5000):
        changed = bytearray(content)
        for position in rng.integers(0, len(content), int(rng.integers(1, 30))):
            changed[position] = int(rng.integers(256))
        path.write_bytes(changed[: int(rng.integers(1, len(changed)))])
        *_, last = scan(path)
        assert isinstance(last, End)


def test_a_member_of_a_tar_that_is_gone_or_shorter(tmp_path):
    path = write(tmp_path / "x.tar", {"a.png": b"1" * 600})
    with pytest.raises(UnreadableImageError) as caught:
        read_span(path, 512, 10**6)
    assert caught.value.reason == "truncated"
    path.unlink()
    with pytest.raises(UnreadableImageError) as caught:
        read_span(path, 512, 600)
    assert caught.value.reason == "missing"
