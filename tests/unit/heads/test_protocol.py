import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hilum.core.config import from_dict, to_dict
from hilum.core.errors import ConfigError
from hilum.heads.protocol import SearchEpoch, SearchRecord, Variant, best, choose, survivors

VARIANTS = tuple(Variant(rate, 4) for rate in (1e-4, 1e-3, 1e-2))
SCORES = np.array([[0.1, 0.2, 0.5], [0.2, 0.4, 0.3], [0.3, 0.35, 0.35]])


def decide(scores=SCORES, stop_epoch=None, refit_init="cold", train=80, val=20, refit_epochs=10, **options):
    epochs = [SearchEpoch(number, tuple(row), (1.0,) * 3) for number, row in enumerate(np.asarray(scores).tolist(), 1)]
    return choose(
        epochs, VARIANTS, train_images=train, val_images=val, refit_epochs=refit_epochs, stop_epoch=stop_epoch,
        refit_init=refit_init, **options,
    )  # fmt: skip


def test_the_rate_is_chosen_after_the_last_epoch_and_ties_go_to_the_lower() -> None:
    choice = decide()
    assert choice.variant.learning_rate == 1e-3  # not 1e-2, which was best of all after epoch 1
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


@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 1000), st.integers(1, 1000), st.integers(1, 12))
def test_a_refit_enters_the_second_stage_of_the_loss_where_the_calibrated_head_had(
    best: int, deferred_from: int, train: int, val: int, longest: int
) -> None:
    """A calibrator of one stage's scores says nothing of the other's."""
    scores = np.zeros((12, 3))
    scores[best - 1, 0] = 1
    choice = decide(scores, train=train, val=val, refit_epochs=longest, deferred_from=deferred_from)
    if best <= deferred_from:
        assert choice.second_stage is None
    else:
        assert choice.second_stage == min(round(deferred_from * train / (train + val)), choice.refit_epochs - 1)
    assert decide(scores, train=train, val=val, refit_epochs=longest).second_stage is None


def test_the_second_stage_of_fixed_warm_and_two_part_refits() -> None:
    assert decide(stop_epoch=3, deferred_from=2).second_stage == round(2 * 0.8)
    assert decide(stop_epoch=2, deferred_from=2).second_stage is None
    assert decide(refit_init="warm", deferred_from=2).second_stage == 0  # goes on from a head that was in it
    assert decide(refit_init="warm", deferred_from=3).second_stage is None
    assert decide(refit=False, deferred_from=0).second_stage is None
    epochs = [SearchEpoch(number, (0.1,) * 3, (1.0,) * 3, "whole" if number < 5 else "classifier")
              for number in range(1, 6)]  # fmt: skip
    options = {"train_images": 80, "val_images": 20, "stop_epoch": None, "refit_init": "cold"}
    assert choose(epochs, VARIANTS, refit_epochs=2, deferred_from=3, **options).second_stage == 1
    assert choose(epochs, VARIANTS, refit_epochs=2, deferred_from=4, **options).second_stage is None


def test_reasons_say_what_the_length_of_the_refit_ends() -> None:
    scores = np.zeros((18, 3))
    scores[-1] = 1
    assert "trained as long as the refit head" in decide(scores, refit_epochs=20).reasons[-1]
    assert "trained longer than the refit head" in decide(scores).reasons[-1]  # 10 epochs, not round(18 * 0.8)
    assert "trained as long as the refit head" in decide(stop_epoch=2).reasons[-1]
    assert "trained less long than the refit head" in decide(stop_epoch=9).reasons[-1]  # of a search of 3
    said = " ".join(decide(scores, deferred_from=16).reasons)
    assert "the loss weighs by rarity after refit epoch 9, as in search epoch 18" in said
    epochs = [SearchEpoch(1, (0.1,) * 3, (1.0,) * 3)] * 9 + [SearchEpoch(10, (0.1,) * 3, (1.0,) * 3, "classifier")]
    choice = choose(
        epochs, VARIANTS, train_images=80, val_images=20, refit_epochs=4, stop_epoch=None, refit_init="cold"
    )  # fmt: skip
    assert (choice.refit_epochs, choice.reasons[1].partition(",")[0]) == (4, "refit: 4 epochs")


def test_a_record_comes_back_from_plain_values() -> None:
    record = SearchRecord(
        "hilum-search-2", "macro AP", ("Edema",), 80, 20, VARIANTS,
        (SearchEpoch(1, (0.1, None, 0.3), (3.0, None, 1.0)),), decide(), "cold", (1.0, 0.5),
    )  # fmt: skip
    assert from_dict(SearchRecord, to_dict(record)) == record


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError):
        decide([[0.1, float("nan"), 0.2]])
    with pytest.raises(ConfigError):
        best([None, None, None], VARIANTS)


def test_ties_go_to_the_lower_rate_then_to_the_smaller_head() -> None:
    tried = [Variant(1e-3, 4, True), Variant(1e-3, 4), Variant(1e-3, 1, True), Variant(1e-3, 1), Variant(1e-2, 1)]
    assert best([0.3] * 5, tried) == 3
    assert best([0.3, 0.3, 0.3, None, 0.3], tried) == 2
    assert best([0.3, 0.3, None, None, 0.3], tried) == 1
    assert best([0.3, 0.3, 0.3, 0.3, 0.4], tried) == 4


def test_scores_of_zero_still_choose() -> None:
    """Defect C11: the released search begins at 0 with ">" and an empty name, and chooses nothing here."""
    assert best([0.0, 0.0, 0.0], VARIANTS) == 0
    assert decide(np.zeros((2, 3))).variant == VARIANTS[0]


def test_the_better_half_goes_on_and_what_was_pruned_is_never_chosen() -> None:
    five = [Variant(rate, 4) for rate in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)]
    assert survivors([0.1, 0.5, 0.2, 0.5, 0.4], five) == [1, 3, 4]
    assert survivors([0.1], five[:1]) == [0]
    epochs = [SearchEpoch(1, (0.9, 0.1, 0.2), (1.0,) * 3), SearchEpoch(2, (None, 0.2, 0.3), (None, 1.0, 1.0))]
    choice = choose(
        epochs, VARIANTS, train_images=8, val_images=2, refit_epochs=4, stop_epoch=None, refit_init="cold"
    )  # fmt: skip
    assert choice.variant == VARIANTS[2]


def test_a_classifier_stage_is_taken_as_it_ends_and_scaled_in_the_refit() -> None:
    epochs = [
        SearchEpoch(number, (score, 0.0, 0.0), (1.0,) * 3, "whole" if number <= 6 else "classifier")
        for number, score in enumerate([0.1, 0.9, 0.2, 0.3, 0.3, 0.3, 0.5, 0.4], 1)
    ]
    choice = choose(
        epochs, VARIANTS, train_images=80, val_images=20, refit_epochs=10, stop_epoch=None, refit_init="cold"
    )  # fmt: skip
    assert (choice.epoch, choice.score) == (8, 0.4)
    assert (choice.refit_epochs, choice.classifier_epochs) == (round(6 * 0.8), round(2 * 0.8))


def test_without_a_refit_the_head_of_the_best_epoch_is_the_model() -> None:
    choice = decide(refit=False)
    assert (choice.epoch, choice.refit_epochs) == (2, 0)
    assert "not seen validation" in choice.reasons[-1]
    assert decide(refit=False, stop_epoch=3).epoch == 3
    assert decide(refit=False, stop_epoch=2, refit_init="warm").epoch == 3  # what a warm refit would have begun from
