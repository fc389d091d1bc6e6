"""How a contestant of `hilum bench pretrain-step` talks to it: one line of JSON for each line it is sent.

A contestant is a script run in its own environment, with its settings as one argument of JSON. It builds its networks
and data, warms up, and says {"ready": facts}. Then, until "quit": to "run N" it makes N steps and answers with their
time. Out of memory ends it, with a line that says so. Needs torch and the standard library.
"""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def settings() -> dict[str, Any]:
    """The settings that this contestant was started with; see `pretrain_step.Case`."""
    return json.loads(sys.argv[1])


def device_of(chosen: dict[str, Any]) -> torch.device:
    """The device of these settings; on a CPU also the number of threads."""
    if chosen["device"] == "cpu":
        torch.set_num_threads(chosen["threads"])
    return torch.device(chosen["device"])


def peak_bytes(device: torch.device) -> int:
    """Most memory held by tensors so far; on a CPU, by the process, interpreter and libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a plain square matrix product; median of ten, CPU time of all threads on a CPU."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times = []
    for _ in range(13):
        _wait(device)
        start = clock()
        left @ right
        _wait(device)
        times.append(clock() - start)
    return 2 * side**3 / statistics.median(times[3:])


def serve(build: Callable[[dict[str, Any], torch.device], tuple[Callable[[], torch.Tensor], dict[str, Any]]]) -> None:
    """Answer until "quit".

    Args:
        build: makes, from settings and device, the function that runs one step and returns its loss, and the facts to
            report.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    chosen = settings()
    device = device_of(chosen)
    try:
        step, facts = build(chosen, device)
        first = float(step().detach())
        for _ in range(chosen["warm_up"] - 1):
            step()
        _settle(device)
        facts |= {
            "torch": torch.__version__,
            "first_loss": first,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        }
        print(json.dumps({"ready": facts}), file=answers)
        for line in sys.stdin:
            words = line.split()
            if words == ["quit"]:
                break
            print(json.dumps(_timed(step, int(words[1]), device)), file=answers)
    except (torch.OutOfMemoryError, MemoryError) as error:
        print(json.dumps({"out_of_memory": str(error).splitlines()[0]}), file=answers)


def _timed(step: Callable[[], torch.Tensor], steps: int, device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        step()  # memory that was handed back after the run before is taken again
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        loss = step()
    _wait(device)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    answer = {
        "seconds": seconds / steps,
        "cpu_seconds": cpu_seconds / steps,
        "loss": float(loss.detach()),
        "peak_bytes": peak_bytes(device),
    }
    _settle(device)
    return answer


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _settle(device: torch.device) -> None:
    """Wait, and hand unused memory back, so that the other contestant has it during its turn."""
    _wait(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
