"""The single-process engine, and what it refuses; two real processes are in `programs/test_two_ranks.py`."""

import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch

from hilum.core import distributed
from hilum.core.errors import ConfigError


def test_one_cpu_process_never_imports_fabric() -> None:
    program = (
        "import sys, torch\n"
        "from hilum.core.distributed import launch\n"
        "with launch(1, 'fp32', 'cpu') as engine:\n"
        "    module = engine.setup(torch.nn.Linear(2, 1), ('forward',))\n"
        "    with engine.accumulating(module):\n"
        "        engine.backward(module(torch.ones(1, 2)).sum())\n"
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


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ("LightningEnvironment", 4)),
        ({"SLURM_NTASKS": "1"}, ("LightningEnvironment", 4)),
        ({"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8"}, ("LightningEnvironment", 4)),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}, ("LightningEnvironment", 4)),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS_PER_NODE": "8"}, ("SLURMEnvironment", 8)),
        ({"SLURM_STEP_NUM_TASKS": "2", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "3"}, (None, 3)),
    ],
)  # fmt: skip
def test_who_starts_the_processes(
    variables: dict[str, str], expected: tuple[str | None, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocation of SLURM starts nothing: only srun and torchrun do."""
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS_PER_NODE", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed._cluster(4) == expected


def test_srun_must_say_how_many_it_starts_on_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ConfigError, match="--ntasks-per-node"):
        distributed._cluster(1)


def test_the_timeout_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HILUM_COLLECTIVE_TIMEOUT", raising=False)
    assert distributed._timeout() == distributed.COLLECTIVE_TIMEOUT
    monkeypatch.setenv("HILUM_COLLECTIVE_TIMEOUT", "7")
    assert distributed._timeout() == timedelta(seconds=7)
    for wrong in ("0", "-1", "soon", "1.5"):
        monkeypatch.setenv("HILUM_COLLECTIVE_TIMEOUT", wrong)
        with pytest.raises(ConfigError, match=f"HILUM_COLLECTIVE_TIMEOUT='{wrong}'"):
            distributed._timeout()
