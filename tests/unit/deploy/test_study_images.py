"""Maps of several networks as one, and what each view contributes."""

import numpy as np
import pytest

from hilum.deploy.study_images import Part, contributions, mean_of_maps

RNG = np.random.default_rng(0)
NAMES = ("Edema", "Mass")


def maps(views: int, side: int, over_study: bool) -> np.ndarray:
    values = RNG.random((views, 2, side, side)) * np.linspace(1, 3, views)[:, None, None, None]
    return values / values.sum(axis=(0, 2, 3) if over_study else (2, 3), keepdims=True)


def part(values, found, share=1.0, together=False) -> Part:
    return Part(np.asarray(values, float), found, share, np.broadcast_to(together, len(NAMES)))


PLAIN = [[0.2, 0.6], [0.4, 0.1], [0.6, 0.3]]


def test_maps_of_heads_that_read_images_sum_to_one_over_each() -> None:
    first, second = maps(3, 4, False), maps(3, 6, False)
    joined = mean_of_maps([part(PLAIN, first, 1.0), part(PLAIN, second, 3.0)], np.full(3, 1 / 3))
    assert [one.shape for one in joined] == [(2, 6, 6)] * 3
    for one in joined:
        np.testing.assert_allclose(one.sum(axis=(1, 2)), 1)
    only = mean_of_maps([part(PLAIN, first), part(PLAIN, second, 0.0)], np.full(3, 1 / 3))
    np.testing.assert_array_equal(np.stack(only), first)


def test_the_share_of_each_view_is_kept() -> None:
    """Of a head that looks at whole studies, on its own grid and on a finer one."""
    found = maps(3, 4, True)
    [alone] = [np.stack(mean_of_maps([part(PLAIN, found, together=True)], np.full(3, 1 / 3)))]
    np.testing.assert_allclose(alone.sum(axis=(2, 3)), found.sum(axis=(2, 3)))
    weights = np.array([0.5, 0.3, 0.2])
    mixed = np.stack(mean_of_maps([part(PLAIN, found, together=True), part(PLAIN, maps(3, 7, False))], weights))
    np.testing.assert_allclose(mixed.sum(axis=(0, 2, 3)), 1)
    np.testing.assert_allclose(mixed.sum(axis=(2, 3)), (found.sum(axis=(2, 3)) + weights[:, None]) / 2)


def test_findings_that_a_network_never_learned_are_the_others() -> None:
    half = [[0.2, np.nan], [0.4, np.nan]]
    first, second = maps(2, 3, False), maps(2, 3, False)
    joined = np.stack(mean_of_maps([part(half, first), part(PLAIN[:2], second)], np.full(2, 0.5)))
    np.testing.assert_allclose(joined[:, 1], second[:, 1])
    np.testing.assert_allclose(joined[:, 0], (first[:, 0] + second[:, 0]) / 2)
    nobody = np.stack(mean_of_maps([part(half, first)], np.full(2, 0.5)))
    assert np.isnan(nobody[:, 1]).all()
    assert mean_of_maps([part(half, None)], np.full(2, 0.5)) == []


def test_contributions_of_averaging_rules_are_weighted_probabilities() -> None:
    weights = np.array([0.5, 0.3, 0.2])
    found = contributions(NAMES, [part(PLAIN, None)], weights)
    expected = weights * np.array([0.2, 0.4, 0.6])
    assert found["Edema"] == pytest.approx((expected / expected.sum()).tolist())
    zero = contributions(NAMES, [part([[0.0, 0.1], [0.0, 0.1]], None)], np.array([0.7, 0.3]))
    assert zero["Edema"] == pytest.approx([0.7, 0.3])  # nothing to share: as the rule weighs views


def test_contributions_of_heads_that_look_at_studies_are_their_attention() -> None:
    found = maps(2, 4, True)
    study = part(PLAIN[:2], found, together=True)
    said = contributions(NAMES, [study], np.full(2, 0.5))
    assert said["Mass"] == pytest.approx(found[:, 1].sum(axis=(1, 2)).tolist())
    both = contributions(NAMES, [study, part(PLAIN[:2], None, 3.0)], np.full(2, 0.5))
    assert both["Edema"] == pytest.approx(
        ((found[:, 0].sum(axis=(1, 2)) + 3 * np.array([0.2, 0.4]) / 0.6) / 4).tolist()
    )
    without = contributions(NAMES, [part(PLAIN[:2], None, together=True)], np.full(2, 0.5))
    assert without == {"Edema": None, "Mass": None}


def test_a_head_that_looks_at_studies_changes_nothing_of_one_beside_it() -> None:
    """A network extended by such a head: Edema is read image by image, Mass over the study."""
    apart, over = maps(3, 4, False), maps(3, 4, True)
    weights, mixed = np.array([0.5, 0.3, 0.2]), np.stack([apart[:, 0], over[:, 1]], axis=1)
    extended = part(PLAIN, mixed, together=[False, True])
    said = contributions(NAMES, [extended], weights)
    assert said["Edema"] == contributions(NAMES, [part(PLAIN, None)], weights)["Edema"]
    assert said["Mass"] == pytest.approx(over[:, 1].sum(axis=(1, 2)).tolist())
    unseen = contributions(NAMES, [part(PLAIN, None, together=[False, True])], weights)
    assert unseen == {"Edema": said["Edema"], "Mass": None}
    joined = np.stack(mean_of_maps([extended], weights))
    np.testing.assert_allclose(joined.sum(axis=(2, 3))[:, 0], weights)
    np.testing.assert_allclose(joined[:, 1], over[:, 1])


def test_contributions_add_up_to_one_and_untrained_findings_have_none() -> None:
    half = [[0.2, np.nan], [0.4, np.nan]]
    assert contributions(NAMES, [part(half, None)], np.full(2, 0.5))["Mass"] is None
    both = contributions(NAMES, [part(half, None), part(PLAIN[:2], maps(2, 3, True), 2.0, True)], np.full(2, 0.5))
    for shares in both.values():
        assert sum(shares) == pytest.approx(1)


def test_a_network_without_maps_leaves_them_to_the_others() -> None:
    found, nothing = maps(2, 3, True), np.full((2, 2, 3, 3), np.nan)
    parts = [part(PLAIN[:2], found, together=True), part(PLAIN[:2], nothing, together=True)]
    np.testing.assert_allclose(np.stack(mean_of_maps(parts, np.full(2, 0.5))), found)
    said = contributions(NAMES, parts, np.full(2, 0.5))
    assert said["Mass"] == pytest.approx(found[:, 1].sum(axis=(1, 2)).tolist())
    assert contributions(NAMES, parts[1:], np.full(2, 0.5)) == {"Edema": None, "Mass": None}
