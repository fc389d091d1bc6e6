"""`hilum inspect`: a pretraining run, finished or not, as one page: RUN/report.html.

`hilum pretrain` writes it at the end; this program writes it again from what is in the folder. Curves and alarms come
from `metrics.jsonl`. Pictures need the store: patch tokens of the teacher as colours (three principal components, as in
DINOv2, Oquab 2023, figure 1) and nearest neighbours by [CLS]. They are of images of the validation split where there
are enough, else of training images, never of the test split; a page names datasets, views and labels, no identifier.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import CONFIG_NAME as BACKBONE_CONFIG
from hilum.backbones.weights import WEIGHTS_NAME, load_backbone
from hilum.core.config import read_yaml
from hilum.core.errors import CheckpointError, ConfigError, StoreError
from hilum.core.files import read_json, write_text
from hilum.core.seeding import stream
from hilum.core.tracking import duration, next_step, read_history, say
from hilum.core.types import POSITIVE
from hilum.data.store import Store
from hilum.data.transforms import evaluation_crop, normalise, preprocessing
from hilum.deploy.network import choose_device
from hilum.evaluation.markup import count, decimal, finite, signed
from hilum.evaluation.run_report import Neighbour, PatchMap, RunAlarm, RunPage, render_run
from hilum.pretraining.alarms import Alarm, alarms, initial_losses
from hilum.pretraining.config import PretrainConfig

REPORT_NAME, CONFIG_NAME, METRICS_NAME = "report.html", "config.yaml", "metrics.jsonl"
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
_RECENT_LINES = 20
_BATCH = 16


def run(folder: Path, data: Path | None = None, device: str = "auto") -> Path:
    """Write RUN/report.html, and say where it is.

    Args:
        folder: a run of `hilum pretrain`.
        data: its store, for the pictures.
        device: where the pictures are computed.

    Raises:
        ConfigError: not a run.
        StoreError: not a store.
        CheckpointError: the backbone is damaged.
    """
    path = write_report(Path(folder), Store.open(data) if data is not None else None, device)
    say(f"Report: {path}")
    if data is None:
        next_step(f"hilum inspect {folder} --data STORE   (with pictures)")
    return path


def write_report(folder: Path, store: Store | None, device: str = "auto") -> Path:
    """Write `report.html` of a run from what its folder holds. The same run gives the same bytes.

    Args:
        folder: the run.
        store: for the pictures; None leaves them out, with a sentence.
        device: where the pictures are computed: auto, cpu or cuda.

    Returns:
        The file.

    Raises:
        ConfigError: not a run, or the store was prepared otherwise than what the run was trained on.
        CheckpointError: the backbone is damaged.
    """
    if not (folder / CONFIG_NAME).exists():
        raise ConfigError(f"{folder} is not a run of hilum pretrain: it has no {CONFIG_NAME}.")
    config = read_yaml(PretrainConfig, folder / CONFIG_NAME)
    history = read_history(folder / METRICS_NAME)
    saved = read_json(folder / BACKBONE_CONFIG, CheckpointError) if (folder / BACKBONE_CONFIG).exists() else {}
    notes, pictures = [], _Pictures()
    if store is None:
        notes.append("No pictures: the page was written without the store. `hilum inspect RUN --data STORE` adds them.")
    elif not (folder / WEIGHTS_NAME).exists():
        notes.append("No pictures yet: the run has not saved a backbone.")
    else:
        pictures = _pictures(folder, store, config, saved, device)
        notes += pictures.notes
    page = RunPage(
        title=f"Pretraining: {folder.resolve().name}",
        facts=_facts(config, saved, history),
        figures=_figures(config, history),
        history=history,
        alarms=past_alarms(history, config),
        initial=initial_losses(config),
        clip=config.clip,
        maps=pictures.maps,
        maps_note=pictures.maps_note,
        neighbours=pictures.neighbours,
        neighbours_note=pictures.neighbours_note,
        notes=notes,
        provenance=_provenance(folder, saved),
    )
    write_text(folder / REPORT_NAME, render_run(page))
    return folder / REPORT_NAME


def past_alarms(history: Sequence[Mapping[str, Any]], config: PretrainConfig) -> list[RunAlarm]:
    """Every alarm of a run with the steps of its last spell, standing ones first, then the latest.

    Which line had which comes from its column `alarms`; the newest line is judged again, since a run that was killed
    may not have had the time.
    """
    spells: dict[str, tuple[int, int]] = {}  # positions of the first and last line of the newest spell
    for place, line in enumerate(history):
        for name in line.get("alarms", ()):
            first, last = spells.get(name, (place, -1))
            spells[name] = (first if last == place - 1 else place, place)
    standing = {alarm.name: alarm for alarm in alarms(history, config)}
    for name in standing:
        spells.setdefault(name, (len(history) - 1, len(history) - 1))
    rows = []
    for name, (first, last) in spells.items():
        alarm = standing.get(name) or _again(history[: first + 1], config, name)
        if alarm is None:  # a name that this version does not know
            alarm = Alarm(name, name.replace("_", " "), "said by the run itself", "see docs/reference/run.md")
        steps = (int(history[first]["step"]), int(history[last]["step"]))
        rows.append(RunAlarm(name, alarm.what, alarm.evidence, alarm.try_, *steps, standing=name in standing))
    return sorted(rows, key=lambda row: (not row.standing, -row.last, row.name))


def _again(history: Sequence[Mapping[str, Any]], config: PretrainConfig, name: str) -> Alarm | None:
    return next((alarm for alarm in alarms(history, config) if alarm.name == name), None)


def _facts(config: PretrainConfig, saved: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    vit = ViTConfig(**saved["architecture"]) if "architecture" in saved else config.vit()
    done = int(history[-1]["step"]) if history else int(saved.get("step", 0))
    rate = _rate(history)
    facts = {
        "Network": f"{config.architecture}: {vit.depth} blocks of {vit.embed_dim}, patch {vit.patch_size}",
        "Resolution": f"{config.crops.global_size} px, {config.crops.local_crops} local crops of "
        f"{config.crops.local_size} px",
        "Objective": f"DINOv2, {count(config.heads.prototypes)} prototypes",
        "Images a step": count(config.batch_size),
    }
    if "seen" in saved:
        facts["Images seen"] = f"{count(saved['seen']['images'])} different ones"
    if "hardware" in saved:
        facts["Hardware"] = str(saved["hardware"])
    facts["Steps"] = f"{count(done)} of {count(config.steps)}"
    if rate is not None:
        facts["Speed"] = f"{rate:.3g} images / s"
        if done < config.steps:
            facts["To go"] = f"about {duration((config.steps - done) * config.batch_size / rate)}"
    if saved.get("init"):
        facts["Started from"] = Path(str(saved["init"])).name
    return facts


def _rate(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Images a second, in the middle of the last lines."""
    rates = [value for line in history if (value := finite(line.get("images_per_second"))) is not None and value > 0]
    return statistics.median(rates[-_RECENT_LINES:]) if rates else None


def _figures(config: PretrainConfig, history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    done = int(history[-1]["step"]) if history else 0
    passed = f"{done / config.steps:.0%} of {count(config.steps)} steps"
    figures = [("Steps", count(done), "finished" if done >= config.steps else passed)]
    for column, name in (("loss", "Loss"), ("knn_mAP", "mAP of neighbours"), ("linear_mAP", "mAP of a linear map"),
                         ("teacher_effective_rank", "Effective rank")):  # fmt: skip
        values = [value for line in history if (value := finite(line.get(column))) is not None]
        if values:
            digits = 1 if column == "teacher_effective_rank" else 3
            note = f"{decimal(values[0], digits)} at first"
            if column == "knn_mAP":
                note = _change(history) or note
            figures.append((name, decimal(values[-1], digits), note))
    return figures[:4] if len(figures) < 5 else [figures[0], *figures[2:]]


def _change(history: Sequence[Mapping[str, Any]]) -> str:
    last = next((line for line in reversed(history) if "knn_change_low" in line), None)
    if last is None:
        return ""
    low, high = signed(last["knn_change_low"]), signed(last["knn_change_high"])
    shown = "" if last["knn_change_low"] > 0 or last["knn_change_high"] < 0 else ", not shown"
    return f"{signed(last['knn_change'])} since the start [{low}, {high}]{shown}"


def _provenance(folder: Path, saved: Mapping[str, Any]) -> dict[str, str]:
    facts = {name: str(saved[name]) for name in ("step", "seed", "preprocess_id", "accepted_leak") if saved.get(name)}
    if "seen" in saved:
        facts["images seen, SHA-256"] = str(saved["seen"]["sha256"])
    if "architecture" in saved:
        facts["architecture"] = json.dumps(saved["architecture"])
    return facts | {CONFIG_NAME: (folder / CONFIG_NAME).read_text(encoding="utf-8").rstrip() + "\n"}


class _Pictures(NamedTuple):
    maps: Sequence[PatchMap] = ()
    maps_note: str = ""
    neighbours: Sequence[tuple[Neighbour, Sequence[Neighbour]]] = ()
    neighbours_note: str = ""
    notes: Sequence[str] = ()


def _pictures(folder: Path, store: Store, config: PretrainConfig, saved: Mapping[str, Any], device: str) -> _Pictures:
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
    return _Pictures(
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
