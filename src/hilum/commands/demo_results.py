"""What `hilum demo` makes of its models: the steps of the table, judged on test, and the report.

The stages before are in `demo.py`; nothing here trains or chooses.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import hilum
from hilum.core.types import RESEARCH_NOTICE
from hilum.data.images import read_image
from hilum.data.labels import frequency_groups
from hilum.data.store import Store
from hilum.deploy.examples import choose_studies, explain_study
from hilum.deploy.model_files import read_validation
from hilum.deploy.predictor import load
from hilum.evaluation.bootstrap import paired_difference
from hilum.evaluation.calibration import Calibrator
from hilum.evaluation.curves import curves
from hilum.evaluation.ensemble import mean_over_models
from hilum.evaluation.metrics import evaluate
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.report import write_report
from hilum.evaluation.studies import mean_over_studies

FORMAT = "hilum-demo-1"
MINIMUM_POSITIVES = 10
"""Findings with fewer test positives are left out of macro means and listed."""


@dataclass(frozen=True)
class Step:
    """One row of the table: predictions on test, and thresholds that validation gave at the same stage."""

    name: str
    test: Predictions
    thresholds: dict[str, float]
    judged_by: str = "mAP"
    """The metric whose difference from the row above is shown."""


def steps(store: Store, linear: Path, decoder_low: Path, decoder_high: Path) -> list[Step]:
    """The rows of the table, each from the one before; validation goes through the same operations as test."""
    indices = store.indices("test")
    validation, test = {}, {}
    for name, path in (("linear", linear), ("low", decoder_low), ("high", decoder_high)):
        validation[name], labels = read_validation(path)
        test[name] = load(path).predict_store(store, indices, raw=True)
    groups = _groups(store)

    def step(name: str, on_validation: Predictions, on_test: Predictions) -> tuple[Step, Calibrator]:
        calibrator = Calibrator.fit(
            on_validation.probabilities, labels, on_validation.findings, groups,
            stage=on_validation.stage, unit=on_validation.unit, uids=on_validation.image_uid,
        )  # fmt: skip
        cuts = {finding: cut["f1"] for finding, cut in calibrator.raw_thresholds.items()}
        return Step(name, on_test, cuts), calibrator

    rows = [step("linear", validation["linear"], test["linear"])[0]]
    rows.append(step("decoder", validation["low"], test["low"])[0])
    studies = {name: mean_over_studies(validation[name]) for name in ("low", "high")}
    test_studies = {name: mean_over_studies(test[name]) for name in ("low", "high")}
    rows.append(step("+ study mean", studies["low"], test_studies["low"])[0])
    ensemble = mean_over_models(list(test_studies.values()))
    row, calibrator = step("+ ensemble", mean_over_models(list(studies.values())), ensemble)
    rows.append(row)
    cuts = {finding: cut["f1"] for finding, cut in calibrator.thresholds.items()}
    rows.append(Step("+ calibration", calibrator.apply_to(ensemble), cuts, "mECE_standard"))
    return rows


def _groups(store: Store) -> dict[str, str]:
    train = store.labels[store.indices("train")]
    positives = dict(zip(store.findings, (train == 1).sum(axis=0).tolist(), strict=True))
    return frequency_groups(positives, len(train))


def judge(steps: Sequence[Step], store: Store, bootstraps: int, seed: int) -> dict[str, Any]:
    """Metrics of every step on the test split, and each step's paired difference from the one before."""
    labels = store.labels[store.indices("test")]
    groups = _groups(store)
    rows: list[dict[str, Any]] = []
    metrics: dict[str, Any] = {}
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        metrics = evaluate(
            step.test, labels, groups, step.thresholds, bootstraps if last else 0, seed, MINIMUM_POSITIVES
        )
        rows.append({"name": step.name, **metrics["macro"], "difference": None})
        if position:
            before = steps[position - 1]
            differences = paired_difference(
                step.test, before.test, labels, step.thresholds, before.thresholds, bootstraps, seed,
                MINIMUM_POSITIVES,
            )  # fmt: skip
            chosen = differences[step.judged_by]
            rows[-1]["difference"] = {"metric": step.judged_by, "value": chosen["difference"], **chosen}
            rows[-1]["differences"] = differences
    return {
        "format": FORMAT,
        "hilum": hilum.__version__,
        "notice": RESEARCH_NOTICE,
        "steps": rows,
        "metrics": metrics,
        "minimum_positives": MINIMUM_POSITIVES,
    }


def report(
    path: Path,
    model_path: Path,
    phantoms: Path,
    steps: Sequence[Step],
    results: dict[str, Any],
    store: Store,
    count: int,
) -> None:
    """Write the page: the table, the figures of the last step, and `count` example studies beside the true lesions."""
    indices = store.indices("test")
    labels = store.labels[indices]
    model = load(model_path)
    lesions = _lesions(phantoms)

    def mask(image_id: str, finding: str) -> np.ndarray | None:
        path = lesions.get((image_id, finding))
        return None if path is None else read_image(path).pixels > 0

    chosen = choose_studies(steps[-1].test, labels, count)
    examples = [
        explain_study(model, store, indices[rows], f"Study {number}", mask) for number, rows in enumerate(chosen, 1)
    ]
    names = steps[-1].test.findings
    write_report(
        path,
        title="Long-tailed findings on synthetic chest X-rays",
        metrics=results["metrics"],
        curves=curves(steps[-1].test.probabilities, labels, names),
        curves_before=curves(steps[-2].test.probabilities, labels, names),
        steps=results["steps"],
        examples=examples,
        facts={
            "Model": "ML-Decoder on two resolutions",
            "Data": "Phantoms, CXR-LT layout",
            "Split": "test, by patient",
            "Seed": str(results["seed"]),
            "Train, val fingerprint": store.fingerprint(np.concatenate([store.indices("train"), store.indices("val")])),
            "Test fingerprint": store.fingerprint(indices),
            "Hilum": hilum.__version__,
        },
        notes=[
            "These patients are drawn, not photographed: the numbers say that the pipeline works, and nothing about "
            "people.",
            "Calibrators and thresholds were fitted on validation patients, on heads that had not seen them.",
        ],
        minimum_positives=MINIMUM_POSITIVES,
    )


def _lesions(data: Path) -> dict[tuple[str, str], Path]:
    """(image_id, finding) -> mask file."""
    with (data / "masks.csv").open(encoding="utf-8", newline="") as file:
        return {(row["image_id"], row["finding"]): data / row["path"] for row in csv.DictReader(file)}
