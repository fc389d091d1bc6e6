"""The step benchmark: turns, batches that do not fit, contestants that fail or fall silent, and what the table says."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

FAKE = """
import json, sys, time
settings, name = json.loads(sys.argv[1]), {name!r}
seconds, fits, mood = {seconds}, {fits}, {mood!r}
def say(what):
    print(json.dumps(what), flush=True)
if mood == "broken":
    raise SystemExit("ModuleNotFoundError: no such package")
if settings["images"] > fits:
    say({{"out_of_memory": "no room"}})
    raise SystemExit
say({{"ready": {{"name": name, "device": "cpu", "flops_per_image": 2e9, "product_rate": 1e12}}}})
for number, line in enumerate(sys.stdin):
    if mood == "dies" and number == 1:
        raise SystemExit("CUDA error: an illegal memory access")
    if mood == "silent":
        time.sleep(60)
    with open({journal!r}, "a") as journal:
        journal.write(name + " " + line)
    say({{"seconds": seconds, "cpu_seconds": seconds / 2, "loss": 1.0, "peak_bytes": 2e9}})
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The benchmark with made-up contestants; `contestant` writes one."""
    for name in ("HILUM_PEER_PYTHON", "HILUM_PEER_MISSING", "HILUM_BENCH_ROWS", "HILUM_BENCH_COMPILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(BENCHMARKS / "pretrain_step.py"))
    inside = names["measure"].__globals__
    inside["HERE"] = tmp_path
    (tmp_path / "peers").mkdir()
    journal = tmp_path / "journal"

    def contestant(script: str, seconds: float = 1.0, fits: int = 99, mood: str = "") -> None:
        text = FAKE.format(name=script, seconds=seconds, fits=fits, mood=mood, journal=str(journal))
        (tmp_path / "peers" / f"{script}_step.py").write_text(text)

    def measure(*images: int, peer: str | None = sys.executable) -> dict[str, Any]:
        case = names["Case"]("name", "vits14", (56, 28), images, True, 0.0, goal=">= 1.5x")
        return names["measure"](case, "cpu", 3, 2, 1, peer)

    return SimpleNamespace(names=names, inside=inside, contestant=contestant, measure=measure, journal=journal)


def test_sides_take_turns_and_the_ratio_is_of_rounds(bench: SimpleNamespace) -> None:
    bench.contestant("hilum", 0.5)
    bench.contestant("lightly", 1.25)
    row = bench.measure(8)
    assert bench.journal.read_text().split("\n")[:-1] == [
        f"{name} run 2" for name in ("hilum", "lightly", "lightly", "hilum", "hilum", "lightly")
    ]
    assert row["ratio_seconds"] == row["ratio_cpu_seconds"] == [2.5, 2.5, 2.5]
    assert row["hilum"]["images_per_second"] == 16
    assert row["product_share"] == pytest.approx(8 / 0.25 * 2e9 / 1e12)  # by CPU time
    line = bench.names["table_row"](row)
    assert line.startswith("| name | 8 | 16.00 (16.00 to 16.00) | - | 6% | 2.0 | 6.40 | 2.0 | 2.50 (2.50 to 2.50)")
    assert line.count("|") == bench.names["HEADER"].split("\n")[0].count("|")


@pytest.mark.parametrize("tight", ["hilum", "lightly"])
def test_both_run_the_largest_batch_that_fits_both(bench: SimpleNamespace, tight: str) -> None:
    for script in ("hilum", "lightly"):
        bench.contestant(script, fits=16 if script == tight else 99)
    row = bench.measure(64, 32, 16, 8)
    assert row["images"] == 16
    assert row["hilum"]["images_per_second"] == row["peer"]["images_per_second"] == 16
    assert row["note"].count("out of memory") == 2


def test_no_batch_that_fits_is_no_figure(bench: SimpleNamespace) -> None:
    bench.contestant("hilum", fits=4)
    bench.contestant("lightly")
    with pytest.raises(bench.names["OutOfMemoryError"], match="batch 8: hilum out of memory"):
        bench.measure(8)


def test_a_peer_that_fails_leaves_our_figure_and_its_reason(bench: SimpleNamespace) -> None:
    bench.contestant("hilum")
    bench.contestant("lightly", mood="broken")
    row = bench.measure(8)
    assert "peer" not in row
    assert "ratio_seconds" not in row
    assert "not measured (ModuleNotFoundError: no such package)" in bench.names["table_row"](row)


def test_a_peer_that_fails_between_rounds_leaves_our_figure_too(bench: SimpleNamespace) -> None:
    bench.contestant("hilum")
    bench.contestant("lightly", mood="dies")
    row = bench.measure(8)
    assert row["hilum"]["images_per_second"] == 8
    assert bench.journal.read_text().count("hilum run") == 3
    assert "peer" not in row
    assert "not measured (CUDA error: an illegal memory access)" in bench.names["table_row"](row)


def test_without_a_peer_the_ratio_is_not_measured(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench.contestant("hilum")
    assert bench.names["peer_python"]() is None
    assert "not measured (no peer environment" in bench.names["table_row"](bench.measure(8, peer=None))
    monkeypatch.setenv("HILUM_PEER_MISSING", "the network is away")
    assert "not measured (the network is away)" in bench.names["table_row"](bench.measure(8, peer=None))
    (tmp_path / "outputs/peer").mkdir(parents=True)
    assert bench.names["peer_python"]() is None  # half made
    (tmp_path / "outputs/peer/.ready").touch()
    assert bench.names["peer_python"]() == "outputs/peer/bin/python"
    monkeypatch.setenv("HILUM_PEER_PYTHON", "/elsewhere/python")
    assert bench.names["peer_python"]() == "/elsewhere/python"


def test_a_contestant_that_falls_silent_is_ended(bench: SimpleNamespace) -> None:
    bench.inside["SECONDS_TO_ANSWER"] = 0.5
    bench.contestant("hilum", mood="silent")
    bench.contestant("lightly")
    with pytest.raises(bench.names["ContestantError"], match="ended with status -9"):
        bench.measure(8)


def test_every_row_is_on_disk_as_soon_as_it_is_measured(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.contestant("hilum", mood="broken")
    monkeypatch.setenv("HILUM_BENCH_OUT", str(tmp_path / "figures"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    rows = bench.names["main"]()
    written = json.loads((tmp_path / "figures/pretrain-step.json").read_text())
    assert list(written) == list(rows) == [case.name for case in bench.names["CPU_CASES"]]
    assert all("no such package" in row["failure"] for row in written.values())
    assert "not measured (ModuleNotFoundError" in capsys.readouterr().out


def test_cases_are_what_the_two_sides_can_run() -> None:
    names = runpy.run_path(str(BENCHMARKS / "pretrain_step.py"))
    for case in names["GPU_CASES"] + names["CPU_CASES"]:
        patch = int(case.model[-2:])
        assert all(size % patch == 0 for size in case.sizes), case.name
        assert list(case.images) == sorted(case.images, reverse=True)
        if case.peer:
            assert case.bottlenecks[0] == case.bottlenecks[1], "the peer has one width for both heads"
            assert case.registers == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_the_real_contestant_learns_and_tells_its_work(precision: str) -> None:
    names = runpy.run_path(str(BENCHMARKS / "pretrain_step.py"))
    case = names["Case"](
        "tiny", "vits14", (56, 28), (2,), False, 0.1, prototypes=512, precision=precision, bottlenecks=(64, 32)
    )
    row = names["measure"](case, "cpu", 2, 1, 1, None)
    ours = row["hilum"]
    assert ours["compiled"] is False
    assert 5e9 < ours["flops_per_image"] < 5e10
    assert 0 < row["product_share"] < 1.5
    assert 5 < ours["first_loss"] < 20
    assert ours["peak_gb"] > 0.1
