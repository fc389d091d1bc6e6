"""Near duplicates in a manifest: which pictures are copies of each other, across splits (a leak) or within one.

The search is near_duplicates.py's; the pixels that confirm a candidate are audit_pixels.py's. A candidate whose pixels
cannot be read is not confirmed, and counts as a leak all the same where it crosses splits.
"""

import polars as pl

from hilum.core.tracking import progress
from hilum.data.audit_pixels import Pixels
from hilum.data.hashing import BITS, packed
from hilum.data.leaks import SIDE, Problem, problem, side
from hilum.data.near_duplicates import MIN_CORRELATION, WAYS, Pairs, correlations, search

SHOWN = 5
"""Pairs printed."""
_SEARCHES: tuple[tuple[str, tuple[str, ...]], ...] = (("test", ("train", "val")), ("val", ("train",)))
"""Evaluation against everything else, every pair of splits once."""


def find_copies(frame: pl.DataFrame, pixels: Pixels, within: bool = False) -> pl.DataFrame:
    """Pairs of pictures that are copies by perceptual hash and correlation, and pairs that could not be confirmed.

    Args:
        frame: a manifest's table with `phash256`; images without one are not compared.
        pixels: where candidates are read.
        within: also pairs inside a split.

    Returns:
        `first`, `second` (image_uid), `first_split`, `second_split`, `way`, `distance` (bits of 256), `correlation`
        (null where the pixels could not be read), and whether they are of the `same_patient`; the surest pairs first.
        Pairs whose pixels are equal are not here: they are found by `pixel_sha256`.
    """
    sided = frame.with_columns(side().alias(SIDE)).filter(pl.col(SIDE).is_not_null() & pl.col("phash256").is_not_null())
    candidates = _candidates(sided, within)
    uids = pl.concat([candidates["first"], candidates["second"]]).unique().sort().to_list()
    if not uids:
        return candidates.with_columns(correlation=pl.lit(None, dtype=pl.Float64))
    small = pixels.thumbnails(uids)
    readable = candidates["first"].is_in(list(small)) & candidates["second"].is_in(list(small))
    read, unread = candidates.filter(readable), candidates.filter(~readable)
    values = correlations(
        [small[uid] for uid in read["first"]],
        [small[uid] for uid in read["second"]],
        [WAYS.index(way) for way in read["way"]],
    )
    read = read.with_columns(correlation=pl.Series(values, dtype=pl.Float64))
    confirmed = read.filter(pl.col("correlation") >= MIN_CORRELATION).sort("distance", "first", "second")
    return pl.concat([confirmed, unread.with_columns(correlation=pl.lit(None, dtype=pl.Float64))])


def _candidates(sided: pl.DataFrame, within: bool) -> pl.DataFrame:
    parts = {name: sided.filter(pl.col(SIDE) == name) for name in ("train", "val", "test")}
    searches: list[tuple[pl.DataFrame, pl.DataFrame | None]] = [
        (parts[one], pl.concat([parts[other] for other in others])) for one, others in _SEARCHES
    ]
    if within:
        searches += [(part, None) for part in parts.values()]
    searches = [(queries, pool) for queries, pool in searches if queries.height and (pool is None or pool.height)]
    found = []
    with progress("Searching for copies", sum(queries.height for queries, _ in searches), "images") as bar:
        for queries, pool in searches:
            words = packed(queries["phash256"].to_list())
            others = queries if pool is None else pool
            pairs = search(words, None if pool is None else packed(others["phash256"].to_list()), bar=bar)
            found.append(_named(queries, others, pairs))
    if not found:
        found = [_named(sided, sided, search(packed([])))]
    return pl.concat(found)


def _named(queries: pl.DataFrame, others: pl.DataFrame, pairs: Pairs) -> pl.DataFrame:
    """The pairs by image_uid, without those of equal pixels."""
    columns = ("image_uid", SIDE, "dataset", "patient_id", "pixel_sha256")
    one, other = queries.select(columns)[pairs.query], others.select(columns)[pairs.other]
    table = pl.DataFrame(
        {
            "first": one["image_uid"],
            "second": other["image_uid"],
            "first_split": one[SIDE],
            "second_split": other[SIDE],
            "way": pl.Series([WAYS[way] for way in pairs.way.tolist()], dtype=pl.String),
            "distance": pairs.distance,
            "same_patient": (one["dataset"] == other["dataset"]) & (one["patient_id"] == other["patient_id"]),
        }
    )
    return table.filter(~(one["pixel_sha256"] == other["pixel_sha256"]).fill_null(value=False))


def copies_across_splits(frame: pl.DataFrame, pairs: pl.DataFrame) -> list[Problem]:
    """The leaks among pairs of `find_copies`."""
    crossing = pairs.filter(pl.col("first_split") != pl.col("second_split"))
    read, unread = (
        crossing.filter(pl.col("correlation").is_not_null()),
        crossing.filter(pl.col("correlation").is_null()),
    )
    found = []
    if read.height:
        message = f"pictures that have a copy in another split: {_described(read)}"
        found.append(_problem("near duplicate across splits", message, frame, read))
    if unread.height:
        message = (
            "pictures that may have a copy in another split, by their hashes; their pixels could not be read to tell: "
            + _described(unread)
        )
        found.append(_problem("possible near duplicate across splits", message, frame, unread))
    return found


def copies_within_splits(frame: pl.DataFrame, pairs: pl.DataFrame) -> list[Problem]:
    """The warnings among pairs of `find_copies`."""
    inside = pairs.filter((pl.col("first_split") == pl.col("second_split")) & pl.col("correlation").is_not_null())
    if not inside.height:
        return []
    patients = inside.filter(~pl.col("same_patient")).height
    message = f"pictures that have a copy in their split: {_described(inside)}; {patients:,} pairs of two patients"
    return [_problem("near duplicate", message, frame, inside)]


def _described(pairs: pl.DataFrame) -> str:
    counts = pairs.group_by("way").len().sort("len", "way", descending=[True, False]).iter_rows()
    return f"{pairs.height:,} pairs (" + ", ".join(f"{way} {count:,}" for way, count in counts) + ")"


def _problem(kind: str, message: str, frame: pl.DataFrame, pairs: pl.DataFrame) -> Problem:
    uids = pl.concat([pairs["first"], pairs["second"]]).unique().implode()
    fault = problem(kind, message, frame.filter(pl.col("image_uid").is_in(uids)))
    evidence = tuple(_line(row) for row in pairs.head(SHOWN).iter_rows(named=True))
    if pairs.height > SHOWN:
        evidence += (f"... and {pairs.height - SHOWN:,} more pairs (--evidence FILE.csv writes them all)",)
    return Problem(fault.kind, fault.message, fault.count, (), evidence)


def _line(row: dict) -> str:
    correlation = "pixels not read" if row["correlation"] is None else f"correlation {row['correlation']:.3f}"
    one, other = (f"{row[name]} ({row[f'{name}_split']})" for name in ("first", "second"))
    return f"{one} and {other}: {row['way']}, distance {row['distance']} of {BITS}, {correlation}"
