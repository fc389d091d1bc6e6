import numpy as np
import pytest
import torch

from hilum.heads.linear import LinearHead
from hilum.heads.registry import HeadConfig, build_head


def count(head: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in head.parameters())


@pytest.mark.parametrize(
    ("blocks", "patch_mean", "expected"), [(1, False, 41_000), (4, False, 163_880), (4, True, 204_840)]
)
def test_parameter_counts_of_the_published_heads(blocks: int, patch_mean: bool, expected: int) -> None:
    head = build_head(HeadConfig("linear", embed_dim=1024, findings=40, blocks=blocks, patch_mean=patch_mean))
    assert count(head) == expected


def test_initial_weights_are_normal_with_deviation_one_hundredth() -> None:
    torch.manual_seed(0)
    head = LinearHead(1024, 4, 40)
    assert float(head.linear.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert float(head.linear.weight.detach().mean()) == pytest.approx(0, abs=1e-4)
    assert not head.linear.bias.detach().any()


@pytest.mark.parametrize("patch_mean", [False, True])
def test_logits_are_a_matrix_product_in_float64(make_features, patch_mean: bool) -> None:
    features = make_features(5)
    head = LinearHead(6, 2, 3, patch_mean)
    torch.nn.init.normal_(head.linear.bias)
    parts = [features.cls, features.patch_mean] if patch_mean else [features.cls]
    inputs = np.concatenate([part.numpy().astype(np.float64) for part in parts], axis=1)
    expected = inputs @ head.linear.weight.detach().numpy().astype(np.float64).T + head.linear.bias.detach().numpy()
    np.testing.assert_allclose(head(features).detach().numpy(), expected, atol=1e-6)
