"""What a sample of a WebDataset tar says of itself in its `json`: labels, and whose image it is.

Of JSON that other tools write only `labels` (finding -> 1, 0, null or "uncertain"), `dataset`, `licence`, `patient_id`,
`study_id`, `image_id`, `view` and `split` are read. Whatever is wrong is an `ImageError`, reason damaged_labels.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hilum.core.errors import ImageError, ManifestError
from hilum.core.types import SPLIT_NAMES, SPLITS, image_uid
from hilum.data.labels import canonical
from hilum.data.rows import check_dataset_name
from hilum.data.tar import Member, read_span
from hilum.data.webdataset import FORMAT, VALUES

MAX_JSON_BYTES = 2**20
TEXTS = (
    "dataset", "licence", "uid", "image_id", "patient_id", "study_id", "view", "split", "preprocess_id", "view_source",
    "picture", "accepted_leak",
)  # fmt: skip
_CODES = {value: code for code, value in VALUES.items()}
_UID = re.compile(r"[0-9a-f]{16}")


def json_of(path: Path, text: Member | None) -> dict[str, Any]:
    """What the sample says of itself; empty where it says nothing.

    A sample whose JSON is damaged is refused whole: an image with the wrong labels, or without those that it had, is
    worse than none.
    """
    if text is None:
        return {}
    if text.length > MAX_JSON_BYTES:
        raise ImageError("damaged_labels", f"a JSON of more than {MAX_JSON_BYTES} bytes.")
    try:
        content = read_span(path, text.offset, text.length).decode()
        said = json.loads(content, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ImageError("damaged_labels", "not valid JSON.") from error
    if not isinstance(said, dict):
        raise ImageError("damaged_labels", "expected a JSON object.")
    return said


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def labels_of(said: Mapping[str, Any]) -> dict[str, int]:
    """The codes of the labels that a sample states, by finding.

    Raises:
        ImageError: a value that is none of 1, 0, null and "uncertain"; a finding twice.
    """
    stated = said.get("labels", {})
    if not isinstance(stated, dict):
        raise ImageError("damaged_labels", "expected labels as finding: value.")
    exact = said.get("format") == FORMAT
    labels = {}
    for name, value in stated.items():
        if isinstance(value, list | dict) or value not in _CODES:
            raise ImageError("damaged_labels", "expected 1, 0, null or 'uncertain'.")
        labels[name if exact else canonical(name)] = _CODES[value]
    if len(labels) != len(stated):
        raise ImageError("damaged_labels", "two labels are the same finding.")
    return labels


def identity_of(said: Mapping[str, Any], key: str, defaults: tuple[str, str, str]) -> dict[str, Any]:
    """Whose image it is. What an export of ours says is taken as it is; ids of others get their dataset in front.

    Args:
        said: the sample's JSON.
        key: the sample's name in its tar.
        defaults: dataset, split and licence tag of samples that do not name theirs.

    Raises:
        ImageError: something that is no text, no split, no uid, no name of a dataset.
    """
    for name in TEXTS:
        if not isinstance(said.get(name, ""), str):
            raise ImageError("damaged_labels", f"{name}: expected text.")
    dataset, split, licence = (said.get(name) or default for name, default in zip(
        ("dataset", "split", "licence"), defaults, strict=True))  # fmt: skip
    ours = said.get("format") == FORMAT
    if ours:
        split = said.get("split", "")
    split = SPLIT_NAMES.get(split.strip().lower(), split)
    uid = said.get("uid", "") if ours else image_uid(dataset, key)
    image_id = said.get("image_id") or (uid if ours else key)
    stated = [said.get(name, "") for name in ("patient_id", "study_id")]
    patient, study = ((name if ours else name.strip()) or image_id for name in stated)
    prefix = "" if ours and said.get("patient_id") else f"{dataset}/"
    picture = said.get("picture", uid) if ours else uid
    named = _UID.fullmatch(uid) and _UID.fullmatch(picture)
    if split not in SPLITS or not named or not isinstance(said.get("ssl_ok", True), bool):
        raise ImageError("damaged_labels", "a split or a uid that is none.")
    try:
        check_dataset_name(dataset)
    except ManifestError as error:
        raise ImageError("damaged_labels", "a dataset that cannot be one.") from error
    return {
        "image_uid": uid,
        "dataset": dataset,
        "licence_tag": licence,
        "patient_id": prefix + patient,
        "study_id": prefix + study,
        "image_id": image_id,
        "view": said.get("view", ""),
        "view_source": said.get("view_source") or ("stated" if said.get("view") and not ours else "unknown"),
        "split_project": split,
        "ssl_ok": said.get("ssl_ok", True),
        "member_exact": ours,
        "member_picture": picture,
    }
