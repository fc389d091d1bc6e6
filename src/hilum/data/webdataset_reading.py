"""From tars of images to a manifest whose images are members of them: WebDataset shards of ours and of other tools.

A sample is the members with the same name up to the first dot of its last part: one image (jpg, jpeg, png, dcm) and
perhaps `json`, `cls` or `txt`, of which only the `json` is read (webdataset_json.py). Nothing is extracted. What cannot
be used gets a row with its reason, so that every sample is stored, in quarantine, or a copy of another. Images are
decoded later, by build.py.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Int8

from hilum.core.errors import ImageError, StoreError
from hilum.core.types import UNKNOWN, image_uid
from hilum.data.images import MAX_FILE_BYTES
from hilum.data.intensity import PREPROCESS_ID
from hilum.data.labels import ordered
from hilum.data.rows import check_dataset_name
from hilum.data.schema import Manifest, check_rows, complete, label_column
from hilum.data.tar import End, Member, read_span, scan
from hilum.data.views import view_of
from hilum.data.webdataset import SUMMARY, is_export, listed
from hilum.data.webdataset_json import identity_of, json_of, labels_of

IMAGES = ("jpg", "jpeg", "png", "dcm")
TEXTS = ("json", "cls", "txt")
ROOT_KEY = "tars"


@dataclass(frozen=True)
class Reading:
    """What was found in tars. `samples == len(manifest) + duplicates`."""

    manifest: Manifest
    """A row for each sample, those that are refused too (`member_refused`); and one for the rest of a cut tar."""
    tars: int
    duplicates: int
    """Samples that are there already: the same key, the same bytes of the image, the same JSON."""
    others: int
    """Members that belong to no sample with an image, or are of no kind that is read."""
    unlabelled: int
    """Samples without labels."""
    recipes: tuple[str, ...]
    """Intensity recipes that samples of ours were made with."""

    @property
    def samples(self) -> int:
        """All that was looked at."""
        return len(self.manifest) + self.duplicates


_Sample = tuple[Path, Member, Member | None]
"""A tar, and in it an image and the JSON beside it."""


@dataclass
class _Rows:
    """Rows under way: columns, the labels of each row, and where each uid was first seen."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in _COLUMNS})
    labels: list[bytes] = field(default_factory=list)
    """Of each row, the codes of `findings` as far as they were known then, a byte each: there may be a million rows."""
    findings: dict[str, int] = field(default_factory=dict)
    """Position of each finding, in the order of their first appearance."""
    first: dict[str, _Sample] = field(default_factory=dict)
    duplicates: int = 0
    others: int = 0
    unlabelled: int = 0
    ours: bool = True
    recipes: set[str] = field(default_factory=set)
    leaks: set[str] = field(default_factory=set)

    def add(self, row: Mapping[str, Any], labels: Mapping[str, int]) -> None:
        for name, values in self.columns.items():
            values.append(row[name])
        for name in labels:
            self.findings.setdefault(name, len(self.findings))
        self.labels.append(np.array([labels.get(name, UNKNOWN) for name in self.findings], np.int8).tobytes())

    def codes(self) -> Int8[np.ndarray, "N C"]:
        """All labels, columns as `findings`."""
        codes = np.full((len(self.labels), len(self.findings)), UNKNOWN, np.int8)
        for row, known in enumerate(self.labels):
            codes[row, : len(known)] = np.frombuffer(known, np.int8)
        return codes


_COLUMNS: dict[str, Any] = {
    "image_uid": pl.String, "dataset": pl.String, "licence_tag": pl.String, "source_relpath": pl.String,
    "patient_id": pl.String, "study_id": pl.String, "image_id": pl.String, "view": pl.String,
    "view_source": pl.String, "split_project": pl.String, "ssl_ok": pl.Boolean, "member_offset": pl.Int64,
    "member_length": pl.Int64, "member_exact": pl.Boolean, "member_refused": pl.String, "member_picture": pl.String,
}  # fmt: skip


def tars_of(inputs: Sequence[Path]) -> list[Path]:
    """The tars that are meant: files as they are, folders for the tars in them; sorted, each once.

    Raises:
        StoreError: none there, not there, or an export that lacks a tar.
    """
    found: set[Path] = set()
    for path in inputs:
        if path.is_dir():
            names = [tar.name for tar in listed(path)] if is_export(path) else []
            absent = [name for name in names if not (path / name).is_file()]
            if absent:
                raise StoreError(f"{path}: {absent[0]} is missing (and {len(absent) - 1} more of {SUMMARY}).")
            found |= {file.resolve() for file in path.glob("*.tar")}
        elif path.is_file():
            found.add(path.resolve())
        else:
            raise StoreError(f"{path}: no such file or folder.")
    if not found:
        raise StoreError(f"{inputs[0]}: expected a store, tars, or a folder with *.tar files; found none of them.")
    return sorted(found)


def read_tars(tars: Sequence[Path], dataset: str, split: str, licence: str = "") -> Reading:
    """Find every sample.

    Args:
        tars: absolute paths, as `tars_of` gives them.
        dataset: of samples that do not name theirs.
        split: of samples that do not name theirs: train, val, test or "".
        licence: tag of samples that do not name theirs.

    Raises:
        StoreError: a file is no tar at all.
        ManifestError: what the samples say does not fit together (a patient in two splits, ...).
    """
    check_dataset_name(dataset)
    rows = _Rows()
    root = Path(os.path.commonpath([tar.parent for tar in tars]))
    for tar in tars:
        _read_tar(tar, tar.relative_to(root).as_posix(), (dataset, split, licence), rows)
    frame = pl.DataFrame(rows.columns, schema=_COLUMNS)
    leak = "; ".join(sorted(rows.leaks))
    evaluated = pl.col("split_project").is_in(["val", "test"]).any().over("dataset", "patient_id")
    evaluated &= pl.lit(not leak)  # as whoever accepted it has marked the images
    frame = frame.with_columns(
        source_root_key=pl.lit(ROOT_KEY),
        view=view_of(pl.col("view")),
        ssl_ok=pl.col("ssl_ok") & ~evaluated,
        ssl_reason=pl.when(evaluated).then(pl.lit("excluded: patient in val or test")).otherwise(pl.lit("as imported")),
    )
    findings, codes = tuple(rows.findings) if rows.ours else ordered(rows.findings), rows.codes()
    frame = frame.with_columns(
        pl.Series(label_column(name), codes[:, rows.findings[name]], dtype=pl.Int8) for name in findings
    )
    frame = complete(frame, findings)
    check_rows(frame, "the tars", leak)
    metadata = {"roots": json.dumps({ROOT_KEY: str(root)}, ensure_ascii=False)}
    metadata |= {"accepted_leak": leak} if leak else {}
    return Reading(
        Manifest(frame, findings, metadata),
        tars=len(tars),
        duplicates=rows.duplicates,
        others=rows.others,
        unlabelled=rows.unlabelled,
        recipes=tuple(sorted(rows.recipes)),
    )


def _read_tar(path: Path, relative: str, defaults: tuple[str, str, str], rows: _Rows) -> None:
    groups, end = _grouped(path, rows)
    if end.offset == 0 and end.fault:
        raise StoreError(
            f"{path} is not a tar, or an empty one. Compressed tars are not read, because a sample in them cannot be "
            "reached by itself: unpack them with gunzip first."
        )
    for key, members in groups:
        row = _blank(defaults, relative, members[0], str(members[0].offset))
        labels: Mapping[str, int] = {}
        try:
            image = _image_of(members)
            row |= {"member_offset": image.offset, "member_length": image.length}
            text = next((member for member in members if _split(member.name)[1] == "json"), None)
            said = json_of(path, text)
            labels = labels_of(said)
            identity = identity_of(said, key, defaults)
            if identity["member_exact"]:
                rows.recipes.add(said.get("preprocess_id", PREPROCESS_ID))
                rows.leaks |= {said["accepted_leak"]} if said.get("accepted_leak") else set()
            sample = (path, image, text)
            first = rows.first.setdefault(identity["image_uid"], sample)
            if first is not sample and _same(first, sample):
                rows.duplicates += 1
                continue
            if first is not sample:
                raise ImageError("duplicate_key", "another image has the same key.")
            row |= identity
            rows.ours &= bool(row["member_exact"])
            rows.unlabelled += not labels
        except ImageError as error:
            row["member_refused"], labels = error.reason, {}
        rows.add(row, labels)
    if end.fault:
        rest = Member("", end.offset, 0)
        rows.add(_blank(defaults, relative, rest, "end") | {"member_refused": end.fault}, {})


def _grouped(path: Path, rows: _Rows) -> tuple[Iterator[tuple[str, list[Member]]], End]:
    """The samples of a tar by key, in order of their first member. A key with a second image is a second sample.

    Where the tar was cut, nobody can say whether the last sample before the cut had more members (its labels, perhaps):
    it is refused with the rest.
    """
    groups: list[tuple[str, list[Member]]] = []
    last: list[Member] = []
    latest: dict[str, list[Member]] = {}
    end = End(0, "tar_truncated")
    for member in scan(path):
        if isinstance(member, End):
            end = member
            break
        key, extension = _split(member.name)
        if extension not in IMAGES + TEXTS:
            rows.others += 1
            continue
        if key not in latest or extension in {_split(other.name)[1] for other in latest[key]}:
            latest[key] = []
            groups.append((key, latest[key]))
        latest[key].append(member)
        last = latest[key]
    if end.fault and last:
        last.append(Member("", end.offset, 0, end.fault))
    kept = []
    for key, members in groups:
        if {_split(member.name)[1] for member in members} <= {"txt", ""}:  # a README, not a sample
            rows.others += len(members)
        else:
            kept.append((key, members))
    return iter(kept), end


def _split(name: str) -> tuple[str, str]:
    """Key and extension: the name up to the first dot of its last part, and what is behind that dot."""
    folder, _, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _blank(defaults: tuple[str, str, str], relative: str, member: Member, name: str) -> dict[str, Any]:
    """The row of a sample that is refused: an identity of its own, that no other sample can have."""
    dataset, _, licence = defaults
    place = f"{relative}@{name}"
    uid = image_uid(dataset, f"refused:{place}")
    return {
        "image_uid": uid,
        "dataset": dataset,
        "licence_tag": licence,
        "source_relpath": relative,
        "patient_id": f"{dataset}/refused:{place}",
        "study_id": f"{dataset}/refused:{place}",
        "image_id": f"refused:{place}",
        "view": "",
        "view_source": "unknown",
        "split_project": "",
        "ssl_ok": False,
        "member_offset": member.offset,
        "member_length": member.length,
        "member_exact": False,
        "member_refused": "",
        "member_picture": uid,
    }


def _image_of(members: Sequence[Member]) -> Member:
    faults = [member.fault for member in members if member.fault]
    if faults:
        raise ImageError(faults[0], "a member cannot be used.")
    images = [member for member in members if _split(member.name)[1] in IMAGES]
    if not images:
        raise ImageError("no_image", "a sample without an image.")
    if len(images) > 1:
        raise ImageError("several_images", "a sample with more than one image.")
    if images[0].length > MAX_FILE_BYTES:
        raise ImageError("too_large", f"at most {MAX_FILE_BYTES} bytes are read.")
    return images[0]


def _same(first: _Sample, second: _Sample) -> bool:
    """Whether two samples have the same bytes. One picture with two sets of labels is a conflict, not a copy."""
    return len({_digests(sample) for sample in (first, second)}) == 1


def _digests(sample: _Sample) -> tuple[bytes, ...]:
    path, image, text = sample
    members = [image] if text is None else [image, text]
    return tuple(hashlib.sha256(read_span(path, member.offset, member.length)).digest() for member in members)
