"""What a manifest asks to be decoded: one task per image, with the folder that its file is in.

Shared by those who decode originals: `build` all of them, `audit` some.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import polars as pl

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.data.checksums import Published
from hilum.data.decoding import Task
from hilum.data.raw import RawFormat, raw_format
from hilum.data.schema import Manifest

WHOLE_FILE = (None, False, "")


def source_roots(manifest: Manifest, overrides: Mapping[str, Path]) -> dict[str, Path]:
    """The folder of every root key: as given, else as it was when the manifest was made.

    Raises:
        ConfigError: a root is not known, or not there.
        UnknownNameError: an override that the manifest does not ask for.
    """
    roots = {**manifest.roots(), **{key: Path(folder) for key, folder in overrides.items()}}
    needed = manifest.frame["source_root_key"].unique().sort().to_list()
    unknown = sorted(set(overrides) - set(needed))
    if unknown:
        raise UnknownNameError("root", unknown[0], needed)
    for key in needed:
        if key not in roots:
            raise ConfigError(f"The manifest does not say where root {key!r} is. Add --root {key}=FOLDER.")
        if not roots[key].is_dir():
            raise ConfigError(f"Root {key!r} is not a folder: {roots[key]}. Say where it is with --root {key}=FOLDER.")
    return {key: roots[key].resolve() for key in needed}


def tasks(frame: pl.DataFrame, roots: Mapping[str, Path], published: Published | None = None) -> Iterator[Task]:
    """One task for each row of a manifest's table, in its order.

    Args:
        frame: the table.
        roots: folder of each root key.
        published: SHA-256 of files by root key and path (`published_checksums`); members of tars are not looked up.
    """
    published = published or {}
    folders = {key: str(folder) for key, folder in roots.items()}
    rows = frame.select("image_uid", "source_relpath", "source_root_key").iter_rows()
    for (uid, path, key), member, raw in zip(rows, _members(frame), _raw_formats(frame), strict=True):
        span, exact, refused = member
        sha256 = published.get(key, {}).get(path, b"") if span is None else b""
        yield Task(uid, path, folders[key], span, exact, refused, raw, sha256)


def listed(every: Iterable[Task], roots: Mapping[str, Path], published: Published) -> dict[str, tuple[int, int]]:
    """Root key of folders with published checksums -> how many tasks have one, and how many have none."""
    counted = Counter((task.root, bool(task.sha256)) for task in every)
    return {key: (counted[str(roots[key]), True], counted[str(roots[key]), False]) for key in published}


def _members(frame: pl.DataFrame) -> Iterator[tuple[tuple[int, int] | None, bool, str]]:
    """Where images are members of tars (webdataset.py): the arguments of `Task` that say so; else nothing."""
    if "member_offset" not in frame.columns:
        yield from itertools.repeat(WHOLE_FILE, frame.height)
        return
    columns = ("member_offset", "member_length", "member_exact", "member_refused")
    for offset, length, exact, refused in frame.select(columns).iter_rows():
        yield WHOLE_FILE if offset is None else ((offset, length), exact, refused)


def _raw_formats(frame: pl.DataFrame) -> Iterator[RawFormat | None]:
    """Where files have no header (raw.py): what they hold; else None."""
    if "mode" not in frame.columns:
        yield from itertools.repeat(None, frame.height)
        return
    modes = frame["mode"]
    formats = {mode: raw_format(mode) for mode in modes.unique()}
    yield from (formats[mode] for mode in modes)
