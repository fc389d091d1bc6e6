"""Long predictions: read in parts that outlive a kill, by several processes, and accounted for to the last input."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
import pytest
import strangers
from damage_inputs import png, radiograph, saved, written
from jsonschema import Draft202012Validator
from PIL import Image

from hilum.commands import fit, predict, predict_parts, predict_workers
from hilum.core.errors import ConfigError, EmptyStudyError, HilumError, MissingColumnError
from hilum.data.store import Store, write_arrays
from hilum.deploy.predictor import load
from hilum.evaluation.predictions import read_predictions
from hilum.heads.config import FitConfig

FINDINGS = ("Edema", "Mass")
SMALL = FitConfig(
    head="linear", resolution=32, blocks=1, learning_rates=(1e-2,), search_epochs=1, refit_epochs=1, batch_size=16,
    threads=1, workers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`model`, which is screened and knows views; `set`, whose head reads whole studies; `store`; `films`."""
    path = tmp_path_factory.mktemp("parts")
    rng = np.random.default_rng(0)
    images = [strangers.film(rng, bool(n % 2)) for n in range(200)]
    labels = (rng.random((200, 2)) < 0.5).astype(np.int8)
    write_arrays(
        path / "store", images, labels, FINDINGS, splits=["train"] * 120 + ["val"] * 40 + ["test"] * 40,
        studies=[f"arrays/s{n // 2}" for n in range(200)], patients=[f"arrays/p{n // 4}" for n in range(200)],
        views=["PA" if n % 2 == 0 else "LATERAL" for n in range(200)],
    )  # fmt: skip
    fit.run(SMALL, path / "store", "random:demo16", path / "model", device="cpu")
    (path / "films").mkdir()
    for number in range(12):
        cv2.imwrite(str(path / "films" / f"{number:02d}.png"), images[160 + number])
    return path


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is one batch."""
    monkeypatch.setattr(predict_parts, "BATCHES_A_PART", 1)


def flags(out: Path) -> dict[str, tuple[str, str]]:
    with Path(f"{out}.flags.csv").open() as file:
        return {row["image_id"]: (row["flag"], row["scored"]) for row in csv.DictReader(file)}


# Parts


@pytest.mark.usefixtures("small_parts")
def test_a_run_that_is_stopped_goes_on_and_ends_with_the_same_bits(folder: Path, tmp_path: Path, monkeypatch) -> None:
    target = [str(folder / "films")]
    predict.run(folder / "model", target, tmp_path / "straight.parquet", device="cpu", batch_size=3)
    reads: list[int] = []
    original = predict_workers.read_part

    def three_parts(model, work, positions, done, store):
        if len(reads) == 3:
            raise KeyboardInterrupt
        reads.append(len(positions))
        return original(model, work, positions, done, store)

    monkeypatch.setattr(predict_workers, "read_part", three_parts)
    out = tmp_path / "stopped.parquet"
    with pytest.raises(KeyboardInterrupt):
        predict.run(folder / "model", target, out, device="cpu", batch_size=3)
    assert not out.exists()
    kept = Path(f"{out}.parts")
    assert sorted(path.name for path in kept.glob("*.done")) == ["0.done", "1.done", "2.done"]
    (kept / "1.npz").write_bytes((kept / "1.npz").read_bytes()[:-9])  # damaged: read again
    (kept / "2.done").unlink()  # killed before it was marked: read again
    reads.clear()
    predict.run(folder / "model", target, out, device="cpu", batch_size=3)
    assert reads == [3, 3, 3]  # parts 1, 2, 3
    assert not kept.exists()
    straight, resumed = read_predictions(tmp_path / "straight.parquet"), read_predictions(out)
    assert resumed.probabilities.tobytes() == straight.probabilities.tobytes()
    assert resumed.image_uid.tolist() == straight.image_uid.tolist()
    assert resumed.metadata == straight.metadata


@pytest.mark.usefixtures("small_parts")
def test_other_inputs_or_another_model_begin_afresh(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    films = tmp_path / "films"
    films.mkdir()
    for source in (folder / "films").iterdir():
        (films / source.name).write_bytes(source.read_bytes())
    read: list[int] = []
    original = predict_workers.read_part

    def counted(model, work, positions, done, store):
        if stop and len(read) == stop:
            raise KeyboardInterrupt
        read.append(len(positions))
        return original(model, work, positions, done, store)

    monkeypatch.setattr(predict_workers, "read_part", counted)
    out, stop = tmp_path / "out.csv", 2

    def go(model: str = "model", **options) -> None:
        read.clear()
        with contextlib.suppress(KeyboardInterrupt):
            predict.run(folder / model, [str(films)], out, device="cpu", batch_size=3, **options)

    go()
    cv2.imwrite(str(films / "00.png"), np.zeros((40, 40), np.uint8))
    go()
    assert (len(read), "other inputs" in capsys.readouterr().out) == (2, True)
    go(score_flagged=True)
    assert (len(read), "other settings" in capsys.readouterr().out) == (2, True)
    config = json.loads((folder / "model" / "config.json").read_text())
    try:
        (folder / "model" / "config.json").write_text(json.dumps({**config, "notice": "another"}))
        go(score_flagged=True)
    finally:
        (folder / "model" / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    assert (len(read), "other model" in capsys.readouterr().out) == (2, True)
    stop = 0
    go()
    assert len(read) == 4
    assert out.exists()


def test_whole_studies_stay_in_one_part(small_parts) -> None:
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 7, 40):
        studies = rng.integers(0, 9, count)
        work = predict_parts.Work(
            Path(), None, None, None, list(range(count)),
            {
                "dataset": np.full(count, "d"), "patient_id": np.full(count, "p"),
                "study_id": np.array([f"s{s}" for s in studies], dtype=str),
                "image_uid": np.array([str(n) for n in range(count)], dtype=str),
            },
            np.full(count, "given"), 4, False, False,
        )  # fmt: skip
        for whole in (False, True):
            parts = predict_parts.cut(work, whole)
            assert sorted(np.concatenate(parts).tolist()) == list(range(count))
            seen = [set(studies[part].tolist()) for part in parts]
            assert not whole or sum(map(len, seen)) == len(set(studies.tolist()))
            assert whole or all(len(part) == 4 for part in parts[:-1])
        assert max(len(part) for part in parts) < 4 + 2 * max(np.bincount(studies, minlength=1).max(), 1)


@pytest.mark.usefixtures("small_parts")
def test_two_runs_must_not_write_one_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    kept = Path(f"{out}.parts")
    kept.mkdir()
    held = "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, 2); f.write(str(__import__('os')"
    held += ".getpid())); f.flush(); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", held, str(kept / ".lock")], stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(HilumError, match="in use by process"):
                predict.run(folder / "model", [str(folder / "films")], out, device="cpu", batch_size=3)
        finally:
            other.kill()


@pytest.mark.usefixtures("small_parts")
def test_a_full_disk_is_named_and_leaves_no_prediction(folder: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*_args, **_options) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict_parts.np, "savez", full)
    out = tmp_path / "out.csv"
    with pytest.raises(HilumError, match=r"Could not write .*0\.npz: No space left"):
        predict.run(folder / "model", [str(folder / "films")], out, device="cpu", batch_size=3)
    assert not out.exists()


PROGRAM = """
import sys
from hilum import cli
from hilum.commands import predict_parts
predict_parts.BATCHES_A_PART = 1
sys.argv[0] = "hilum"
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_killed_program_goes_on(
    folder: Path, tmp_path: Path, number: signal.Signals, status: int, devices: int
) -> None:
    out = tmp_path / "out.csv"
    command = [
        sys.executable, "-c", PROGRAM, "predict", str(folder / "model"), f"{folder / 'store'}:train", "--out", str(out),
        "--device", "cpu", "--batch-size", "2", "--devices", str(devices),
    ]  # fmt: skip
    done = Path(f"{out}.parts") / "3.done"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as program:
        deadline = time.monotonic() + 120
        while not done.exists() and program.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if status == 75:
            os.killpg(program.pid, number)  # as schedulers do: its processes hear it too
        else:
            program.send_signal(number)
        told = program.communicate(timeout=60)[0]  # ends when nobody, no process of its own either, can write to it
    assert (program.returncode, out.exists()) == (status, False), told
    assert status != 75 or "Run the same command again" in told
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "images were read before; going on with the rest" in again.stdout
    predictions = read_predictions(out)
    expected = load(folder / "model", "cpu").predict_store(Store.open(folder / "store"), range(120))
    assert np.allclose(predictions.probabilities, expected.probabilities, atol=1e-6)
    assert predictions.image_uid.tolist() == expected.image_uid.tolist()


LOADED = """
import sys
from hilum import cli
sys.argv[0] = "hilum"
try:
    cli.main()
except SystemExit as ended:
    assert not ended.code, ended.code
slow = ("torch._dynamo", "torch._inductor", "sympy", "scipy.optimize", "scipy.stats", "sklearn", "polars", "pydicom")
print("LOADED", [name for name in slow if name in sys.modules])
"""


@pytest.mark.slow
def test_one_picture_waits_for_no_library_that_it_does_not_need(folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-c", LOADED, "predict", str(folder / "model"), str(folder / "films" / "00.png"), "--out",
        str(tmp_path / "out.csv"), "--device", "cpu",
    ]  # fmt: skip
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "LOADED []" in told


# Several processes


def test_processes_have_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert predict_workers.devices_of("auto", 1) == ["auto"]
    assert predict_workers.devices_of("cpu", 3) == ["cpu"] * 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert predict_workers.devices_of("auto", 4) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert predict_workers.devices_of("cpu", 2) == ["cpu", "cpu"]
    for device, count, message in (("cuda", 5, "finds 4"), ("cuda:1", 2, "names one"), ("auto", 0, "at least 1")):
        with pytest.raises(ConfigError, match=message):
            predict_workers.devices_of(device, count)


def test_what_is_recorded_is_the_precision_of_the_processes(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """On two GPUs auto is bf16, whatever the CPU of the process that writes the table has."""
    asked = []

    def on_devices(work, chunks, parts, places, *_) -> None:
        asked.append((work.precision, places))
        for number, positions in enumerate(chunks):
            parts.write(number, predict_parts.read_part(model, work, positions, lambda count: None, store))

    model, store = load(folder / "model", "cpu"), Store.open(folder / "store")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("hilum.deploy.engines.bf16_is_fast", lambda: False)
    monkeypatch.setattr(predict, "read_on_devices", on_devices)
    predict.run(
        folder / "model", [f"{folder / 'store'}:test"], tmp_path / "out.csv", device="cuda", devices=2, precision="auto"
    )
    assert asked == [("bf16", ["cuda:0", "cuda:1"])]
    assert read_predictions(tmp_path / "out.csv").metadata["precision"] == "bf16"


@pytest.mark.slow
def test_two_processes_say_what_one_says(folder: Path, tmp_path: Path) -> None:
    target = [f"{folder / 'store'}:train"]
    predict.run(folder / "model", target, tmp_path / "one.csv", device="cpu", batch_size=2)
    predict.run(folder / "model", target, tmp_path / "two.csv", device="cpu", batch_size=2, devices=2)
    one, two = read_predictions(tmp_path / "one.csv"), read_predictions(tmp_path / "two.csv")
    np.testing.assert_allclose(one.probabilities, two.probabilities, atol=1e-6)
    assert one.image_uid.tolist() == two.image_uid.tolist()
    assert not (tmp_path / "two.csv.parts").exists()


def test_threads_that_read_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    work = predict_parts.Work(Path(), None, None, None, [], {}, np.zeros(0, str), 1, False, False, processes=4)
    for cores, threads in ((2, 2), (16, 4), (192, 16)):
        monkeypatch.setattr(predict_parts.os, "cpu_count", lambda cores=cores: cores)
        assert (work.threads("cuda"), work.threads("cpu")) == (threads, 2)


@pytest.mark.slow
def test_a_process_that_dies_is_one_error_and_its_work_stays(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    command = [
        sys.executable, "-m", "hilum", "predict", str(folder / "model"), f"{folder / 'store'}:train", "--out", str(out),
        "--device", "cpu", "--devices", "2", "--batch-size", "2",
    ]  # fmt: skip
    if not (Path(predict.__file__).parents[1] / "__main__.py").exists():
        command[1:3] = ["-c", "from hilum.cli import main; main()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as program:
        children: list[int] = []
        deadline = time.monotonic() + 60
        while not children and time.monotonic() < deadline and program.poll() is None:
            listed = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
            children = [pid for pid in map(int, listed) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(children[0], signal.SIGKILL)
        told = program.communicate(timeout=120)[0]
    assert program.returncode == 1, told
    assert "ended by signal 9" in told
    assert "run the same command again" in told
    assert "Traceback" not in told


# Screening and views


def test_what_is_no_upright_x_ray_is_withheld_and_listed(folder: Path, tmp_path: Path, capsys) -> None:
    films, rng = tmp_path / "films", np.random.default_rng(4)
    films.mkdir()
    for number in range(4):
        cv2.imwrite(str(films / f"film{number}.png"), strangers.film(rng))
    cv2.imwrite(str(films / "hand.png"), strangers.hand(rng, np.zeros((9, 9), np.uint8)))
    cv2.imwrite(str(films / "negative.png"), 255 - strangers.film(rng))
    cv2.imwrite(str(films / "lying.png"), strangers.turned_left(rng, strangers.film(rng)))
    (films / "broken.png").write_bytes(b"")
    out = tmp_path / "out.csv"
    predict.run(folder / "model", [str(films), str(films / "film0.png")], out, device="cpu")
    predictions = read_predictions(out)
    assert sorted(predictions.image_id.tolist()) == [f"film{n}.png" for n in range(4)]
    assert flags(out) == {
        "hand.png": ("not_a_chest_xray", "no"), "negative.png": ("inverted", "no"), "lying.png": ("turned", "no"),
    }  # fmt: skip
    assert predictions.metadata["inputs"] == {
        "given": 9, "predicted": 4, "withheld": 3, "refused": 1, "repeated": 1,
        "flagged": {"inverted": 1, "not_a_chest_xray": 1, "turned": 1},
    }  # fmt: skip
    printed = capsys.readouterr()
    assert "9 inputs: 4 predicted, 3 withheld, 1 refused, 1 given twice" in printed.out
    assert "3 images were flagged and withheld (1 inverted, 1 not_a_chest_xray, 1 turned)" in printed.err

    predict.run(folder / "model", [str(films)], out, device="cpu", correct_inverted=True)
    assert flags(out)["negative.png"] == ("inverted", "yes")
    corrected = read_predictions(out)
    upright = 255 - cv2.imread(str(films / "negative.png"), cv2.IMREAD_GRAYSCALE)
    expected = load(folder / "model", "cpu").predict([upright]).image_probabilities[0]
    row = corrected.probabilities[corrected.image_id.tolist().index("negative.png")]
    assert row.tolist() == pytest.approx(list(expected.values()), abs=1e-6)

    predict.run(folder / "model", [str(films)], out, device="cpu", score_flagged=True)
    assert len(read_predictions(out)) == 7
    assert {scored for _, scored in flags(out).values()} == {"yes"}

    with pytest.raises(HilumError, match="4 of 8 inputs were refused or withheld, more than --budget"):
        predict.run(folder / "model", [str(films)], out, device="cpu", budget=0.2)
    assert len(read_predictions(out)) == 4
    with pytest.raises(EmptyStudyError, match=r"None of 1 inputs could be scored \(not_a_chest_xray: 1\)"):
        predict.run(folder / "model", [str(films / "hand.png")], tmp_path / "hand.csv", device="cpu")
    assert flags(tmp_path / "hand.csv")


def test_images_of_a_store_are_scored_all_the_same(folder: Path, tmp_path: Path) -> None:
    images = [strangers.film(np.random.default_rng(n)) for n in range(3)] + [np.full((40, 40), 7, np.uint8)]
    write_arrays(
        tmp_path / "store", images, np.zeros((4, 2), np.int8), FINDINGS, splits=["test"] * 4,
        studies=list("abcd"), patients=list("abcd"),
    )  # fmt: skip
    predict.run(folder / "model", [f"{tmp_path / 'store'}:test"], tmp_path / "out.csv", device="cpu")
    predictions = read_predictions(tmp_path / "out.csv")
    assert len(predictions) == 4
    assert list(flags(tmp_path / "out.csv").values()) == [("not_a_chest_xray", "yes")]


def test_views_that_nobody_names_are_recognised_and_marked(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = ["path,visit,view"]
    for number in range(6):
        cv2.imwrite(str(tmp_path / f"{number}.png"), strangers.film(rng, bool(number % 2)))
        rows.append(f"{number}.png,v{number // 2},{'AP' if number == 0 else ''}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    out = tmp_path / "out.parquet"
    predict.run(folder / "model", [str(tmp_path / "table.csv")], out, device="cpu", study_column="visit")
    predictions = read_predictions(out)
    assert predictions.view.tolist() == ["AP", "LATERAL", "PA", "LATERAL", "PA", "LATERAL"]
    assert predictions.view_source is not None
    assert predictions.view_source.tolist() == ["given", *["classifier"] * 5]
    predict.run(folder / "model", [str(tmp_path / "table.csv")], out, device="cpu", study_column="visit", study="own")
    studies = read_predictions(out)
    assert sorted(studies.study_id.tolist()) == ["v0", "v1", "v2"]
    first = studies.study_id.tolist().index("v0")
    assert (studies.view[first], studies.view_source[first]) == ("AP+LATERAL", "classifier+given")


def test_views_that_a_store_does_not_name_are_marked_too(folder: Path, tmp_path: Path) -> None:
    images = [strangers.film(np.random.default_rng(5), bool(number % 2)) for number in range(4)]
    write_arrays(
        tmp_path / "store", images, np.zeros((4, 2), np.int8), FINDINGS, splits=["test"] * 4,
        studies=list("aabb"), patients=list("aabb"), views=["AP", "UNKNOWN", "UNKNOWN", "LATERAL"],
    )  # fmt: skip
    predict.run(folder / "model", [f"{tmp_path / 'store'}:test"], tmp_path / "out.csv", device="cpu")
    predictions = read_predictions(tmp_path / "out.csv")
    assert predictions.view.tolist() == ["AP", "LATERAL", "PA", "LATERAL"]
    assert predictions.view_source is not None
    assert predictions.view_source.tolist() == ["given", "classifier", "classifier", "given"]
    in_python = load(folder / "model", "cpu").predict_store(Store.open(tmp_path / "store"), range(4))
    assert in_python.view_source is not None
    assert in_python.view.tolist() == predictions.view.tolist()
    assert in_python.view_source.tolist() == predictions.view_source.tolist()
    np.testing.assert_array_equal(in_python.probabilities, predictions.probabilities)


def test_a_parquet_table_says_what_a_csv_says(folder: Path, tmp_path: Path) -> None:
    import polars as pl

    films = sorted(str(path) for path in (folder / "films").iterdir())
    frame = pl.DataFrame({"path": films, "study_id": [n // 2 for n in range(12)], "view": ["PA", None] * 6})
    frame.write_parquet(tmp_path / "table.parquet")
    frame.write_csv(tmp_path / "table.csv")
    for suffix in ("csv", "parquet"):
        predict.run(folder / "model", [str(tmp_path / f"table.{suffix}")], tmp_path / f"of_{suffix}.json", device="cpu")
    schema = json.loads(resources.files("hilum.evaluation").joinpath("predictions.schema.json").read_text())
    Draft202012Validator(schema).validate(json.loads((tmp_path / "of_csv.json").read_text()))
    one, two = read_predictions(tmp_path / "of_csv.json"), read_predictions(tmp_path / "of_parquet.json")
    assert one.probabilities.tobytes() == two.probabilities.tobytes()
    assert one.study_id.tolist() == two.study_id.tolist() == [str(n // 2) for n in range(12)]
    assert one.view.tolist() == two.view.tolist()


def test_study_columns_that_are_not_there_are_refused(folder: Path, tmp_path: Path) -> None:
    import polars as pl

    (tmp_path / "table.csv").write_text(f"path\n{folder / 'films' / '00.png'}\n")
    with pytest.raises(MissingColumnError, match="expected the column 'visit'; found path"):
        predict.run(folder / "model", [str(tmp_path / "table.csv")], tmp_path / "out.csv", study_column="visit")
    with pytest.raises(ConfigError, match="no CSV or Parquet table is among the inputs"):
        predict.run(folder / "model", [str(folder / "films")], tmp_path / "out.csv", study_column="visit")
    pl.DataFrame({"source_relpath": ["a"]}).write_parquet(tmp_path / "manifest.parquet")
    with pytest.raises(MissingColumnError, match="It is a manifest"):
        predict.run(folder / "model", [str(tmp_path / "manifest.parquet")], tmp_path / "out.csv")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        predict.run(folder / "model", [str(tmp_path / "broken.parquet")], tmp_path / "out.csv")


def test_jobs_account_for_every_input_once(folder: Path, tmp_path: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    for source in (folder / "films").iterdir():
        (films / source.name).write_bytes(source.read_bytes())
    for number in range(5):
        (films / f"zero{number}.png").write_bytes(b"")
        (films / f"lying{number}.dcm").write_bytes(bytes(128) + b"DICM" + b"\0" * 40)
    totals = {"given": 0, "predicted": 0, "refused": 0, "repeated": 0}
    for job in range(3):
        out = tmp_path / f"{job}.csv"
        inputs = [str(films), str(films / "00.png")]
        predict.run(folder / "model", inputs, out, device="cpu", shard=f"{job}/3")
        for name, count in read_predictions(out).metadata["inputs"].items():
            if name in totals:
                totals[name] += count
    assert totals == {"given": 23, "predicted": 12, "refused": 10, "repeated": 1}


def test_every_kind_of_damage_is_refused_by_its_reason_and_counted(folder: Path, tmp_path: Path) -> None:
    pictures = Image.fromarray(strangers.film(np.random.default_rng(1)))
    whole = saved(pictures)

    def dicom(number: int, **options) -> bytes:
        return written(radiograph(np.asarray(pictures), SOPInstanceUID=f"1.2.{number}", **options))

    sound = {"a.png": whole, "b.jpg": saved(pictures, "JPEG"), "c.dcm": dicom(1)}
    broken = {
        "zero_bytes": b"", "truncated": whole[: len(whole) // 2], "not_an_image": b"<html>403</html>" * 9,
        "damaged": whole[:60] + bytes([whole[60] ^ 1]) + whole[61:],
        "no_pixel_data": dicom(2)[: dicom(2).index(b"\xe0\x7f\x10\0")],
        "multi_frame": dicom(3, NumberOfFrames=3),
        "unsupported_mode": saved(pictures.convert("CMYK"), "JPEG"), "too_large": png(50000, 50000, 1, 0, b"x"),
        "size_mismatch": dicom(4, Rows=21),
    }  # fmt: skip
    for name, content in {**sound, **{f"{reason}.png": content for reason, content in broken.items()}}.items():
        (tmp_path / name).write_bytes(content)
    inputs = [str(tmp_path / name) for name in (*sound, *(f"{reason}.png" for reason in broken))]
    out = tmp_path / "out.json"
    predict.run(folder / "model", [*inputs, inputs[0]], out, device="cpu", batch_size=2, score_flagged=True)
    predictions = read_predictions(out)
    assert len(predictions) == 3
    assert predictions.metadata["inputs"]["given"] == 13
    assert [predictions.metadata["inputs"][name] for name in ("predicted", "refused", "repeated")] == [3, 9, 1]
    with Path(f"{out}.quarantine.csv").open() as file:
        assert {Path(row["path"]).stem: row["reason"] for row in csv.DictReader(file)} == {one: one for one in broken}


def test_a_model_without_screening_says_so(folder: Path, tmp_path: Path, capsys) -> None:
    model = tmp_path / "old"
    model.mkdir()
    for source in (folder / "model").iterdir():
        (model / source.name).write_bytes(source.read_bytes())
    config = json.loads((model / "config.json").read_text())
    del config["screening"]
    (model / "config.json").write_text(json.dumps(config))
    (model / "screening.npz").unlink()
    out = tmp_path / "out.csv"
    films = [str(folder / "films" / "00.png"), str(tmp_path / "hand.png")]
    cv2.imwrite(films[1], strangers.hand(np.random.default_rng(0), np.zeros((9, 9), np.uint8)))
    predict.run(model, films, out, device="cpu")
    assert len(read_predictions(out)) == 2
    assert read_predictions(out).view_source.tolist() == ["unknown", "unknown"]  # type: ignore[union-attr]
    assert not Path(f"{out}.flags.csv").exists()
    assert "this model has no screening" in capsys.readouterr().err
    result = load(model, "cpu").predict(films)
    assert [[flag.code for flag in flags] for flags in result.image_flags] == [["not_screened"]] * 2
    assert result.scored == [True, True]
