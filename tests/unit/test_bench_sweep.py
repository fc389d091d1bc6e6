"""The yardstick of the sweep is the same head: what it learns without dropout is what a sweep learns."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hilum.heads.candidates import grid
from hilum.heads.compact import fit_reduction
from hilum.heads.sweep import Sweep

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")
RATES = (1e-3, 1e-2)


@pytest.fixture(scope="module")
def shared() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "_head_rounds.py")))


def test_the_peer_without_dropout_is_the_same_head(shared: SimpleNamespace) -> None:
    size = shared.SMALL
    problem = shared.Problem(size, 32, 1, CPU)
    problem.labels[3:9, 2] = -1
    assert size.dropout == 0
    sweep = Sweep(grid([size.config()], RATES), 10)
    loop = shared.Loop(sweep.state(0), RATES, 10, size.heads, CPU, size.dropout)
    for _ in range(4):
        expected = sweep.step(problem.features(problem.tokens), problem.labels)
        assert loop.step(problem.tokens, problem.labels) == pytest.approx(expected, rel=1e-4)
    logits = sweep.logits(problem.features(problem.tokens))
    assert torch.allclose(loop.logits(problem.tokens), logits, atol=2e-3)


def test_every_side_takes_its_turns_and_a_row_says_how_it_did(shared: SimpleNamespace) -> None:
    size = shared.SMALL
    problem = shared.Problem(size, 32, 1, CPU)
    reduction = fit_reduction([problem.features(problem.tokens)], size.kept)
    kept = reduction.keep(problem.tokens)
    sides = [
        shared.peer_side(size, RATES, 6, CPU),
        shared.own_side(problem, RATES, 6, CPU, "bf16", reduction),
        shared.own_side(problem, RATES, 6, CPU, "fp32", halve_at=(2,)),
    ]
    times = shared.in_turns(
        sides, lambda side, _: side.step(kept if side.reads == "kept" else problem.tokens, problem.labels), 3, 1, CPU
    )
    assert [len(side.logits(problem.tokens)) for side in sides] == [2, 2, 1]
    areas = {side.name: (shared.mean_auroc(side.logits(problem.tokens)[0], problem.labels), 0.5) for side in sides}
    rows = shared.rows_of("case", times, 32, {sides[1].name: ">= 3x"}, areas)
    assert rows[0]["faster"] == [1.0, 1.0, 1.0]
    assert rows[1]["goal"] == ">= 3x"
    assert all(shared.table_row(row).count("|") == shared.HEADER.splitlines()[0].count("|") for row in rows)
    missing = {"case": "ViT-L", "failure": "no GPU", "goal": ">= 4x"}
    assert "not measured (no GPU)" in shared.table_row(missing)
    assert shared.table_row(missing).count("|") == shared.HEADER.splitlines()[0].count("|")


def test_area_under_the_curve_is_that_of_scikit_learn(shared: SimpleNamespace) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    logits, labels = (
        torch.randn(50, 3, generator=generator),
        (torch.rand(50, 3, generator=generator) < 0.3).to(torch.int8),
    )
    expected = metrics.roc_auc_score(labels.numpy(), logits.numpy(), average="macro")
    assert shared.mean_auroc(logits, labels) == pytest.approx(expected, abs=1e-12)
