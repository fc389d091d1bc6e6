"""Embeddings on disk: who each row is, its vector in float32, and what made it (docs/how-to/features.md).

`.parquet` holds all three in one file, `.npz` too, for numpy alone; `.npy` is the bare matrix, with the rest beside it.
"""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from hilum.core.errors import PredictionError
from hilum.core.files import atomic_file, read_json, write_bytes, write_json, write_text
from hilum.evaluation.predictions import IDENTITY

FORMAT = "hilum-embeddings-1"
COLUMN = "embedding"
_SAME = ("format", "what", "unit", "backbone", "preprocess_id", "resolution", "dim")
"""Metadata that files must agree in to be read as one."""


@dataclass(frozen=True)
class Embeddings:
    """Vectors of N images or studies.

    Args:
        identity: the columns `evaluation.predictions.IDENTITY`, text, N each.
        vectors: one row each.
        metadata: what docs/how-to/features.md lists.

    Raises:
        PredictionError: columns are missing or of another length.
    """

    identity: dict[str, np.ndarray]
    vectors: Float32[np.ndarray, "N D"]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [name for name in IDENTITY if len(self.identity.get(name, ())) != len(self.vectors)]
        if wrong:
            raise PredictionError(f"{len(self.vectors)} embeddings need as many entries of {', '.join(wrong)}.")

    def __len__(self) -> int:
        return len(self.vectors)


def beside(path: Path) -> tuple[Path, Path]:
    """Where identity columns and metadata of a `.npy` are."""
    return path.with_name(path.name + ".rows.csv"), path.with_name(path.name + ".meta.json")


def write_embeddings(embeddings: Embeddings, path: Path) -> None:
    """Write `.parquet`, `.npz` or `.npy`.

    Raises:
        PredictionError: another suffix.
    """
    _choose(path, WRITERS)(embeddings, path)


def read_embeddings(paths: Sequence[Path | str] | Path | str) -> Embeddings:
    """Read one file, or the files of several shards as one, in the order given.

    Raises:
        PredictionError: no such file, damaged, or files that do not belong together.
    """
    listed = [Path(path) for path in ([paths] if isinstance(paths, Path | str) else paths)]
    parts = [_choose(path, READERS)(path) for path in listed]
    if len(parts) == 1:
        return parts[0]
    first = parts[0].metadata
    for path, part in zip(listed, parts, strict=True):
        other = next((name for name in _SAME if part.metadata.get(name) != first.get(name)), None)
        if other:
            raise PredictionError(
                f"{path} has {other} {part.metadata.get(other)!r}, {listed[0]} has {first.get(other)!r}: they are not "
                "parts of one set."
            )
    identity = {name: np.concatenate([part.identity[name] for part in parts]) for name in IDENTITY}
    if len(set(identity["image_uid"].tolist())) < len(identity["image_uid"]):
        raise PredictionError(f"{', '.join(map(str, listed))} hold the same item more than once.")
    return Embeddings(identity, np.concatenate([part.vectors for part in parts]), {**first, "shard": None})


def _choose(path: Path, table: dict[str, Callable]) -> Callable:
    if path.suffix not in table:
        raise PredictionError(f"{path}: expected a name that ends in {', '.join(table)}.")
    if table is READERS and not path.is_file():
        raise PredictionError(f"{path} does not exist; expected a file made by hilum embed.")
    return table[path.suffix]


def _write_parquet(embeddings: Embeddings, path: Path) -> None:
    import polars as pl

    columns = {name: pl.Series(name, embeddings.identity[name].tolist(), pl.String()) for name in IDENTITY}
    width = embeddings.vectors.shape[1]
    columns[COLUMN] = pl.Series(COLUMN, embeddings.vectors, pl.Array(pl.Float32(), width))
    content = io.BytesIO()
    pl.DataFrame(columns).write_parquet(content, metadata={"hilum": json.dumps(embeddings.metadata, allow_nan=False)})
    write_bytes(path, content.getvalue())


def _read_parquet(path: Path) -> Embeddings:
    import polars as pl

    try:
        frame, metadata = pl.read_parquet(path), json.loads(pl.read_parquet_metadata(path)["hilum"])
        identity = {name: np.array(frame[name].to_list(), dtype=str) for name in IDENTITY}
        return Embeddings(identity, frame[COLUMN].to_numpy().astype(np.float32), metadata)
    except (pl.exceptions.PolarsError, OSError, KeyError, ValueError) as error:
        raise PredictionError(f"{path} cannot be read as embeddings: {error}.") from error


def _write_npz(embeddings: Embeddings, path: Path) -> None:
    metadata = np.array(json.dumps(embeddings.metadata, allow_nan=False))
    with atomic_file(path) as file:
        np.savez(file, **{COLUMN: embeddings.vectors, "metadata": metadata}, **embeddings.identity)  # type: ignore[arg-type]


def _read_npz(path: Path) -> Embeddings:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            identity = {name: arrays[name] for name in IDENTITY}
            return Embeddings(identity, arrays[COLUMN], json.loads(str(arrays["metadata"])))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise PredictionError(f"{path} cannot be read as embeddings: {error}.") from error


def _write_npy(embeddings: Embeddings, path: Path) -> None:
    text, (rows, metadata) = io.StringIO(), beside(path)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(IDENTITY)
    writer.writerows(zip(*(embeddings.identity[name].tolist() for name in IDENTITY), strict=True))
    write_text(rows, text.getvalue())
    write_json(metadata, embeddings.metadata)
    with atomic_file(path) as file:
        np.save(file, embeddings.vectors)


def _read_npy(path: Path) -> Embeddings:
    rows, metadata = beside(path)
    try:
        vectors = np.load(path, allow_pickle=False)
        with rows.open(newline="", encoding="utf-8") as file:
            header, *lines = list(csv.reader(file))
        columns = {name: np.array([line[place] for line in lines], dtype=str) for place, name in enumerate(header)}
        identity = {name: columns[name] for name in IDENTITY}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise PredictionError(f"{path}, with {rows.name} beside it, cannot be read as embeddings: {error}.") from error
    return Embeddings(identity, vectors, read_json(metadata, PredictionError))


WRITERS: dict[str, Callable[[Embeddings, Path], None]] = {
    ".parquet": _write_parquet, ".npz": _write_npz, ".npy": _write_npy,
}  # fmt: skip
READERS: dict[str, Callable[[Path], Embeddings]] = {
    ".parquet": _read_parquet, ".npz": _read_npz, ".npy": _read_npy,
}  # fmt: skip
