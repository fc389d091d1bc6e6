import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hilum.core.config import from_dict, to_dict
from hilum.heads.protocol import SearchEpoch, SearchRecord, choose

RATES = (1e-4, 1e-3, 1e-2)
SCORES = np.array([[0.1, 0.2, 0.5], [0.2, 0.4, 0.3], [0.3, 0.35, 0.35]])


def decide(scores=SCORES, stop_epoch=None, refit_init="cold", train=80, val=20, refit_epochs=10):
    return choose(
        np.asarray(scores), RATES, train_images=train, val_images=val, refit_epochs=refit_epochs,
        stop_epoch=stop_epoch, refit_init=refit_init,
    )  # fmt: skip


def test_the_rate_is_chosen_after_the_last_epoch_and_ties_go_to_the_lower() -> None:
    choice = decide()
    assert choice.learning_rate == 1e-3  # not 1e-2, which was best of all after epoch 1
    assert choice.score == 0.35


def test_without_a_stop_epoch_the_best_search_epoch_is_scaled() -> None:
    choice = decide()
    assert (choice.epoch, choice.refit_epochs) == (2, round(2 * 0.8))
    assert decide(np.tile(SCORES, (3, 1)), train=50, val=50).epoch == 2  # the first of equal epochs


def test_the_slides_stop_at_two_and_calibrate_what_was_trained_as_long() -> None:
    choice = decide(stop_epoch=2)
    assert (choice.epoch, choice.refit_epochs) == (2, 2)
    assert decide(SCORES[:1], stop_epoch=2).epoch == 1


def test_a_warm_refit_calibrates_where_it_starts_from() -> None:
    assert decide(stop_epoch=2, refit_init="warm").epoch == 3
    assert decide(refit_init="warm").refit_epochs == 2


@given(st.integers(1, 12), st.integers(1, 1000), st.integers(1, 1000), st.integers(1, 12))
def test_a_refit_has_at_least_one_epoch_and_at_most_its_cosine(best: int, train: int, val: int, longest: int) -> None:
    scores = np.zeros((12, 3))
    scores[best - 1, 0] = 1
    choice = decide(scores, train=train, val=val, refit_epochs=longest)
    assert 1 <= choice.refit_epochs <= longest
    assert choice.epoch == best
    assert choice.refit_epochs == min(max(round(best * train / (train + val)), 1), longest)


def test_a_record_comes_back_from_plain_values() -> None:
    record = SearchRecord(
        "hilum-search-1", "macro AP", ("Edema",), 80, 20, RATES, (SearchEpoch(1, (0.1, 0.2, 0.3), (3.0, 2.0, 1.0)),),
        decide(), "cold", (1.0, 0.5),
    )  # fmt: skip
    assert from_dict(SearchRecord, to_dict(record)) == record


def test_a_score_that_is_no_number_is_refused() -> None:
    from hilum.core.errors import ConfigError

    with pytest.raises(ConfigError):
        decide([[0.1, float("nan"), 0.2]])
