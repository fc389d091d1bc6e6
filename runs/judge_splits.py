"""Several models on several splits of the same patients, each against the first: one interval by patient.

    python runs/judge_splits.py OUT FLOOR MODEL ...

Reads OUT/split_*/NAME.parquet and the store beside it. A resample draws whole patients once, and every split is
measured with the same draw, so the interval of a mean over splits knows that they share patients; and S - 1 of the S
splits, as an ablation draws seeds, so it knows that another training would have ended elsewhere. Means are over the
findings with at least 5 positives in a split's test images that every model was trained on. `probability_better` is
the share of resamples in which the model is better, each turned over at the difference itself as the basic interval is.
Written to OUT/result.json.
"""

import json
import sys
from pathlib import Path

import numpy as np

from hilum.core.files import write_json
from hilum.evaluation.ablation import draw_seeds
from hilum.evaluation.bootstrap import basic_interval, interval, mean_over_findings, resample_weights
from hilum.evaluation.joining import join
from hilum.evaluation.predictions import read_predictions
from hilum.evaluation.truth import read_truth
from hilum.evaluation.weighted import WeightedFinding

MINIMUM_POSITIVES, RESAMPLES, METRICS = 5, 2000, ("AP", "AUC")


def over_splits(values: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Mean over all splits, then in each resample over the splits that it draws.

    Args:
        values: (S, 1 + R): of all patients, and of each resample.
        drawn: (R, S - 1): which splits.
    """
    resampled = np.take_along_axis(values[:, 1:], drawn.T, axis=0).mean(axis=0)
    return np.concatenate([[values[:, 0].mean()], resampled])


def main(out: Path, names: list[str]) -> None:
    """Judge all splits, print a table, write the result."""
    splits = sorted(path for path in out.glob("split_*") if path.is_dir())
    truths = [read_truth(path / "store") for path in splits]
    patients = {name: n for n, name in enumerate(sorted({p for truth in truths for p in truth.patient_id.tolist()}))}
    weights = np.concatenate([np.ones((len(patients), 1)), resample_weights(len(patients), 0, RESAMPLES, 0)], axis=1)
    drawn = draw_seeds(len(splits), RESAMPLES, 0)
    measured = {name: {metric: [] for metric in METRICS} for name in names}
    tested: set[str] = set()
    for path, truth in zip(splits, truths, strict=True):
        tables = {name: read_predictions(path / f"{name}.parquet") for name in names}
        trained = set.intersection(*(set(np.array(one.findings)[one.trained].tolist()) for one in tables.values()))
        for name, predictions in tables.items():
            joined = join(truth, predictions, "test").select([one for one in truth.findings if one in trained])
            labels, table = joined.labels, joined.predictions
            tested |= set(table.patient_id.tolist())
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
    result = {"splits": len(splits), "patients": len(tested), "resamples": RESAMPLES, "rows": []}
    for name in names:
        for metric in METRICS:
            values = np.stack(measured[name][metric])  # splits x (all patients, resamples)
            gain = values - np.stack(measured[names[0]][metric])
            level, difference = (over_splits(each, drawn) for each in (values, gain))
            result["rows"].append({
                "model": name, "metric": f"m{metric}", "mean": level[0], "splits": values[:, 0].round(4).tolist(),
                "ci95": interval(level[1:], level[0]), "difference": difference[0],
                "difference_splits": gain[:, 0].round(4).tolist(),
                "difference_ci95": basic_interval(difference[1:], difference[0]),
                "probability_better": float((2 * difference[0] - difference[1:] > 0).mean()),
            })  # fmt: skip
    write_json(out / "result.json", result)
    for row in result["rows"]:
        print(json.dumps(row))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
