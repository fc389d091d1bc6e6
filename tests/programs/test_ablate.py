"""`hilum ablate` on a tiny store: the table, equality with the programs run by hand, kills, changed plans, failures."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hilum import plans
from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import load_backbone, read_backbone_config, save_backbone
from hilum.commands import ablate, ablate_making, ablate_results, combine, evaluate, fit, predict
from hilum.commands.ablate_plan import AblationPlan, PlannedBackbone, PlannedHead, PlannedRow, PublishedNumber
from hilum.commands.ablate_units import UNIT_NAME, Unit, Workplace
from hilum.core.config import read_yaml, write_yaml
from hilum.core.errors import ConfigError, HilumError
from hilum.data.intensity import PREPROCESS_ID
from hilum.data.labels import CXRLT_2024_TASK1, TASKS
from hilum.data.store import Store, write_arrays
from hilum.deploy.model_files import read_validation
from hilum.evaluation.ensemble import combine_members
from hilum.evaluation.metrics import evaluate as judge
from hilum.evaluation.predictions import read_predictions
from hilum.evaluation.ranks import Ranks
from hilum.evaluation.studies import aggregate_studies

FINDINGS = CXRLT_2024_TASK1[:6]
SHORT = (
    "resolution=32", "blocks=1", "search_epochs=2", "refit_epochs=2", "augmented_views=1", "batch_size=16", "threads=1",
    "learning_rates=[1e-3, 1e-2]", "workers=1",
)  # fmt: skip
TASK1, TASK2 = "cxrlt2024-task1", "cxrlt2024-task2"
PLAN = AblationPlan(
    "tiny",
    (PlannedBackbone("untrained", weights="random:demo16"),),
    (
        PlannedHead("plain", "untrained", "linear", SHORT),
        PlannedHead("wide", "untrained", "linear", (*SHORT, "flip=0")),
    ),
    (
        PlannedRow("plain", ("plain",), published=(PublishedNumber(TASK1, 0.2),)),
        PlannedRow("averaged", ("plain",), study="mean", against=("plain",)),
        PlannedRow("both", ("plain", "wide"), study="mean", calibrated=True, against=("averaged",)),
    ),
    seeds=(0, 3),
    tasks=(TASK1, TASK2),
    bootstraps=20,
    minimum_positives=2,
)


ONE_SEED = replace(PLAN, seeds=(3,))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ablate") / "store"
    rng = np.random.default_rng(0)
    splits = ["train"] * 40 + ["val"] * 16 + ["test"] * 24
    labels = (rng.random((80, 6)) < 0.4).astype(np.int8)
    labels[1::2] = labels[::2]  # of a study
    labels[4, 2] = -1
    images = [rng.integers(0, 90, (36, 36), np.uint8) + np.uint8(100 * int(y)) for y in labels[:, 0]]
    write_arrays(
        path, images, labels, FINDINGS, splits=splits, studies=[f"arrays/s{n // 2}" for n in range(80)],
        patients=[f"arrays/p{n // 4}" for n in range(80)], views=["PA", "LATERAL"] * 40,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    ablate.run(plans.resolve(PLAN), store, out, "cpu")
    return out


def results(out: Path) -> dict:
    content = json.loads((out / "results.json").read_text())
    del content["seconds"], content["unit_seconds"]
    return content


def place(store: Path, out: Path, plan: AblationPlan = PLAN) -> Workplace:
    return Workplace(plans.resolve(plan), store, out, "cpu")


def test_every_row_has_every_seed_an_interval_and_its_published_number(finished: Path) -> None:
    found = results(finished)
    assert [row["name"] for row in found["rows"]] == ["plain", "averaged", "both"]
    for row in found["rows"]:
        for task in (TASK1, TASK2):
            entry = row["tasks"][task]["all"]["mAP"]
            assert set(entry["seeds"]) == {"0", "3"}
            assert entry["low"] <= entry["value"] <= entry["high"]
    assert found["rows"][0]["tasks"][TASK1]["published"] == 0.2
    assert found["rows"][0]["tasks"][TASK2]["published"] is None
    assert [(one["row"], one["against"]) for one in found["differences"]] == [
        ("averaged", "plain"),
        ("both", "averaged"),
    ]
    assert found["failures"] == []
    assert found["rows"][2]["chosen"]["wide"]["3"]["learning_rate"] in (1e-3, 1e-2)
    assert found["plan"]["bootstraps"] == 20
    assert read_yaml(AblationPlan, finished / "plan.yaml") == PLAN
    for name in ("table.md", "report.html"):
        assert "averaged" in (finished / name).read_text()


def test_task_2_is_columns_of_the_outputs_of_task_1(finished: Path, store: Path) -> None:
    found = results(finished)
    one, two = (found["tasks"][task]["findings"] for task in (TASK1, TASK2))
    assert one == list(FINDINGS)
    assert two == [name for name in TASKS[TASK2] if name in FINDINGS]
    assert 0 < len(two) < len(one)
    at = place(store, finished)
    for row in PLAN.rows:
        table = read_predictions(at.folder(Unit("rows", row.name, 3)) / "test.parquet")
        opened = Store.open(store)
        labels = opened.labels[opened.indices("test")]
        columns = [table.findings.index(name) for name in two]
        expected = judge(table.select(two), labels[:, columns])["macro"]["mAP"]
        entry = next(one for one in found["rows"] if one["name"] == row.name)["tasks"][TASK2]["all"]["mAP"]
        assert entry["seeds"]["3"] == pytest.approx(expected, rel=1e-12)


def test_a_task_of_2026_is_columns_that_answer_its_classes(tmp_path: Path) -> None:
    """Its names are its own: "aortic elongation" is what a store calls Tortuous Aorta."""
    task, findings = "cxrlt2026-task1", ("Tortuous Aorta", "Hernia", "Scanner")
    images, splits = [np.zeros((8, 8), np.uint8)] * 4, ["test"] * 4
    write_arrays(tmp_path / "store", images, np.ones((4, 3), np.int8), findings, splits=splits)
    at = place(tmp_path / "store", tmp_path / "out", replace(PLAN, tasks=(TASK1, task)))
    found = ablate_results._columns(task, at, {})
    assert found["findings"] == ["Tortuous Aorta", "Hernia"]
    assert found["left_out"]["not_in_store"] == [
        name for name in TASKS[task] if name not in ("aortic elongation", "Hernia")
    ]
    assert found["asked"] == len(TASKS[task])


def test_a_row_equals_the_programs_run_by_hand(finished: Path, store: Path, tmp_path: Path) -> None:
    at = place(store, finished)
    fit.run(replace(at.resolved.fitting["plain"], seed=3), store, "random:demo16", tmp_path / "model", "cpu")
    predict.run(tmp_path / "model", [f"{store}:test"], tmp_path / "raw.parquet", raw=True, device="cpu")
    combine.run([tmp_path / "raw.parquet"], tmp_path / "study.parquet", "mean", None, "image")
    by_hand = evaluate.run(tmp_path / "study.parquet", store, tmp_path / "judged", split="test", bootstraps=0)
    row = at.result("averaged", 3)
    expected = [by_hand["findings"][name]["AP"] for name in row.findings]
    np.testing.assert_allclose(row.points["AP"], expected, rtol=1e-9)


def test_an_ensemble_row_is_calibrated_on_validation_alone(finished: Path, store: Path) -> None:
    table = read_predictions(place(store, finished).folder(Unit("rows", "both", 0)) / "test.parquet")
    assert table.stage == "calibrated"
    assert len(table.metadata["members"]) == 2
    assert table.metadata["study_aggregation"] == "mean"


def test_ranks_of_a_row_are_among_validation_so_that_no_test_image_depends_on_another(
    finished: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, row = place(store, finished), PlannedRow("ranked", ("plain", "wide"), study="mean", ensemble="rank_mean")
    whole, cuts = ablate_making.row_predictions(at, row, 3)
    validation = [aggregate_studies(read_validation(at.model_path(head, 3))[0], "mean") for head in row.heads]
    files = [at.folder(Unit("predictions", head, 3)) / "test.parquet" for head in row.heads]
    test = [aggregate_studies(read_predictions(path), "mean") for path in files]
    ranks = [Ranks.of(one) for one in validation]
    np.testing.assert_array_equal(whole.probabilities, combine_members(test, "rank_mean", ranks=ranks).probabilities)
    monkeypatch.setattr(ablate_making, "read_predictions", lambda path: read_predictions(path).rows(np.arange(8)))
    part, same = ablate_making.row_predictions(at, row, 3)
    np.testing.assert_array_equal(part.probabilities, whole.probabilities[:8])
    assert same == cuts
    planned = place(store, finished, replace(PLAN, rows=(*PLAN.rows, row)))
    settings = {name: planned.inputs(Unit("rows", name, 3))["settings"] for name in ("ranked", "both")}
    assert settings["ranked"].get("ranks") == "validation"  # rows of before are made again
    assert "ranks" not in settings["both"]


def test_what_is_finished_is_not_made_again(finished: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob(f"*/*/*/{UNIT_NAME}")}
    found = results(finished)
    ablate.run(plans.resolve(PLAN), store, finished, "cpu")
    assert "14 units, 14 of them finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.glob(f"*/*/*/{UNIT_NAME}")}
    assert results(finished) == found


def test_a_stopped_run_goes_on_and_ends_with_the_same_numbers(
    finished: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def stop_at_the_third(at: Workplace, unit: Unit, perform=ablate.perform) -> None:
        made.append(unit)
        if len(made) == 3:
            raise KeyboardInterrupt
        perform(at, unit)

    monkeypatch.setattr(ablate, "perform", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        ablate.run(plans.resolve(ONE_SEED), store, tmp_path / "out", "cpu")
    assert not (tmp_path / "out" / "results.json").exists()
    ablate.run(plans.resolve(ONE_SEED), store, tmp_path / "out", "cpu")
    assert made[2] == made[3]  # the one that was cut short is the first to be made
    assert len(made) == 8
    whole, part = (place(store, out, ONE_SEED) for out in (finished, tmp_path / "out"))
    for row in ("plain", "averaged", "both"):
        one, other = whole.result(row, 3), part.result(row, 3)
        np.testing.assert_array_equal(one.points["AP"], other.points["AP"])
        np.testing.assert_array_equal(one.samples["AUC"], other.samples["AUC"])


@pytest.mark.slow
def test_a_half_made_head_is_made_again(finished: Path, store: Path, tmp_path: Path) -> None:
    at = place(store, tmp_path)
    folder = at.folder(Unit("heads", "plain", 0))
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")  # all but the last file
    ablate.run(plans.resolve(replace(PLAN, rows=PLAN.rows[:1], seeds=(0,))), store, tmp_path, "cpu")
    assert (
        at.record(Unit("heads", "plain", 0))["output"]
        == place(store, finished).record(Unit("heads", "plain", 0))["output"]
    )


def test_a_changed_plan_makes_only_what_changed_and_says_what(
    finished: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = (PLAN.heads[0], replace(PLAN.heads[1], overrides=(*PLAN.heads[1].overrides, "weight_decay=0.01")))
    changed = replace(ONE_SEED, heads=heads)
    before = set(finished.glob(f"*/*/*/{UNIT_NAME}"))
    ablate.run(plans.resolve(changed), store, finished, "cpu")
    new = {str(path.relative_to(finished)).rpartition("/")[0].rpartition("/")[0] for path in
           set(finished.glob(f"*/*/*/{UNIT_NAME}")) - before}  # fmt: skip
    assert new == {"heads/wide", "predictions/wide", "rows/both"}
    printed = capsys.readouterr().out
    assert "7 units, 4 of them finished" in printed
    assert "heads/wide seed 3 is made again: weight_decay: 0.0001 -> 0.01" in printed
    assert "heads/plain" not in printed
    ablate.run(plans.resolve(PLAN), store, finished, "cpu")  # back again: everything is still there
    assert "14 units, 14 of them finished" in capsys.readouterr().out


def test_a_unit_that_fails_is_reported_and_the_others_go_on(store: Path, tmp_path: Path) -> None:
    deep = PlannedHead("deep", "untrained", "linear", (*SHORT, "blocks=99"))
    rows = (PLAN.rows[0], PlannedRow("deep", ("deep",), against=("plain",)))
    plan = replace(PLAN, heads=(deep, PLAN.heads[0]), rows=rows, seeds=(0,))
    with pytest.raises(HilumError, match=r"3 of 6 units(.|\n)*heads/deep seed 0: blocks: 99 of a backbone that has 4"):
        ablate.run(plans.resolve(plan), store, tmp_path, "cpu")
    found = results(tmp_path)
    assert [failure["unit"] for failure in found["failures"]] == [
        "heads/deep seed 0", "predictions/deep seed 0", "rows/deep seed 0",
    ]  # fmt: skip
    assert found["failures"][1]["error"] == "not tried, because it needs heads/deep seed 0"
    assert found["rows"][0]["tasks"][TASK1]["all"]["mAP"]["value"] > 0
    assert found["rows"][1]["seeds"] == []
    assert found["differences"] == []
    assert "Not made: heads/deep seed 0" in (tmp_path / "table.md").read_text()


def test_weights_that_nobody_recorded_are_said_beside_the_numbers(store: Path, tmp_path: Path) -> None:
    save_backbone(
        VisionTransformer(ViTConfig(16, 1, 2, patch_size=16, image_size=32)), tmp_path / "theirs", PREPROCESS_ID
    )
    backbone = PlannedBackbone("untrained", weights=str(tmp_path / "theirs"))
    plan = replace(PLAN, backbones=(backbone,), rows=PLAN.rows[:1], seeds=(0,))
    ablate.run(plans.resolve(plan), store, tmp_path / "out", "cpu")
    [row] = results(tmp_path / "out")["rows"]
    assert "nothing lists" in row["exposure_not_recorded"]
    assert f"Exposure of plain: {row['exposure_not_recorded']}." in (tmp_path / "out" / "table.md").read_text()


def test_a_store_without_test_images_is_refused(tmp_path: Path) -> None:
    images = [np.zeros((36, 36), np.uint8)] * 4
    write_arrays(tmp_path / "store", images, np.ones((4, 6), np.int8), FINDINGS, splits=["train", "val"] * 2)
    with pytest.raises(ConfigError, match="no test images"):
        ablate.run(plans.resolve(PLAN), tmp_path / "store", tmp_path / "out", "cpu")
    with pytest.raises(ConfigError, match="expected auto, cpu or cuda"):
        ablate.run(plans.resolve(PLAN), tmp_path / "store", tmp_path / "out", "gpu0")


def pretrained() -> AblationPlan:
    """A backbone that is pretrained, one that starts from it, and one that is its checkpoint of half way."""
    crops = ("crops.global_size=32", "crops.local_size=16", "crops.local_crops=2")
    steps = ("steps=4", "batch_size=8", "precision=fp32", "checkpoint_every=2", "threads=1")
    backbones = (
        PlannedBackbone("half", checkpoint_of="low", at=0.5),
        PlannedBackbone("high", "demo_128", (*crops, *steps), init="low"),
        PlannedBackbone("low", "demo_128", (*crops, *steps)),
    )
    heads = tuple(PlannedHead(name, name, "linear", SHORT[1:]) for name in ("half", "high", "low"))
    rows = tuple(PlannedRow(name, (name,)) for name in ("half", "high", "low"))
    return replace(PLAN, backbones=backbones, heads=heads, rows=rows, seeds=(0, 1))


@pytest.mark.slow
def test_backbones_are_pretrained_once_in_order_and_one_is_a_checkpoint(store: Path, tmp_path: Path) -> None:
    plan = pretrained()
    ablate.run(plans.resolve(plan), store, tmp_path, "cpu")
    at = place(store, tmp_path, plan)
    runs = {name: Path(at.backbone_path(name, 0)) for name in ("half", "high", "low")}
    assert len(list(tmp_path.glob("backbones/*/*"))) == 3
    half, whole = (read_backbone_config(runs[name]) for name in ("half", "low"))
    assert (half["step"], whole["step"]) == (2, 4)
    assert half["seen"]["images"] <= whole["seen"]["images"]
    differs = [
        not torch.equal(one, other)
        for one, other in zip(
            load_backbone(runs["half"]).parameters(), load_backbone(runs["low"]).parameters(), strict=True
        )
    ]
    assert any(differs)
    config = json.loads((runs["high"] / "config.json").read_text())
    assert Path(config["init"]) == runs["low"].resolve()
    each = replace(plan, seeds_of="everything", rows=plan.rows[-1:])
    ablate.run(plans.resolve(each), store, tmp_path / "each", "cpu")
    assert len(list((tmp_path / "each").glob("backbones/low/*"))) == 2


@pytest.mark.slow
def test_side_by_side_and_killed_gives_the_same_numbers(finished: Path, store: Path, tmp_path: Path) -> None:
    write_yaml(tmp_path / "plan.yaml", PLAN)
    command = [
        str(Path(sys.executable).parent / "hilum"), "ablate", str(tmp_path / "plan.yaml"), "--data", str(store),
        "--out", str(tmp_path / "out"), "--workers", "2", "--device", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob(f"heads/*/*/{UNIT_NAME}")) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "out" / "results.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0 of them finished" not in done.stdout
    assert results(tmp_path / "out") == results(finished)
