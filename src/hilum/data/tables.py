"""Reads CSV files strictly: every value stays the text it was, and a malformed file is an error with its row.

A lenient reader turns 00012 into 12, merges two long ids into one float, pads short rows and shifts long ones. Here
every cell is text, every row has as many fields as the header, and a key that repeats is refused. Rows are counted as
in a spreadsheet: the header is row 1. Past 300 lines: every way in which a file can be wrong, with its words.
"""

import csv
import difflib
import gzip
import hashlib
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl

from hilum.core.errors import ManifestError, MissingColumnError, PathError

FIRST_ROW = 2
"""Spreadsheet row of the first record."""
BLOCK = 16 << 20
"""Bytes of a table that are checked at once."""
STRAY_QUOTE = "a quotation mark inside a field, or one that is never closed."
SHOWN_CHARACTERS = 12
"""Longer values are not shown: free text may name a person."""
LARGEST_UNPACKED, ALWAYS_UNPACKED, LARGEST_RATIO = 2 << 30, 64 << 20, 250
"""A `.gz` may unpack to 64 MiB, or to 250 times its size, and never to more than 2 GiB. Tables of labels reach 30 to 1;
deflate ends at 1,032 to 1, which only a file made to fill the memory comes near."""


@dataclass(frozen=True)
class Table:
    """A CSV file as text.

    Args:
        path: where it was read.
        frame: one text column per header name; empty cells are "". Never null.
        sha256: hex digest of the file.
    """

    path: Path
    frame: pl.DataFrame
    sha256: str

    @property
    def columns(self) -> list[str]:
        """Header names in order."""
        return self.frame.columns


def read_csv(
    path: Path, required: Sequence[str] = (), key: str | None = None, only: Sequence[str] | None = None
) -> Table:
    """Read a comma-separated UTF-8 file (with or without BOM; LF or CRLF; `.gz` too) into text columns.

    A trailing unnamed column without values (NIH 2017) is dropped; other unnamed columns are dropped too, since
    nothing can ask for them. Where the header ends in unnamed columns, rows may do without them (the boxes of NIH).

    Args:
        path: the file.
        required: columns that must be there, by exact name.
        key: column whose values must be unique.
        only: columns to keep, where the others are large (reports); all are checked.

    Raises:
        PathError: no such file.
        MissingColumnError: a required column is absent; names what was found and the nearest match.
        ManifestError: not UTF-8, NUL bytes, no rows, ragged rows, stray quotes, repeated columns or keys, damaged gzip.
    """
    path = Path(path)
    content = _bytes(path)
    digest = hashlib.sha256(content).hexdigest()
    if path.suffix.lower() == ".gz":
        content = _unpacked(content, path)
    header, body = _split_header(_as_utf8(content, path), path)
    del content
    require(header, required, path)
    header = _without_absent(header, body)
    rows = _check_fields(body, len(header), path)
    names = [name or f"\x1f{position}" for position, name in enumerate(header)]
    kept = [name for name in names if not name.startswith("\x1f") and (only is None or name in only)]
    frame = _parse(body, names, kept, path)
    if frame.height != rows:
        raise ManifestError(
            f"{path}: {rows} rows were counted and {frame.height} read; its quoting is not that of CSV."
        )
    if rows == 0:
        raise ManifestError(f"{path} has a header and no rows.")
    if key is not None:
        unique(frame[key], path)
    return Table(path, frame, digest)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file (with or without BOM); errors as `read_csv`."""
    return _as_utf8(_bytes(path), path).decode()


def read_list(path: Path) -> list[str]:
    """Read one name per line (NIH's split lists), ignoring blank lines and surrounding spaces."""
    text = read_text(path)
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(set(names)) != len(names):
        raise ManifestError(f"{path} lists {len(names) - len(set(names))} names twice.")
    return names


def require(found: Sequence[str], required: Iterable[str], where: Path | str) -> None:
    """Raise `MissingColumnError` unless every required column is among those found."""
    absent = [name for name in required if name not in found]
    if not absent:
        return
    lines = []
    for name in absent:
        folded = {other.casefold(): other for other in found if other}
        near = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.6)
        lines.append(f"{name!r}" + (f" (nearest: {folded[near[0]]!r})" if near else ""))
    shown = ", ".join(found[:20]) + (f", ... {len(found) - 20} more" if len(found) > 20 else "")
    raise MissingColumnError(f"{where} lacks {', '.join(lines)}. Expected {', '.join(required)}. Found: {shown}.")


def unique(values: pl.Series, path: Path) -> None:
    """Raise unless every value of a key column is there once; names the rows, not the value."""
    repeated = values.is_duplicated()
    if repeated.any():
        second = values.filter(repeated)[0]
        rows = (np.flatnonzero((values == second).to_numpy()) + FIRST_ROW).tolist()
        raise ManifestError(
            f"{path}: column {values.name!r} must be unique; {repeated.sum()} rows repeat a value, "
            f"first rows {', '.join(map(str, rows[:5]))}. Remove the copies."
        )


def row_of(bad: pl.Series) -> int:
    """Spreadsheet row of the first True."""
    return int(bad.arg_max() or 0) + FIRST_ROW


def check_values(values: pl.Series, allowed: Iterable[str], path: Path, error: type[ManifestError]) -> None:
    """Raise `error`, naming row, column and value, unless every cell is one of the allowed texts."""
    allowed = list(allowed)
    bad = ~values.is_in(allowed)
    if bad.any():
        shown = ", ".join(repr(text) for text in allowed)
        value = values.filter(bad)[0]
        found = repr(value) if len(value) <= SHOWN_CHARACTERS else f"a text of {len(value)} characters"
        raise error(
            f"{path}, row {row_of(bad)}: column {values.name!r} holds {found} ({bad.sum()} such rows); "
            f"expected one of {shown}."
        )


def check_filled(values: pl.Series, path: Path, error: type[Exception] = ManifestError, hint: str = "") -> None:
    """Raise `error` naming the row unless every cell of a column has a value."""
    bad = values == ""
    if bad.any():
        raise error(f"{path}, row {row_of(bad)}: {values.name!r} is empty ({bad.sum()} such rows).{hint}")


def _bytes(path: Path) -> bytes:
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise PathError(f"{path} is a folder, pipe or device; expected a file.")
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise PathError(f"{path} does not exist.") from None
    except OSError as error:
        raise PathError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not content.strip():
        raise ManifestError(f"{path} is empty.")
    return content


def _unpacked(content: bytes, path: Path) -> bytes:
    """The text in a gzip file, never more of it than the ceiling."""
    ceiling = min(LARGEST_UNPACKED, max(ALWAYS_UNPACKED, LARGEST_RATIO * len(content)))
    try:
        with gzip.open(BytesIO(content)) as file:
            text = file.read(ceiling + 1)  # reads to the end, so the checksum is verified
    except (OSError, EOFError, zlib.error) as error:
        raise ManifestError(f"{path} is not whole gzip ({error}). Fetch it again.") from error
    if len(text) > ceiling:
        raise ManifestError(
            f"{path}: {len(content):,} bytes unpack to more than {ceiling:,}; no table does. Fetch it again, or give "
            "the unpacked file."
        )
    if not text.strip():
        raise ManifestError(f"{path} is empty.")
    return text


def _as_utf8(content: bytes, path: Path) -> bytes:
    """Strip a BOM; refuse UTF-16, NUL bytes and anything that is not UTF-8."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ManifestError(f"{path} is UTF-16 text. Save it as UTF-8 CSV.")
    content = content.removeprefix(b"\xef\xbb\xbf")
    position = content.find(b"\0")
    if position >= 0:
        row = content.count(b"\n", 0, position) + 1
        raise ManifestError(f"{path}, row {row}: holds a NUL byte. The file is damaged, or not UTF-8 text.")
    try:
        if not content.isascii():
            content.decode()
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise ManifestError(f"{path}, row {row}: not UTF-8 (Latin-1, perhaps). Save it as UTF-8 CSV.") from error
    return content


def _split_header(content: bytes, path: Path) -> tuple[list[str], bytes]:
    if b"\r" in content and b"\n" not in content:
        raise ManifestError(f"{path} ends its lines with carriage returns alone. Save it with LF or CRLF line ends.")
    first, _, body = content.lstrip(b"\r\n").partition(b"\n")
    try:
        header = [name.strip() for name in next(csv.reader([first.decode()], strict=True))]
    except csv.Error as error:
        raise ManifestError(f"{path}: the header is not valid CSV ({error}).") from error
    if len(header) == 1:
        for separator, name in ((";", "semicolons"), ("\t", "tabs")):
            if separator in header[0]:
                raise ManifestError(f"{path} is separated by {name}; expected commas.")
    named = [name for name in header if name]
    repeated = sorted({name for name in named if named.count(name) > 1})
    if repeated:
        shown = ", ".join(map(repr, repeated))
        raise ManifestError(f"{path}: the header repeats {shown}. Each column needs its own name.")
    return header, body.rstrip(b"\r\n")


def _without_absent(header: list[str], body: bytes) -> list[str]:
    """The header without unnamed columns at its end that the first row does not have; every row must then do alike."""
    named = max((place + 1 for place, name in enumerate(header) if name), default=0)
    fields = body.partition(b"\n")[0].count(b",") + 1
    return header[:named] if named == fields < len(header) else header


def _check_fields(body: bytes, expected: int, path: Path) -> int:
    """Count records; each must have exactly `expected` fields, and quotes wrap whole fields only (RFC 4180).

    In blocks, so that it needs little memory beside the table (CheXpert Plus holds reports: 400 MB).
    """
    if not body:
        return 0
    text = np.frombuffer(body, np.uint8)
    quoted, before_end, rows, counts = False, 0, 0, []
    opened = 0  # where a quotation that is not closed yet began
    for start in range(0, len(text), BLOCK):
        block = text[start : start + BLOCK]
        separators, ends = block == ord(","), block == ord("\n")
        quotes = block == ord('"')
        if quoted or quotes.any():
            inside = np.bitwise_xor.accumulate(quotes) ^ quoted
            separators &= ~inside
            ends &= ~inside
            at = np.flatnonzero(quotes)
            stray = _first_stray(text, at + start, inside[at])
            if stray is not None:
                row = rows + int(np.count_nonzero(ends[: stray - start])) + FIRST_ROW
                raise ManifestError(f"{path}, row {row}: {STRAY_QUOTE}")
            opening = np.flatnonzero(inside[at])
            if len(opening):
                last = int(at[opening[-1]])
                opened = rows + int(np.count_nonzero(ends[:last])) + FIRST_ROW
            quoted = bool(inside[-1])
        seen = np.searchsorted(np.flatnonzero(separators), np.flatnonzero(ends))
        counts.append(np.diff(seen, prepend=-before_end) + 1)
        before_end = int(np.count_nonzero(separators)) - int(seen[-1] if len(seen) else -before_end)
        rows += len(seen)
    if quoted:
        raise ManifestError(f"{path}, row {opened}: {STRAY_QUOTE}")
    fields = np.append(np.concatenate(counts), before_end + 1)
    wrong = np.flatnonzero(fields != expected)
    if len(wrong):
        row = int(wrong[0])
        raise ManifestError(
            f"{path}, row {row + FIRST_ROW}: {fields[row]} fields, the header has {expected} ({len(wrong)} such rows)."
        )
    return len(fields)


def _first_stray(text: np.ndarray, at: np.ndarray, opens: np.ndarray) -> int | None:
    """Place of the first quotation mark that neither begins nor ends a field, nor is one of a doubled pair."""
    line_end = np.uint8(ord("\n"))
    before = np.where(at > 0, text[at - 1], line_end)
    after = np.where(at + 1 < len(text), text[np.minimum(at + 1, len(text) - 1)], line_end)
    starts_field = np.isin(before, np.frombuffer(b',\n"', np.uint8))
    ends_field = np.isin(after, np.frombuffer(b',\r\n"', np.uint8))
    stray = np.flatnonzero(np.where(opens, ~starts_field, ~ends_field))
    return int(at[stray[0]]) if len(stray) else None


def _parse(body: bytes, names: list[str], kept: list[str], path: Path) -> pl.DataFrame:
    schema = dict.fromkeys(names, pl.String)
    if not body:
        return pl.DataFrame(schema=schema).select(kept)
    quote = '"' if b'"' in body else None
    columns = [names.index(name) for name in names if name in kept]
    try:
        frame = pl.read_csv(body + b"\n", has_header=False, schema=schema, columns=columns, quote_char=quote)
    except pl.exceptions.PolarsError as error:
        raise ManifestError(f"{path} cannot be read as CSV: {str(error).splitlines()[0]}") from error
    return frame.select(kept).with_columns(pl.all().fill_null(""))
