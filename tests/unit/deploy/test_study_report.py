"""The study document: against its schema, and against the result and the validation files that it is made from."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from hilum.commands.extend_files import ZERO_SHOT_FLAG
from hilum.core.types import VIEWS
from hilum.deploy import model_files as files
from hilum.deploy.predictor import Model, load
from hilum.deploy.study_report import ImageFacts, bands_of, study_document, study_schema
from hilum.deploy.study_result import StudyResult
from hilum.evaluation.map_choice import NO_LABELS
from hilum.evaluation.recalibration import KEPT
from hilum.evaluation.score_bands import ScoreBands, Scored

FACTS = [ImageFacts(40, 30), ImageFacts(20, 26)]


@dataclasses.dataclass(frozen=True)
class Flag:
    code: str
    message: str


@pytest.fixture(scope="session")
def model(fitted) -> Model:
    return load(fitted / "ensemble", "cpu")


@pytest.fixture(scope="session")
def result(model: Model) -> StudyResult:
    rng = np.random.default_rng(0)
    return model.predict([rng.integers(0, 255, (one.rows, one.columns), np.uint8) for one in FACTS])


def check(document: dict[str, Any]) -> dict[str, Any]:
    jsonschema.Draft202012Validator.check_schema(study_schema())
    jsonschema.validate(document, study_schema(), cls=jsonschema.Draft202012Validator)
    json.dumps(document, allow_nan=False)
    return document


def made(result: StudyResult, model: Model) -> dict[str, Any]:
    return check(study_document(result, model, study_id="s1", images=FACTS))


def changed(result: StudyResult, **changes: Any) -> StudyResult:
    """A result with other values in fields that a screening fills."""
    other = copy.copy(result)
    for name, value in changes.items():
        object.__setattr__(other, name, value)
    return other


def test_the_document_says_what_the_result_says(model: Model, result: StudyResult) -> None:
    document = made(result, model)
    assert document["model"]["digest"] == model.digest
    assert document["status"] == "scored"
    assert [one["name"] for one in document["findings"]] == list(model.findings)
    for one in document["findings"]:
        name = one["name"]
        assert one["trained"]
        assert one["probability"] == result.probabilities[name]
        assert one["thresholds"] == result.thresholds[name]
        assert one["above"] == {key: one["probability"] > cut for key, cut in one["thresholds"].items()}
        assert [image["probability"] for image in one["images"]] == [p[name] for p in result.image_probabilities]
        assert one["has_map"] == (result.attention[name] is not None)
        assert one["group"] == model.groups[name]
    images = document["study"]["images"]
    assert [(one["rows"], one["columns"], one["number"]) for one in images] == [(40, 30, 1), (20, 26, 2)]
    assert sum(one["weight"] for one in images) == pytest.approx(1)
    assert images[0]["box"] == [0.125, 0, 0.75, 1]


def test_equal_to_a_threshold_is_not_above(model: Model, result: StudyResult) -> None:
    cut = result.thresholds["Edema"]["f1"]
    at = dataclasses.replace(result, probabilities=result.probabilities | {"Edema": cut})
    assert made(at, model)["findings"][0]["above"]["f1"] is False


def test_a_finding_that_is_flagged_as_uncalibrated_is_not_called_calibrated(model: Model, result: StudyResult) -> None:
    flags = {"Edema": ZERO_SHOT_FLAG, "Hernia": NO_LABELS, "Mass": KEPT}
    document = made(dataclasses.replace(result, flags=flags), model)
    assert document["model"]["calibrated"]
    assert [one["calibrated"] for one in document["findings"]] == [False, False, True]
    raw = made(dataclasses.replace(result, flags={}, calibrated=False), model)
    assert not any(one["calibrated"] for one in raw["findings"])


def test_a_finding_never_trained_is_null_throughout(model: Model, result: StudyResult) -> None:
    none = {"Hernia": None}
    untrained = dataclasses.replace(
        result, probabilities=result.probabilities | none, thresholds=result.thresholds | none,
        attention=result.attention | none, image_probabilities=[one | none for one in result.image_probabilities],
    )  # fmt: skip
    one = made(untrained, model)["findings"][1]
    assert one["name"] == "Hernia"
    assert not one["trained"]
    assert {key for key, value in one.items() if value is None} >= {"probability", "interval", "thresholds", "above"}
    assert [image["probability"] for image in one["images"]] == [None, None]


def test_a_study_without_a_chest_is_withheld_whatever_the_numbers_are(model: Model, result: StudyResult) -> None:
    flags = [[Flag("not_a_chest_xray", "It looks like no chest X-ray.")]] * 2
    document = made(changed(result, scored=[False, False], image_flags=flags), model)
    assert document["status"] == "withheld"
    assert [flag["code"] for flag in document["flags"]] == ["withheld"]
    for one in document["findings"]:
        assert one["trained"]
        assert one["thresholds"]
        assert [one[key] for key in ("probability", "interval", "above")] == [None] * 3
        assert {image["probability"] for image in one["images"]} == {None}
        assert not one["has_map"]
    assert [image["flags"][0]["code"] for image in document["study"]["images"]] == ["not_a_chest_xray"] * 2


def test_an_image_that_is_left_out_has_no_numbers(model: Model, result: StudyResult) -> None:
    shares = {name: [0.0, 1.0] for name in result.findings}
    document = made(
        changed(
            result, scored=[False, True], view_weights=[0.0, 1.0], contributions=shares, views=["PA", "LATERAL"],
            view_sources=["header", "classifier"], quality=[("constant",), ()],
            image_flags=[[Flag("constant", "One grey.")], []],
        ),
        model,
    )  # fmt: skip
    assert document["status"] == "scored"
    assert document["flags"][0]["message"].startswith("Image 1 took no part")
    first, second = document["findings"][0]["images"]
    assert first["probability"] is None
    assert second["contribution"] == 1.0
    one, other = document["study"]["images"]
    assert one["flags"] == [{"code": "constant", "message": "One grey."}]  # once, although the decoder says it too
    assert (other["view"], other["view_source"], other["scored"]) == ("LATERAL", "classifier", True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_null(model: Model, result: StudyResult, value: float) -> None:
    broken = dataclasses.replace(result, probabilities=result.probabilities | {"Mass": value})
    assert made(broken, model)["findings"][2]["probability"] is None


def test_raw_scores_say_that_they_are(model: Model, result: StudyResult) -> None:
    document = made(dataclasses.replace(result, calibrated=False), model)
    assert not document["model"]["calibrated"]
    assert [flag["code"] for flag in document["flags"]] == ["uncalibrated"]


def test_facts_of_other_images_are_refused(model: Model, result: StudyResult) -> None:
    with pytest.raises(ValueError, match="facts of 1 images for a result of 2"):
        study_document(result, model, study_id="s1", images=FACTS[:1])


def test_the_schema_knows_every_view_and_refuses_what_is_wrong(model: Model, result: StudyResult) -> None:
    assert study_schema()["$defs"]["image"]["properties"]["view"]["enum"] == list(VIEWS)
    document = made(result, model)
    for path, value in (
        (("status",), "withheld"),  # with probabilities
        (("findings", 0, "probability"), 1.5),
        (("findings", 0, "trained"), False),  # with a probability
        (("findings", 0, "thresholds"), {"best": 0.5}),
        (("study", "images", 0, "view"), "FRONT"),
        (("study", "patient"), "p1"),
    ):
        planted = json.loads(json.dumps(document))
        place = planted
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            check(planted)


@pytest.mark.parametrize("name", ["linear", "decoder", "ensemble"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_intervals_come_from_validation_studies_at_the_stage_of_the_score(
    fitted, monkeypatch: pytest.MonkeyPatch, name: str, calibrated: bool
) -> None:
    """Rebuilt from the files of the members by hand: sigmoid means over studies, then models, then the map."""
    monkeypatch.setattr("hilum.evaluation.score_bands.FEWEST", 3)
    model = load(fitted / name, "cpu")
    bent = {
        "kind": "temperature_bias",
        "parameters": {"slope": 0.5, "intercept": -0.3},
    }  # few studies leave it straight
    study = model.calibrators["study"]
    maps = {finding: {**one, **bent} for finding, one in study.maps.items() if one}
    model.calibrators["study"] = dataclasses.replace(study, maps=maps)
    folders = [fitted / "linear", fitted / "decoder"] if name == "ensemble" else [fitted / name]
    tables = [files.read_validation(folder) for folder in folders]
    studies = tables[0][0].study_id
    scores = np.mean(
        [[table.probabilities[studies == s].mean(axis=0) for s in np.unique(studies)] for table, _ in tables], axis=0
    )
    labels = np.array([tables[0][1][studies == s].max(axis=0) for s in np.unique(studies)])
    if calibrated:
        scores = model.calibrators["study"].apply(scores)
    bands = bands_of(model, calibrated)
    for column, finding in enumerate(model.findings):
        distinct = np.unique(scores[:, column])
        expected = Scored(
            distinct, np.array([(scores[:, column] == s).sum() for s in distinct]),
            np.array([labels[scores[:, column] == s, column].sum() for s in distinct]),
        )  # fmt: skip
        for found, wanted in zip(bands.findings[finding], expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_the_interval_of_a_finding_is_its_band(model: Model, result: StudyResult, monkeypatch) -> None:
    rng = np.random.default_rng(3)
    scores = np.sort(rng.random(50))
    bands = ScoreBands({"Edema": Scored(scores, np.ones(50, int), (scores > 0.5).astype(int))})
    monkeypatch.setattr("hilum.deploy.study_report.bands_of", lambda *_: bands)
    first, second, _ = made(result, model)["findings"]
    band = bands.band("Edema", result.probabilities["Edema"])
    assert first["interval"] == [band.low, band.high]
    assert second["interval"] is None


def test_there_are_no_intervals_where_the_calibrator_was_fitted_elsewhere(fitted, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("hilum.evaluation.score_bands.FEWEST", 3)
    model = load(fitted / "linear", "cpu")
    assert bands_of(model).findings
    other = load(fitted / "linear", "cpu")
    fitted_on = files.read_calibrators(fitted, {"calibration": files.read_config(fitted / "linear")["calibration"]})
    other.calibrators["study"] = dataclasses.replace(
        fitted_on["study"], fitted_on={**fitted_on["study"].fitted_on, "digests": ""}
    )
    assert not bands_of(other).findings
    homeless = load(fitted / "linear", "cpu")
    homeless.folder = tmp_path / "gone"
    assert not bands_of(homeless).findings
    homeless = load(fitted / "linear", "cpu")
    homeless.folder = None
    assert not bands_of(homeless).findings
    replaced = load(fitted / "linear", "cpu")
    shutil.copytree(fitted / "linear", tmp_path / "replaced")
    (tmp_path / "replaced" / "config.json").write_text((fitted / "linear" / "config.json").read_text() + " ")
    replaced.folder = tmp_path / "replaced"
    assert not bands_of(replaced).findings


def test_an_export_of_an_ensemble_keeps_its_intervals_and_a_changed_one_has_none(fitted, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("hilum.evaluation.score_bands.FEWEST", 3)
    original = load(fitted / "ensemble", "cpu")
    shutil.copytree(fitted / "ensemble", tmp_path / "exported")
    for number, name in ((1, "linear"), (2, "decoder")):
        shutil.copytree(fitted / name, tmp_path / "exported" / f"member_{number}")
    moved = load(fitted / "ensemble", "cpu")
    moved.folder = tmp_path / "exported"
    for name in original.findings:
        for found, wanted in zip(bands_of(moved).findings[name], bands_of(original).findings[name], strict=True):
            assert np.array_equal(found, wanted)
    changed = tmp_path / "exported" / "member_2" / "config.json"
    changed.write_text(changed.read_text() + " ")
    other = load(fitted / "ensemble", "cpu")
    other.folder = tmp_path / "exported"
    assert not bands_of(other).findings


def test_the_reference_page_names_every_key_of_the_schema() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "reference" / "study-report.md").read_text(encoding="utf-8")
    schema = study_schema()
    keys = {*schema["properties"], *schema["$defs"]["image"]["properties"], *schema["$defs"]["finding"]["properties"]}
    keys |= {*schema["properties"]["model"]["properties"]}
    assert not [key for key in keys if f"`{key}`" not in page and f"`study.{key}`" not in page and key != "study"]
