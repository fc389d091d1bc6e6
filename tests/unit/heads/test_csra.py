"""CSRA against its equations in float64, and at its limits."""

import numpy as np
import pytest
import torch

from hilum.core.errors import ConfigError
from hilum.heads.csra import CSRAHead
from hilum.heads.registry import HeadConfig, build_head


def make(weight: float = 0.1, temperatures: tuple[float, ...] = (1.0,)) -> CSRAHead:
    torch.manual_seed(1)
    head = CSRAHead(6, 2, 5, weight, temperatures)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


def written_out(head: CSRAHead, features) -> tuple[np.ndarray, np.ndarray]:
    """arXiv 2108.02456: eq. 2 (attention), 3 (attended feature), 4 (mean feature), 5 and 6 (score), heads added."""
    batch, tokens, _ = features.patches.shape
    logits, maps = np.zeros((batch, 5)), np.zeros((batch, 5, tokens))
    rows = np.stack([one.weight.detach().double().numpy() for one in head.scores])
    for image in range(batch):
        x = features.patches[image].double().numpy()
        for finding in range(5):
            logits[image, finding] = head.bias[finding].item()
            for temperature, row in zip(head.temperatures, rows[:, finding], strict=True):
                scores = x @ row
                if temperature >= 99:
                    attention = (np.arange(tokens) == scores.argmax()).astype(float)
                else:
                    attention = np.exp(temperature * scores) / np.exp(temperature * scores).sum()
                feature = x.mean(axis=0) + head.weight * (attention @ x)
                logits[image, finding] += row @ feature
                maps[image, finding] += attention / len(head.temperatures)
    return logits, maps


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 99.0), (1.0, 2.0, 4.0, 99.0)])
@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_equals_the_equations_in_float64(make_features, weight, temperatures) -> None:
    head, features = make(weight, temperatures), make_features(4)
    logits, maps = written_out(head, features)
    np.testing.assert_allclose(head(features).detach().numpy(), logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(head.attention(features).flatten(2).detach().numpy(), maps, rtol=1e-4, atol=1e-6)


def test_without_attention_it_is_a_linear_head_on_mean_tokens(make_features) -> None:
    head, features = make(weight=0.0), make_features(4)
    expected = features.patches.mean(dim=1) @ head.scores[0].weight.T + head.bias
    torch.testing.assert_close(head(features), expected, atol=1e-5, rtol=1e-5)


def test_a_high_temperature_goes_to_the_largest_score(make_features) -> None:
    features = make_features(4)
    torch.testing.assert_close(make(0.5, (98.9,))(features), make(0.5, (99.0,))(features), atol=1e-3, rtol=1e-3)


def test_attention_finds_the_patch_that_holds_the_finding(make_features) -> None:
    head, features = make(), make_features(4)
    features.patches[2, 7] += 3 * head.scores[0].weight[1].detach()
    assert int(head.attention(features)[2, 1].flatten().argmax()) == 7
    assert torch.allclose(head.attention(features).sum(dim=(2, 3)), torch.ones(4, 5))


def test_parameters_are_those_of_a_linear_head_for_each_temperature() -> None:
    for temperatures in ((1.0,), (1.0, 2.0, 99.0)):
        with torch.device("meta"):
            head = build_head(HeadConfig("csra", 1024, 40, 4, csra_temperatures=temperatures))
        assert sum(parameter.numel() for parameter in head.parameters()) == len(temperatures) * 4096 * 40 + 40


def test_prediction_is_the_same_at_every_pass_and_mode(make_features) -> None:
    head, features = make(), make_features(4)
    assert head.draw_masks(features, torch.Generator()) is None
    assert torch.equal(head.train()(features), head.eval()(features))


@pytest.mark.parametrize("options", [{"temperatures": ()}, {"temperatures": (1.0, 0.0)}, {"weight": -0.1}])
def test_impossible_settings_are_refused(options) -> None:
    with pytest.raises(ConfigError, match="csra_"):
        CSRAHead(6, 2, 5, **options)
