import base64
import re

import cv2
import numpy as np
import pytest

from hilum.evaluation.films import (
    FILM_SIDE,
    ExampleFinding,
    ReportExample,
    attention_inside,
    heat_levels,
    outline,
    study,
    verdict,
)


def finding(probability=0.8, threshold=0.5, truth=1, attention=(None,), masks=(None,), name="Mass"):
    return ExampleFinding(name, probability, threshold, truth, attention, masks)


def box(height=100, width=80, rows=slice(20, 40), columns=slice(30, 60)):
    mask = np.zeros((height, width), bool)
    mask[rows, columns] = True
    return mask


def corners(path):
    return np.array([[float(n) for n in pair.split()] for pair in re.findall(r"[\d.]+ [\d.]+", path)])


def test_outline_follows_the_mask_in_the_frame_of_the_film():
    points = corners(outline(box(), 80, 100))
    np.testing.assert_allclose(points.min(0), [30, 20], atol=0.6)
    np.testing.assert_allclose(points.max(0), [60, 40], atol=0.6)
    half = corners(outline(box(), 40, 50))
    np.testing.assert_allclose(half.max(0), [30, 20], atol=0.6)


def test_outline_keeps_single_pixels_holes_and_the_border():
    assert outline(np.zeros((8, 8), bool), 8, 8) == ""
    single = np.zeros((64, 64), bool)
    single[10, 20] = True
    np.testing.assert_allclose(corners(outline(single, 320, 320)).mean(0), [102.5, 52.5], atol=1.0)
    thin_line = np.zeros((1024, 1024), bool)
    thin_line[:, 500:502] = True
    assert outline(thin_line, 320, 320)
    ring = box(60, 60, slice(10, 50), slice(10, 50)) & ~box(60, 60, slice(20, 40), slice(20, 40))
    assert outline(ring, 60, 60).count("M") == 2
    assert outline(np.ones((10, 10), bool), 10, 10).count("M") == 1


def test_heat_has_one_scale_for_all_views():
    bright, dim = np.zeros((4, 4)), np.zeros((2, 2))
    bright[1, 1], dim[0, 0] = 8.0, 2.0
    levels = heat_levels([bright, None, dim])
    assert levels[1] is None
    assert levels[0].max() == 1.0
    assert levels[2].max() == pytest.approx(0.25)


def test_heat_of_a_flat_or_absent_map_is_clear():
    assert not heat_levels([np.full((3, 3), 0.7)])[0].any()
    assert heat_levels([None, None]) == (None, None)
    assert heat_levels([np.array([[np.nan, 1.0], [0.0, 0.0]])])[0].max() == 1.0


def test_scale_of_the_map_does_not_matter():
    pattern = np.random.default_rng(0).random((8, 8))
    np.testing.assert_allclose(heat_levels([pattern])[0], heat_levels([pattern * 1e-5 + 3.0])[0], atol=1e-9)


def test_attention_inside_the_outline():
    attention = np.zeros((4, 4))
    attention[:2] = 3.0
    attention[2:] = 1.0
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    assert attention_inside([attention, None], [mask, mask]) == pytest.approx((0.75, 0.5))
    assert attention_inside([attention], [np.zeros((8, 8), bool)]) is None
    assert attention_inside([attention - 2], [mask]) is None
    assert attention_inside([None], [mask]) is None


@pytest.mark.parametrize(
    ("probability", "threshold", "truth", "words"),
    [
        (0.8, 0.5, 1, "present, flagged"),
        (0.5, 0.5, 1, "present, missed"),
        (0.8, 0.5, 0, "absent, flagged"),
        (0.2, 0.5, 0, "absent, not flagged"),
        (0.2, None, 0, "absent"),
        (0.2, 0.5, None, "not annotated"),
        (0.2, 0.5, -1, "not annotated"),
        (None, 0.5, 1, "not trained"),
        (float("nan"), 0.5, 1, "not trained"),
    ],
)
def test_verdict(probability, threshold, truth, words):
    assert verdict(finding(probability, threshold, truth))[1] == words


def test_a_view_is_embedded_once_and_small():
    views = (np.full((600, 400), 90, np.uint8), np.full((50, 70), 30, np.uint8))
    shown = finding(attention=(np.eye(4), np.eye(4)), masks=(np.ones((600, 400), bool), None))
    html = study(ReportExample("Study", views, ("PA", "LATERAL"), (shown,)), 3)
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", html)
    sizes = [cv2.imdecode(np.frombuffer(base64.b64decode(p), np.uint8), cv2.IMREAD_UNCHANGED).shape for p in pictures]
    assert sizes == [(FILM_SIDE, 213), (50, 70)]
    assert html.count("data:image/png") == 2
    assert html.count('href="#study-3-view-0"') == 3
    assert "no outline in this view" in html


def test_without_any_outlines_no_view_is_said_to_lack_one():
    view = np.zeros((20, 20), np.uint8)
    findings = tuple(finding(truth=truth, attention=(np.eye(4),), name=name) for name, truth in
                     (("Mass", 1), ("Edema", 0), ("Hernia", -1)))  # fmt: skip
    html = study(ReportExample("Study", (view,), ("PA",), findings, outlined=False), 1)
    assert html.count('class="map"') == 3
    assert "outline" not in html
    assert html.count("<figcaption>the same view</figcaption>") == 2
    assert html.count("<figcaption>absent</figcaption>") == 1


def test_a_finding_without_maps_is_in_the_list_only():
    view = np.zeros((20, 20), np.uint8)
    html = study(ReportExample("Study", (view,), ("PA",), (finding(), finding(truth=0, name="Edema"))), 1)
    assert "Edema" in html
    assert 'class="map"' not in html
