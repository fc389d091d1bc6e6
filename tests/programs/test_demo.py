"""The whole way on a few phantoms, with the packages blocked that the core must not need."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hilum.commands import demo
from hilum.core.errors import ConfigError
from hilum.data.store import Store
from hilum.deploy.predictor import load
from hilum.evaluation.predictions import read_predictions
from hilum.evaluation.studies import mean_over_studies
from hilum.heads.config import FitConfig
from hilum.pretraining.config import PretrainConfig
from hilum.recipes import demo_plan

PATIENTS = 40
BLOCKED = ("torchvision", "timm", "transformers", "xformers")


def tiny_plan() -> demo.DemoPlan:
    """The demo's own plan, a few steps of each stage."""
    plan = demo_plan()

    def few(config: PretrainConfig, size: int) -> PretrainConfig:
        crops = replace(config.crops, global_size=size, local_size=32, local_crops=2)
        return replace(config, crops=crops, steps=2, batch_size=8, precision="fp32")

    def short(config: FitConfig) -> FitConfig:
        return replace(config, search_epochs=2, refit_epochs=2, learning_rates=(1e-3, 5e-3), augmented_views=1)

    return replace(
        plan,
        pretraining=few(plan.pretraining, 64),
        higher_resolution=few(plan.higher_resolution, 96),
        linear=short(plan.linear),
        decoder=short(plan.decoder),
        image_size=128,
        store_size=112,
        bootstraps=20,
        examples=2,
    )


def run_apart(folder: Path) -> Path:
    """A demo that runs in its own processes, with the blocked packages absent from all of them."""
    out, absent = folder / "demo", folder / "absent"
    absent.mkdir()
    for name in BLOCKED:
        (absent / f"{name}.py").write_text(f"raise ImportError({name!r})")
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_demo
test_demo.demo.run(test_demo.tiny_plan(), Path({str(out)!r}), patients={PATIENTS})
"""
    environment = {**os.environ, "PYTHONPATH": str(absent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "+ calibration" in done.stdout
    assert done.stdout.count("validation mAP") == 3  # what the processes that fit heads say is passed on
    return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_apart(tmp_path_factory.mktemp("demo"))


@pytest.mark.slow
def test_two_clean_runs_of_the_whole_pipeline_give_the_same_results(finished: Path, tmp_path: Path) -> None:
    again = run_apart(tmp_path)
    results = [json.loads((out / "results.json").read_text()) for out in (finished, again)]
    for result in results:
        result.pop("seconds")
        result.pop("model")  # a path
    assert results[0] == results[1]
    for name in ("model/members/decoder_high/model.safetensors", "model/members/decoder_low/search.json"):
        assert (finished / name).read_bytes() == (again / name).read_bytes(), name


def test_the_table_has_every_step_with_its_difference(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert [step["name"] for step in results["steps"]] == [
        "linear", "decoder", "+ study mean", "+ ensemble", "+ calibration",
    ]  # fmt: skip
    for step in results["steps"][1:]:
        difference = step["difference"]
        assert difference["low"] <= difference["high"]
        assert difference["shown"] == (difference["low"] > 0 or difference["high"] < 0)
    assert len(results["metrics"]["findings"]) == 40
    few = results["metrics"]["excluded"]["few_positives"]
    assert {name for name, one in results["metrics"]["findings"].items() if one["positives"] < 10} >= set(few)


def test_calibration_changes_no_ranking(finished: Path) -> None:
    steps = {step["name"]: step for step in json.loads((finished / "results.json").read_text())["steps"]}
    for metric in ("mAP", "mAUC"):
        assert steps["+ calibration"][metric] == pytest.approx(steps["+ ensemble"][metric], abs=1e-12)


def test_the_last_row_is_what_the_saved_ensemble_predicts(finished: Path) -> None:
    store = Store.open(finished / "store")
    predicted = load(finished / "model").predict_store(store, store.indices("test"), raw=True)
    table = read_predictions(finished / "uncalibrated.parquet")
    assert np.array_equal(predicted.image_uid, table.image_uid)
    mean = mean_over_studies(predicted.replace(predicted.probabilities, stage="raw"))
    np.testing.assert_allclose(mean.probabilities, table.probabilities, atol=1e-6)


def test_nothing_held_out_was_pretrained_on(finished: Path) -> None:
    store = Store.open(finished / "store")
    model = load(finished / "model")
    assert model.exposure.count(store.uids[store.indices("test")])["any"] == 0
    assert model.exposure.count(store.uids[store.indices("train")])["any"] == len(store.indices("train"))


def test_the_report_shows_lesions_and_needs_nothing_else(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "Research use only" in page
    assert "Study 1" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page


def test_a_demo_writes_what_the_next_one_removes(finished: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == sorted(demo.WRITES)
    shutil.copytree(finished, tmp_path / "demo")
    (tmp_path / "demo" / ".store.1f2e3d4c.tmp").mkdir()
    (tmp_path / "demo" / "phantoms" / "notes.txt").write_text("mine")
    demo._make_room(tmp_path / "demo")
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["phantoms"]  # write_phantoms replaces its own
    assert (tmp_path / "demo" / "phantoms" / "notes.txt").exists()


def test_another_persons_file_in_a_demo_keeps_all_of_it(finished: Path) -> None:
    (finished / "thesis.txt").write_text("years of work")
    try:
        with pytest.raises(ConfigError, match=r"holds thesis\.txt: not a demo's own"):
            demo.run(tiny_plan(), finished)
        assert {path.name for path in finished.iterdir()} == {*demo.WRITES, "thesis.txt"}
    finally:
        (finished / "thesis.txt").unlink()


@pytest.mark.parametrize("name", ["thesis.txt", "store"])
def test_a_folder_that_is_not_a_demo_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("years of work")
    with pytest.raises(ConfigError, match="not a demo"):
        demo.run(tiny_plan(), tmp_path)
    assert (tmp_path / name).read_text() == "years of work"


@pytest.mark.parametrize("out", ["file", "file/demo"])
def test_a_file_is_no_place_for_a_demo(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(ConfigError, match="cannot be used as a folder"):
        demo.run(tiny_plan(), tmp_path / out)
    assert (tmp_path / "file").read_text() == "years of work"
