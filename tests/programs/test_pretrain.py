"""`hilum pretrain` end to end on a few small images: files, resumption, preemption, refusals, stages."""

import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hilum.backbones.patch_kernels import resample_patches
from hilum.backbones.pos_embed import resize_positions
from hilum.backbones.weights import load_backbone, read_backbone_config
from hilum.commands import pretrain, pretrain_setup
from hilum.commands.pretrain import PretrainConfig, run
from hilum.commands.pretrain_watch import Watch
from hilum.core.checkpoint import Checkpoint, digest, load_newest
from hilum.core.config import override, read_yaml
from hilum.core.distributed import launch
from hilum.core.errors import (
    CheckpointError,
    ConfigError,
    HilumError,
    NonFiniteLossError,
    PreprocessingMismatchError,
    UnknownNameError,
)
from hilum.core.locks import folder_lock
from hilum.data.store import Store, write_arrays
from hilum.pretraining import config, dinov2, exposure
from hilum.pretraining.config import SamplingConfig
from hilum.pretraining.crops import CropConfig
from hilum.pretraining.dinov2 import HeadConfig, LossConfig
from hilum.pretraining.loading import PretrainBatch, PretrainSource
from hilum.pretraining.state import start_from

CONFIG = PretrainConfig(
    architecture="demo8", embed_dim=16, depth=2, num_heads=2, registers=1, layer_scale=0.1,
    crops=CropConfig(global_size=32, local_size=16, local_crops=2), heads=HeadConfig(16, 16, 8, 8),
    batch_size=4, steps=4, learning_rate=0.02, momentum=(0.6, 1.0), drop_path=0.3, precision="fp32", accelerator="cpu",
    threads=1, log_every=1, checkpoint_every=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images of 20 patients; split by patient, but for patient 0, who also has an image that is in no split."""
    folder = tmp_path_factory.mktemp("pretrain") / "store"
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (40 + index % 5, 48), dtype=np.uint8) for index in range(30)]
    splits = ["test"] * 3 + ["val"] * 3 + ["train"] * 18 + [""] * 6
    patients = [f"p{index // 2}" for index in range(28)] + ["p0", "p99"]
    write_arrays(
        folder, images, np.zeros((30, 1), np.int8), ["x"],
        splits=splits, patients=patients, ssl_ok=[index != 10 for index in range(30)],
    )  # fmt: skip
    return folder


def final(out: Path) -> Checkpoint:
    loaded = load_newest(out / "checkpoints")
    assert loaded is not None
    return loaded


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def stop_at(monkeypatch: pytest.MonkeyPatch, count: int, what: Callable[[], None]) -> None:
    """Call `what` inside the `count`-th step."""
    real, calls = dinov2.update_teacher, 0

    def update(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        real(*arguments)
        if calls == count:
            what()

    monkeypatch.setattr(dinov2, "update_teacher", update)


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(CONFIG, data, tmp_path_factory.mktemp("straight") / "run")


def test_run_folder(straight: Path, data: Path) -> None:
    assert read_yaml(PretrainConfig, straight / "config.yaml") == CONFIG
    assert [line["step"] for line in lines(straight)] == [1, 2, 3, 4]
    expected = {
        "loss", "dino_local", "dino_global", "ibot", "koleo", "learning_rate", "momentum", "weight_decay",
        "teacher_temperature", "gradient_norm_backbone", "gradient_norm_dino_head", "gradient_norm_ibot_head",
        "cls_prototype_usage", "nearest_distance", "teacher_effective_rank", "images_per_second", "batch",
    }  # fmt: skip
    assert expected <= set(lines(straight)[0])
    for line in lines(straight):
        parts = line["dino_local"] + line["dino_global"] + 3 * line["ibot"] + 0.1 * line["koleo"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
    teacher = load_backbone(straight)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, final(straight).tensors[f"teacher.backbone.{name}"])
    described = read_backbone_config(straight)
    assert described["resolution"] == 32
    assert described["preprocess_id"] == Store.open(data).preprocess_id
    assert described["seen"]["sha256"] == exposure.seen_digest(exposure.read_seen(straight).uids)


def test_held_out_images_and_patients_are_never_seen(straight: Path, data: Path) -> None:
    store = Store.open(data)
    pool = exposure.select(store, CONFIG.train_on)
    forbidden = [0, 1, 2, 3, 4, 5, 10, 28]  # test, val, not allowed, another image of a test patient
    assert set(pool.indices.tolist()) == set(range(30)) - set(forbidden)
    assert (pool.held_out, pool.held_out_patients, pool.not_allowed) == (6, 1, 1)
    numbers = exposure.uid_numbers(store.uids)
    seen = exposure.read_seen(straight).uids
    assert 12 <= len(seen) <= 16  # four batches of four
    assert not np.isin(numbers[forbidden], seen).any()
    assert np.isin(seen, numbers).all()


def test_held_out_patients_are_told_apart_by_dataset(tmp_path: Path) -> None:
    images = [np.zeros((8, 8), np.uint8)] * 4
    store = write_arrays(
        tmp_path / "s", images, np.zeros((4, 1), np.int8), ["x"], patients=["1", "1", "1", "2"],
        datasets=["a", "b", "a", "b"], splits=["test", "train", "train", ""],
    )  # fmt: skip
    assert exposure.select(store, ("train", "")).indices.tolist() == [1, 3]
    assert exposure.select(store, ("train",)).indices.tolist() == [1]
    assert exposure.select(store, ("train", "", "test")).indices.tolist() == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="none of its 4 images"):
        exposure.select(store, ("val",))
    with pytest.raises(UnknownNameError, match="train"):
        exposure.select(store, ("trian",))


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGUSR1])
def test_preempted_and_resumed_equals_straight_bit_for_bit(
    straight: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_number: int
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 2, lambda: os.kill(os.getpid(), signal_number))
        with pytest.raises(SystemExit) as stopped:
            run(CONFIG, data, out)
    assert stopped.value.code == pretrain.STOPPED_STATUS
    assert final(out).step == 2
    assert signal.getsignal(signal_number) == signal.SIG_DFL
    run(CONFIG, data, out)
    assert digest(final(out).tensors) == digest(final(straight).tensors)
    timeless = [[{**line, "images_per_second": 0} for line in lines(folder)] for folder in (out, straight)]
    assert timeless[0] == timeless[1]  # sample order, masks and crops (their hash), losses; each step once
    assert (out / "teacher.safetensors").read_bytes() == (straight / "teacher.safetensors").read_bytes()


def test_micro_batches_see_the_same_images_and_resume(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(CONFIG, accumulate=2, batch_size=4)
    whole = run(config, data, tmp_path / "whole")
    assert "Micro-batches: 2 a step. Sinkhorn sees 2 images at a time and KoLeo 2, not 4." in capsys.readouterr().out
    with monkeypatch.context() as patch:
        stop_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run(config, data, tmp_path / "cut")
    run(config, data, tmp_path / "cut")
    assert digest(final(tmp_path / "cut").tensors) == digest(final(whole).tensors)
    straight = run(dataclasses.replace(CONFIG, steps=2), data, tmp_path / "straight")
    seen = exposure.read_seen(run(dataclasses.replace(config, steps=2), data, tmp_path / "two")).uids
    assert np.array_equal(seen, exposure.read_seen(straight).uids)
    with pytest.raises(ConfigError, match="does not divide among 1 processes x 3 micro-batches"):
        run(dataclasses.replace(CONFIG, accumulate=3), data, tmp_path / "odd")


def test_gradients_of_micro_batches_are_those_of_their_mean(data: Path, tmp_path: Path) -> None:
    """With losses that treat rows one by one, two micro-batches are one batch: centring at rest, no KoLeo, no masks."""
    losses = LossConfig(centering="centre", centre_momentum=1.0, koleo=0.0)
    alike = dataclasses.replace(CONFIG, losses=losses, mask_probability=0.0, drop_path=0.0, steps=3)
    one, two = (run(dataclasses.replace(alike, accumulate=parts), data, tmp_path / str(parts)) for parts in (1, 2))
    for ours, theirs in zip(lines(two), lines(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    ours, theirs = final(two).tensors, final(one).tensors
    for name in theirs:
        if name.startswith("student."):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_another_seed_is_another_run(straight: Path, data: Path, tmp_path: Path) -> None:
    other = run(dataclasses.replace(CONFIG, seed=1, steps=1), data, tmp_path / "run")
    assert lines(other)[0]["batch"] != lines(straight)[0]["batch"]


def test_crash_with_a_damaged_checkpoint_falls_back_and_ends_the_same(
    straight: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = tmp_path / "run", dataclasses.replace(CONFIG, checkpoint_every=1)

    def crash() -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        stop_at(patch, 4, crash)
        with pytest.raises(RuntimeError, match="crash"):
            run(config, data, out)
    assert [line["step"] for line in lines(out)] == [1, 2, 3]
    with (final(out).path / "state.safetensors").open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"\x7f\x3f\x1f")
    run(config, data, out)
    assert capsys.readouterr().err.count("warning: skipped") == 1
    assert digest(final(out).tensors) == digest(final(straight).tensors)
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]
    assert len(list((out / "checkpoints").iterdir())) == config.keep


def test_a_finished_run_stays_as_it_is_and_its_backbone_comes_back(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(dataclasses.replace(CONFIG, steps=1), data, tmp_path / "run")
    content = (out / "teacher.safetensors").read_bytes()
    (out / "teacher.safetensors").unlink()
    (out / "seen.npz").unlink()
    capsys.readouterr()
    run(dataclasses.replace(CONFIG, steps=1), data, out)
    assert "is finished" in capsys.readouterr().out
    assert (out / "teacher.safetensors").read_bytes() == content
    assert len(exposure.read_seen(out).uids) == 4


def test_what_is_said(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(dataclasses.replace(CONFIG, steps=12), data, tmp_path / "run")
    output = capsys.readouterr().out
    assert "Images: 22 (left out: 6 held out, 1 of held-out patients, 1 not allowed for pretraining)" in output
    assert "Steps: 12 of 4 images (2.2 passes)" in output
    assert "About" in output
    assert output.splitlines()[-1].startswith("Next: hilum fit")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 9}, "seed"),
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"losses": LossConfig(ibot=1.0)}, "losses.ibot"),
    ],
)
def test_other_settings_are_refused_by_name(straight: Path, data: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(named)} was"):
        run(dataclasses.replace(CONFIG, **change), data, straight)


def test_settings_that_change_nothing_may_change(straight: Path, data: Path) -> None:
    before = digest(final(straight).tensors)
    run(dataclasses.replace(CONFIG, workers=1, log_every=3, keep=5), data, straight)
    assert digest(final(straight).tensors) == before


def test_a_run_out_of_memory_goes_on_with_chunks(
    straight: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The documented cure; the numbers are the same up to rounding."""
    with monkeypatch.context() as patch:
        stop_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run(CONFIG, data, tmp_path / "run")
    chunked = dataclasses.replace(CONFIG, losses=LossConfig(prototype_loss="chunked", chunk=3))
    for ours, theirs in zip(lines(run(chunked, data, tmp_path / "run")), lines(straight), strict=True):
        assert ours["batch"] == theirs["batch"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert "losses.chunk 0 before, 3 now; the last bits will differ" in " ".join(capsys.readouterr().out.split())


def test_a_finished_run_keeps_the_hardware_that_it_ran_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(CONFIG, steps=1)
    out = run(config, data, tmp_path / "run")
    before = json.loads((out / "config.json").read_text())
    monkeypatch.setattr(pretrain_setup, "_device", lambda engine: "another machine")
    run(config, data, out)
    assert json.loads((out / "config.json").read_text()) == before


def test_an_existing_run_is_refused_without_resume_and_while_in_use(straight: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="already holds a run"):
        run(CONFIG, data, straight, resume=False)
    with folder_lock(straight), pytest.raises(HilumError, match=f"in use by process {os.getpid()}"):
        run(CONFIG, data, straight)


def test_a_file_in_the_place_of_the_run_folder_is_an_error(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a run")
    with pytest.raises(HilumError, match="cannot be written as a folder"):
        run(CONFIG, data, tmp_path / "run")
    assert (tmp_path / "run").read_text() == "not a run"


def test_another_store_is_refused(straight: Path, tmp_path: Path) -> None:
    images = [np.full((40, 40), index, np.uint8) for index in range(8)]
    write_arrays(tmp_path / "other", images, np.zeros((8, 1), np.int8), ["x"])
    with pytest.raises(CheckpointError, match="another images to train on"):
        run(CONFIG, tmp_path / "other", straight)


def test_the_same_images_stored_otherwise_are_refused(straight: Path, data: Path, tmp_path: Path) -> None:
    """Whether the run has ended or not: its weights would be said to read images as they do not."""
    before = (straight / "config.json").read_bytes()
    for changed, error, message in (
        ({"preprocess_id": "chexfound-1"}, PreprocessingMismatchError, "of the recipe 'hilum-grey-1'.*'chexfound-1'"),
        ({"size": 4096}, CheckpointError, "another size of images"),
    ):
        other = shutil.copytree(data, tmp_path / next(iter(changed)))
        header = json.loads((other / "store.json").read_text())
        (other / "store.json").write_text(json.dumps(header | changed))
        with pytest.raises(error, match=message):
            run(CONFIG, other, straight)
    assert (straight / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_decay": (0.04, math.nan)}, "weight_decay: expected 0 or more"),
        ({"momentum": (0.99, math.nan)}, "momentum: expected shares"),
        ({"teacher_temperature": (0.04, math.nan)}, "teacher_temperature: expected more than 0"),
        ({"layer_scale": math.nan}, "layer_scale: expected 0 or more"),
        ({"batch_size": 23}, "more than the 22 images"),
        ({"architecture": "vitb17"}, "Did you mean"),
        ({"crops": CropConfig(global_size=36, local_size=16)}, "multiple of the patch size"),
        ({"num_heads": 3}, "do not divide into 3 heads"),
        ({"mask_ratio": (0.0, 0.0)}, r"too small for a share of 0.0"),
        ({"mask_ratio": (0.0, 0.05), "workers": 1}, r"mask_ratio.*4 x 4 patches"),
    ],
)
def test_settings_that_do_not_fit(data: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(dataclasses.replace(CONFIG, **changes), data, tmp_path / "run")


def test_a_first_mistake_does_not_block_the_corrected_command(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, corrected = tmp_path / "run", dataclasses.replace(CONFIG, steps=1, seed=9)
    for arguments in ({"data": tmp_path / "absent"}, {"data": data, "init": tmp_path / "absent"}):
        with pytest.raises(HilumError, match="absent"):
            run(CONFIG, out=out, **arguments)
    with pytest.raises(ConfigError, match="more than the 22 images"):
        run(dataclasses.replace(CONFIG, batch_size=23), data, out)
    assert not (out / "config.yaml").exists()

    def crash() -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        stop_at(patch, 2, crash)
        with pytest.raises(RuntimeError, match="crash"):
            run(CONFIG, data, out)
    assert read_yaml(PretrainConfig, out / "config.yaml") == CONFIG  # begun, and without a checkpoint
    run(corrected, data, out, resume=False)
    assert read_yaml(PretrainConfig, out / "config.yaml") == corrected
    assert [line["step"] for line in lines(out)] == [1]


def test_a_config_that_is_not_of_a_run_is_never_replaced(data: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("theme: dark\n")
    with pytest.raises(ConfigError, match="theme"):
        run(CONFIG, data, tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "theme: dark\n"


def test_checkpoints_without_their_settings_are_refused(straight: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run", ignore=shutil.ignore_patterns("config.yaml"))
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        run(CONFIG, data, tmp_path / "run")


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0}, {"keep": 1}, {"warmup": 1.5}, {"crops": CropConfig(global_crops=3)}, {"drop_path": 1.0},
        {"threads": 0}, {"workers": -1}, {"mask_ratio": (0.5, 2.0)}, {"mask_probability": -0.1},
        {"learning_rate": -1.0}, {"clip": -3.0}, {"layer_decay": -0.9}, {"weight_decay": (-0.1, 0.2)},
        {"teacher_temperature": (0.0, 0.07)}, {"momentum": (0.99, 1.01)},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_at_once(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        dataclasses.replace(CONFIG, **changes)


def snapshot(student: dinov2.Network, teacher: dinov2.Network) -> str:
    tensors = {f"s.{name}": value for name, value in student.state_dict().items()}
    return digest(tensors | {f"t.{name}": value for name, value in teacher.state_dict().items()})


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_value_that_is_not_finite_moves_no_weight(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    out, config = tmp_path / "run", dataclasses.replace(CONFIG, checkpoint_every=1)
    held: dict[str, Any] = {}
    real_networks, real_losses, real_clip = dinov2.make_networks, dinov2.compute_losses, dinov2.clip_gradients

    def networks(*arguments: Any) -> Any:
        held["networks"] = real_networks(*arguments)
        return held["networks"]

    def losses(*arguments: Any) -> dinov2.Losses:
        found = real_losses(*arguments)
        held["calls"] = held.get("calls", 0) + 1
        if held["calls"] == 3:
            held["before"] = snapshot(*held["networks"])
            if where == "loss":
                return found._replace(total=found.total * float("nan"), ibot=found.ibot * float("nan"))
        return found

    def clip(student: dinov2.Network, limit: float) -> dict[str, torch.Tensor]:
        if held["calls"] == 3 and where == "gradient":
            next(student.ibot_head.parameters()).grad[0] = float("inf")
        return real_clip(student, limit)

    monkeypatch.setattr(dinov2, "make_networks", networks)
    monkeypatch.setattr(dinov2, "compute_losses", losses)
    monkeypatch.setattr(dinov2, "clip_gradients", clip)
    with pytest.raises(NonFiniteLossError, match=r"Step 3: .*no weight was moved"):
        run(config, data, out)
    assert snapshot(*held["networks"]) == held["before"]
    assert final(out).step == 2
    record = json.loads((out / "non_finite_step_00000003_rank_0.json").read_text())
    assert record["values"]["total" if where == "loss" else "ibot_head"] in ("nan", "inf")
    uids = Store.open(data).uids
    assert len(record["images"]) == 4
    assert set(record["images"]) <= set(uids.tolist())


def test_a_teacher_that_is_not_finite_is_named_where_answers_come_late(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a step is measured before anybody has asked whether it was finite."""
    real = dinov2.teacher_forward

    def forward(*arguments: Any) -> dinov2.TeacherOutput:
        found = real(*arguments)
        broken = found.cls._replace(features=found.cls.features * float("nan"))
        return found._replace(cls=broken, global_cls=found.global_cls * float("nan"))

    monkeypatch.setattr(dinov2, "teacher_forward", forward)
    monkeypatch.setattr(pretrain, "Watch", functools.partial(Watch, lag=2))
    with pytest.raises(NonFiniteLossError, match=r"Step 1: .*no weight was moved"):
        run(dataclasses.replace(CONFIG, losses=LossConfig(centering="centre")), data, tmp_path / "run")


def test_no_checkpoint_is_there_before_the_record_of_its_images(
    straight: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stage starts from is the newest checkpoint and the loose record: the record must not be the older one."""

    def killed(*arguments: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(pretrain._Output, "export", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(dataclasses.replace(CONFIG, checkpoint_every=2), data, tmp_path / "run")
    assert final(tmp_path / "run").step == 2
    seen = exposure.uid_numbers(Store.open(data).uids)[final(tmp_path / "run").tensors["seen"].numpy()]
    assert len(seen) >= 4
    assert np.isin(seen, exposure.read_seen(tmp_path / "run").uids).all()


def grown(size: int) -> PretrainConfig:
    return dataclasses.replace(CONFIG, steps=1, crops=CropConfig(global_size=size, local_size=16, local_crops=2))


def test_the_next_stage_takes_teacher_into_teacher_and_resamples_positions(straight: Path, data: Path) -> None:
    """The public code threw the teacher away and drew new positions (method.md C4)."""
    earlier = final(straight).tensors
    assert not torch.equal(earlier["teacher.backbone.norm.weight"], earlier["student.backbone.norm.weight"])
    config = grown(48)
    student, teacher = dinov2.make_networks(config.vit(), config.heads, seed=5)
    inherited = start_from(straight, student, teacher, Store.open(data).preprocess_id)
    for network, part in ((student, "student"), (teacher, "teacher")):
        for name, value in network.state_dict().items():
            before = earlier[f"{part}.{name}"]
            expected = resize_positions(before, (6, 6)) if name == "backbone.pos_embed" else before
            assert torch.equal(value, expected), (part, name)
        assert network.backbone.pos_embed.shape == (1, 37, 16)
        assert torch.equal(network.backbone.pos_embed[:, 0], earlier[f"{part}.backbone.pos_embed"][:, 0])
    assert np.array_equal(inherited.seen.uids, exposure.read_seen(straight).uids)


def test_a_stage_at_another_resolution_runs_and_remembers_what_was_seen(
    straight: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(grown(48), data, tmp_path / "run", init=straight)
    assert load_backbone(out).config.image_size == 48
    assert set(exposure.read_seen(straight).uids.tolist()) <= set(exposure.read_seen(out).uids.tolist())
    assert f"from {straight}" in capsys.readouterr().out
    run(grown(48), data, out, init=straight)
    with pytest.raises(ConfigError, match="started from"):
        run(grown(48), data, out, init=tmp_path)


def test_a_stage_that_goes_on_without_its_origin_remembers_it(
    straight: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = dataclasses.replace(grown(48), steps=2), tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run(config, data, out, init=straight)
    run(config, data, out)
    assert final(out).values["init"] == str(straight.resolve())
    assert json.loads((out / "config.json").read_text())["init"] == str(straight.resolve())


def test_a_stage_that_was_moved_with_its_origin_goes_on_with_the_same_command(
    straight: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin, weights = tmp_path / "origin", tmp_path / "weights"
    shutil.copytree(straight, origin)
    shutil.copytree(straight, weights, ignore=shutil.ignore_patterns("checkpoints"))
    for init in (origin, weights):
        out = run(grown(48), data, tmp_path / f"from_{init.name}", init=init)
        moved = init.rename(tmp_path / f"moved_{init.name}")
        run(grown(48), data, out, init=moved)
        assert "does not exist" not in capsys.readouterr().err
        run(grown(48), data, out, init=tmp_path / "gone")
        assert "goes on without it" in " ".join(capsys.readouterr().err.split())
        assert json.loads((out / "config.json").read_text())["init"] == str(init)
        other = run(dataclasses.replace(grown(48), seed=1), data, tmp_path / f"not_{init.name}")
        with pytest.raises(ConfigError, match="leave out --init"):
            run(grown(48), data, out, init=other)
    with pytest.raises(ConfigError, match="from no other weights"):
        run(dataclasses.replace(grown(48), seed=1), data, other, init=straight)


def test_a_stage_of_another_network_is_refused(straight: Path, data: Path, tmp_path: Path) -> None:
    preprocess_id = Store.open(data).preprocess_id
    for changes, found in (
        ({"num_heads": 4}, "num_heads 2, here 4"),  # same shapes
        ({"depth": 3}, "depth 2, here 3"),
        ({"heads": HeadConfig(17, 16, 8, 8)}, r"last_layer.weight_g is \(16, 1\), expected \(17, 1\)"),
    ):
        config = dataclasses.replace(grown(48), **changes)
        networks = dinov2.make_networks(config.vit(), config.heads, seed=5)
        with pytest.raises(CheckpointError, match=found):
            start_from(straight, *networks, preprocess_id)
    networks = dinov2.make_networks(grown(48).vit(), CONFIG.heads, seed=5)
    with pytest.raises(PreprocessingMismatchError, match="other-1"):
        start_from(straight, *networks, "other-1")
    with pytest.raises(CheckpointError, match="does not exist"):
        start_from(tmp_path / "absent", *networks, preprocess_id)


def test_a_stage_with_other_patches_resamples_the_kernels(straight: Path, data: Path, tmp_path: Path) -> None:
    """`architecture=init patch_size=16`, from a run as from weights."""
    crops = CropConfig(global_size=64, local_size=32, local_crops=2)
    config = dataclasses.replace(CONFIG, steps=1, crops=crops, patch_size=16)
    student, teacher = dinov2.make_networks(config.vit(), config.heads, seed=5)
    start_from(straight, student, teacher, Store.open(data).preprocess_id)
    for network, part in ((student, "student"), (teacher, "teacher")):
        kernel = final(straight).tensors[f"{part}.backbone.patch_embed.proj.weight"]
        assert torch.equal(network.backbone.patch_embed.proj.weight, resample_patches(kernel, 16))
    named = ("embed_dim", "depth", "num_heads", "registers", "layer_scale")
    config = dataclasses.replace(config, architecture="init", **dict.fromkeys(named))
    assert load_backbone(run(config, data, tmp_path / "run", init=straight)).config.patch_size == 16


def test_what_positions_were_born_as_is_no_difference(straight: Path, data: Path) -> None:
    vit = grown(48).vit()
    born = dataclasses.replace(vit, positions="normal" if vit.positions == "sincos" else "sincos")
    start_from(straight, *dinov2.make_networks(born, CONFIG.heads, seed=5), Store.open(data).preprocess_id)


def test_weights_alone_start_both_networks_with_new_heads(straight: Path, data: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("teacher.safetensors", "config.json", "seen.npz"):
        (alone / name).write_bytes((straight / name).read_bytes())
    config = grown(48)
    student, teacher = dinov2.make_networks(config.vit(), config.heads, seed=5)
    fresh = {name: value.clone() for name, value in student.state_dict().items()}
    inherited = start_from(alone / "teacher.safetensors", student, teacher, Store.open(data).preprocess_id)
    assert len(inherited.seen.uids) == len(exposure.read_seen(straight).uids)
    earlier = final(straight).tensors
    for network in (student, teacher):
        for name, value in network.state_dict().items():
            if name == "backbone.pos_embed":
                assert torch.equal(value, resize_positions(earlier[f"teacher.{name}"], (6, 6)))
            elif name.startswith("backbone."):
                assert torch.equal(value, earlier[f"teacher.{name}"])
            else:
                assert torch.equal(value, fresh[name])
    out = run(config, data, tmp_path / "run", init=alone)
    assert load_backbone(out).config.image_size == 48


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": LossConfig(centering="centre")},
        {"precision": "bf16"},
        {"crops_on": "device"},
        {"sampling": SamplingConfig(order="window", block=2, blocks=3)},
        {"sampling": SamplingConfig(order="window", block=2, blocks=3, datasets="uniform"), "steps": 9},
        {"sampling": SamplingConfig(datasets="sqrt"), "steps": 9},
    ],
)
def test_variants_resume_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    config = dataclasses.replace(CONFIG, **{"steps": 2, **changes})
    whole = final(run(config, data, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_at(patch, config.steps // 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run(config, data, tmp_path / "cut")
    assert digest(final(run(config, data, tmp_path / "cut")).tensors) == digest(whole.tensors)
    assert [line["batch"] for line in lines(tmp_path / "cut")] == [line["batch"] for line in lines(tmp_path / "whole")]


@pytest.fixture(scope="module")
def two_datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images of `large` and four of `small`, in turns: not in the order in which they are stored."""
    folder = tmp_path_factory.mktemp("two") / "store"
    images = [np.full((40, 40), 10 * index, np.uint8) for index in range(20)]
    datasets = ["small" if index % 5 == 2 else "large" for index in range(20)]
    write_arrays(folder, images, np.zeros((20, 1), np.int8), ["x"], datasets=datasets)
    return folder


def test_datasets_are_sampled_as_asked(
    two_datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, drawn = Store.open(two_datasets), []
    real = PretrainSource.__getitem__

    def watch(self: PretrainSource, step: int) -> PretrainBatch:
        drawn.append(real(self, step))
        return drawn[-1]

    monkeypatch.setattr(PretrainSource, "__getitem__", watch)
    for rule, small in (("natural", 4), ("uniform", 10), ("large=1,small=3", 15)):
        drawn.clear()
        sampling = SamplingConfig("window", 2, 4, datasets=rule)
        run(dataclasses.replace(CONFIG, steps=5, sampling=sampling), two_datasets, tmp_path / rule)
        names = store.datasets[np.concatenate([batch.indices.numpy() for batch in drawn])]
        assert (names == "small").sum() == small  # of the twenty draws of an epoch
        assert f"shares of datasets {rule}, order window of 4 blocks of 2" in capsys.readouterr().out
    with pytest.raises(UnknownNameError, match="Did you mean 'small'"):
        run(
            dataclasses.replace(CONFIG, sampling=SamplingConfig(datasets="large=1,smal=3")),
            two_datasets,
            tmp_path / "x",
        )
    with pytest.raises(ConfigError, match="none for small"):
        run(dataclasses.replace(CONFIG, sampling=SamplingConfig(datasets="large=1")), two_datasets, tmp_path)


def test_sampling_settings_are_checked_and_belong_to_the_run(straight: Path, data: Path) -> None:
    for text, message in (
        ("sampling.datasets=sqr", "Did you mean 'sqrt'"),
        ("sampling.order=windw", "Did you mean 'window'"),
        ("sampling.blok=3", "Did you mean 'block"),
        ("sampling.block=0", "window: expected 1 or more"),
        ("sampling.datasets=a=1,b=-1", "'b=-1'"),
    ):
        with pytest.raises(ConfigError, match=message):
            override(CONFIG, [text])
    assert override(CONFIG, ["sampling.datasets=nih=2,mimic=1"]).sampling.datasets == "nih=2,mimic=1"
    with pytest.raises(ConfigError, match=r"sampling\.order was 'random', now 'window'"):
        run(override(CONFIG, ["sampling.order=window"]), data, straight)


def test_a_run_does_not_go_on_with_another_order(
    straight: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same images and settings, stored in another sequence: the same step would see other images."""
    shutil.copytree(straight, tmp_path / "run")
    real = exposure.select
    turned = lambda store, train_on: (pool := real(store, train_on))._replace(indices=pool.indices[::-1].copy())  # noqa: E731
    monkeypatch.setattr(exposure, "select", turned)
    with pytest.raises(CheckpointError, match="another order of images"):
        run(CONFIG, data, tmp_path / "run")


def test_a_damaged_image_is_replaced_and_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, bad = Store.read, 12

    def read(self: Store, index: int) -> np.ndarray:
        if index == bad:
            raise self._damage(index, "planted")
        return real(self, index)

    monkeypatch.setattr(Store, "read", read)
    out = run(dataclasses.replace(CONFIG, steps=8), data, tmp_path / "run")
    uid = Store.open(data).uids[bad]
    assert f"image {uid} is damaged" in capsys.readouterr().err
    assert int(uid, 16) not in exposure.read_seen(out).uids.tolist()


def test_a_damaged_record_of_what_was_seen_is_refused(tmp_path: Path) -> None:
    exposure.write_seen(tmp_path, exposure.Seen(np.array([5, 3], np.uint64), np.array([9], np.uint64)))
    assert exposure.read_seen(tmp_path).uids.tolist() == [3, 5]
    assert exposure.read_seen(tmp_path).pictures.tolist() == [9]
    with (tmp_path / "seen.npz").open("wb") as file:
        np.savez(
            file, uids=np.array([3, 6], np.uint64), sha256=np.array(exposure.seen_digest(np.array([3, 5], np.uint64)))
        )
    with pytest.raises(CheckpointError, match="digest"):
        exposure.read_seen(tmp_path)
    (tmp_path / "seen.npz").write_bytes(b"zip")
    with pytest.raises(CheckpointError, match="cannot be read"):
        exposure.read_seen(tmp_path)
    with pytest.raises(ConfigError, match="16 hex"):
        exposure.uid_numbers(np.array(["patient-1"]))


def test_views_are_cut_where_the_settings_say(straight: Path, data: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, crops_on="device", steps=2)
    out = run(config, data, tmp_path / "run")
    with launch(accelerator="cpu") as engine:
        store = Store.open(data)
        pool = exposure.select(store, config.train_on)
        batch = pretrain_setup.make_source(config, config.vit(), store, pool, engine)[0]
    assert batch.uncut is not None
    ours, theirs = lines(out)[0], lines(straight)[0]
    assert ours["batch"] == batch.digest() != theirs["batch"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)  # views differ by a grey level here and there


def test_every_setting_is_read_somewhere() -> None:
    source = "".join(Path(module.__file__).read_text() for module in (pretrain, pretrain_setup, config))
    unread = [
        field.name
        for field in dataclasses.fields(PretrainConfig)
        if not re.search(rf"(config|self)\.{field.name}\b", source)
        and not re.search(rf'names = \([^)]*"{field.name}"', source)
    ]
    assert unread == []


def test_published_stage_is_the_default() -> None:
    vit, schedules = PretrainConfig().vit(), PretrainConfig().schedules()
    assert (vit.embed_dim, vit.depth, vit.patch_size, vit.registers, vit.image_size) == (1024, 24, 16, 4, 224)
    assert schedules.learning_rate == pytest.approx(1.090e-4, rel=1e-3)  # 2e-4 at a global batch of 304


def test_batch_fields_are_those_that_the_loader_gives() -> None:
    assert {"global_crops", "local_crops", "masks", "mask_weights", "indices"} <= set(
        PretrainBatch.__dataclass_fields__
    )


KILLED = """
import dataclasses, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_pretrain
from hilum.pretraining import dinov2

real, calls = dinov2.update_teacher, 0

def update(*arguments):
    global calls
    calls += 1
    real(*arguments)
    if calls == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    dinov2.update_teacher = update
    config = dataclasses.replace(test_pretrain.CONFIG, checkpoint_every=1, workers=int(sys.argv[5]))
    test_pretrain.run(config, Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_killed_again_and_again_equals_straight(straight: Path, data: Path, tmp_path: Path, workers: int) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, script, str(Path(__file__).parent), data, tmp_path / "run"]
    codes = [
        subprocess.run([*command, str(after), str(workers)], check=False, capture_output=True).returncode
        for after in (2, 2, 1, 100)
    ]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, -signal.SIGKILL, 0]
    assert digest(final(tmp_path / "run").tensors) == digest(final(straight).tensors)


TWO = """
import dataclasses, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_pretrain
from hilum.pretraining import dinov2

real, calls = dinov2.update_teacher, 0
real_losses = dinov2.compute_losses

def update(*arguments):
    global calls
    calls += 1
    real(*arguments)
    if sys.argv[4] == "stop" and calls == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)

def losses(*arguments):
    found = real_losses(*arguments)
    if sys.argv[4] == "nan" and calls == 1 and os.environ["RANK"] == "1":
        return found._replace(koleo=found.koleo * float("nan"))
    return found

dinov2.update_teacher, dinov2.compute_losses = update, losses
test_pretrain.run(test_pretrain.CONFIG, Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_two_processes_stop_resume_and_fail_together(
    straight: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)

    def two(name: str, what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
        arguments = [str(Path(__file__).parent), data, tmp_path / name, what]
        return subprocess.run([*command, *arguments], check=False, capture_output=True, text=True, timeout=120)

    whole = two("whole", "")
    assert whole.returncode == 0, whole.stderr
    assert [line["step"] for line in lines(tmp_path / "whole")] == [1, 2, 3, 4]
    whole_seen, straight_seen = exposure.read_seen(tmp_path / "whole"), exposure.read_seen(straight)
    assert len(whole_seen.uids) == len(straight_seen.uids)  # both ranks' images

    assert two("cut", "stop").returncode != 0
    assert final(tmp_path / "cut").step == 3  # the ranks agree on stopping once a step
    shutil.copytree(tmp_path / "cut", tmp_path / "alone")
    capsys.readouterr()
    alone = lines(run(CONFIG, data, tmp_path / "alone"))
    assert [line["step"] for line in alone] == [1, 2, 3, 4]
    assert "processes: 2 before, 1 now. The images and their order stay" in capsys.readouterr().err
    assert two("cut", "").returncode == 0
    assert digest(final(tmp_path / "cut").tensors) == digest(final(tmp_path / "whole").tensors)

    broken = two("broken", "nan")
    assert broken.returncode != 0
    # Both find out at once; whoever is first says so.
    assert re.search("Step 2: (koleo|a value on another process) is not finite; no weight was moved", broken.stderr)
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "broken").glob("non_finite_step_*.json"))]
    assert [record["step"] for record in records] == [2, 2]


@pytest.mark.gpu
def test_gpu_stops_resumes_and_agrees_with_the_cpu(
    straight: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = dataclasses.replace(CONFIG, accelerator="cuda", drop_path=0.0)
    on_cpu = run(dataclasses.replace(CONFIG, drop_path=0.0), data, tmp_path / "cpu")
    with monkeypatch.context() as patch:
        stop_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run(config, data, tmp_path / "gpu")
    run(config, data, tmp_path / "gpu")
    for ours, theirs in zip(lines(tmp_path / "gpu"), lines(on_cpu), strict=True):
        assert ours["batch"] == theirs["batch"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    half = run(dataclasses.replace(config, precision="bf16", drop_path=0.3), data, tmp_path / "half")
    assert all(np.isfinite(line["loss"]) for line in lines(half))
