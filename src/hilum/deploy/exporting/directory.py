"""A MODEL or an ensemble as an EXPORT directory: its own files without the weights, and a graph for each network.

Written beside its place and renamed, after every graph has been held against the predictor. How studies, ensembles and
calibration are put together stays in the copied `config.json`, so the export has the identity of its model.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

import hilum
from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.files import flush_to_disk, sha256_file, write_json, write_text
from hilum.core.types import RESEARCH_NOTICE
from hilum.deploy import model_files as files
from hilum.deploy.engines import EXPORT_FORMAT, EXPORT_NAME, OPENERS, GraphNetwork, read_export
from hilum.deploy.exporting.comparing import difference, fixtures, read_in_batches, refuse_if_different
from hilum.deploy.exporting.formats import FORMATS
from hilum.deploy.exporting.huggingface import write_backbone
from hilum.deploy.network import Network
from hilum.deploy.predictor import load, member_folders

HUGGINGFACE = "huggingface"
NAMES = (*FORMATS, HUGGINGFACE)


def export_model(
    path: Path | str, form: str, out: Path | str, done: Callable[[int], None] = lambda count: None
) -> dict[str, Any]:
    """Write an EXPORT directory.

    Args:
        path: a MODEL, or an ensemble, whose members are exported one by one.
        form: one of `NAMES`.
        out: a new directory.
        done: told after each network.

    Returns:
        what `export.json` holds: among it, for each network, how far it is from the predictor.

    Raises:
        UnknownNameError: no such format.
        ConfigError: `out` is taken, a package is missing, a head that looks at whole studies, or a backbone that the
            other project has no form for.
        CheckpointError: a model that cannot be read, or an export that says something else than the predictor.
    """
    path, out = Path(path), Path(out)
    if form not in NAMES:
        raise UnknownNameError("format", form, NAMES)
    if out.exists():
        raise ConfigError(f"{out} is there already. Choose another folder, or move this one away.")
    folders, networks = _networks(path)
    if form != HUGGINGFACE:
        _refuse_studies(folders, networks)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        whole = temporary / "export"
        whole.mkdir()
        content = _write(path, folders, networks, form, whole, done)
        whole.rename(out)
        flush_to_disk(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return content


def _networks(path: Path) -> tuple[list[Path], list[Network]]:
    content = files.read_config(path)
    if read_export(path) is not None:
        raise ConfigError(f"{path} is an export already; export its MODEL.")
    folders = [path] if content["format"] == files.MODEL_FORMAT else member_folders(path, content)
    networks = []
    for network in load(path, "cpu").networks:
        assert isinstance(network, Network)
        network.config = replace(network.config, precision="fp32")  # what graphs are made of
        networks.append(network)
    return folders, networks


def _refuse_studies(folders: list[Path], networks: list[Network]) -> None:
    for folder, network in zip(folders, networks, strict=True):
        if network.needs_studies:
            raise ConfigError(
                f"{folder}: its head reads all images of a study together, and a graph takes images one by one; only "
                "its backbone can be exported (--format huggingface). Predict with the MODEL."
            )


def _write(
    path: Path, folders: list[Path], networks: list[Network], form: str, out: Path, done: Callable[[int], None]
) -> dict[str, Any]:
    several = files.read_config(path)["format"] != files.MODEL_FORMAT
    if form != HUGGINGFACE:
        _copy(path, out)
    described = []
    for number, (folder, network) in enumerate(zip(folders, networks, strict=True), 1):
        name = f"member_{number}" if several else "."
        place = out / name
        place.mkdir(exist_ok=True)
        if several and form != HUGGINGFACE:
            _copy(folder, place)
        facts = write_backbone(network, place) if form == HUGGINGFACE else _write_graph(network, form, place, folder)
        described.append({"folder": name, "model": files.digest_of(folder), **facts})
        done(number)
    content = {
        "format": EXPORT_FORMAT,
        "hilum": hilum.__version__,
        "notice": RESEARCH_NOTICE,
        "export": form,
        "model": files.digest_of(path),
        "networks": described,
    }
    card = out / files.CARD_NAME
    card.touch()
    write_text(card, (card.read_text(encoding="utf-8") + "\n" + export_card(content)).lstrip("\n"))
    write_json(out / EXPORT_NAME, content)
    return content


def _copy(source: Path, target: Path) -> None:
    """All files of a model but its weights."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name != files.WEIGHTS_NAME and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)


def _write_graph(network: Network, form: str, folder: Path, source: Path) -> dict[str, Any]:
    before = {file.name for file in folder.iterdir()}
    written = FORMATS[form](network, folder, {"hilum.model": files.digest_of(source), "hilum.notice": RESEARCH_NOTICE})
    engine = GraphNetwork(network.config, written.reopen(folder / written.graph))
    pictures = fixtures(network.config.resolution)
    expected = read_in_batches(lambda part: network.read(torch.from_numpy(part), attention=True), pictures)
    found = read_in_batches(lambda part: engine.read(torch.from_numpy(part), attention=True), pictures)
    apart = difference(expected, found)
    refuse_if_different(apart, f"{source} as {form}")
    made = sorted({file.name for file in folder.iterdir()} - before)
    return {
        "graph": written.graph,
        "files": {name: sha256_file(folder / name) for name in made},
        "versions": written.facts,
        "difference": apart.describe(),
    }


def export_card(content: Mapping[str, Any]) -> str:
    """The section of README.md about an export."""
    lines = [
        f"## Export: {content['export']}",
        "",
        *([] if content["export"] != HUGGINGFACE else [RESEARCH_NOTICE, ""]),
        f"Made by Hilum {content['hilum']} from the model with identity {content['model']}. {_USE[content['export']]}",
        "",
        "Held against the predictor before it was written, on 32 pictures made for it:",
        "",
        "| folder | probabilities, largest difference | maps, largest share elsewhere | embeddings, smallest cosine |",
        "|---|---|---|---|",
        *(_row(one) for one in content["networks"]),
        "",
    ]
    return "\n".join(lines)


def _row(network: Mapping[str, Any]) -> str:
    apart = network["difference"]
    cells = (
        apart["probabilities"]["largest_difference"] if "probabilities" in apart else None,
        apart["maps"]["largest_share_elsewhere"] if "maps" in apart else None,
    )
    shown = " | ".join("not part of it" if cell is None else f"{cell:.2g}" for cell in cells)
    return f"| {network['folder']} | {shown} | {apart['embeddings']['smallest_cosine']:.8f} |"


_USE = {
    **{engine: f"`hilum predict THIS_FOLDER ... --engine {engine}` applies studies, composition and calibrators; the "
       "graph alone gives raw probabilities of single images." for engine in OPENERS},
    "torch-export": "`torch.export.load` reads `model.pt2`; the graph gives raw probabilities of single images.",
    HUGGINGFACE: "The backbone alone: `transformers.AutoModel.from_pretrained(FOLDER)`, or "
    '`timm.create_model("local-dir:FOLDER/timm", pretrained=True)`.',
}  # fmt: skip
