"""Models and ensembles that obey a study rule, weights, ranks and damping: made, read, applied, refused."""

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import save_backbone
from hilum.commands import combine, evaluate, fit, predict
from hilum.commands import combine_models as program
from hilum.core.errors import CheckpointError, ConfigError, PredictionError, StageError, UnknownNameError
from hilum.core.seeding import forked
from hilum.data.store import Store, write_arrays
from hilum.deploy import model_files as files
from hilum.deploy.ensemble_model import combine_models, inherited
from hilum.deploy.network import Reading
from hilum.deploy.predictor import Model, load
from hilum.evaluation.calibration import Calibrator
from hilum.evaluation.composition import Composition
from hilum.evaluation.ensemble import combine_members
from hilum.evaluation.ensemble_search import Plan
from hilum.evaluation.normal_damping import Damping
from hilum.evaluation.predictions import read_predictions
from hilum.evaluation.ranks import Ranks
from hilum.evaluation.studies import aggregate_studies
from hilum.evaluation.study_rules import AGGREGATIONS, StudyRule
from hilum.heads.config import FitConfig

FINDINGS = ("Edema", "Normal", "Support Devices")
FRONTAL = StudyRule("frontal_weighted")


@pytest.fixture(scope="module")
def trio(tmp_path_factory) -> Path:
    """`store` with two views a study, and the models `a`, `b`, `c` at 16, 24 and 32 pixels."""
    path = tmp_path_factory.mktemp("composed")
    rng = np.random.default_rng(1)
    labels = np.repeat((rng.random((42, 3)) < 0.45).astype(np.int8), 2, axis=0)
    labels[:, 1] = 1 - labels[:, 0]
    images = [rng.integers(0, 120, (26, 24), np.uint8) + np.uint8(80 * int(y)) for y in labels[:, 0]]
    write_arrays(
        path / "store", images, labels, FINDINGS, splits=["train"] * 44 + ["val"] * 28 + ["test"] * 12,
        studies=[f"arrays/s{n // 2}" for n in range(84)], patients=[f"arrays/p{n // 4}" for n in range(84)],
        views=["PA", "LATERAL"] * 42,
    )  # fmt: skip
    with forked(0, "test"):
        backbone = VisionTransformer(ViTConfig(12, 2, 2, patch_size=8, image_size=16, layer_scale=0.5))
    save_backbone(backbone, path / "run", "hilum-grey-1")
    for name, resolution in (("a", 16), ("b", 24), ("c", 32)):
        config = FitConfig(
            head="linear", resolution=resolution, blocks=2, learning_rates=(1e-2,), search_epochs=2, refit_epochs=2,
            batch_size=16, threads=1, workers=1, augmented_views=1,
        )  # fmt: skip
        fit.run(config, path / "store", path / "run", path / name, device="cpu")
    return path


def raw(path: Path, store: Store, indices=range(72, 84)) -> list:
    return [load(path / name, "cpu").predict_store(store, indices, raw=True) for name in ("a", "b", "c")]


def validations(path: Path):
    found = [files.read_validation(path / name) for name in ("a", "b", "c")]
    return [predictions for predictions, _ in found], found[0][1]


def members(trio: Path) -> list[Path]:
    return [trio / name for name in ("a", "b", "c")]


@pytest.mark.parametrize("ensemble", ["mean", "logit_mean", "rank_mean"])
def test_an_ensemble_is_its_rules_and_calibrators_written_out(trio: Path, tmp_path: Path, ensemble: str) -> None:
    store = Store.open(trio / "store")
    composition = Composition(FRONTAL, ensemble, (2.0, 1.0, 0.5), Damping("power", 0.5))
    combine_models(members(trio), tmp_path / "out", composition)
    model = load(tmp_path / "out", "cpu")
    assert model.composition.describe() == composition.describe()

    known, labels = validations(trio)
    for unit in ("image", "study"):
        tables, fitted = raw(trio, store), known
        if unit == "study":
            tables = [aggregate_studies(one, FRONTAL, "study") for one in tables]
            fitted = [aggregate_studies(one, FRONTAL, "study") for one in fitted]
        ranks = [Ranks.of(one) for one in fitted] if ensemble == "rank_mean" else None
        together = combine_members(tables, ensemble, (2.0, 1.0, 0.5), ranks).probabilities
        normal = together[:, [1]]
        expected = together * np.hstack([(1 - normal) ** 0.5, np.ones_like(normal), np.ones_like(normal)])
        found = model.predict_store(store, range(72, 84), raw=True, unit=unit)
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-12)
        assert found.metadata["normal_damping"] == "power:0.5"

        before = combine_members(fitted, ensemble, (2.0, 1.0, 0.5), ranks).probabilities
        before = before * np.hstack([(1 - before[:, [1]]) ** 0.5, np.ones((len(before), 2))])
        truth = labels if unit == "image" else labels[::2][np.argsort(fitted_order(known[0]))]
        calibrator = Calibrator.fit(
            before, truth, FINDINGS, groups=model.groups, stage="ensemble", unit=unit
        )  # fitted at the stage at which it is applied, with the same rules
        assert model.calibrators[unit].maps == calibrator.maps
        np.testing.assert_allclose(
            model.predict_store(store, range(72, 84), unit=unit).probabilities, calibrator.apply(expected), atol=1e-12
        )


def fitted_order(validation) -> np.ndarray:
    """Where each study of validation, in the order of its first image, stands among the study rows."""
    rows = aggregate_studies(validation, "mean", "study")
    place = {study: number for number, study in enumerate(rows.study_id.tolist())}
    return np.array([place[study] for study in validation.study_id[::2].tolist()])


def test_one_model_may_get_another_study_rule_and_nothing_else_changes(trio: Path, tmp_path: Path) -> None:
    store = Store.open(trio / "store")
    program.run([trio / "a"], tmp_path / "out", study="frontal_weighted:0.9")
    before, after = load(trio / "a", "cpu"), load(tmp_path / "out", "cpu")
    assert str(after.composition.study) == "frontal_weighted:0.9"
    assert before.composition == Composition()
    np.testing.assert_array_equal(
        after.predict_store(store, range(72, 84)).probabilities,
        before.predict_store(store, range(72, 84)).probabilities,
    )
    known, _ = validations(trio)
    expected = aggregate_studies(before.predict_store(store, range(72, 84), raw=True), "frontal_weighted:0.9", "study")
    found = after.predict_store(store, range(72, 84), raw=True, unit="study")
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)
    assert found.metadata["study_aggregation"] == "frontal_weighted:0.9"
    assert after.calibrators["study"].fitted_on["items"] == len(known[0]) // 2
    with pytest.raises(ConfigError, match="two or more different"):
        program.run([trio / "a"], tmp_path / "other", study="mean")
    with pytest.raises(ConfigError, match="two or more different"):
        program.run([trio / "a"], tmp_path / "other", choose=True)
    program.run([trio / "a"], tmp_path / "other", choose=True, study="choose")
    assert {one["study"].partition(":")[0] for one in files.read_config(tmp_path / "other")["choice"]["tried"]} == set(
        AGGREGATIONS
    )


def test_a_study_in_python_weighs_its_views_and_says_so(trio: Path, tmp_path: Path) -> None:
    store = Store.open(trio / "store")
    combine_models([trio / "a", trio / "b"], tmp_path / "out", Composition(FRONTAL))
    model = load(tmp_path / "out", "cpu")
    views = [store.read(72), store.read(73)]
    for is_raw in (True, False):
        table = model.predict_store(store, [72, 73], raw=is_raw, unit="study")
        for order in ([0, 1], [1, 0]):
            result = model.predict(
                [views[place] for place in order], raw=is_raw, view_names=[("PA", "LATERAL")[place] for place in order]
            )
            assert list(result.probabilities.values()) == pytest.approx(table.probabilities[0].tolist(), abs=1e-9)
            assert result.view_weights == pytest.approx([(0.8, 0.2)[place] for place in order], abs=1e-12)
    unknown = model.predict(views)
    assert unknown.view_weights == pytest.approx([0.5, 0.5])
    assert model.predict(views[0]).view_weights == [1.0]
    assert unknown.probabilities != result.probabilities
    with pytest.raises(ConfigError, match="expected 2, one for each"):
        model.predict(views, view_names=["PA"])
    with pytest.raises(UnknownNameError, match="Did you mean 'LATERAL'"):
        model.predict(views, view_names=["PA", "LATERL"])


def test_a_head_that_looks_at_whole_studies_gets_them_with_their_views(trio: Path, tmp_path: Path) -> None:
    store = Store.open(trio / "store")
    config = FitConfig(
        head="linear", views="set", resolution=16, blocks=2, learning_rates=(1e-2,), search_epochs=1, refit_epochs=1,
        batch_size=16, threads=1, workers=1, augmented_views=1,
    )  # fmt: skip
    fit.run(config, trio / "store", trio / "run", tmp_path / "set", device="cpu")
    model = load(tmp_path / "set", "cpu")
    table = model.predict_store(store, [72, 73], raw=True)
    views = [store.read(72), store.read(73)]
    result = model.predict(views, raw=True, view_names=["PA", "LATERAL"])
    for row, found in zip(table.probabilities, result.image_probabilities, strict=True):
        assert list(found.values()) == pytest.approx(row.tolist(), abs=1e-6)
    alone = model.predict_store(store, [72], raw=True)  # its sibling matters
    assert np.abs(alone.probabilities[0] - table.probabilities[0]).max() > 1e-5
    others = model.predict_store(store, range(72, 84), raw=True)  # other studies do not
    np.testing.assert_allclose(others.probabilities[:2], table.probabilities, atol=1e-6)
    unnamed = model.predict(views, raw=True)  # and so do views
    assert unnamed.image_probabilities[0] != pytest.approx(result.image_probabilities[0], abs=1e-5)


def test_weights_of_views_are_fitted_on_validation_and_recorded(trio: Path, tmp_path: Path, capsys) -> None:
    program.run(members(trio), tmp_path / "out", study="learned")
    content = files.read_config(tmp_path / "out")
    rule = StudyRule.parse(content["study"])
    assert rule.name == "learned"
    assert not rule.needs_fit
    assert content["learned_views"]["rule"] == content["study"]
    assert content["fitted_on"]["split"] == "val"
    assert "Views weigh learned:PA=" in capsys.readouterr().out
    assert load(tmp_path / "out").composition.study == rule


def test_the_best_ensemble_is_found_and_its_command_printed(trio: Path, tmp_path: Path, capsys) -> None:
    program.run(members(trio), tmp_path / "out", choose=True, study="choose", normal_damping="choose")
    printed = capsys.readouterr().out
    content = files.read_config(tmp_path / "out")
    choice = content["choice"]
    assert choice["members"] == [member["path"] for member in content["members"]]
    assert len(choice["singles"]) == 3
    assert choice["score"] >= max(choice["singles"].values()) - 1e-6
    assert f"Next: hilum predict {tmp_path / 'out'} STORE:test" in printed
    assert "validation mAP" in printed
    for key in ("study", "ensemble", "member_weights", "normal_damping"):
        assert key in content
    model = load(tmp_path / "out", "cpu")
    assert len(model.networks) == len(choice["members"])
    assert model.predict_store(Store.open(trio / "store"), range(72, 84)).stage == "calibrated"


def test_a_chosen_member_that_is_not_the_first_keeps_its_labels(trio: Path, tmp_path: Path) -> None:
    """Rows and columns are the first member's: leaving it out must not leave its order behind."""
    known, labels = validations(trio)
    shutil.copytree(trio / "a", tmp_path / "a")
    order = np.random.default_rng(0).permutation(len(labels))
    noise = known[0].replace(np.random.default_rng(3).random(known[0].probabilities.shape)).rows(order)
    turned = noise.select(("Support Devices", "Edema", "Normal"))
    columns = [FINDINGS.index(name) for name in turned.findings]
    files.write_validation(tmp_path / "a", turned, labels[order][:, columns])
    shutil.copytree(trio / "b", tmp_path / "b")
    perfect = known[1].replace(np.where(labels == 1, 0.9, 0.1) + 0.05 * known[1].probabilities)
    files.write_validation(tmp_path / "b", perfect, labels)
    made = combine_models([tmp_path / "a", tmp_path / "b"], tmp_path / "out", plan=Plan())
    assert [member["path"] for member in made.content["members"]] == ["../b"]
    assert made.choice.score == pytest.approx(1.0)
    calibrator = Calibrator.from_dict(made.content["calibration"]["image"])
    expected = Calibrator.fit(perfect.probabilities, labels, FINDINGS, groups=load(trio / "b").groups)
    for name in FINDINGS:
        assert calibrator.maps[name]["positives"] == expected.maps[name]["positives"]
        assert calibrator.maps[name]["parameters"] == pytest.approx(expected.maps[name]["parameters"], rel=1e-9)
    assert [finding["name"] for finding in made.content["findings"]] == list(FINDINGS)


def test_nothing_is_chosen_on_images_that_a_head_has_seen_or_on_test(trio: Path, tmp_path: Path) -> None:
    shutil.copytree(trio / "b", tmp_path / "seen")
    content = files.read_config(tmp_path / "seen")
    exposure = files.read_exposure(tmp_path / "seen", content)
    seen = files.Exposure(exposure.pretraining, np.union1d(exposure.train, exposure.val[:1]), exposure.val)
    content["exposure"] = files.write_exposure(tmp_path / "seen", seen)
    (tmp_path / "seen" / "config.json").write_text(json.dumps(content))
    shutil.copytree(trio / "b", tmp_path / "test")
    known, labels = validations(trio)
    files.write_validation(tmp_path / "test", known[1].replace(known[1].probabilities, split="test"), labels)
    for name, message in (("seen", "1 of 28 validation images.*not out of sample"), ("test", "on the test split")):
        for arguments in ({"plan": Plan()}, {"composition": Composition(StudyRule("learned"))}, {}):
            with pytest.raises(StageError, match=message):
                combine_models([trio / "a", tmp_path / name], tmp_path / "out", **arguments)
            assert not (tmp_path / "out").exists()


def test_calibrated_or_aggregated_validation_is_refused(trio: Path, tmp_path: Path) -> None:
    known, labels = validations(trio)
    for stage in ("calibrated", "study"):
        shutil.copytree(trio / "b", tmp_path / stage)
        files.write_validation(tmp_path / stage, known[1].replace(known[1].probabilities, stage=stage), labels)
        for plan in (None, Plan()):
            with pytest.raises(StageError, match=f"raw image predictions; found stage '{stage}'"):
                combine_models([trio / "a", tmp_path / stage], tmp_path / "out", plan=plan)


def test_members_of_other_images_or_findings_cannot_be_chosen_among(trio: Path, tmp_path: Path) -> None:
    known, labels = validations(trio)
    for number, (rows, codes, message) in enumerate(
        [
            (known[1].rows(np.arange(20)), labels[:20], "same images"),
            (known[1].select(FINDINGS[:2]), labels[:, :2], "other findings"),
            (known[1], 1 - labels, "other validation labels"),
        ]
    ):
        shutil.copytree(trio / "b", tmp_path / f"member{number}")
        files.write_validation(tmp_path / f"member{number}", rows, codes)
        with pytest.raises(PredictionError, match=message):
            combine_models([trio / "a", tmp_path / f"member{number}"], tmp_path / "out", plan=Plan())


def test_ranks_that_are_not_those_of_the_ensemble_are_refused(trio: Path, tmp_path: Path) -> None:
    combine_models(members(trio), tmp_path / "out", Composition(ensemble="rank_mean"))
    content = (tmp_path / "out" / "ranks.npz").read_bytes()
    (tmp_path / "out" / "ranks.npz").write_bytes(content[:-7])
    with pytest.raises(CheckpointError, match=r"not the file that config\.json was written for"):
        load(tmp_path / "out")
    (tmp_path / "out" / "ranks.npz").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path / "out")


def test_ranks_are_of_one_study_rule_and_another_is_refused_before_anything_is_read(
    trio: Path, tmp_path: Path, monkeypatch
) -> None:
    combine_models(members(trio), tmp_path / "out", Composition(ensemble="rank_mean"))
    monkeypatch.setattr(predict, "_read", lambda *_: pytest.fail("something was read"))
    with pytest.raises(ConfigError, match=r"scores stand for 'mean' alone. Say --study own; or combine its members"):
        predict.run(
            tmp_path / "out", [f"{trio}/store:test"], tmp_path / "t.csv", raw=True, study=str(FRONTAL), device="cpu"
        )


@pytest.mark.parametrize(
    "changes",
    [{"study": "median"}, {"study": "learned"}, {"ensemble": "median"}, {"member_weights": [1.0, -1.0, 1.0]},
     {"normal_damping": "power:-1"}, {"ensemble": "rank_mean", "ranks": {"file": "ranks.npz", "sha256": "0"}}],
)  # fmt: skip
def test_a_description_that_means_nothing_is_refused(trio: Path, tmp_path: Path, changes: dict) -> None:
    combine_models(members(trio), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match="how its predictions are put together"):
        load(tmp_path / "out")


def test_ensembles_made_before_there_were_rules_are_means(trio: Path, tmp_path: Path) -> None:
    combine_models(members(trio), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    content = json.loads(path.read_text())
    for key in ("ensemble", "member_weights", "normal_damping"):
        assert content.pop(key) in (None, "mean")
    assert content["study"] == "mean"
    path.write_text(json.dumps(content))
    assert load(tmp_path / "out").composition == Composition()


def test_an_ensemble_takes_the_rule_of_its_members_or_asks(trio: Path, tmp_path: Path) -> None:
    for name, study in (("a", "frontal_weighted:0.8"), ("b", "frontal_weighted:0.8"), ("c", "mean")):
        shutil.copytree(trio / name, tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"study": study}))
    same = [tmp_path / "a", tmp_path / "b"]
    assert inherited(same) == Composition(FRONTAL)
    assert combine_models(same, tmp_path / "out").content["study"] == "frontal_weighted:0.8"
    with pytest.raises(ConfigError, match=r"made with study frontal_weighted:0.8 and mean: say --study"):
        program.run([*same, tmp_path / "c"], tmp_path / "other")
    program.run([*same, tmp_path / "c"], tmp_path / "other", study="logit_mean")
    assert files.read_config(tmp_path / "other")["study"] == "logit_mean"


def test_a_damped_model_can_be_freed_of_its_damping(trio: Path, tmp_path: Path, capsys) -> None:
    store = f"{trio / 'store'}:test"
    program.run([trio / "a"], tmp_path / "damped", normal_damping="power:0.5")
    predict.run(tmp_path / "damped", [store], tmp_path / "damped.csv", raw=True, device="cpu")
    assert "Next: hilum evaluate" in capsys.readouterr().out  # combine would refuse what is damped
    with pytest.raises(StageError, match="--normal-damping none"):
        combine.run([tmp_path / "damped.csv"], tmp_path / "out.csv", study="mean")
    config = files.read_config(trio / "a") | {"normal_damping": "power:0.5"}
    shutil.copytree(trio / "a", tmp_path / "made_damped")
    files.write_config(tmp_path / "made_damped", config)
    both = [tmp_path / "made_damped", trio / "b"]
    with pytest.raises(ConfigError, match=r"normal_damping none and power:0\.5: say --normal-damping"):
        program.run(both, tmp_path / "out")
    program.run(both, tmp_path / "out", normal_damping="none")
    assert load(tmp_path / "out", "cpu").composition == Composition()
    program.run(both, tmp_path / "best", normal_damping="none", choose=True)
    assert load(tmp_path / "best", "cpu").composition.damping is None


def test_options_that_mean_nothing_are_refused(trio: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ({"unit": "study"}, "leave out --unit"),
        ({"labels": trio / "store"}, "leave out --labels"),
        ({"choose": True, "split": "test"}, "leave out --labels and --split"),
        ({"weights": "1,x,2"}, "expected numbers with commas"),
        ({"weights": "1,2"}, "ensemble of 3 needs"),
        ({"study": "choose"}, "needs --choose"),
        ({"choose": True, "weights": "1,2,3"}, "leave one of them out"),
        ({"normal_damping": "power:x"}, "expected power:0.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            program.run(members(trio), tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UnknownNameError, match="Did you mean 'rank_mean'"):
        program.run(members(trio), tmp_path / "out", ensemble="rankmean")


def test_predict_keeps_calibrators_to_their_study_rule(trio: Path, tmp_path: Path) -> None:
    program.run([trio / "a"], tmp_path / "model", study="frontal_weighted")
    target = [f"{trio / 'store'}:test"]
    predict.run(tmp_path / "model", target, tmp_path / "own.csv", study="own", device="cpu")
    predict.run(tmp_path / "model", target, tmp_path / "named.csv", study="frontal_weighted:0.8", device="cpu")
    own, named = (read_predictions(tmp_path / f"{name}.csv") for name in ("own", "named"))
    np.testing.assert_array_equal(own.probabilities, named.probabilities)
    assert (own.stage, own.unit, len(own)) == ("calibrated", "study", 6)
    with pytest.raises(ConfigError, match=r"fitted for 'frontal_weighted:0.8'.*--study own, or --raw"):
        predict.run(tmp_path / "model", target, tmp_path / "mean.csv", study="mean", device="cpu")
    predict.run(tmp_path / "model", target, tmp_path / "mean.csv", study="mean", raw=True, device="cpu")
    mean = read_predictions(tmp_path / "mean.csv")
    assert (mean.stage, mean.metadata["study_aggregation"]) == ("study", "mean")
    images = Model.predict_store(load(trio / "a", "cpu"), Store.open(trio / "store"), range(72, 84), raw=True)
    np.testing.assert_allclose(mean.probabilities, aggregate_studies(images, "mean", "study").probabilities, atol=1e-12)


def test_raw_predictions_say_on_what_their_members_were_chosen(trio: Path, tmp_path: Path) -> None:
    program.run(members(trio), tmp_path / "chosen", choose=True)
    program.run([trio / "a"], tmp_path / "learned", study="learned")
    for name, study, refused in (("chosen", None, True), ("chosen", "own", True), ("learned", None, False),
                                 ("learned", "own", True)):  # fmt: skip
        table = tmp_path / f"{name}.parquet"
        predict.run(tmp_path / name, [f"{trio / 'store'}:val"], table, raw=True, study=study, device="cpu")
        judge = functools.partial(
            evaluate.run, table, trio / "store", tmp_path / "out", bootstraps=0, accept_exposed=True
        )
        if refused:
            with pytest.raises(StageError, match="The choice of members or weights was fitted on"):
                judge()
        else:
            judge()
        predict.run(tmp_path / name, [f"{trio / 'store'}:test"], table, raw=True, study=study, device="cpu")
        judge()


class StandIn:
    """An engine that says and shows the same of every image."""

    needs_studies, over_study = False, np.zeros(2, bool)

    def __init__(self, findings: tuple[str, ...], values: list[float], maps: np.ndarray | None) -> None:
        self.findings, self.values, self.maps = findings, np.array([values]), maps
        self.config = SimpleNamespace(preprocess_id="hilum-grey-1", short_side=None)
        self.trained = np.ones(2, dtype=bool)

    def crop(self, pixels):
        return pixels

    def read(self, squares, study=None, view=None, attention=False):
        maps = self.maps[None] if attention and self.maps is not None else None
        nothing = np.zeros((len(squares), 4), np.float32)
        return Reading(self.values, maps, nothing, nothing)


def shown(networks: list[StandIn], **composition):
    model = Model(networks, {}, "", files.Exposure(), {}, composition=Composition(**composition))
    calibrator = Calibrator.fit(
        np.array([[0.2, 0.4], [0.6, 0.8]]), np.array([[0, 1], [1, 0]]), ("Edema", "Normal"), stage="ensemble"
    )
    model.calibrators = {"image": calibrator, "study": calibrator}
    return model.predict(np.zeros((8, 8), np.uint8), raw=True).attention


def test_maps_of_members_are_joined_by_finding_and_those_that_weigh_nothing_are_not_asked() -> None:
    left, right = np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[0.0, 1.0], [0.0, 0.0]])
    one = StandIn(("Edema", "Normal"), [0.1, 0.9], np.stack([left, right]))
    other = StandIn(("Normal", "Edema"), [0.9, 0.1], np.stack([right, left]))  # the same network, columns swapped
    found = shown([one, other])
    np.testing.assert_array_equal(found["Edema"], [left])
    np.testing.assert_array_equal(found["Normal"], [right])
    silent = StandIn(("Edema", "Normal"), [0.1, 0.9], None)
    assert shown([one, silent], weights=(0.0, 1.0)) == {"Edema": None, "Normal": None}
    np.testing.assert_array_equal(shown([one, silent], weights=(0.5, 0.0))["Edema"], [left])


def test_a_member_that_gives_no_number_is_not_taken_for_untrained() -> None:
    maps = np.full((2, 2, 2), 0.25)
    one, broken = StandIn(("Edema", "Normal"), [0.1, 0.9], maps), StandIn(("Edema", "Normal"), [np.nan, 0.9], maps)
    with pytest.raises(CheckpointError, match=r"1 of 2 findings .* 'Edema'"):
        shown([one, broken])
    broken.trained = np.array([False, True])  # as it would be if it had not been trained on it
    assert shown([one, broken])["Edema"] is not None


def test_a_finding_is_trained_if_a_member_with_a_share_was() -> None:
    one, other = StandIn(("Edema", "Normal"), [0.1, 0.9], None), StandIn(("Normal", "Edema"), [0.9, np.nan], None)
    other.trained = np.array([True, False])
    for weights, edema in ((None, True), ((0.5, 0.5), True), ((0.0, 1.0), False)):
        model = Model([one, other], {}, "", files.Exposure(), {}, composition=Composition(weights=weights))
        assert model.trained == {"Edema": edema, "Normal": True}
