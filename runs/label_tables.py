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
        f"added: {added}. mAP per image, raw; means over {_seeds(chosen)}; 95 % intervals from "
        f"{chosen['bootstraps']} resamples of patients{' and seeds' if len(chosen['seeds']) > 1 else ''}, each for "
        'itself; "not shown" where one includes zero. trained: findings with a positive training image. shared: '
        "those that an added dataset annotates.", "",
    ]  # fmt: skip
    for part in summary["shares"]:
        sizes = {name: f"{name} ({len(found)})" for name, found in part["columns"].items()}
        lines += [f"## {part['share']:.0%} of the target's training and validation patients", ""]
        lines += _table(["row", "images", "trained", *sizes.values()], [
            [name, *_counts(part["facts"][name]), *(cell(sets[one]) for one in sizes)]
            for name, sets in part["rows"].items()
        ])  # fmt: skip
        lines += _table(["difference", *sizes.values()], [_difference(one, sizes) for one in part["differences"]])
    largest = max(part["share"] for part in summary["shares"])
    for share in dict.fromkeys(one["share"] for one in summary["by_size"]):
        same = [one for one in summary["by_size"] if one["share"] == share]
        names = list(dict.fromkeys(name for one in same for name in one["sets"]))
        lines += [f"## The same difference at {share:.0%} minus at {largest:.0%}", ""]
        lines += _table(["difference", *names], [_difference(one, names) for one in same])
    return "\n".join([*lines, summary["notice"], ""])


def _seeds(chosen: Mapping[str, Any]) -> str:
    seeds = chosen["seeds"]
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _difference(entry: Mapping[str, Any], names: Sequence[str] | Mapping[str, str]) -> list[str]:
    title = f"{entry['first']} - {entry['second']}"
    return [title, *(cell(entry["sets"].get(name), sign=True) for name in names)]


def _counts(facts: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Training images of the target + of others, and findings that were trained: of each seed, once where equal."""
    images = [[split["train"] for split in one["sources"].values()] for one in facts]
    texts = [str(counts[0]) + (f" + {sum(counts[1:])}" if len(counts) > 1 else "") for counts in images]
    return ", ".join(dict.fromkeys(texts)), ", ".join(dict.fromkeys(str(one["trained"]) for one in facts))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)] + [""]
