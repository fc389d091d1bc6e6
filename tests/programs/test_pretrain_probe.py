"""The probe of a pretraining run: what it measures, what it leaves alone, what it remembers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.commands import pretrain_probe
from hilum.commands.pretrain_probe import START_NAME, Probe, compare, open_probe
from hilum.core.distributed import Engine, launch
from hilum.core.errors import CheckpointError
from hilum.core.seeding import forked
from hilum.data.store import Store, write_arrays
from hilum.data.transforms import evaluation_crop
from hilum.pretraining.alarms import probe_guard
from hilum.pretraining.probing import ProbeConfig, choose_images, neighbour_scores

CONFIG = ProbeConfig(every=5, images=60, neighbours=5, resamples=50, batch_size=7)


def one_of(rank: int = 0, world_size: int = 1) -> Engine:
    """The engine of one of several processes, all of them in this one."""
    with launch(1, "fp32", "cpu") as engine:
        engine.rank, engine.world_size = rank, world_size
    return engine


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """120 patients with two images each; finding "bright" can be seen, "coin" cannot, "half" is known for half."""
    rng = np.random.default_rng(0)
    bright = rng.random(240) < 0.4
    images = [
        np.clip(rng.normal(150 if positive else 90, 25, (36, 40)), 0, 255).astype(np.uint8) for positive in bright
    ]
    coin = rng.random(240) < 0.5
    half = np.where(rng.random(240) < 0.5, bright, -1)
    labels = np.stack([bright, coin, half], axis=1).astype(np.int8)
    patients = [f"p{index // 2}" for index in range(240)]
    splits = ["train" if index < 140 else "val" if index < 200 else "test" for index in range(240)]
    folder = tmp_path_factory.mktemp("probe") / "store"
    return write_arrays(folder, images, labels, ["bright", "coin", "half"], patients=patients, splits=splits)


@pytest.fixture(scope="module")
def backbone() -> VisionTransformer:
    with forked(0, "test"):
        return VisionTransformer(ViTConfig(16, 2, 2, patch_size=8, image_size=32, layer_scale=1.0)).eval()


def a_probe(store: Store, out: Path, config: ProbeConfig = CONFIG) -> Probe:
    out.mkdir(exist_ok=True)
    probe = open_probe(store, config, 32, 0, out, speaks=False)
    assert probe is not None
    return probe


def test_measures_are_those_of_an_independent_library(store, backbone, tmp_path: Path) -> None:
    probe = a_probe(store, tmp_path)
    values = probe.measure(backbone, one_of(), 0)
    chosen = choose_images(store, CONFIG, 0)

    def features(places: np.ndarray) -> np.ndarray:
        pixels = np.stack([evaluation_crop(store.read(int(place)), 32) for place in places])
        with torch.no_grad():
            tokens = backbone((torch.from_numpy(pixels[:, None]).float() / 255 - 0.5) / 0.25)
        return torch.cat([tokens.cls, tokens.patches.mean(1)], 1).double().numpy()

    scores = neighbour_scores(features(chosen.bank), chosen.bank_labels, features(chosen.queries), 5, 0.07)
    for name, metric in (("knn_mAP", average_precision_score), ("knn_mAUC", roc_auc_score)):
        each = []
        for column in range(len(chosen.findings)):
            truth = chosen.query_labels[:, column]
            known = truth >= 0
            each.append(metric(truth[known], scores[known, column]))
        assert values[name] == pytest.approx(np.mean(each), abs=1e-6)
    assert values["probe_images"] == 60
    assert values["probe_findings"] == 3
    assert values["linear_mAUC"] > 0.7  # two of three findings can be seen
    assert set(values) == {"knn_mAP", "knn_mAUC", "linear_mAP", "linear_mAUC", "probe_images", "probe_findings"}


def test_no_random_stream_gradient_or_mode_is_touched(store, backbone, tmp_path: Path) -> None:
    probe = a_probe(store, tmp_path)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.train()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    probe.measure(backbone, one_of(), 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert backbone.training
    backbone.eval()
    probe.measure(backbone, one_of(), 1)
    assert not backbone.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in backbone.parameters())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_several_processes_together_say_what_one_says(store, backbone, tmp_path: Path, monkeypatch) -> None:
    alone = a_probe(store, tmp_path / "alone").measure(backbone, one_of(), 0)
    tables: list[Tensor] = []

    def collect(table: Tensor) -> Tensor:
        tables.append(table.clone())
        return table

    monkeypatch.setattr(pretrain_probe, "sum_over_ranks", collect)
    together = a_probe(store, tmp_path / "together")
    for rank in (1, 2):
        assert together.measure(backbone, one_of(rank, 3), 0) == {}
    monkeypatch.setattr(pretrain_probe, "sum_over_ranks", lambda table: table + tables[0] + tables[1])
    shared = together.measure(backbone, one_of(0, 3), 0)
    assert shared == pytest.approx(alone, abs=1e-6)
    assert not (tables[0][:, -1] * tables[1][:, -1]).any()  # each image is embedded once


def test_every_process_makes_as_many_passes_whatever_it_can_read(store, backbone, tmp_path: Path, monkeypatch) -> None:
    """One that is spread over the processes (FSDP) would wait for ever for a pass that one of them leaves out."""
    probe = a_probe(store, tmp_path, ProbeConfig(every=5, images=60, batch_size=2))  # 120 images: 18 or 17 each
    passes: list[int] = []
    handle = backbone.register_forward_hook(lambda _module, images, _tokens: passes.append(len(images[0])))
    counts = []
    for rank in range(7):
        passes.clear()
        probe.measure(backbone, one_of(rank, 7), 5)
        counts.append(len(passes))
    monkeypatch.setattr(Store, "read", lambda self, index: (_ for _ in ()).throw(self._damage(index, "planted")))
    passes.clear()
    assert probe.measure(backbone, one_of(0, 7), 5) == {}
    handle.remove()
    assert {*counts, len(passes)} == {9}


def test_images_that_cannot_be_read_are_left_out(store, backbone, tmp_path: Path, monkeypatch) -> None:
    whole = a_probe(store, tmp_path / "whole").measure(backbone, one_of(), 0)
    probe = a_probe(store, tmp_path / "damaged")
    bad = set(probe.images.queries[:4].tolist()) | set(probe.images.bank[:5].tolist())
    real = Store.read

    def read(self: Store, index: int) -> np.ndarray:
        if index in bad:
            raise self._damage(index, "planted")
        return real(self, index)

    monkeypatch.setattr(Store, "read", read)
    values = probe.measure(backbone, one_of(), 0)
    assert values["probe_images"] == whole["probe_images"] - 4
    assert values["knn_mAP"] != whole["knn_mAP"]
    monkeypatch.setattr(Store, "read", real)
    later = probe.measure(backbone, one_of(), 5)  # compared on the queries that were there both times
    assert abs(later["knn_change"]) < 0.1


def test_a_backbone_that_loses_the_finding_raises_the_guard_and_one_that_does_not_stays_silent(
    store, backbone, tmp_path: Path
) -> None:
    probe = a_probe(store, tmp_path)
    first = {"step": 0, **probe.measure(backbone, one_of(), 0)}
    assert "knn_change" not in first
    same = {"step": 5, **probe.measure(backbone, one_of(), 5)}
    assert same["knn_change"] == same["knn_change_low"] == same["knn_change_high"] == 0
    assert probe_guard([first, same]) is None

    class Blind(VisionTransformer):
        def forward(self, images: Tensor) -> Any:
            return super().forward(images - images.mean(dim=(1, 2, 3), keepdim=True))

    with forked(0, "test"):
        blind = Blind(backbone.config).eval()
    resumed = a_probe(store, tmp_path)  # another process, the same folder
    worse = {"step": 10, **resumed.measure(blind, one_of(), 10)}
    assert worse["knn_change"] == pytest.approx(worse["knn_mAP"] - first["knn_mAP"], abs=1e-6)
    alarm = probe_guard([first, same, worse, {"step": 11, "loss": 1.0}])
    assert alarm is not None
    assert "step 10" in alarm.what
    assert "worse than before the first step" in alarm.what


def test_a_probe_turned_on_late_is_compared_with_its_own_first(store, backbone, tmp_path: Path) -> None:
    probe = a_probe(store, tmp_path)
    assert "knn_change" not in probe.measure(backbone, one_of(), 40)
    later = {"step": 45, **probe.measure(backbone, one_of(), 45)}
    assert later["knn_change_since"] == 40
    alarm = probe_guard([later | {"knn_change_high": -0.01}])
    assert alarm is not None
    assert "worse than after step 40" in alarm.what
    old = probe_guard([{"step": 45, "knn_change": -1.0, "knn_change_low": -1.0, "knn_change_high": -0.5}])
    assert old is not None
    assert "worse than at the first probe" in old.what


def test_a_run_that_begins_anew_forgets_what_was_there(store, backbone, tmp_path: Path) -> None:
    probe = a_probe(store, tmp_path)
    np.savez(tmp_path / START_NAME, scores=np.zeros((60, 3), np.float32), identity=np.array(probe.identity))
    probe.measure(backbone, one_of(), 0)
    assert probe.measure(backbone, one_of(), 5)["knn_change"] == 0
    other = a_probe(store, tmp_path, ProbeConfig(every=5, images=60, neighbours=6))
    assert "knn_change" not in other.measure(backbone, one_of(), 10)  # other questions: nothing to compare with
    (tmp_path / START_NAME).write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=START_NAME):
        probe.measure(backbone, one_of(), 15)


def test_the_interval_of_a_change_covers_it_and_counts_patients_not_images(store) -> None:
    images = choose_images(store, CONFIG, 0)
    rng = np.random.default_rng(0)
    truth = (images.query_labels == 1).astype(float)
    good = np.clip(0.6 * truth + 0.4 * rng.random(truth.shape), 0, 1).astype(np.float32)
    poor = rng.random(truth.shape).astype(np.float32)
    change = compare(good, poor, images, 300, 0)
    assert change["knn_change_low"] < change["knn_change"] < change["knn_change_high"] < 0
    back = compare(poor, good, images, 300, 0)
    assert back["knn_change"] == pytest.approx(-change["knn_change"])
    assert back["knn_change_high"] == pytest.approx(-change["knn_change_low"])
    noise = compare(poor, (poor + rng.normal(0, 0.02, poor.shape)).clip(0, 1).astype(np.float32), images, 300, 0)
    assert noise["knn_change_low"] < 0 < noise["knn_change_high"]


@pytest.mark.parametrize(("every", "splits"), [(0, "train val"), (3, "train test")])
def test_without_a_probe_there_is_one_line_or_none(tmp_path: Path, capsys, every: int, splits: str) -> None:
    names = splits.split()
    labels = (np.arange(40) % 2)[:, None].astype(np.int8)
    store = write_arrays(
        tmp_path / "s", [np.zeros((8, 8), np.uint8)] * 40, labels, ["x"], splits=[names[i % 4 // 2] for i in range(40)]
    )
    assert open_probe(store, ProbeConfig(every=every), 8, 0, tmp_path) is None
    assert capsys.readouterr().out.count("\n") == (1 if every else 0)
