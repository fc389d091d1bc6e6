"""The yardstick of `hilum bench sweep` and `head-step`: decoders as the public head script trains them, written anew.

What RPIDIAL/CheXFound does, as its eval/classification shows: a decoder layer around
`nn.MultiheadAttention` that always returns its attention weights, queries and tokens with the batch second, a Python
loop over findings for the outputs, dropout from torch's generator in each head; heads in float32, losses summed, one
backward, every gradient looked through for NaN, one AdamW with a group for each rate; in prediction the same forward
(here without dropout). Parameters have the names of `hilum.heads.ml_decoder`, so that both sides start alike.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """As ML-Decoder's, which is `nn.TransformerDecoderLayer` without self-attention."""

    def __init__(self, dim: int, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout, self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(dropout) for _ in range(4))
        self.multihead_attn = nn.MultiheadAttention(dim, heads, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, queries: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(findings, images, dim) and (tokens, images, dim) -> queries, and weights that nobody reads."""
        queries = self.norm1(queries + self.dropout1(queries))
        attended, weights = self.multihead_attn(queries, memory, memory)
        queries = self.norm2(queries + self.dropout2(attended))
        hidden = self.linear2(self.dropout(F.relu(self.linear1(queries))))
        return self.norm3(queries + self.dropout3(hidden)), weights


class Decoder(nn.Module):
    """4-block patch tokens -> one logit per finding."""

    def __init__(self, width: int, findings: int, dim: int, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.embed_standart = nn.Linear(width, dim)
        self.query_embed = nn.Embedding(findings, dim)
        self.query_embed.requires_grad_(False)
        self.layers = nn.ModuleList([Layer(dim, hidden, heads, dropout)])
        self.duplicate_pooling = nn.Parameter(torch.empty(findings, dim, 1))
        self.duplicate_pooling_bias = nn.Parameter(torch.zeros(findings))
        nn.init.xavier_normal_(self.duplicate_pooling)

    def forward(self, tokens: Tensor) -> Tensor:
        """(images, tokens, width) -> (images, findings)."""
        memory = F.relu(self.embed_standart(tokens)).transpose(0, 1)
        queries = self.query_embed.weight.unsqueeze(1).expand(-1, memory.shape[1], -1)
        for layer in self.layers:
            queries, _ = layer(queries, memory)
        found = queries.transpose(0, 1)
        logits = torch.zeros(*found.shape[:2], 1, device=tokens.device, dtype=tokens.dtype)
        for place in range(found.shape[1]):
            logits[:, place, :] = torch.matmul(found[:, place, :], self.duplicate_pooling[place])
        return logits[:, :, 0] + self.duplicate_pooling_bias


class Loop:
    """Heads at several rates, in a loop."""

    def __init__(
        self, start: dict[str, Tensor], rates: Sequence[float], total_steps: int, heads: int, device: torch.device,
        dropout: float = 0.1,
    ) -> None:  # fmt: skip
        own = {name.removeprefix("decoder."): value for name, value in start.items()}
        dim, width = own["embed_standart.weight"].shape
        findings, hidden = len(own["duplicate_pooling_bias"]), len(own["layers.0.linear1.bias"])
        self.heads = nn.ModuleList([Decoder(width, findings, dim, hidden, heads, dropout) for _ in rates]).to(device)
        for head in self.heads:
            head.load_state_dict(own)
        groups = [
            {"params": [one for one in head.parameters() if one.requires_grad], "lr": rate}
            for head, rate in zip(self.heads, rates, strict=True)
        ]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, total_steps, eta_min=0)

    def step(self, tokens: Tensor, labels: Tensor) -> list[float]:
        """One step of every head; labels as `hilum.heads.losses` has them."""
        self.heads.train()
        values, known = labels.clamp(min=0).float(), (labels >= 0).float()
        losses = [
            F.binary_cross_entropy_with_logits(head(tokens), values, weight=known, reduction="sum")
            for head in self.heads
        ]
        total = sum(losses)
        assert isinstance(total, Tensor)
        if not math.isfinite(total.item()):
            raise FloatingPointError("the loss is not finite")
        self.optimiser.zero_grad()
        total.backward()
        for parameter in self.heads.parameters():
            if parameter.grad is not None and parameter.grad.isnan().any():
                parameter.grad.zero_()
        self.optimiser.step()
        self.schedule.step()
        return [loss.item() for loss in losses]

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """(rates, images, findings)."""
        self.heads.eval()
        return torch.stack([head(tokens).cpu() for head in self.heads])
