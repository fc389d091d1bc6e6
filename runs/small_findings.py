"""Does resolution help small findings? Rows of a finished ablation, averaged over the findings whose lesions are small.

    python runs/small_findings.py ABLATION PHANTOMS ROW ROW ...

A finding is small when the lesion masks of the synthetic patients cover less than 1 % of the image in the median over
the images that show it: fixed here before any result was seen. The first ROW is what the others are compared with;
intervals cover patients and seeds, as in the ablation. Writes ABLATION/small_findings.json.
"""

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from hilum.core.files import write_json
from hilum.evaluation.ablation import SeedResult, compare, read_result, summarise

SMALL_SHARE = 0.01


def small_findings(phantoms: Path) -> dict[str, float]:
    """Median share of the image that a finding's lesions cover, of the findings where it is small."""
    areas = defaultdict(list)
    with (phantoms / "masks.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            areas[row["finding"]].append(float(row["area_fraction"]))
    shares = {name: float(np.median(values)) for name, values in sorted(areas.items())}
    return {name: share for name, share in shares.items() if share < SMALL_SHARE}


def results_of(row: Path) -> dict[int, SeedResult]:
    """By seed; an ablation whose settings were changed keeps units of both, and nothing here tells them apart."""
    found: dict[int, SeedResult] = {}
    for path in sorted(row.glob("seed*-*")):
        seed = int(path.name.partition("-")[0].removeprefix("seed"))
        if (path / "unit.json").exists():
            if seed in found:
                raise SystemExit(f"{row}: two results of seed {seed}. Remove those of the plan that is not meant.")
            found[seed] = read_result(path / "result.npz")
    return found


def main(ablation: Path, phantoms: Path, rows: list[str]) -> None:
    """Average, compare, print, write."""
    small = small_findings(phantoms)
    counted = json.loads((ablation / "results.json").read_text())
    judged = next(iter(counted["tasks"].values()))["findings"]
    columns = {"small": [name for name in judged if name in small], "other": [n for n in judged if n not in small]}
    results = {row: results_of(ablation / "rows" / row) for row in rows}
    found = {
        "small": {name: small[name] for name in columns["small"]},
        "rows": {row: summarise(seeds, columns, 0) for row, seeds in results.items()},
        "differences": {row: compare(results[row], results[rows[0]], columns, 0) for row in rows[1:]},
    }
    write_json(ablation / "small_findings.json", found)
    print(f"{len(columns['small'])} small findings: {', '.join(columns['small'])}")
    for kind, table in (("rows", found["rows"]), ("differences", found["differences"])):
        for row, sets in table.items():
            for name, values in sets.items():
                print(kind, row, name, json.dumps({k: values["mAP"].get(k) for k in ("value", "low", "high")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
