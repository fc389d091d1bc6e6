"""`hilum bench similar` at a small size: both sides find the same, all are timed, and a disagreement stops it."""

import runpy
from pathlib import Path

import pytest

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "similar.py"))


def test_both_sides_find_the_same_and_are_timed(tmp_path: Path) -> None:
    BENCHMARK["write_index"](tmp_path / "index", 5001, 24)
    row = BENCHMARK["compare"](tmp_path / "index", turns=2)
    assert row["agree"] == 1
    assert min(row[name] for name in ("ours", "peer", "floor")) > 0


def test_a_disagreement_stops_the_benchmark(monkeypatch, tmp_path: Path) -> None:
    main = BENCHMARK["main"]
    row = dict.fromkeys(("ours", "peer", "floor", "ours_cpu", "peer_cpu", "floor_cpu"), 1.0)
    monkeypatch.setitem(main.__globals__, "compare", lambda path: row | {"agree": 0.5})
    with pytest.raises(SystemExit, match="disagree"):
        main(100, 8)
