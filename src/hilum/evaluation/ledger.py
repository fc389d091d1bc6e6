"""How often the labels of a split were looked at: one JSON line for each evaluation, appended to a file that is kept.

A test split judged forty times is a validation split. Nothing forbids that; the ledger says it. One line is one write,
so evaluations at the same time do not lose each other's.
"""

import json
import os
from pathlib import Path
from typing import Any

from hilum.core.errors import HilumError, PredictionError


def record_opening(path: Path, labels: str, split: str | None, **about: Any) -> int:
    """Add a line and say the how-manieth look at these labels and this split it is, from 1.

    Args:
        path: the ledger, JSON lines; made where there is none, in a folder that exists.
        labels: SHA-256 of the labels.
        split: which part of them; None for all.
        about: what else the line keeps (predictions, model, stage); JSON values.

    Raises:
        PredictionError: a line is no entry of a ledger; nothing is written.
        HilumError: the file cannot be read or written.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        earlier = [_entry(line, path, number) for number, line in enumerate(lines, 1)]
        opening = 1 + sum((entry["labels"], entry["split"]) == (labels, split) for entry in earlier)
        line = json.dumps({"labels": labels, "split": split, "opening": opening, **about}, sort_keys=True) + "\n"
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise HilumError(f"{path}: the ledger cannot be read and written ({why}). Nothing was judged.") from error
    return opening


def _entry(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or not {"labels", "split"} <= entry.keys():
        raise PredictionError(
            f"{path}, line {number}: expected an entry of a ledger (JSON with labels and split), found {line[:60]!r}. "
            "Give another file, or repair this one: a ledger is never written anew."
        )
    return entry
