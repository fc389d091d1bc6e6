"""Which test proves each guard of an honest evaluation: every way to fool oneself, with the planted fault against it.

The rows are the failures of the field's record (a patient in two splits, rows that slip, thresholds from test, ...).
This test only keeps the table true: each named test exists. `PARTIAL` says what a row asks for that no test shows yet.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]

GUARDS: dict[str, tuple[str, ...]] = {
    "patient in two splits": (
        "unit/data/test_schema.py::test_one_crossing_patient_in_ten_thousand_rows_is_found",
        "unit/data/test_splits.py::test_no_patient_is_ever_in_two_splits_and_row_order_does_not_matter",
        "unit/data/test_splits.py::test_official_without_a_split_and_with_a_crossing_patient",
        "programs/test_evaluate_bad_input.py::test_a_patient_in_two_splits_is_refused_and_an_image_is_named",
    ),
    "evaluation images used in pretraining": (
        "unit/data/test_leaks.py::test_each_planted_leak_is_found",
        "unit/data/test_leaks.py::test_a_seen_copy_of_an_evaluation_image_exposes_it",
        "programs/test_pretrain.py::test_held_out_images_and_patients_are_never_seen",
        "programs/test_audit_pixels.py::test_a_run_that_has_seen_test_is_a_leak",
        "programs/test_exposure_across_datasets.py::test_a_picture_is_known_under_another_datasets_name",
        "programs/test_evaluate.py::test_exposed_images_are_refused_unless_that_is_said",
    ),
    "duplicates and near duplicates across sets": (
        "unit/data/test_near_duplicates.py::test_planted_copies_of_phantoms_are_found_and_nothing_else",
        "unit/data/test_near_duplicates.py::test_planted_copies_of_real_films_are_found_and_nothing_else",
        "programs/test_audit_pixels.py::test_a_copy_in_test_is_a_leak_from_files_and_from_a_store",
    ),
    "prediction rows misaligned": (
        "programs/test_evaluate_bad_input.py::test_rows_rolled_by_one_are_put_right_by_their_ids",
        "programs/test_evaluate_bad_input.py::test_ids_that_do_not_fit_are_refused",
        "unit/evaluation/test_joining.py::test_rows_are_joined_by_id_not_by_position",
        "unit/evaluation/test_joining.py::test_duplicate_label_rows_are_refused",
        "unit/evaluation/test_predictions.py::test_duplicate_ids_are_refused",
    ),
    "class order wrong": (
        "programs/test_evaluate.py::test_classes_in_another_order_give_the_same_numbers",
        "programs/test_evaluate.py::test_a_renamed_finding_is_named",
        "programs/test_evaluate_bad_input.py::test_unknown_findings_name_the_nearest",
        "programs/test_evaluate_bad_input.py::test_a_dropped_finding_is_counted_and_named",
        "unit/evaluation/test_predictions.py::test_a_renamed_column_is_named",
        "unit/evaluation/test_submission.py::test_rows_and_classes_come_in_the_challenges_order",
    ),
    "NaN, infinite or out-of-range predictions": (
        "unit/evaluation/test_predictions.py::test_a_value_that_is_no_probability_is_refused_with_item_and_finding",
        "programs/test_evaluate_bad_input.py::test_a_prediction_that_is_no_probability_is_refused_with_its_place",
        "reference/test_metrics.py::test_every_metric_refuses_what_is_no_probability",
    ),
    "class without positives": (
        "programs/test_evaluate_bad_input.py::test_a_finding_without_positives_is_undefined_and_counted",
        "programs/test_evaluate_bad_input.py::test_labels_that_say_nothing_at_all_give_a_page_of_reasons",
        "unit/evaluation/test_evaluation_metrics.py::test_a_finding_without_positives_is_null_and_counted",
        "unit/evaluation/test_bootstrap.py::test_resamples_without_positives_are_skipped_and_counted",
    ),
    "study aggregation over wrong ids": (
        "unit/evaluation/test_studies.py::test_the_same_study_id_in_two_patients_or_datasets_stays_apart",
        "unit/evaluation/test_studies.py::test_row_order_does_not_matter_to_the_bit",
        "unit/evaluation/test_studies.py::test_a_single_view_and_equal_views_keep_their_value_exactly",
        "unit/evaluation/test_studies.py::test_another_study_never_changes_mine",
    ),
    "label of a study copied to the wrong image": (
        "unit/evaluation/test_joining.py::test_labels_per_study_are_spread_over_the_images",
        "unit/evaluation/test_joining.py::test_study_predictions_take_the_labels_of_their_images",
    ),
    "threshold, calibrator or checkpoint chosen on test": (
        "programs/test_evaluate.py::test_a_calibrator_fitted_on_test_is_refused",
        "programs/test_evaluate.py::test_validation_predictions_of_a_head_trained_on_validation_are_refused",
        "unit/evaluation/test_calibration.py::test_judging_on_the_fitted_items_is_refused",
        "programs/test_fit.py::test_labels_of_the_test_split_are_never_looked_at",
        "programs/test_evaluate_bad_input.py::test_the_ledger_counts_every_look_even_one_that_is_refused",
    ),
    "train and val merged, then the epoch chosen": (
        "programs/test_fit.py::test_slides_protocol_stops_at_epoch_two_of_ten",
        "programs/test_fit.py::test_the_search_sees_train_alone_and_the_refit_train_and_val",
        "unit/heads/test_protocol.py::test_the_slides_stop_at_two_and_calibrate_what_was_trained_as_long",
    ),
    "ensemble over different ids or orders": (
        "unit/evaluation/test_ensemble.py::test_different_items_are_refused_with_counts_and_an_example",
        "unit/evaluation/test_ensemble.py::test_mean_whatever_the_order_of_rows_columns_and_members",
        "unit/deploy/test_ensemble_model.py::test_members_of_other_images_labels_or_findings_are_refused",
        "programs/test_evaluate_bad_input.py::test_other_items_in_the_compared_file_are_refused",
    ),
    "metric code wrong": (
        "reference/test_metrics.py::test_agreement_with_scikit_learn",
        "reference/test_metrics.py::test_resamples_agree_with_scikit_learn_under_weights",
        "reference/test_metrics.py::test_calibration_errors_against_loops",
        "reference/test_metrics.py::test_equal_mass_bins_against_a_loop",
        "reference/test_metrics.py::test_every_metric_ignores_row_order_and_unknown_labels",
        "unit/evaluation/test_bootstrap.py::test_weighted_metrics_equal_the_definition_on_the_repeated_rows",
        "programs/test_evaluate_bad_input.py::test_chunks_of_the_file_and_the_order_of_its_rows_do_not_matter",
    ),
    "uncertain or blank labels as negatives": (
        "unit/data/test_label_maps.py::test_policies_change_only_the_cells_they_are_about",
        "unit/data/test_sources_folder.py::test_policies_change_only_the_cells_they_are_about",
        "unit/evaluation/test_evaluation_metrics.py::test_unknown_labels_change_only_their_finding",
        "programs/test_evaluate_bad_input.py::test_rows_without_any_label_count_in_nothing",
    ),
    "result not reproducible": (
        "programs/test_evaluate.py::test_two_runs_write_the_same_bytes",
        "programs/test_demo.py::test_two_clean_runs_of_the_whole_pipeline_give_the_same_results",
        "programs/test_fit.py::test_the_same_seed_gives_the_same_files_and_another_does_not",
        "reliability/test_resume.py::test_a_head_that_was_killed_is_fitted_again_to_the_same_bytes",
    ),
    "canaries": (
        "programs/test_evaluate_bad_input.py::test_shuffled_labels_constant_scores_and_noise_score_as_chance",
        "unit/evaluation/test_evaluation_metrics.py::test_canaries",
        "programs/test_fit_protocol.py::test_a_head_on_pictures_of_noise_scores_as_chance",
    ),
}

PARTIAL: dict[str, str] = {
    "class order wrong": "no export exists yet whose logits could be compared by class name",
    "threshold, calibrator or checkpoint chosen on test": "the ledger is opt-in (--ledger), not always kept",
    "train and val merged, then the epoch chosen": "a changed epoch is recorded in the model, not tied to a new run id",
    "canaries": "no metadata-only baseline",
}


@cache
def functions(path: Path) -> frozenset[str]:
    return frozenset(node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("failure", GUARDS)
def test_every_guard_has_its_test(failure):
    assert GUARDS[failure]
    for name in GUARDS[failure]:
        path, _, function = name.partition("::")
        assert (TESTS / path).exists(), name
        assert function in functions(TESTS / path), name


def test_all_sixteen_failures_are_in_the_table():
    assert len(GUARDS) == 16
    assert set(PARTIAL) <= set(GUARDS)
