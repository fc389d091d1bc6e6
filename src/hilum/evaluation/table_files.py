"""Tables of columns with their metadata as Parquet, CSV or JSON: the file formats of `predictions.py`.

Parquet keeps metadata in its header and needs polars or pyarrow, imported on use. A CSV keeps it beside itself, in
`FILE.csv.meta.json`, so that other tools can read the table as it is; neither CSV nor JSON needs more than Python.
What the columns mean is not known here.
"""

import csv
import io
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from hilum.core.errors import PredictionError
from hilum.core.files import atomic_path, json_text, read_json, write_bytes, write_json
from hilum.core.tracking import warn

METADATA_KEY = "hilum"
Columns = dict[str, list[Any]]
"""Column name -> texts, or floats with None where empty."""


def write_table(columns: Columns, text_columns: Collection[str], metadata: dict[str, Any], path: Path) -> None:
    """Write columns of equal length; `text_columns` hold text, the others float64 or None.

    Raises:
        PredictionError: another suffix than .parquet, .csv or .json.
    """
    _choose(path, WRITERS)(columns, text_columns, metadata, path)


def read_table(path: Path) -> tuple[Columns, dict[str, Any]]:
    """Read what `write_table` wrote, or another tool; numbers of a CSV come as text.

    Raises:
        PredictionError: no such file, another suffix, or damaged.
    """
    reader = _choose(path, READERS)
    if not path.is_file():
        raise PredictionError(f"{path} does not exist; expected a prediction file.")
    return reader(path)


def _choose(path: Path, table: dict[str, Callable]) -> Callable:
    if path.suffix not in table:
        raise PredictionError(
            f"{path}: predictions are kept as {', '.join(table)}, not {path.suffix or 'no suffix'!r}."
        )
    return table[path.suffix]


def _write_csv(columns: Columns, text_columns: Collection[str], metadata: dict[str, Any], path: Path) -> None:
    del text_columns
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    # csv writes a float as repr, the shortest text that reads back as the same float64, and None as nothing
    writer.writerows(zip(*columns.values(), strict=True))
    with atomic_path(sidecar(path)) as beside, atomic_path(path) as table:  # both, or what was there before
        beside.write_text(json_text(metadata), encoding="utf-8")
        table.write_text(text.getvalue(), encoding="utf-8", newline="")


def sidecar(path: Path) -> Path:
    """Where the metadata of a CSV is."""
    return path.with_name(path.name + ".meta.json")


def _read_csv(path: Path) -> tuple[Columns, dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PredictionError(f"{path} cannot be read as a CSV: {error}.") from error
    ragged = next((number for number, row in enumerate(rows, 2) if len(row) != len(header)), None)
    if ragged is not None or len(set(header)) != len(header):
        where = f"line {ragged} has another number of columns than the header" if ragged else "a column name repeats"
        raise PredictionError(f"{path}: {where}.")
    columns = {name: [row[index] for row in rows] for index, name in enumerate(header)}
    if sidecar(path).exists():
        metadata = read_json(sidecar(path), PredictionError)
        if not isinstance(metadata, dict):
            raise PredictionError(f"{sidecar(path)}: expected a JSON object.")
        return columns, metadata
    warn(f"{path} has no {sidecar(path).name} beside it; taken for raw predictions, one row per image.")
    return columns, {}


def _write_json(columns: Columns, text_columns: Collection[str], metadata: dict[str, Any], path: Path) -> None:
    del text_columns
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    write_json(path, {"metadata": metadata, "predictions": rows})


def _read_json(path: Path) -> tuple[Columns, dict[str, Any]]:
    content = read_json(path, PredictionError)
    described = isinstance(content, dict) and isinstance(content.get("metadata", {}), dict)
    if not described or not isinstance(content.get("predictions"), list):
        raise PredictionError(f"{path}: expected an object with an object 'metadata' and a list 'predictions'.")
    rows, metadata = content["predictions"], dict(content.get("metadata", {}))
    if not all(isinstance(row, dict) for row in rows):
        raise PredictionError(f"{path}: expected every entry of 'predictions' to be an object, as JSON has them.")
    names = list(rows[0]) if rows else list(metadata.get("columns", []))
    uneven = next((number for number, row in enumerate(rows) if set(row) != set(names)), None)
    if uneven is not None:
        raise PredictionError(f"{path}: entry {uneven} has other columns than the first.")
    return {name: [row[name] for row in rows] for name in names}, metadata


def _write_parquet(columns: Columns, text_columns: Collection[str], metadata: dict[str, Any], path: Path) -> None:
    header, content = {METADATA_KEY: json.dumps(metadata, allow_nan=False)}, io.BytesIO()
    try:
        import polars as pl
    except ImportError:
        import pyarrow as pa  # type: ignore[import-not-found]
        import pyarrow.parquet as pq  # type: ignore[import-not-found]

        kinds = {name: pa.string() if name in text_columns else pa.float64() for name in columns}
        table = pa.table({name: pa.array(values, kinds[name]) for name, values in columns.items()})
        pq.write_table(table.replace_schema_metadata(header), content)
    else:
        schema = {name: pl.String() if name in text_columns else pl.Float64() for name in columns}
        pl.DataFrame(columns, schema=schema).write_parquet(content, metadata=header)
    write_bytes(path, content.getvalue())  # a full disk is then named for what it is


def _read_parquet(path: Path) -> tuple[Columns, dict[str, Any]]:
    try:
        import polars as pl
    except ImportError:
        import pyarrow as pa  # type: ignore[import-not-found]
        import pyarrow.parquet as pq  # type: ignore[import-not-found]

        try:
            table, header = pq.read_table(path), pq.read_metadata(path).metadata or {}
        except (pa.ArrowException, OSError) as error:
            raise PredictionError(f"{path} cannot be read as Parquet: {error}.") from error
        return table.to_pydict(), _from_header(header.get(METADATA_KEY.encode(), b"{}"), path)
    try:
        frame, metadata = pl.read_parquet(path), pl.read_parquet_metadata(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise PredictionError(f"{path} cannot be read as Parquet: {error}.") from error
    return {name: frame[name].to_list() for name in frame.columns}, _from_header(metadata.get(METADATA_KEY, "{}"), path)


def _from_header(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise PredictionError(f"{path}: the metadata in its header ({METADATA_KEY!r}) are no JSON object.")
    return metadata


WRITERS: dict[str, Callable[[Columns, Collection[str], dict[str, Any], Path], None]] = {
    ".parquet": _write_parquet, ".csv": _write_csv, ".json": _write_json,
}  # fmt: skip
READERS: dict[str, Callable[[Path], tuple[Columns, dict[str, Any]]]] = {
    ".parquet": _read_parquet, ".csv": _read_csv, ".json": _read_json,
}  # fmt: skip
