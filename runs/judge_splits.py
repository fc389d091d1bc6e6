"""Several models on several splits of the same patients, each against the first: one interval by patient.

    python runs/judge_splits.py OUT FLOOR MODEL ...

Reads OUT/split_*/NAME.parquet and the store beside it. A resample draws whole patients once, and every split is
measured with the same draw, so the interval of a mean over splits knows that they share patients. Means are over the
findings with at least 5 positives in a split's test images that every model was trained on. Written to OUT/result.json.
"""

import json
import sys
from pathlib import Path

import numpy as np

from hilum.core.files import write_json
from hilum.evaluation.bootstrap import interval, mean_over_findings, resample_weights
from hilum.evaluation.joining import join
from hilum.evaluation.predictions import read_predictions
from hilum.evaluation.truth import read_truth
from hilum.evaluation.weighted import WeightedFinding

MINIMUM_POSITIVES, RESAMPLES, METRICS = 5, 2000, ("AP", "AUC")


def main(out: Path, names: list[str]) -> None:
    """Judge all splits, print a table, write the result."""
    splits = sorted(path for path in out.glob("split_*") if path.is_dir())
    truths = [read_truth(path / "store") for path in splits]
    patients = {name: n for n, name in enumerate(sorted({p for truth in truths for p in truth.patient_id.tolist()}))}
    weights = np.concatenate([np.ones((len(patients), 1)), resample_weights(len(patients), 0, RESAMPLES, 0)], axis=1)
    measured = {name: {metric: [] for metric in METRICS} for name in names}
    for path, truth in zip(splits, truths, strict=True):
        tables = {name: read_predictions(path / f"{name}.parquet") for name in names}
        trained = set.intersection(*(set(np.array(one.findings)[one.trained].tolist()) for one in tables.values()))
        for name, predictions in tables.items():
            joined = join(truth, predictions, "test").select([one for one in truth.findings if one in trained])
            labels, table = joined.labels, joined.predictions
            clusters = np.array([patients[patient] for patient in table.patient_id.tolist()])
            columns = np.flatnonzero((labels == 1).sum(axis=0) >= MINIMUM_POSITIVES)
            found = [
                WeightedFinding(table.probabilities[:, c], labels[:, c], clusters, len(patients), None).measure(
                    weights, METRICS
                )
                for c in columns
            ]
            for metric in METRICS:
                measured[name][metric].append(mean_over_findings(np.stack([one[metric] for one in found], axis=1)))
    result = {"splits": len(splits), "patients": len(patients), "resamples": RESAMPLES, "rows": []}
    for name in names:
        for metric in METRICS:
            values = np.stack(measured[name][metric])  # splits x (all patients, resamples)
            gain = (values - np.stack(measured[names[0]][metric])).mean(axis=0)
            result["rows"].append({
                "model": name, "metric": f"m{metric}", "mean": float(values[:, 0].mean()),
                "splits": values[:, 0].round(4).tolist(), "ci95": interval(values[:, 1:].mean(axis=0)),
                "difference": float(gain[0]), "difference_ci95": interval(gain[1:]),
                "probability_better": float((gain[1:] > 0).mean()),
            })  # fmt: skip
    write_json(out / "result.json", result)
    for row in result["rows"]:
        print(json.dumps(row))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
