"""`hilum fit` beyond one rate grid: sources, budgets, pseudo-labels, studies, stages, pruning, tuning."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fit_stores import DECODER, FINDINGS, SMALL, SPLITS, make_store
from safetensors.torch import load_file

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import save_backbone
from hilum.commands import fit
from hilum.commands.fit_inputs import open_examples
from hilum.core.config import override
from hilum.core.errors import ConfigError, LeakageError, PredictionError, UnknownNameError
from hilum.core.seeding import forked
from hilum.data.store import Store, write_arrays
from hilum.deploy import model_files as files
from hilum.deploy.predictor import load
from hilum.heads import training
from hilum.heads.config import FitConfig
from hilum.heads.features import FeatureSource
from hilum.heads.sweep import Sweep

DATASETS = ["here" if n % 4 < 2 else "there" for n in range(len(SPLITS))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fit")
    make_store(path / "store", datasets=DATASETS)
    with forked(0, "test"):
        backbone = VisionTransformer(ViTConfig(12, 3, 2, patch_size=8, image_size=16))
    save_backbone(backbone, path / "run", "hilum-grey-1")
    return path


def run(folder: Path, out: Path, config: FitConfig, *changes: str) -> dict:
    """Fit; what `search.json` holds."""
    fit.run(override(config, list(changes)), folder / "store", folder / "run", out)
    return json.loads((out / "search.json").read_text())


def settings(model: Path) -> dict:
    return json.loads((model / "config.json").read_text())


def test_training_may_be_on_other_datasets_than_the_one_that_is_predicted_for(folder: Path, tmp_path: Path) -> None:
    record = run(folder, tmp_path / "model", SMALL, "target=here")
    assert (record["train_images"], record["val_images"]) == (40, 8)
    predictions, _ = files.read_validation(tmp_path / "model")
    assert set(predictions.dataset.tolist()) == {"here"}
    assert settings(tmp_path / "model")["training"]["sources"] == {
        "here": {"train": 20, "val": 8}, "there": {"train": 20, "val": 0},
    }  # fmt: skip
    record = run(folder, tmp_path / "alone", SMALL, "target=here", "datasets=[here]")
    assert (record["train_images"], record["val_images"]) == (20, 8)
    with pytest.raises(UnknownNameError, match="Did you mean 'there'"):
        run(folder, tmp_path / "wrong", SMALL, "datasets=[ther]")


def test_every_dataset_that_the_refit_learns_from_is_recorded_with_its_terms(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """One with validation images alone is learned from too, may be weighed, and has a bias of its own."""
    datasets = ["there" if split == "val" and n % 4 < 2 else "here" for n, split in enumerate(SPLITS)]
    store = make_store(tmp_path / "store", datasets=datasets)
    monkeypatch.setattr(Store, "licences", {"here": ["open"], "there": ["closed"]})
    examples = open_examples(store.path, None, source_weights=("there=0.5",))
    assert set(store.datasets[examples.both].tolist()) == set(examples.sources) == {"here", "there"}
    assert (store.datasets == np.array(examples.sources)[examples.source_of_image]).all()
    fit.run(override(SMALL, ["source_weights=[there=0.5]"]), store.path, folder / "run", tmp_path / "model")
    training = settings(tmp_path / "model")["training"]
    assert training["sources"] == {"here": {"train": 40, "val": 8}, "there": {"train": 0, "val": 8}}
    assert training["licences"] == {"here": ["open"], "there": ["closed"]}
    assert "there (0 train, 8 val)" in (tmp_path / "model" / "README.md").read_text()
    for target, sources in (("here", {"here"}), ("there", {"here", "there"})):
        assert set(open_examples(store.path, None, target=target).sources) == sources


def test_nothing_is_learned_from_a_dataset_that_was_not_named(folder: Path) -> None:
    """The refit learns from validation images, so those of others are left out; a target is named too."""
    store = Store.open(folder / "store")
    for target, validated in ((None, {"here"}), ("here", {"here"}), ("there", {"there"})):
        examples = open_examples(folder / "store", None, datasets=("here",), target=target)
        assert set(store.datasets[examples.train].tolist()) == {"here"}
        assert set(store.datasets[examples.val].tolist()) == validated
        assert set(examples.sources) == {"here"} | validated


def test_unknown_labels_of_added_images_train_nothing_in_any_head(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Defect C1: the released loop over heads trains every head but the first on unknowns as negatives.

    "there" does not annotate Hernia. Whatever its images would say of Hernia, every head of the search stays the same.
    """
    digests, states = [], []

    class Watched(Sweep):
        def step(self, features, targets):
            value = super().step(features, targets)
            states.append([self.state(place) for place in range(len(self.candidates))])
            return value

    monkeypatch.setattr(training, "Sweep", Watched)
    for hidden in (0, 1):
        states.clear()
        store = make_store(tmp_path / f"store{hidden}", datasets=DATASETS)
        labels = np.array(store.labels)
        there = np.array(DATASETS) == "there"
        codes = np.where(labels[there, 1] == 1, -1 - hidden, -1)  # two ways to be unknown
        labels[there, 1] = codes
        path = tmp_path / f"masked{hidden}"
        write_again(path, labels)
        fit.run(override(SMALL, ["refit=false"]), path, folder / "run", tmp_path / f"model{hidden}")
        digests.append([{name: value.numpy().tobytes() for name, value in head.items()} for head in states[-1]])
    assert len(digests[0]) == 3
    assert digests[0] == digests[1]


def write_again(path: Path, labels: np.ndarray) -> Store:
    """The small store with other labels."""
    from hilum.data.store import write_arrays

    rng = np.random.default_rng(1)
    images = [rng.integers(0, 255, (24, 24), np.uint8) for _ in SPLITS]
    names = [f"p{n // 2}" for n in range(len(SPLITS))]
    return write_arrays(path, images, labels, FINDINGS, splits=SPLITS, studies=names, patients=names, datasets=DATASETS)


def test_a_budget_of_images_is_kept_by_search_and_refit(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Defect C6: few-shot heads of the released code are refitted on the few images and the whole of validation."""
    drawn: list[set[int]] = []
    original = training.epoch_batches

    def watched(config, phase, images, *rest):
        drawn.append(set(images.tolist()))
        return original(config, phase, images, *rest)

    monkeypatch.setattr(training, "epoch_batches", watched)
    record = run(folder, tmp_path / "model", SMALL, "train_images=10", "val_images=6")
    assert (record["train_images"], record["val_images"]) == (10, 6)
    search, refit = drawn
    assert len(search) == 10
    assert len(refit) == 16
    assert search < refit
    exposure = files.read_exposure(tmp_path / "model", settings(tmp_path / "model"))
    assert (len(exposure.train), len(exposure.val)) == (10, 6)
    store = Store.open(folder / "store")
    patients = [store.patients[sorted(images)] for images in (search, refit - search)]
    assert [len(set(names.tolist())) for names in patients] == [5, 3]  # two images each: whole patients


def test_a_budget_cuts_no_study(folder: Path) -> None:
    store = Store.open(folder / "store")
    for budget in (21, 27, 30):
        found = open_examples(folder / "store", None, train_images=budget)
        assert len(found.train) == budget - budget % 2  # two images to a study
        assert (np.unique(store.studies[found.train], return_counts=True)[1] == 2).all()
    with pytest.raises(ConfigError, match="a budget of 1 does not hold the first study, of 2 images"):
        open_examples(folder / "store", None, train_images=1)


def test_examples_of_another_seed_are_other_patients(folder: Path) -> None:
    first, again, other = (open_examples(folder / "store", None, train_images=10, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.train, again.train)
    assert not np.array_equal(first.train, other.train)


def test_without_a_refit_the_model_predicts_validation_as_the_search_head_did(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "model", DECODER, "refit=false")
    predictions, _ = files.read_validation(tmp_path / "model")
    store = Store.open(folder / "store")
    again = load(tmp_path / "model", "cpu").predict_store(store, store.indices("val"), raw=True)
    assert np.allclose(again.probabilities, predictions.probabilities, atol=1e-7, equal_nan=True)
    assert again.metadata["head_splits"] == ["train"]
    assert "which had not been trained on them; it is the head in this folder" in " ".join(
        (tmp_path / "model" / "README.md").read_text().split()
    )


def test_pseudo_labels_fill_what_is_unknown_and_only_from_a_teacher_that_has_not_seen_validation(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    run(folder, tmp_path / "taught", SMALL)
    with pytest.raises(LeakageError, match=r"trained on 16 of 16 validation images.*refit=false"):
        run(folder, tmp_path / "student", SMALL, f"pseudo_labels={tmp_path / 'taught'}")
    run(folder, tmp_path / "teacher", SMALL, "refit=false")
    met = []
    original = training.LearningSet.targets

    def watched(self, batch, features):
        targets = original(self, batch, features)
        met.append((batch.images, targets.values.numpy(), targets.weights.numpy()))
        return targets

    monkeypatch.setattr(training.LearningSet, "targets", watched)
    run(folder, tmp_path / "student", SMALL, f"pseudo_labels={tmp_path / 'teacher'}", "pseudo_weight=0.25")
    store = Store.open(folder / "store")
    teacher = load(tmp_path / "teacher", "cpu").predict_store(store, range(40))
    for images, values, weights in met:
        labels = store.labels[images][:, :3]
        known, train = labels >= 0, images < 40
        assert (weights[:, :3][known] == 1).all()
        assert np.array_equal(values[:, :3][known], labels[known])
        fills = (labels == -1) & train[:, None]
        assert (weights[:, :3][fills] == 0.25).all()
        row, column = np.nonzero(fills)
        assert np.allclose(values[:, :3][fills], teacher.probabilities[images[row], column], atol=1e-6)
        assert (weights[:, :3][(labels == -2) | ((labels == -1) & ~train[:, None])] == 0).all()
        assert (weights[:, 3] == 0).all()  # never trained: nothing to learn from


def test_a_teacher_of_test_images_is_refused(folder: Path, tmp_path: Path) -> None:
    """Another split of the same images: what it teaches of train would carry labels of test."""
    turned = {"train": "test", "val": "val", "test": "train"}
    make_store(tmp_path / "turned", [turned[split] for split in SPLITS], datasets=DATASETS)
    fit.run(override(SMALL, ["refit=false"]), tmp_path / "turned", folder / "run", tmp_path / "teacher")
    with pytest.raises(LeakageError, match="trained on 8 of 8 test images"):
        run(folder, tmp_path / "student", SMALL, f"pseudo_labels={tmp_path / 'teacher'}")


def test_a_teacher_of_other_findings_has_nothing_to_say(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "teacher", SMALL, "findings=[Edema]", "refit=false")
    with pytest.raises(ConfigError, match="was trained on none of Hernia, Mass"):
        run(folder, tmp_path / "student", SMALL, "findings=[Hernia,Mass]", f"pseudo_labels={tmp_path / 'teacher'}")


def test_queries_from_text_and_vectors_come_together(folder: Path, tmp_path: Path) -> None:
    """Without vectors the decoder would have random queries; other queries would silently become text."""
    np.savez(tmp_path / "vectors.npz", **{name: np.ones(6) for name in FINDINGS})
    for changes in (["queries=text"], [f"text_vectors={tmp_path / 'vectors.npz'}"]):
        with pytest.raises(ConfigError, match="queries=text needs text_vectors=FILE"):
            run(folder, tmp_path / "model", DECODER, *changes)


def test_settings_that_need_more_than_the_store_has_are_refused_or_said(folder: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(ConfigError, match="loss=masked_bce_sum does not read it"):
        run(folder, tmp_path / "model", SMALL, "losses.focal.gamma=1")
    with pytest.raises(ConfigError, match="source_bias: all training images are of here"):
        run(folder, tmp_path / "model", SMALL, "target=here", "datasets=[here]", "source_bias=true")
    make_store(tmp_path / "store", studies=[f"s{n}" for n in range(len(SPLITS))])
    fit.run(override(SMALL, ["views=set"]), tmp_path / "store", folder / "run", tmp_path / "model")
    assert "no study has two training images" in capsys.readouterr().err


@pytest.mark.parametrize(("changes", "message"), [
    (["tune.method=blocks", "tune.blocks=4"], "tune.blocks: 4 of a backbone that has 3"),
    (["kept_channels=25"], "kept_channels: 25 of tokens that have 24"),
])  # fmt: skip
def test_what_the_backbone_does_not_have_is_said_before_anything_is_learned(
    folder: Path, tmp_path: Path, monkeypatch, changes: list[str], message: str
) -> None:
    monkeypatch.setattr(fit, "search", None)
    monkeypatch.setattr(fit, "measure", None)
    with pytest.raises(ConfigError, match=message):
        run(folder, tmp_path / "model", DECODER, *changes)


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_learned(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file; expected a folder"):
        run(folder, tmp_path / "file" / "model", SMALL)
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)  # as it is for others than root
    with pytest.raises(ConfigError, match="cannot be written"):
        run(folder, tmp_path / "models" / "one", SMALL)


def test_what_cannot_be_damped_is_said_before_anything_is_learned(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fit, "search", None)
    with pytest.raises(PredictionError, match="needs a finding called 'Normal'"):
        run(folder, tmp_path / "model", SMALL, "normal_damping=power:0.5")


def test_training_images_are_not_looked_at_once_more_where_nothing_is_standardised(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """A pass over the backbone costs as much as an epoch."""
    seen: list[np.ndarray] = []
    original = FeatureSource.evaluation

    def watched(self, batches):
        listed = list(batches)
        seen.extend(listed)
        return original(self, listed)

    monkeypatch.setattr(FeatureSource, "evaluation", watched)
    run(folder, tmp_path / "model", SMALL)
    assert set(np.concatenate(seen).tolist()) == set(range(40, 56))


def heads_of(model: Path) -> dict[str, bytes]:
    """The tensors of a model, as bytes."""
    return {name: value.numpy().tobytes() for name, value in load_file(model / "model.safetensors").items()}


def test_a_source_of_weight_0_teaches_nothing(folder: Path, tmp_path: Path) -> None:
    """Turning its labels over changes no bit of the head; with weight 1 it does."""
    heads = {}
    labels = np.array(Store.open(folder / "store").labels)
    there = (np.array(DATASETS) == "there")[:, None] & (np.array(FINDINGS) != "Never")
    turned = np.where(there & (labels >= 0), 1 - labels, labels)
    for name, codes in (("as_given", labels), ("turned", turned)):
        write_again(tmp_path / name, codes)
        for weight in (0, 1):
            out = tmp_path / f"{name}{weight}"
            changes = ["target=here", f"source_weights=[there={weight}]"]
            fit.run(override(SMALL, changes), tmp_path / name, folder / "run", out)
            heads[name, weight] = heads_of(out)
    assert heads["as_given", 0] == heads["turned", 0]
    assert heads["as_given", 1] != heads["turned", 1]
    with pytest.raises(UnknownNameError):
        run(folder, tmp_path / "wrong", SMALL, "source_weights=[nowhere=1]")


def test_a_finding_whose_positives_are_all_of_a_source_of_weight_0_is_not_trained(folder: Path, tmp_path: Path) -> None:
    store = Store.open(folder / "store")
    here = np.array(DATASETS) == "here"
    column = FINDINGS.index("Hernia")
    labels = np.array(store.labels)
    labels[here & (np.array(SPLITS) == "train"), column] = 0
    write_again(tmp_path / "store", labels)
    trained = {}
    for weight in (0, 0.5):
        examples = open_examples(tmp_path / "store", None, target="here", source_weights=(f"there={weight}",))
        trained[weight] = examples.findings[column]
    assert not trained[0].trained
    assert trained[0].positives == 0
    assert trained[0.5].trained
    assert trained[0.5].positives > 0


def test_a_source_may_have_a_bias_of_its_own_which_is_not_kept(folder: Path, tmp_path: Path) -> None:
    heads = []
    for bias in ("false", "true"):
        run(folder, tmp_path / bias, SMALL, "target=here", f"source_bias={bias}")
        heads.append(heads_of(tmp_path / bias))
    assert set(heads[0]) == set(heads[1])
    assert heads[0] != heads[1]


@pytest.mark.parametrize("changes", [
    ["views=concat"], ["views=set"], ["views=attention"], ["consistency=5"],
    ["head=ml_decoder", "views=memory", "decoder_dim=8", "decoder_feed_forward=12", "decoder_heads=2"],
    ["head=csra", "loss=asymmetric"],
])  # fmt: skip
def test_every_kind_of_head_goes_from_store_to_predictions(folder: Path, tmp_path: Path, changes: list[str]) -> None:
    run(folder, tmp_path / "model", SMALL, "standardise=true", "prior_bias=true", *changes)
    store = Store.open(folder / "store")
    model = load(tmp_path / "model", "cpu")
    whole = model.predict_store(store, store.indices("test"), raw=True)
    small = model.predict_store(store, store.indices("test"), raw=True, batch_size=2)
    assert np.allclose(whole.probabilities, small.probabilities, atol=1e-6, equal_nan=True)
    if any(change.startswith(("views=memory", "views=attention")) for change in changes):
        pairs = whole.probabilities.reshape(-1, 2, 4)  # two images to a study
        assert np.array_equal(pairs[:, 0], pairs[:, 1], equal_nan=True)
    predictions, _ = files.read_validation(tmp_path / "model")
    record = json.loads((tmp_path / "model" / "search.json").read_text())
    chosen = record["chosen"]
    assert chosen["score"] == record["epochs"][-1]["scores"][record["variants"].index(chosen["variant"])]
    assert len(predictions) == 16


def test_consistency_needs_whole_studies_and_changes_what_is_learned(folder: Path, tmp_path: Path) -> None:
    settings_of_both = ("standardise=true", "learning_rates=[0.1]", "stop_epoch=3", "loss=masked_bce_mean")
    for weight in (0, 20):
        run(folder, tmp_path / f"model{weight}", SMALL, f"consistency={weight}", *settings_of_both)
    store = Store.open(folder / "store")
    spread = []
    for weight in (0, 20):
        found = load(tmp_path / f"model{weight}", "cpu").predict_store(store, store.indices("train"), raw=True)
        pairs = found.probabilities[:, :3].reshape(-1, 2, 3)
        spread.append(float(np.abs(pairs[:, 0] - pairs[:, 1]).mean()))
    assert spread[1] < spread[0]


def test_blocks_and_pooling_are_tried_in_one_pass_and_the_chosen_head_reads_its_own(
    folder: Path, tmp_path: Path
) -> None:
    record = run(folder, tmp_path / "all", SMALL, "also_blocks=[1]", "also_patch_mean=true", "standardise=true")
    assert len(record["variants"]) == 3 * 2 * 2
    one = run(folder, tmp_path / "one", SMALL, "blocks=1", "patch_mean=true", "standardise=true")
    place = [n for n, tried in enumerate(record["variants"]) if (tried["blocks"], tried["patch_mean"]) == (1, True)]
    together = [record["epochs"][-1]["scores"][n] for n in place]
    assert np.allclose(together, one["epochs"][-1]["scores"], atol=0.02)
    alone = run(folder, tmp_path / "best", SMALL, f"blocks={record['chosen']['variant']['blocks']}",
                f"patch_mean={str(record['chosen']['variant']['patch_mean']).lower()}", "standardise=true",
                f"learning_rates=[{record['chosen']['variant']['learning_rate']}]")  # fmt: skip
    assert alone["chosen"]["epoch"] == record["chosen"]["epoch"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("all", "best")]
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], rtol=1e-4, atol=1e-6), name


def test_a_pruned_candidate_stops_and_the_others_do_not_notice(folder: Path, tmp_path: Path) -> None:
    whole = run(folder, tmp_path / "whole", SMALL)
    pruned = run(folder, tmp_path / "pruned", SMALL, "prune_after=[1]")
    first, last = pruned["epochs"][0]["scores"], pruned["epochs"][-1]["scores"]
    assert first == whole["epochs"][0]["scores"]
    assert sorted(score is None for score in last) == [False, False, True]
    dropped = last.index(None)
    assert first[dropped] == min(first)
    assert [s for s in last if s is not None] == [
        s for n, s in enumerate(whole["epochs"][-1]["scores"]) if n != dropped
    ]
    with pytest.raises(ConfigError, match="prune_after: expected epochs before the last of 3"):
        override(SMALL, ["prune_after=[3]"])


def test_a_classifier_stage_moves_the_classifier_alone(folder: Path, tmp_path: Path, monkeypatch) -> None:
    sweeps = []

    class Watched(Sweep):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            sweeps.append((options["phase"], self, self.state(0)))

    monkeypatch.setattr(training, "Sweep", Watched)
    record = run(folder, tmp_path / "model", DECODER, "classifier_epochs=2")
    assert [phase for phase, _, _ in sweeps] == ["search", "search classifier", "refit", "refit classifier"]
    assert [epoch["stage"] for epoch in record["epochs"]] == ["whole"] * 3 + ["classifier"] * 2
    for _, sweep, before in sweeps[1::2]:
        after = sweep.state(0)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {"decoder.duplicate_pooling", "decoder.duplicate_pooling_bias"}
    began, ended = sweeps[1][2], sweeps[0][1].state(0)
    assert all(torch.equal(began[name], ended[name]) for name in began)


def test_a_running_mean_of_weights_is_what_is_judged_and_kept(folder: Path, tmp_path: Path) -> None:
    plain = run(folder, tmp_path / "plain", SMALL)
    mean = run(folder, tmp_path / "mean", SMALL, "ema=0.9")
    assert plain["epochs"][0]["losses"] == mean["epochs"][0]["losses"]  # training is the same
    assert plain["epochs"][-1]["scores"] != mean["epochs"][-1]["scores"]


def test_a_warm_refit_of_standardised_features_starts_from_the_search_head_itself(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """The search head is folded to read raw features for calibration; the refit goes on from the unfolded one."""
    sweeps, starts = [], []

    class Watched(Sweep):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            sweeps.append(self)
            starts.append([self.state(place) for place in range(len(self.candidates))])

    monkeypatch.setattr(training, "Sweep", Watched)
    record = run(folder, tmp_path / "model", SMALL, "refit_init=warm", "standardise=true", "patch_mean=true")
    place = record["variants"].index(record["chosen"]["variant"])
    assert torch.equal(starts[1][0]["linear.weight"], sweeps[0].state(place)["linear.weight"])


@pytest.mark.parametrize("method", ["lora", "blocks", "full"])
def test_a_tuned_model_is_an_ordinary_one_and_says_how_it_came_about(folder: Path, tmp_path: Path, method: str) -> None:
    own = {"lora": ["tune.rank=2"], "blocks": ["tune.blocks=1"], "full": []}[method]
    changes = [f"tune.method={method}", *own, "tune.epochs=2", "tune.learning_rate=0.003",
               "tune.head_learning_rate=0.003", "tune.batch_size=8", "standardise=true"]  # fmt: skip
    run(folder, tmp_path / "frozen", DECODER, "standardise=true")
    run(folder, tmp_path / "tuned", DECODER, *changes)
    tuning = settings(tmp_path / "tuned")["training"]["tuning"]
    assert tuning["method"] == method
    assert [epoch["epoch"] for epoch in tuning["epochs"]] == [0, 1, 2]
    scores = [epoch["score"] for epoch in tuning["epochs"]]
    assert tuning["chosen"] == int(np.argmax(scores))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("frozen", "tuned"))
    assert {name: value.shape for name, value in before.items()} == {n: v.shape for n, v in after.items()}
    moved = {name for name in before if name.startswith("backbone.") and not torch.equal(before[name], after[name])}
    assert bool(moved) == bool(tuning["chosen"])
    if moved and method == "lora":
        assert all(".attn." in name and name.endswith("weight") for name in moved)
    if moved and method == "blocks":
        assert all(name.startswith(("backbone.blocks.2.", "backbone.norm.")) for name in moved)
    predictions, _ = files.read_validation(tmp_path / "tuned")
    from sklearn.metrics import average_precision_score

    _, labels = files.read_validation(tmp_path / "tuned")
    values = []
    for column in range(3):
        keep = labels[:, column] >= 0
        values.append(average_precision_score(labels[keep, column], predictions.probabilities[keep, column]))
    assert np.mean(values) == pytest.approx(max(scores), abs=1e-6)


def test_tuning_that_does_not_help_is_not_taken(folder: Path, tmp_path: Path, monkeypatch) -> None:
    from hilum.commands import fit_tune

    original, calls = fit_tune._validate, []

    def worse(*arguments):
        calls.append(original(*arguments))
        return 1.0 if len(calls) == 1 else 0.0

    monkeypatch.setattr(fit_tune, "_validate", worse)
    run(folder, tmp_path / "frozen", SMALL)
    run(folder, tmp_path / "tuned", SMALL, "tune.method=full", "tune.epochs=2", "tune.learning_rate=0.01")
    assert settings(tmp_path / "tuned")["training"]["tuning"]["chosen"] == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("frozen", "tuned"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_model_keeps_the_study_rule_and_the_damping_it_was_fitted_with(folder: Path, tmp_path: Path) -> None:
    from hilum.core.errors import StageError
    from hilum.evaluation.studies import aggregate_studies

    run(folder, tmp_path / "model", SMALL, "study=frontal_weighted:0.8")
    assert settings(tmp_path / "model")["study"] == "frontal_weighted:0.8"
    assert settings(tmp_path / "model")["calibration"]["study"]["steps"] == {
        "study_aggregation": "frontal_weighted:0.8"
    }
    store, model = Store.open(folder / "store"), load(tmp_path / "model", "cpu")
    raw = model.predict_store(store, store.indices("test"), raw=True)
    mine = model.calibrators["study"].apply_to(aggregate_studies(raw, "frontal_weighted:0.8", "study"))
    found = model.predict_store(store, store.indices("test"), unit="study")
    assert np.array_equal(mine.probabilities, found.probabilities, equal_nan=True)
    with pytest.raises(StageError, match=r"frontal_weighted:0.8; these were made by study aggregation mean"):
        model.calibrators["study"].apply_to(aggregate_studies(raw, "mean", "study"))
    with pytest.raises(UnknownNameError, match="Did you mean 'mean'"):
        run(folder, tmp_path / "wrong", SMALL, "study=meen")


def test_hierarchy_fills_parents_of_training_labels(folder: Path, tmp_path: Path) -> None:
    from hilum.data.store import write_arrays

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (24, 24), np.uint8) for _ in SPLITS]
    labels = np.full((len(SPLITS), 2), -1, np.int8)
    labels[:, 0] = rng.random(len(SPLITS)) < 0.5
    labels[::3, 1] = rng.random(len(labels[::3])) < 0.5
    names = [f"p{n}" for n in range(len(SPLITS))]
    write_arrays(tmp_path / "store", images, labels, ("Rib Fracture", "Fracture"), splits=SPLITS, patients=names)
    plain = open_examples(tmp_path / "store", None)
    filled = open_examples(tmp_path / "store", None, hierarchy=True)
    unknown = plain.labels[:40, 1] == -1
    assert (filled.labels[:40, 1][unknown & (labels[:40, 0] == 1)] == 1).all()
    assert np.array_equal(filled.labels[:40][~unknown][:, 1], plain.labels[:40][~unknown][:, 1])
    assert (filled.labels[56:] == -1).all()  # test labels are not looked at


def test_a_head_on_pictures_of_noise_scores_as_chance(folder: Path, tmp_path: Path) -> None:
    """A canary: where pictures say nothing of labels, no way through the program may find something."""
    from sklearn.metrics import roc_auc_score

    from hilum.data.store import write_arrays

    rng = np.random.default_rng(3)
    splits = ["train"] * 60 + ["val"] * 40 + ["test"] * 600
    images = [rng.integers(0, 255, (16, 16), np.uint8) for _ in splits]
    labels = (rng.random((len(splits), 3)) < 0.5).astype(np.int8)
    names = [f"p{n}" for n in range(len(splits))]
    store = write_arrays(tmp_path / "store", images, labels, FINDINGS[:3], splits=splits, patients=names)
    fit.run(override(SMALL, ["standardise=true"]), tmp_path / "store", folder / "run", tmp_path / "model")
    test = store.indices("test")
    found = load(tmp_path / "model", "cpu").predict_store(store, test, batch_size=200)
    scores = [roc_auc_score(labels[test][:, column], found.probabilities[:, column]) for column in range(3)]
    assert np.abs(np.array(scores) - 0.5).max() < 0.1  # 600 images: a deviation of 0.024


def test_what_teaches_or_decides_nothing_is_said(folder: Path, tmp_path: Path, capsys) -> None:
    from hilum.data.store import write_arrays

    rng = np.random.default_rng(0)
    labels = np.zeros((len(SPLITS), 2), np.int8)
    labels[:20, 0], labels[44:50, 0], labels[3:9, 1] = 1, 1, 1  # the second has no positive in validation
    labels[30:37] = -1
    images = [rng.integers(0, 255, (24, 24), np.uint8) for _ in SPLITS]
    names = [f"p{n}" for n in range(len(SPLITS))]
    write_arrays(tmp_path / "store", images, labels, FINDINGS[:2], splits=SPLITS, patients=names)
    fit.run(SMALL, tmp_path / "store", folder / "run", tmp_path / "model")
    said = capsys.readouterr().err
    assert "1 findings have no positive validation image and decide nothing: Hernia" in said
    assert "7 training images have no known label of these findings and teach nothing" in said


def test_a_backbone_that_has_seen_test_images_is_said_whatever_it_recorded(
    folder: Path, tmp_path: Path, capsys
) -> None:
    import shutil

    from hilum.pretraining.exposure import Seen, uid_numbers, write_seen

    store = Store.open(folder / "store")
    shutil.copytree(folder / "run", tmp_path / "run")
    test = store.indices("test")
    write_seen(tmp_path / "run", Seen(uid_numbers(store.uids[test[:3]]), uid_numbers(store.pictures[test[:2]])))
    fit.run(SMALL, folder / "store", tmp_path / "run", tmp_path / "model")
    assert "pretrained on 3 test images" in capsys.readouterr().err


@pytest.mark.parametrize(("best", "refit_epochs", "expected"), [
    (7, 10, [False] * 4 + [True]),  # 5 epochs of 40 images are 4 of 56, rounded
    (10, 3, [False] * 2 + [True]),  # the refit ends before as many steps: it has the stage that was calibrated
    (5, 10, [False] * 4),
])  # fmt: skip
def test_a_deferred_loss_begins_in_the_refit_after_as_many_steps_as_in_the_search(
    folder: Path, tmp_path: Path, monkeypatch, best: int, refit_epochs: int, expected: list[bool]
) -> None:
    """By a share of the refit's own cosine it would begin after the refit has stopped."""
    from hilum.commands import fit_tune

    stages: list[bool] = []
    original, scored = training.training_loss, itertools.count(3)

    def watched(config, data, device, deferred=False):
        stages.append(deferred)
        return original(config, data, device, deferred)

    monkeypatch.setattr(training, "training_loss", watched)
    monkeypatch.setattr(fit_tune, "training_loss", watched)
    monkeypatch.setattr(fit, "mean_average_precision", lambda *_: float(next(scored) // 3 == best))  # of 3 candidates
    record = run(folder, tmp_path / "model", SMALL, "loss=ldam", "deferred=0.5", "search_epochs=10",
                 f"refit_epochs={refit_epochs}", "tune.method=full", "tune.epochs=1")  # fmt: skip
    assert record["chosen"]["epoch"] == best
    first, search, refit = stages[0], stages[1:11], stages[13:]  # each loop begins with the first stage's loss
    assert not first
    assert search == [False] * 5 + [True] * 5
    assert stages[11]  # tuning goes on in the second stage
    assert refit == expected


def test_a_cosine_ends_with_the_last_step_where_large_studies_are_drawn_more_often(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """Counted by images it would end epochs before, and the rest would learn nothing."""
    sweeps = []

    class Watched(Sweep):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            sweeps.append(self)

    monkeypatch.setattr(training, "Sweep", Watched)
    splits = ["train"] * 80 + ["val"] * 16
    store = make_store(tmp_path / "first", splits)
    labels = np.array(store.labels)
    labels[:80] = 0
    labels[:16, 0] = 1  # 4 studies of 4 images have it, 64 of one image have nothing
    names = [f"s{n // 4 if n < 16 else n}" for n in range(96)]
    images = [store.read(n) for n in range(96)]
    write_arrays(tmp_path / "store", images, labels, FINDINGS, splits=splits, studies=names, patients=names)
    changes = ["views=set", "sampling=class_aware", "sampling_power=1", "search_epochs=4"]
    fit.run(override(SMALL, changes), tmp_path / "store", folder / "run", tmp_path / "model")
    assert sweeps[0].steps > 4 * 5  # of 80 images 5 batches
    assert sweeps[0].steps == sweeps[0].total_steps
    assert sweeps[1].steps <= sweeps[1].total_steps


@pytest.mark.parametrize("more", [[], ["views=memory"], ["refit_init=warm"], ["tune.method=lora", "tune.epochs=1"]])
def test_kept_channels_are_learned_on_and_the_saved_head_reads_whole_tokens(
    folder: Path, tmp_path: Path, more: list[str]
) -> None:
    record = run(folder, tmp_path / "whole", DECODER, "standardise=true", "dropout=0", *more)
    kept = run(folder, tmp_path / "kept", DECODER, "standardise=true", "dropout=0", "kept_channels=24", *more)
    few = run(folder, tmp_path / "few", DECODER, "standardise=true", "kept_channels=5", *more)
    assert len(record["epochs"]) == len(kept["epochs"]) == len(few["epochs"])
    shapes = [
        {name: value.shape for name, value in load_file(tmp_path / name / "model.safetensors").items()}
        for name in ("whole", "kept", "few")
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    from sklearn.metrics import average_precision_score

    for name, found in (("kept", kept), ("few", few)):
        if more and more[0].startswith("tune"):
            continue
        predictions, labels = files.read_validation(tmp_path / name)
        values = []
        for column in range(3):
            known = labels[:, column] >= 0
            values.append(average_precision_score(labels[known, column], predictions.probabilities[known, column]))
        chosen = found["chosen"]
        place = found["variants"].index(chosen["variant"])
        recorded = found["epochs"][chosen["epoch"] - 1]["scores"][place]
        # the search saw reduced and rounded tokens, the head that is saved whole ones: of 24 directions all are kept
        assert np.mean(values) == pytest.approx(recorded, abs=0.02 if name == "kept" else 0.25)


@pytest.mark.parametrize(
    "change",
    ["cat_cls=true", "cls_memory=true", "pyramid=true", "also_blocks=[1]", "head=linear", "views=attention"],
)
def test_kept_channels_are_refused_where_a_head_reads_more_than_tokens(change: str) -> None:
    with pytest.raises(ConfigError, match="kept_channels: goes with a decoder that reads patch tokens alone"):
        override(DECODER, ["kept_channels=8", change])
