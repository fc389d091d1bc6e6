"""A finding that shows in the lateral image alone is learned for the frontal one by every head that reads the study."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from hilum.heads.features import Features
from hilum.heads.registry import HeadConfig, build_head

SMALL = {"decoder_dim": 16, "decoder_feed_forward": 16, "decoder_heads": 2}
STUDIES, DIM, GRID = 64, 8, (2, 3)


def studies(seed: int) -> tuple[Features, torch.Tensor]:
    """Two images to a study, a frontal and a lateral one in random order; one patch of the lateral one tells."""
    generator = torch.Generator().manual_seed(seed)
    positive = torch.rand(STUDIES, generator=generator) < 0.4
    order = torch.randperm(2 * STUDIES, generator=generator)
    study, view = torch.arange(2 * STUDIES)[order] // 2, (torch.arange(2 * STUDIES) % 2 * 2)[order]
    patches = torch.randn(2 * STUDIES, 6, DIM, generator=generator)
    tells = positive[study] & (view == 2)
    place = torch.randint(6, (2 * STUDIES,), generator=generator)
    patches[tells, place[tells], 0] += 6.0
    features = Features(patches.mean(dim=1), patches.mean(dim=1), patches, GRID, study, view)
    return features, positive[study].float()[:, None]


def area(config: HeadConfig) -> float:
    """Area under the curve of frontal images of studies that training has not seen."""
    torch.manual_seed(0)
    head, generator = build_head(config), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=5e-3)
    for step in range(60):
        features, labels = studies(step)
        logits = head(features, head.draw_masks(features, generator))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    features, labels = studies(10_000)
    frontal = features.view == 0
    with torch.no_grad():
        return float(roc_auc_score(labels[frontal, 0], head(features)[frontal, 0]))


@pytest.mark.parametrize(
    ("name", "views", "least"),
    [
        ("linear", "concat", 0.85), ("linear", "set", 0.85), ("linear", "attention", 0.8), ("csra", "attention", 0.8),
        ("ml_decoder", "attention", 0.85), ("ml_decoder", "memory", 0.85),
    ],
)  # fmt: skip
def test_what_one_view_shows_is_said_of_both(name: str, views: str, least: float) -> None:
    assert area(HeadConfig(name, DIM, 1, 1, views=views, **SMALL)) > least


@pytest.mark.parametrize("name", ["linear", "csra", "ml_decoder"])
def test_a_head_that_reads_one_image_cannot_know(name: str) -> None:
    assert area(HeadConfig(name, DIM, 1, 1, **SMALL)) < 0.7
