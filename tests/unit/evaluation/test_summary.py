import pytest

from hilum.evaluation.markup import decimal, finite, share, signed, text
from hilum.evaluation.metrics import evaluate
from hilum.evaluation.summary import evaluation_table, is_shown, step_table

STEPS = [
    {"name": "linear", "mAP": 0.2141, "mAUC": 0.7, "mF1@0.5": None, "mF1@tuned": float("nan"), "difference": None},
    {"name": "+ study mean", "mAP": 0.245, "mAUC": 0.71, "mF1@0.5": 0.1, "mF1@tuned": 0.2, "mECE_standard": 0.05,
     "difference": {"metric": "mAP", "value": 0.031, "low": 0.012, "high": 0.05, "shown": True}},
    {"name": "ensemble", "mAP": 0.241, "mAUC": 0.71, "mF1@0.5": 0.1, "mF1@tuned": 0.2, "mECE_standard": 0.05,
     "difference": {"metric": "mAP", "value": -0.004, "low": -0.02, "high": 0.012, "shown": False}},
]  # fmt: skip


def test_step_table_is_aligned_and_says_not_shown():
    lines = step_table(STEPS).splitlines()
    assert len(lines) == 5
    assert lines[2].split() == ["linear", "0.214", "0.700", "-", "-", "-"]
    assert lines[3].endswith("mAP +0.031 [0.012, 0.050]")
    assert lines[4].endswith("mAP -0.004 [-0.020, 0.012] not shown")
    end = lines[0].index("mAP") + len("mAP")
    assert [line[end - 5 : end] for line in lines[2:]] == ["0.214", "0.245", "0.241"]
    assert all(line == line.rstrip() and line.isascii() for line in lines)


def test_the_table_says_over_how_many_findings_the_means_are(made_up):
    table, labels = made_up()
    labels[:, 1] = 0  # no positive of B
    rows = evaluation_table(evaluate(table, labels, {"A": "head", "B": "tail", "C": "tail", "D": "tail"})).splitlines()
    assert [row.split("  ")[0] for row in rows[1:]] == ["all (3 of 4)", "head (1)", "tail (2 of 3)"]


def test_no_steps_still_print_a_heading():
    assert step_table([]).startswith("step")


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(0.01, 0.02, True), (-0.2, -0.1, True), (0.0, 0.1, False), (-0.1, 0.1, False), (None, 1, False)],
)
def test_shown_follows_the_interval_unless_said(low, high, shown):
    assert is_shown({"value": 0.1, "low": low, "high": high}) is shown
    assert is_shown({"value": 0.1, "low": low, "high": high, "shown": not shown}) is not shown


def test_numbers_as_text():
    assert decimal(-0.0001) == "0.000"
    assert decimal(-0.5, 1) == "−0.5"  # noqa: RUF001
    assert signed(0.0314) == "+0.031"
    assert signed(0.0) == "0.000"
    assert decimal(None) == signed(None) == share(None) == "–"  # noqa: RUF001
    near = [share(v).replace("\N{NO-BREAK SPACE}", " ") for v in (1.0, 0.9999999, 0.996, 0.989, 1e-9)]
    assert near == ["100 %", "99.99 %", "99.60 %", "99 %", "0.01 %"]  # nearly sure is not sure
    assert [share(v).replace("\N{NO-BREAK SPACE}", " ") for v in (0.123, 0.042, 0.0031, 0.0)] == [
        "12 %",
        "4.2 %",
        "0.31 %",
        "0 %",
    ]
    assert [finite(v) for v in (float("nan"), float("inf"), None, "x", True, 1)] == [None, None, None, None, None, 1.0]
    assert text("<a b='c'>&\"") == "&lt;a b=&#x27;c&#x27;&gt;&amp;&quot;"
