"""Maps of a store's images for chosen findings: what `hilum explain STORE:split --maps` writes.

Runs the loop over images that prediction runs, and keeps the maps that were asked for. Nothing is judged here. Views
that the store does not name are those that the view classifier names, as in prediction.
"""

from collections.abc import Callable, Collection, Mapping

import numpy as np
from jaxtyping import Int64

from hilum.core.errors import ConfigError
from hilum.core.types import POSITIVE, view_kind
from hilum.data.regions import seen_box
from hilum.data.store import Indices, Store
from hilum.deploy.admission import Gate
from hilum.deploy.network import Network, Reading, raw_probabilities, store_identity
from hilum.deploy.predictor import Model
from hilum.deploy.study_images import Part, mean_of_maps
from hilum.evaluation.map_files import Maps
from hilum.evaluation.predictions import Predictions, column_indices
from hilum.evaluation.studies import study_uids, view_weights
from hilum.heads.evidence import kind_of_maps


def kind_of(model: Model) -> str:
    """What a model's maps are: "attention", "evidence", or "mixed" in an ensemble of both."""
    kinds = {kind_of_maps(network.head) for network in model.networks if isinstance(network, Network)}
    return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "not recorded"


def labelled_positive(store: Store, indices: Indices, findings: Collection[str]) -> dict[int, list[str]]:
    """The findings, of those named, that each image of a store is labelled with."""
    names = [name for name in store.findings if name in set(findings)]
    columns = [store.findings.index(name) for name in names]
    labels = np.asarray(store.labels)
    wanted = {
        int(index): [name for name, column in zip(names, columns, strict=True) if labels[index, column] == POSITIVE]
        for index in indices
    }
    return {index: found for index, found in wanted.items() if found}


def store_maps(
    model: Model,
    store: Store,
    indices: Indices,
    wanted: Mapping[int, Collection[str]],
    batch_size: int = 32,
    workers: int = 2,
    done: Callable[[int], None] = lambda count: None,
) -> Maps:
    """Maps of chosen pairs.

    Args:
        model: with the recipe that the store was made with.
        store: whose images are read.
        indices: images that may be read: where a head looks at whole studies, the images of a wanted one's study too.
        wanted: store index -> findings.
        batch_size: images at a time.
        workers: threads that read.
        done: told how many images were finished, after each batch.

    Raises:
        PreprocessingMismatchError: a store of another recipe.
        ConfigError: nothing is wanted of these images, or findings that the model was never trained for alone.
        PredictionError: a finding that the model does not have.
    """
    store.check_recipe(model.preprocess_id)
    together = any(network.needs_studies for network in model.networks)
    everything = np.asarray(list(indices), dtype=np.int64)
    chosen = needed(store, everything, wanted, together)
    if not len(chosen):
        raise ConfigError("There is no map to make: none of these images has a finding that was asked for.")
    trained = np.any([network.trained[_columns(network, model)] for network in model.networks], axis=0)
    columns = {
        name: column
        for name in sorted({name for names in wanted.values() for name in names})
        for column in column_indices(model.findings, [name], "the model")
        if trained[column]
    }
    identity = store_identity(store, chosen)
    studies = study_uids(*(identity[name] for name in ("dataset", "patient_id", "study_id", "image_uid")))
    views = identity["view"].astype(object)
    kinds = np.array([view_kind(view) for view in views], dtype=np.int64)
    gate = Gate(model.screening, score_flagged=True)
    found: list[tuple[int, int, np.ndarray]] = []

    def read(position: int) -> np.ndarray:
        pixels = store.read(int(chosen[position]))
        if views[position] in ("", "UNKNOWN"):
            views[position] = gate.admit(pixels, views[position], "given").view
            kinds[position] = view_kind(views[position])  # before the head of its batch asks for it
        return pixels

    def observe(positions: Int64[np.ndarray, " B"], readings: list[Reading]) -> None:
        groups = [np.flatnonzero(studies[positions] == study) for study in dict.fromkeys(studies[positions].tolist())]
        for rows in groups if together else np.arange(len(positions))[:, None]:
            weights = _weights(model, {**identity, "view": views}, positions[rows]) if together else np.ones(1)
            for row, maps in zip(rows, mean_of_maps(_parts(model, readings, rows), weights), strict=False):
                position = int(positions[row])
                names = wanted.get(int(chosen[position]), ())
                found.extend(
                    (position, columns[name], maps[columns[name]])
                    for name in names
                    if name in columns and np.isfinite(maps[columns[name]]).all()
                )

    raw_probabilities(
        model.networks, np.arange(len(chosen)), read, batch_size, workers, done, studies, kinds, observe,
        attention=True,
    )  # fmt: skip
    if not found:
        raise ConfigError(
            "There is no map to make: this model has none of the findings that were asked for, or was not trained for "
            "them."
        )
    found.sort(key=lambda one: one[:2])
    kept = np.unique([position for position, _, _ in found])
    used = sorted({column for _, column, _ in found})
    config = max((network.config for network in model.networks), key=lambda one: one.resolution)
    sizes = zip(store.heights[chosen[kept]].tolist(), store.widths[chosen[kept]].tolist(), strict=True)
    return Maps(
        identity["image_uid"][kept], identity["image_id"][kept], tuple(model.findings[column] for column in used),
        np.searchsorted(kept, [position for position, _, _ in found]),
        np.searchsorted(used, [column for _, column, _ in found]),
        np.stack([maps for _, _, maps in found]),
        np.array([seen_box(rows, across, config.resolution, config.short_side) for rows, across in sizes]),
        {"model": model.digest, "kind": kind_of(model), "over": "study" if together else "image"},
    )  # fmt: skip


def needed(
    store: Store, indices: Int64[np.ndarray, " N"], wanted: Mapping[int, Collection[str]], together: bool
) -> Int64[np.ndarray, " M"]:
    """The images that must be read: those wanted, and with `together` the rest of their studies."""
    of = np.isin(indices, [index for index, names in wanted.items() if names])
    if together:
        identity = store_identity(store, indices)
        studies = study_uids(*(identity[name] for name in ("dataset", "patient_id", "study_id", "image_uid")))
        of = np.isin(studies, np.unique(studies[of]))
    return indices[of]


def _columns(network: object, model: Model) -> list[int]:
    return column_indices(network.findings, model.findings, "a member of the ensemble")  # type: ignore[attr-defined]


def _parts(model: Model, readings: list[Reading], rows: np.ndarray) -> list[Part]:
    shares = model.composition.weights or [1.0] * len(model.networks)
    parts = []
    for network, reading, share in zip(model.networks, readings, shares, strict=True):
        columns = _columns(network, model)
        maps = None if reading.attention is None else reading.attention[rows][:, columns]
        parts.append(Part(reading.probabilities[rows][:, columns], maps, share, network.over_study[columns]))
    return parts


def _weights(model: Model, identity: Mapping[str, np.ndarray], positions: np.ndarray) -> np.ndarray:
    """Of the images of one study, by the model's study rule."""
    rows = {name: column[positions].astype(str) for name, column in identity.items()}
    table = Predictions(**rows, findings=("any",), probabilities=np.zeros((len(positions), 1)))
    return view_weights(table, model.composition.study)
