"""`hilum bench metrics` at a small size: the two sides agree, and a disagreement stops it."""

import runpy
from pathlib import Path

import numpy as np
import pytest

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "metrics.py"))


def test_the_two_sides_agree_and_both_are_timed():
    row = BENCHMARK["compare"](600, 3, 150, 2)
    assert row["off"] < 1e-12
    assert min(row["peer_seconds"], row["floor_seconds"]) > 0
    own = BENCHMARK["ours"](600, 3, 150, 10)
    assert own["peak_mb"] >= own["before_mb"] > 0
    assert own["seconds"] > 0


def test_the_data_are_long_tailed_by_patient_and_partly_unknown():
    p, y, patient = BENCHMARK["made_up"](4000, 5, 500)
    known = y >= 0
    prevalence = np.array([(y[known[:, c], c] == 1).mean() for c in range(5)])
    assert (np.diff(prevalence) < 0).all()
    assert 0.01 < 1 - known.mean() < 0.03
    assert (np.unique(patient) == np.arange(500)).all()
    assert np.bincount(patient).max() > 4 * np.median(np.bincount(patient))
    assert ((p > 0) & (p < 1)).all()


def test_a_disagreement_stops_the_benchmark(monkeypatch):
    main = BENCHMARK["main"]
    row = {"seconds": 1.0, "cpu_seconds": 1.0, "before_mb": 1.0, "peak_mb": 2.0, "peer_seconds": 1.0,
           "floor_seconds": 1.0, "off": 1e-9}  # fmt: skip
    monkeypatch.setitem(main.__globals__, "in_a_process", lambda *_: dict(row))
    with pytest.raises(SystemExit, match="disagree"):
        main(10, 2, 5, 3)
