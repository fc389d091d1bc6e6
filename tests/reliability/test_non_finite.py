"""A loss that is not finite: no weight moves, the step is named, its batch is saved and replays (R6).

The overflow here is real: a learning rate at which the weights leave the range of float32.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hilum.core.checkpoint import Checkpoint, digest, load_checkpoint, load_strictly
from hilum.core.seeding import torch_stream
from hilum.data.samplers import EndlessSampler
from hilum.data.store import Store
from hilum.data.transforms import normalise, preprocessing
from hilum.pretraining import dinov2, exposure
from hilum.pretraining.dinov2 import Centres
from hilum.pretraining.loading import PretrainSource
from programs import CONFIG, STEPS, Bench, lines, newest, weights

OVERFLOW: dict[str, Any] = {"learning_rate": 1e36, "warmup": 0.5, "clip": 0.0}


def part(saved: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in saved.tensors.items() if key.startswith(f"{name}.")}


def memory_digest(saved: Checkpoint) -> str:
    """As `hooks.print_weights_at_end` prints it."""
    return digest(
        {f"{name}.{key}": value for name in ("student", "teacher") for key, value in part(saved, name).items()}
    )


def test_a_real_overflow_is_named_saved_and_replays(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = bench.pretrain(out, **OVERFLOW)
    child = bench.warm.run(command, [["print_weights_at_end"]])
    assert child.status == 1, child.said
    [path] = out.glob("non_finite_step_*.json")
    record = json.loads(path.read_text())
    step = record["step"]
    assert f"error: Step {step}: " in child.errors
    assert str(path) in child.errors
    assert "no weight was moved" in child.errors
    bad = {name for name, value in record["values"].items() if isinstance(value, str)}
    assert bad

    # No weight, average or checkpoint has moved since the step before.
    saved = newest(out)
    assert saved is not None
    assert saved.step == step - 1 == lines(out)[-1]["step"]
    assert child.output.split("weights ")[-1].strip() == memory_digest(saved)
    before = weights(out)

    # The same command comes to the same end, and nothing is worse for it.
    again = bench.warm.run(command)
    assert again.status == 1
    assert json.loads(path.read_text()) == record
    assert weights(out) == before

    # The saved batch and the last checkpoint give the same values once more, outside the program.
    assert replay(bench, saved, step - 1, record["images"]) == record["values"]


def replay(bench: Bench, saved: Checkpoint, step: int, images: list[str]) -> dict[str, Any]:
    """The losses and gradient norms of a step, from a checkpoint and the place of the step in the order."""
    config = dataclasses.replace(CONFIG, **OVERFLOW)
    store = Store.open(bench.data)
    sampler = EndlessSampler(exposure.select(store, config.train_on).indices, config.batch_size, config.seed)
    source = PretrainSource(
        store, sampler, config.crops, config.vit().patch_size, config.mask_ratio, config.mask_probability
    )
    loaded = source[step]
    assert store.uids[loaded.indices.numpy()].tolist() == images
    student, teacher = dinov2.make_networks(config.vit(), config.heads, config.seed)
    load_strictly(student, part(saved, "student"), "replay")
    load_strictly(teacher, part(saved, "teacher"), "replay")
    recipe = preprocessing(store.preprocess_id)
    batch = dinov2.Batch(
        normalise(loaded.global_crops, recipe), normalise(loaded.local_crops, recipe), loaded.masks,
        loaded.masks.flatten().nonzero().flatten(), loaded.mask_weights,
    )  # fmt: skip
    torch.set_num_threads(1)
    taught = dinov2.teacher_forward(teacher, batch)
    temperature = config.schedules().at(step).teacher_temperature
    targets = dinov2.teacher_targets(taught, Centres(**part(saved, "centres")), temperature, config.losses)
    said = student(batch, config.drop_path, torch_stream(config.seed, "drop path", step, 0))
    losses = dinov2.compute_losses(said, targets, batch, config.losses)
    losses.total.backward()
    norms = dinov2.clip_gradients(student, config.clip)
    found = {name: value.item() for name, value in (losses._asdict() | norms).items()}
    return {name: value if math.isfinite(value) else str(value) for name, value in found.items()}


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_ranks_agree_on_a_value_that_one_of_them_met(bench: Bench, tmp_path: Path, rank: int) -> None:
    out, step = tmp_path / "run", 3
    children = bench.warm.ranks(bench.pretrain(out), [["not_a_number", step, rank], ["print_weights_at_end"]])
    assert [child.wait() for child in children] == [1, 1], [child.said for child in children]
    saved = newest(out)
    assert saved is not None
    assert saved.step == step - 1
    reference = load_checkpoint(bench.straight(2, keep=STEPS) / "checkpoints" / f"step_{step - 1:08d}")
    assert digest(saved.tensors) == digest(reference.tensors)
    for number, child in enumerate(children):
        assert child.output.split("weights ")[-1].strip() == memory_digest(saved), "a rank has moved its weights"
        record = json.loads((out / f"non_finite_step_{step:08d}_rank_{number}.json").read_text())
        assert (record["values"]["total"] == "nan") == (number == rank)
        assert len(record["images"]) == CONFIG.batch_size // 2
    said = [line for child in children for line in child.errors.splitlines() if line.startswith("error: ")]
    assert [line.startswith(f"error: Step {step}: ") for line in said] == [True], "one message for all"


def test_a_step_that_is_finite_leaves_no_record(bench: Bench) -> None:
    assert not list(bench.straight().glob("non_finite*"))
    assert np.isfinite([line["loss"] for line in lines(bench.straight())]).all()
