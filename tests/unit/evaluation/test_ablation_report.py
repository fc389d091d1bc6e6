"""Table and page of an ablation from results as the program writes them."""

import re
from typing import Any

import numpy as np
import pytest

from hilum.evaluation.ablation import MEASURED, SeedResult, compare, summarise
from hilum.evaluation.ablation_report import render_ablation
from hilum.evaluation.ablation_table import markdown_table, text_table
from hilum.evaluation.report_tables import difference_axis

GROUPS = {"head": ["Edema", "Pneumonia"], "medium": ["Mass"], "tail": ["Hernia"]}
FINDINGS = tuple(name for part in GROUPS.values() for name in part)
ROWS = (("linear", 0.30, 0.1922), ("<decoder>", 0.36, 0.2311), ("decoder, study mean", 0.362, None))
TASK = "cxrlt2024-task1"


def measured(level: float, seeds: int) -> dict[int, SeedResult]:
    found = {}
    for seed in range(seeds):
        rng = np.random.default_rng([seed, int(1000 * level)])
        base = np.random.default_rng(0).normal(0, 0.02, (200, 4))  # what patients have in common
        points = {name: level + rng.normal(0, 0.004, 4) for name in MEASURED}
        samples = {name: points[name] + base + rng.normal(0, 0.004, (200, 4)) for name in MEASURED}
        counts = np.array([40, 30, 12, 11])
        found[seed] = SeedResult(FINDINGS, counts, 100 - counts, np.ones(4, bool), points, samples)
    return found


def make_results(rows: tuple = ROWS, seeds: int = 3, task: str = TASK, **changes: Any) -> dict[str, Any]:
    """As `ablate_results.collect` makes them, without a store."""
    numbers = {name: measured(level, seeds) for name, level, _ in rows}
    sets = {"all": list(FINDINGS), **GROUPS}
    plan = {
        "name": "small", "title": "A small plan", "note": "Does the decoder help?", "seeds": list(range(seeds)),
        "seeds_of": "heads", "bootstraps": 200, "target": None, "published_by": "the slides", "scale": "laptop",
    }  # fmt: skip
    known = {name: value for name, _, value in rows}
    pairs = [(one[0], other[0]) for one, other in zip(rows[1:], rows, strict=False)]
    difference = {
        pair: round(known[pair[0]] - known[pair[1]], 4) if None not in (known[pair[0]], known[pair[1]]) else None
        for pair in pairs
    }
    results = {
        "notice": "Research use only.", "hilum": "0", "plan": plan, "unit_seconds": 12.0,
        "scale": {"name": "laptop", "note": "Small networks stand for large ones."},
        "store": {"name": "store", "test_images": 100, "test_patients": 50, "training_images": 200,
                  "validation_images": 40, "test_fingerprint": "f", "target": None},
        "tasks": {task: {"asked": 6, "findings": list(FINDINGS), "groups": GROUPS,
                         "left_out": {"not_in_store": ["Fissure"], "few_positives": ["Kyphosis"]}}},
        "rows": [
            {
                "name": name, "title": name, "heads": [name], "stands_for": f"original {name}", "note": "",
                "seeds": list(range(seeds)), "exposed_images": 0, "exposure_not_recorded": None,
                "chosen": {name: {str(seed): {"learning_rate": 1e-3, "score": 0.3} for seed in range(seeds)}},
                "tasks": {task: {"published": known[name], **summarise(numbers[name], sets, 0)}},
            }
            for name in numbers
        ],
        "differences": [
            {
                "row": one, "against": other, "title": f"{one} - {other}",
                "tasks": {task: {"published": difference[one, other],
                                 **compare(numbers[one], numbers[other], sets, 0)}},
            }
            for one, other in pairs
        ],
        "findings": {
            name: {"group": next(g for g, part in GROUPS.items() if name in part), "positives": 11, "negatives": 89,
                   "AP": dict.fromkeys(numbers, 0.3)}
            for name in FINDINGS
        },
        "failures": [],
    }  # fmt: skip
    return results | changes


def test_the_table_has_every_row_with_its_interval_beside_the_published_number() -> None:
    results = make_results()
    lines = text_table(results).splitlines()
    row = next(line for line in lines if line.startswith("<decoder>  "))
    entry = results["rows"][1]["tasks"][TASK]["all"]["mAP"]
    assert f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]" in row
    assert row.endswith("0.2311")
    difference = next(line for line in lines if line.startswith("<decoder> - linear"))
    assert "not shown" not in difference
    assert difference.endswith("+0.0389")
    assert "not shown" in next(line for line in lines if line.startswith("decoder, study mean - <decoder>"))
    assert "Small networks stand for large ones." in lines
    found = "4 of 6 findings, the same for every row; left out, not in the store, or not in some row: 1;"
    assert found in text_table(results)


def test_markdown_has_groups_seeds_and_the_names_left_out() -> None:
    text = markdown_table(make_results())
    assert "| difference | head (2) | medium (1) | tail (1) |" in text
    assert "| row | seed 0 | seed 1 | seed 2 |" in text
    assert "not in the store, or not in some row: Fissure; too few test positives: Kyphosis" in text
    assert text.count("levels cannot") == 1


def test_the_page_is_one_file_that_escapes_names_and_says_what_is_not_comparable() -> None:
    page = render_ablation(make_results())
    assert "<decoder>" not in page
    assert "&lt;decoder&gt;" in page
    assert not re.search(r'(?:src|href)="http', page)
    assert page.count('class="beside"') == 3  # two rows and one difference have published numbers
    assert "its level cannot be compared" in page
    assert "not shown" in page
    assert page == render_ablation(make_results())


def test_a_backbone_that_has_met_test_images_is_said_to() -> None:
    results = make_results()
    assert "Not unseen" not in text_table(results)
    results["rows"][0]["exposed_images"] = 7
    assert "met in pretraining or training: linear 7." in text_table(results)


def numbers_over(markup: str) -> list[tuple[float, float]]:
    """Place in per cent and value of each number of an axis."""
    found = re.findall(r'<i style="left:([-\d.]+)%">([^<]+)</i>', markup)
    return [(float(place), float(number.replace("\N{MINUS SIGN}", "-"))) for place, number in found]


def test_numbers_over_a_narrow_column_stand_clear_of_one_another_and_where_their_value_is() -> None:
    for scale in np.geomspace(1e-3, 0.9, 500):
        found = numbers_over(difference_axis(scale, narrow=True))
        places = [place for place, _ in found]
        assert len(found) == 3
        assert np.diff(places).min() >= 25  # of 190 pixels, and a number is about 36 wide
        assert places == pytest.approx([50 + 50 * value / scale for _, value in found], abs=0.1)
        assert found[1][1] == 0


@pytest.mark.parametrize("level", [0.32, 0.35, 0.38, 0.42, 0.5])
def test_columns_of_head_medium_and_tail_are_narrow(level: float) -> None:
    page = render_ablation(make_results((("linear", 0.3, None), ("decoder", level, None))))
    table = page[page.index('class="plain steps ablation groups"') :]
    axes = re.findall(r'<span class="axis".*?</span>', table[: table.index("</thead>")])
    assert len(axes) == 3
    assert all(len(numbers_over(one)) == 3 for one in axes)


def test_one_seed_is_said_to_cover_patients_only() -> None:
    assert "do not cover other seeds" in text_table(make_results(seeds=1))


@pytest.mark.parametrize("seeds", [1, 2])
def test_rows_that_were_not_made_are_listed_and_have_dashes(seeds: int) -> None:
    results = make_results(seeds=seeds, failures=[{"unit": "heads/b seed 0", "error": "too large"}])
    results["rows"][1] |= {"seeds": [], "chosen": {}, "tasks": {TASK: {"published": 0.2311}}}
    results["differences"] = []
    assert "Not made: heads/b seed 0: too large" in text_table(results)
    assert "&lt;decoder&gt;" in render_ablation(results)
    assert "| <decoder> | - | - | - | 0.2311 |" in markdown_table(results)
