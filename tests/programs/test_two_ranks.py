"""Two processes of b images are one of 2b, with DDP and with FSDP2; what one writes another reads; all end together.

This file is also the program that the processes run: `test_two_ranks.py steps FOLDER STRATEGY` trains, `average`
averages gradients in bfloat16, and `fail FOLDER WHAT RANK` fails.

More than 300 lines: the training of one process and of two is the same lines, and stands beside what they must equal.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hilum.backbones.vit import ViTConfig
from hilum.commands import pretrain
from hilum.core.checkpoint import CheckpointWriter, flatten_optimizer, load_newest, load_strictly, restore_optimizer
from hilum.core.config import write_yaml
from hilum.core.distributed import (
    Engine,
    launch,
    max_over_ranks,
    mean_over_ranks,
    rows_of_all_ranks,
    sum_over_ranks,
)
from hilum.core.errors import ConfigError, HilumError
from hilum.core.sharding import is_divided, whole, whole_tensors
from hilum.data.store import write_arrays
from hilum.pretraining import dinov2, losses
from hilum.pretraining.config import PretrainConfig
from hilum.pretraining.crops import CropConfig

IMAGES, LOCALS, SIDE = 8, 3, 4
VIT = ViTConfig(16, 2, 2, patch_size=4, image_size=16, layer_scale=1.0)
HEADS = dinov2.HeadConfig(13, 16, 8, 6)  # 13: does not divide by two
STEPS, HALF = 5, 2


@dataclass(frozen=True)
class Case:
    """What is trained, whatever the number of processes."""

    losses: dinov2.LossConfig
    micro_batches: int = 1
    """In all: of one process, or shared by two."""
    local: bool = False
    """Sinkhorn within a micro-batch of a process, not over processes."""


CASES = {
    "sinkhorn": Case(dinov2.LossConfig(koleo_group=4)),
    "centre": Case(dinov2.LossConfig(koleo_group=2, centering="centre")),
    "accumulated": Case(dinov2.LossConfig(koleo_group=2), micro_batches=4, local=True),
}


def micro_batch(part: int, parts: int) -> dinov2.Batch:
    """Share `part` of `parts` of the same images, crops and masks."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2 * IMAGES, SIDE * SIDE, generator=generator) < torch.linspace(0, 0.6, 2 * IMAGES)[:, None]
    crops = torch.randn(2 * IMAGES, 1, 16, 16, generator=generator)
    local = torch.randn(LOCALS * IMAGES, 1, 8, 8, generator=generator)

    def share(tensor: Tensor, count: int) -> Tensor:
        views = tensor.unflatten(0, (count, IMAGES))
        return views[:, part * IMAGES // parts : (part + 1) * IMAGES // parts].flatten(0, 1)

    masks = share(masks, 2)
    counts = masks.sum(dim=1)
    return dinov2.Batch(
        share(crops, 2), share(local, LOCALS), masks, masks.flatten().nonzero().flatten(),
        torch.repeat_interleave(1 / counts.clamp_min(1), counts),
    )  # fmt: skip


def train(engine: Engine, case: Case, saved: Path, read: Path | None = None) -> dict[str, Tensor]:
    """Five steps; a checkpoint in `saved` after two, or those two from the checkpoint in `read`. Rank 0 gets all."""
    student, teacher = dinov2.make_networks(VIT, HEADS, 0)
    engine.setup(teacher, ("forward_crops",))
    model = engine.setup(student, ("forward_crops",))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
    names = {parameter: name for name, parameter in student.named_parameters()}
    centres, start, totals = dinov2.make_centres(HEADS.prototypes, engine.device), 0, []

    def state() -> dict[str, Tensor]:
        networks = {"student": student.state_dict(), "teacher": teacher.state_dict()}
        networks |= {"optimizer": flatten_optimizer(optimizer, names), "centres": centres._asdict()}
        return {f"{part}.{name}": tensor for part, tensors in networks.items() for name, tensor in tensors.items()}

    if read is not None:
        checkpoint = load_newest(read)
        assert checkpoint is not None
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in checkpoint.tensors.items():
            parts.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = tensor
        load_strictly(student, parts["student"], "the test")
        load_strictly(teacher, parts["teacher"], "the test")
        restore_optimizer(optimizer, names, parts["optimizer"])
        centres, start = dinov2.Centres(**parts["centres"]), checkpoint.step

    mine = range(engine.rank, case.micro_batches * engine.world_size, engine.world_size)
    if case.micro_batches > 1:
        mine = range(engine.rank, case.micro_batches, engine.world_size)
    parts_in_all = max(case.micro_batches, engine.world_size)
    with CheckpointWriter() as writer:
        for step in range(start, STEPS):
            found = []
            for part in mine:
                batch = micro_batch(part, parts_in_all)
                with engine.accumulating(model, part != mine[-1]):
                    taught = dinov2.teacher_forward(teacher, batch)
                    targets = dinov2.teacher_targets(taught, centres, 0.05, case.losses)
                    result = dinov2.compute_losses(model(batch, 0.0, None), targets, batch, case.losses)
                    engine.backward(result.total / len(mine))
                if part != mine[-1] and engine.world_size > 1:
                    assert_nothing_was_exchanged(student)
                if case.losses.centering == "centre":
                    centres = dinov2.update_centres(centres, taught, 0.9)
                found.append(torch.stack(list(result)).detach())
            norms = {part: whole(norm) for part, norm in dinov2.clip_gradients(student, 1.0).items()}
            optimizer.found_inf = torch.zeros(())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            dinov2.update_teacher(teacher, student, 0.9)
            totals.append(
                torch.cat([mean_over_ranks(torch.stack(found).mean(dim=0)), torch.stack(list(norms.values()))])
            )
            if step + 1 == HALF:
                tensors = whole_tensors(state())
                if engine.rank == 0:
                    writer.save(saved, HALF, tensors, {})
    tensors = whole_tensors(state())
    return tensors | {"totals": torch.stack(totals)} if engine.rank == 0 else {}


def assert_nothing_was_exchanged(student: torch.nn.Module) -> None:
    """Between micro-batches: gradients of each process (DDP), or not yet any part of their mean (FSDP2)."""
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    for gradient in gradients[:1]:
        assert max_over_ranks(gradient.clone()).ne(-max_over_ranks(-gradient)).any()
    assert bool(gradients) != any(is_divided(parameter) for parameter in student.parameters())


def programs(folder: Path, strategy: str) -> None:
    """All cases in two processes; then one that goes on where a single process was."""
    with launch(2, "fp32", "cpu", strategy, "fp32") as engine:  # type: ignore[arg-type]
        for name, case in CASES.items():
            identity = mock.patch.multiple(losses, sum_over_ranks=lambda x: x, max_over_ranks=lambda x: x)
            with identity if case.local else mock.MagicMock():
                tensors = train(engine, case, folder / f"{name} checkpoints")
            if engine.rank == 0:
                save_file(tensors, folder / f"{name}.safetensors")
        tensors = train(engine, CASES["sinkhorn"], folder / "unused", folder / "single")
        if engine.rank == 0:
            save_file(tensors, folder / "resumed.safetensors")
        assert_a_flag_skips_a_step(engine)
        assert_rows_meet(engine)


def gradients_of(engine: Engine) -> dict[str, Tensor]:
    """Gradients of one step, averaged over processes."""
    student, teacher = dinov2.make_networks(VIT, HEADS, 0)
    engine.setup(teacher, ("forward_crops",))
    model, case = engine.setup(student, ("forward_crops",)), CASES["sinkhorn"]
    batch = micro_batch(engine.rank, engine.world_size)
    taught = dinov2.teacher_forward(teacher, batch)
    targets = dinov2.teacher_targets(taught, dinov2.make_centres(HEADS.prototypes, engine.device), 0.05, case.losses)
    engine.backward(dinov2.compute_losses(model(batch, 0.0, None), targets, batch, case.losses).total)
    return {name: whole(parameter.grad) for name, parameter in student.named_parameters() if parameter.grad is not None}


def average(folder: Path, strategy: str) -> None:
    """One step whose gradients are averaged in bfloat16."""
    with launch(2, "fp32", "cpu", strategy, "bf16") as engine:  # type: ignore[arg-type]
        found = gradients_of(engine)
        if engine.rank == 0:
            save_file(found, folder / "gradients.safetensors")


def assert_rows_meet(engine: Engine) -> None:
    """One image on each of two processes: the rank of all is not 1."""
    mine = torch.tensor([[1.0, 0.0], [2.0, 0.0]]) + engine.rank * torch.tensor([0.0, 3.0])
    together = rows_of_all_ranks(mine, 1024)
    assert together.tolist() == [[1.0, 0.0], [2.0, 0.0], [1.0, 3.0], [2.0, 3.0]]
    assert rows_of_all_ranks(mine, 2).tolist() == [[1.0, 0.0], [1.0, 3.0]]
    assert losses.effective_rank(mine) < 1.01 < losses.effective_rank(together)


def assert_a_flag_skips_a_step(engine: Engine) -> None:
    """A step found not to be finite moves neither student nor teacher, divided or not, without a word to the host."""
    student, teacher = dinov2.make_networks(VIT, HEADS, 0)
    engine.setup(teacher, ("forward_crops",))
    model = engine.setup(student, ("forward_crops",))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
    batch, centres = micro_batch(engine.rank, 2), dinov2.make_centres(HEADS.prototypes, engine.device)
    for skip in (1.0, 0.0):
        before = {name: whole(tensor).clone() for name, tensor in student.state_dict().items()}
        config = dinov2.LossConfig(koleo_group=2)
        targets = dinov2.teacher_targets(dinov2.teacher_forward(teacher, batch), centres, 0.05, config)
        engine.backward(dinov2.compute_losses(model(batch, 0.0, None), targets, batch, config).total)
        optimizer.found_inf = torch.tensor(skip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after = {name: whole(tensor) for name, tensor in student.state_dict().items()}
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) == bool(skip)
        dinov2.update_teacher(teacher, student, 0.5, torch.tensor(skip))
        moved = {name: whole(tensor) for name, tensor in teacher.state_dict().items()}
        for name, tensor in before.items():
            torch.testing.assert_close(moved[name], tensor if skip else (tensor + after[name]) / 2)


def start(*arguments: object, torchrun: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """This file in two processes, started by itself or by torchrun; returns when both have ended."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if torchrun else []
    command = [sys.executable, *launcher, __file__, *map(str, arguments)]
    kept = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    kept |= {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=240, env=kept)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, dict[str, Tensor]], Path]]:
    """Every case in one process, and the checkpoint that it wrote on the way."""
    folder = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with launch(1, "fp32", "cpu") as engine:
        yield {name: train(engine, case, folder / name) for name, case in CASES.items()}, folder / "sinkhorn"
    torch.set_num_threads(threads)


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Losses and gradient norms within 1e-6 and 1e-5 of their size, weights after five steps within 1e-5."""
    assert found.keys() == wanted.keys()
    steps = found["totals"].shape[0]
    torch.testing.assert_close(found["totals"][:, :6], wanted["totals"][-steps:, :6], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["totals"][:, 6:], wanted["totals"][-steps:, 6:], rtol=1e-5, atol=1e-6)
    for name, tensor in wanted.items():
        if name.startswith(("student.", "teacher.")):
            torch.testing.assert_close(
                found[name], tensor, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "torchrun"), [("ddp", False), ("ddp", True), ("fsdp2", False), ("fsdp2", True)])
def test_two_processes_equal_one(alone: Any, tmp_path: Path, strategy: str, torchrun: bool) -> None:
    wanted, single = alone
    (tmp_path / "single").symlink_to(single)
    done = start("steps", tmp_path, strategy, torchrun=torchrun)
    assert done.returncode == 0, done.stderr
    for name in CASES:
        assert_equal(load_file(tmp_path / f"{name}.safetensors"), wanted[name])
    # A checkpoint of one process goes on in two, and one of two in one.
    assert_equal(load_file(tmp_path / "resumed.safetensors"), wanted["sinkhorn"])
    with launch(1, "fp32", "cpu") as engine:
        back = train(engine, CASES["sinkhorn"], tmp_path / "unused", tmp_path / "sinkhorn checkpoints")
    assert_equal(back, wanted["sinkhorn"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_gradients_averaged_in_bfloat16_are_right_to_its_precision(alone: Any, tmp_path: Path, strategy: str) -> None:
    done = start("average", tmp_path, strategy)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "gradients.safetensors")
    with launch(1, "fp32", "cpu") as engine:
        wanted = gradients_of(engine)
    assert found.keys() == wanted.keys()
    off = {name: ((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted}
    qkv_bias = {name for name in off if name.endswith("qkv.bias")}  # a third of it has no gradient but rounding
    assert max(error for name, error in off.items() if name not in qkv_bias) < 2**-7
    assert min(off.values()) > 2**-13  # float32 would come closer


@pytest.mark.slow
def test_the_program_ends_alike_with_both_strategies(tmp_path: Path) -> None:
    """`hilum pretrain` itself, with real crops, masks and files; and a run of two processes that one finishes."""
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (40, 44), dtype=np.uint8) for _ in range(12)]
    write_arrays(tmp_path / "store", images, np.zeros((12, 1), np.int8), ["x"])
    config = PretrainConfig(
        architecture="demo8", embed_dim=16, depth=2, num_heads=2, layer_scale=0.1, heads=HEADS, batch_size=4, steps=4,
        crops=CropConfig(global_size=32, local_size=16, local_crops=2), learning_rate=0.02, momentum=(0.6, 1.0),
        losses=dinov2.LossConfig(koleo_group=2), precision="fp32", accelerator="cpu", threads=1, checkpoint_every=2,
    )  # fmt: skip
    write_yaml(tmp_path / "tiny.yaml", config)
    found = {}
    for strategy in ("ddp", "fsdp2"):
        command = ["pretrain", "tiny.yaml", f"strategy={strategy}", "--data", "store", "--out", strategy]
        program = [str(Path(sys.executable).with_name("hilum")), *command, "--devices", "2"]
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        found[strategy] = load_newest(tmp_path / strategy / "checkpoints").tensors
    assert found["ddp"].keys() == found["fsdp2"].keys()
    for name, tensor in found["ddp"].items():
        torch.testing.assert_close(found["fsdp2"][name], tensor, rtol=0, atol=1e-5, msg=name)
    shutil.rmtree(tmp_path / "fsdp2" / "checkpoints" / "step_00000004")
    pretrain.run(config, tmp_path / "store", tmp_path / "fsdp2")
    last = load_newest(tmp_path / "fsdp2" / "checkpoints")
    assert last.step == 4
    lines = (tmp_path / "fsdp2" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == 4


def fail(folder: Path, what: str, rank: int) -> None:
    """Steps that exchange something; in the fifth one process, or both, do something else."""
    try:
        with launch(2, "fp32", "cpu") as engine:
            for step in range(200):
                sum_over_ranks(torch.ones(8))
                time.sleep(0.02)
                if step == 5 and what == "stop":
                    time.sleep(8.0 if engine.rank == rank else 0.0)  # longer than a launcher waits for the slower one
                    (folder / f"{engine.rank} saved").touch()
                    raise SystemExit(75)
                if step == 5 and (engine.rank == rank or rank == 2):
                    (folder / "began").touch()
                    {
                        "error": lambda: raise_(ConfigError("planted")),
                        "bug": lambda: raise_(ValueError("planted")),
                        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
                        "sleep": lambda: time.sleep(1000),
                    }[what]()
    except HilumError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def raise_(error: Exception) -> None:
    raise error


TIMEOUT = 8
ENDS = [
    ("error", 0, "error: planted"),
    ("error", 1, "error: planted"),
    ("error", 2, "error: planted"),
    ("bug", 1, "ValueError: planted"),
    ("kill", 0, "error: Process 0 of this run, of 2, was ended"),
    ("kill", 1, "error: Process 1 of this run, of 2, was ended by SIGKILL"),
    ("sleep", 0, "error: Another process of this run did not answer in time"),
    ("sleep", 1, "error: Another process of this run did not answer in time"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("what", "rank", "message"), ENDS)
def test_all_end_with_one_message(tmp_path: Path, what: str, rank: int, message: str) -> None:
    done = start("fail", tmp_path, what, rank, HILUM_COLLECTIVE_TIMEOUT=str(TIMEOUT))
    took = time.time() - (tmp_path / "began").stat().st_mtime
    said = [line for line in done.stderr.splitlines() if re.match(r"(error|\w*Error): ", line)]
    assert len(said) == 1, done.stderr
    assert message in said[0]
    assert done.returncode == (-signal.SIGKILL if (what, rank) == ("kill", 0) else 1)
    assert took < 10 + (TIMEOUT + 10 if what == "sleep" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_saves_longer_is_waited_for(tmp_path: Path, rank: int) -> None:
    """Both leave with the status that asks for another run; the launcher must not end the slower one."""
    done = start("fail", tmp_path, "stop", rank)
    assert done.returncode == 75, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0 saved", "1 saved"]
    assert "error" not in done.stderr


def main() -> None:
    """What the processes do."""
    torch.set_num_threads(1)
    what, folder, *rest = sys.argv[1:]
    if what == "steps":
        programs(Path(folder), *rest)
    elif what == "average":
        average(Path(folder), *rest)
    else:
        fail(Path(folder), rest[0], int(rest[1]))


if __name__ == "__main__":
    main()
