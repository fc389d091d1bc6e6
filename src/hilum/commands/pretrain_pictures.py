"""Pictures of what a pretrained teacher sees, for the page of its run: patch tokens as colours, nearest neighbours.

Of images of the validation split where there are enough, else of training images too, never of the test split.
Datasets, views and labels are named, no identifier is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8

from hilum.backbones.vit import VisionTransformer
from hilum.backbones.weights import load_backbone
from hilum.core.errors import ConfigError, StoreError
from hilum.core.seeding import stream
from hilum.core.types import POSITIVE
from hilum.data.store import Store
from hilum.data.transforms import evaluation_crop, normalise, preprocessing
from hilum.deploy.network import choose_device
from hilum.evaluation.run_report import Neighbour, PatchMap
from hilum.pretraining.config import PretrainConfig

MAPS = 8
"""X-rays shown with their patch colours."""
LARGEST_MAP_SIDE = 512
QUERIES, FOUND = 4, 5
LARGEST_CORPUS, SMALLEST_CORPUS = 500, 50
"""Images among which neighbours are looked for; fewer for large networks on a CPU."""
CPU_OPERATIONS = 2e13
"""What a page may cost there: a few minutes."""
BLACK = 12
"""A patch without a brighter pixel is collimation or padding: no part of the patient."""
_BATCH = 16


class Pictures(NamedTuple):
    """For the page, with the words above them."""

    maps: Sequence[PatchMap] = ()
    maps_note: str = ""
    neighbours: Sequence[tuple[Neighbour, Sequence[Neighbour]]] = ()
    neighbours_note: str = ""
    notes: Sequence[str] = ()


def pictures_of(folder: Path, store: Store, config: PretrainConfig, saved: Mapping[str, Any], device: str) -> Pictures:
    """All pictures of a run.

    Args:
        folder: the run; its backbone is read.
        store: the images.
        config: of the run.
        saved: the entries of the backbone's `config.json`.
        device: auto, cpu or cuda.

    Raises:
        ConfigError: the store was prepared otherwise than what the run was trained on, or there is no such device.
        CheckpointError: the backbone is damaged.
    """
    if saved.get("preprocess_id") != store.preprocess_id:
        raise ConfigError(
            f"{store.path} holds images of preprocessing {store.preprocess_id!r}, the run was trained on "
            f"{saved.get('preprocess_id')!r}. Give the store that the run was trained on."
        )
    backbone = load_backbone(folder).to(choose_device(device))
    patch, side = backbone.config.patch_size, config.crops.global_size
    large = max(side, min(2 * side, LARGEST_MAP_SIDE) // patch * patch)
    chosen, corpus = choose(store, config.seed, MAPS), choose(store, config.seed + 1, _corpus_size(backbone, side))
    maps, shares = _patch_maps(backbone, store, chosen, large)
    rows = _neighbour_rows(backbone, store, corpus, side)
    grid = large // patch
    return Pictures(
        maps,
        f"Each X-ray beside its {grid} x {grid} patch tokens (last block, after the final norm, at {large} pixels). "
        "The first three principal components of all of them together are red, green and blue, so the same colour is "
        f"the same kind of patch in every picture; they hold {shares.sum():.0%} of the variance "
        f"({', '.join(f'{share:.0%}' for share in shares)}). Black borders take no part. Colours that follow anatomy "
        "are a good sign; noise, or one colour, is a bad one.",
        rows,
        f"The five nearest of {len(corpus)} X-rays by the cosine of [CLS], never of the same patient. Labels that both "
        "share are green; blank labels are not negative. The teacher has seen no label.",
        () if len(maps) else ("No pictures: the store has no images outside its test split.",),
    )  # fmt: skip


def _corpus_size(backbone: VisionTransformer, side: int) -> int:
    if backbone.pos_embed.device.type == "cuda":
        return LARGEST_CORPUS
    tokens = (side // backbone.config.patch_size) ** 2
    cost = 2 * tokens * sum(parameter.numel() for parameter in backbone.parameters())  # of one image, without attention
    return min(max(int(CPU_OPERATIONS / cost), SMALLEST_CORPUS), LARGEST_CORPUS)


def choose(store: Store, seed: int, most: int) -> Int[np.ndarray, " n"]:
    """Images to look at: of split val where it has as many as asked for, else of train and of no split too.

    Datasets and views take turns, so that rare ones are seen; the rest is a function of the seed.
    """
    places = store.indices("val")
    if len(places) < most:
        places = np.flatnonzero(store.splits != "test").astype(np.int64)
    shuffled = stream(seed, "report").permutation(places)
    kinds = np.char.add(np.char.add(store.datasets, "\x1f"), store.views)[shuffled]
    turn = np.zeros(len(shuffled), np.int64)  # how many of its kind come before it
    for kind in np.unique(kinds):
        mask = kinds == kind
        turn[mask] = np.arange(mask.sum())
    return shuffled[np.argsort(turn, kind="stable")][:most]


@torch.no_grad()
def _patch_maps(
    backbone: VisionTransformer, store: Store, indices: Int[np.ndarray, " n"], side: int
) -> tuple[list[PatchMap], Float[np.ndarray, " _"]]:
    films, tokens, titles = [], [], []
    recipe = preprocessing(store.preprocess_id)
    for index in indices.tolist():
        film = _film(store, index, side)
        if film is None:
            continue
        batch = torch.from_numpy(film[None, None]).to(backbone.pos_embed.device)
        tokens.append(backbone(normalise(batch, recipe)).patches[0].double().cpu().numpy())  # N D
        films.append(film)
        titles.append(", ".join([_origin(store, index), *_labels(store, index)]))
    if not films:
        return [], np.zeros(3)
    patch = backbone.config.patch_size
    grid = side // patch
    inside = [film.reshape(grid, patch, grid, patch).max(axis=(1, 3)).ravel() >= BLACK for film in films]
    colours, shares = patch_colours(np.stack(tokens), np.stack(inside))
    pictures = colours.reshape(len(films), grid, grid, 3)
    return [PatchMap(*one) for one in zip(titles, films, pictures, strict=True)], shares


def patch_colours(
    tokens: Float[np.ndarray, "n N D"], inside: Bool[np.ndarray, "n N"]
) -> tuple[UInt8[np.ndarray, "n N 3"], Float[np.ndarray, " _"]]:
    """The first three principal components of the patches of all images together, as red, green and blue.

    As in DINOv2 (Oquab 2023, figure 1), with black patches in place of its threshold on the first component.

    Each component runs from its 2nd to its 98th percentile over all patches inside. The sign is that of its third
    moment, so that the picture does not depend on the machine.

    Args:
        tokens: patch tokens.
        inside: patches that take part; the others are black.

    Returns:
        Colours, and the share of the variance in each component.
    """
    taken = tokens[inside] if inside.sum() > 3 else tokens.reshape(-1, tokens.shape[-1])
    centre = taken.mean(axis=0)
    spread, directions = np.linalg.eigh((taken - centre).T @ (taken - centre))
    top = directions[:, ::-1][:, :3]  # D 3
    scores = (tokens - centre) @ top  # n N 3
    of_taken = (taken - centre) @ top
    sign = np.where((of_taken**3).sum(axis=0) < 0, -1.0, 1.0)
    low, high = np.quantile(of_taken * sign, (0.02, 0.98), axis=0)
    scaled = ((scores * sign - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    colours = np.round(255 * (0.08 + 0.92 * scaled)).astype(np.uint8)
    colours[~inside] = 0
    shares = spread[::-1][:3] / max(spread.sum(), 1e-30)
    return colours, shares.clip(0, 1)


@torch.no_grad()
def _neighbour_rows(
    backbone: VisionTransformer, store: Store, corpus: Int[np.ndarray, " n"], side: int
) -> list[tuple[Neighbour, list[Neighbour]]]:
    recipe = preprocessing(store.preprocess_id)
    places: list[int] = []
    features = []
    for start in range(0, len(corpus), _BATCH):
        read = [(index, _film(store, index, side)) for index in corpus[start : start + _BATCH].tolist()]
        films = {index: film for index, film in read if film is not None}
        if films:
            batch = torch.from_numpy(np.stack(list(films.values()))[:, None]).to(backbone.pos_embed.device)
            features.append(backbone(normalise(batch, recipe)).cls.double().cpu().numpy())
            places += list(films)
    if len(places) < 2:
        return []
    cls, found_at = np.concatenate(features), np.array(places)
    unit = cls / np.maximum(np.linalg.norm(cls, axis=1, keepdims=True), 1e-12)
    rows = []
    for query in _queries(store, found_at):
        similarity = unit @ unit[query]
        similarity[store.patients[found_at] == store.patients[found_at[query]]] = -np.inf
        nearest = np.argsort(-similarity, kind="stable")[:FOUND]
        found = [
            _neighbour(store, places[place], side, float(similarity[place]))
            for place in nearest.tolist()
            if np.isfinite(similarity[place])
        ]
        rows.append((_neighbour(store, places[query], side, None), found))
    return rows


def _queries(store: Store, places: Int[np.ndarray, " n"]) -> list[int]:
    """Positions in `places` to ask about: of different patients, findings taking turns, those with labels first."""
    chosen: list[int] = []
    shown: set[str] = set()
    patients: set[str] = set()
    for wanted in (1, 0):  # first those that bring a finding not shown yet
        for place, index in enumerate(places.tolist()):
            labels, patient = set(_labels(store, index)), str(store.patients[index])
            if len(chosen) < QUERIES and patient not in patients and len(labels - shown) >= wanted:
                chosen.append(place)
                shown |= labels
                patients.add(patient)
    return chosen


def _neighbour(store: Store, index: int, side: int, similarity: float | None) -> Neighbour:
    film = _film(store, index, side)
    assert film is not None, "it was read a moment ago"
    return Neighbour(film, _origin(store, index), tuple(_labels(store, index)), similarity)


def _film(store: Store, index: int, side: int) -> UInt8[np.ndarray, "S S"] | None:
    """The centre square of an image, as the backbone sees it; None where its record is damaged."""
    try:
        return evaluation_crop(store.read(index), side)
    except StoreError:
        return None


def _origin(store: Store, index: int) -> str:
    return f"{store.datasets[index]}, {store.views[index]}"


def _labels(store: Store, index: int) -> list[str]:
    return [name for name, code in zip(store.findings, store.labels[index].tolist(), strict=True) if code == POSITIVE]
