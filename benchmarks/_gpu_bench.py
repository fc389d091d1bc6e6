"""`make gpu-bench`: everything that wants a GPU, in one command that needs nothing else.

First the equality tests on the device, then the benchmarks, each as a process with a time limit of its own, so that a
failure or a hang costs one stage. `outputs/gpu-bench.json` (all figures), `outputs/gpu-bench.md` (tables to paste) and
`outputs/gpu-bench.log` are renewed after every line that a stage prints: whatever ends this program, the rows that were
measured are there.

The peer's environment is HILUM_PEER_PYTHON; or `outputs/peer`, which is made here, while the tests run, from the
network, or from the wheels in HILUM_PEER_WHEELS on top of the packages of this interpreter. Without it the column of
ratios says why it was not measured. HILUM_BENCH_STAGES chooses stages by a regular expression, as HILUM_BENCH_ROWS does
rows of the step benchmark.

All stages may take 69 minutes. Where a command may take ten, these calls fit; each writes its files anew:

    HILUM_BENCH_STAGES='equality|head-step' make gpu-bench
    HILUM_BENCH_STAGES='prototype-loss' make gpu-bench
    HILUM_BENCH_STAGES='crops|sweep' make gpu-bench
    HILUM_BENCH_STAGES='loader' make gpu-bench
    HILUM_BENCH_STAGES='inference' make gpu-bench

and pretrain-step, which may take 30 minutes, with a few rows a call.
"""

import contextlib
import json
import os
import platform
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEER = "lightly-train==0.18.*"
SECONDS_TO_MAKE_THE_PEER = 600
STAGES = (
    ("equality tests", 420),
    ("pretrain-step", 1800),
    ("prototype-loss", 420),
    ("crops", 240),
    ("loader", 420),
    ("head-step", 120),
    ("sweep", 300),
    ("inference", 420),
)
"""Name, and seconds it may take."""


@dataclass
class Outcome:
    """What became of a stage."""

    status: str = "running"
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)
    results: Any = None


def main(out: Path, anyway: bool) -> int:
    """Run all stages; 0 if each ended well.

    Args:
        out: folder of the results.
        anyway: go on without a CUDA device, to try this program out.
    """
    import torch

    if not torch.cuda.is_available() and not anyway:
        files = " ".join(str(path.relative_to(ROOT)) for path in equality_files())
        print(f"make gpu-bench needs a CUDA device; torch {torch.__version__} of {sys.executable} finds none.")
        print(f"What these files hold equal on a CPU: {sys.executable} -m pytest {files}")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    machine = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "commit": said(["git", "rev-parse", "--short", "HEAD"]),
        "peer": "not looked for yet",
    }
    outcomes: dict[str, Outcome] = {}
    with ThreadPoolExecutor(1) as pool:
        peer = pool.submit(find_peer, out)
        for name, limit in STAGES:
            if not re.search(os.environ.get("HILUM_BENCH_STAGES", ""), name):
                continue
            if name == "pretrain-step":
                machine["peer"] = peer.result()[1]
            outcomes[name] = Outcome()
            run_stage(name, limit, outcomes[name], out, environment(peer), lambda: write(out, machine, outcomes))
            write(out, machine, outcomes)
    print(f"Results: {out / 'gpu-bench.md'}, {out / 'gpu-bench.json'}")
    return 0 if all(outcome.status == "ok" for outcome in outcomes.values()) else 1


def said(command: list[str]) -> str:
    """The output of a command, or nothing."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def find_peer(out: Path) -> tuple[str, str]:
    """The interpreter of the peer's environment, made if need be, and a word on it; an empty name if there is none."""
    named = os.environ.get("HILUM_PEER_PYTHON")
    if named:
        return named, f"HILUM_PEER_PYTHON={named}"
    folder = out / "peer"
    python, wheels = folder / "bin" / "python", os.environ.get("HILUM_PEER_WHEELS")
    if not (folder / ".ready").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        inherit = ["--system-site-packages"] if wheels else []
        source = ["--no-index", "--find-links", wheels] if wheels else ["--retries", "1", "--timeout", "15"]
        steps = (
            [sys.executable, "-m", "venv", *inherit, str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *source, PEER],
        )
        for command in steps:
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_MAKE_THE_PEER)
            except (OSError, subprocess.TimeoutExpired) as error:
                return "", f"{PEER} could not be installed: {type(error).__name__}"
            if done.returncode:
                reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-200:]]
                return "", f"{PEER} could not be installed: {reason[-1]}"
        (folder / ".ready").touch()
    return str(python.absolute()), f"{PEER} in {folder}"


def environment(peer: "Future[tuple[str, str]]") -> dict[str, str]:
    """Variables of a stage."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    variables = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if peer.done():
        python, word = peer.result()
        variables |= {"HILUM_PEER_PYTHON": python} if python else {"HILUM_PEER_MISSING": word}
    return variables


def command_of(name: str, out: Path) -> list[str] | None:
    """The process of a stage; None if this checkout does not have it."""
    if name == "equality tests":
        words = ["-m", "gpu", "-rA", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        return [sys.executable, "-m", "pytest", *words, *map(str, equality_files())]
    path = {path.stem.replace("_", "-"): path for path in HERE.glob("[a-z]*.py")}.get(name)
    return path and [sys.executable, __file__, "--one", str(path), str(results_file(name, out))]


def equality_files() -> list[Path]:
    """Files with tests that need a device."""
    return sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())


def results_file(name: str, out: Path) -> Path:
    """Where a stage leaves its figures."""
    return out / "bench" / f"{name.replace(' ', '-')}.json"


def run_stage(
    name: str, limit: float, outcome: Outcome, out: Path, variables: dict[str, str], renew: Callable[[], None]
) -> None:
    """Run one stage to its end or its limit, keeping what it prints."""
    command = command_of(name, out)
    if command is None:
        outcome.status = "not in this checkout"
        return
    results_file(name, out).parent.mkdir(parents=True, exist_ok=True)
    results_file(name, out).unlink(missing_ok=True)
    print(f"== {name}", flush=True)
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables | {"HILUM_BENCH_OUT": str(results_file(name, out).parent.absolute())},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    late = threading.Event()
    timer = threading.Timer(limit, lambda: (late.set(), end(process)))
    timer.start()
    with (out / "gpu-bench.log").open("a") as log:
        for line in printed(process):
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()
            outcome.lines.append(line)
            outcome.seconds = round(time.monotonic() - started, 1)
            outcome.results = read(results_file(name, out))
            renew()
    status = process.wait()
    timer.cancel()
    end(process)  # what it started
    outcome.seconds = round(time.monotonic() - started, 1)
    outcome.results = read(results_file(name, out))
    outcome.status = f"ended after {limit:.0f} s" if late.is_set() else "ok" if status == 0 else f"failed ({status})"
    if name == "equality tests" and status == 5:
        outcome.status = "no test of this kind"


def printed(process: "subprocess.Popen[str]") -> Iterator[str]:
    """Its lines, until it ends."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            yield line.rstrip("\n")


def end(process: "subprocess.Popen[str]") -> None:
    """End a stage with everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def read(path: Path) -> Any:
    """Figures so far; a file that is being written counts as none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write(out: Path, machine: dict[str, Any], outcomes: dict[str, Outcome]) -> None:
    """Renew both files whole."""
    figures = {name: vars(outcome) | {"lines": outcome.lines[-200:]} for name, outcome in outcomes.items()}
    for name, text in (
        ("gpu-bench.json", json.dumps({"machine": machine, "stages": figures}, indent=1)),
        ("gpu-bench.md", markdown(machine, outcomes)),
    ):
        temporary = out / f"{name}.new"
        temporary.write_text(text)
        temporary.replace(out / name)


def markdown(machine: dict[str, Any], outcomes: dict[str, Outcome]) -> str:
    """The tables, ready to paste."""
    parts = ["`make gpu-bench`: " + ", ".join(f"{name} {value}" for name, value in machine.items() if value)]
    for name, outcome in outcomes.items():
        parts.append(f"## {name}: {outcome.status}, {outcome.seconds:.0f} s")
        rows = [line for line in outcome.lines if line.startswith("|")]
        others = [line for line in outcome.lines if line.strip() and not line.startswith("|")]
        if name == "equality tests":
            others = [line for line in others if re.match(r"(PASSED|FAILED|ERROR|SKIPPED)|\d+ ", line)]
        if others:
            parts.append("```\n" + "\n".join(others[-60:]) + "\n```")
        if rows:
            parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def one(path: Path, results: Path) -> None:
    """Run one benchmark in this process and leave what it returns."""
    figures = runpy.run_path(str(path))["main"]()
    results.write_text(json.dumps(figures, indent=1, default=str))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main(Path("outputs"), "--anyway" in sys.argv))
