import re
from html.parser import HTMLParser

import numpy as np
import pytest

from hilum.core.types import RESEARCH_NOTICE
from hilum.evaluation.report import ExampleFinding, ReportExample, curves, render_report, write_report
from hilum.evaluation.report_rows import finding_rows

FINDINGS = ("Cardiomegaly", "Edema", "Mass", "Hernia", "Azygos Lobe", '<script>alert("x")</script>')
GROUPS = ("head", "head", "medium", "tail", "tail", "medium")
VOID = {"meta", "link", "input", "br", "img"}


class Balance(HTMLParser):
    """Fails on a tag that is closed out of order or never; collects ids, references and text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.problems, self.ids, self.references, self.text, self.names = [], [], [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.names.add(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src"):
                self.references.append(value)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append((tag, self.getpos()))

    def handle_data(self, data):
        self.text.append(data)


def parse(page):
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.problems == []
    assert parser.open == []
    return parser


def some_metrics():
    findings = {}
    for place, (name, group) in enumerate(zip(FINDINGS, GROUPS, strict=True)):
        findings[name] = {
            "AP": 0.1 + place / 10, "AUC": 0.6 + place / 20, "F1@0.5": 0.2, "F1@tuned": 0.3, "ECE": 0.04,
            "positives": 40 - 6 * place, "prevalence": (40 - 6 * place) / 200, "threshold": 0.25, "group": group,
            "ci95": {"AP": [0.05, 0.7], "AUC": [0.5, 0.9]},
        }  # fmt: skip
    findings["Azygos Lobe"] |= {"AP": None, "AUC": float("nan"), "F1@0.5": None, "F1@tuned": None, "positives": 0,
                                "prevalence": 0.0, "ci95": {"AP": None}}  # fmt: skip
    macro = {"mAP": 0.31, "mAUC": 0.72, "mF1@tuned": None, "mECE_standard": 0.04, "mECE_challenge_inferred": 0.7,
             "ci95": {"mAP": [0.25, 0.36]}, "counted": {"mAP": 5}, "findings": list(FINDINGS)[:5]}  # fmt: skip
    groups = {"head": {"mAP": 0.4}, "medium": {"mAP": 0.3}, "tail": {"mAP": None}}
    return {"unit": "study", "stage": "calibrated", "n_patients": 1234, "macro": macro, "groups": groups,
            "findings": findings, "bootstrap": {"resamples": 1000, "seed": 0}}  # fmt: skip


def some_curves(seed=0):
    rng = np.random.default_rng(seed)
    probabilities = rng.random((200, len(FINDINGS)))
    labels = (rng.random(probabilities.shape) < probabilities).astype(np.int8)
    labels[:, 4] = 0
    return curves(probabilities, labels, FINDINGS)


def some_example(title="Study 1"):
    rng = np.random.default_rng(1)
    views = tuple(rng.integers(0, 255, (60, 50), dtype=np.uint8) for _ in range(2))
    mask = np.zeros((60, 50), bool)
    mask[10:20, 10:30] = True
    shown = ExampleFinding("Mass", 0.8, 0.4, 1, (rng.random((4, 4)), rng.random((4, 4))), (mask, None))
    plain = ExampleFinding("<i>Edema</i>", None, None, None, (None, None), (None, None))
    return ReportExample(title, views, ("PA", "LATERAL"), (shown, plain))


STEPS = [
    {"name": "linear", "mAP": 0.214, "mAUC": 0.7, "mF1@0.5": None, "mF1@tuned": 0.2, "mECE_standard": 0.08,
     "difference": None},
    {"name": "decoder", "mAP": 0.245, "mAUC": 0.7, "mF1@0.5": 0.1, "mF1@tuned": 0.2, "mECE_standard": 0.07,
     "difference": {"metric": "mAP", "value": 0.031, "low": 0.012, "high": 0.05, "shown": True}},
    {"name": "+ ensemble", "mAP": 0.241, "mAUC": 0.7, "mF1@0.5": 0.1, "mF1@tuned": 0.2, "mECE_standard": 0.06,
     "difference": {"metric": "mAP", "value": -0.004, "low": -0.02, "high": 0.01, "shown": False}},
]  # fmt: skip


def full_page():
    return render_report(
        title="A & B <report>", metrics=some_metrics(), curves=some_curves(), curves_before=some_curves(1), steps=STEPS,
        examples=[some_example(), some_example("Study <2>")], notes=["Not <patients>."],
        comparisons=[{"name": "Pretrained, random", "metric": "mAUC", "value": 0.04, "low": 0.01, "high": 0.07}],
        facts={"Model": "demo", "Patients": "119", "Seed": "7", "Config": "a: 1\nb: <2>"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def page():
    return full_page()


def test_the_page_is_well_formed_and_its_anchors_exist(page):
    parser = parse(page)
    assert len(parser.ids) == len(set(parser.ids))
    inside = {reference[1:] for reference in parser.references if reference.startswith("#")}
    assert inside <= set(parser.ids)
    assert {
        "result", "steps", "comparisons", "overview", "findings", "precision", "reliability", "thresholds", "examples",
        "reading", "provenance",
    } <= inside  # fmt: skip


def test_nothing_is_asked_of_a_network(page):
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttp", without_pictures)
    assert all(reference.startswith(("#", "data:")) for reference in parse(page).references)
    assert "default-src 'none'" in page


def test_every_finding_is_in_every_section(page):
    for name in FINDINGS:
        assert parse(page).text.count(name) >= 4 or name == "Azygos Lobe", name
    sections = dict(re.findall(r'<section id="(\w+)" class="part">(.*?)</section>\n', page, re.S))
    for section in ("overview", "findings", "precision", "reliability", "thresholds"):
        assert "Azygos Lobe" in sections[section], section


def test_hostile_names_stay_text(page):
    assert "<script>alert" not in page
    assert "<patients>" not in page
    assert "<i>Edema" not in page
    assert "A &amp; B &lt;report&gt;" in page
    assert page.count("<script>") == 1
    text = "".join(parse(page).text)
    assert '<script>alert("x")</script>' in text
    assert "Study <2>" in text


def test_undefined_values_are_a_dash_with_a_reason(page):
    text = "".join(parse(page).text)
    assert "no positive in this set" in text
    assert not {"nan", "NaN", "None"} & set(re.findall(r"[A-Za-z]+", text))
    assert '<abbr class="undefined" title="no positive in this set">–</abbr>' in page  # noqa: RUF001


def test_reasons_follow_the_excluded_lists():
    metrics = some_metrics()
    metrics["excluded"] = {"untrained": ["Azygos Lobe"]}
    reasons = {row.name: row.reason for row in finding_rows(metrics)}
    assert reasons["Azygos Lobe"] == "this model was never trained for it"
    assert reasons["Mass"] == ""


def test_groups_come_in_order_and_the_most_common_first():
    rows = finding_rows(some_metrics())
    assert [row.group for row in rows] == ["head", "head", "medium", "medium", "tail", "tail"]
    assert [row.name for row in rows][:3] == ["Cardiomegaly", "Edema", "Mass"]


def test_the_mean_of_a_group_says_over_how_many_findings_it_is():
    metrics = some_metrics()
    metrics["groups"] = {
        "head": {"mAP": 0.4, "mAUC": 0.7, "counted": {"mAP": 2, "mAUC": 2}},
        "tail": {"mAP": 0.3, "mAUC": 0.6, "counted": {"mAP": 1, "mAUC": 1}},
    }
    page = render_report(title="x", metrics=metrics, curves=some_curves())
    assert "mean AP 0.400 · mean AUC 0.700" in page
    assert "mean AP 0.300 (1 of 2) · mean AUC 0.600 (1 of 2)" in page


def test_not_shown_is_said_where_the_interval_includes_zero(page):
    steps = re.search(r'<section id="steps".*?</section>', page, re.S)[0]
    assert steps.count('<em class="not-shown">not shown</em>') == 1
    assert "+0.031" in steps
    assert "−0.004" in steps  # noqa: RUF001
    comparisons = re.search(r'<section id="comparisons".*?</section>', page, re.S)[0]
    assert "not shown" not in comparisons


def test_head_of_the_page_has_notice_facts_and_counts(page):
    head = page.split("<main>")[0]
    assert RESEARCH_NOTICE in head
    assert "per study, calibrated" in head
    assert "119" in head
    bare = render_report(title="x", metrics=some_metrics(), curves=some_curves()).split("<main>")[0]
    assert "1\N{NARROW NO-BREAK SPACE}234" in bare


def test_findings_with_few_positives_are_listed():
    page = render_report(title="x", metrics=some_metrics(), curves=some_curves(), minimum_positives=20)
    note = re.search(r"Too few positives.*?</p>", page)[0]
    assert "Azygos Lobe (0)" in note
    assert "Mass" not in note
    assert "2 of 6 findings have fewer than 20" in note


def test_sections_without_content_are_left_out():
    page = render_report(title="x", metrics=some_metrics(), curves=some_curves())
    parse(page)
    for section in ("steps", "comparisons", "examples"):
        assert f'id="{section}"' not in page
    assert "hollow dots" not in page


@pytest.mark.parametrize("metrics", [{}, {"macro": {}, "groups": {}, "findings": {}}, {"findings": {"Mass": {}}}])
def test_almost_nothing_still_makes_a_page(metrics):
    nothing = curves(np.empty((0, 0)), np.empty((0, 0), np.int8), [])
    page = render_report(title="x", metrics=metrics, curves=nothing)
    parse(page)
    assert RESEARCH_NOTICE in page


def test_equal_inputs_give_equal_bytes(tmp_path, page):
    assert full_page() == page
    write_report(tmp_path / "a" / "report.html", title="x", metrics=some_metrics(), curves=some_curves())
    write_report(tmp_path / "b.html", title="x", metrics=some_metrics(), curves=some_curves())
    assert (tmp_path / "a" / "report.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_script_is_the_one_the_policy_allows(page):
    import base64
    import hashlib

    script = re.search(r"<script>(.*?)</script></body>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"sha256-{digest}" in page


def test_eight_studies_of_two_views_stay_under_five_megabytes():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (320, 320), dtype=np.uint8)
    maps = (rng.random((16, 16)), rng.random((16, 16)))
    findings = tuple(ExampleFinding(f"f{k}", 0.5, 0.4, 1, maps, (None, None)) for k in range(3))
    examples = [ReportExample(f"Study {k}", (noise, noise), ("PA", "LATERAL"), findings) for k in range(8)]
    page = render_report(title="x", metrics=some_metrics(), curves=some_curves(), examples=examples)
    assert len(page.encode()) < 5_000_000
