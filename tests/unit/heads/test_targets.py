import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hilum.core.errors import ConfigError, PredictionError
from hilum.data.label_maps import apply_hierarchy
from hilum.heads.losses import known_targets
from hilum.heads.targets import known_values, pseudo_targets

CODES = arrays(np.int8, (4, 3), elements=st.sampled_from([1, 0, -1, -2]))
SHARES = arrays(np.float64, (4, 3), elements=st.one_of(st.floats(0, 1), st.just(float("nan"))))
LABELS = np.array([[1, 0, -1, -2], [-1, -1, -1, 0]], np.int8)
TEACHER = np.array([[0.01, 0.99, 0.7, 0.9], [0.05, 0.5, np.nan, 0.99]])


@settings(deadline=None)
@given(CODES)
def test_arrays_and_batches_say_the_same(labels: np.ndarray) -> None:
    values, weights = known_values(labels)
    targets = known_targets(torch.from_numpy(labels))
    assert np.array_equal(values, targets.values.numpy())
    assert np.array_equal(weights, targets.weights.numpy())


@settings(max_examples=50, deadline=None)
@given(CODES, SHARES, st.floats(0, 1), st.floats(0, 1), st.booleans(), st.booleans())
def test_known_labels_are_never_overruled(labels, probabilities, one, other, hard, uncertain) -> None:
    """Defect C1 on the teacher's side: only unknown entries change, whatever it says."""
    kept, low, high = labels.copy(), min(one, other), max(one, other)
    values, weights = pseudo_targets(
        labels, probabilities, weight=0.25, low=low, high=high, hard=hard, uncertain=uncertain
    )
    assert np.array_equal(labels, kept)
    known = labels >= 0
    assert (weights[known] == 1).all()
    assert np.array_equal(values[known], labels[known])
    assert np.isin(weights[~known], (0, 0.25)).all()
    assert np.isfinite(values).all()
    assert ((values >= 0) & (values <= 1)).all()
    assert not values[weights == 0].any()
    assert not weights[np.isnan(probabilities) & ~known].any()
    if not uncertain:
        assert not weights[labels == -2].any()
    between = (probabilities > low) & (probabilities < high)
    assert not weights[between & ~known].any()


def test_unknown_entries_take_what_the_teacher_is_sure_of() -> None:
    values, weights = pseudo_targets(LABELS, TEACHER, weight=0.3, low=0.1, high=0.6)
    assert values.dtype == weights.dtype == np.float32
    assert values == pytest.approx(np.array([[1, 0, 0.7, 0], [0.05, 0, 0, 0]]))
    assert weights == pytest.approx(np.array([[1, 1, 0.3, 0], [0.3, 0, 0, 1]]))
    values, weights = pseudo_targets(LABELS, TEACHER, weight=0.3, low=0.1, high=0.6, hard=True, uncertain=True)
    assert values == pytest.approx(np.array([[1, 0, 1, 1], [0, 0, 0, 0]]))
    assert weights == pytest.approx(np.array([[1, 1, 0.3, 0.3], [0.3, 0, 0, 1]]))
    values, weights = pseudo_targets(LABELS, TEACHER)
    assert values == pytest.approx(np.array([[1, 0, 0.7, 0], [0.05, 0.5, 0, 0]]))
    assert weights == pytest.approx(np.array([[1, 1, 0.5, 0], [0.5, 0.5, 0, 1]]))


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"weight": 1.5}, {"low": 0.6, "high": 0.4}, {"low": -0.1}, {"high": 2.0}):
        with pytest.raises(ConfigError, match="weight in"):
            pseudo_targets(LABELS, TEACHER, **wrong)
    with pytest.raises(PredictionError, match=r"1\.5 for image 1, finding 0; are these logits"):
        pseudo_targets(LABELS, np.where(TEACHER == 0.05, 1.5, TEACHER))


def test_relatives_fill_unknown_labels_by_the_manifests_own_rules() -> None:
    """`apply_hierarchy` on an array of training labels: parents from children, children from parents, nothing else."""
    findings = ("Fracture", "Rib Fracture", "Nodule")
    codes = np.array([[-1, 1, -1], [0, -1, -1], [-2, 1, 0], [0, 1, -1], [1, -1, -1]], np.int8)
    filled = apply_hierarchy(codes, findings).codes
    assert filled.tolist() == [[1, 1, -1], [0, 0, -1], [-2, 1, 0], [0, 1, -1], [1, -1, -1]]


def test_normal_says_nothing_of_what_its_source_does_not_look_for() -> None:
    """Fit fills over the findings of all sources together; unknown is not negative."""
    findings = ("Normal", "Fracture", "Rib Fracture")
    codes = np.array([[1, -1, -1], [-1, 1, -1]], np.int8)
    assert apply_hierarchy(codes, findings).codes.tolist() == [[1, 0, 0], [0, 1, -1]]
    assert apply_hierarchy(codes, findings, with_normal=False).codes.tolist() == codes.tolist()
