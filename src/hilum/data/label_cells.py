"""From the cells of a source's tables to label values, and from those to label columns."""

import ast
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Bool, Int8

from hilum.core.errors import UnknownLabelError
from hilum.core.types import NEGATIVE, POSITIVE, UNCERTAIN, UNKNOWN
from hilum.data.label_maps import LabelMap, LabelPolicy, apply_map
from hilum.data.rows import unknown_label
from hilum.data.schema import label_column
from hilum.data.tables import check_values, row_of

CELLS: dict[str, int] = {
    "1": POSITIVE, "1.0": POSITIVE, "0": NEGATIVE, "0.0": NEGATIVE, "-1": UNCERTAIN, "-1.0": UNCERTAIN, "": UNKNOWN,
}  # fmt: skip
"""How CheXpert's labeller, and most tables after it, write a label; blank is "not mentioned"."""

EMPTY_LISTS = ("", "nan", "NaN", "None")
LONGEST_LIST = 10_000
"""Characters of a cell that lists labels; the longest real ones have a few hundred."""
BETWEEN = "\x1f"


def cell_values(
    frame: pl.DataFrame, labels: Sequence[str], table: Path, codes: Mapping[str, int] | None = None
) -> Int8[np.ndarray, "N L"]:
    """Values of one text column per label.

    Args:
        frame: has a column for each label.
        labels: in the order wanted.
        table: for messages.
        codes: accepted text -> value; default `CELLS`.

    Raises:
        UnknownLabelError: a cell holds anything else; names row, column and value.
    """
    codes = CELLS if codes is None else codes
    for label in labels:
        check_values(frame[label], codes, table, UnknownLabelError)
    columns = [frame[label].replace_strict(dict(codes), return_dtype=pl.Int8).to_numpy() for label in labels]
    return np.stack(columns, axis=1) if columns else np.zeros((frame.height, 0), np.int8)


def raw_cells(frame: pl.DataFrame, labels: Sequence[str]) -> pl.Series:
    """JSON of the filled label cells of each row, as the source has them: `{"Edema": "-1.0"}`."""
    named = [
        pl.when(pl.col(label) != "").then(
            pl.lit(f"{json.dumps(label)}: ") + pl.col(label).map_batches(_quoted, return_dtype=pl.String)
        )
        for label in labels
    ]
    return frame.select(
        raw_labels=pl.lit("{") + pl.concat_str(named, separator=", ", ignore_nulls=True) + pl.lit("}")
    ).to_series()


def _quoted(cells: pl.Series) -> pl.Series:
    texts = cells.unique()
    return cells.replace_strict(texts, [json.dumps(text, ensure_ascii=False) for text in texts])


def label_lists(cells: pl.Series, path: Path) -> pl.Series:
    """Lists of labels from their texts, spaces stripped and empty labels dropped; null where there is none.

    Args:
        cells: "['pleural effusion', 'cardiomegaly']", "[]", "" ...
        path: for messages.

    Raises:
        UnknownLabelError: a cell is not a list of texts; names its row.
    """
    texts = cells.unique()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an unknown escape in a text
        lists = [_label_list(text) for text in texts]
    bad = cells.is_in(texts.filter(pl.Series([labels is None for labels in lists])).implode())
    if bad.any():
        raise UnknownLabelError(
            f"{path}, row {row_of(bad)}: {cells.name!r} is not a list of labels such as \"['cardiomegaly', 'nodule']\" "
            f"({bad.sum()} such rows)."
        )
    joined = [BETWEEN.join(labels) if labels else None for labels in lists if labels is not None]
    by_text = pl.DataFrame({cells.name: texts, "lists": pl.Series(joined, dtype=pl.String).str.split(BETWEEN)})
    return cells.to_frame().join(by_text, on=cells.name, how="left", maintain_order="left")["lists"].alias(cells.name)


def _label_list(cell: str) -> list[str] | None:
    if cell.strip() in EMPTY_LISTS:
        return []
    if len(cell) > LONGEST_LIST:
        return None
    try:
        labels = ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, Warning):
        return None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return None
    return [label.strip() for label in labels if label.strip()]


def token_values(tokens: pl.Series, labels: LabelMap, table: Path) -> Int8[np.ndarray, "N L"]:
    """1 for each label in a row's list of tokens, 0 for the others of the vocabulary; a null list gives all unknown.

    Args:
        tokens: list of texts per row, exact words.
        labels: the vocabulary.
        table: for messages.

    Raises:
        UnknownLabelError: a token that the vocabulary does not have, with the nearest that it has.
    """
    column = {label: number for number, label in enumerate(labels.labels)}
    rows = pl.int_range(len(tokens), eager=True).alias("row")
    pairs = pl.DataFrame([rows, tokens.alias("token")]).explode("token").drop_nulls("token")
    for token in pairs["token"].unique().sort():
        if token not in column:
            row = row_of(tokens.list.contains(token).fill_null(False))
            error = unknown_label(token, labels.labels, f"{table}, row {row}, {tokens.name!r}")
            raise UnknownLabelError(f"{error} If it is spelled right, give it a row in facts/labels/{labels.name}.csv.")
    values = np.full((len(tokens), len(column)), NEGATIVE, np.int8)
    values[pairs["row"].to_numpy(), pairs["token"].replace_strict(column, return_dtype=pl.Int64).to_numpy()] = POSITIVE
    values[tokens.is_null().to_numpy()] = UNKNOWN
    return values


def finding_columns(
    values: Int8[np.ndarray, "N L"],
    labels: LabelMap,
    policy: LabelPolicy,
    annotated: Bool[np.ndarray, " N"] | None = None,
) -> tuple[list[pl.Series], Mapping[str, int]]:
    """`label.<finding>` columns of a source's label values, and the conflicts among them.

    Args:
        values: columns in the order of `labels.labels`.
        labels: the table.
        policy: for blanks, uncertainty, hints and implied negatives.
        annotated: images that the source says anything about; the others are unknown, whatever the policy for blanks.
    """
    annotated = np.ones(len(values), bool) if annotated is None else annotated
    mapped = apply_map(values[annotated], labels, policy)
    codes = np.full((len(values), len(labels.findings)), UNKNOWN, np.int8)
    codes[annotated] = mapped.codes
    columns = [
        pl.Series(label_column(finding), codes[:, number], dtype=pl.Int8)
        for number, finding in enumerate(labels.findings)
    ]
    return columns, mapped.conflicts
