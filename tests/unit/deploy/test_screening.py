"""Pictures of another kind are told from X-rays, upright ones from inverted and turned ones, views from each other."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import strangers
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from hilum.core.errors import CheckpointError
from hilum.data.transforms import evaluation_crop
from hilum.deploy import screening as module
from hilum.deploy.gradients import TURNS, gradient_map, turned
from hilum.deploy.screening import Screening, fit_screening, read_screening, write_screening
from hilum.deploy.view_classifier import SHRINKAGE, fit_views

COUNT = 140


def maps_of(images) -> np.ndarray:
    return np.stack([gradient_map(image) for image in images])


@pytest.fixture(scope="module")
def films() -> list[np.ndarray]:
    """Frontal ones, then as many lateral ones."""
    rng = np.random.default_rng(0)
    return [strangers.film(rng, lateral) for lateral in (False, True) for _ in range(COUNT)]


@pytest.fixture(scope="module")
def fitted(films) -> Screening:
    train = np.r_[0:120, COUNT : COUNT + 120]
    val = np.setdiff1d(np.arange(2 * COUNT), train)
    views = np.repeat(["PA", "LATERAL"], COUNT)
    maps = maps_of(films)
    found = fit_screening(
        maps[train], views[train].tolist(), [f"p{n // 2}" for n in train], maps[val], views[val].tolist()
    )
    assert found is not None
    return found


def test_the_map_is_a_histogram_of_gradients() -> None:
    """Against loops over pixels."""
    picture = strangers.film(np.random.default_rng(3))
    square = evaluation_crop(picture, 64).astype(float)
    at = np.pad(square, 1, mode="edge")
    sums = np.zeros((4, 4, 8))
    for row in range(64):
        for column in range(64):
            across = at[row + 1, column + 2] - at[row + 1, column]
            down = at[row + 2, column + 1] - at[row, column + 1]
            place = (np.degrees(np.arctan2(down, across)) % 360) / 45
            low = int(place)
            strength = np.sqrt(across**2 + down**2) / square.std()
            sums[row // 16, column // 16, low % 8] += strength * (1 - (place - low))
            sums[row // 16, column // 16, (low + 1) % 8] += strength * (place - low)
    np.testing.assert_allclose(gradient_map(picture), np.log(sums.ravel() / 256 + 0.02), atol=1e-9)


@pytest.mark.parametrize(
    ("turn", "lay"),
    [
        ("inverted", strangers.inverted), ("a quarter to the left", strangers.turned_left),
        ("a quarter to the right", strangers.turned_right), ("upside down", strangers.upside_down),
    ],
)  # fmt: skip
def test_a_picture_need_not_be_turned_to_know_how_it_would_look(turn: str, lay) -> None:
    picture = strangers.film(np.random.default_rng(1))
    lying = maps_of([lay(np.random.default_rng(0), picture)])
    rounding = 0.05 if turn == "inverted" else 1e-9  # halves are rounded to even, also when they are inverted
    np.testing.assert_allclose(turned(lying, turn)[0], gradient_map(picture), rtol=0, atol=rounding)
    assert not np.allclose(lying[0], gradient_map(picture), atol=0.1)


def test_brightness_and_contrast_say_nothing() -> None:
    picture = strangers.film(np.random.default_rng(2))
    dimmed = (picture.astype(float) / 2 + 40).round().astype(np.uint8)
    assert np.abs(gradient_map(dimmed) - gradient_map(picture)).max() < 0.2  # rounding to grey levels


def test_distances_are_those_of_a_principal_component_model(films, fitted: Screening) -> None:
    maps = maps_of(films)
    train = maps[:120]
    standard = (train - train.mean(axis=0)) / (train.std(axis=0) + 1e-6)
    _, sizes, directions = np.linalg.svd(standard, full_matrices=False)
    variances = sizes**2 / len(train)
    kept = variances[:30] + 0.1 * variances[:30].mean()  # 120 images hold a quarter as many directions
    other = (maps[COUNT - 5 :] - train.mean(axis=0)) / (train.std(axis=0) + 1e-6)
    along = other @ directions[:30].T
    left = (other**2).sum(axis=1) - (along**2).sum(axis=1)
    expected = np.log((along**2 / kept).mean(axis=1) + left / variances[30:].sum())
    np.testing.assert_allclose(fitted.gaussians[0].distance(maps[COUNT - 5 :]), expected, rtol=1e-6)


def test_upright_films_pass_and_strangers_do_not(fitted: Screening) -> None:
    rng = np.random.default_rng(7)
    upright = [strangers.film(rng, bool(n % 2)) for n in range(60)]
    passed = fitted.judge(maps_of(upright))
    assert sum(one.flag is not None for one in passed) <= 2
    for name, kind in strangers.KINDS.items():
        judged = fitted.judge(maps_of([kind(rng, upright[n]) for n in range(6)]))
        assert sum(one.flag is not None for one in judged) == 6, name


def test_what_is_inverted_or_turned_is_called_so(fitted: Screening) -> None:
    rng = np.random.default_rng(8)
    upright = [strangers.film(rng) for _ in range(20)]
    for kind, code in (
        (strangers.inverted, "inverted"), (strangers.turned_left, "turned"), (strangers.upside_down, "turned"),
    ):  # fmt: skip
        judged = fitted.judge(maps_of([kind(rng, one) for one in upright]))
        assert Counter(one.flag.code for one in judged if one.flag)[code] >= 19
    message = fitted.judge(maps_of([strangers.upside_down(rng, upright[0])]))[0].flag
    assert message is not None
    assert "upside down" in message.message


def test_the_threshold_is_of_patients_left_out(films) -> None:
    """Five equal pictures of a patient do not hold the threshold down."""
    maps = np.repeat(maps_of(films[:40]), 5, axis=0)
    views = ["PA"] * len(maps)
    by_patient = fit_screening(maps, views, [f"p{n // 5}" for n in range(200)], maps[:0], [])
    by_image = fit_screening(maps, views, [f"p{n}" for n in range(200)], maps[:0], [])
    assert by_patient is not None
    assert by_image is not None
    assert by_patient.threshold > by_image.threshold
    assert by_patient.record.false_flags is None


def test_false_flags_are_those_of_every_kind(films) -> None:
    maps, names = maps_of(films[:120]), [str(n) for n in range(120)]
    rng = np.random.default_rng(8)
    inverted = maps_of([strangers.inverted(rng, strangers.film(rng)) for _ in range(20)])
    found = fit_screening(maps, ["PA"] * 120, names, inverted, ["PA"] * 20)
    assert found is not None
    judged = found.judge(inverted)
    assert found.record.false_flags == sum(one.flag is not None for one in judged) / 20
    assert found.record.false_flags >= 0.9


def test_too_few_images_are_not_screened(films) -> None:
    maps = maps_of(films[:99])
    assert fit_screening(maps, ["PA"] * 99, [str(n) for n in range(99)], maps[:5], ["PA"] * 5) is None


def test_a_kind_that_is_rare_has_no_gaussian_of_its_own(films) -> None:
    maps = maps_of(films[:160])
    views = ["PA"] * 120 + ["LATERAL"] * 39 + ["OTHER"]
    found = fit_screening(maps, views, [str(n) for n in range(160)], maps[:5], views[:5])
    assert found is not None
    assert found.record.groups == {"frontal": 160}


def test_written_and_read(fitted: Screening, films, tmp_path: Path) -> None:
    entry = write_screening(tmp_path, fitted)
    assert entry["images"] == 240
    assert entry["groups"] == {"frontal": 120, "lateral": 120}
    assert entry["false_flags"] <= 0.03
    again = read_screening(tmp_path, {"screening": entry})
    assert again is not None
    assert again.record == fitted.record
    maps = maps_of(films[::20])
    assert again.judge(maps) == fitted.judge(maps)
    assert again.views is not None
    assert again.views.name(maps) == fitted.views.name(maps)  # type: ignore[union-attr]
    assert read_screening(tmp_path, {}) is None


def test_a_damaged_file_is_refused(fitted: Screening, tmp_path: Path) -> None:
    entry = write_screening(tmp_path, fitted)
    file = tmp_path / module.SCREENING_NAME
    whole = file.read_bytes()
    file.write_bytes(whole[:-200])
    with pytest.raises(CheckpointError, match="Copy the model again"):
        read_screening(tmp_path, {"screening": entry})
    file.unlink()
    with pytest.raises(CheckpointError, match=r"screening\.npz cannot be read"):
        read_screening(tmp_path, {"screening": entry})
    file.write_bytes(whole)
    with pytest.raises(CheckpointError):
        read_screening(tmp_path, {"screening": {**entry, "format": "hilum-screening-9"}})
    with pytest.raises(CheckpointError):
        read_screening(tmp_path, {"screening": "yes"})


def test_views_are_linear_discriminants(films) -> None:
    """Against scikit-learn's, on standardised maps and kinds of equal size."""
    maps = maps_of(films)
    kinds = np.repeat([0, 2], COUNT)
    found = fit_views(maps, kinds)
    assert found is not None
    standard = (maps - maps.mean(axis=0)) / (maps.std(axis=0) + 1e-6)
    centred = standard - np.repeat([standard[:COUNT].mean(axis=0), standard[COUNT:].mean(axis=0)], COUNT, axis=0)
    oracle = LinearDiscriminantAnalysis(
        solver="lsqr", covariance_estimator=_Shrunk(np.cov(centred.T, bias=True))
    ).fit(standard, kinds)  # fmt: skip
    np.testing.assert_allclose(found.probabilities(maps), oracle.predict_proba(standard), atol=1e-6)


class _Shrunk:
    """The pooled covariance, shrunk as written down in Ledoit and Wolf 2004, whatever the class."""

    def __init__(self, pooled: np.ndarray) -> None:
        size = len(pooled)
        self.covariance_ = (1 - SHRINKAGE) * pooled + SHRINKAGE * np.trace(pooled) / size * np.eye(size)

    def fit(self, _) -> "_Shrunk":
        return self


def test_views_are_named_where_it_is_sure(fitted: Screening) -> None:
    rng = np.random.default_rng(9)
    assert fitted.views is not None
    named = fitted.views.name(maps_of([strangers.film(rng, bool(n % 2)) for n in range(40)]))
    assert [named[0], named[1]] == ["PA", "LATERAL"]
    assert Counter(named) == {"PA": 20, "LATERAL": 20}
    middle = (fitted.gaussians[0].mean + fitted.gaussians[1].mean) / 2
    weights = fitted.views.weights[:, 0] - fitted.views.weights[:, 1]
    gap = middle @ weights + fitted.views.biases[0] - fitted.views.biases[1]
    between = middle - weights * gap / (weights @ weights)
    assert fitted.views.name(between[None]) == ["UNKNOWN"]
    assert fitted.record.views is not None
    assert fitted.record.views["right"] == 1.0


def test_one_kind_of_view_is_no_question(films) -> None:
    assert fit_views(maps_of(films[:50]), np.zeros(50, np.int64)) is None
    kinds = np.repeat([0, 3], 25)  # "other" is not a view
    assert fit_views(maps_of(films[:50]), kinds) is None


def test_every_turn_has_a_name_for_people() -> None:
    assert set(TURNS) == {
        "as it is", "inverted", "a quarter to the left", "upside down", "a quarter to the right",
    }  # fmt: skip
