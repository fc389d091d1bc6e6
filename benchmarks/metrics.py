"""Metrics with intervals by patient: 50,000 images x 40 findings, 1,000 resamples, beside a loop over scikit-learn.

One whole `evaluate` (every metric of `metrics.json`, AP, AUC, F1 and ECE among them: points, 1,000 bootstraps,
intervals, means), in a process of its own whose peak resident memory is read. The peer, written here, does what people
write: draw patients, take their rows, call scikit-learn's average_precision_score, roc_auc_score and f1_score and a
15-bin ECE finding by finding. It runs a few resamples, the same ones, and is scaled to 1,000: that figure is computed,
not measured. The floor is one sort of every column. The values of the shared resamples must agree to 1e-12, or the run
fails.
"""

import json
import resource
import subprocess
import sys
import time

import numpy as np

IMAGES, FINDINGS, PATIENTS, RESAMPLES, PEER_RESAMPLES = 50_000, 40, 12_500, 1_000, 2
THRESHOLD = 0.3


def made_up(images: int, findings: int, patients: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, labels (prevalence 30 % to 0.05 %, 2 % unknown) and the patient of each image, heavy-tailed."""
    rng = np.random.default_rng(0)
    share = rng.pareto(1.5, patients) + 1
    patient = np.append(np.arange(patients), rng.choice(patients, images - patients, p=share / share.sum()))
    prevalence = np.geomspace(0.3, 0.0005, findings)
    positive = rng.random((images, findings)) < prevalence
    positive[0], positive[1] = True, False
    labels = np.where(rng.random(positive.shape) < 0.02, -1, positive).astype(np.int8)
    logits = np.log(prevalence / (1 - prevalence)) + 1.2 * positive + rng.normal(size=positive.shape)
    return 1 / (1 + np.exp(-logits)), labels, patient


def ours(images: int, findings: int, patients: int, resamples: int) -> dict[str, float]:
    """Seconds of one evaluation, and the peak of this process in MB, before and after."""
    from hilum.evaluation.metrics import evaluate
    from hilum.evaluation.predictions import Predictions

    p, y, patient = made_up(images, findings, patients)
    text = np.char.add("p", patient.astype(str))
    uids = np.char.zfill(np.arange(images).astype(str), 16)
    names = tuple(f"finding {index}" for index in range(findings))
    table = Predictions(uids, uids, uids, text, np.full(images, "d"), np.full(images, "PA"), names, p)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    start, work = time.perf_counter(), time.process_time()
    evaluate(table, y, None, dict.fromkeys(names, THRESHOLD), resamples)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - work,
        "before_mb": before,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def peer(p: np.ndarray, y: np.ndarray, copies: np.ndarray) -> dict[str, list[float]]:
    """One resample, as it is usually written; `copies` says how often each row was drawn."""
    from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

    result: dict[str, list[float]] = {name: [] for name in ("AP", "AUC", "F1@tuned", "ECE")}
    rows = np.repeat(np.arange(len(p)), copies)
    for column in range(p.shape[1]):
        drawn = rows[y[rows, column] >= 0]
        scores, truth = p[drawn, column], y[drawn, column]
        result["AP"].append(average_precision_score(truth, scores))
        result["AUC"].append(roc_auc_score(truth, scores))
        result["F1@tuned"].append(f1_score(truth, scores > THRESHOLD))
        bins = np.digitize(scores, np.arange(1, 15) / 15)
        gaps = [abs(scores[bins == b].mean() - truth[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
        result["ECE"].append(sum(gaps))
    return result


def compare(images: int, findings: int, patients: int, resamples: int) -> dict[str, float]:
    """The peer's seconds per resample, the floor, and the largest difference between the two."""
    from hilum.evaluation.bootstrap import replicates, resample_weights
    from hilum.evaluation.weighted import WeightedFinding

    p, y, patient = made_up(images, findings, patients)
    start = time.perf_counter()
    np.sort(p, axis=0)
    floor = time.perf_counter() - start
    weighted = [WeightedFinding(p[:, c], y[:, c], patient, patients, THRESHOLD) for c in range(findings)]
    found = replicates(weighted, resamples, 0)
    taken, off = [], 0.0
    for number in range(resamples):
        copies = resample_weights(patients, number, number + 1, 0)[patient, 0].astype(np.int64)
        start = time.perf_counter()
        expected = peer(p, y, copies)
        taken.append(time.perf_counter() - start)
        off = max([off, *(float(np.abs(found[name][number] - values).max()) for name, values in expected.items())])
    return {"peer_seconds": min(taken), "floor_seconds": floor, "off": off}


def in_a_process(*arguments: object) -> dict[str, float]:
    """What this file prints, run again by itself."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(
    images: int = IMAGES, findings: int = FINDINGS, patients: int = PATIENTS, resamples: int = RESAMPLES
) -> dict[str, float]:
    row = in_a_process("ours", images, findings, patients, resamples)
    row |= in_a_process("compare", images, findings, patients, PEER_RESAMPLES)
    scaled = row["peer_seconds"] * resamples
    print(
        f"{images} images x {findings} findings, {patients} patients, {resamples} resamples\n"
        f"hilum evaluate, all metrics    {row['seconds']:8.1f} s ({row['cpu_seconds']:.1f} s of CPU)\n"
        f"scikit-learn, AP AUC F1 ECE    {scaled:8.0f} s: {scaled / row['seconds']:.0f}x "
        f"(computed from {row['peer_seconds']:.2f} s a resample, the better of {PEER_RESAMPLES})\n"
        f"floor, one sort of each column {row['floor_seconds']:8.3f} s\n"
        f"peak memory {row['peak_mb']:.0f} MB, of which {row['before_mb']:.0f} MB held before; "
        f"largest difference {row['off']:.1e}"
    )
    if row["off"] > 1e-12:
        raise SystemExit("The two sides disagree.")
    return row


if __name__ == "__main__":
    if sys.argv[1:2] in (["ours"], ["compare"]):
        work = {"ours": ours, "compare": compare}[sys.argv[1]]
        print(json.dumps(work(*map(int, sys.argv[2:6]))))
    else:
        main()
