import re
from html.parser import HTMLParser

import numpy as np
import pytest

from hilum.core.types import RESEARCH_NOTICE
from hilum.evaluation.run_panels import PANELS
from hilum.evaluation.run_report import Neighbour, PatchMap, RunAlarm, RunPage, render_run

VOID = {"meta", "link", "input", "br", "img"}


class Reader(HTMLParser):
    """Fails on a tag that is closed out of order; collects pictures, references and text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.images, self.references, self.text, self.names = [], [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.names.add(tag)
        values = dict(attributes)
        if tag == "img":
            self.images.append(values)
        self.references += [value for name, value in attributes if name in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def film(seed=0, side=32):
    return np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)


def some_page(**changes):
    history = [{"step": 0, "knn_mAP": 0.3, "linear_mAP": 0.32}] + [
        {
            "step": step, "loss": 14 - step / 10, "dino_local": 4.4 - step / 50, "ibot": 2.7 - step / 30,
            "dino_global": 1.1, "gradient_norm_backbone": 10.0 ** (-step / 30), "images_per_second": 50.0,
        }
        for step in range(1, 61)
    ]  # fmt: skip
    asked = Neighbour(film(1), "nih, PA", ("Mass", '<b>"Hernia"</b>'))
    found = [Neighbour(film(number), "nih, AP", ("Mass", "Edema"), 0.9 - number / 100) for number in range(5)]
    colours = np.random.default_rng(3).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    values = {
        "title": "Pretraining: run <1>", "facts": {"Network": "demo & co", "Steps": "60 of 60"},
        "figures": [("Steps", "60", "finished"), ("Loss", "8.000", "13.900 at first")], "history": history,
        "alarms": [
            RunAlarm("a", "It has <collapsed>", "rank 1.0", "a lower `learning_rate`, or `clip` at 1", 20, 40, True),
            RunAlarm("b", "It jumped", "9 against 3", "nothing", 10, 10, False),
        ],
        "initial": {"dino_local": 4.436, "ibot": 2.77}, "clip": 3.0,
        "maps": [PatchMap("nih, PA, Mass", film(), colours)], "maps_note": "16 x 16",
        "neighbours": [(asked, found)], "neighbours_note": "the nearest",
        "notes": ["Read <me>"], "provenance": {"seed": "0", "config.yaml": "a: 1\nb: 2\n"},
    }  # fmt: skip
    return RunPage(**(values | changes))


def test_the_page_is_whole_and_asks_nothing_of_any_network():
    page = render_run(some_page())
    reader = read(page)
    assert all(reference.startswith(("#", "data:")) for reference in reader.references)
    assert "http" not in re.sub(r'xmlns="[^"]+"', "", page.replace("http-equiv", ""))
    assert "default-src 'none'" in page
    assert page.count(RESEARCH_NOTICE) == 2
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    words = " ".join(reader.text)
    assert 'Hernia"</b>' in words  # escaped in the source
    assert '<b>"Hernia"' not in page
    assert "nan" not in words.lower().split()


def test_equal_runs_give_equal_bytes():
    assert render_run(some_page()) == render_run(some_page())


def test_every_picture_says_what_it_shows_and_no_more():
    reader = read(render_run(some_page()))
    assert len(reader.images) == 2 + 2 + 6  # the poster, a map, a row of neighbours
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in reader.images)
    assert any("cosine 0.90" in image["alt"] for image in reader.images)
    for label in re.findall(r'role="img" aria-label="([^"]*)"', render_run(some_page())):
        assert "from" in label
        assert "at step 60" in label or "at step 0" in label


def test_charts_are_drawn_for_columns_that_are_there_and_with_their_levels():
    page = render_run(some_page())
    titles = re.findall(r'<figure class="curve-panel"><h3>([^<]+)', page)
    assert titles == [
        "Losses",
        "Total and spread",
        "Findings by neighbours and a linear map",
        "Gradient norms",
        "Speed",
    ]
    losses = page[page.index("<h3>Losses") : page.index("<h3>Total")]
    assert len(re.findall(r'class="level series-\d" d="M0 [\d.]+H100"', losses)) == 2
    probes = page[page.index("<h3>Findings by") : page.index("<h3>Gradient")]
    assert len(re.findall(r'class="level series-\d" d="M0 [\d.]+H100"', probes)) == 2
    assert "clipped above 3" in page
    assert "KoLeo</li>" not in page
    assert "clipped above" not in render_run(some_page(clip=0.0))


def test_alarms_tell_when_what_and_what_to_try():
    page = render_run(some_page())
    assert "It has &lt;collapsed&gt;" in page
    assert "step 20 to 40, standing" in page
    assert "step 10, cleared" in page
    assert "<code>learning_rate</code>" in page
    assert page.index("standing") < page.index("cleared")
    assert '<p class="quiet">None.</p>' in render_run(some_page(alarms=[]))


def test_shared_labels_are_marked_and_only_those():
    page = render_run(some_page())
    assert page.count('<span class="shared">Mass</span>') == 5
    assert '<span class="shared">Edema' not in page


@pytest.mark.parametrize("missing", ["history", "maps", "neighbours", "facts", "figures", "provenance", "notes"])
def test_whatever_is_missing_leaves_a_whole_page(missing):
    reader = read(render_run(some_page(**{missing: {} if missing in ("facts", "provenance") else []})))
    assert any(RESEARCH_NOTICE in part for part in reader.text)


def test_lines_with_odd_values_are_drawn_without_them():
    history = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": "inf"}, {"step": 3}, {"step": 4, "loss": 2.0}]
    page = render_run(some_page(history=history, maps=[], neighbours=[]))
    assert "Total and spread" in page
    assert not re.search(r"\bnan\b", page[page.index("<main>") : page.index("<footer>")].lower())


def test_every_panel_is_of_columns_that_a_run_writes():
    from hilum.pretraining.dinov2 import PARTS, Losses
    from hilum.pretraining.schedules import Values

    written = {
        "loss", *Losses._fields, *Values._fields, *(f"gradient_norm_{part}" for part in PARTS), "images_per_second",
        "mfu", "knn_mAP", "knn_mAUC", "linear_mAP", "linear_mAUC", "cls_prototype_usage", "patch_prototype_usage",
        "cls_target_entropy", "patch_target_entropy", "teacher_feature_deviation", "teacher_effective_rank",
    }  # fmt: skip
    assert {column for panel in PANELS for column, _ in panel.columns} <= written
