"""The tables of runs/label_sources.py as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from hilum.evaluation.ablation_table import cell


def markdown(summary: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    store, chosen = summary["store"], summary["experiment"]
    added = ", ".join(f"{count} images of {name}" for name, count in store["added"].items())
    lines = [
        "# Labels of other datasets", "",
        f"Judged: {store['test_images']} test images of {store['test_patients']} patients of {chosen['target']}; "
        f"added: {added}. mAP per image, raw; means over {len(chosen['seeds'])} seeds; 95 % intervals from "
        f"{chosen['bootstraps']} resamples of patients{' and seeds' if len(chosen['seeds']) > 1 else ''}, each for "
        'itself; "not shown" where one includes zero. shared: findings that an added dataset annotates.', "",
    ]  # fmt: skip
    for part in summary["shares"]:
        sizes = {name: f"{name} ({len(found)})" for name, found in part["columns"].items()}
        lines += [f"## {part['share']:.0%} of the target's training and validation patients", ""]
        lines += _table(["row", "images", *sizes.values()], [
            [name, _images(part["facts"][name]), *(cell(sets[one]) for one in sizes)]
            for name, sets in part["rows"].items()
        ])  # fmt: skip
        lines += _table(["difference", *sizes.values()], [_difference(one, sizes) for one in part["differences"]])
    largest = max(part["share"] for part in summary["shares"])
    for share in dict.fromkeys(one["share"] for one in summary["by_size"]):
        same = [one for one in summary["by_size"] if one["share"] == share]
        names = list(dict.fromkeys(name for one in same for name in one["sets"]))
        lines += [
            f"## The same difference at {share:.0%} minus at {largest:.0%}",
            "",
        ]
        lines += _table(["difference", *names], [_difference(one, names) for one in same])
    return "\n".join([*lines, summary["notice"], ""])


def _difference(entry: Mapping[str, Any], names: Sequence[str] | Mapping[str, str]) -> list[str]:
    title = f"{entry['first']} - {entry['second']}"
    return [title, *(cell(entry["sets"].get(name), sign=True) for name in names)]


def _images(facts: Sequence[Mapping[str, Any]]) -> str:
    """Training images of the target and, where there are, of others; of the first seed."""
    counts = [split["train"] for split in facts[0]["sources"].values()]
    return str(counts[0]) + (f" + {sum(counts[1:])}" if len(counts) > 1 else "")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)] + [""]
