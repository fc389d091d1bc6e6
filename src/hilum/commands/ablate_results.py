"""From the finished units of an ablation to `results.json`, `table.md` and `report.html`. Reads, and trains nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hilum
from hilum.commands.ablate_plan import ALL, AblationPlan, PlannedRow
from hilum.commands.ablate_units import Unit, Workplace
from hilum.core.config import to_dict
from hilum.core.files import write_json, write_text
from hilum.core.types import RESEARCH_NOTICE
from hilum.data.labels import TASKS, task_findings
from hilum.evaluation.ablation import SeedResult, compare, summarise
from hilum.evaluation.ablation_report import render_ablation
from hilum.evaluation.ablation_table import markdown_table
from hilum.evaluation.metrics import GROUPS

FORMAT = "hilum-ablation-1"
RESULTS_NAME, TABLE_NAME, REPORT_NAME = "results.json", "table.md", "report.html"

Measured = dict[str, dict[int, SeedResult]]
"""Row -> seed -> numbers."""


def collect(place: Workplace, failures: Mapping[Unit, str], seconds: float) -> dict[str, Any]:
    """Everything that `results.json` holds (docs/reference/ablation.md).

    Args:
        place: with the rows that could be made.
        failures: units that could not, with the reason.
        seconds: that this run took.
    """
    plan = place.resolved.plan
    measured: Measured = {
        row.name: {seed: place.result(row.name, seed) for seed in plan.seeds if _is_there(place, row.name, seed)}
        for row in plan.rows
    }
    tasks = {task: _columns(task, place, measured) for task in plan.tasks}
    test = place.test
    store = place.store
    made = [unit for unit in place.units() if place.is_finished(unit)]
    return {
        "format": FORMAT,
        "hilum": hilum.__version__,
        "notice": RESEARCH_NOTICE,
        "plan": to_dict(plan),
        "pretraining": {name: to_dict(config) for name, config in place.resolved.pretraining.items()},
        "fitting": {name: to_dict(config) for name, config in place.resolved.fitting.items()},
        "scale": {"name": plan.scale, "note": plan.scale_note},
        "store": {
            "name": place.data.name,
            "target": plan.target,
            "test_images": len(test),
            "test_patients": len({*zip(store.datasets[test].tolist(), store.patients[test].tolist(), strict=True)}),
            "training_images": len(place.train),
            "validation_images": len(place.validation),
            "test_fingerprint": place.test_fingerprint,
        },
        "tasks": tasks,
        "rows": [_row(row, plan, measured[row.name], tasks, place) for row in plan.rows],
        "differences": [
            _difference(row, other, plan, measured, tasks) for row in plan.rows for other in row.against
            if set(measured[row.name]) & set(measured[other])
        ],
        "findings": _findings(place, measured),
        "failures": [{"unit": str(unit), "error": error} for unit, error in failures.items()],
        "seconds": seconds,
        "unit_seconds": round(sum(place.record(unit)["seconds"] for unit in made), 1),
    }  # fmt: skip


def write_results(results: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the three files; returns their paths."""
    write_text(out / TABLE_NAME, markdown_table(results))
    write_text(out / REPORT_NAME, render_ablation(results))
    write_json(out / RESULTS_NAME, results)
    return [out / name for name in (TABLE_NAME, REPORT_NAME, RESULTS_NAME)]


def _is_there(place: Workplace, row: str, seed: int) -> bool:
    return place.is_finished(Unit("rows", row, seed))


def _columns(task: str, place: Workplace, measured: Measured) -> dict[str, Any]:
    """The findings of a task that every row is averaged over, by group, and those left out, with the reason.

    The same findings for every row and every seed: those of the store that each was trained for.
    """
    asked: Sequence[str] = place.store.findings
    if task != ALL:  # classes by the names that findings have here, as in evaluate and submit
        answers = task_findings(task, place.store.findings)
        asked = [answers.get(name, name) for name in TASKS[task]]
    results = [result for seeds in measured.values() for result in seeds.values()]
    left_out: dict[str, list[str]] = {"not_in_store": [], "untrained": [], "few_positives": [], "no_negatives": []}
    used: list[str] = []
    for name in asked:
        if name not in place.store.findings or any(name not in result.findings for result in results):
            left_out["not_in_store"].append(name)
        elif not all(result.trained[result.findings.index(name)] for result in results):
            left_out["untrained"].append(name)
        elif any(result.positives[result.findings.index(name)] < _minimum(place) for result in results):
            left_out["few_positives"].append(name)
        elif any(result.negatives[result.findings.index(name)] == 0 for result in results):
            left_out["no_negatives"].append(name)
        else:
            used.append(name)
    groups = {group: [name for name in used if place.groups.get(name) == group] for group in GROUPS}
    return {"asked": len(asked), "findings": used, "groups": groups, "left_out": left_out}


def _minimum(place: Workplace) -> int:
    return max(place.resolved.plan.minimum_positives, 1)


def _sets(task: Mapping[str, Any]) -> dict[str, list[str]]:
    """The sets of findings that are averaged: all, and each group that has any."""
    return {"all": task["findings"], **{name: part for name, part in task["groups"].items() if part}}


def _row(
    row: PlannedRow, plan: AblationPlan, results: Mapping[int, SeedResult], tasks: Mapping[str, Any], place: Workplace
) -> dict[str, Any]:
    published = {number.task: number.value for number in row.published}
    chosen = {
        head: {str(seed): place.record(Unit("heads", head, seed)).get("chosen") for seed in results}
        for head in row.heads
    }
    records = [place.record(Unit("rows", row.name, seed)) for seed in results]
    return {
        "name": row.name,
        "title": row.label,
        "heads": list(row.heads),
        "study": row.study,
        "ensemble": row.ensemble if len(row.heads) > 1 else None,
        "calibrated": row.calibrated,
        "stands_for": row.stands_for,
        "note": row.note,
        "seeds": list(results),
        "chosen": chosen,
        "exposed_images": max((record["exposed_images"] or 0 for record in records), default=0),
        "exposure_not_recorded": next(filter(None, (record.get("exposure_not_recorded") for record in records)), None),
        "tasks": {
            task: {
                "published": published.get(task),
                **(summarise(results, _sets(columns), plan.bootstrap_seed) if results and columns["findings"] else {}),
            }
            for task, columns in tasks.items()
        },
    }


def _difference(
    row: PlannedRow, other: str, plan: AblationPlan, measured: Measured, tasks: Mapping[str, Any]
) -> dict[str, Any]:
    against = next(one for one in plan.rows if one.name == other)
    numbers = [{number.task: number.value for number in one.published} for one in (row, against)]
    return {
        "row": row.name,
        "against": other,
        "title": f"{row.label} - {against.label}",
        "seeds": [seed for seed in measured[row.name] if seed in measured[other]],
        "tasks": {
            task: {
                "published": round(numbers[0][task] - numbers[1][task], 6) if all(task in n for n in numbers) else None,
                **(
                    compare(measured[row.name], measured[other], _sets(columns), plan.bootstrap_seed)
                    if columns["findings"]
                    else {}
                ),
            }
            for task, columns in tasks.items()
        },
    }


def _findings(place: Workplace, measured: Measured) -> dict[str, Any]:
    """AP of every finding: per row, the mean over seeds."""
    listed: dict[str, Any] = {}
    for row, seeds in measured.items():
        for result in seeds.values():
            for column, name in enumerate(result.findings):
                entry = listed.setdefault(
                    name,
                    {
                        "group": place.groups.get(name),
                        "positives": int(result.positives[column]),
                        "negatives": int(result.negatives[column]),
                        "AP": {},
                    },
                )
                value = float(result.points["AP"][column])
                if value == value:  # NaN is left out
                    entry["AP"].setdefault(row, []).append(value)
    for entry in listed.values():
        entry["AP"] = {row: sum(values) / len(values) for row, values in entry["AP"].items()}
    return listed
