"""DICOM headers of many files, for what no table says: view, sex, age, sometimes patient and study."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from hilum.core.errors import ImageError
from hilum.core.tracking import progress


def read_headers(paths: Sequence[str], root: Path) -> tuple[dict[str, dict[str, str]], int]:
    """Read the headers of DICOM files.

    Args:
        paths: relative to `root`.
        root: the folder.

    Returns:
        Path -> the fields of `images.read_dicom_header`, none where the header cannot be read (the build then says
        why); and how many those are.
    """
    from hilum.data.images import read_dicom_header  # pydicom is slow to import, and most sources have no DICOM

    headers: dict[str, dict[str, str]] = {}
    if not paths:
        return headers, 0
    with progress("Reading DICOM headers", len(paths), "files") as bar:
        for path in paths:
            try:
                headers[path] = read_dicom_header(root / path)
            except ImageError:
                headers[path] = {}
            bar.advance()
    return headers, sum(not header for header in headers.values())


def header_columns(paths: pl.Series, root: Path, fields: dict[str, str]) -> tuple[pl.DataFrame, list[str]]:
    """Fields of DICOM headers as text columns, "" where absent.

    Args:
        paths: relative to `root`.
        root: the folder.
        fields: column -> keyword ("view_raw" -> "ViewPosition").

    Returns:
        The columns, and notes.
    """
    headers, unreadable = read_headers(paths.to_list(), root)
    columns = {name: [headers[path].get(keyword, "") for path in paths] for name, keyword in fields.items()}
    notes = [f"{unreadable} DICOM headers cannot be read: view, sex and age unknown"] if unreadable else []
    return pl.DataFrame(columns, schema=dict.fromkeys(fields, pl.String)), notes
