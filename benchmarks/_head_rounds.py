"""What `head-step` and `sweep` share: sizes, a problem that can be learned, sides that take turns, a table.

Every side gets the same tokens and labels and starts from the same weights; in each round every side makes one step,
and who begins alternates. On a CPU one thread is used and seconds are CPU time, since shared machines make wall time
useless; on a GPU they are wall time to the end of the device's work. Ratios are medians over rounds of the peer's time
over the side's own, with the range.
"""

import json
import os
import runpy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hilum.heads.candidates import grid
from hilum.heads.compact import KeptTokens, Reduction
from hilum.heads.features import Features
from hilum.heads.registry import HeadConfig, build_head
from hilum.heads.sweep import Sweep

Loop = runpy.run_path(str(Path(__file__).resolve().parent / "peers" / "decoder_loop.py"))["Loop"]
RATES_13 = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
"""The public script's default grid."""


@dataclass(frozen=True)
class Size:
    """Of the heads and what they read."""

    name: str
    embed_dim: int
    side: int
    """Patches along an edge."""
    dim: int
    hidden: int
    heads: int
    batch: int
    kept: int
    """Channels of tokens that are kept in 8 bits."""
    findings: int = 40
    blocks: int = 4
    dropout: float = 0.1

    @property
    def width(self) -> int:
        return self.blocks * self.embed_dim

    def config(self, kept: bool = False) -> HeadConfig:
        blocks, embed = (1, self.kept) if kept else (self.blocks, self.embed_dim)
        return HeadConfig(
            "ml_decoder", embed, self.findings, blocks, decoder_dim=self.dim, decoder_feed_forward=self.hidden,
            decoder_heads=self.heads, dropout=self.dropout,
        )  # fmt: skip


LAPTOP = Size("laptop: 4 blocks of 128, 144 tokens, decoder 128", 128, 12, 128, 256, 4, 32, 128)
SMALL = Size("small: 4 blocks of 16, 36 tokens, decoder 32", 16, 6, 32, 64, 2, 32, 32, findings=8, dropout=0.0)
VITL_512 = Size("ViT-L 512: 4 blocks of 1,024, 1,024 tokens, decoder 768", 1024, 32, 768, 2048, 8, 64, 768)


class Problem:
    """Tokens in which each finding leaves a trace of its own in a few patches, on a background of few directions.

    Args:
        size: shapes.
        images: how many.
        seed: of the images; what a finding looks like is the same for all seeds.
        device: where tokens are.
        strength: of the traces; the background has a deviation of 1 in most channels.
    """

    def __init__(self, size: Size, images: int, seed: int, device: torch.device, strength: float = 6.0) -> None:
        fixed, drawn = (torch.Generator().manual_seed(one) for one in (12345, seed))
        tokens, width = size.side**2, size.width
        rank = min(64, width // 4)
        basis = torch.randn(rank, width, generator=fixed) / rank**0.5
        traces = torch.nn.functional.normalize(torch.randn(size.findings, rank, generator=fixed), dim=1) @ basis
        present = torch.rand(images, size.findings, generator=drawn) < torch.linspace(0.05, 0.3, size.findings)
        places = torch.randint(tokens, (images, size.findings, 3), generator=drawn)
        values = torch.randn(images, tokens, rank, generator=drawn) @ basis
        values += 0.1 * torch.randn(images, tokens, width, generator=drawn)
        for image in range(images):
            for finding in present[image].nonzero().flatten().tolist():
                values[image, places[image, finding]] += strength * traces[finding] * rank**0.5
        self.labels = present.to(torch.int8).to(device)
        self.tokens = values.to(device)
        self.size = size

    def features(self, tokens: Tensor) -> Features:
        """What a sweep takes."""
        nothing = tokens.new_zeros(len(tokens), tokens.shape[2])
        return Features(nothing, nothing, tokens, (self.size.side, self.size.side))


def mean_auroc(logits: Tensor, labels: Tensor) -> float:
    """Mean over findings of the area under the ROC curve, from ranks."""
    found = []
    for column, truth in zip(logits.double().T, labels.cpu().T, strict=True):
        positive = truth == 1
        count, rest = int(positive.sum()), int((~positive).sum())
        if count and rest:
            ranks = torch.argsort(torch.argsort(column)).double() + 1
            found.append((float(ranks[positive].sum()) - count * (count + 1) / 2) / (count * rest))
    return statistics.fmean(found)


@dataclass
class Side:
    """Who takes turns."""

    name: str
    step: Callable[[Tensor | KeptTokens, Tensor], Any]
    logits: Callable[[Tensor], Tensor]
    reads: str = "tokens"
    """"tokens", or "kept": reduced tokens in 8 bits."""


def peer_side(size: Size, rates: Sequence[float], steps: int, device: torch.device) -> Side:
    start = Sweep(grid([size.config()], rates[:1]), 1).state(0)
    loop = Loop(start, rates, steps, size.heads, device, size.dropout)
    return Side("peer: loop over fp32 heads", loop.step, loop.logits)


def own_side(
    problem: Problem, rates: Sequence[float], steps: int, device: torch.device, precision: str,
    reduction: Reduction | None = None, way: Any = None, halve_at: Sequence[int] = (),
) -> Side:  # fmt: skip
    """A sweep; with a reduction on kept tokens; with `halve_at`, after these steps the half of lower loss goes on."""
    config = problem.size.config(reduction is not None)
    sweep = Sweep(grid([config], rates), steps, device=device, precision=precision, way=way)

    def step(tokens: Tensor | KeptTokens, labels: Tensor) -> Any:
        read = (
            tokens
            if isinstance(tokens, Tensor)
            else tokens.tokens(torch.bfloat16 if precision == "bf16" else torch.float32)
        )
        losses = sweep.step(problem.features(read), labels)
        if sweep.steps in halve_at:
            sweep.keep(sorted(losses.argsort()[: -(-len(losses) // 2)].tolist()))
        return losses

    def logits(tokens: Tensor) -> Tensor:
        """On raw tokens, as a saved head would: what the reduction lost is lost here."""
        if reduction is None:
            return sweep.logits(problem.features(tokens))
        rows = []
        for place in range(len(sweep.candidates)):
            head = build_head(problem.size.config())
            head.load_state_dict(reduction.expand(sweep.state(place), "decoder.embed_standart"))
            head.to(device).eval()
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                rows.append(head(problem.features(tokens)).cpu())
        return torch.stack(rows)

    words = [f"hilum {precision}", way, "kept tokens" if reduction else None, "halved twice" if halve_at else None]
    return Side(", ".join(filter(None, words)), step, logits, "kept" if reduction else "tokens")


def clock(device: torch.device) -> float:
    """Seconds: of all threads' CPU time, or to the end of the device's work."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(
    sides: Sequence[Side], step: Callable[[Side, int], Any], rounds: int, warm_up: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each side in each round; `step(side, round)` is one step of it."""
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(warm_up + rounds):
        for side in sides if number % 2 == 0 else list(sides)[::-1]:
            start = clock(device)
            step(side, number)
            if number >= warm_up:
                times[side.name].append(clock(device) - start)
    return times


def rows_of(
    case: str, times: dict[str, list[float]], images: int, goals: dict[str, str], areas: dict[str, tuple[float, ...]]
) -> list[dict[str, Any]]:
    """A row a side; the first is the peer."""
    peer, rows = next(iter(times)), []
    for name, seconds in times.items():
        ratios = [theirs / own for theirs, own in zip(times[peer], seconds, strict=True)]
        rows.append({
            "case": case, "side": name, "seconds": statistics.median(seconds), "rounds": len(seconds),
            "images_per_second": images / statistics.median(seconds),
            "faster": [statistics.median(ratios), min(ratios), max(ratios)],
            "whole": sum(times[peer]) / sum(seconds),
            "auroc": areas.get(name), "peer_auroc": areas.get(peer), "goal": goals.get(name, ""),
        })  # fmt: skip
    return rows


HEADER = (
    "| case | side | s a step | images/s | times the peer (range) | all steps "
    "| AUROC: best rate; mean of nine (- peer's) | goal |\n"
    "|---|---|---|---|---|---|---|---|"
)


def table_row(row: dict[str, Any]) -> str:
    """A line of the table for the documents."""
    if "failure" in row:
        return f"| {row['case']} | not measured ({row['failure']}) | | | | | | {row['goal']} |"
    middle, low, high = row["faster"]
    area = ""
    if row["auroc"] is not None:
        theirs_of = row["peer_auroc"][: len(row["auroc"])]  # kept tokens have no figure of the same course
        pairs = zip(row["auroc"], theirs_of, strict=True)
        area = "; ".join(f"{own:.4f} ({own - theirs:+.4f})" for own, theirs in pairs)
    return (
        f"| {row['case']} | {row['side']} | {row['seconds']:.4f} | {row['images_per_second']:.1f} | "
        f"{middle:.2f} ({low:.2f} to {high:.2f}) | {row['whole']:.2f} | {area} | {row['goal']} |"
    )


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Renew the figures."""
    folder = Path(os.environ.get("HILUM_BENCH_OUT", "outputs/bench"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=1))
