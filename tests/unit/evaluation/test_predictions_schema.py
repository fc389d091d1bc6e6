"""What prediction files hold is what their published schema says, read by jsonschema."""

import copy
import json
from importlib import resources
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from hilum.core.errors import PredictionError
from hilum.evaluation.calibration import Calibrator
from hilum.evaluation.predictions import FORMAT, Predictions, read_predictions, write_predictions
from hilum.evaluation.studies import aggregate_studies

SCHEMA = json.loads(resources.files("hilum.evaluation").joinpath("predictions.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)
METADATA = Draft202012Validator({"$ref": "#/$defs/metadata", "$defs": SCHEMA["$defs"]})
COUNT = 60


@pytest.fixture(scope="module")
def table() -> Predictions:
    """Images of 30 studies, the third finding never trained, calibrated, with all that `hilum predict` records."""
    rng = np.random.default_rng(0)
    labels = (rng.random((COUNT, 2)) < 0.4).astype(np.int8)
    values = np.clip(0.3 + 0.3 * labels + rng.normal(0, 0.15, (COUNT, 2)), 0, 1)
    raw = Predictions(
        image_uid=np.array([f"{n:016x}" for n in range(COUNT)]), image_id=np.array([f"{n}.dcm" for n in range(COUNT)]),
        study_id=np.array([f"s{n // 2}" for n in range(COUNT)]),
        patient_id=np.array([f"p{n // 4}" for n in range(COUNT)]),
        dataset=np.full(COUNT, "files"), view=np.array(["PA", "LATERAL"] * (COUNT // 2)),
        findings=("Edema", "Mass", "Never"), probabilities=np.column_stack([values, np.full(COUNT, np.nan)]),
        metadata={
            "model": "0123456789abcdef", "head_splits": ["train"], "groups": dict.fromkeys(("Edema", "Mass"), "head"),
            "inputs": {
                "given": 62, "predicted": 60, "withheld": 1, "refused": 1, "repeated": 0, "flagged": {"inverted": 1},
            },
        },
        view_source=np.array(["header", "classifier"] * (COUNT // 2)),
    )  # fmt: skip
    known = np.column_stack([labels, np.full(COUNT, -1, np.int8)])
    groups = {"Edema": "head", "Mass": "head", "Never": "tail"}
    uids, patients = raw.image_uid.tolist(), raw.patient_id.tolist()
    return Calibrator.fit(
        raw.probabilities, known, raw.findings, groups, uids=uids, patients=patients
    ).apply_to(raw)  # fmt: skip


def test_the_schema_is_one_and_names_the_format() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$defs"]["metadata"]["properties"]["format"]["const"] == FORMAT


def test_files_of_all_kinds_hold_what_it_says(table: Predictions, tmp_path: Path) -> None:
    studies = aggregate_studies(table.replace(table.probabilities, stage="raw", calibration=None), unit="study")
    for name, one in (("images", table), ("studies", studies)):
        for suffix in ("json", "csv", "parquet"):
            write_predictions(one, tmp_path / f"{name}.{suffix}")
        VALIDATOR.validate(json.loads((tmp_path / f"{name}.json").read_text()))
        METADATA.validate(json.loads((tmp_path / f"{name}.csv.meta.json").read_text()))
        METADATA.validate(json.loads(pl.read_parquet_metadata(tmp_path / f"{name}.parquet")["hilum"]))
    content = json.loads((tmp_path / "images.json").read_text())
    assert {"f1", "youden", "sens_at_spec95"} <= set(content["metadata"]["thresholds"]["Edema"])
    assert "Never" not in content["metadata"]["thresholds"]
    assert {row["Never"] for row in content["predictions"]} == {None}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda one: one["metadata"].update(format="hilum-predictions-2"),
        lambda one: one["metadata"].pop("stage"),
        lambda one: one["metadata"].update(unit="patient"),
        lambda one: one["metadata"].update(findings=["Edema", "Edema"]),
        lambda one: one["metadata"]["thresholds"]["Edema"].update(f1=1.5),
        lambda one: one["metadata"]["calibration"]["fitted_on"].pop("digests"),
        lambda one: one["metadata"].update(chosen_on={"items": 3}),
        lambda one: one["metadata"]["inputs"].pop("refused"),
        lambda one: one["predictions"][0].pop("image_uid"),
        lambda one: one["predictions"][0].update(Edema=1.01),
        lambda one: one["predictions"][0].update(Edema="0.5"),
        lambda one: one["predictions"][0].update(view_source="guessed"),
        lambda one: one.update(more=1),
    ],
)
def test_it_refuses_what_is_not_so(table: Predictions, tmp_path: Path, spoil) -> None:
    write_predictions(table, tmp_path / "one.json")
    content = json.loads((tmp_path / "one.json").read_text())
    spoiled = copy.deepcopy(content)
    spoil(spoiled)
    assert spoiled != content
    with pytest.raises(ValidationError):
        VALIDATOR.validate(spoiled)


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_where_views_are_known_from_is_read_back(table: Predictions, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"one.{suffix}"
    write_predictions(table, path)
    again = read_predictions(path)
    assert again.view_source is not None
    assert again.view_source.tolist() == ["header", "classifier"] * (COUNT // 2)
    assert again.probabilities.tobytes() == table.probabilities.tobytes()
    assert again.rows(np.array([3, 0])).view_source.tolist() == ["classifier", "header"]  # type: ignore[union-attr]
    assert again.select(["Mass"]).view_source is not None
    bare = Predictions(**{name: getattr(table, name) for name in ("image_uid", "image_id", "study_id", "patient_id",
                       "dataset", "view", "findings", "probabilities")})  # fmt: skip
    write_predictions(bare, path)
    assert read_predictions(path).view_source is None


def test_study_rows_join_where_their_views_are_known_from(table: Predictions) -> None:
    raw = table.replace(table.probabilities, stage="raw", calibration=None)
    studies = aggregate_studies(raw, unit="study")
    assert set(studies.view_source.tolist()) == {"classifier+header"}  # type: ignore[union-attr]
    assert aggregate_studies(raw, unit="image").view_source.tolist() == table.view_source.tolist()  # type: ignore[union-attr]


def test_no_finding_has_its_name(table: Predictions) -> None:
    identity = {name: getattr(table, name) for name in ("image_uid", "image_id", "study_id", "patient_id", "dataset")}
    with pytest.raises(PredictionError, match="distinct names"):
        Predictions(**identity, view=table.view, findings=("view_source",), probabilities=np.zeros((COUNT, 1)))
    with pytest.raises(PredictionError, match="view_source"):
        Predictions(
            **identity, view=table.view, findings=("Mass",), probabilities=np.zeros((COUNT, 1)),
            view_source=np.array(["given"]),
        )  # fmt: skip
