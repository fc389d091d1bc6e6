import pytest
import torch

from hilum.heads.study_sets import first_of_study, in_group, mean_where, same_study, shares

STUDY, VIEW = [0, 1, 0, 2, 1, 0], [0, 2, 2, 1, 3, 1]


def test_images_of_a_study_and_of_a_kind(make_features) -> None:
    features = make_features(6, study=STUDY, view=VIEW)
    same = same_study(features)
    assert same.tolist() == [[one == other for other in STUDY] for one in STUDY]
    assert in_group(features).int().tolist() == [[1, 0, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert first_of_study(same).tolist() == [0, 1, 0, 3, 1, 0]
    with pytest.raises(AssertionError, match="study"):
        same_study(features._replace(study=None))


def test_means_leave_out_who_is_no_member() -> None:
    values = torch.randn(4, 3)
    member = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    means, present = mean_where(member, values)
    torch.testing.assert_close(means[0], values[:2].mean(dim=0))
    assert not means[1].any()
    assert torch.equal(means[2], values[2])
    assert present.flatten().tolist() == [True, False, True, True]


def test_shares_are_a_softmax_inside_each_study_however_large_the_scores() -> None:
    scores = torch.tensor([1e4, 3.0, 1e4 + 1, -5.0, 2.0, 9e3])
    same = torch.tensor([[one == other for other in STUDY] for one in STUDY])
    share = shares(scores, same)
    assert share[~same].abs().sum() == 0
    torch.testing.assert_close(share[0, [0, 2, 5]], torch.softmax(scores[[0, 2, 5]], dim=0))
    torch.testing.assert_close(share[4, [1, 4]], torch.softmax(scores[[1, 4]], dim=0))
    assert share[3, 3] == 1
