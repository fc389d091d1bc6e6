import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hilum.commands import combine_models as program
from hilum.core.errors import CheckpointError, ConfigError, PredictionError, StageError, UnknownNameError
from hilum.deploy import model_files as files
from hilum.deploy.ensemble_model import combine_models
from hilum.deploy.out_of_sample import labels_of_studies
from hilum.deploy.predictor import load
from hilum.evaluation.calibration import Calibrator


def test_an_ensemble_owns_calibrators_fitted_on_its_members_validation(fitted: Path) -> None:
    content = files.read_config(fitted / "ensemble")
    assert [member["path"] for member in content["members"]] == ["../linear", "../decoder"]
    validations = [files.read_validation(fitted / name) for name in ("linear", "decoder")]
    mean = (validations[0][0].probabilities + validations[1][0].probabilities) / 2
    expected = Calibrator.fit(
        mean, validations[0][1], ("Edema", "Hernia", "Mass"),
        groups={finding["name"]: finding["group"] for finding in content["findings"]}, stage="ensemble",
    )  # fmt: skip
    found = Calibrator.from_dict(content["calibration"]["image"])
    assert found.maps == expected.maps
    assert found.fitted_on["items"] == 16
    assert content["calibration"]["study"]["fitted_on"]["items"] == 8
    assert "Research use only" in (fitted / "ensemble" / "README.md").read_text()


def test_rows_are_joined_by_identity_not_position(fitted: Path, tmp_path: Path) -> None:
    shutil.copytree(fitted / "decoder", tmp_path / "decoder")
    predictions, labels = files.read_validation(fitted / "decoder")
    order = np.random.default_rng(0).permutation(len(predictions))
    files.write_validation(tmp_path / "decoder", predictions.rows(order), labels[order])
    combine_models([fitted / "linear", tmp_path / "decoder"], tmp_path / "ensemble")
    assert (
        files.read_config(tmp_path / "ensemble")["calibration"] == files.read_config(fitted / "ensemble")["calibration"]
    )


def test_an_ensemble_moves_with_its_members_and_notices_a_changed_one(fitted: Path, tmp_path: Path) -> None:
    for name in ("linear", "decoder", "ensemble"):
        shutil.copytree(fitted / name, tmp_path / "moved" / name)
    assert len(load(tmp_path / "moved" / "ensemble").networks) == 2
    config = tmp_path / "moved" / "linear" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(CheckpointError, match="has changed since"):
        load(tmp_path / "moved" / "ensemble")
    shutil.rmtree(tmp_path / "moved" / "linear")
    with pytest.raises(CheckpointError, match="is missing"):
        load(tmp_path / "moved" / "ensemble")


def test_members_of_other_images_labels_or_findings_are_refused(fitted: Path, tmp_path: Path) -> None:
    predictions, labels = files.read_validation(fitted / "decoder")
    changed = {
        "same images": (predictions.rows(np.arange(15)), labels[:15]),
        "other validation labels": (predictions, 1 - labels),
        "other findings": (predictions.select(["Edema", "Hernia"]), labels[:, :2]),
    }
    for number, (message, (rows, codes)) in enumerate(changed.items()):
        member = tmp_path / f"member{number}"
        shutil.copytree(fitted / "decoder", member)
        files.write_validation(member, rows, codes)
        with pytest.raises(PredictionError, match=message):
            combine_models([fitted / "linear", member], tmp_path / f"out{number}")
        assert not (tmp_path / f"out{number}").exists()


def test_validation_of_a_head_that_saw_it_is_refused(fitted: Path, tmp_path: Path) -> None:
    shutil.copytree(fitted / "decoder", tmp_path / "member")
    content = files.read_config(tmp_path / "member")
    exposure = files.read_exposure(tmp_path / "member", content)
    seen = files.Exposure(exposure.pretraining, np.union1d(exposure.train, exposure.val), exposure.val)
    content["exposure"] = files.write_exposure(tmp_path / "member", seen)
    (tmp_path / "member" / "config.json").write_text(json.dumps(content))
    with pytest.raises(StageError, match="not out of sample"):
        combine_models([fitted / "linear", tmp_path / "member"], tmp_path / "out")


def test_what_is_not_two_models_is_refused(fitted: Path, tmp_path: Path) -> None:
    for members in ([fitted / "linear"], [fitted / "linear", fitted / "linear"]):
        with pytest.raises(ConfigError, match="two or more different"):
            combine_models(members, tmp_path / "out")
    with pytest.raises(ConfigError, match="itself an ensemble"):
        combine_models([fitted / "linear", fitted / "ensemble"], tmp_path / "out")
    with pytest.raises(ConfigError, match="itself an ensemble"):  # and not: say --study
        program.run([fitted / "linear", fitted / "ensemble"], tmp_path / "out")
    with pytest.raises(ConfigError, match="already holds"):
        combine_models([fitted / "linear", fitted / "decoder"], fitted / "ensemble")
    with pytest.raises(UnknownNameError, match="max"):
        program.run([fitted / "linear", fitted / "decoder"], tmp_path / "out", study="max")
    assert not (tmp_path / "out").exists()


def test_the_program_writes_an_ensemble(fitted: Path, tmp_path: Path, capsys) -> None:
    program.run([fitted / "linear", fitted / "decoder"], tmp_path / "out")
    assert "ensemble of 2 models" in capsys.readouterr().out
    assert load(tmp_path / "out").findings == ("Edema", "Hernia", "Mass")


def test_labels_of_a_study_are_positive_if_any_image_is() -> None:
    labels = np.array([[0, -1, -2], [1, -1, -1], [0, 0, -2], [-1, 1, -2]], dtype=np.int8)
    merged = labels_of_studies(labels, np.array(["b", "b", "a", "a"]), np.array(["a", "b"]))
    assert merged.tolist() == [[0, 1, -2], [1, -1, -1]]
