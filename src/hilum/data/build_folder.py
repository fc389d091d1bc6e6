"""What the folder of a store says of the builds before: whose it is, which shards are finished, what to try again.

While shards are written, `build.json` says what they are made with and of which datasets; `store.json`, written last,
takes its place.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hilum.core.errors import StoreError
from hilum.core.files import read_json, write_text
from hilum.core.tracking import progress
from hilum.data.decoding import Settings, Task, decoders, environment_fault, fingerprint
from hilum.data.finish import UNFINISHED, Finished


@dataclass(frozen=True)
class PlannedShard:
    """One shard before it is written."""

    name: str
    dataset: str
    licence: str
    tasks: tuple[Task, ...]
    digest: str
    """Over the settings and every task's identity and relative path: the same digest means the same bytes."""


def check_folder(out: Path, settings: Settings, datasets: set[str]) -> None:
    """A store of other settings, or of other data alone, is never overwritten, finished or not.

    An unfinished one of a version that wrote no `build.json` is taken as ours.

    Raises:
        StoreError: it would be; or there is a file in place of the folder.
    """
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out} is a file; expected a folder for the store.")
    path = next((out / name for name in ("store.json", UNFINISHED) if (out / name).exists()), None)
    if path is None:
        return
    header = read_json(path, StoreError)
    if not isinstance(header, dict):
        raise StoreError(f"{path} is not a JSON object; it is no store of ours. Choose another --out.")
    kind = "an unfinished store" if path.name == UNFINISHED else "a store"
    found, wanted = {name: header.get(name) for name in _made_with(settings)}, _made_with(settings)
    if found != wanted:
        raise StoreError(f"{out} holds {kind} made with {found}; asked for {wanted}. Choose another --out.")
    before = set(header.get("datasets", ())) | {shard["dataset"] for shard in header.get("shards", ())}
    if before and datasets.isdisjoint(before):
        raise StoreError(
            f"{out} holds {kind} of {', '.join(sorted(before))}, none of which is in this manifest "
            f"({', '.join(sorted(datasets))}): its shards would be removed. Choose another --out."
        )


def claim_folder(out: Path, settings: Settings, datasets: set[str]) -> None:
    """Say what the shards to come are made with, and take back that the store is finished."""
    write_text(out / UNFINISHED, json.dumps({**_made_with(settings), "datasets": sorted(datasets)}) + "\n")
    (out / "store.json").unlink(missing_ok=True)


def _made_with(settings: Settings) -> dict[str, Any]:
    return {"size": settings.size, "encoding": settings.encoding, "preprocess_id": settings.preprocess_id}


def marker(out: Path, planned: PlannedShard) -> Path:
    """The file that says that a shard is finished."""
    return out / "shards" / f"{Path(planned.name).stem}.done"


def finished(out: Path, planned: PlannedShard) -> Finished | None:
    """What the marker of a finished shard says; None where the shard is not finished, or is another plan's."""
    path, file = marker(out, planned), out / "shards" / planned.name
    if not path.exists():
        return None
    done = Finished.of(read_json(path, StoreError))
    if done.digest != planned.digest or not file.is_file() or file.stat().st_size != done.bytes:
        return None
    return done


def to_write(
    out: Path, plan: Sequence[PlannedShard], mine: Sequence[int], settings: Settings, workers: int | None
) -> list[int]:
    """Which of the shards `mine` are not finished, or would come out otherwise now.

    A shard is written again where a file that was refused has changed since, or where one that was refused for the
    machine's fault, which is decoded here, no longer is so.
    """
    waiting: list[int] = []
    doubtful: dict[int, dict[str, str]] = {}
    for number in mine:
        done, tasks = finished(out, plan[number]), _by_uid(plan[number])
        rows = () if done is None else tuple(done.refused.select("image_uid", "found", "reason", "message").iter_rows())
        if done is None or any(fingerprint(tasks[uid]) != found for uid, found, *_ in rows):
            waiting.append(number)
            continue
        again = {uid: reason for uid, _, reason, message in rows if environment_fault(reason, message)}
        if again:
            doubtful[number] = again
    if doubtful:
        images = sum(map(len, doubtful.values()))
        with progress("tried again", images, "images") as bar, decoders(settings, workers, images) as decode:
            for number, reasons in doubtful.items():
                tasks = _by_uid(plan[number])
                outcomes = decode.again([(tasks[uid], reason) for uid, reason in reasons.items()])
                if any(outcome.reason != reasons[outcome.uid] for outcome in outcomes):
                    waiting.append(number)
                bar.advance(len(reasons))
    return sorted(waiting)


def _by_uid(planned: PlannedShard) -> Mapping[str, Task]:
    return {task.uid: task for task in planned.tasks}
