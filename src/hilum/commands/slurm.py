"""`hilum slurm`: a batch script for SLURM, to be read, edited and submitted, that calls `hilum pretrain` and no more.

The script asks for one process per GPU, has SLURM signal the processes before the time limit, and queues itself again
when the program ends with the status that means "saved, run me again". Nothing of a run depends on this file: the same
command on one machine, or under torchrun, goes on from the same checkpoints.
"""

import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hilum.commands.pretrain import STOPPED_STATUS
from hilum.core.errors import ConfigError
from hilum.core.files import write_text
from hilum.core.tracking import next_step, say, warn
from hilum.pretraining.config import PretrainConfig

SIGNAL_SECONDS = 120
"""How long before the time limit the processes are told to save: a step and a checkpoint."""
_MARK = "# Written by `hilum slurm`."
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?")
_NAME = re.compile(r"[A-Za-z0-9_.,@+-]+")
_CONSTRAINT = re.compile(r"[A-Za-z0-9_.,&|*()\[\]=:-]+")


@dataclass(frozen=True)
class Resources:
    """What to ask SLURM for."""

    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 1
    """GPUs, and processes, on each."""
    cpus_per_gpu: int = 8
    """Processor cores for the loader of each process."""
    time: str = "24:00:00"
    """Limit, as SLURM writes it: minutes, HH:MM:SS, D-HH or D-HH:MM:SS. The job queues itself again at its end."""
    partition: str = ""
    account: str = ""
    constraint: str = ""
    """Features of a node, as in "h200&nvlink"."""
    name: str = ""
    """Of the job; empty: hilum and the recipe."""
    setup: tuple[str, ...] = field(default=())
    """Lines of shell to run first, as in "module load cuda"."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "cpus_per_gpu"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}={getattr(self, name)}: expected 1 or more.")
        if _seconds(self.time) < 3 * SIGNAL_SECONDS:
            raise ConfigError(f"--time={self.time}: expected at least {3 * SIGNAL_SECONDS // 60} minutes, to save in.")
        for name, pattern in (("partition", _NAME), ("account", _NAME), ("name", _NAME), ("constraint", _CONSTRAINT)):
            value = getattr(self, name)
            if value and not pattern.fullmatch(value):
                raise ConfigError(f"--{name}={value!r}: expected letters, digits and signs that SLURM takes there.")
        for line in self.setup:
            if "\n" in line or not line.strip():
                raise ConfigError(f"--setup={line!r}: expected one line of shell; give the option once a line.")

    @property
    def processes(self) -> int:
        """One per GPU."""
        return self.nodes * self.gpus_per_node


def _seconds(time: str) -> int:
    """Of a SLURM time: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    found = _TIME.fullmatch(time)
    if not found:
        raise ConfigError(f"--time={time!r}: expected minutes, HH:MM:SS, D-HH or D-HH:MM:SS.")
    days, *fields = found.groups()
    numbers = [int(value) for value in fields if value is not None]
    if days is None:
        hours, minutes, seconds = {1: (0, *numbers, 0), 2: (0, *numbers), 3: tuple(numbers)}[len(numbers)]
    else:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def run(
    config: PretrainConfig, recipe: str, overrides: list[str], data: Path, out: Path, init: str | None,
    resources: Resources, script: Path,
) -> Path:  # fmt: skip
    """Write the script.

    Args:
        config: what `recipe` and `overrides` come to; checked here, read again by the job.
        recipe: a name, or the path of a config.yaml.
        overrides: `key=value` settings.
        data: store.
        out: run folder; the logs go beside the script.
        init: a run, weights, or a name of public weights.
        resources: of the cluster.
        script: where to write; a file that this program did not write is never replaced.

    Returns:
        `script`.

    Raises:
        ConfigError: resources that cannot be; a batch that does not divide among the processes; `script` is another
            file.
    """
    share = resources.processes * config.accumulate
    if config.batch_size % share:
        raise ConfigError(
            f"batch_size={config.batch_size} does not divide into {resources.processes} processes "
            f"({resources.nodes} x {resources.gpus_per_node} GPUs) of {config.accumulate} micro-batch(es)."
        )
    script = Path(script)
    if script.exists() and _MARK not in script.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(f"{script} exists and was not written by this program; choose another --out-script.")
    if not (Path(data) / "store.json").exists():
        warn(f"{data} is no store here; the job will look for it at {Path(data).resolve()}")
    recipe = str(Path(recipe).resolve()) if recipe.endswith((".yaml", ".yml")) else recipe
    words = ["pretrain", recipe, *overrides, "--data", str(Path(data).resolve())]
    words += ["--out", str(Path(out).resolve())]
    if init:
        words += ["--init", str(Path(init).resolve()) if Path(init).exists() else init]
    write_text(script, _script(words, config, resources, script))
    say(
        f"{script}: {resources.nodes} node(s) x {resources.gpus_per_node} GPU(s), {config.batch_size} images a step, "
        f"{config.batch_size // share} in each process at a time."
    )
    next_step(f"sbatch {shlex.quote(str(script))}")
    return script


def _script(words: list[str], config: PretrainConfig, resources: Resources, script: Path) -> str:
    beside = Path(sys.executable).with_name("hilum")
    program = str(beside) if beside.exists() else "hilum"
    log = str(script.resolve().with_suffix("")).replace("%", "%%") + "-%j.log"
    if any(sign in log for sign in '"\n\\'):
        raise ConfigError(
            f"--out-script={script}: a quote, a backslash or a line break in its path is more than SLURM takes."
        )
    asked = {
        "job-name": resources.name or f"hilum-{re.sub(r'[^A-Za-z0-9_.-]', '-', Path(words[1]).stem)}",
        "partition": resources.partition,
        "account": resources.account,
        "constraint": f'"{resources.constraint}"' if resources.constraint else "",
    }
    named = "\n".join(f"#SBATCH --{option}={value}" for option, value in asked.items() if value)
    setup = "".join(f"{line}\n" for line in resources.setup)
    lines = [shlex.quote(program), *[shlex.quote(word) for word in words]]
    pairs = [" ".join(lines[:3])]  # hilum pretrain RECIPE, then a setting or an option a line
    rest = iter(lines[3:])
    pairs += [f"{word} {next(rest)}" if word.startswith("--") else word for word in rest]
    command = " \\\n        ".join(pairs)
    setup = f"\n# Once on the first node; the processes inherit it.\n{setup}" if setup else ""
    return f"""#!/bin/bash
{_MARK} Read it, change it, submit it: sbatch {shlex.quote(script.name)}
#
# Pretraining on {resources.nodes} node(s) of {resources.gpus_per_node} GPU(s), one process each.
# A step has {config.batch_size} images, however many processes share them.

{named}
#SBATCH --nodes={resources.nodes}
#SBATCH --ntasks-per-node={resources.gpus_per_node}
#SBATCH --gpus-per-node={resources.gpus_per_node}
#SBATCH --cpus-per-task={resources.cpus_per_gpu}
#SBATCH --time={resources.time}
#
# Before the limit the processes (not this script) get SIGUSR1; they finish their step, save, and end with
# status {STOPPED_STATUS}.
#SBATCH --signal=USR1@{SIGNAL_SECONDS}
#
# The same job, with the same log, is queued again: after the limit by the last lines, after a preemption or the loss of
# a node by SLURM itself.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output="{log}"

echo "$(date): turn $((${{SLURM_RESTART_COUNT:-0}} + 1)) of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"
{setup}
# If a process fails, the others end by themselves within seconds, and one says why; --wait is for any that cannot.
# --kill-on-bad-exit=0: at the limit all end with status {STOPPED_STATUS}, and none is killed for being slower to save.
srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task={resources.cpus_per_gpu} \\
    {command}
status=$?

if [ "$status" -eq {STOPPED_STATUS} ]; then
    echo "$(date): saved; queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""
