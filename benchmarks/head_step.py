"""One step of one decoder, beside the public script's form of it on the same tokens.

The peer (`peers/decoder_loop.py`) runs in float32, as published; so does one of our sides, the other in bf16. On a CPU
one thread, at laptop size; on a GPU at ViT-L 512 pixels, batch 64, without the backbone.
"""

import os
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

shared = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parent / "_head_rounds.py")))
RATE = (1e-3,)


def main() -> list[dict[str, Any]]:
    """Print and write a row a side."""
    cuda, quick = torch.cuda.is_available(), bool(os.environ.get("HILUM_BENCH_QUICK"))
    torch.set_num_threads(1)
    device, size = (torch.device("cuda"), shared.VITL_512) if cuda else (torch.device("cpu"), shared.LAPTOP)
    rounds, warm_up = (10, 3) if quick else (100, 10)
    print(f"One head; {torch.cuda.get_device_name() if cuda else 'CPU, one thread, CPU time'}")
    print(shared.HEADER, flush=True)
    problem = shared.Problem(size, size.batch, 1, device)
    sides = [
        shared.peer_side(size, RATE, 1000, device),
        shared.own_side(problem, RATE, 1000, device, "fp32"),
        shared.own_side(problem, RATE, 1000, device, "bf16"),
    ]
    times = shared.in_turns(sides, lambda side, _: side.step(problem.tokens, problem.labels), rounds, warm_up, device)
    rows: list[dict[str, Any]] = shared.rows_of(f"{size.name}; {device.type}", times, size.batch, {}, {})
    if not cuda:
        rows.append({"case": f"{shared.VITL_512.name}; GPU", "failure": "no GPU", "goal": ""})
    for row in rows:
        print(shared.table_row(row), flush=True)
    shared.write("head-step", rows)
    return rows


if __name__ == "__main__":
    main()
