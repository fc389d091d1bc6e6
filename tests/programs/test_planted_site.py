"""runs/planted_site.py on a small demo: the whole way from pictures to a verdict, with what was planted."""

import importlib.util
from pathlib import Path

import pytest

from hilum.commands import demo
from hilum.recipes import demo_plan

SCRIPT = Path(__file__).resolve().parents[2] / "runs" / "planted_site.py"


@pytest.mark.slow
def test_a_site_of_synthetic_patients(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("planted_site", SCRIPT)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    demo.run(demo_plan(), tmp_path / "demo", patients=300, seed=0)
    found = planted.main(tmp_path / "demo" / "model", tmp_path / "site", bootstraps=200)
    everything = found["all"]
    assert everything["verdicts"][planted.RANDOM] == "no"
    before, after = everything["Brier"]
    assert after < before
    assert everything["better"] > everything["worse"] == 0
    assert found["few"]["verdict"] == "not shown"
