"""Adding findings to a trained model: what old ones lose, what new ones reach, and from how many labels.

    python runs/growing.py STORE BACKBONE OUT [key=value ...]

Fixed before it is run:

- Increments: the 26 findings of CXR-LT 2024 task 2, then the 14 that task 1 adds, then the five of task 3.
- Upper bound: the same recipe fitted on all 45 at once. Recipe: laptop_decoder at 128 pixels, seed 0. The ladder of
  `hilum extend` as it is: validation chooses among its rungs.
- Few labels: the 19 at once, at most k positives of each in train and k in validation, k = 8, 32, 96, seeds 0 to 2, at
  three of the nine rates and every rung of the ladder; all known negatives stay. A finding counts at a k only where it
  has at least k positives in train; since that is fewer findings at a larger k, the curve is also given over those that
  count at every k, with the joint fit beside.
- Findings that the backbone sees: the 14 and the 19 are rare, and say little where features hardly know them. So the
  same again with common ones held back: a model of the other 21 of task 2, five common ones added from all labels and
  from few, beside the model of all 26 from above. They are every second of the ten most frequent in training, Normal
  apart, and were chosen after the AP of those 26 had been seen. The three rates throughout.
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
COMMON = ("Support Devices", "Cardiomegaly", "Atelectasis", "Edema", "Consolidation")
RECIPE, SETTINGS = "laptop_decoder", ("resolution=128",)
SHOTS, SEEDS, POSITIVES, RESAMPLES = (8, 32, 96), 3, 10, 1000
THREE_RATES = (f"learning_rates=[{', '.join(map(str, SLIDES_RATES[1::3]))}]",)


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
    for name, findings in (("old", CXRLT_2024_TASK2), ("new", (*FIRST, *LAST))):
        result[f"grown_minus_joint_{name}"] = difference(out / "grown_45", joint, store, findings)
    return result


def difference(grown: Path, joint: Path, store: Store, findings: tuple[str, ...]) -> dict[str, Any]:
    """Of mAP on test, paired by patient; null where no finding has enough positives."""
    labels = truth(store, findings)
    if not ((labels == 1).sum(axis=0) >= POSITIVES).any():
        return {"difference": None, "low": None, "high": None}
    first, second = predicted(grown, store).select(findings), predicted(joint, store)
    return paired_difference(first, second, labels, bootstraps=RESAMPLES, min_positives=POSITIVES)["mAP"]


def few_labels(
    store: Store, data: Path, before: Path, joint_fit: Path, findings: Sequence[str], name: str, settings: list[str],
    shots: tuple[int, ...], seeds: int,
) -> dict[str, Any]:  # fmt: skip
    """Findings added at once from k positives of each, beside a joint fit on every label; both models must be there."""
    train = store.indices("train")
    positives = {name: int((store.labels[train, store.findings.index(name)] == 1).sum()) for name in findings}
    joint = described(joint_fit, store, findings)
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
            folder = before.with_name(f"{name}_{k}_seed_{seed}")
            changes = [*settings, f"seed={seed}"]
            seconds = timed(folder, extend.run, before, data, findings, folder, changes, Shots(k, k))
            rows, training = described(folder, store, findings), read_config(folder)["extensions"][-1]["training"]
            runs.append({
                "seed": seed, "seconds": seconds, "rung": training["rung"], "mAP": mean_ap(rows, enough),
                "mAP_at_every_k": mean_ap(rows, always), "rows": rows,
                "old": old_change(before, folder, store),
            })  # fmt: skip
        curve["k"][str(k)] = {"findings": enough, "joint_mAP": mean_ap(joint, enough), "runs": runs}
        for mean in ("mAP", "mAP_at_every_k"):
            values = [run[mean] for run in runs if run[mean] is not None]
            curve["k"][str(k)][mean] = float(np.mean(values)) if values else None
            curve["k"][str(k)][f"range_of_{mean}"] = [min(values), max(values)] if values else [None, None]
    return curve


def common_findings(
    store: Store, data: Path, backbone: Path, out: Path, settings: list[str], shots: tuple[int, ...], seeds: int
) -> dict[str, Any]:
    """Five findings that the backbone sees added to 21, beside the model of all 26, which must be there."""
    rates, others = [*THREE_RATES, *settings], [name for name in CXRLT_2024_TASK2 if name not in COMMON]
    before, folder, joint = out / "common_21", out / "common_26", out / "grown_26"
    config = fit_recipe(RECIPE, [*SETTINGS, *rates, f"findings=[{', '.join(others)}]"])
    timed(before, fit.run, config, data, backbone, before)
    seconds = timed(folder, extend.run, before, data, COMMON, folder, rates)
    return {
        "seconds": seconds, "rung": read_config(folder)["extensions"][-1]["training"]["rung"],
        "old": old_change(before, folder, store), "rows": described(folder, store, COMMON),
        "joint_rows": described(joint, store, COMMON),
        "grown_minus_joint_new": difference(folder, joint, store, COMMON),
        "few_labels": few_labels(store, data, before, joint, COMMON, "common_shots", rates, shots, seeds),
    }  # fmt: skip


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
    new, rates = (*FIRST, *LAST), [*THREE_RATES, *settings]
    curve = few_labels(store, data, out / "grown_26", out / "joint_45", new, "shots", rates, shots, seeds)
    common = common_findings(store, data, backbone, out, settings, shots, seeds)
    write_json(out / "growing.json", {"increments": grown, "few_labels": curve, "common": common})
    say(f"{'step':8} {'old change':>12} {'same tensors':>12} {'new mAP':>8} {'joint':>8} {'rung':>8} {'s/finding':>9}")
    for name, findings in (("40", FIRST), ("45", LAST)):
        step = grown[name]
        joint = mean_ap(grown["joint"]["rows"], list(findings))
        say(
            f"{name:8} {max(step['old']['raw'], step['old']['calibrated']):12g} {step['old']['same_tensors']!s:>12} "
            f"{_number(mean_ap(step['rows'], list(findings)))} {_number(joint)} {step['rung']:>8} "
            f"{_number(step['seconds_per_finding'])}"
        )
    _say_difference("new findings", grown["grown_minus_joint_new"])
    _say_curve(curve)
    added, joint = (mean_ap(common[key], COMMON) for key in ("rows", "joint_rows"))
    change = max(common["old"]["raw"], common["old"]["calibrated"])
    say(f"common findings, all labels: mAP {_number(added)}, joint {_number(joint)}, old change {change:g}")
    _say_difference("common findings", common["grown_minus_joint_new"])
    _say_curve(common["few_labels"])


def _say_difference(what: str, row: dict[str, Any]) -> None:
    say(f"{what}, grown - joint: {_number(row['difference'])} [{_number(row['low'])}, {_number(row['high'])}]")


def _say_curve(curve: dict[str, Any]) -> None:
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
