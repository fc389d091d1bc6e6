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


STUDY, VIEW = [0, 1, 0, 2, 1, 0, 3], [0, 2, 2, 1, 3, 1, 0]


def make(views: str, patch_mean: bool = False) -> LinearHead:
    torch.manual_seed(1)
    head = LinearHead(6, 2, 5, patch_mean, views)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


def test_parameter_counts_of_two_views_and_of_the_set() -> None:
    """Two views: the published 327,720 (8192 inputs)."""
    for views, expected in (("concat", 327_720), ("set", 4 * 163_840 + 40 + 3 * 4096)):
        assert count(build_head(HeadConfig("linear", 1024, 40, 4, views=views))) == expected


@pytest.mark.parametrize("patch_mean", [False, True])
@pytest.mark.parametrize("views", ["concat", "set"])
def test_views_are_put_side_by_side_as_written_out_in_float64(make_features, views: str, patch_mean: bool) -> None:
    head, features = make(views, patch_mean), make_features(7, study=STUDY, view=VIEW)
    own = torch.cat([features.cls, features.patch_mean], dim=1) if patch_mean else features.cls
    own = own.double().numpy()
    weight, bias = head.linear.weight.detach().double().numpy(), head.linear.bias.detach().double().numpy()
    kinds = [{0: 0, 1: 0, 2: 1, 3: 2}[view] for view in VIEW]
    for image, study in enumerate(STUDY):
        study_images = [other for other in range(7) if STUDY[other] == study]
        if views == "concat":
            others = [other for other in study_images if other != image] or [image]
            logits = [weight @ np.concatenate([own[image], own[other]]) + bias for other in others]
            expected = np.mean(logits, axis=0)
        else:
            parts = [own[image]]
            for kind in range(3):
                members = [other for other in study_images if kinds[other] == kind]
                absent = head.absent[kind].detach().double().numpy()
                parts.append(own[members].mean(axis=0) if members else absent)
            expected = weight @ np.concatenate(parts) + bias
        np.testing.assert_allclose(head(features)[image].detach().numpy(), expected, atol=2e-5)


def test_partners_in_training_are_other_images_of_the_study_at_random(make_features) -> None:
    head, features = make("concat"), make_features(7, study=STUDY, view=VIEW)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([head.draw_masks(features, generator) for _ in range(300)])
    for image, study in enumerate(STUDY):
        others = {other for other in range(7) if STUDY[other] == study and other != image} or {image}
        values, counts = drawn[:, image].unique(return_counts=True)
        assert set(values.tolist()) == others
        assert counts.min() > 300 / len(others) * 0.7
    inputs = torch.cat([features.cls, features.cls[drawn[0]]], dim=1)
    torch.testing.assert_close(head(features, drawn[0]), head.linear(inputs))
    again = head.draw_masks(features, torch.Generator().manual_seed(0))
    assert torch.equal(again, drawn[0])


@pytest.mark.parametrize("views", ["concat", "set"])
def test_prediction_knows_no_chance_no_order_and_no_other_study(make_features, only, views: str) -> None:
    """Defect C9: the partner was drawn again at every access, at test time too, and the view was ignored."""
    head, features = make(views), make_features(7, study=STUDY, view=VIEW)
    logits = head(features)
    assert torch.equal(logits, head.train()(features))
    order = [5, 3, 1, 0, 6, 2, 4]
    turned = only(features, order)._replace(study=torch.tensor([3, 2, 0, 1])[features.study[order]])
    torch.testing.assert_close(head(turned), logits[order], atol=1e-5, rtol=1e-6)
    moved = features._replace(cls=features.cls.clone())
    moved.cls[4] += 1
    change = (head(moved) - logits).abs().amax(dim=1)
    assert change[[1, 4]].min() > 1e-2
    assert change[[0, 2, 3, 5, 6]].max() < 1e-5


def test_the_set_tells_kinds_of_views_apart(make_features) -> None:
    head, features = make("set"), make_features(2, study=[0, 0], view=[0, 2])
    logits = head(features)
    for view in ([0, 1], [0, 3], [2, 0]):
        assert (head(features._replace(view=torch.tensor(view))) - logits).abs().max() > 1e-2
    assert torch.equal(head(features._replace(view=torch.tensor([1, 2]))), logits)  # PA and AP are both frontal


def test_every_weight_of_the_set_is_trained(make_features) -> None:
    head = make("set")
    head(make_features(7, study=STUDY, view=VIEW)).square().sum().backward()
    assert all(parameter.grad.any(dim=-1).all() for parameter in head.parameters() if parameter.ndim == 2)
