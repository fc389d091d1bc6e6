"""The single-process engine, what it refuses, and two real processes that must equal one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hilum.core import distributed
from hilum.core.errors import ConfigError


def test_one_cpu_process_never_imports_fabric() -> None:
    program = (
        "import sys, torch\n"
        "from hilum.core.distributed import launch\n"
        "with launch(1, 'fp32', 'cpu') as engine:\n"
        "    module = engine.setup(torch.nn.Linear(2, 1))\n"
        "    engine.backward(module(torch.ones(1, 2)).sum())\n"
        "assert not [name for name in sys.modules if name.startswith('lightning')]\n"
        "assert engine.world_size == 1 and engine.rank == 0\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_sums_are_the_identity_in_one_process() -> None:
    values = torch.tensor([1.0, -2.0])
    for reduce in (distributed.sum_over_ranks, distributed.max_over_ranks, distributed.mean_over_ranks):
        assert torch.equal(reduce(values.clone()), values)
    assert distributed.world_size() == 1


def test_precision_is_that_of_matrix_products() -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with distributed.launch(1, precision, "cpu") as engine, engine.autocast():  # type: ignore[arg-type]
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"), distributed.launch(1, "fp32", "cuda"):
        pass
    with pytest.raises(ConfigError, match="devices=0"), distributed.launch(0, "fp32", "cpu"):
        pass


def test_launchers_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # the batch script of an allocation, without srun
    assert distributed._launched_processes() == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert distributed._launched_processes() == 8
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed._launched_processes() == 2


STEP = """
import json, sys
from pathlib import Path
import torch
from hilum.backbones.vit import ViTConfig
from hilum.core.checkpoint import digest
from hilum.core.distributed import launch, max_over_ranks, mean_over_ranks, sum_over_ranks
from hilum.pretraining import dinov2

torch.set_num_threads(1)
IMAGES, LOCALS, SIDE = 4, 3, 4
config = dinov2.LossConfig(koleo=0.0, centering=sys.argv[2])
vit = ViTConfig(16, 2, 2, patch_size=4, image_size=16, layer_scale=1.0)
heads = dinov2.HeadConfig(12, 16, 8, 6)

def part_of(tensor, crops, rank, size):
    views = tensor.unflatten(0, (crops, IMAGES))
    return views[:, rank * IMAGES // size : (rank + 1) * IMAGES // size].flatten(0, 1)

def batch_of(rank, size):
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2 * IMAGES, SIDE * SIDE, generator=generator) < torch.linspace(0, 0.6, 2 * IMAGES)[:, None]
    crops = torch.randn(2 * IMAGES, 1, 16, 16, generator=generator)
    local = torch.randn(LOCALS * IMAGES, 1, 8, 8, generator=generator)
    masks = part_of(masks, 2, rank, size)
    counts = masks.sum(dim=1)
    return dinov2.Batch(
        part_of(crops, 2, rank, size), part_of(local, LOCALS, rank, size), masks,
        masks.flatten().nonzero().flatten(), torch.repeat_interleave(1 / counts.clamp_min(1), counts),
    )

with launch(int(sys.argv[3]), "fp32", "cpu") as engine:
    assert torch.equal(max_over_ranks(torch.tensor([engine.rank])), torch.tensor([engine.world_size - 1]))
    student, teacher = dinov2.make_networks(vit, heads, 0)
    model = engine.setup(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
    centres = dinov2.make_centres(heads.prototypes, engine.device)
    batch = batch_of(engine.rank, engine.world_size)
    totals = []
    for step in range(3):
        taught = dinov2.teacher_forward(teacher, batch)
        targets = dinov2.teacher_targets(taught, centres, 0.05, config)
        losses = dinov2.compute_losses(model(batch, 0.0, None), targets, batch, config)
        engine.backward(losses.total)
        norms = dinov2.clip_gradients(student, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dinov2.update_teacher(teacher, student, 0.9)
        centres = dinov2.update_centres(centres, taught, 0.9)
        totals.append(mean_over_ranks(torch.stack(list(losses)).detach().clone()).double().tolist())
        totals[-1] += [norm.item() for norm in norms.values()]
    flat = torch.cat([parameter.detach().flatten() for parameter in [*student.parameters(), *teacher.parameters()]])
    spread = max_over_ranks(flat.clone()) + max_over_ranks(-flat)
    assert spread.abs().max() == 0, "the ranks have drifted apart"
    if engine.rank == 0:
        record = {"size": engine.world_size, "totals": totals, "weights": flat[::7].tolist()}
        Path(sys.argv[1]).write_text(json.dumps(record))
"""


def steps(tmp_path: Path, processes: int, centering: str, torchrun: bool) -> dict[str, object]:
    script, result = tmp_path / "step.py", tmp_path / f"{processes}{torchrun}.json"
    script.write_text(STEP)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if torchrun else []
    command = [sys.executable, *launcher, str(script), str(result), centering, str(1 if torchrun else processes)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(result.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("centering", ["sinkhorn", "centre"])
@pytest.mark.parametrize("torchrun", [True, False])
def test_two_processes_equal_one_with_twice_the_images(tmp_path: Path, centering: str, torchrun: bool) -> None:
    """No drop path and no KoLeo: both are by design drawn, or taken, inside one process's images."""
    one, two = steps(tmp_path, 1, centering, False), steps(tmp_path, 2, centering, torchrun)
    assert (one["size"], two["size"]) == (1, 2)
    torch.testing.assert_close(
        torch.tensor(two["totals"])[:, :4], torch.tensor(one["totals"])[:, :4], rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        torch.tensor(two["totals"])[:, 6:], torch.tensor(one["totals"])[:, 6:], rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(torch.tensor(two["weights"]), torch.tensor(one["weights"]), rtol=1e-4, atol=2e-5)
