"""A network as one module that other runtimes take over: squares of grey pixels in, findings, maps and embeddings out.

Normalisation is part of the graph, so that nobody can do it wrong. What is not: decoding and cropping (docs/how-to/
export.md says how), the mean with the mirror image, calibration, study rules.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from hilum.data.transforms import normalise
from hilum.deploy.network import Network
from hilum.heads.evidence import maps_of
from hilum.heads.features import read_tokens

INPUT = "squares"
OUTPUTS = ("probabilities", "logits", "attention", "cls", "patch_mean")
"""(B, C) raw, in [0, 1]; (B, C) log-odds; (B, C, h, w), each map summing to 1; (B, D) and (B, D) of the last block. Of
findings never trained the first two are NaN."""


class NetworkGraph(nn.Module):
    """One pass of a network, without the mirror image.

    Args:
        network: whose head looks at images one by one.
    """

    trained: Tensor

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.backbone, self.head = network.backbone, network.head
        self.recipe, self.config = network.recipe, network.config
        self.all_trained = bool(network.trained.all())
        self.register_buffer("trained", torch.from_numpy(network.trained.copy()), persistent=False)

    def forward(self, squares: UInt8[Tensor, "B 1 S S"]) -> tuple[Tensor, ...]:
        """What `OUTPUTS` says, float32."""
        head = self.config.head
        features = read_tokens(self.backbone, squares, self.recipe, head.blocks, self.head.needs_patches)
        logits = self.head(features).float()
        if not self.all_trained:
            logits = torch.where(self.trained, logits, torch.nan)
        maps = maps_of(self.head, features, self.backbone, normalise(squares, self.recipe))
        cls = features.cls[:, -self.config.backbone.embed_dim :]
        return torch.sigmoid(logits), logits, maps, cls, features.patch_mean


def program_of(network: Network) -> torch.export.ExportedProgram:
    """Trace a network for any number of images, on the CPU, in float32."""
    graph = NetworkGraph(network).eval()
    side = network.config.resolution
    example = torch.arange(2 * side * side).remainder(251).to(torch.uint8).view(2, 1, side, side)
    with torch.no_grad(), warnings.catch_warnings(), _no_shape_checks():
        warnings.simplefilter("ignore")  # torch's own deprecations while it traces
        return torch.export.export(
            graph, (example,), dynamic_shapes={INPUT: {0: torch.export.Dim("images")}}, strict=False
        )


@contextmanager
def _no_shape_checks() -> Iterator[None]:
    """Where shapes are checked as the program runs (in tests), not while it is traced: sizes are symbols then."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
