"""One DINOv2 step (teacher, student, losses, backward, clip, AdamW, EMA), beside a peer's and beside the hardware.

Contestants (`peers/`) run in environments of their own, as processes that live through a case and take turns in rounds;
data is on the device beforehand, so this times the step, not the loader. The peer, LightlyTrain's DINOv2, is found by
HILUM_PEER_PYTHON (an interpreter that has `lightly-train`), else in `outputs/peer`; without it the ratio is not
measured. What is equal and what is left out is said in `peers/lightly_step.py`.

On a GPU: ViT-L and ViT-B at the published crops, 131,072 prototypes, bf16, the share of the data sheet's peak (MFU) by
`hilum.pretraining.flops`. On a CPU: ViT-S/14, one thread, where MFU is the share of a plain matrix product measured in
the same process. Every row is printed, and written to `pretrain-step.json` in HILUM_BENCH_OUT (`outputs/bench`), as
soon as it is measured. HILUM_BENCH_ROWS chooses rows by a regular expression, HILUM_BENCH_COMPILE=on|off overrides
compilation, HILUM_BENCH_QUICK=1 takes fewer steps.

More than 300 lines: the cases, what runs them in turns, and the table that they make are read together.
"""

import contextlib
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from hilum.pretraining.flops import device_peak, utilisation

HERE = Path(__file__).resolve().parent
SECONDS_TO_ANSWER = 600
"""A contestant that says nothing for so long is ended."""


@dataclass(frozen=True)
class Case:
    """What both sides run."""

    name: str
    model: str
    sizes: tuple[int, int]
    """Global and local crops, pixels; 2 and 8 an image."""
    images: tuple[int, ...]
    """Batches to try, the largest first; the first that fits every contestant counts."""
    peer: bool
    drop_path: float
    feed_forward: str = "mlp"
    registers: int = 0
    prototypes: int = 131072
    bottlenecks: tuple[int, int] = (256, 256)
    precision: str = "bf16"
    """auto: what each side chooses by itself."""
    goal: str = ""
    """Of issue and documents, to print beside the figure."""


GPU_CASES = (
    Case("ViT-L/16 224/96", "vitl16", (224, 96), (64, 32), True, 0.4, goal=">= 1.8x and >= 410 images/s"),
    Case("ViT-L/16 512/144", "vitl16", (512, 144), (16, 8), True, 0.4, goal=">= 2.0x"),
    Case("ViT-B/14 224/98", "vitb14", (224, 98), (64, 32), True, 0.2, "swiglu", goal=">= 2.0x"),
    Case("ViT-B/14 518/140", "vitb14", (518, 140), (16, 8), True, 0.2, "swiglu", goal=">= 2.0x"),
    Case(
        "ViT-L/16 512/144, largest batch", "vitl16", (512, 144), (60, 48, 32), False, 0.4, registers=4,
        bottlenecks=(384, 256), goal=">= 90 images/s; batch >= 60",
    ),
    Case(
        "ViT-L/16 224/96, as shipped", "vitl16", (224, 96), (64, 32), False, 0.4, registers=4, bottlenecks=(384, 256),
        goal=">= 410 images/s",
    ),
    Case(
        "ViT-B/16 224/96", "vitb16", (224, 96), (128, 64), False, 0.2, registers=4, bottlenecks=(384, 256),
        goal=">= 1,100 images/s",
    ),
    Case(
        "ViT-B/16 512/144", "vitb16", (512, 144), (60, 32), False, 0.2, registers=4, bottlenecks=(384, 256),
        goal=">= 240 images/s",
    ),
)  # fmt: skip
CPU_CASES = (
    Case(
        "ViT-S/14 112/56, each side's own precision", "vits14", (112, 56), (8,), True, 0.1, prototypes=8192,
        precision="auto", goal=">= 1.5x",
    ),
    Case(
        "ViT-S/14 112/56, fp32", "vits14", (112, 56), (8,), True, 0.1, prototypes=8192, precision="fp32",
    ),
    Case("ViT-S/14 112/56, bf16", "vits14", (112, 56), (8,), True, 0.1, prototypes=8192),
)  # fmt: skip


class ContestantError(Exception):
    """A contestant ended early; the message is for the table."""


class OutOfMemoryError(ContestantError):
    """The batch does not fit."""


class Contestant:
    """A process of `peers/` that makes steps when asked; see `peers/protocol.py`."""

    def __init__(self, python: str, script: str, settings: dict[str, Any]) -> None:
        self._errors: TextIO = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            [python, str(HERE / "peers" / script), json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        self.facts: dict[str, Any] = {}

    def start(self) -> None:
        """Wait until it is built and warm."""
        self.facts = self._answer()["ready"]

    def run(self, steps: int) -> dict[str, float]:
        """Seconds a step, CPU seconds a step, last loss, peak bytes."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its other end tells the reason
            self._process.stdin.write(f"run {steps}\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(SECONDS_TO_ANSWER, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = [line for line in self._errors.read().splitlines() if line.strip()]
            raise ContestantError((said or [f"ended with status {self._process.returncode}"])[-1][:200])
        answer = json.loads(line)
        if "out_of_memory" in answer:
            raise OutOfMemoryError("out of memory")
        return answer


def peer_python() -> str | None:
    """The interpreter of the peer's environment."""
    named = os.environ.get("HILUM_PEER_PYTHON")
    made = Path("outputs/peer")
    return named or (str(made / "bin" / "python") if (made / ".ready").exists() else None)


def measure(case: Case, device: str, rounds: int, steps: int, warm_up: int, peer: str | None) -> dict[str, Any]:
    """One row: the contestants of a case in turns, at the largest batch that fits both.

    Raises:
        ContestantError: Hilum's own contestant failed. A peer's failure is a note in the row.
    """
    settings = dataclasses.asdict(case) | {
        "device": device, "threads": 1, "warm_up": warm_up, "batches": 4,
        "compile": os.environ.get("HILUM_BENCH_COMPILE", "auto"),
    }  # fmt: skip
    wanted = [("hilum", sys.executable, "hilum_step.py")]
    note = ""
    if case.peer and peer is None:
        note = os.environ.get("HILUM_PEER_MISSING") or "no peer environment, see HILUM_PEER_PYTHON"
    elif case.peer:
        wanted.append(("peer", str(peer), "lightly_step.py"))
    tried = []
    for images in case.images:
        try:
            return _alternate(case, wanted, settings | {"images": images}, rounds, steps) | {
                "note": "; ".join([note, *tried]).strip("; ")
            }
        except OutOfMemoryError as error:
            tried.append(f"batch {images}: {error}")
    raise OutOfMemoryError("; ".join(tried))


def _alternate(
    case: Case, wanted: list[tuple[str, str, str]], settings: dict[str, Any], rounds: int, steps: int
) -> dict[str, Any]:
    running: dict[str, Contestant] = {}
    failures: dict[str, str] = {}
    times: dict[str, list[dict[str, float]]] = {}
    try:
        for name, python, script in reversed(wanted):  # ours last: compiled for nothing if the peer has no room
            running[name] = Contestant(python, script, settings)
            try:
                running[name].start()
            except OutOfMemoryError as error:
                raise OutOfMemoryError(f"{name} {error}") from error
            except ContestantError as error:
                if name == "hilum":
                    raise
                failures[name] = str(error)
        times = {name: [] for name, _, _ in wanted if name not in failures}
        for number in range(rounds):  # who begins alternates as well
            for name in list(times) if number % 2 == 0 else list(times)[::-1]:
                try:
                    times[name].append(running[name].run(steps))
                except ContestantError as error:
                    if name == "hilum" or isinstance(error, OutOfMemoryError):
                        raise
                    failures[name] = str(error)
                    del times[name]
        facts = {name: running[name].facts for name in times}
    finally:
        for contestant in running.values():
            contestant.close()
    row = {"case": dataclasses.asdict(case), "images": settings["images"], "rounds": rounds, "steps": steps}
    for name, answers in times.items():
        row[name] = facts[name] | summary(answers, settings["images"])
    if "peer" in row:
        for clock in ("seconds", "cpu_seconds"):
            ratios = [theirs[clock] / ours[clock] for theirs, ours in zip(times["peer"], times["hilum"], strict=True)]
            row[f"ratio_{clock}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    ours = row["hilum"]
    peak = device_peak(ours["device"])
    rate = ours["images_per_second"] if settings["device"] == "cuda" else ours["images_per_cpu_second"]
    row["product_share"] = utilisation(rate, ours["flops_per_image"], ours["product_rate"])
    row["mfu"] = None if peak is None else utilisation(rate, ours["flops_per_image"], peak)
    row["peer_failure"] = failures.get("peer", "")
    return row


def summary(answers: list[dict[str, float]], images: int) -> dict[str, float]:
    """Medians over rounds, and the range of the rate."""
    rates = [images / answer["seconds"] for answer in answers]
    return {
        "images_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "images_per_cpu_second": statistics.median(images / answer["cpu_seconds"] for answer in answers),
        "peak_gb": max(answer["peak_bytes"] for answer in answers) / 1e9,
        "last_loss": answers[-1]["loss"],
    }


COLUMNS = (
    "step", "batch", "images/s", "MFU", "of matrix product", "peak GB", "peer images/s", "peer GB", "times the peer",
    "goal",
)  # fmt: skip
HEADER = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"


def table_row(row: dict[str, Any]) -> str:
    """A line of the table for the documents."""
    case, ours, theirs = row["case"], row["hilum"], row.get("peer")
    on_gpu = ours["device"] != "cpu"
    ratio = "-"
    if theirs:
        middle, low, high = row["ratio_seconds"]
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        if not on_gpu:
            middle, low, high = row["ratio_cpu_seconds"]
            ratio += f"; CPU time {middle:.2f} ({low:.2f} to {high:.2f})"
    elif case["peer"]:
        ratio = f"not measured ({row['peer_failure'] or row['note']})"
    digits = 0 if ours["images_per_second"] > 20 else 2
    cells = [
        case["name"],
        f"{row['images']}" + (f" ({row['note']})" if "out of memory" in row["note"] else ""),
        f"{ours['images_per_second']:.{digits}f} ({ours['lowest']:.{digits}f} to {ours['highest']:.{digits}f})",
        "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
        f"{row['product_share']:.0%}",
        f"{ours['peak_gb']:.1f}",
        f"{theirs['images_per_second']:.{digits}f}" if theirs else "-",
        f"{theirs['peak_gb']:.1f}" if theirs else "-",
        ratio,
        case["goal"],
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> dict[str, Any]:
    """Print and write a row a case; return them by name."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quick = bool(os.environ.get("HILUM_BENCH_QUICK"))
    rounds, steps, warm_up = ((5, 20, 30) if not quick else (3, 10, 6)) if device == "cuda" else (5, 2, 1)
    pattern = re.compile(os.environ.get("HILUM_BENCH_ROWS", ""))
    folder = Path(os.environ.get("HILUM_BENCH_OUT", "outputs/bench"))
    folder.mkdir(parents=True, exist_ok=True)
    peer = peer_python()
    print(
        f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU, one thread'}; {rounds} rounds of {steps} steps "
        f"in turns after {warm_up} to warm up; medians, range over rounds in brackets"
    )
    print(HEADER, flush=True)
    rows: dict[str, Any] = {}
    for case in GPU_CASES if device == "cuda" else CPU_CASES:
        if not pattern.search(case.name):
            continue
        try:
            rows[case.name] = measure(case, device, rounds, steps, warm_up, peer)
            print(table_row(rows[case.name]), flush=True)
        except ContestantError as error:
            rows[case.name] = {"case": dataclasses.asdict(case), "failure": str(error)}
            print(f"| {case.name} | not measured ({error}) |" + " |" * 8, flush=True)
        (folder / "pretrain-step.json").write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
