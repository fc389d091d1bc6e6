"""A planted site: what `hilum recalibrate` says where the truth is known. Synthetic patients, minutes on 2 cores.

    hilum demo --out outputs/demo
    python runs/planted_site.py outputs/demo/model outputs/planted_site

Four things are planted in a site of new synthetic patients: another scanner (a curve over every picture), another
prevalence (half of the studies with Cardiomegaly are gone), a model that is too bold and too high (log-odds times 2,
plus 1), and a finding whose labels are drawn without looking (Atelectasis). Expected: the probabilities are repaired,
Atelectasis is a no, and with 60 studies nothing is shown. Prints a table; writes `site.json` and the reports.
"""

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from hilum.commands import phantom, recalibrate
from hilum.deploy import model_files as files

RANDOM, FEWER = "Atelectasis", "Cardiomegaly"
BOLD = {"kind": "platt", "parameters": {"slope": 2.0, "intercept": 1.0}}
SEED, PATIENTS, FEW = 77, 260, 60


def main(model: Path, out: Path, patients: int = PATIENTS, bootstraps: int = 1000) -> dict[str, Any]:
    """Plant the site, recalibrate on all of it and on a few studies; returns what `site.json` holds."""
    out.mkdir(parents=True, exist_ok=True)
    phantom.run(out / "phantoms", "cxrlt", patients, SEED, 512, 8, None, "")
    studies = plant(out / "phantoms", out / "site")
    bold = make_bold(model, out / "bold")
    results = {
        name: recalibrate.run(
            bold, [str(out / "site" / f"{name}.csv")], out / "site" / "labels.csv", out / name,
            sensitivity=(0.9,), bootstraps=bootstraps, device="cpu",
        )
        for name in ("all", "few")
    }  # fmt: skip
    found = {"studies": studies, "all": summary(results["all"]), "few": summary(results["few"])}
    (out / "site.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    show(results["all"])
    print(f"with {FEW} studies: fit for this site: {found['few']['verdict']}")
    return found


def plant(phantoms: Path, out: Path) -> int:
    """Write pictures of another scanner, a table of them, and labels; returns the number of studies."""
    rng = np.random.default_rng(0)
    out.mkdir(parents=True, exist_ok=True)
    studies: dict[str, list[dict[str, str]]] = {}
    for table in ("train_labeled", "development_labeled_task1", "test_labeled_task1"):
        with (phantoms / "cxr-lt-2024" / f"{table}.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                studies.setdefault(row["study_id"], []).append(row)
    kept = [study for study, rows in studies.items() if rows[0][FEWER] == "0" or rng.random() < 0.5]
    findings = list(next(iter(studies.values()))[0])[6:]
    curve = np.clip(255 * (np.arange(256) / 255) ** 0.7 * 0.8 + 20, 0, 255).astype(np.uint8)
    listed, labels = [], []
    for study in kept:
        rows = studies[study]
        labels.append({"study_id": study, "patient_id": rows[0]["subject_id"]} | {n: rows[0][n] for n in findings})
        labels[-1][RANDOM] = str(int(rng.random() < 0.3))
        for row in rows:
            name = f"{row['dicom_id']}.png"
            cv2.imwrite(str(out / name), curve[cv2.imread(str(phantoms / row["fpath"]), cv2.IMREAD_GRAYSCALE)])
            listed.append({"path": name, "study_id": study, "view": row["ViewPosition"]})
    few = set(kept[:FEW])
    for name, rows in (
        ("labels", labels), ("all", listed), ("few", [row for row in listed if row["study_id"] in few]),
    ):  # fmt: skip
        with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return len(kept)


def make_bold(model: Path, out: Path) -> Path:
    """The same model with calibrators that are too bold and too high."""
    shutil.copytree(model, out, dirs_exist_ok=True)
    content = files.read_config(out)
    for member in content.get("members", ()):
        member["path"] = str((model / member["path"]).resolve())
    for unit in content["calibration"].values():
        unit["maps"] = {name: one and {**one, **BOLD, "after": one} for name, one in unit["maps"].items()}
    files.write_config(out, content)
    return out


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Of one run: the verdicts, and how many Brier scores are shown to be better or worse."""
    judged = {name: row for name, row in result["findings"].items() if row["enough"] and row["trained"]}
    changes = [row["calibration"]["Brier"] for row in judged.values()]
    return {
        "verdict": result["overall"]["verdict"], "studies": result["studies"], "judged": len(judged),
        "verdicts": {name: row["verdict"] for name, row in judged.items()},
        "better": sum(one["shown"] and one["difference"] < 0 for one in changes),
        "worse": sum(one["shown"] and one["difference"] > 0 for one in changes),
        "Brier": [float(np.mean([one[side] for one in changes])) if changes else None for side in ("before", "after")],
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """A row for each judged finding."""
    print(f"{'finding':28} fit?       AUC                  have it   said  says  Brier before -> after")
    for name, row in result["findings"].items():
        if not (row["enough"] and row["trained"]):
            continue
        auc, fit = row["AUC"], row["calibration"]
        brier = fit["Brier"]
        shown = "" if brier["shown"] else " not shown"
        print(
            f"{name:28} {row['verdict']:9} {auc['value']:.2f} [{auc['low']:.2f}, {auc['high']:.2f}]   "
            f"{row['prevalence']:6.1%} {fit['mean_before']:6.1%} {fit['mean_after']:6.1%}  "
            f"{brier['before']:.3f} -> {brier['after']:.3f} [{brier['low']:+.3f}, {brier['high']:+.3f}]{shown}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
