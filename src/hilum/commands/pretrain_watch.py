"""Two questions after every backward pass of `hilum pretrain`: is every number finite, and has a signal asked to stop?

All processes answer together. On a CPU the answer is there at once. On a GPU, to ask is to wait for all work that is
queued, so the answer of a step is read some steps later: until then a flag on the device holds the optimizer and the
teacher still, which makes a late answer as good as an early one.
"""

import math
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hilum.core.distributed import Engine, max_over_ranks
from hilum.core.errors import NonFiniteLossError
from hilum.core.files import write_json

LAG = 2
"""Steps after which a GPU's answer is read. All processes read the same one at the same step."""


class Stop:
    """Whether a signal has asked this run to stop."""

    requested = False


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Inside, SIGTERM and SIGUSR1 are noted, not obeyed. Other threads than the main one get no signals."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(_number: int, _frame: object) -> None:
        stop.requested = True

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class _Question:
    """What a step asked, and where its answer will be."""

    step: int
    names: tuple[str, ...]
    answer: Tensor
    """On the CPU: broken anywhere, stop anywhere, then this process's numbers by `names`."""
    copied: "torch.cuda.Event | None"
    images: tuple[str, ...]
    """Identities of this process's images."""


class Watch:
    """Asks, remembers and answers.

    Args:
        out: the run folder, for the record of a step that broke.
        engine: device and processes.
        stop: what signals have asked.
        lag: steps between question and answer; None: 0 on a CPU, `LAG` on a GPU.
    """

    def __init__(self, out: Path, engine: Engine, stop: Stop, lag: int | None = None) -> None:
        self.out, self.engine, self.stop = out, engine, stop
        self.lag = (LAG if engine.device.type == "cuda" else 0) if lag is None else lag
        self.stopping = False
        """All processes have agreed to stop after the step that is being made."""
        self._pending: deque[_Question] = deque()
        self._broken = torch.zeros((), device=engine.device)

    def ask(self, step: int, numbers: dict[str, Tensor], images: Sequence[str]) -> Tensor | None:
        """Note the losses and gradient norms of a step, before any weight moves.

        Returns:
            None when the answer is known and good. Otherwise a flag on the device, 1 where this step or one before it
            is broken: the optimizer and the teacher must then stay as they are.

        Raises:
            NonFiniteLossError: a number of this step, or of the step `lag` before it, is not finite on some process.
        """
        values = torch.stack([number.detach().float() for number in numbers.values()])
        broken = (~torch.isfinite(values)).any().float()
        flags = torch.stack([broken, torch.full_like(broken, float(self.stop.requested))])
        flags = max_over_ranks(flags)
        self._broken = torch.maximum(self._broken, flags[0])
        self._pending.append(self._question(step, tuple(numbers), torch.cat([flags, values]), tuple(images)))
        while len(self._pending) > self.lag:
            self._answer(self._pending.popleft())
        return self._broken if self.lag else None

    def settle(self) -> None:
        """Wait for every answer; before anything is written.

        Raises:
            NonFiniteLossError: as `ask`.
        """
        while self._pending:
            self._answer(self._pending.popleft())

    def _question(self, step: int, names: tuple[str, ...], found: Tensor, images: tuple[str, ...]) -> _Question:
        if not found.is_cuda:
            return _Question(step, names, found, None, images)
        answer = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
        answer.copy_(found, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return _Question(step, names, answer, copied, images)

    def _answer(self, question: _Question) -> None:
        if question.copied is not None:
            question.copied.synchronize()
        broken, stopping, *values = question.answer.tolist()
        self.stopping |= bool(stopping)
        if broken:
            self._raise(question, values)

    def _raise(self, question: _Question, values: list[float]) -> None:
        number = question.step + 1
        written = {
            name: value if math.isfinite(value) else str(value)
            for name, value in zip(question.names, values, strict=True)
        }
        record: dict[str, Any] = {"step": number, "values": written, "images": list(question.images)}
        path = self.out / f"non_finite_step_{number:08d}_rank_{self.engine.rank}.json"
        write_json(path, record)
        bad = [name for name, value in written.items() if isinstance(value, str)]
        if self.engine.world_size > 1:  # whichever process is heard, the record to read may be another's
            path = path.with_name(f"non_finite_step_{number:08d}_rank_*.json")
        raise NonFiniteLossError(
            f"Step {number}: {', '.join(bad) or 'a value on another process'} is not finite; no weight was moved. "
            f"The step's images and values are in {path}. Start another run from the last checkpoint (--init) with a "
            "lower learning_rate or precision=fp32."
        )
