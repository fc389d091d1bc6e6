import dataclasses
import json

import pytest

from hilum.core.errors import UnknownNameError
from hilum.data.labels import TASKS
from hilum.evaluation.leaderboards import (
    MEASURES,
    NOT_COMPARABLE,
    PHASES,
    is_challenge_test,
    leaderboard,
    leaderboard_table,
    published,
)

OWN = {"mAP": 0.515, "mAUC": 0.9, "mF1@0.5": 0.4, "mECE_challenge_inferred": 0.5, "mECE_standard": 0.01}


@pytest.mark.parametrize("task", TASKS)
def test_every_row_is_sound(task):
    rows = published(task)
    assert rows
    for row in rows:
        assert row.phase in PHASES
        assert row.phase != "own"
        assert row.team
        assert row.source
        assert all(value is None or 0 < value < 1 for value in (row.values[name] for name in MEASURES))
    board = [row for row in rows if row.phase == "test" and row.rank]
    assert [row.rank for row in board] == sorted({row.rank for row in board})
    scores = [row.values["mAP"] for row in board if row.values["mAP"] is not None]
    assert scores == sorted(scores, reverse=True)


def test_the_board_of_task_2_is_as_published():
    """Ranks in the other columns, published beside the values, follow from the values."""
    board = [row for row in published("cxrlt2024-task2") if row.phase == "test"]
    assert len(board) == 13
    for column, reverse, ranks in (
        ("mAUC", True, [3, 2, 1, 5, 7, 6, 4, 9, 8, 10, 12, 11, 13]),
        ("mF1", True, [1, 4, 9, 3, 8, 5, 2, 6, 7, 11, 13, 10, 12]),
        ("mECE", False, [6, 3, 10, 5, 13, 7, 4, 8, 2, 12, 9, 1, 11]),
    ):
        values = sorted((row.values[column] for row in board), reverse=reverse)
        assert [values.index(row.values[column]) + 1 for row in board] == ranks
    seed = next(row for row in board if row.team == "yangz16")
    assert tuple(seed.values[name] for name in MEASURES) == (0.511, 0.836, 0.265, 0.744)


def test_a_place_is_given_on_the_challenges_own_images_alone():
    here, there = (leaderboard("cxrlt2024-task2", OWN, "mine", comparable=yes)[0] for yes in (True, False))
    assert (here.rank, there.rank) == (3, None)
    assert (here.values["mF1"], here.values["mECE"]) == (0.4, 0.5)
    assert there.note == NOT_COMPARABLE
    assert leaderboard("cxrlt2024-task2", {**OWN, "mAP": None}, comparable=True)[0].rank is None
    json.dumps([dataclasses.asdict(row) for row in leaderboard("cxrlt2024-task2", OWN)], allow_nan=False)


def test_no_place_where_the_mean_lacks_classes():
    def own(**options):
        return leaderboard("cxrlt2024-task2", OWN, "mine", comparable=True, **options)

    lacking, whole = own(missing=["Hernia"], without_positive=["Mass"]), own(without_positive=["Mass", "Fibrosis"])
    assert (lacking[0].rank, whole[0].rank) == (None, 3)
    assert "No place: 1 classes of this task are in no mean of the first row: Hernia." in leaderboard_table(lacking)
    text = leaderboard_table(whole)
    assert "Place 3 by mAP among the published entries. 2 classes without a positive here" in text
    assert "Mass, Fibrosis" in text


@pytest.mark.parametrize(
    ("task", "score", "place", "words"),
    [
        ("cxrlt2026-task1", 0.60, 1, "Place 1 "), ("cxrlt2026-task1", 0.47, 3, "Place 3 "),
        ("cxrlt2026-task1", 0.42, None, "between 4 and 5"), ("cxrlt2026-task1", 0.30, None, "6 or later"),
        ("cxrlt2024-task3", 0.10, None, "between 1 and 5"), ("cxrlt2024-task3", 0.01, None, "6 or later"),
        ("cxrlt2026-task2", 0.40, None, "2 or later"), ("cxrlt2026-task2", 0.30, None, "3 or later"),
        ("cxrlt2024-task2", 0.505, 6, "Place 6 "), ("cxrlt2024-task2", 0.10, 14, "Place 14 "),
    ],
)  # fmt: skip
def test_no_place_where_the_published_entries_leave_it_open(task, score, place, words):
    """Boards have gaps, entries without a value or a rank, and mostly no end."""
    rows = leaderboard(task, {"mAP": score}, comparable=True)
    assert rows[0].rank == place
    assert words in leaderboard_table(rows)
    if place is None:
        assert "No place" in rows[0].note


def test_the_text_says_what_may_not_be_concluded():
    text = leaderboard_table(leaderboard("cxrlt2024-task1", OWN, "mine"))
    assert NOT_COMPARABLE in text
    assert "development: other images" in text
    assert text.splitlines()[1].split() == ["own", "-", "mine", "0.515", "0.900", "0.400", "0.500"]
    assert NOT_COMPARABLE not in leaderboard_table(leaderboard("cxrlt2024-task1", OWN, comparable=True))


def test_which_items_can_be_the_challenges():
    assert is_challenge_test("cxrlt2024-task2", 406, ["cxrlt"])
    assert not is_challenge_test("cxrlt2024-task2", 406, ["nih"])
    assert not is_challenge_test("cxrlt2024-task2", 600, ["cxrlt"])
    assert not is_challenge_test("cxrlt2023", 600, ["cxrlt"])
    assert not is_challenge_test("cxrlt2024-task2", 406, [])
    with pytest.raises(UnknownNameError, match="cxrlt2024-task1"):
        leaderboard("cxrlt2024-task4", OWN)
