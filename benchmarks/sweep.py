"""13 learning rates of a decoder side by side, beside a loop over float32 heads on the same tokens.

On a CPU, at laptop size, on the same tokens in bf16 (and float32, and on kept tokens, and with hopeless rates dropped).
On a GPU at ViT-L 512 pixels, batch 64: with features recomputed for every step (the backbone's forward in bf16 is part
of both sides), and with kept tokens (`hilum.heads.compact`: 768 principal directions in 8 bits) against the peer that
recomputes. Then a small problem is learned by all sides with the same start, order of images and number of steps, and
without dropout, whose masks no two programs draw alike: AUROC on other images (mean over findings; of the best rate,
and the mean over the slides' nine rates, since the best learns the problem whole) has to be the peer's within 0.002.
Kept tokens start from other weights, so their mean would be of another course. HILUM_BENCH_QUICK=1 takes fewer steps.
"""

import os
import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from hilum.backbones.vit import SIZES, VisionTransformer
from hilum.data.transforms import PREPROCESSING
from hilum.heads.compact import fit_reduction
from hilum.heads.features import extract, freeze

shared = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parent / "_head_rounds.py")))
QUICK = bool(os.environ.get("HILUM_BENCH_QUICK"))
GOAL_CPU, GOAL_RECOMPUTED, GOAL_KEPT, GOAL_AUROC = ">= 3x", ">= 4x", ">= 10x", "within 0.002"


def sides_of(problem: Any, steps: int, device: torch.device, reduction: Any, halve_at: Sequence[int]) -> list[Any]:
    """The peer first."""
    own = [("fp32", None, ()), ("bf16", None, ()), ("bf16", reduction, ()), ("bf16", None, halve_at)]
    return [
        shared.peer_side(problem.size, shared.RATES_13, steps, device),
        *(
            shared.own_side(problem, shared.RATES_13, steps, device, precision, kept, halve_at=halve)
            for precision, kept, halve in own
        ),
    ]


def on_device(reduction: Any, device: torch.device) -> Any:
    """A reduction, moved."""
    return type(reduction)(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in reduction))


def at_laptop_size() -> list[dict[str, Any]]:
    """Seconds a step on a CPU."""
    device, size = torch.device("cpu"), shared.LAPTOP
    rounds, warm_up = (4, 1) if QUICK else (16, 1)
    problem = shared.Problem(size, size.batch, 1, device)
    reduction = fit_reduction([problem.features(problem.tokens)], size.kept)
    kept = reduction.keep(problem.tokens)
    halve_at = (warm_up + rounds // 4, warm_up + rounds // 2)
    sides = sides_of(problem, rounds + warm_up, device, reduction, halve_at)

    def step(side: Any, number: int) -> None:
        side.step(kept if side.reads == "kept" else problem.tokens, problem.labels)

    times = shared.in_turns(sides, step, rounds, warm_up, device)
    return shared.rows_of(f"{size.name}; CPU", times, size.batch, {sides[2].name: GOAL_CPU}, {})


def at_full_size() -> list[dict[str, Any]]:
    """Seconds a step on a GPU."""
    device, size = torch.device("cuda"), shared.VITL_512
    with device:
        backbone = freeze(VisionTransformer(replace(SIZES["vitl16"], image_size=512)))
        images = torch.randint(256, (size.batch, 1, 512, 512), dtype=torch.uint8)
        labels = torch.randint(0, 2, (size.batch, size.findings), dtype=torch.int8)
    recipe = next(iter(PREPROCESSING.values()))

    def tokens() -> torch.Tensor:
        found = extract(backbone, images, recipe, size.blocks, True, "bf16").patches
        assert found is not None
        return found

    problem = shared.Problem(size, 1, 1, device)  # for its shapes: random images teach nothing
    reduction = on_device(fit_reduction([problem.features(tokens()[:8])], size.kept), device)
    kept = reduction.keep(tokens())
    sides = [
        shared.peer_side(size, shared.RATES_13, 1000, device),
        shared.own_side(problem, shared.RATES_13, 1000, device, "bf16"),
        shared.own_side(problem, shared.RATES_13, 1000, device, "bf16", reduction),
        shared.own_side(problem, shared.RATES_13, 1000, device, "bf16", way="in turn"),
    ]

    def step(side: Any, _: int) -> None:
        side.step(kept if side.reads == "kept" else tokens(), labels)

    times = shared.in_turns(sides, step, 5 if QUICK else 20, 3, device)
    goals = {sides[1].name: GOAL_RECOMPUTED, sides[2].name: GOAL_KEPT}
    return shared.rows_of(f"{size.name}; GPU", times, size.batch, goals, {})


def learned(device: torch.device) -> list[dict[str, Any]]:
    """What the sides make of a small problem."""
    size, images, epochs = shared.SMALL, 1024, 2 if QUICK else 4
    training, held_out = (
        shared.Problem(size, count, seed, device, strength=3.0) for count, seed in ((images, 1), (2048, 2))
    )
    reduction = on_device(fit_reduction([training.features(training.tokens)], size.kept), device)
    kept = reduction.keep(training.tokens)
    steps = epochs * images // size.batch
    sides = sides_of(training, steps, device, reduction, (steps // 4, steps // 2))
    orders = [torch.randperm(images, generator=torch.Generator().manual_seed(epoch)) for epoch in range(epochs)]
    order = torch.cat(orders).to(device)

    def step(side: Any, number: int) -> None:
        chosen = order[number * size.batch : (number + 1) * size.batch]
        tokens = kept._replace(values=kept.values[chosen]) if side.reads == "kept" else training.tokens[chosen]
        side.step(tokens, training.labels[chosen])

    times = shared.in_turns(sides, step, steps - 1, 1, device)
    areas = {}
    for side in sides:
        found = [shared.mean_auroc(row, held_out.labels) for row in side.logits(held_out.tokens)]
        steady = found[:9]  # the slides' nine; what higher ones learn is chaos, in float32 too
        comparable = side.reads == "tokens" and len(found) == len(shared.RATES_13)
        areas[side.name] = (max(found), *([sum(steady) / len(steady)] if comparable else []))
    goals = {side.name: GOAL_AUROC for side in sides[1:]}
    return shared.rows_of(f"{size.name}; {device.type}, learned", times, size.batch, goals, areas)


def main() -> list[dict[str, Any]]:
    """Print and write a row a side."""
    cuda = torch.cuda.is_available()
    torch.set_num_threads(1)
    print(f"13 rates; {torch.cuda.get_device_name() if cuda else 'CPU'}; on the CPU one thread and its CPU time")
    print(shared.HEADER, flush=True)
    rows: list[dict[str, Any]] = []

    def add(found: list[dict[str, Any]]) -> None:
        for row in found:
            print(shared.table_row(row), flush=True)
        rows.extend(found)
        shared.write("sweep", rows)

    full = {"case": f"{shared.VITL_512.name}; GPU", "goal": f"{GOAL_RECOMPUTED}; kept tokens {GOAL_KEPT}"}
    if cuda:
        try:
            add(at_full_size())
        except torch.OutOfMemoryError as error:
            add([full | {"failure": str(error)[:100]}])
        add(learned(torch.device("cuda")))
    else:
        add(at_laptop_size())
        add(learned(torch.device("cpu")))
        add([full | {"failure": "no GPU"}])
    return rows


if __name__ == "__main__":
    main()
