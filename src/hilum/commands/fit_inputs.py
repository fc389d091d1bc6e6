"""What `fit` starts from, checked: images of train and val, their labels, and a backbone that fits the store.

No label of another split is read here or later. What heads learn from: `fit_targets.py`; the programme: `fit.py`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int64

from hilum.backbones.vit import SIZES, VisionTransformer
from hilum.backbones.weights import load_backbone, read_backbone_config, resolve_weights
from hilum.core.errors import ConfigError, LeakageError, PreprocessingMismatchError, UnknownNameError
from hilum.core.seeding import forked, stream
from hilum.core.types import POSITIVE, UNKNOWN, view_kind
from hilum.data.label_maps import apply_hierarchy
from hilum.data.labels import frequency_groups
from hilum.data.store import Store
from hilum.data.studies import StudyIndex
from hilum.deploy.model_files import Finding
from hilum.heads.sources import parse_source_weights
from hilum.pretraining.exposure import Seen, leak_of, not_recorded, read_seen

RANDOM = "random:"


@dataclass(frozen=True)
class Examples:
    """The images to learn and to choose from."""

    store: Store
    train: Int64[np.ndarray, " n"]
    """Store indices of the training split."""
    val: Int64[np.ndarray, " m"]
    """Store indices of the validation split."""
    findings: tuple[Finding, ...]
    labels: Int[np.ndarray, "N C"]
    """By store index; unknown for other splits, and for findings without a positive training image."""
    scored: Bool[np.ndarray, " C"]
    """Findings that are trained and have a validation positive."""
    sources: tuple[str, ...]
    """Datasets that search or refit learn from; the first is the one that is predicted for."""
    unused: int = 0
    """Images of train and val that the settings leave out."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the findings, in order."""
        return tuple(finding.name for finding in self.findings)

    @property
    def studies(self) -> Int64[np.ndarray, " N"]:
        """Study of every image of the store."""
        return StudyIndex(self.store).of_image

    @property
    def views(self) -> Int64[np.ndarray, " N"]:
        """Position in `VIEW_KINDS` of every image of the store."""
        names, of_image = np.unique(self.store.views, return_inverse=True)
        return np.array([view_kind(name) for name in names.tolist()], dtype=np.int64)[of_image.reshape(-1)]

    @property
    def source_of_image(self) -> Int64[np.ndarray, " N"]:
        """Position in `sources` of every image of the store; 0 for datasets that are not learned from."""
        numbers = {name: number for number, name in enumerate(self.sources)}
        names, of_image = np.unique(self.store.datasets, return_inverse=True)
        return np.array([numbers.get(name, 0) for name in names.tolist()], dtype=np.int64)[of_image.reshape(-1)]

    def describe_data(self) -> dict[str, Any]:
        """By dataset with images here, how many are of train and val, and tags of the licences; for `config.json`."""
        licences, splits = self.store.licences, {"train": self.train, "val": self.val}
        counts = {
            name: {split: int((self.store.datasets[images] == name).sum()) for split, images in splits.items()}
            for name in self.sources
        }
        used = {name: count for name, count in counts.items() if any(count.values())}
        return {"sources": used, "licences": {name: licences.get(name, []) for name in used}}

    @property
    def both(self) -> Int64[np.ndarray, " k"]:
        """Store indices of train and val."""
        return np.concatenate([self.train, self.val])


def open_examples(
    data: Path,
    wanted: tuple[str, ...] | None,
    datasets: tuple[str, ...] | None = None,
    target: str | None = None,
    train_images: int | None = None,
    val_images: int | None = None,
    seed: int = 0,
    hierarchy: bool = False,
    source_weights: tuple[str, ...] = (),
) -> Examples:
    """Read the splits and labels of a store.

    Args:
        data: the store.
        wanted: findings, in the order they shall have; None: all.
        datasets: learn from these alone; None: all.
        target: the dataset that is predicted for: validation is its images alone; None: those of `datasets`, and the
            one with most validation images counts as the first source.
        train_images: at most so many images to learn from, whole patients drawn by the seed; None: all.
        val_images: the same of validation.
        seed: of the draw.
        hierarchy: fill unknown findings from parents and children (`data.label_maps.apply_hierarchy`).
        source_weights: NAME=WEIGHT; of a dataset with weight 0 no training label is known.

    Raises:
        ConfigError: no training or validation split, no finding that can be both learned and scored, or a weight of
            another form.
        LeakageError: a patient in two splits.
        UnknownNameError: a finding or a dataset that the store does not have.
    """
    store = Store.open(data)
    train, val = store.indices("train"), store.indices("val")
    _check_splits(store, train, val)
    available = len(train) + len(val)
    train, val, sources = _choose_datasets(store, train, val, datasets, target)
    train, val = (
        _budget(store, images, budget, seed, split)
        for images, budget, split in ((train, train_images, "train"), (val, val_images, "val"))
    )
    names = _choose_findings(store, wanted)
    labels = np.full((len(store), len(names)), UNKNOWN, dtype=np.int8)
    both = np.concatenate([train, val])
    of_both = store.labels[both]
    if hierarchy:  # relatives may stand among the findings that are not wanted
        of_both = apply_hierarchy(of_both, store.findings, with_normal=False).codes
    labels[both] = of_both[:, [store.findings.index(name) for name in names]]
    weights = dict(zip(sources, parse_source_weights(source_weights, sources), strict=True))
    unheard = [name for name, weight in weights.items() if weight == 0]  # their positives make no finding a trained one
    labels[train[np.isin(store.datasets[train], unheard)]] = UNKNOWN
    findings = describe_findings(names, labels[train])
    trained = np.array([finding.trained for finding in findings])
    labels[:, ~trained] = UNKNOWN  # without a positive there is nothing to learn; their predictions are null
    scored = (labels[val] == POSITIVE).any(axis=0)
    if not scored.any():
        raise ConfigError(
            f"{data}: none of {len(names)} findings has positive images in both train and val; there is nothing to "
            "select a learning rate on. Check the labels and the splits (`hilum audit`)."
        )
    return Examples(store, train, val, findings, labels, scored, sources, available - len(train) - len(val))


def _check_splits(store: Store, train: np.ndarray, val: np.ndarray) -> None:
    if not len(train):
        raise ConfigError(f"{store.path} has no training images (split 'train'); splits are made by `hilum manifest`.")
    if not len(val):
        raise ConfigError(
            f"{store.path} has no validation images (split 'val'). Learning rates, epochs, calibrators and thresholds "
            "are chosen on validation, and never on test. Make the manifest again with a validation split."
        )
    if store.accepted_leak:  # `fit` says so, and writes it into the model
        return
    patients = np.char.add(np.char.add(store.datasets, "\x1f"), store.patients)
    splits = {"train": train, "val": val, "test": store.indices("test")}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        both = np.intersect1d(patients[splits[one]], patients[splits[other]])
        if len(both):
            raise LeakageError(
                f"{store.path}: {len(both)} patients have images both in {one} and in {other}. Run `hilum audit` on "
                "the manifest and make the splits by patient."
            )


def _choose_datasets(
    store: Store, train: np.ndarray, val: np.ndarray, datasets: tuple[str, ...] | None, target: str | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images of the wanted datasets, and the datasets to learn from, the target first.

    The refit learns from validation too: nothing is of a dataset that neither of the two names.
    """
    known = sorted(set(store.datasets.tolist()))
    for name in (*(datasets or ()), *(() if target is None else (target,))):
        if name not in known:
            raise UnknownNameError("dataset of the store", name, known)
    if datasets is not None:
        train = train[np.isin(store.datasets[train], datasets)]
    validated = datasets if target is None else (target,)
    if validated is not None:
        val = val[np.isin(store.datasets[val], validated)]
    if not len(train) or not len(val):
        raise ConfigError(
            f"{store.path}: {len(train)} training images of {', '.join(datasets or ('all datasets',))} and {len(val)} "
            f"validation images of {', '.join(validated or ('all datasets',))}; both are needed. Check `datasets` and "
            "`target`."
        )
    most, counts = np.unique(store.datasets[val], return_counts=True)
    first = target or str(most[counts.argmax()])
    both = np.unique(store.datasets[np.concatenate([train, val])])
    others = [name for name in both.tolist() if name != first]
    return train, val, (first, *others)


def _budget(store: Store, images: np.ndarray, budget: int | None, seed: int, split: str) -> np.ndarray:
    """Whole studies, patient by patient in an order of the seed, as long as the next one fits the budget.

    RPIDIAL/CheXFound linear_glori.py trains few-shot heads on the few images and then on the whole validation set; here
    each split has a budget of its own, and the refit sees what the search saw.
    """
    if budget is None or budget >= len(images):
        return images
    patients = np.char.add(np.char.add(store.datasets[images], "\x1f"), store.patients[images])
    _, of_image = np.unique(patients, return_inverse=True)
    turn = stream(seed, "image budget", split).permutation(int(of_image.max()) + 1)
    study = StudyIndex(store).of_image[images]
    ordered = images[np.lexsort((study, turn[of_image]))]
    ends = np.flatnonzero(np.diff(StudyIndex(store).of_image[ordered], append=-1)) + 1  # one past each study's last
    fitting = ends[ends <= budget]
    if not len(fitting):
        raise ConfigError(f"{split}_images: a budget of {budget} does not hold the first study, of {ends[0]} images.")
    return np.sort(ordered[: fitting[-1]])


def _choose_findings(store: Store, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    names = store.findings if wanted is None else wanted
    for name in names:
        if name not in store.findings:
            raise UnknownNameError("finding of the store", name, store.findings)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"findings: expected one or more different names, found {list(names)}.")
    return tuple(names)


def describe_findings(names: tuple[str, ...], train_labels: Int[np.ndarray, "N C"]) -> tuple[Finding, ...]:
    """Findings as training saw them: positives, known labels and group by share of the training images."""
    positives, known = (train_labels == POSITIVE).sum(axis=0).tolist(), (train_labels >= 0).sum(axis=0).tolist()
    groups = frequency_groups(dict(zip(names, positives, strict=True)), len(train_labels))
    return tuple(
        Finding(name, groups[name], positives[column] > 0, positives[column], known[column])
        for column, name in enumerate(names)
    )


@dataclass(frozen=True)
class OpenBackbone:
    """A backbone and what is known of where it comes from."""

    model: VisionTransformer
    preprocess_id: str
    seen: Seen
    """What it was pretrained on, as far as recorded."""
    leak: str
    """A leak by design that its pretraining accepted, in words."""
    not_recorded: str
    """That it is not recorded what it, or weights that it comes from, have seen, in words; "" where it is."""
    provenance: dict[str, Any]
    """For `config.json`."""


def open_backbone(backbone: Path | str, resolution: int | None, store: Store, seed: int) -> OpenBackbone:
    """Load a backbone, or make an untrained one, and hold it against the store.

    Args:
        backbone: a RUN folder, a weights file, or "random:SIZE".
        resolution: side of the images, pixels; None: the backbone's own.
        store: what it is to see.
        seed: of an untrained backbone.

    Raises:
        UnknownNameError: no such size.
        CheckpointError: damaged weights, or none.
        PreprocessingMismatchError: the store was built for another recipe.
    """
    name = str(backbone)
    if name.startswith(RANDOM):
        size = name.removeprefix(RANDOM)
        if size not in SIZES:
            raise UnknownNameError("backbone size", size, SIZES)
        with forked(seed, "random backbone", size):
            model = VisionTransformer(replace(SIZES[size], image_size=resolution or SIZES[size].image_size))
        nothing = Seen(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        return OpenBackbone(model, store.preprocess_id, nothing, "", "", {"kind": "random", "size": size})
    path = resolve_weights(name)
    described = read_backbone_config(path)
    if described["preprocess_id"] != store.preprocess_id:
        raise PreprocessingMismatchError(
            f"{path} was trained with preprocessing {described['preprocess_id'] or 'unknown'!r}, and {store.path} was "
            f"built for {store.preprocess_id!r}: features would be those of another kind of image. Build the store "
            "that the backbone needs."
        )
    folder = path if path.is_dir() else path.parent
    missing = not_recorded(path, "" if Path(name).exists() else name)
    provenance = {
        "kind": described["format"],
        "name": Path(name).name,
        "seen_recorded": not missing,
        "seen": described.get("seen"),
    }
    return OpenBackbone(
        load_backbone(path, image_size=resolution), described["preprocess_id"], read_seen(folder), leak_of(path),
        f"nothing lists which images {missing} was pretrained on" if missing else "", provenance,
    )  # fmt: skip
