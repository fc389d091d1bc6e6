"""The page of a study: what it says is what the document says, and nothing can be smuggled in or fetched."""

import copy
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from hilum.core.types import RESEARCH_NOTICE
from hilum.deploy.study_page import study_page

CUTS = {"f1": 0.3, "youden": 0.2}
HOSTILE = '<script>alert("1")</script>'


def finding(name: str, probability: float | None, trained: bool = True, has_map: bool = True) -> dict[str, Any]:
    known = probability is not None
    return {
        "name": name, "group": "tail", "trained": trained, "probability": probability,
        "calibrated": trained, "interval": [0.21, 0.45] if known else None, "thresholds": CUTS if trained else None,
        "above": {key: probability > cut for key, cut in CUTS.items()} if known else None,
        "calibration_flag": "uncalibrated: few positives" if known else None, "has_map": known and has_map,
        "images": [{"number": n, "probability": probability, "contribution": 0.6 if n == 1 else 0.4} for n in (1, 2)],
    }  # fmt: skip


@pytest.fixture
def document() -> dict[str, Any]:
    images = [
        {
            "number": number, "view": view, "view_source": "header", "rows": 48, "columns": 40, "weight": 0.5,
            "box": [1 / 12, 0.0, 5 / 6, 1.0], "flags": [], "scored": True,
        }
        for number, view in ((1, "PA"), (2, "LATERAL"))
    ]  # fmt: skip
    return {
        "format": "hilum-study-1", "notice": RESEARCH_NOTICE,
        "model": {
            "digest": "0123456789abcdef", "hilum": "0.1.0", "calibrated": True, "unit": "study", "accepted_leak": "",
            "operating_points": ["f1", "youden"],
        },
        "study": {"id": "study_0001", "images": images}, "status": "scored", "flags": [],
        "findings": [finding("Mass", 0.31), finding(HOSTILE, 0.62), finding("Edema", 0.04, has_map=False),
                     finding("Hernia", None, trained=False)],
    }  # fmt: skip


PIXELS = [np.full((48, 40), 90, np.uint8), np.full((900, 1000), 30, np.uint8)]
MAPS = {"Mass": [np.eye(4), np.eye(4)], HOSTILE: [np.eye(4), np.eye(4)], "Edema": None, "Hernia": None}


class Page(HTMLParser):
    """Tags, and text by section and by row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_the_table_is_the_document_above_first(document) -> None:
    page = Page(study_page(document, PIXELS, MAPS))
    rows = {row[0]: [cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in page.rows}
    assert list(rows)[1:] == [HOSTILE, "Mass", "Edema", "Hernia"]
    assert rows["Mass"][2:5] == ["31 %", "21 % to 45 %", "30 %"]
    assert "above its operating point" in rows["Mass"][5]
    assert "above" not in rows["Edema"][5]
    assert "never trained" in rows["Hernia"][5]
    assert rows["Hernia"][2] == "–"  # noqa: RUF001 - the dash of a value that is not there
    assert any(RESEARCH_NOTICE in text for text in page.words)


def test_maps_are_those_of_findings_above_their_point_over_each_image(document) -> None:
    page = Page(study_page(document, PIXELS, MAPS))
    heats = [values for tag, values in page.tags if tag == "image" and values.get("class") == "heat"]
    assert len(heats) == 4
    uses = [values["href"] for tag, values in page.tags if tag == "use"]
    assert uses == ["#image-1", "#image-2"] * 3  # as they are, then two findings
    joined = "".join(page.words).replace("\N{NO-BREAK SPACE}", " ")
    assert "60 % of the study's probability" in joined
    without = Page(study_page(document, PIXELS))
    assert not [1 for tag, values in without.tags if values.get("class") == "heat"]


def test_an_image_that_took_no_part_has_no_map(document) -> None:
    document["study"]["images"][1] |= {
        "scored": False, "weight": 0.0, "flags": [{"code": "inverted", "message": "Bright and dark are exchanged."}],
    }  # fmt: skip
    maps = MAPS | {"Mass": [np.eye(4), np.zeros((4, 4))]}
    page = Page(study_page(document, PIXELS, maps))
    assert len([1 for tag, values in page.tags if values.get("class") == "heat"]) == 2
    assert "Bright and dark are exchanged." in page.words
    assert any("took no part" in text for text in page.words)


def test_a_withheld_study_shows_its_images_and_no_table(document) -> None:
    document["status"] = "withheld"
    document["flags"] = [{"code": "withheld", "message": "No image looks like a chest X-ray."}]
    document["findings"] = [finding("Mass", None)]
    page = Page(study_page(document, PIXELS, {"Mass": None}))
    assert not page.rows
    assert "No image looks like a chest X-ray." in page.words
    assert "withheld" in page.words


def test_raw_scores_are_not_called_probabilities(document) -> None:
    document["model"]["calibrated"] = False
    page = study_page(document, PIXELS, MAPS)
    assert "These scores are not calibrated" in page
    assert '<th class="number">Score</th>' in page


def test_the_explanations_of_a_raw_page_promise_no_calibration(document) -> None:
    document["model"]["calibrated"] = False
    words = " ".join("".join(Page(study_page(document, PIXELS, MAPS)).words).split())
    assert "calibrated on validation" not in words
    assert "the study's probability" not in words
    assert "A score from which on" in words


def test_a_model_without_operating_points_is_not_said_to_be_below_any(document) -> None:
    document["model"]["operating_points"] = []
    document["findings"] = [one | {"thresholds": None, "above": None} for one in document["findings"]]
    words = Page(study_page(document, PIXELS, MAPS)).words
    assert "Above their point" not in words
    assert not any("tick" in one.lower().split() for one in words)
    assert words.count("Operating point") == 1  # the column, in which each finding says that it has none
    assert words.count("no operating point; uncalibrated: few positives") == 3


def test_only_findings_with_the_point_are_counted(document) -> None:
    document["findings"][0] |= {"thresholds": None, "above": None}
    words = Page(study_page(document, PIXELS, MAPS)).words
    assert words[words.index("Above their point") + 1] == "1 of 2"


def test_nothing_is_fetched_and_names_stay_text(document) -> None:
    document["study"]["id"] = '"><img src=x onerror=alert(1)>'
    document["study"]["images"][0]["flags"] = [{"code": "inverted", "message": HOSTILE}]
    page = study_page(document, PIXELS, MAPS, facts={HOSTILE: HOSTILE})
    parsed = Page(page)
    assert len([1 for tag, _ in parsed.tags if tag == "script"]) == 1
    assert "alert(1)" not in "".join(re.findall(r"<script>.*?</script>", page, re.DOTALL))
    assert not [1 for tag, values in parsed.tags if any(name.startswith("on") for name in values)]
    assert "default-src 'none'" in page
    for tag, values in parsed.tags:
        for name in ("src", "href"):
            assert (values.get(name) or "data:").startswith(("data:", "#")), (tag, values)
    assert not re.search(r"(?<!www\.w3\.org/)https?://(?!www\.w3\.org)|@import|url\(", page)


def test_equal_documents_give_equal_pages_and_another_number_of_images_none(document) -> None:
    assert study_page(copy.deepcopy(document), PIXELS, MAPS) == study_page(document, PIXELS, MAPS)
    with pytest.raises(ValueError, match="pixels of 1 images for a document of 2"):
        study_page(document, PIXELS[:1], MAPS)
