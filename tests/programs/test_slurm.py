"""`hilum slurm`: the script is read by bash, asks for what was asked, and runs under a stand-in for SLURM."""

import dataclasses
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hilum import cli
from hilum.commands.slurm import Resources, _seconds, run
from hilum.core.config import write_yaml
from hilum.core.errors import ConfigError
from hilum.data.store import write_arrays
from hilum.pretraining.config import PretrainConfig
from hilum.pretraining.crops import CropConfig
from hilum.pretraining.dinov2 import HeadConfig
from hilum.recipes import PRETRAIN_RECIPES

CONFIG = PretrainConfig(
    architecture="demo8", embed_dim=16, depth=1, num_heads=2, registers=1, layer_scale=0.1,
    crops=CropConfig(global_size=32, local_size=16, local_crops=2), heads=HeadConfig(16, 16, 8, 8),
    batch_size=4, steps=300, precision="fp32", accelerator="cpu", threads=1, log_every=1, checkpoint_every=1000,
)  # fmt: skip

# What srun does, as far as the programs see: one process a task, each told its number; signals are passed on.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
from pathlib import Path

words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = int(os.environ["SLURM_NTASKS"])
processes = []
for task in range(tasks):
    own = {{"SLURM_PROCID": task, "SLURM_LOCALID": task, "SLURM_NODEID": 0, "SLURM_STEP_NUM_TASKS": tasks}}
    own = {{name: str(value) for name, value in own.items()}}
    processes.append(subprocess.Popen(words, env=os.environ | own))
metrics = Path(words[words.index("--out") + 1]) / "metrics.jsonl"
if "SLURM_RESTART_COUNT" not in os.environ:  # the first turn meets its limit after a few steps
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGUSR1)
sys.exit(max(process.wait() for process in processes))
"""
SHOW = """#!{python}
import json, sys
from pathlib import Path
Path({seen!r}).write_text(json.dumps(sys.argv[1:]))
sys.exit(int({status}))
"""


def stand_in(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(stat.S_IRWXU)


def written(
    folder: Path, resources: Resources, config: PretrainConfig = CONFIG, overrides: tuple[str, ...] = ()
) -> Path:
    script = folder / "pretrain.sbatch"
    return run(config, "laptop_128", list(overrides), folder / "store", folder / "run", None, resources, script)


def submit(script: Path, bin_: Path, tasks: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script as SLURM would on the first node of a job."""
    ours = ("SLURM", "WORLD", "RANK", "LOCAL", "MASTER")
    outside = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    job = {
        "PATH": f"{bin_}:{os.environ['PATH']}", "SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "hilum", "SLURM_NNODES": "1",
        "SLURM_NTASKS": str(tasks), "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NODELIST": "localhost", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(
        ["bash", script], env=outside | job | environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.parametrize("recipe", sorted(PRETRAIN_RECIPES))
def test_every_recipe_becomes_a_script_that_bash_reads(tmp_path: Path, recipe: str) -> None:
    config = PRETRAIN_RECIPES[recipe]()
    script = run(config, recipe, [], tmp_path / "s", tmp_path / "r", None, Resources(), tmp_path / "x.sbatch")
    subprocess.run(["bash", "-n", script], check=True)


def test_the_script_asks_for_what_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resources = Resources(2, 2, 6, "2-12:30:00", "gpu,big", "lab_7", "h200&nvlink", "mine", ("module load cuda",))
    text = written(tmp_path, resources).read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert asked == {
        "job-name": "mine", "partition": "gpu,big", "account": "lab_7", "constraint": '"h200&nvlink"', "nodes": "2",
        "ntasks-per-node": "2", "gpus-per-node": "2", "cpus-per-task": "6", "time": "2-12:30:00", "signal": "USR1@120",
        "requeue": "", "open-mode": "append", "output": f'"{tmp_path}/pretrain-%j.log"',
    }  # fmt: skip
    body = text.splitlines()
    first_command = next(number for number, line in enumerate(body) if line and not line.startswith("#"))
    assert not [line for line in body[first_command:] if line.startswith("#SBATCH")]  # SLURM would not read them
    assert body.index("module load cuda") < next(number for number, line in enumerate(body) if line.startswith("srun"))
    assert max(len(line) for line in body if str(tmp_path) not in line) <= 120
    said = capsys.readouterr()
    assert "4 images a step, 1 in each process at a time" in said.out
    assert said.out.splitlines()[-1] == f"Next: sbatch {tmp_path}/pretrain.sbatch"
    assert "is no store here" in said.err


def test_every_word_arrives_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blanks, quotes, dollars and percent signs in paths and settings; paths are absolute, names are not."""
    folder = tmp_path / 'my $HOME\'s 100% "data"'
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "laptop_128").mkdir()  # a folder of that name is not the recipe
    overrides = ["train_on=[train, '']", "sampling.datasets=a=1,b=2", "seed=3"]
    script = tmp_path / "a b.sbatch"
    arguments = ["slurm", "laptop_128", *overrides, "--data", "a store", "--out", "$(rm -rf run)"]
    monkeypatch.setattr(sys, "argv", ["hilum", *arguments, "--init", "dinov2_vits14", "--out-script", str(script)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    seen = tmp_path / "seen.json"
    stand_in(tmp_path / "bin", "srun", SHOW.format(python=sys.executable, seen=str(seen), status=0))
    assert submit(script, tmp_path / "bin").returncode == 0
    words = json.loads(seen.read_text())
    words = words[next(number for number, word in enumerate(words) if not word.startswith("--")) :]
    assert Path(words[0]).name == "hilum"
    assert words[1:] == [
        "pretrain", "laptop_128", *overrides, "--data", f"{folder}/a store", "--out", f"{folder}/$(rm -rf run)",
        "--init", "dinov2_vits14",
    ]  # fmt: skip


@pytest.mark.parametrize(("status", "queued"), [(0, False), (1, False), (75, True), (137, False)])
def test_only_saved_run_me_again_is_queued_again(tmp_path: Path, status: int, queued: bool) -> None:
    script, bin_ = written(tmp_path, Resources()), tmp_path / "bin"
    for name, ends in (("srun", status), ("scontrol", 0)):
        stand_in(bin_, name, SHOW.format(python=sys.executable, seen=str(tmp_path / name), status=ends))
    done = submit(script, bin_)
    assert done.returncode == status
    assert (tmp_path / "scontrol").exists() == queued
    if queued:
        assert json.loads((tmp_path / "scontrol").read_text()) == ["requeue", "4242"]
        assert "queued again" in done.stdout
    assert "turn 1 of job 4242" in done.stdout


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("24:00:00", 86400), ("2-3", 183600), ("1-0:30", 88200),
     ("1-01:00:01", 90001)],
)  # fmt: skip
def test_times_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert _seconds(time) == seconds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "--nodes=0"), ({"gpus_per_node": -1}, "--gpus-per-node=-1"),
        ({"cpus_per_gpu": 0}, "--cpus-per-gpu=0"),
        ({"time": "a day"}, "HH:MM:SS"), ({"time": "1:2:3:4"}, "HH:MM:SS"), ({"time": "5"}, "at least 6 minutes"),
        ({"partition": "gpu\n#SBATCH --exclusive"}, "--partition"), ({"account": "a b"}, "--account"),
        ({"constraint": 'a"b'}, "--constraint"), ({"name": "x;rm"}, "--name"), ({"setup": ("a\nb",)}, "one line"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(Resources(), **changes)


def test_a_batch_that_does_not_divide_and_a_file_that_is_not_ours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch_size=4 does not divide into 6 processes \(2 x 3 GPUs\)"):
        written(tmp_path, Resources(2, 3))
    script = written(tmp_path, Resources())
    written(tmp_path, Resources(time="1:00:00"))
    assert "--time=1:00:00" in script.read_text()
    script.write_text("#!/bin/bash\necho mine\n")
    with pytest.raises(ConfigError, match="was not written by this program"):
        written(tmp_path, Resources())
    assert "mine" in script.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, 2])
def test_two_turns_of_a_job_are_one_run(tmp_path: Path, tasks: int) -> None:
    """The limit comes after a few steps; the job queues itself again, and its second turn finishes the run."""
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (40, 44), dtype=np.uint8) for _ in range(12)]
    write_arrays(tmp_path / "store", images, np.zeros((12, 1), np.int8), ["x"])
    write_yaml(tmp_path / "tiny.yaml", CONFIG)
    out, bin_ = tmp_path / "a run", tmp_path / "bin"
    script = run(
        CONFIG,
        str(tmp_path / "tiny.yaml"),
        [],
        tmp_path / "store",
        out,
        None,
        Resources(1, tasks),
        tmp_path / "x.sbatch",
    )
    stand_in(bin_, "srun", SRUN.format(python=sys.executable))
    stand_in(bin_, "scontrol", SHOW.format(python=sys.executable, seen=str(tmp_path / "scontrol"), status=0))
    first = submit(script, bin_, tasks=tasks)
    assert first.returncode == 75, first.stderr
    assert json.loads((tmp_path / "scontrol").read_text()) == ["requeue", "4242"]
    (tmp_path / "scontrol").unlink()
    second = submit(script, bin_, tasks=tasks, SLURM_RESTART_COUNT="1")
    assert second.returncode == 0, second.stderr
    assert not (tmp_path / "scontrol").exists()
    assert "turn 2 of job 4242" in second.stdout
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 301))


@pytest.mark.slow
@pytest.mark.parametrize("tasks", ["1", "4"])
def test_an_allocation_without_srun_is_a_machine_like_any_other(tmp_path: Path, tasks: str) -> None:
    """`hilum pretrain --devices 2` in a batch script or at the prompt of salloc starts its two processes itself."""
    program = tmp_path / "program.py"
    program.write_text(
        "from hilum.core.distributed import launch\n"
        "with launch(2, 'fp32', 'cpu') as engine:\n"
        "    print('process', engine.rank, 'of', engine.world_size, flush=True)\n"
    )
    job = {
        "SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "hilum", "SLURM_NTASKS": tasks, "SLURM_NTASKS_PER_NODE": tasks,
        "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ours = ("SLURM", "WORLD", "RANK", "LOCAL", "MASTER")
    outside = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    done = subprocess.run(
        [sys.executable, program], env=outside | job, capture_output=True, text=True, check=False, timeout=120
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("process")]
    assert sorted(said) == ["process 0 of 2", "process 1 of 2"], done.stderr
