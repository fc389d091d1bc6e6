import errno
import os
from pathlib import Path

import pytest

from hilum.core.errors import HilumError
from hilum.core.files import atomic_file, atomic_path, read_json, sha256_file, write_bytes, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


def test_a_full_disk_names_the_path_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HilumError, match=r"a\.bin: No space left on device"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


def test_json_is_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert read_json(tmp_path / "a.json", HilumError) == {"é": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(HilumError, match="cannot be read as JSON"):
        read_json(tmp_path / "b.json", HilumError)
    with pytest.raises(HilumError, match="does not exist"):
        read_json(tmp_path / "c.json", HilumError)


def test_sha256_is_the_published_one(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_who_may_read_a_file_is_the_users_choice_not_the_writers(tmp_path: Path) -> None:
    """safetensors makes files private; a model in a group's folder must not be."""
    import torch
    from safetensors.torch import save_file

    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "weights.safetensors") as temporary:
            save_file({"x": torch.zeros(2)}, temporary)
        write_text(tmp_path / "text", "x")
    finally:
        os.umask(before)
    for name in ("weights.safetensors", "text"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
