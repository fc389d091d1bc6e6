"""The probe of `hilum pretrain`: labelled images that a run looks at now and then, to see what its features are worth.

Bank: images of split train; queries: images of split val, of other patients; the test split is never read. Features of
the frozen teacher, [CLS] and mean patch token of the last block, are judged by their neighbours and by a linear map
(`pretraining/probing.py`). Labels reach no weight: a run with a probe ends with the same bits as one without. What the
first probe said is kept in RUN/probe_start.npz, so that later ones, of a resumed run too, can be compared with it.
"""

import hashlib
import math
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hilum.backbones.vit import VisionTransformer
from hilum.core.distributed import Engine, sum_over_ranks
from hilum.core.errors import CheckpointError, ConfigError, StoreError
from hilum.core.files import atomic_file
from hilum.core.tracking import say, warn
from hilum.data.store import Store
from hilum.data.transforms import evaluation_crop, normalise, preprocessing
from hilum.evaluation.bootstrap import basic_interval, mean_over_findings, resample_weights
from hilum.evaluation.definitions import average_precision, roc_auc
from hilum.evaluation.weighted import WeightedFinding
from hilum.pretraining.probing import ProbeConfig, ProbeImages, choose_images, linear_scores, neighbour_scores

START_NAME = "probe_start.npz"


def open_probe(
    store: Store, config: ProbeConfig, resolution: int, seed: int, out: Path, speaks: bool = True
) -> "Probe | None":
    """The probe of a run; None, with one line that says why, where there is nothing to probe with.

    Args:
        store: the images of the run.
        config: its settings; `every` 0 is no probe, without a line.
        resolution: side of the centre squares that are embedded, pixels.
        seed: root seed of the run.
        out: the run folder.
        speaks: whether this process prints.
    """
    if not config.every:
        return None
    try:
        images = choose_images(store, config, seed)
    except ConfigError as reason:
        if speaks:
            say(f"No probe: {reason}. Columns knn_mAP and linear_mAP will be absent.")
        return None
    if speaks:
        say(
            f"Probe: every {config.every} steps, {len(images.bank)} labelled images of train, {len(images.queries)} of "
            f"val, {len(images.findings)} findings"
        )
    return Probe(store, config, images, resolution, seed, out)


class Probe:
    """Embeds the images and measures; made once, asked again and again.

    Args:
        store: where pixels come from.
        config: settings.
        images: bank and queries.
        resolution: side of the centre squares, pixels; a multiple of the patch size.
        seed: root seed of the run.
        out: the run folder.
    """

    def __init__(
        self, store: Store, config: ProbeConfig, images: ProbeImages, resolution: int, seed: int, out: Path
    ) -> None:
        self.store, self.config, self.images, self.resolution, self.seed = store, config, images, resolution, seed
        self.out, self.recipe = Path(out), preprocessing(store.preprocess_id)
        self.indices = np.concatenate([images.bank, images.queries])
        content = [
            store.fingerprint(images.bank), store.fingerprint(images.queries), *images.findings, str(resolution),
            str(config.neighbours), str(config.temperature),
        ]  # fmt: skip
        self.identity = hashlib.sha256("\x1f".join(content).encode()).hexdigest()
        """Of the questions: answers with the same can be compared."""

    def is_due(self, done: int, steps: int) -> bool:
        """Whether to measure after `done` of `steps` steps."""
        return done % self.config.every == 0 or done == steps

    def measure(self, backbone: VisionTransformer, engine: Engine, step: int) -> dict[str, float]:
        """What the features are worth now. All processes call it; each embeds its share.

        Args:
            backbone: the teacher's, on the engine's device; it is put back into the mode it came in.
            engine: precision, device and processes of the run.
            step: steps done; later probes are compared with what is measured after 0, or, where a probe was turned on
                later, with the first one.

        Returns:
            On rank 0, for `metrics.jsonl`: knn_mAP, knn_mAUC, linear_mAP, linear_mAUC in [0, 1], probe_images (embedded
            queries) and probe_findings; after the first probe also knn_change, the difference of knn_mAP to it, with
            its 95 % interval over resampled patients in knn_change_low and knn_change_high, and in knn_change_since the
            step of that first one. On other ranks: nothing.
        """
        features, usable = self._embed(backbone, engine)
        if engine.rank != 0:
            return {}
        bank, queries = usable[: len(self.images.bank)], usable[len(self.images.bank) :]
        if not bank.any() or not queries.any():
            warn("no image of the probe could be read; see `hilum verify`.")
            return {}
        known, asked = features[: len(bank)][bank], features[len(bank) :][queries]
        labels, truth = self.images.bank_labels[bank], self.images.query_labels[queries]
        with_labels = ((labels == 0) | (labels == 1)).any(axis=0)
        labels, truth = labels[:, with_labels], truth[:, with_labels]
        config = self.config
        nearest = neighbour_scores(known, labels, asked, config.neighbours, config.temperature)
        linear = linear_scores(known, labels, self.images.bank_patients[bank], asked, self.seed)
        values = _means("knn", nearest, truth) | _means("linear", _between_0_and_1(linear), truth)
        values |= {"probe_images": float(len(asked)), "probe_findings": float(truth.shape[1])}
        return values | self._change(nearest, queries, with_labels, step)

    @torch.no_grad()
    def _embed(self, backbone: VisionTransformer, engine: Engine) -> tuple[Float[np.ndarray, "n D"], np.ndarray]:
        """Features of all images, and which of them could be read: every process has all rows in the end."""
        width = 2 * backbone.config.embed_dim
        table = torch.zeros(len(self.indices), width + 1, device=engine.device)  # the last column says "was read"
        mine = np.arange(engine.rank, len(self.indices), engine.world_size)
        was_training = backbone.training
        backbone.eval()
        try:
            with ThreadPoolExecutor(2) as readers:
                size, most = self.config.batch_size, math.ceil(len(self.indices) / engine.world_size)
                parts = [mine[start : start + size] for start in range(0, most, size)]
                pending = [readers.submit(self._read, part) for part in parts[:1]]
                for number in range(len(parts)):
                    pending += [readers.submit(self._read, part) for part in parts[number + 1 : number + 2]]
                    places, pixels = pending.pop(0).result()
                    features = self._features(backbone, pixels, engine)  # also of a stand-in for none, see _read
                    table[torch.from_numpy(places).to(engine.device)] = features[: len(places)]
        finally:
            backbone.train(was_training)
        gathered = sum_over_ranks(table).cpu().numpy()
        return gathered[:, :width].astype(np.float64), gathered[:, width] > 0

    def _features(self, backbone: VisionTransformer, pixels: Tensor, engine: Engine) -> Float[Tensor, "B _"]:
        with engine.autocast():
            tokens = backbone(normalise(pixels.to(engine.device), self.recipe))
        cls, patches = tokens.cls.float(), tokens.patches.float().mean(dim=1)
        return torch.cat([cls, patches, torch.ones_like(cls[:, :1])], dim=1)

    def _read(self, places: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Centre squares of the images that can be read, and their places.

        One black square and no place where there are none: all processes make as many passes through the network,
        because one that is spread over them (FSDP) waits for all.
        """
        kept, squares = [], []
        for place in places.tolist():
            try:
                squares.append(evaluation_crop(self.store.read(int(self.indices[place])), self.resolution))
            except StoreError:
                continue  # `hilum verify` names it, and so does the loader where it is drawn
            kept.append(place)
        stacked = np.stack(squares or [np.zeros((self.resolution, self.resolution), np.uint8)])[:, None]
        return np.array(kept, np.int64), torch.from_numpy(stacked)

    def _change(self, scores: np.ndarray, asked: np.ndarray, answered: np.ndarray, step: int) -> dict[str, float]:
        """The difference of knn_mAP to the first probe, and that one's step; the first one itself is kept instead."""
        now = np.full(self.images.query_labels.shape, np.nan)
        now[np.ix_(asked, answered)] = scores
        path = self.out / START_NAME
        if step == 0 or not path.exists():
            with atomic_file(path) as file:
                np.savez(file, scores=now.astype(np.float32), identity=np.array(self.identity), step=np.array(step))
            return {}
        first, since = self._first(path)
        if first is None:
            return {}
        change = compare(first, now.astype(np.float32), self.images, self.config.resamples, self.seed)
        return change | ({"knn_change_since": float(since)} if change and since is not None else {})

    def _first(self, path: Path) -> tuple[np.ndarray | None, int | None]:
        """Scores of the first probe, unless it asked something else, and its step, which older files do not say."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                scores, identity = arrays["scores"], str(arrays["identity"])
                step = int(arrays["step"]) if "step" in arrays else None
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path} cannot be read: {error}. Delete it: the next probe starts anew.") from error
        same = identity == self.identity and scores.shape == self.images.query_labels.shape
        return scores if same else None, step


def compare(
    first: Float[np.ndarray, "Q C"], now: Float[np.ndarray, "Q C"], images: ProbeImages, resamples: int, seed: int
) -> dict[str, float]:
    """How much better `now` is than `first`, in mean average precision over findings, on the same queries.

    Args:
        first: scores in [0, 1], NaN where there are none.
        now: likewise.
        images: whose queries these are.
        resamples: of the patients; both sides are measured on the same ones.
        seed: root of the resamples.

    Returns:
        knn_change, and its 95 % interval knn_change_low, knn_change_high; empty where no finding is
        defined on both sides.
    """
    both = ~(np.isnan(first) | np.isnan(now))
    labels = np.where(both, images.query_labels, -1).astype(np.int8)
    columns = np.flatnonzero((labels == 1).any(axis=0))
    if not len(columns):
        return {}
    count = int(images.query_patients.max()) + 1
    weights = resample_weights(count, 0, resamples, seed)
    points, samples = [], []
    for scores in (first, now):
        values = np.nan_to_num(scores.astype(np.float64))
        points.append(np.mean([average_precision(values[:, c], labels[:, c]) or 0.0 for c in columns]))
        findings = [WeightedFinding(values[:, c], labels[:, c], images.query_patients, count, None) for c in columns]
        samples.append(np.stack([finding.measure(weights, ("AP",))["AP"] for finding in findings], axis=1))
    change = float(points[1] - points[0])
    ends = basic_interval(mean_over_findings(samples[1]) - mean_over_findings(samples[0]), change)
    return {"knn_change": change} | ({"knn_change_low": ends[0], "knn_change_high": ends[1]} if ends else {})


def _means(name: str, scores: Float[np.ndarray, "Q C"], labels: np.ndarray) -> dict[str, float]:
    """Macro means over the findings where a metric is defined."""
    values: dict[str, Any] = {}
    for metric, measure in (("mAP", average_precision), ("mAUC", roc_auc)):
        each = [measure(scores[:, column], labels[:, column]) for column in range(labels.shape[1])]
        defined = [value for value in each if value is not None]
        if defined:
            values[f"{name}_{metric}"] = float(np.mean(defined))
    return values


def _between_0_and_1(scores: Float[np.ndarray, "Q C"]) -> Float[np.ndarray, "Q C"]:
    """The same order in [0, 1], for metrics that take probabilities."""
    low, high = scores.min(axis=0), scores.max(axis=0)
    return np.clip((scores - low) / np.where(high > low, high - low, 1.0), 0.0, 1.0)
