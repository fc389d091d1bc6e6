"""Example studies of the report: which are chosen, what is shown, and what is said where nothing is outlined."""

import dataclasses
from pathlib import Path

import numpy as np

from hilum.commands import evaluate, predict
from hilum.data.store import Store
from hilum.deploy.examples import choose_studies, explain_study
from hilum.deploy.predictor import load
from hilum.evaluation.predictions import read_predictions


def test_each_chosen_study_has_another_finding_and_all_its_images(fitted: Path, store: Store) -> None:
    rows = store.indices("test")
    predictions = load(fitted / "decoder", "cpu").predict_store(store, rows)
    chosen = choose_studies(predictions, store.labels[rows], 3)
    assert 1 <= len(chosen) <= 3
    studies = [set(predictions.study_id[one].tolist()) for one in chosen]
    assert all(len(study) == 1 for study in studies)
    assert len(set.union(*studies)) == len(chosen)
    for one, study in zip(chosen, studies, strict=True):
        assert one.tolist() == np.flatnonzero(predictions.study_id == study.pop()).tolist()


def test_images_without_a_study_are_studies_of_their_own(fitted: Path, store: Store) -> None:
    rows = store.indices("test")
    predictions = load(fitted / "decoder", "cpu").predict_store(store, rows)
    nobody = np.full(len(predictions), "")
    loose = dataclasses.replace(predictions, study_id=nobody, patient_id=nobody)
    assert [len(one) for one in choose_studies(loose, store.labels[rows], 3)] == [1, 1, 1]


def test_a_study_has_what_any_of_its_images_has(fitted: Path, store: Store) -> None:
    index = next(n for n in range(56, 60, 2) if (store.labels[n] != store.labels[n + 1]).any())
    shown = explain_study(load(fitted / "decoder", "cpu"), store, [index, index + 1], "Study").findings
    both = store.labels[[index, index + 1]].max(axis=0)
    present = {name for name, code in zip(store.findings, both.tolist(), strict=True) if code == 1}
    assert {one.name for one in shown if one.truth == 1} == present


def test_masks_are_cut_to_what_the_model_saw(fitted: Path, store: Store) -> None:
    index = next(number for number in range(56, 68) if store.labels[number].any())
    height, width = store.read(index).shape
    model = load(fitted / "decoder", "cpu")
    whole = explain_study(model, store, [index], "Study", lambda image, name: np.ones((height, width), bool))
    short = min(height, width)
    assert whole.outlined
    assert [view.shape for view in whole.views] == [(short, short)]
    assert all(one.masks[0].shape == (short, short) for one in whole.findings)
    edge = np.zeros((height, width), bool)
    edge[0, 0] = height != width  # outside the centre square
    outside = explain_study(model, store, [index], "Study", lambda image, name: edge)
    assert outside.outlined
    assert all(one.masks == (None,) for one in outside.findings)
    nothing = explain_study(model, store, np.array([index]), "Study")
    assert not nothing.outlined
    present = {name for name, label in zip(store.findings, store.labels[index].tolist(), strict=True) if label == 1}
    assert present <= {one.name for one in nothing.findings if one.truth == 1}


def test_a_report_of_data_without_outlines_says_so_once(fitted: Path, tmp_path: Path) -> None:
    target = [f"{fitted / 'store'}:test"]
    predict.run(fitted / "decoder", target, tmp_path / "test.parquet", device="cpu")
    assert len(read_predictions(tmp_path / "test.parquet")) == 12
    evaluate.run(
        tmp_path / "test.parquet", fitted / "store", tmp_path / "out", split="test", bootstraps=0,
        explain=fitted / "decoder",
    )  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>UNKNOWN</b> where it looked" in page
    assert page.count("these data have no outlines of lesions") == 1
    assert "in this view" not in page
    assert 'id="outline"' not in page


def test_a_linear_head_shows_where_its_evidence_is(fitted: Path, tmp_path: Path) -> None:
    predict.run(fitted / "linear", [f"{fitted / 'store'}:test"], tmp_path / "test.parquet", device="cpu")
    evaluate.run(tmp_path / "test.parquet", fitted / "store", tmp_path / "out", bootstraps=0, explain=fitted / "linear")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "where the model read" in page
    assert 'id="heat"' in page
