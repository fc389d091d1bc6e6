"""JSRT: 154 films with one nodule (`JPCLN001.IMG`), 93 without (`JPCNN001.IMG`), 12 bits, without a header.

A file is 2048 x 2048 big-endian words of 16 bits, white lowest, and nothing else: the manifest says so in `mode`
(`raw.py`), and a file of another length is refused. Files lie in folders of any name. The texts beside them,
`CLNDAT_EN.txt` (file, subtlety 1 to 5, size in mm, age, sex, x, y, malignant or benign, place, diagnosis; the User's
Guide has another order) and `CNNDAT_EN.TXT` (file, age, sex, "non-nodule"), give sex and age where they are there.
"Without a nodule" is not "normal".
Source: Shiraishi et al., American Journal of Roentgenology 2000.
"""

import json
import re
from pathlib import Path

import polars as pl

from hilum.core.errors import ManifestError, PathError
from hilum.core.files import sha256_file
from hilum.data.label_cells import finding_columns, token_values
from hilum.data.label_maps import load_map
from hilum.data.raw import RawFormat
from hilum.data.rows import Scan, SourceOptions, SourceRows, ages, existing_folder, scan

FORMAT = RawFormat(2048, 2048, 12, inverted=True)
NAME = re.compile(r"(JPC[LN]N\d{3})\.IMG", re.IGNORECASE)
TEXTS = {"CLNDAT_EN.TXT": "JPCLN", "CNNDAT_EN.TXT": "JPCNN"}
LONGEST_TEXT = 2**20
"""Bytes; the real texts have some thousands."""
_AGE_AND_SEX = r"(\d{1,3}|\?)\s+(male|female|\?)(?:\s|$)"
PERSON = {
    "JPCLN": re.compile(rf"(?i)\.IMG\s+\S+\s+\S+\s+{_AGE_AND_SEX}"),
    "JPCNN": re.compile(rf"(?i)\.IMG\s+{_AGE_AND_SEX}"),
}
"""Where age and sex are: in the one text after subtlety and size, in the other first."""
LABELS = load_map("jsrt")


def read(options: SourceOptions) -> SourceRows:
    """Read the names of the films, and the texts where they are.

    Raises:
        PathError: no films, links that leave the folder, or films that a text lists and that are not there.
        ManifestError: a film twice, or a text that is none.
    """
    root = existing_folder(options.root, "jsrt=ROOT holds the .IMG files")
    home = existing_folder(options.images, "--images jsrt=FOLDER") if options.images else root
    paths = _films(scan(home), home)
    lines, hashes = _texts(root)
    notes = _missing(sorted(set(lines) - set(paths)), home, options)
    if lines and set(paths) - set(lines):
        notes.append(f"{len(set(paths) - set(lines))} films are in none of the texts: sex and age unknown")
    if not lines:
        notes.append(f"none of {', '.join(TEXTS)} is there: sex and age unknown")
    names = sorted(paths)
    tokens = [["nodule"] if name.startswith("JPCLN") else [] for name in names]
    values = token_values(pl.Series("label", tokens, dtype=pl.List(pl.String)), LABELS, home)
    columns, conflicts = finding_columns(values, LABELS, options.policy)
    people = [PERSON[name[:5]].search(lines.get(name, "")) for name in names]
    frame = pl.DataFrame(
        {
            "image_id": names,
            "patient_id": names,
            "source_relpath": [paths[name] for name in names],
            "age_raw": [person[1] if person else None for person in people],
            "sex": [person[2][0].upper() if person else None for person in people],
            "raw_labels": [json.dumps(lines.get(name, name), ensure_ascii=False) for name in names],
        },
        schema_overrides={"age_raw": pl.String, "sex": pl.String},
    ).with_columns(
        pl.col("sex").replace("?", None),
        study_id=pl.lit("0"),
        age_years=ages(pl.col("age_raw")),
        view_raw=pl.lit("PA"),
        view_source=pl.lit("derived"),
        split_official=pl.lit(""),
        rows=pl.lit(FORMAT.rows),
        cols=pl.lit(FORMAT.cols),
        bits_stored=pl.lit(FORMAT.bits),
        mode=pl.lit(str(FORMAT)),
        release=pl.lit("1998"),
        licence_tag=pl.lit("jsrt-registration"),
        label_source=pl.lit("jsrt"),
        label_trust=pl.lit("consensus"),
    )
    return SourceRows(
        frame.hstack(columns), LABELS.findings, home, official=False, tables=hashes, notes=tuple(notes), origin="jsrt",
        conflicts=conflicts,
    )  # fmt: skip


def _films(found: Scan, home: Path) -> dict[str, str]:
    """Name without suffix -> path."""
    if found.outside:
        raise PathError(
            f"{home} holds {len(found.outside)} links that leave it (see `find {home} -type l`). "
            "Give the folder that really holds the films."
        )
    paths: dict[str, str] = {}
    for path in found.files:
        folder, _, name = path.rpartition("/")
        match = NAME.fullmatch(name)
        if match is None:
            continue
        stem = match[1].upper()
        if stem in paths:
            folders = sorted({paths[stem].rpartition("/")[0], folder})
            raise ManifestError(f"{home}: a film is there more than once (in {', '.join(folders)}). Keep one copy.")
        paths[stem] = path
    if not paths:
        raise PathError(f"{home} holds no film called JPCLN001.IMG or JPCNN001.IMG.")
    return paths


def _texts(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Name of a film -> its line, and the hashes of the texts; a name may lie in ROOT or one folder below."""
    lines: dict[str, str] = {}
    hashes: dict[str, str] = {}
    for path in sorted([*root.glob("*"), *root.glob("*/*")]):
        prefix = TEXTS.get(path.name.upper())
        if prefix is None or not path.is_file():
            continue
        if path.stat().st_size > LONGEST_TEXT:
            raise ManifestError(f"{path}: {path.stat().st_size} bytes; the text has some thousands.")
        hashes[path.name] = sha256_file(path)
        # Records are not always on lines of their own, so that a record ends where the next film is named.
        parts = re.split(rf"(?i)({prefix}\d{{3}})\.IMG", path.read_bytes().decode("utf-8", "replace"))
        if len(parts) < 3:
            raise ManifestError(f"{path}: names no film such as {prefix}001.IMG.")
        for name, rest in zip(parts[1::2], parts[2::2], strict=True):
            if name.upper() in lines:
                raise ManifestError(f"{path}: a film is listed twice.")
            lines[name.upper()] = " ".join([f"{name}.IMG", *rest.split()])
    return lines, hashes


def _missing(names: list[str], home: Path, options: SourceOptions) -> list[str]:
    if not names:
        return []
    what = f"{len(names)} films that the texts list are not under {home}"
    if options.allow_missing:
        return [f"{what}: left out."]
    raise PathError(f"{what}. Complete them, or leave them out with --allow-missing.")
