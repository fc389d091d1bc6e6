"""Adding findings to a trained model: what old ones lose, what new ones reach, and from how many labels.

    python runs/growing.py STORE BACKBONE OUT [key=value ...]

Fixed before it is run:

- Increments: the 26 findings of CXR-LT 2024 task 2, then the 14 that task 1 adds, then the five of task 3.
- Upper bound: the same recipe fitted on all 45 at once. Recipe: laptop_decoder at 128 pixels, seed 0. The ladder of
  `hilum extend` as it is: validation chooses among rows, adapter, own.
- Few labels: the 19 at once, at most k positives of each in train and k in validation, k = 8, 32, 96, seeds 0 to 2, at
  three of the nine rates and every rung of the ladder; all known negatives stay. A finding counts at a k only where it
  has at least k positives in train; since that is fewer findings at a larger k, the curve is also given over those that
  count at every k, with the joint fit beside.
- Judged on test, raw predictions, per image: average precision of findings with at least 10 test positives; paired
  differences over 1,000 resamples of patients, seed 0.

Models that are there already are kept, so a run that was stopped goes on, with the same STORE, BACKBONE and settings.
Writes OUT/growing.json. `key=value` is put behind every recipe, and is for trying the script out (as in shots=4,8
seeds=1 search_epochs=2).
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from hilum.commands import extend, fit
from hilum.commands.ablate_checkpoint import weights_digest
from hilum.commands.extend_inputs import Shots
from hilum.core.files import read_json, write_json
from hilum.core.tracking import say
from hilum.data.labels import CXRLT_2024_TASK1, CXRLT_2024_TASK2, CXRLT_2024_TASK3
from hilum.data.store import Store
from hilum.deploy.model_files import read_config
from hilum.deploy.predictor import load
from hilum.evaluation.bootstrap import paired_difference
from hilum.evaluation.definitions import METRICS, average_precision
from hilum.evaluation.predictions import Predictions, read_predictions, write_predictions
from hilum.heads.sweep import SLIDES_RATES
from hilum.recipes import fit_recipe

FIRST = tuple(name for name in CXRLT_2024_TASK1 if name not in CXRLT_2024_TASK2)
LAST = CXRLT_2024_TASK3
ALL = (*CXRLT_2024_TASK1, *LAST)
RECIPE, SETTINGS = "laptop_decoder", ("resolution=128",)
SHOTS, SEEDS, POSITIVES, RESAMPLES = (8, 32, 96), 3, 10, 1000
SHOTS_SETTINGS = (f"learning_rates=[{', '.join(map(str, SLIDES_RATES[1::3]))}]",)


def timed(folder: Path, program: Callable[..., Path], *arguments: Any) -> float | None:
    """Make a model unless it is there; seconds that it took, kept beside it; None where nobody knows any more."""
    clock = folder.with_name(f"{folder.name}.seconds.json")
    if not (folder / "config.json").exists():
        start = time.monotonic()
        program(*arguments)
        write_json(clock, time.monotonic() - start)
    return float(read_json(clock, ValueError)) if clock.exists() else None


def predicted(model: Path, store: Store, raw: bool = True) -> Predictions:
    """Test predictions of a model, kept beside it."""
    file = model.with_name(f"{model.name}.{'raw' if raw else 'calibrated'}.parquet")
    if not file.exists():
        write_predictions(load(model).predict_store(store, store.indices("test"), raw=raw), file)
    return read_predictions(file)


def truth(store: Store, names: tuple[str, ...]) -> np.ndarray:
    """Labels of the test images."""
    return store.labels[store.indices("test")][:, [store.findings.index(name) for name in names]]


def old_change(before: Path, after: Path, store: Store) -> dict[str, float | bool]:
    """Largest change of any old output on test, raw and calibrated, and whether every old tensor is the same bytes."""
    changes = {}
    for kind, raw in (("raw", True), ("calibrated", False)):
        one, other = predicted(before, store, raw), predicted(after, store, raw)
        assert one.image_uid.tolist() == other.image_uid.tolist()
        both = [one.probabilities, other.select(one.findings).probabilities]
        assert np.array_equal(*map(np.isnan, both)), "an old finding has become null, or is no longer"
        changes[kind] = float(np.nanmax(np.abs(both[0] - both[1])))
    old, new = (load_file(path / "model.safetensors") for path in (before, after))
    return {**changes, "same_tensors": all(old[name].tobytes() == new[name].tobytes() for name in old)}


def described(model: Path, store: Store, names: tuple[str, ...]) -> dict[str, Any]:
    """Per finding on test: AP, prevalence, and of the calibrated probabilities ECE and F1 at the stored threshold."""
    raw, calibrated = predicted(model, store).select(names), predicted(model, store, raw=False).select(names)
    labels, thresholds = truth(store, names), calibrated.metadata.get("thresholds") or {}
    rows = {}
    for column, name in enumerate(names):
        cut = (thresholds.get(name) or {}).get("f1")
        p, y = calibrated.probabilities[:, column], labels[:, column]
        rows[name] = {
            "AP": average_precision(raw.probabilities[:, column], y), "positives": int((y == 1).sum()),
            "prevalence": float((y == 1).mean()), "ECE": METRICS["ECE"](p, y, cut),
            "F1@tuned": None if cut is None else METRICS["F1@tuned"](p, y, cut),
        }  # fmt: skip
    return rows


def mean_ap(rows: dict[str, Any], names: Sequence[str]) -> float | None:
    """Mean over findings with enough test positives."""
    values = [
        rows[name]["AP"] for name in names if rows[name]["positives"] >= POSITIVES and rows[name]["AP"] is not None
    ]
    return float(np.mean(values)) if values else None


def increments(store: Store, data: Path, backbone: Path, out: Path, settings: list[str]) -> dict[str, Any]:
    """26 -> 40 -> 45, beside a joint fit."""
    steps = (("26", CXRLT_2024_TASK2, ()), ("40", FIRST, ("26",)), ("45", LAST, ("40",)))
    result: dict[str, Any] = {}
    for name, findings, before in steps:
        folder = out / f"grown_{name}"
        if not before:
            config = fit_recipe(RECIPE, [*SETTINGS, *settings, f"findings=[{', '.join(findings)}]"])
            seconds = timed(folder, fit.run, config, data, backbone, folder)
            result[name] = {"seconds": seconds, "rows": described(folder, store, findings)}
            continue
        [previous] = [out / f"grown_{one}" for one in before]
        seconds = timed(folder, extend.run, previous, data, findings, folder, settings)
        training = read_config(folder)["extensions"][-1]["training"]
        result[name] = {
            "seconds": seconds, "seconds_per_finding": seconds and seconds / len(findings), "rung": training["rung"],
            "weights_per_finding": training["trained_weights"] / len(findings),
            "old": old_change(previous, folder, store), "rows": described(folder, store, findings),
        }  # fmt: skip
    joint = out / "joint_45"
    config = fit_recipe(RECIPE, [*SETTINGS, *settings, f"findings=[{', '.join(ALL)}]"])
    result["joint"] = {"seconds": timed(joint, fit.run, config, data, backbone, joint)}
    result["joint"]["rows"] = described(joint, store, ALL)
    grown, upper = predicted(out / "grown_45", store), predicted(joint, store)
    for name, findings in (("old", CXRLT_2024_TASK2), ("new", (*FIRST, *LAST))):
        labels = truth(store, findings)
        row = {"difference": None, "low": None, "high": None}
        if ((labels == 1).sum(axis=0) >= POSITIVES).any():
            row = paired_difference(
                grown.select(findings), upper, labels, bootstraps=RESAMPLES, min_positives=POSITIVES
            )["mAP"]
        result[f"grown_minus_joint_{name}"] = row
    return result


def few_labels(
    store: Store, data: Path, out: Path, settings: list[str], shots: tuple[int, ...], seeds: int
) -> dict[str, Any]:
    """The 19 at once from k positives of each, beside the joint fit on every label, which must be there."""
    findings, train = (*FIRST, *LAST), store.indices("train")
    positives = {name: int((store.labels[train, store.findings.index(name)] == 1).sum()) for name in findings}
    joint = described(out / "joint_45", store, findings)
    counting = {
        k: [one for one in findings if positives[one] >= k and joint[one]["positives"] >= POSITIVES] for k in shots
    }
    always = counting[max(shots)]
    curve: dict[str, Any] = {
        "train_positives": positives, "findings_at_every_k": always, "joint_mAP_at_every_k": mean_ap(joint, always),
        "k": {},
    }  # fmt: skip
    for k, enough in counting.items():
        runs = []
        for seed in range(seeds):
            folder = out / f"shots_{k}_seed_{seed}"
            changes = [*SHOTS_SETTINGS, *settings, f"seed={seed}"]
            seconds = timed(folder, extend.run, out / "grown_26", data, findings, folder, changes, Shots(k, k))
            rows, training = described(folder, store, findings), read_config(folder)["extensions"][-1]["training"]
            runs.append({
                "seed": seed, "seconds": seconds, "rung": training["rung"], "mAP": mean_ap(rows, enough),
                "mAP_at_every_k": mean_ap(rows, always), "rows": rows,
                "old": old_change(out / "grown_26", folder, store),
            })  # fmt: skip
        curve["k"][str(k)] = {"findings": enough, "joint_mAP": mean_ap(joint, enough), "runs": runs}
        for name in ("mAP", "mAP_at_every_k"):
            values = [run[name] for run in runs if run[name] is not None]
            curve["k"][str(k)][name] = float(np.mean(values)) if values else None
            curve["k"][str(k)][f"range_of_{name}"] = [min(values), max(values)] if values else [None, None]
    return curve


def main(data: Path, backbone: Path, out: Path, words: list[str]) -> None:
    """Run everything; print a table."""
    given = dict(word.split("=", 1) for word in words)
    shots = tuple(int(one) for one in given.pop("shots", ",".join(map(str, SHOTS))).split(","))
    seeds = int(given.pop("seeds", SEEDS))
    settings = [f"{key}={value}" for key, value in given.items()]
    store = Store.open(data)
    out.mkdir(parents=True, exist_ok=True)
    made_from = {
        "store": store.header["index_sha256"], "backbone": weights_digest(str(backbone)), "settings": settings,
    }  # fmt: skip
    if (out / "made_from.json").exists() and read_json(out / "made_from.json", ValueError) != made_from:
        raise SystemExit(f"{out} holds models of another store, another backbone or other settings; take a new OUT.")
    write_json(out / "made_from.json", made_from)
    grown = increments(store, data, backbone, out, settings)
    curve = few_labels(store, data, out, settings, shots, seeds)
    write_json(out / "growing.json", {"increments": grown, "few_labels": curve})
    say(f"{'step':8} {'old change':>12} {'same tensors':>12} {'new mAP':>8} {'joint':>8} {'rung':>8} {'s/finding':>9}")
    for name, findings in (("40", FIRST), ("45", LAST)):
        step = grown[name]
        joint = mean_ap(grown["joint"]["rows"], list(findings))
        say(
            f"{name:8} {max(step['old']['raw'], step['old']['calibrated']):12g} {step['old']['same_tensors']!s:>12} "
            f"{_number(mean_ap(step['rows'], list(findings)))} {_number(joint)} {step['rung']:>8} "
            f"{_number(step['seconds_per_finding'])}"
        )
    row = grown["grown_minus_joint_new"]
    say(f"new findings, grown - joint: {_number(row['difference'])} [{_number(row['low'])}, {_number(row['high'])}]")
    for k, row in curve["k"].items():
        for name, findings, joint in (
            ("mAP", row["findings"], row["joint_mAP"]),
            ("mAP_at_every_k", curve["findings_at_every_k"], curve["joint_mAP_at_every_k"]),
        ):
            ends = row[f"range_of_{name}"]
            spread = f"({_number(ends[0])} to {_number(ends[1])})"
            say(f"k = {k:>3}: {len(findings):2} findings, {name} {_number(row[name])} {spread}, joint {_number(joint)}")


def _number(value: float | None) -> str:
    return "       -" if value is None else f"{value:8.3f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
