"""The table of an ablation as plain text for a terminal and as Markdown; from the content of `results.json`."""

from collections.abc import Mapping, Sequence
from typing import Any

SETS = ("all", "head", "medium", "tail")
"""Sets of findings that are averaged, in order."""
GROUP_WORDS = "head: over 10 % of training images, medium: 1 to 10 %, tail: under 1 %"
LEFT_OUT = {
    "not_in_store": "not in the store, or not in some row",
    "untrained": "never trained in some row (no positive training image)",
    "few_positives": "too few test positives",
    "no_negatives": "no negative test image",
}
"""Why a finding of a task is in no mean."""


def text_table(results: Mapping[str, Any]) -> str:
    """What a run prints: per task, the rows with their intervals beside published numbers, then the differences."""
    parts = []
    for task in results["tasks"]:
        parts += ["", task_line(results, task, names=False), _aligned(_row_cells(results, task))]
        if results["differences"]:
            parts += ["", _aligned(_difference_cells(results, task))]
    parts += ["", *notes(results)]
    return "\n".join(parts)


def markdown_table(results: Mapping[str, Any]) -> str:
    """`table.md`: the same, with macro means by group and every seed."""
    plan = results["plan"]
    parts = [f"# {plan['title'] or plan['name']}", "", *(line for line in (plan["note"], "") if plan["note"])]
    parts += [f"- {line}" for line in notes(results)]
    for task in results["tasks"]:
        parts += ["", f"## {task}", "", task_line(results, task), "", _markdown(_row_cells(results, task))]
        if results["differences"]:
            parts += ["", "Differences, first minus second:", "", _markdown(_difference_cells(results, task))]
            if any(name in one["tasks"][task] for one in results["differences"] for name in SETS[1:]):
                parts += ["", f"Differences of mAP by group ({GROUP_WORDS}):", ""]
                parts.append(_markdown(_group_cells(results, task)))
        parts += ["", "mAP of each seed:", "", _markdown(_seed_cells(results, task))]
    parts += ["", results["notice"], ""]
    return "\n".join(parts)


def task_line(results: Mapping[str, Any], task: str, names: bool = True) -> str:
    """Over how many findings the means of a task are, and which are left out, or how many."""
    columns = results["tasks"][task]
    line = f"{task}: means over {len(columns['findings'])} of {columns['asked']} findings, the same for every row"
    left_out = [
        f"{LEFT_OUT.get(reason, reason)}: {', '.join(found) if names else len(found)}"
        for reason, found in columns["left_out"].items()
        if found
    ]
    return line + (f"; left out, {'; '.join(left_out)}" if left_out else "")


def notes(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the numbers: scale, data, intervals, published numbers, what failed."""
    plan, store = results["plan"], results["store"]
    lines = [results["scale"]["note"]] if results["scale"]["note"] else []
    images = f"{store['test_images']} test images of {store['test_patients']} patients"
    target = f" ({plan['target']})" if plan["target"] else ""
    lines.append(f"Data: {store['name']}{target}, {images}.")
    lines.append(interval_words(results))
    if plan["published_by"]:
        lines.append(
            f"Published: {plan['published_by']}. Other images and other labels: the order of rows and the sign of "
            "differences can be set beside ours, levels cannot."
        )
    titles: dict[str, list[str]] = {}
    for row in results["rows"]:
        titles.setdefault(row["note"], []).append(row["title"])
    lines += [f"{'; '.join(rows)}: {note}" for note, rows in titles.items() if note]
    exposed = [f"{row['title']} {row['exposed_images']}" for row in results["rows"] if row["exposed_images"]]
    if exposed:
        lines.append(
            "Not unseen images: so many of the test images were met in pretraining or training: "
            f"{', '.join(exposed)}. These numbers are too high by an unknown amount."
        )
    unknown: dict[str, list[str]] = {}
    for row in results["rows"]:
        unknown.setdefault(row["exposure_not_recorded"] or "", []).append(row["title"])
    lines += [f"Exposure of {', '.join(rows)}: {words}." for words, rows in unknown.items() if words]
    lines += [f"Not made: {failure['unit']}: {failure['error']}" for failure in results["failures"]]
    return lines


def interval_words(results: Mapping[str, Any]) -> str:
    """How the intervals were made, in words."""
    plan = results["plan"]
    seeds, resamples = len(plan["seeds"]), plan["bootstraps"]
    if seeds == 1:
        return f"One seed; 95 % intervals from {resamples} resamples of patients: they do not cover other seeds."
    scope = "pretraining, heads" if plan["seeds_of"] == "everything" else "heads; each backbone was pretrained once"
    return (
        f"Means over {seeds} seeds ({scope}); 95 % intervals from {resamples} resamples of patients and of seeds at "
        "once; differences are paired by patient and seed, and not shown where the interval includes zero."
    )


def cell(entry: Mapping[str, Any] | None, sign: bool = False) -> str:
    """`0.223 [0.201, 0.245]`, or `+0.031 [0.012, 0.050]`; a dash for nothing."""
    if not entry or entry.get("value") is None:
        return "-"
    number = f"{entry['value']:+.3f}" if sign else f"{entry['value']:.3f}"
    ends = "" if entry["low"] is None else f" [{entry['low']:.3f}, {entry['high']:.3f}]"
    return number + ends + (" not shown" if sign and not entry["shown"] else "")


def _row_cells(results: Mapping[str, Any], task: str) -> list[list[str]]:
    published = any(row["tasks"][task]["published"] is not None for row in results["rows"])
    header = ["row", "mAP", "mAUC", "mF1@tuned", *(["published mAP"] if published else [])]
    lines = [header]
    for row in results["rows"]:
        whole = row["tasks"][task].get("all", {})
        known = row["tasks"][task]["published"]
        beside = [f"{known:.4f}" if known is not None else "-"] if published else []
        lines.append([row["title"], *(cell(whole.get(name)) for name in header[1:4]), *beside])
    return lines


def _difference_cells(results: Mapping[str, Any], task: str) -> list[list[str]]:
    published = any(one["tasks"][task]["published"] is not None for one in results["differences"])
    lines = [["difference", "mAP", *(["published"] if published else [])]]
    for one in results["differences"]:
        known = one["tasks"][task]["published"]
        beside = [f"{known:+.4f}" if known is not None else "-"] if published else []
        lines.append([one["title"], cell(one["tasks"][task].get("all", {}).get("mAP"), sign=True), *beside])
    return lines


def _group_cells(results: Mapping[str, Any], task: str) -> list[list[str]]:
    present = [name for name in SETS[1:] if results["tasks"][task]["groups"].get(name)]
    sizes = [len(results["tasks"][task]["groups"][name]) for name in present]
    lines = [["difference", *(f"{name} ({size})" for name, size in zip(present, sizes, strict=True))]]
    lines += [
        [one["title"], *(cell(one["tasks"][task].get(name, {}).get("mAP"), sign=True) for name in present)]
        for one in results["differences"]
    ]
    return lines


def _seed_cells(results: Mapping[str, Any], task: str) -> list[list[str]]:
    seeds = [str(seed) for seed in results["plan"]["seeds"]]
    lines = [["row", *(f"seed {seed}" for seed in seeds)]]
    for row in results["rows"]:
        values = row["tasks"][task].get("all", {}).get("mAP", {}).get("seeds", {})
        lines.append([row["title"], *(f"{values[s]:.3f}" if values.get(s) is not None else "-" for s in seeds)])
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    escaped = [[text.replace("|", "\\|") for text in row] for row in rows]
    rule = ["---"] * len(rows[0])
    return "\n".join(f"| {' | '.join(row)} |" for row in [escaped[0], rule, *escaped[1:]])
