"""The two sets of films of the US National Library of Medicine, which have one layout: Shenzhen and Montgomery.

`CXR_png/<PREFIX>_<number>_<0 or 1>.png`, where 1 is tuberculosis, and beside it a short text for each image,
`ClinicalReadings/<the same name>.txt`: sex and age, then what a radiologist saw. There is no table: the files are the
list, and a reading without its image is a missing image. The texts are not searched for findings; only the one that is
the word "normal" counts.
Source: Jaeger et al., Two public chest X-ray datasets, Quantitative Imaging in Medicine and Surgery 2014.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from hilum.core.errors import ManifestError, PathError, UnknownLabelError
from hilum.data.label_cells import finding_columns, token_values
from hilum.data.label_maps import load_map
from hilum.data.rows import Scan, SourceOptions, SourceRows, ages, existing_folder, scan

IMAGES, READINGS = "CXR_png", "ClinicalReadings"
LONGEST_READING = 2**16
"""Bytes; real ones have a few hundred."""


@dataclass(frozen=True)
class Reading:
    """What the text beside an image says: sex and age as written ("" where not found), and the rest."""

    sex: str
    age: str
    text: str


@dataclass(frozen=True)
class FilmSet:
    """One of the sets.

    Args:
        name: of its label table; the label source is `nlm-<name>`.
        prefix: of its file names.
        folder: the name of the folder that its archive unpacks to.
        view: the projection, where its paper says that it is the same for all; else "".
        parse: a reading's lines, stripped and not empty, to what they say.
    """

    name: str
    prefix: str
    folder: str
    view: str
    parse: Callable[[list[str]], Reading]


def read_films(options: SourceOptions, films: FilmSet) -> SourceRows:
    """Read the images' names and the texts beside them.

    Raises:
        PathError: no images, links that leave the folder, or readings without their image.
        ManifestError: a name that is not of the form, or two images of one number.
    """
    root = existing_folder(options.root, f"{films.name}=ROOT holds {IMAGES}/ and {READINGS}/")
    root = root / films.folder if (root / films.folder / IMAGES).is_dir() else root
    home = existing_folder(options.images, f"--images {films.name}=FOLDER") if options.images else root
    found = scan(home, [IMAGES if (home / IMAGES).is_dir() else ""])
    paths = _images(found, films, home)
    readings, hashes = _readings(root / READINGS, films)
    notes = _missing(sorted(set(readings) - set(paths)), home, options)
    absent = len(set(paths) - set(readings))
    notes += [f"{absent} images have no text beside them: sex, age and Normal unknown"] if absent else []
    ids = sorted(paths)
    known = [readings.get(name, Reading("", "", "")) for name in ids]
    labels = load_map(films.name)
    tokens = [_tokens(name, reading) for name, reading in zip(ids, known, strict=True)]
    values = token_values(pl.Series("label", tokens, dtype=pl.List(pl.String)), labels, home)
    columns, conflicts = finding_columns(values, labels, options.policy)
    raw = [
        json.dumps({"name": name[-1], "reading": r.text}, ensure_ascii=False)
        for name, r in zip(ids, known, strict=True)
    ]
    frame = pl.DataFrame(
        {
            "image_id": ids,
            "patient_id": [name[: -len("_0")] for name in ids],
            "source_relpath": [paths[name] for name in ids],
            "sex": [reading.sex or None for reading in known],
            "age_raw": [reading.age or None for reading in known],
            "raw_labels": raw,
        },
        schema_overrides={"sex": pl.String, "age_raw": pl.String},
    ).with_columns(
        study_id=pl.lit("0"),
        age_years=years(pl.col("age_raw")),
        view_raw=pl.lit(films.view),
        view_source=pl.lit("derived" if films.view else "unknown"),
        split_official=pl.lit(""),
        release=pl.lit("2014"),
        licence_tag=pl.lit("nlm-open"),
        label_source=pl.lit(f"nlm-{films.name}"),
        label_trust=pl.lit("physician"),
    )
    return SourceRows(
        frame.hstack(columns),
        labels.findings,
        home,
        official=False,
        tables=hashes,
        notes=tuple(notes),
        origin=films.name,
        conflicts=conflicts,
    )


def years(raw: pl.Expr) -> pl.Expr:
    """Years from "45yrs", "16month", "64days" or "027Y"."""
    unit = raw.str.extract(r"(?i)\d\s*([ymd])", 1).str.to_uppercase().fill_null("Y")
    return ages(raw.str.extract(r"(\d{1,3})", 1) + unit)


def _images(found: Scan, films: FilmSet, home: Path) -> dict[str, str]:
    """Name without suffix -> path, of the images of this set."""
    if found.outside:
        raise PathError(
            f"{home} holds {len(found.outside)} links that leave it (see `find {home} -type l`). "
            "Give the folder that really holds the images."
        )
    form = re.compile(rf"({films.prefix}_\d{{4}}_[01])\.png", re.IGNORECASE)
    paths: dict[str, str] = {}
    for path in found.files:
        name = path.rpartition("/")[2]
        if not name.upper().startswith(films.prefix):
            continue
        match = form.fullmatch(name)
        if match is None:
            raise UnknownLabelError(
                f"{home}: an image is not called {films.prefix}_0001_0.png or ..._1.png, but {name!r}."
            )
        stem = match[1].upper()
        if stem in paths:
            folders = sorted({paths[stem].rpartition("/")[0], path.rpartition("/")[0]})
            raise ManifestError(f"{home}: an image is there more than once (in {', '.join(folders)}). Keep one copy.")
        paths[stem] = path
    if not paths:
        raise PathError(f"{home} holds no image called {films.prefix}_0001_0.png. Say where they are with --images.")
    numbers = [stem[:-2] for stem in paths]
    twice = len(numbers) - len(set(numbers))
    if twice:
        raise ManifestError(f"{home}: {twice} numbers are there both as _0 and as _1. Which one is right?")
    return paths


def _readings(folder: Path, films: FilmSet) -> tuple[dict[str, Reading], dict[str, str]]:
    """Name -> reading, and one hash over all texts."""
    readings, digest = {}, hashlib.sha256()
    for path in sorted(folder.glob(f"{films.prefix}_*.txt")) if folder.is_dir() else []:
        if path.stat().st_size > LONGEST_READING:
            raise ManifestError(f"{folder}: a text of {path.stat().st_size} bytes; a reading has a few hundred.")
        content = path.read_bytes()
        lines = content.decode("utf-8", "replace").lstrip("\ufeff").splitlines()
        readings[path.stem.upper()] = films.parse([line.strip() for line in lines if line.strip()])
        digest.update(path.name.encode() + content)
    return readings, {READINGS: digest.hexdigest()} if readings else {}


def _missing(names: list[str], home: Path, options: SourceOptions) -> list[str]:
    if not names:
        return []
    what = f"{len(names)} of the texts in {READINGS} have no image under {home}"
    if options.allow_missing:
        return [f"{what}: left out."]
    raise PathError(f"{what}. Complete them, or leave them out with --allow-missing.")


def _tokens(name: str, reading: Reading) -> list[str]:
    """The labels of `facts/labels/<set>.csv` that hold."""
    tokens = ["1"] if name.endswith("_1") else []
    return [*tokens, "normal"] if reading.text.casefold().rstrip(".") == "normal" else tokens
