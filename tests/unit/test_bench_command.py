"""`hilum bench`: each benchmark runs as if it had been started alone, and one that fails costs no other."""

import sys
from pathlib import Path

import pytest

from hilum.commands import bench
from hilum.core.errors import HilumError

SAYS = "import sys; print('says', sys.argv[1:])"


def written(monkeypatch: pytest.MonkeyPatch, folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(bench, "FOLDER", folder)
    monkeypatch.setattr(sys, "argv", ["hilum", "bench", "all"])


@pytest.mark.parametrize("name", ["all", "words"])
def test_the_words_of_the_command_line_are_not_those_of_the_benchmark(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written(monkeypatch, tmp_path, words=SAYS)
    bench.run(name)
    assert "says []" in capsys.readouterr().out
    assert sys.argv == ["hilum", "bench", "all"]


def test_all_go_on_after_one_that_ends_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written(monkeypatch, tmp_path, a="import sys; sys.exit(0)", b=SAYS)
    bench.run("all")
    assert "says []" in capsys.readouterr().out


def test_failures_are_named_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written(
        monkeypatch, tmp_path, a="raise ValueError('no film')", b_c="raise SystemExit(3)", c="raise SystemExit('no')",
        d=SAYS,
    )  # fmt: skip
    with pytest.raises(HilumError, match=r"3 of 4 benchmarks failed: a \(ValueError: no film\), b-c \(3\), c \(no\)"):
        bench.run("all")
    said = capsys.readouterr()
    assert "says []" in said.out
    assert "Traceback" in said.err


@pytest.mark.parametrize("status", [0, 1])
def test_the_status_of_one_is_its_own(status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(monkeypatch, tmp_path, one=f"raise SystemExit({status})")
    with pytest.raises(SystemExit) as ended:
        bench.run("one")
    assert ended.value.code == status
