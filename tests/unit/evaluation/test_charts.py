import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve

from hilum.evaluation.charts import nice_ticks, precision_recall_plot, reliability_plot
from hilum.evaluation.curves import curves, pool
from hilum.evaluation.line_charts import Level, Series, line_chart, thin
from hilum.evaluation.tracks import Position, axis, bar_track, interval_track, pair_track


def made_up(items=200, ties=True, seed=0):
    rng = np.random.default_rng(seed)
    probabilities = rng.random((items, 3))
    if ties:
        probabilities = np.round(probabilities, 1)
    labels = (rng.random((items, 3)) < probabilities * np.array([0.9, 0.3, 0.05])).astype(np.int8)
    return probabilities, labels


@pytest.mark.parametrize("ties", [True, False])
def test_points_equal_scikit_learn(ties):
    probabilities, labels = made_up(ties=ties)
    result = curves(probabilities, labels, ["a", "b", "c"])
    for column, name in enumerate("abc"):
        precision, recall, _ = precision_recall_curve(labels[:, column], probabilities[:, column])
        curve = result.findings[name]
        np.testing.assert_allclose(curve.precision, precision[:-1][::-1], rtol=1e-12)
        np.testing.assert_allclose(curve.recall, recall[:-1][::-1], rtol=1e-12)
        area = float(np.sum(np.diff(curve.recall, prepend=0) * curve.precision))
        assert area == pytest.approx(average_precision_score(labels[:, column], probabilities[:, column]), rel=1e-12)


def test_reliability_bins_equal_a_loop():
    probabilities, labels = made_up()
    probabilities[:5, 0] = [0.0, 1.0, 1 / 15, 14 / 15, 0.5]
    curve = curves(probabilities, labels, ["a", "b", "c"]).findings["a"]
    groups = {}
    for p, y in zip(probabilities[:, 0].tolist(), labels[:, 0].tolist(), strict=True):
        groups.setdefault(min(int(p * 15), 14), []).append((p, y))
    for k in range(15):
        members = groups.get(k, [])
        assert curve.counts[k] == len(members)
        if members:
            assert curve.predicted[k] == pytest.approx(sum(p for p, _ in members) / len(members))
            assert curve.observed[k] == pytest.approx(sum(y for _, y in members) / len(members))
        else:
            assert math.isnan(curve.predicted[k])
    gaps = [abs(sum(p for p, _ in m) - sum(y for _, y in m)) for m in groups.values()]
    assert curve.calibration_error == pytest.approx(sum(gaps) / len(probabilities))


def test_unknown_labels_and_untrained_findings_take_no_part():
    probabilities, labels = made_up()
    expected = curves(probabilities[:100], labels[:100], ["a", "b", "c"]).findings["a"]
    labels[100:150, 0], labels[150:, 0] = -1, -2
    probabilities[:, 2] = np.nan
    result = curves(probabilities, labels, ["a", "b", "c"])
    np.testing.assert_array_equal(result.findings["a"].precision, expected.precision)
    np.testing.assert_array_equal(result.findings["a"].counts, expected.counts)
    untrained = result.findings["c"]
    assert (untrained.items, untrained.positives, untrained.prevalence, untrained.calibration_error) == (
        0,
        0,
        None,
        None,
    )


def test_a_finding_without_positives_has_no_points():
    result = curves(np.full((4, 1), 0.2), np.zeros((4, 1), np.int8), ["a"]).findings["a"]
    assert result.recall.size == result.precision.size == 0
    assert result.prevalence == 0.0
    assert result.calibration_error == pytest.approx(0.2)


def test_pooled_bins_equal_the_bins_of_all_pairs():
    probabilities, labels = made_up()
    pooled = pool(list(curves(probabilities, labels, ["a", "b", "c"]).findings.values()))
    flat = curves(probabilities.reshape(-1, 1), labels.reshape(-1, 1), ["all"]).findings["all"]
    np.testing.assert_array_equal(pooled.counts, flat.counts)
    np.testing.assert_allclose(pooled.observed, flat.observed)
    np.testing.assert_allclose(pooled.predicted, flat.predicted)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        curves(np.zeros((3, 2)), np.zeros((3, 2), np.int8), ["a"])


def test_interval_track_places_values_in_percent_and_keeps_them_inside():
    track = interval_track(0.25, (-1.0, 0.75), scale=Position(0, 1), label="AP", ticks=(0.5,), reference=0.1)
    root = ElementTree.fromstring(track)
    line = next(part for part in root if part.get("class") == "interval")
    assert (line.get("x1"), line.get("x2")) == ("0.0%", "75.0%")
    assert next(part for part in root if part.tag == "svg").get("x") == "25.0%"
    assert next(part for part in root if part.get("class") == "reference").get("x1") == "10.0%"
    assert root.get("aria-label") == "AP"


def test_a_track_without_a_value_draws_its_grid_only():
    root = ElementTree.fromstring(interval_track(None, None, scale=Position(0, 1), label="x", ticks=(0.0, 1.0)))
    assert [part.get("class") for part in root] == ["grid", "grid"]


def test_hollow_marks_and_pairs():
    assert 'class="mark hollow"' in interval_track(0.0, (-1, 1), scale=Position(-1, 1), label="", hollow=True)
    pair = pair_track(0.2, 0.6, scale=Position(0, 1), label="")
    assert pair.count('class="mark hollow"') == 1
    assert pair.count('class="mark"') == 1


def test_bar_ends_at_the_probability_and_the_tick_at_the_threshold():
    root = ElementTree.fromstring(bar_track(0.834, threshold=0.41, label="p"))
    assert next(part for part in root if part.get("class") == "bar").get("width") == "83.4%"
    assert next(part for part in root if part.get("class") == "threshold").get("x1") == "41.0%"
    assert 'class="bar"' not in bar_track(None, label="p")


def test_square_root_scale():
    assert Position(0, 1, root=True)(0.25) == 50.0
    assert Position(0.5, 1)(0.75) == 50.0
    assert "left:50.0%" in axis((0.25,), Position(0, 1, root=True), None)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ((-0.05, 0.05), [-0.04, -0.02, 0.0, 0.02, 0.04]),
        ((0, 2500), [0, 500, 1000, 1500, 2000, 2500]),
    ],
)
def test_nice_ticks(ends, expected):
    assert nice_ticks(*ends) == pytest.approx(expected)


def test_nice_ticks_of_nothing():
    assert nice_ticks(3.0, 3.0) == [3.0]


def test_precision_recall_path_has_the_area_of_average_precision():
    probabilities, labels = made_up()
    curve = curves(probabilities, labels, ["a", "b", "c"]).findings["a"]
    svg = precision_recall_plot(curve, label="x")
    path = re.search(r'class="curve" d="M([^"]+)"', svg)[1]
    points = np.array([[float(n) for n in pair.split()] for pair in path.split("L")])
    recall, precision = (points[:, 0] - 28) / 166, (132 - points[:, 1]) / 112
    area = float(np.sum(np.diff(recall) * precision[1:]))
    assert area == pytest.approx(average_precision_score(labels[:, 0], probabilities[:, 0]), abs=0.01)


def test_plots_are_well_formed_and_escape_their_label():
    probabilities, labels = made_up()
    curve = curves(probabilities, labels, ["a", "b", "c"]).findings["b"]
    label = "<script>\"&'"
    for svg in (
        precision_recall_plot(curve, label=label),
        reliability_plot(curve, label=label, before=curve, linked=True),
    ):
        assert ElementTree.fromstring(svg).get("aria-label") == label


def test_reliability_has_a_dot_for_every_filled_bin_and_a_range_that_fits():
    probabilities = np.array([[0.01], [0.02], [0.03], [0.08]])
    curve = curves(probabilities, np.zeros((4, 1), np.int8), ["a"]).findings["a"]
    svg = reliability_plot(curve, label="x")
    assert svg.count('class="dot"') == 2
    assert ">0.1</text>" in svg
    assert "n = 3" in svg
    empty = curves(np.full((2, 1), np.nan), np.zeros((2, 1), np.int8), ["a"]).findings["a"]
    assert 'class="dot"' not in reliability_plot(empty, label="x")


def test_line_chart_breaks_at_missing_values_and_names_every_series():
    x = np.arange(5.0)
    chart = line_chart(
        [Series("student & teacher", x, np.array([1, 2, np.nan, 4, 5.0])), Series("empty", x, np.full(5, np.nan))],
        x_label="step", y_label="loss", label="losses",
    )  # fmt: skip
    assert "student &amp; teacher" in chart
    assert "empty" in chart
    drawn = re.findall(r'class="series series-\d" d="(M0 9[^"]+|M[^"]+L[^"]+)"', chart)
    assert [path.count("M") for path in drawn] == [2]
    root = ElementTree.fromstring(chart.replace("&middot;", ""))
    assert root.get("class") == "line-chart"


def test_line_chart_without_series_or_with_one_value():
    assert "line-frame" in line_chart([], x_label="x", y_label="y", label="")
    assert "nan" not in line_chart([Series("a", np.array([1.0]), np.array([2.0]))], x_label="x", y_label="y", label="")


def test_levels_lie_at_their_value_and_are_inside_the_axis():
    x = np.arange(1.0, 101.0)
    chart = line_chart(
        [Series("loss", x, np.linspace(8, 4, 100))], x_label="step", y_label="loss", label="",
        levels=[Level("at the start", 10.0, 0)],
    )  # fmt: skip
    top = (10 - 4) * 1.04 + 4  # 4 % of margin on both sides
    low, high = 4 - 0.04 * 6, top
    [height] = re.findall(r'class="level series-1" d="M0 ([\d.]+)H100"', chart)
    assert float(height) == pytest.approx(100 - 100 * (10 - low) / (high - low), abs=0.02)
    assert "at the start" in chart
    assert "points" not in chart


def test_few_points_are_shown_each_and_a_logarithm_is_even():
    values = np.array([1e-4, 1e-2, 1.0, 0.0, 100.0])
    chart = line_chart([Series("norm", np.arange(5.0), values)], x_label="", y_label="", label="", logarithmic=True)
    [dots] = re.findall(r'class="points series-1" d="([^"]+)"', chart)
    heights = [float(part.split()[1].removesuffix("h0")) for part in dots.split("M")[1:]]
    assert np.diff(heights) == pytest.approx([heights[1] - heights[0]] * 3, abs=0.05)  # the 0 is left out
    assert ">0.01</i>" in chart
    assert "nan" not in chart
    line = re.findall(r'class="series series-1" d="(M\d[^"]+L[^"]+)"', chart)
    assert line[0].count("M") == 2


def test_thinning_keeps_spikes_ends_and_order():
    x, y = np.arange(10_000.0), np.zeros(10_000)
    y[4321], y[8765] = 9.0, -9.0
    kept_x, kept_y = thin(x, y, 200)
    assert len(kept_x) <= 204
    assert {0.0, 4321.0, 8765.0, 9999.0} <= set(kept_x.tolist())
    assert (np.diff(kept_x) > 0).all()
    assert kept_y.max() == 9.0
    same_x, _ = thin(x[:10], y[:10], 200)
    assert same_x is not None
    assert len(same_x) == 10
