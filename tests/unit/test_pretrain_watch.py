"""Numbers that are not finite stop a run before a weight moves, also when the answer is read some steps late."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from hilum.backbones.vit import ViTConfig
from hilum.commands.pretrain_watch import Stop, Watch, stop_signals
from hilum.core.distributed import launch
from hilum.core.errors import NonFiniteLossError
from hilum.pretraining.dinov2 import HeadConfig, make_networks, update_teacher

TINY = ViTConfig(8, 1, 2, patch_size=4, image_size=16)
HEADS = HeadConfig(prototypes=6, hidden=5, dino_bottleneck=4, ibot_bottleneck=3)


def numbers(loss: float) -> dict[str, torch.Tensor]:
    return {"total": torch.tensor(loss), "gradient": torch.tensor(1.0)}


@pytest.mark.parametrize("lag", [0, 1, 2, 3])
def test_weights_stay_from_the_broken_step_on_and_the_error_names_it(tmp_path: Path, lag: int) -> None:
    student, teacher = make_networks(TINY, HEADS, seed=0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1, fused=True)
    kept: list[torch.Tensor] = []

    def train(watch: Watch) -> None:
        for step in range(10):
            for parameter in student.parameters():
                parameter.grad = torch.full_like(parameter, float("nan") if step >= 3 else 1.0)
            broken = watch.ask(step, numbers(float("nan") if step == 3 else 1.0), [f"image {step}"])
            optimizer.found_inf = broken  # type: ignore[attr-defined]
            optimizer.step()
            update_teacher(teacher, student, 0.5, broken)
            if step == 2:
                kept.extend(p.detach().clone() for p in (*student.parameters(), *teacher.parameters()))

    with launch(accelerator="cpu") as engine:
        watch = Watch(tmp_path, engine, Stop(), lag)
        with pytest.raises(NonFiniteLossError, match=r"Step 4: total is not finite; no weight was moved") as raised:
            train(watch)
    assert str(tmp_path) in str(raised.value)
    record = json.loads((tmp_path / "non_finite_step_00000004_rank_0.json").read_text())
    assert record == {"step": 4, "values": {"total": "nan", "gradient": 1.0}, "images": ["image 3"]}
    for now, before in zip((*student.parameters(), *teacher.parameters()), kept, strict=True):
        assert torch.equal(now, before)


def test_late_answers_are_settled_before_anything_is_written(tmp_path: Path) -> None:
    with launch(accelerator="cpu") as engine:
        watch = Watch(tmp_path, engine, Stop(), lag=5)
        watch.ask(0, numbers(float("inf")), [])
        with pytest.raises(NonFiniteLossError, match="Step 1"):
            watch.settle()
        watch.settle()  # said once


def test_a_signal_is_seen_after_the_lag(tmp_path: Path) -> None:
    with launch(accelerator="cpu") as engine, stop_signals() as stop:
        watch = Watch(tmp_path, engine, stop, lag=2)
        os.kill(os.getpid(), signal.SIGUSR1)
        seen = []
        for step in range(4):
            watch.ask(step, numbers(1.0), [])
            seen.append(watch.stopping)
    assert seen == [False, False, True, True]
