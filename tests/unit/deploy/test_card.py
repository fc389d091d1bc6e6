"""Cards and checklists: numbers against an independent library, metadata against a reader of hubs, and no claim that
was not recorded."""

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.metrics import average_precision_score, roc_auc_score

from hilum.deploy import card_evidence
from hilum.deploy import model_files as files
from hilum.deploy.card import model_card, with_preface, write_cards
from hilum.deploy.card_evidence import Evidence, measure_validation
from hilum.deploy.checklist import CLAIM, OPEN, TRIPOD, answers, checklist
from hilum.deploy.ensemble_model import read_composition
from hilum.evaluation.composition import Composition

PARTS = {3: "abc", 5: "ab", 6: "abc", 8: "abc", 9: "abc", 12: "abcdefg", 18: "abcdef", 20: "abc", 23: "ab", 27: "abc"}
"""Items of TRIPOD+AI that have parts (Collins et al. 2024, table 2)."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight validation studies are enough here."""
    monkeypatch.setattr(card_evidence, "MIN_POSITIVES", 2)
    monkeypatch.setattr("hilum.deploy.card.MIN_POSITIVES", 2)


def measured(path: Path) -> tuple[dict[str, Any], list[Evidence]]:
    content = files.read_config(path)
    return content, measure_validation(path, content, read_composition(path, content), 20)


@pytest.mark.parametrize("name", ["linear", "ensemble"])
def test_the_numbers_are_those_of_an_independent_library_on_validation_studies(fitted: Path, name: str) -> None:
    _, [evidence] = measured(fitted / name)
    folders = [fitted / "linear", fitted / "decoder"] if name == "ensemble" else [fitted / name]
    tables = [files.read_validation(folder) for folder in folders]
    studies = tables[0][0].study_id
    scores = np.mean(
        [[table.probabilities[studies == s].mean(axis=0) for s in np.unique(studies)] for table, _ in tables], axis=0
    )
    labels = np.array([tables[0][1][studies == s].max(axis=0) for s in np.unique(studies)])
    assert evidence.metrics["n_studies"] == 8
    assert evidence.images == 16
    for column, finding in enumerate(tables[0][0].findings):
        found = evidence.metrics["findings"][finding]
        assert found["AP"] == pytest.approx(average_precision_score(labels[:, column], scores[:, column]))
        assert found["AUC"] == pytest.approx(roc_auc_score(labels[:, column], scores[:, column]))
        low, high = found["ci95"]["AUC"]
        assert low <= found["AUC"] <= high


def test_the_card_shows_them(fitted: Path) -> None:
    content, evidence = measured(fitted / "ensemble")
    card = model_card(content, evidence, [files.read_config(fitted / name) for name in ("linear", "decoder")])
    found = evidence[0].metrics["findings"]["Edema"]
    assert f"| {found['positives']} | {found['AP']:.3f} [" in card
    assert f"| all | 3 | {evidence[0].metrics['macro']['mAP']:.3f} [" in card
    assert "linear head, 24 pixels" in card
    assert "ML-Decoder head, 16 pixels" in card
    assert "Member 2: Labels of the head come from arrays (40 train, 16 val)." in card
    assert "8 studies of 4 patients (16 images)" in card
    assert "they are no test" in card


@pytest.mark.parametrize("name", ["linear", "ensemble"])
def test_hubs_read_the_metadata_and_find_no_licence_that_nobody_chose(fitted: Path, name: str) -> None:
    from huggingface_hub import ModelCard

    content, evidence = measured(fitted / name)
    text = model_card(content, evidence)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "hilum"
    assert "license" not in front
    data = ModelCard(text).data
    assert data.library_name == "hilum"
    assert data.license is None
    assert "research-use-only" in data.tags


def test_tables_are_whole(fitted: Path) -> None:
    content, evidence = measured(fitted / "linear")
    content = copy.deepcopy(content)
    content["findings"][-1]["name"] = "Mass | nodule"
    assert "Mass \\| nodule" in model_card(content, evidence)
    for text in (model_card(content, evidence), checklist(content, evidence)):
        block: list[str] = []
        for line in [*text.splitlines(), ""]:
            if line.startswith("|"):
                block.append(line)
                continue
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block}) <= 1
            block = []


def test_nothing_is_said_of_what_was_not_recorded(fitted: Path, tmp_path: Path) -> None:
    content, _ = measured(fitted / "linear")
    card = model_card(content, [])
    assert "nothing was measured" in card
    assert "AUC |" in card
    assert not re.search(r"\d\.\d{3}", card.split("## Validation")[1].split("## Calibration")[0])
    assert "Terms of the data were not recorded" in card
    tagged = copy.deepcopy(content)
    tagged["training"]["licences"] = {"nih": ["nih-open"], "mine": ["my-terms"]}
    card = model_card(tagged, [])
    assert "- `my-terms`\n- `nih-open`: NIH Clinical Center" in card
    assert "were not recorded here; the store" not in card


def test_an_imported_model_without_training_or_calibration_has_a_card(fitted: Path) -> None:
    content = copy.deepcopy(files.read_config(fitted / "linear"))
    for key in ("training", "fitted_on"):
        del content[key]
    content |= {"uncalibrated": "imported weights"}
    content["exposure"] = {"not_recorded": "imported: it may have seen", "datasets": ["mimic", "chexpert"]}
    card = model_card(content, [])
    assert "Not calibrated: imported weights." in card
    assert "Imported: it may have seen: mimic, chexpert." in card
    content["exposure"] = {
        "not_recorded": "nothing lists what Bb saw",
        "images": {"pretraining": 0, "train": 9, "val": 0},
    }
    card = model_card(content, [])
    assert "Pretraining: images not recorded. Head: 9 training images" in card
    assert "Nothing lists what Bb saw." in card
    content["exposure"]["images"]["pretraining"] = 5
    assert "Pretraining: 5 images are recorded, and more were seen." in model_card(content, [])
    claim, tripod = answers(content)
    assert "25" not in claim
    assert tripod["15"] == "Scores that order images; no thresholds"


def test_predictions_that_are_not_out_of_sample_are_no_evidence(fitted: Path, tmp_path: Path) -> None:
    shutil.copytree(fitted / "linear", tmp_path / "model")
    content = files.read_config(tmp_path / "model")
    exposure = files.read_exposure(tmp_path / "model", content)
    seen = files.Exposure(exposure.pretraining, np.union1d(exposure.train, exposure.val), exposure.val)
    content["exposure"] = files.write_exposure(tmp_path / "model", seen)
    assert measure_validation(tmp_path / "model", content, Composition(), 5) == []


def test_few_patients_have_no_cross_fitted_calibration_and_many_do(fitted: Path, monkeypatch) -> None:
    _, [evidence] = measured(fitted / "linear")
    assert evidence.calibration is None  # 4 patients, 5 folds
    monkeypatch.setattr(card_evidence, "FOLDS", 2)
    content, [evidence] = measured(fitted / "linear")
    before, after = evidence.calibration["macro"]["ECE"]
    assert f"| ECE, 15 equal bins | {before:.4f} | {after:.4f} |" in model_card(content, [evidence])


def test_every_item_of_both_checklists_is_there_once() -> None:
    assert [one.number for one in CLAIM] == [str(number) for number in range(1, 45)]
    wanted = [f"{number}{part}" for number in range(1, 28) for part in PARTS.get(number, [""])]
    assert [one.number for one in TRIPOD] == wanted
    assert len(wanted) == 52
    assert [len({one.asks for one in items}) for items in (CLAIM, TRIPOD)] == [44, 52]


def test_answers_are_under_numbers_that_exist_and_the_rest_is_open(fitted: Path) -> None:
    content, evidence = measured(fitted / "ensemble")
    members = [files.read_config(fitted / name) for name in ("linear", "decoder")]
    claim, tripod = answers(content, evidence, members)
    assert set(claim) < {one.number for one in CLAIM}
    assert set(tripod) < {one.number for one in TRIPOD}
    text = checklist(content, evidence, members)
    assert text.count(OPEN) == 96 - len(claim) - len(tripod)
    assert f"{len(claim) + len(tripod)} of 96 items" in text
    assert claim["27"] == "2 models by mean, images of a study by mean"
    assert f"{evidence[0].metrics['macro']['mAUC']:.3f}" in claim["38"]
    for number in ("8", "11", "17", "33", "36", "44"):  # only people know
        assert number not in claim
    for number in ("5b", "8b", "17", "18a", "18b", "19"):
        assert number not in tripod
    alone, _ = answers(*measured(fitted / "linear"))
    assert "27" not in alone


def test_combine_writes_both_and_a_second_writing_is_the_same(fitted: Path, tmp_path: Path) -> None:
    assert {"README.md", "checklist.md"} <= {path.name for path in (fitted / "ensemble").iterdir()}
    shutil.copytree(fitted, tmp_path / "all")
    path = tmp_path / "all" / "ensemble"
    (path / "config.json").rename(tmp_path / "config.json")  # cards are written before it
    content = files.read_config(fitted / "ensemble")
    for _ in range(2):
        write_cards(path, content, read_composition(fitted / "ensemble", content), "\n## More\n")
        text = (path / "README.md").read_text()
    assert text.endswith("\n## More\n")
    assert text.count("## Validation") == 1


def test_what_a_directory_was_made_into_is_said_first_and_hubs_still_read_it(fitted: Path) -> None:
    content, evidence = measured(fitted / "linear")
    card = model_card(content, evidence)
    text = with_preface(card, "# Recalibrated\n\nFor a site.\n")
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "hilum"
    assert text.index("# Recalibrated") < text.index("# 3 findings on chest X-rays")
    assert text.replace("# Recalibrated\n\nFor a site.\n\n---\n\n", "") == card
    assert with_preface("# Of others\n\n---\n", "# New") == "# New\n\n---\n\n# Of others\n\n---\n"
