from pathlib import Path

import numpy as np
import pytest

from hilum.core.errors import ConfigError
from hilum.data.store import Store, write_arrays
from hilum.pretraining import probing
from hilum.pretraining.probing import ProbeConfig, choose_images, linear_scores, neighbour_scores, ridge


def a_store(folder: Path, labels: np.ndarray, splits: list[str], patients: list[str]) -> Store:
    images = [np.full((8, 8), index % 256, np.uint8) for index in range(len(labels))]
    findings = [f"finding {column}" for column in range(labels.shape[1])]
    return write_arrays(folder, images, labels.astype(np.int8), findings, splits=splits, patients=patients)


def some_labels(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(
        np.array([1, 0, -1, -2], np.int8), (rows, columns), p=(0.3, 0.4, 0.2, 0.1)
    )


def test_votes_are_those_counted_by_hand() -> None:
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(40, 6)), rng.normal(size=(7, 6)) * 3
    labels = some_labels(40, 5)
    scores = neighbour_scores(bank, labels, queries, 9, 0.2)
    for query in range(7):
        for column in range(5):
            votes = []
            for place in range(40):
                if labels[place, column] in (0, 1):
                    a, b = queries[query], bank[place]
                    votes.append((float(a @ b / np.sqrt((a @ a) * (b @ b))), int(labels[place, column])))
            votes = sorted(votes)[-9:]
            weights = [np.exp(cosine / 0.2) for cosine, _ in votes]
            expected = sum(w * y for w, (_, y) in zip(weights, votes, strict=True)) / sum(weights)
            assert scores[query, column] == pytest.approx(expected, abs=1e-12)


def test_unknown_bank_images_have_no_vote() -> None:
    rng = np.random.default_rng(1)
    bank, queries = rng.normal(size=(30, 4)), rng.normal(size=(5, 4))
    labels = some_labels(30, 3)
    known = ((labels == 0) | (labels == 1))[:, 0]
    alone = neighbour_scores(bank[known], labels[known][:, :1], queries, 5, 0.1)
    np.testing.assert_allclose(neighbour_scores(bank, labels, queries, 5, 0.1)[:, :1], alone, atol=1e-12)
    as_negative = np.where(labels == 1, 1, 0).astype(np.int8)
    assert not np.allclose(neighbour_scores(bank, as_negative, queries, 5, 0.1)[:, :1], alone)


def test_all_known_images_vote_where_there_are_fewer_than_asked_for() -> None:
    bank = np.eye(3)
    labels = np.array([[1, 1], [0, -1], [1, -1]], np.int8)
    scores = neighbour_scores(bank, labels, np.eye(3), 20, 1e6)
    np.testing.assert_allclose(scores[:, 0], 2 / 3, atol=1e-6)
    np.testing.assert_allclose(scores[:, 1], 1.0)


@pytest.mark.parametrize("strength", [0.1, 10.0])
def test_ridge_solves_the_masked_normal_equations(strength: float) -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(80, 6)) @ rng.normal(size=(6, 6))
    labels = some_labels(80, 4)
    weights, intercepts = ridge(x, labels, (3.0, strength))
    for column in range(4):
        known = (labels[:, column] == 0) | (labels[:, column] == 1)
        a = np.concatenate([x[known], np.ones((known.sum(), 1))], axis=1)
        y = (labels[known, column] == 1).astype(float)
        penalty = np.diag([strength] * 6 + [0.0])
        exact = np.linalg.solve(a.T @ a / known.sum() + penalty, a.T @ y / known.sum())
        np.testing.assert_allclose(weights[1][:, column], exact[:6], atol=1e-8)
        assert intercepts[1][column] == pytest.approx(exact[6], abs=1e-8)


def test_a_finding_known_nowhere_gets_zeros() -> None:
    x = np.random.default_rng(0).normal(size=(10, 3))
    labels = np.full((10, 2), -1, np.int8)
    labels[:, 0] = [0, 1] * 5
    weights, intercepts = ridge(x, labels, (1.0,))
    assert not weights[0][:, 1].any()
    assert intercepts[0][1] == 0
    assert weights[0][:, 0].any()


def test_strength_is_chosen_without_the_queries_and_for_what_the_features_are() -> None:
    rng = np.random.default_rng(3)
    signal = rng.normal(size=(300, 1))
    labels = (signal > 0).astype(np.int8)
    patients = np.arange(300)
    clear = np.concatenate([signal, rng.normal(size=(300, 3))], axis=1)
    noise = rng.normal(size=(300, 200))
    assert probing._strength(clear, labels, patients, 0) < probing._strength(noise, labels, patients, 0)
    one = linear_scores(clear, labels, patients, clear[:5], 0)
    with_others = linear_scores(clear, labels, patients, np.concatenate([clear[:5], 100 + noise[:50, :4]]), 0)
    np.testing.assert_array_equal(one, with_others[:5])


def test_a_linear_map_finds_what_lies_along_a_line_and_scale_does_not_matter() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(400, 8))
    labels = (x @ rng.normal(size=(8, 1)) > 0).astype(np.int8)
    scores = linear_scores(x[:300], labels[:300], np.arange(300) // 2, x[300:], 0)
    positive = labels[300:, 0] == 1
    assert (scores[positive, 0][:, None] > scores[~positive, 0]).mean() > 0.97
    scaled = x * np.array([1e4, 1e-3, 1, 1, 1, 1, 1, 1]) + 5
    again = linear_scores(scaled[:300], labels[:300], np.arange(300) // 2, scaled[300:], 0)
    np.testing.assert_allclose(again, scores, atol=1e-6)


def test_a_constant_feature_is_harmless() -> None:
    rng = np.random.default_rng(5)
    x = np.concatenate([rng.normal(size=(50, 2)), np.full((50, 1), 7.0)], axis=1)
    labels = (x[:, :1] > 0).astype(np.int8)
    assert np.isfinite(linear_scores(x, labels, np.arange(50), x, 0)).all()


def test_bank_and_queries_share_no_patient_and_test_images_are_never_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    splits = rng.choice(["train", "val", "test", ""], 200).tolist()
    patients = [f"p{number}" for number in rng.integers(0, 150, 200)]
    labels = some_labels(200, 3)
    labels[::7] = -1
    store = a_store(tmp_path / "s", labels, splits, patients)
    chosen = choose_images(store, ProbeConfig(every=1), 0)
    assert set(store.splits[chosen.bank]) == {"train"}
    assert set(store.splits[chosen.queries]) == {"val"}
    held_out = set(store.patients[np.isin(store.splits, ["val", "test"])])
    assert not held_out & set(store.patients[chosen.bank])
    assert len(chosen.bank)
    for labels_of_side, places in ((chosen.bank_labels, chosen.bank), (chosen.query_labels, chosen.queries)):
        assert np.isin(store.labels[places], (0, 1)).any(axis=1).all()
        np.testing.assert_array_equal(
            labels_of_side, store.labels[places][:, [store.findings.index(f) for f in chosen.findings]]
        )
    by_number = {}
    for number, patient in zip(chosen.query_patients.tolist(), store.patients[chosen.queries].tolist(), strict=True):
        assert by_number.setdefault(number, patient) == patient
    assert sorted(by_number) == list(range(len(set(by_number.values()))))


def test_the_choice_follows_the_seed_and_nothing_else(tmp_path: Path) -> None:
    labels = some_labels(120, 2)
    splits = ["train"] * 80 + ["val"] * 40
    store = a_store(tmp_path / "s", labels, splits, [f"p{i}" for i in range(120)])
    config = ProbeConfig(every=1, images=30)
    first, again = choose_images(store, config, 1), choose_images(Store.open(store.path), config, 1)
    assert len(first.bank) == len(first.queries) == 30
    np.testing.assert_array_equal(first.bank, again.bank)
    np.testing.assert_array_equal(first.queries, again.queries)
    assert not np.array_equal(first.bank, choose_images(store, config, 2).bank)


def test_findings_with_few_positives_or_negatives_are_left_out(tmp_path: Path) -> None:
    labels = np.zeros((40, 4), np.int8)
    labels[::2, 0] = 1
    labels[:2, 1] = labels[20:26, 1] = 1  # 2 in the bank, 6 among the queries
    labels[:, 2] = 1
    labels[::2, 3] = -1
    labels[1::4, 3] = 1
    store = a_store(tmp_path / "s", labels, ["train"] * 20 + ["val"] * 20, [f"p{i}" for i in range(40)])
    chosen = choose_images(store, ProbeConfig(every=1), 0)
    assert chosen.findings == ("finding 0", "finding 3")
    assert choose_images(store, ProbeConfig(every=1, minimum_positives=2), 0).findings == (
        "finding 0", "finding 1", "finding 3",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("splits", "labels", "words"),
    [
        (["train"] * 4, np.ones((4, 1)), "no labelled images of split val"),
        (["train"] * 2 + ["val"] * 2, np.full((4, 1), -1), "no labelled images of split train"),
        (["train"] * 2 + ["val"] * 2, np.ones((4, 1)), "no finding has 3 positives and negatives among 2 labelled"),
    ],
)
def test_a_store_that_cannot_be_probed_is_refused_with_the_reason(tmp_path, splits, labels, words) -> None:
    store = a_store(tmp_path / "s", labels, splits, [f"p{i}" for i in range(len(splits))])
    with pytest.raises(ConfigError, match=words):
        choose_images(store, ProbeConfig(every=1), 0)


@pytest.mark.parametrize(
    "change", [{"every": -1}, {"images": 1}, {"neighbours": 0}, {"temperature": 0.0}, {"resamples": 1}]
)
def test_settings_out_of_range_are_named(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"probe.{next(iter(change))}"):
        ProbeConfig(**change)
