"""Published results of the CXR-LT challenges, beside which one's own numbers are printed (facts/leaderboards.csv).

A published board is about one test set that was never released with its labels to most of us. Numbers of other data
stand beside it for orientation only: `leaderboard` gives them no place, and the text says so. Nor does it where the
board has gaps, values that nobody published, or no known end, and these leave the place open.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from hilum.core.errors import UnknownNameError
from hilum.data.labels import TASKS

MEASURES = ("mAP", "mAUC", "mF1", "mECE")
OURS = {"mAP": "mAP", "mAUC": "mAUC", "mF1": "mF1@0.5", "mECE": "mECE_challenge_inferred"}
"""Column of the board -> macro metric of metrics.json. What mECE was is inferred (docs/reference/metrics.md)."""
PHASES = ("test", "development", "rerun", "own")
TEST_IMAGES: dict[str, tuple[int, ...]] = {
    "cxrlt2024-task1": (78_946,), "cxrlt2024-task2": (406, 409), "cxrlt2024-task3": (78_946,),
    "cxrlt2026-task1": (1_400,), "cxrlt2026-task2": (384,),
}  # fmt: skip
"""Images of the test sets: 2024's gold set is 409 on its page and 406 in its file. 2023's is not known here."""
NOT_COMPARABLE = (
    "The first row is of other images than the published test set: its level says nothing about a place on this board."
)
WHOLE_BOARDS = frozenset({"cxrlt2024-task2"})
"""Boards of which every entry is known: whoever scores below all of them is last. Of others the end is not known."""


@dataclass(frozen=True)
class Row:
    """One line of a board; what was not published, or is undefined, is None."""

    task: str
    phase: str
    """test: the challenge's board; development: its development set; rerun: others, later; own: what was given."""
    rank: int | None
    """As published; of an own row the place that its mAP would have had, on the challenge's own test images alone, over
    every class of the task, and where the published entries decide it."""
    team: str
    values: dict[str, float | None]
    """Of each name in MEASURES; mF1 at the fixed cut of 0.5."""
    note: str
    source: str


@cache
def published(task: str) -> tuple[Row, ...]:
    """The published rows of a task: the test board in its order, development results, re-runs.

    Raises:
        UnknownNameError: no such task.
    """
    if task not in TASKS:
        raise UnknownNameError("task", task, TASKS)
    text = (files("hilum.data") / "facts" / "leaderboards.csv").read_text(encoding="utf-8")
    rows = [_row(line) for line in csv.DictReader(text.splitlines()) if line["task"] == task]
    return tuple(sorted(rows, key=lambda row: PHASES.index(row.phase)))


def _row(line: Mapping[str, str]) -> Row:
    numbers = {name: float(line[name]) if line[name] else None for name in MEASURES}
    rank = int(line["rank"]) if line["rank"] else None
    return Row(line["task"], line["phase"], rank, line["team"], numbers, line["note"], line["source"])


def is_challenge_test(task: str, images: int, datasets: Sequence[str]) -> bool:
    """Whether judged items can be the challenge's test set: as many images as it has, of its sources.

    Args:
        task: a name in TASKS.
        images: judged image rows.
        datasets: dataset of each row, or the distinct ones.
    """
    known = {"cxrlt", "mimic", "mimic-cxr-jpg"} if task.startswith("cxrlt2024") else {"cxrlt2026", "padchest", "nih"}
    return images in TEST_IMAGES.get(task, ()) and bool(len(datasets)) and set(map(str, datasets)) <= known


def leaderboard(
    task: str,
    own: Mapping[str, float | None],
    name: str = "this file",
    comparable: bool = False,
    missing: Sequence[str] = (),
    without_positive: Sequence[str] = (),
) -> list[Row]:
    """One's own row, then the published ones.

    Args:
        task: a name in TASKS.
        own: `macro` of metrics.json.
        name: what the own row is called.
        comparable: the own numbers are of the challenge's own test images (`is_challenge_test`). Only then does the
            row get a place: one more than the last published rank with a higher mAP, if the next rank is known too.
        missing: classes of the task that the mean lacks though the images have positives of them, or may: no place.
        without_positive: classes that nobody can be judged on with these images; the note names them.

    Returns:
        Rows, the own one first. `dataclasses.asdict` makes each JSON.

    Raises:
        UnknownNameError: no such task.
    """
    rows = published(task)
    values = {column: own.get(metric) for column, metric in OURS.items()}
    score = values["mAP"]
    if not comparable:
        rank, note = None, NOT_COMPARABLE
    elif missing:
        names = ", ".join(missing)
        rank, note = None, f"No place: {len(missing)} classes of this task are in no mean of the first row: {names}."
    else:
        rank, note = (None, "") if score is None else _place(task, rows, score)
        if names := ", ".join(without_positive):
            note = f"{note} {len(without_positive)} classes without a positive here are in no mean: {names}.".strip()
    return [Row(task, "own", rank, name, values, note, "metrics.json"), *rows]


def _place(task: str, rows: Sequence[Row], score: float) -> tuple[int | None, str]:
    """The place of a mAP on the test board, None where what was published leaves it open; and that in words."""
    board = [(row.rank, other) for row in rows if row.phase == "test" and (other := row.values["mAP"]) is not None]
    above = [rank for rank, other in board if other > score]
    below = [rank for rank, other in board if other <= score and rank is not None]
    first = 1 + max([len(above), *(rank for rank in above if rank is not None)])  # entries without a rank count too
    last = min(below) if below else first if task in WHOLE_BOARDS else None
    if last == first:
        return first, f"Place {first} by mAP among the published entries."
    places = f"{first} or later" if last is None else f"between {first} and {last}"
    return None, f"No place: {places} by mAP; the published entries leave it open."


def leaderboard_table(rows: Sequence[Row]) -> str:
    """A board as aligned text, ending with what may not be concluded from it."""
    cells = [["phase", "place", "team", *MEASURES]]
    for row in rows:
        numbers = [row.values[name] for name in MEASURES]
        cells.append([row.phase, str(row.rank or "-"), row.team, *("-" if v is None else f"{v:.3f}" for v in numbers)])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    notes = ["mECE of the own row: mECE_challenge_inferred (what the challenge computed was never published)."]
    if any(row.phase == "development" for row in rows):
        notes.append("development: other images and labels than the test set; not the scale of the test rows.")
    notes += [row.note for row in rows if row.phase == "own" and row.note]
    return "\n".join([*lines, *notes])
