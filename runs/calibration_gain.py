"""Calibration against none, and challenge scaling against none, on one model's test predictions.

    python runs/calibration_gain.py STORE MODEL RAW_TEST_PREDICTIONS OUT.json

Fixed before it is run: findings with at least 10 test positives; 1,000 resamples of patients, seed 0; methods `auto`
and `cross_fitted`; the cuts of `f1` on raw probabilities; compression 0.3. AP and AUC are compared per finding, of all.

`auto, same head` was added after a first look. A model's calibrator comes from a head that has seen less than the one
that predicts (docs/reference/model.md, "Out of sample"); here every test patient is mapped by what the other test
patients of the predicting head gave, in 5 folds. It says what is lost between the two heads; no model is made so.
"""

import sys
from pathlib import Path

import numpy as np

from hilum.core.files import write_json
from hilum.evaluation.bootstrap import clusters_of, paired_difference
from hilum.evaluation.calibration import Calibrator
from hilum.evaluation.challenge_scaling import move_cut_to_half
from hilum.evaluation.joining import Joined, join
from hilum.evaluation.map_choice import FOLDS, cross_fit, deal_patients
from hilum.evaluation.metrics import average_precision, roc_auc
from hilum.evaluation.predictions import Predictions, read_predictions
from hilum.evaluation.truth import read_truth

POSITIVES, RESAMPLES, SEED, COMPRESS = 10, 1000, 0, 0.3
METHODS = ("auto", "cross_fitted")
MEASURED = ("mAP", "mAUC", "mECE_standard", "mBrier", "mF1@0.5", "mECE_challenge_inferred")


def joined(store: str, predictions: Path, split: str) -> Joined:
    """Predictions and labels of the findings that were trained."""
    table = read_predictions(predictions)
    both = join(read_truth(Path(store)), table, split, allow_missing=True)
    names = [name for name, trained in zip(table.findings, table.trained, strict=True) if trained]
    return both.select([name for name in names if name in both.findings])


def scaled(table: Predictions, calibrator: Calibrator, compress: float) -> Predictions:
    """Every finding's F1 cut moved to 0.5."""
    cuts = calibrator.raw_thresholds
    columns = [
        move_cut_to_half(table.probabilities[:, c], cuts[name]["f1"], compress) for c, name in enumerate(table.findings)
    ]
    return table.replace(np.stack(columns, axis=1))


def largest_change(table: Predictions, other: Predictions, labels: np.ndarray) -> float:
    """Largest difference of AP or AUC of any finding."""
    differences = [0.0]
    for c in range(labels.shape[1]):
        for measure in (average_precision, roc_auc):
            ends = [measure(one.probabilities[:, c], labels[:, c]) for one in (table, other)]
            if ends[0] is not None and ends[1] is not None:
                differences.append(abs(ends[0] - ends[1]))
    return max(differences)


def main(store: str, model: str, predictions: str, out: str) -> None:
    """Print and write the differences."""
    test = joined(store, Path(predictions), "test")
    val = joined(store, Path(model) / "validation_logits.parquet", "val").select(test.findings)
    table, labels = test.predictions, test.labels
    calibrators = {
        method: Calibrator.fit(
            val.predictions.probabilities, val.labels, val.findings, table.metadata.get("groups"), method,
            uids=val.predictions.image_uid.tolist(), patients=clusters_of(val.predictions).tolist(),
        )
        for method in METHODS
    }  # fmt: skip
    variants = {method: calibrator.apply_to(table) for method, calibrator in calibrators.items()}
    fold = deal_patients(clusters_of(table).tolist(), FOLDS)
    kinds = dict.fromkeys(table.findings, "auto")
    groups = table.metadata.get("groups") or {}
    variants["auto, same head"] = table.replace(
        cross_fit(table.probabilities, labels, table.findings, groups, kinds, fold)
    )
    variants["scaled"] = scaled(table, calibrators["auto"], 1.0)
    variants["scaled, compressed"] = scaled(table, calibrators["auto"], COMPRESS)
    counted = int(((labels == 1).sum(axis=0) >= POSITIVES).sum())
    result = {"images": len(table), "validation images": len(val.predictions), "findings": counted, "differences": {}}
    print(f"{predictions}: {len(table)} test images, {len(val.predictions)} validation images, {counted} findings")
    for name, variant in variants.items():
        rows = paired_difference(variant, table, labels, None, None, RESAMPLES, SEED, POSITIVES)
        change = largest_change(table, variant, labels)
        assert name == "auto, same head" or change < 1e-12, (name, change)  # five maps, not one
        result["differences"][name] = {"largest change of AP or AUC": change, **{key: rows[key] for key in MEASURED}}
        for key in MEASURED[2:]:
            row = rows[key]
            ends = "" if row["low"] is None else f" [{row['low']:+.4f}, {row['high']:+.4f}]"
            print(f"  {name:<20} {key:<24} {row['difference']:+.4f}{ends}{'' if row['shown'] else ' not shown'}")
    write_json(Path(out), result)


if __name__ == "__main__":
    main(*sys.argv[1:])
