"""Views that are no upright chest X-ray take no part in a study, in Python as on the command line."""

from pathlib import Path

import numpy as np
import pytest
import strangers

from hilum.deploy.admission import Flagged, Gate, RawReading
from hilum.deploy.gradients import gradient_map
from hilum.deploy.predictor import Model, load
from hilum.deploy.screening import Flag, Screening, fit_screening
from hilum.deploy.study_images import study_embedding


@pytest.fixture(scope="module")
def screening() -> Screening:
    rng = np.random.default_rng(0)
    maps = np.stack([gradient_map(strangers.film(rng, bool(n % 2))) for n in range(160)])
    views = ["PA", "LATERAL"] * 80
    found = fit_screening(maps[:120], views[:120], [str(n) for n in range(120)], maps[120:], views[120:])
    assert found is not None
    return found


@pytest.fixture(params=["linear", "decoder", "ensemble"])
def model(request, fitted: Path, screening: Screening) -> Model:
    loaded = load(fitted / request.param, "cpu")
    assert loaded.screening is None  # of 40 images nothing is known
    loaded.screening = screening
    return loaded


def film(seed: int, lateral: bool = False) -> np.ndarray:
    return strangers.film(np.random.default_rng(seed), lateral)


def hand(seed: int = 0) -> np.ndarray:
    return strangers.hand(np.random.default_rng(seed), film(0))


def test_a_stranger_changes_nothing_for_the_others(model: Model) -> None:
    alone = model.predict([film(1), film(2, True)])
    among = model.predict([film(1), hand(), film(2, True)])
    assert among.probabilities == alone.probabilities
    assert among.scored == [True, False, True]
    assert [[flag.code for flag in flags] for flags in among.image_flags] == [[], ["not_a_chest_xray"], []]
    assert among.image_probabilities[1] == dict.fromkeys(model.findings)
    assert [among.image_probabilities[0], among.image_probabilities[2]] == alone.image_probabilities
    assert among.view_weights == [alone.view_weights[0], 0.0, alone.view_weights[1]]
    assert len(among.boxes) == len(among.quality) == 3
    np.testing.assert_array_equal(among.embedding, alone.embedding)
    for name in model.findings:
        shares, maps = among.contributions[name], among.attention[name]
        assert shares is None or (shares[1] == 0 and sum(shares) == pytest.approx(1))
        assert maps is None or (len(maps) == 3 and not maps[1].any() and maps[0].shape == maps[1].shape)


def test_a_study_of_strangers_is_withheld(model: Model) -> None:
    result = model.predict([hand(1), hand(2)])
    nothing = dict.fromkeys(model.findings)
    assert result.probabilities == result.contributions == result.attention == nothing
    assert result.image_probabilities == [nothing, nothing]
    assert (result.scored, result.view_weights, result.embedding) == ([False, False], [0.0, 0.0], None)
    assert set(result.thresholds) == set(model.findings)


def test_flagged_views_are_scored_on_request_alone(model: Model) -> None:
    negative = 255 - film(3)
    assert model.predict(negative).scored == [False]
    scored = model.predict(negative, score_flagged=True)
    assert (scored.scored, scored.image_flags[0][0].code) == ([True], "inverted")
    back = model.predict(negative, correct_inverted=True)
    assert back.probabilities == model.predict(film(3)).probabilities
    assert "exchanged back before it was scored" in back.image_flags[0][0].message
    lying = strangers.turned_left(np.random.default_rng(0), film(3))
    assert model.predict(lying, correct_inverted=True).scored == [False]  # turned is not inverted


def test_views_are_named_where_nobody_says(model: Model) -> None:
    result = model.predict([film(1), film(2, True), film(3), hand()], view_names=["", "", "AP", ""])
    assert result.views == ["PA", "LATERAL", "AP", "UNKNOWN"]
    assert result.view_sources == ["classifier", "classifier", "given", "unknown"]
    model.screening = None
    bare = model.predict([film(1)])
    assert (bare.views, bare.view_sources, bare.scored) == (["UNKNOWN"], ["unknown"], [True])
    assert bare.image_flags[0][0].code == "not_screened"


def test_the_embedding_of_a_study_is_a_direction(model: Model) -> None:
    rng = np.random.default_rng(0)
    cls = rng.normal(size=(3, 7)).astype(np.float32)
    expected = sum(row / np.sqrt((row.astype(float) ** 2).sum()) for row in cls)
    np.testing.assert_allclose(study_embedding(cls), expected / np.sqrt((expected**2).sum()), rtol=1e-6)
    scaled = study_embedding(cls * np.array([[1], [5], [0.1]], np.float32))
    np.testing.assert_allclose(scaled, study_embedding(cls), atol=1e-6)
    found = model.predict([film(1), film(2)]).embedding
    assert found is not None
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(found, model.predict([film(2), film(1)]).embedding, atol=1e-6)


def test_a_gate_without_screening_flags_everything_and_withholds_nothing() -> None:
    found = Gate(None).admit(film(1), "PA", "header")
    assert found.pixels is not None
    assert (found.view, found.view_source, [flag.code for flag in found.flags]) == ("PA", "header", ["not_screened"])


def test_readings_of_parts_are_one_reading_whatever_their_order() -> None:
    flag = Flag("turned", "")
    one = RawReading(
        np.array([4, 5]), [np.array([[0.4], [0.5]])], np.array(["PA", "AP"]), np.array(["given", "header"]),
        [Flagged(6, flag, False)],
    )  # fmt: skip
    two = RawReading(
        np.array([1]), [np.array([[0.1]])], np.array(["LATERAL"]), np.array(["unknown"]), [Flagged(0, flag, True)]
    )
    for parts in ([one, two], [two, one]):
        joined = RawReading.join(parts)
        assert joined.kept.tolist() == [1, 4, 5]
        assert joined.probabilities[0].ravel().tolist() == [0.1, 0.4, 0.5]
        assert joined.views.tolist() == ["LATERAL", "PA", "AP"]
        assert joined.view_sources.tolist() == ["unknown", "given", "header"]  # type: ignore[union-attr]
        assert [one.position for one in joined.flagged] == [0, 6]
