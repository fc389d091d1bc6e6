import dataclasses

import numpy as np
import pytest

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.evaluation.composition import Composition, ranks_of
from hilum.evaluation.ensemble import ENSEMBLES
from hilum.evaluation.normal_damping import Damping
from hilum.evaluation.studies import study_uids
from hilum.evaluation.study_rules import StudyRule


def members(made_up):
    table = dataclasses.replace(made_up()[0], findings=("Edema", "Normal", "Support Devices", "Mass"))
    rng = np.random.default_rng(5)
    return [table.replace(rng.random(table.probabilities.shape), model=f"m{number}") for number in range(3)]


def test_studies_then_models_then_damping_and_not_otherwise(made_up):
    tables = members(made_up)
    composition = Composition(StudyRule("frontal_weighted"), "mean", (2.0, 1.0, 1.0), Damping("power", 2.0))
    result = composition.apply(tables, "study")
    first = tables[0]
    uids = study_uids(first.dataset, first.patient_id, first.study_id, first.image_uid)
    for row, uid in enumerate(result.image_uid.tolist()):
        mine = np.flatnonzero(uids == uid)
        frontal, rest = (mine[(first.view[mine] == "PA") == kind] for kind in (True, False))
        models = []
        for table in tables:
            means = [table.probabilities[group].mean(axis=0) for group in (frontal, rest) if len(group)]
            models.append(0.8 * means[0] + 0.2 * means[1] if len(means) == 2 else means[0])
        mean = (2 * models[0] + models[1] + models[2]) / 4
        factors = np.array([(1 - mean[1]) ** 2, 1, 1, (1 - mean[1]) ** 2])
        np.testing.assert_allclose(result.probabilities[row], mean * factors, atol=1e-14)
    assert (result.stage, result.unit) == ("ensemble", "study")
    by_image = composition.apply(tables)
    mean = (2 * tables[0].probabilities + tables[1].probabilities + tables[2].probabilities) / 4
    np.testing.assert_allclose(by_image.probabilities[:, 1:3], mean[:, 1:3], atol=1e-15)
    np.testing.assert_allclose(by_image.probabilities[:, 0], mean[:, 0] * (1 - mean[:, 1]) ** 2, atol=1e-14)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("unit", ["image", "study"])
def test_company_and_order_do_not_matter(made_up, ensemble, unit):
    tables = members(made_up)
    study = StudyRule("frontal_weighted")
    composition = Composition(study, ensemble, (0.2, 0.3, 0.5), Damping(), ranks_of(tables, study))
    whole = composition.apply(tables, unit)
    patients = np.isin(tables[0].patient_id, ["d/p0", "d/p1", "d/p2"])
    part = composition.apply([table.rows(np.flatnonzero(patients)[::-1]) for table in tables], unit)
    rows = [whole.image_uid.tolist().index(uid) for uid in part.image_uid.tolist()]
    np.testing.assert_array_equal(part.probabilities, whole.probabilities[rows])
    turned = dataclasses.replace(
        composition, weights=composition.weights[::-1],
        ranks={name: values[::-1] for name, values in composition.ranks.items()},
    )  # fmt: skip
    np.testing.assert_array_equal(turned.apply(tables[::-1], unit).probabilities, whole.probabilities)


def test_one_member_passes_through(made_up):
    table = members(made_up)[0]
    for ensemble in ENSEMBLES:
        result = Composition(ensemble=ensemble).apply([table])
        np.testing.assert_array_equal(result.probabilities, table.probabilities)
        assert result.stage == "raw"


def test_description_and_back():
    made = Composition(StudyRule.parse("frontal_weighted:0.7"), "rank_mean", (1.0, 0.25), Damping("linear", 0.3))
    assert Composition.read(made.describe()) == made
    assert Composition.read({}) == Composition()
    assert Composition.read({"study": "mean", "weights": {"file": "model.safetensors"}}) == Composition()


def test_what_is_incomplete_is_refused(made_up):
    tables = members(made_up)
    with pytest.raises(ConfigError, match="mean of ranks needs to know"):
        Composition(ensemble="rank_mean").apply(tables)
    with pytest.raises(ConfigError, match="ensemble of 2 needs"):
        Composition(weights=(1.0, 1.0, 1.0)).apply(tables[:2])
    with pytest.raises(ConfigError, match="no weights yet"):
        Composition(StudyRule("learned")).apply(tables, "study")
    with pytest.raises(UnknownNameError, match="patient"):
        Composition().apply(tables, "patient")
    with pytest.raises(UnknownNameError, match="median"):
        Composition(ensemble="median")
    with pytest.raises(ConfigError, match="at least 0"):
        Composition(weights=(-1.0, 2.0))
