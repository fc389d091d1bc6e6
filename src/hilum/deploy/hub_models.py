"""Models and ensembles on the Hugging Face Hub: what is sent, and how it is taken back, digest by digest.

A repository has a `hilum.json` that names every file with its SHA-256, and the folder to load. The relative places of
an ensemble's members are kept, so a model has the same identity there as here. What names patients or images
(validation predictions and labels, which prediction does not need) stays at home unless it is asked for.
`backbones/hub.py` is what touches the network.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from hilum.backbones import hub
from hilum.core.errors import CheckpointError, ConfigError
from hilum.core.files import json_text, read_json, sha256_file
from hilum.deploy import model_files as files
from hilum.deploy.card import FRONT_MATTER
from hilum.deploy.checklist import CHECKLIST_NAME
from hilum.deploy.engines import EXPORT_NAME
from hilum.deploy.ensemble_model import RANKS_NAME
from hilum.deploy.predictor import Model, load, member_folders
from hilum.deploy.screening import SCREENING_NAME

INDEX_NAME, INDEX_FORMAT = "hilum.json", "hilum-hub-1"
SENT = (
    files.CONFIG_NAME, files.WEIGHTS_NAME, files.EXPOSURE_NAME, files.CARD_NAME, CHECKLIST_NAME, files.SEARCH_NAME,
    RANKS_NAME, SCREENING_NAME,
)  # fmt: skip
"""What a MODEL or an ensemble needs for prediction, and what describes it; `exposure.npz` holds hashes of image ids."""
WITH_CASES = (files.LOGITS_NAME, files.LABELS_NAME)
"""Validation predictions and labels by image, study and patient: for `combine`, `extend` and intervals."""
_EXTENSION = re.compile(r"extension_\d+_")
_PLACE = re.compile(r"[\w][\w .+-]*")


def push_model(
    model: Model,
    repository: str,
    *,
    private: bool = True,
    with_cases: bool = False,
    message: str = "A Hilum model",
) -> str:
    """Send a model to the Hub (the account is `huggingface_hub`'s own: `hf auth login`, or HF_TOKEN).

    Args:
        model: loaded from a MODEL or an ensemble directory.
        repository: owner/name; made if it is not there.
        private: whether a new repository is.
        with_cases: also validation predictions and labels, which name images, studies and patients. Look at the terms
            of the data first: most do not allow it.
        message: of the commit.

    Returns:
        the address of the commit.

    Raises:
        ConfigError: an export, a model that was not loaded from a folder, a name that is none, or a missing extra.
        CheckpointError: a file that is missing; or the Hub refuses.
    """
    folder = model.folder
    if folder is None:
        raise ConfigError("Only a model that was loaded from a folder can be sent.")
    if (folder / EXPORT_NAME).is_file():
        raise ConfigError(f"{folder} is an export; send its MODEL, which anybody can export.")
    chosen, start = _chosen(folder, with_cases)
    chosen.pop(files.CARD_NAME, None)  # the page of the repository, which people edit there
    index = {
        "format": INDEX_FORMAT,
        "model": files.digest_of(folder),
        "folder": start,
        "files": {place: sha256_file(file) for place, file in chosen.items()},
    }
    with TemporaryDirectory() as temporary:
        card = Path(temporary) / files.CARD_NAME
        own = folder / files.CARD_NAME
        text = own.read_text(encoding="utf-8") if own.is_file() else ""
        front = "" if text.startswith("---\n") else f"{FRONT_MATTER}\n"  # an older card, or none
        card.write_text(front + text, encoding="utf-8")
        content: dict[str, Path | bytes] = {**chosen, files.CARD_NAME: card, INDEX_NAME: json_text(index).encode()}
        return hub.publish(repository, content, private, message)


def _chosen(folder: Path, with_cases: bool) -> tuple[dict[str, Path], str]:
    """Place in the repository -> file here, and the place of the folder to load."""
    content = files.read_config(folder)
    folders = [folder.resolve()]
    if content["format"] == files.ENSEMBLE_FORMAT:
        absolute = [member["path"] for member in content["members"] if Path(member["path"]).is_absolute()]
        if absolute:
            raise ConfigError(f"{folder} names its member {absolute[0]} by an absolute path; combine them again.")
        folders += [one.resolve() for one in member_folders(folder, content)]
    root = folders[0]
    while not all(one.is_relative_to(root) for one in folders):
        root = root.parent
    wanted = {*SENT, *(WITH_CASES if with_cases else ())}
    chosen = {
        file.relative_to(root).as_posix(): file
        for one in folders
        for file in sorted(one.iterdir())
        if file.is_file() and _EXTENSION.sub("", file.name) in wanted
    }
    for place in chosen:
        _check_place(place, folder)
    return chosen, folders[0].relative_to(root).as_posix()


def from_pretrained(
    name: Path | str,
    *,
    revision: str | None = None,
    device: str = "auto",
    engine: str | None = None,
    precision: str | None = None,
) -> Model:
    """A model or an ensemble from a folder, or from the Hub, of which only the files that `hilum.json` names are taken.

    With HF_HUB_OFFLINE=1 only what was downloaded before is read.

    Args:
        name: a MODEL, ensemble or EXPORT directory; or owner/name, or owner/name@revision, on the Hub.
        revision: branch, tag or commit; in place of @revision.
        device: as `hilum.load`.
        engine: as `hilum.load`.
        precision: as `hilum.load`.

    Raises:
        CheckpointError: neither a folder nor a model that can be had, or a file that is not the one it was sent as.
        ConfigError: as `hilum.load`.
    """
    if Path(name).exists():
        return load(name, device, engine, precision)
    repository, stated = hub.parse_name(str(name))
    folder = _download(repository, revision or stated)
    return load(folder, device, engine, precision)


def _download(repository: str, revision: str | None) -> Path:
    place = hub.fetch(repository, revision, [INDEX_NAME])
    if not (place / INDEX_NAME).is_file():
        raise CheckpointError(
            f"{repository} on the Hugging Face Hub holds no {INDEX_NAME}: no model that Hilum sent there. For a "
            "backbone alone: hilum.load_backbone."
        )
    index = _read_index(place / INDEX_NAME, repository)
    named: dict[str, str] = index["files"]
    folder = hub.fetch(repository, revision, [INDEX_NAME, *named])
    for one, digest in named.items():
        file = folder / one
        if not file.is_file() or sha256_file(file) != digest:
            raise CheckpointError(
                f"{repository}: {one} is missing or not the file that {INDEX_NAME} names (its SHA-256 differs). "
                "Download it again; if it stays so, do not use it."
            )
    found = folder / str(index["folder"])
    if files.digest_of(found) != index["model"]:
        raise CheckpointError(f"{repository}: {found.name} is not the model that {INDEX_NAME} names.")
    _check_members(found, folder, named, repository)
    return found


def _check_members(found: Path, root: Path, named: Mapping[str, str], repository: str) -> None:
    """An ensemble from elsewhere names members that came with it, and no folder of this machine."""
    for member in files.read_config(found).get("members", []):
        place = os.path.relpath(os.path.normpath(found / str(member["path"])), root)
        if f"{Path(place).as_posix()}/{files.CONFIG_NAME}".removeprefix("./") not in named:
            raise CheckpointError(f"{repository}: its member {member['path']!r} is not among the files that it names.")


def _read_index(path: Path, repository: str) -> dict[str, Any]:
    index = read_json(path, CheckpointError)
    if not isinstance(index, dict) or index.get("format") != INDEX_FORMAT or not isinstance(index.get("files"), dict):
        raise CheckpointError(f"{repository}: {INDEX_NAME} is not of format {INDEX_FORMAT!r}.")
    for place in index["files"]:
        _check_place(str(place), repository)
    folder = str(index.get("folder", "."))
    if folder != ".":
        _check_parts(PurePosixPath(folder).parts, folder, repository)
    if "model" not in index or f"{folder}/{files.CONFIG_NAME}".removeprefix("./") not in index["files"]:
        raise CheckpointError(f"{repository}: {INDEX_NAME} names no model in {folder!r}.")
    return index


def _check_place(place: str, where: Path | str) -> None:
    """Only files of a model, and only inside the folder.

    Raises:
        CheckpointError: another file, or a place outside.
    """
    parts = PurePosixPath(place).parts
    _check_parts(parts, place, where)
    if _EXTENSION.sub("", parts[-1]) not in {*SENT, *WITH_CASES}:
        raise CheckpointError(f"{where}: {place!r} is no file of a model.")


def _check_parts(parts: Sequence[str], place: str, where: Path | str) -> None:
    if not parts or any(not _PLACE.fullmatch(part) for part in parts):
        raise CheckpointError(f"{where}: {place!r} is not a place inside a repository.")
