"""`hilum export` and `hilum predict --engine` from the command line, on files and on a store."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from hilum import cli
from hilum.commands import fit
from hilum.core.errors import ConfigError, UnknownNameError
from hilum.data.store import write_arrays
from hilum.deploy.ensemble_model import combine_models
from hilum.evaluation.predictions import read_predictions
from hilum.heads.config import FitConfig

FINDINGS = ("Edema", "Mass", "Never")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`store`, `model`, `ensemble` (two resolutions), and `xrays`: PNG files of studies, one of them damaged."""
    path = tmp_path_factory.mktemp("export")
    rng = np.random.default_rng(0)
    labels = (rng.random((44, 3)) < 0.5).astype(np.int8)
    labels[:24, 2] = 0
    images = [rng.integers(0, 90, (24, 28), np.uint8) + np.uint8(100 * int(y)) for y in labels[:, 0]]
    write_arrays(
        path / "store", images, labels, FINDINGS, splits=["train"] * 24 + ["val"] * 8 + ["test"] * 12,
        studies=[f"arrays/s{n // 2}" for n in range(44)], patients=[f"arrays/p{n // 4}" for n in range(44)],
    )  # fmt: skip
    small = {
        "blocks": 1, "learning_rates": (1e-2,), "search_epochs": 1, "refit_epochs": 1, "batch_size": 16, "threads": 1,
        "workers": 1,
    }  # fmt: skip
    linear = FitConfig(head="linear", resolution=16, flip_average=True, **small)
    decoder = FitConfig(
        head="ml_decoder", resolution=32, decoder_dim=8, decoder_feed_forward=12, decoder_heads=2, **small
    )
    fit.run(linear, path / "store", "random:demo16", path / "model", device="cpu")
    fit.run(decoder, path / "store", "random:demo16", path / "decoder", device="cpu")
    combine_models([path / "model", path / "decoder"], path / "ensemble")
    (path / "xrays").mkdir()
    rows = ["path,study_id,patient_id,view"]
    for number in range(7):
        cv2.imwrite(str(path / "xrays" / f"{number}.png"), rng.integers(0, 255, (40, 36), np.uint8))
        rows.append(f"{number}.png,s{number // 2},p{number // 2},{'LATERAL' if number % 2 else 'PA'}")
    (path / "xrays" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (path / "xrays" / "list.csv").write_text("\n".join(rows) + "\n")
    return path


def hilum(*arguments: Path | str) -> str:
    done = CliRunner().invoke(cli.app, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def refused(*arguments: Path | str) -> Exception:
    done = CliRunner().invoke(cli.app, [str(one) for one in arguments])
    assert done.exit_code == 1
    assert isinstance(done.exception, Exception)
    return done.exception


def table(path: Path) -> tuple[list[str], np.ndarray]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    values = [[float(row[name]) if row[name] else np.nan for name in FINDINGS] for row in rows]
    return [row["image_uid"] for row in rows], np.array(values)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_files_and_stores_are_predicted_alike_by_every_engine(folder: Path, tmp_path: Path, engine: str) -> None:
    pytest.importorskip("onnxscript", reason="the extra [export] is not installed")
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino_telemetry"}[engine])
    exported = tmp_path / "exported"
    said = hilum("export", folder / "ensemble", "--format", engine, "--out", exported)
    assert f"Next: hilum predict {exported} INPUT --engine {engine}" in said
    assert said.count("of the predictor") == 2
    options = ("--study", "own", "--device", "cpu", "--score-flagged")
    for unit in ((), ("--raw",)):
        files = folder / "xrays" / "list.csv"
        hilum("predict", folder / "ensemble", files, "--out", tmp_path / "torch.csv", *options, *unit)
        hilum("predict", exported, files, "--out", tmp_path / "other.csv", "--engine", engine, *options, *unit)
        uids, expected = table(tmp_path / "torch.csv")
        same, found = table(tmp_path / "other.csv")
        assert same == uids
        assert len(uids) == 4
        assert np.isnan(expected[:, 2]).all()  # never trained
        np.testing.assert_allclose(found, expected, atol=1e-5)
        quarantined = [(tmp_path / f"{name}.csv.quarantine.csv").read_text() for name in ("torch", "other")]
        assert quarantined[0] == quarantined[1]
        assert "3.png" in quarantined[0]
    test = f"{folder / 'store'}:test"
    hilum("predict", folder / "ensemble", test, "--out", tmp_path / "torch.parquet", "--device", "cpu")
    hilum("predict", exported, test, "--out", tmp_path / "other.parquet", "--device", "cpu", "--batch-size", "5")
    ours, theirs = (read_predictions(tmp_path / f"{name}.parquet") for name in ("torch", "other"))
    np.testing.assert_allclose(theirs.probabilities, ours.probabilities, atol=1e-5)
    assert (theirs.metadata["model"], theirs.stage) == (ours.metadata["model"], "calibrated")
    assert theirs.metadata["engine"] == engine
    assert "engine" not in ours.metadata


@pytest.mark.slow
def test_an_exported_program_is_described(folder: Path, tmp_path: Path) -> None:
    said = hilum("export", folder / "model", "--format", "torch-export", "--out", tmp_path / "out")
    assert "probabilities within 0" in said
    content = json.loads((tmp_path / "out" / "export.json").read_text())
    assert content["networks"][0]["files"].keys() == {"model.pt2"}
    copied = {file.name for file in (folder / "model").iterdir()} - {"model.safetensors"}
    assert copied | {"model.pt2", "export.json"} == {file.name for file in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "model" / "config.json").read_bytes()
    for words in (
        ("combine", "--study", "frontal_weighted"),
        ("extend", "--data", folder / "store", "--finding", "New"),
    ):
        error = refused(words[0], tmp_path / "out", *words[1:], "--out", tmp_path / "other")
        assert isinstance(error, ConfigError)
        assert "is an export" in str(error)
    assert not (tmp_path / "other").exists()


def test_mistakes_on_the_command_line_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    wrong = refused("export", folder / "model", "--format", "onxx", "--out", tmp_path / "out")
    assert isinstance(wrong, UnknownNameError)
    assert "Did you mean 'onnx'?" in str(wrong)
    taken = refused("export", folder / "model", "--format", "onnx", "--out", folder)
    assert isinstance(taken, ConfigError)
    test = f"{folder / 'store'}:test"
    engine = refused("predict", folder / "model", test, "--engine", "onnx", "--out", tmp_path / "a.csv")
    assert "holds no graph for --engine onnx" in str(engine)
    assert list(tmp_path.iterdir()) == []
