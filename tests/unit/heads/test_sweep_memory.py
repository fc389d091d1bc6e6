"""What a step of all heads holds at once, counted on tensors without data: at full size, and by number of findings."""

import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hilum.heads.candidates import grid
from hilum.heads.features import Features
from hilum.heads.losses import known_targets
from hilum.heads.registry import HeadConfig
from hilum.heads.sweep import Sweep

RATES = tuple(10.0**-place for place in range(1, 14))


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are alive, as an allocator without gaps would."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(findings: int, way: Any, batch: int, tokens: int, width: int, rates: tuple[float, ...] = RATES) -> int:
    """Of one step of decoders in bf16, features included."""
    dim, hidden, heads = (768, 2048, 8) if width == 4096 else (12, 16, 2)
    config = HeadConfig(
        "ml_decoder", width // 4, findings, 4, decoder_dim=dim, decoder_feed_forward=hidden, decoder_heads=heads
    )
    side = int(tokens**0.5)
    stays = patch.object(torch.nn.Module, "to", lambda module, *_: module)  # tensors without data cannot be moved
    with stays, FakeTensorMode(), LiveBytes() as counted:
        features = Features(
            torch.zeros(batch, width), torch.zeros(batch, width // 4), torch.zeros(batch, tokens, width), (side, side)
        )
        sweep = Sweep(grid([config], rates), 4, way=way, precision="bf16")
        [group] = sweep._groups
        masks = group.heads.template.draw_masks(features, group.generator)
        targets = known_targets(torch.zeros(batch, findings, dtype=torch.int8))
        stepped = group.heads.backward(features, masks, targets, sweep.loss)
        group.optimiser.step(stepped.gradients, rates)
    return counted.peak


@pytest.mark.parametrize("way", ["together", "in turn"])
def test_memory_grows_with_findings_and_not_with_their_square(way: str) -> None:
    few, some, many = (peak_bytes(findings, way, 4, 16, 64, RATES[:2]) for findings in (100, 200, 300))
    assert many - some == pytest.approx(some - few, rel=1e-3)


@pytest.mark.slow
def test_full_size_fits(report: Callable[[str], None]) -> None:
    """13 heads of 40 findings, batch 64, ViT-L at 512 pixels: 1,024 tokens of 4 x 1,024 channels."""
    together, in_turn = (peak_bytes(40, way, 64, 1024, 4096) for way in ("together", "in turn"))
    report(f"memory of a sweep of 13 decoders: {together / 1e9:.1f} GB together, {in_turn / 1e9:.1f} GB in turn")
    assert in_turn < together < 40e9
