"""What `extend` starts from, checked: a model, findings that it does not have, and images with labels for them.

Images that the model was trained on stay on the training side and those that it was validated on stay in validation,
by patient. No label of another split is read. `extend.py` trains and writes. Past 300 lines: every check says in words
what was found and what to do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from hilum.backbones.vit import VisionTransformer
from hilum.commands.fit_inputs import Examples, describe_findings, open_examples
from hilum.core.config import from_dict, override
from hilum.core.errors import ConfigError, LeakageError
from hilum.core.seeding import stream
from hilum.core.tracking import warn
from hilum.core.types import POSITIVE, UNKNOWN
from hilum.data.store import Store
from hilum.deploy import model_files as files
from hilum.deploy.engines import read_export
from hilum.evaluation.predictions import IDENTITY, Predictions
from hilum.heads.config import SETTINGS_OF_ONE_HEAD, FitConfig
from hilum.heads.extension import ExtendedHead
from hilum.heads.registry import VIEWS_OF_HEADS, Head
from hilum.pretraining.exposure import uid_numbers


@dataclass(frozen=True)
class Base:
    """A model that is to get more findings."""

    path: Path
    content: dict[str, Any]
    """Its `config.json`."""
    network: files.NetworkConfig
    backbone: VisionTransformer
    head: Head | ExtendedHead
    exposure: files.Exposure
    calibrators: files.Calibrators
    validations: tuple[tuple[Predictions, Int[np.ndarray, "_ _"]], ...]
    """Of every head that was validated, the first one first: predictions by a head that had not seen validation, and
    the labels. Extensions may have been validated on other images than the first head."""

    @property
    def main(self) -> Head:
        """The first head."""
        return self.head.main if isinstance(self.head, ExtendedHead) else self.head

    @property
    def names(self) -> tuple[str, ...]:
        """Its findings, in order."""
        return tuple(finding.name for finding in self.network.findings)

    @property
    def sides(self) -> dict[str, np.ndarray]:
        """Identities (uint64) of the images that it was "trained" and "validated" on, under every name known."""
        met, tables = self.exposure, [uid_numbers(one.image_uid) for one, _ in self.validations]
        return {
            "trained": np.union1d(met.train, met.train_pictures),
            "validated": np.unique(np.concatenate([met.val, met.val_pictures, met.validated_pictures, *tables])),
        }

    @property
    def validated_patients(self) -> np.ndarray:
        """Dataset and patient of the images that it was validated on, as `_person` puts them."""
        return np.unique(np.concatenate([_person(one.dataset, one.patient_id) for one, _ in self.validations]))


def open_base(path: Path) -> Base:
    """Read a model, whole.

    Raises:
        ConfigError: an ensemble, an export, or a model that was imported.
        CheckpointError, PredictionError: incomplete or damaged.
    """
    content = files.read_config(path)
    if read_export(path) is not None:
        raise ConfigError(f"{path} is an export, without weights to build on. Extend the MODEL it was made from.")
    if content["format"] != files.MODEL_FORMAT:
        raise ConfigError(f"{path} is an ensemble. Extend its members one by one, and combine them again.")
    if "settings" not in content["training"]:
        raise ConfigError(
            f"{path} was imported; it has no fit settings to extend it by. Fit a head on the weights of its backbone "
            "(hilum fit RECIPE --backbone WEIGHTS), and extend that model."
        )
    network = files.read_network(path, content)
    backbone, head = files.read_weights(path, network, str(content["weights"]["sha256"]))
    numbers = [None, *(number for number, one in enumerate(network.extensions) if not one.zero_shot)]
    return Base(
        path, content, network, backbone, head, files.read_exposure(path, content),
        files.read_calibrators(path, content), tuple(files.read_validation_of(path, number) for number in numbers),
    )  # fmt: skip


def check_new(base: Base, findings: Sequence[str]) -> tuple[str, ...]:
    """The names of the new findings.

    Raises:
        ConfigError: none, one twice, one that the model has already, or a name that tables use otherwise.
    """
    names = tuple(findings)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"--finding: expected one or more different names, found {', '.join(names) or 'none'}.")
    known = {name.casefold(): name for name in base.names}
    had = [known[name.casefold()] for name in names if name.casefold() in known]
    drafts = {name for one in base.network.extensions if one.zero_shot for name in one.findings}
    if had and set(had) <= drafts:
        raise ConfigError(
            f"{base.path} scores {', '.join(had)} zero-shot. To learn from labels, extend the model it was made from "
            f"({base.content.get('extended_from')})."
        )
    if had:
        raise ConfigError(
            f"{base.path} already has {', '.join(had)}. Nothing was changed: an extension adds findings and never "
            "changes one. To learn a finding anew from more labels, run `hilum fit`, or `hilum extend --joint` with "
            "findings that are new; a new reading of it needs a name of its own."
        )
    if clash := sorted(set(names) & set(IDENTITY)):
        raise ConfigError(f"--finding: {', '.join(clash)} is a column of prediction files. Choose another name.")
    return names


LEFT_OUT = (
    "findings", "datasets", "target", "pseudo_labels", "source_weights", "source_bias", "also_blocks",
    "also_patch_mean", "prune_after", "classifier_epochs", "consistency", "deferred", "stop_epoch", "refit_init",
    "train_images", "val_images", "hierarchy", "text_vectors", "query_groups", "shared_output", "tune",
    "kept_channels", "pseudo_weight", "pseudo_certainty",
)  # fmt: skip
"""Settings of a fit that an extension does not take over from the model; of these only `stop_epoch` may be given."""


def settings_of(base: Base, overrides: Sequence[str] = (), joint: bool = False) -> FitConfig:
    """The settings that the model was fitted with, as far as they apply to an extension, with `key=value` changes.

    The kind of head, its blocks, rates, epochs, loss and augmentation are the model's own; what spoke of its findings,
    its data or its way of ending (`LEFT_OUT`) is not. With another head (`head=linear`), neither is what the model's
    own head alone obeys.

    Args:
        base: the model.
        overrides: key=value.
        joint: for a head of all findings, which has the model's own kind of queries; others have learned ones.

    Raises:
        ConfigError: settings that cannot be read or mean nothing here, other blocks or another resolution than the
            model's.
    """
    recorded, plain = base.content["training"]["settings"], FitConfig()
    chosen = [text for text in overrides if text.partition("=")[0] == "head"]
    head = override(plain, chosen or [f"head={recorded.get('head', plain.head)}"]).head
    idle = _idle_with(recorded, head)
    settings = {name: value for name, value in recorded.items() if name not in idle} | {"head": head}
    if head == "ml_decoder":
        own = recorded.get("queries", plain.queries)
        settings["queries"] = own if joint and own != "text" else "learnable"
    kept = from_dict(FitConfig, settings, "training.settings.")
    kept = replace(
        kept,
        resolution=base.network.resolution,
        blocks=base.network.head.blocks,
        patch_mean=head == "linear" and base.network.head.patch_mean,
        learning_rates=kept.learning_rates if len(kept.learning_rates) > 1 else plain.learning_rates,
    )
    config = override(kept, overrides)
    for name in ("blocks", "resolution", "precision", "flip_average"):
        if getattr(config, name) != getattr(kept, name):
            raise ConfigError(
                f"{name}: an extension reads what the model reads ({getattr(kept, name)}); found "
                f"{getattr(config, name)}. Leave it out, or fit a new model."
            )
    for name in ("queries", "study", "normal_damping", *LEFT_OUT):
        if getattr(config, name) != getattr(kept, name) and name != "stop_epoch":
            raise ConfigError(f"{name}: `hilum extend` does not obey it, found {getattr(config, name)}. Leave it out.")
    return config


def _idle_with(recorded: Mapping[str, Any], head: str) -> set[str]:
    """Recorded settings that say nothing of an extension by that head: they would be refused, or mean another thing."""
    idle = {"queries", *LEFT_OUT}
    for owner, names in SETTINGS_OF_ONE_HEAD.items():
        idle |= set(names) if owner != head else set()
    if recorded.get("views") not in VIEWS_OF_HEADS[head]:
        idle.add("views")
    if recorded.get("sampling") != "class_aware":  # they may have been for `classifier_epochs`
        idle |= {"sampling_power", "sampling_over"}
    if not recorded.get("augmented_views"):
        idle.add("cache_dtype")
    return idle


@dataclass(frozen=True)
class Shots:
    """How many positive images of each new finding may be used; None: all."""

    train: int | None = None
    val: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("shots", self.train), ("val-shots", self.val)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name}: expected at least 1, found {value}.")


def open_new_examples(base: Base, data: Path, findings: tuple[str, ...], shots: Shots, config: FitConfig) -> Examples:
    """Images of train and val with labels of the new findings.

    Training images of which no new finding is known are left out, except where the head looks at whole studies.
    Validation stays whole (of the model's `target`), so that all heads of a model are validated on the same images.

    Args:
        base: the model.
        data: a store of the model's preprocessing recipe.
        findings: names of the store.
        shots: budget of positive images; the others' labels become unknown.
        config: the seed of the draw (a larger budget holds the smaller one), and whether the head looks at studies.

    Raises:
        ConfigError: a finding without a positive in train, or none with a positive in val.
        LeakageError: an image changes sides between the model's fit and this one, or a patient is in two splits.
        UnknownNameError: a finding that the store does not have.
        PreprocessingMismatchError: a store of another recipe.
    """
    store = Store.open(data)
    store.check_recipe(base.network.preprocess_id, base.path)
    refuse_absent(store, findings)
    examples = open_examples(data, findings, target=target_of(base, store))
    check_sides(base, store, examples.train, examples.val)
    labels = examples.labels.copy()
    for images, budget, split in ((examples.train, shots.train, "train"), (examples.val, shots.val, "val")):
        if budget is not None:
            _limit(labels, images, budget, config.seed, split, findings)
    train, val = examples.train, examples.val
    if not config.needs_studies:
        train = train[(labels[train] >= 0).any(axis=1)]
    blind = [name for name, some in zip(findings, (labels[val] == POSITIVE).any(axis=0), strict=True) if not some]
    if blind:
        warn(
            f"no positive validation image of {', '.join(blind)}: nothing of the choice or of the calibration rests on "
            "them, they are flagged as uncalibrated and have no threshold of their own"
        )
    return replace(
        examples, train=train, val=val, labels=labels, findings=describe_findings(findings, labels[train]),
        scored=(labels[val] == POSITIVE).any(axis=0),
    )  # fmt: skip


def check_sides(base: Base, store: Store, train: Int64[np.ndarray, " n"], val: Int64[np.ndarray, " m"]) -> None:
    """Refuse to learn from patients that the model was validated on, and to validate on those it has learned from.

    A store that leaks by design, and says so, is let through; the model will say so too.

    Raises:
        LeakageError: with the number of patients and what to do.
    """
    if store.accepted_leak:
        return
    patients, sides = _person(store.datasets, store.patients), base.sides
    both = np.intersect1d(sides["trained"], sides["validated"])  # a leak by design that was accepted then
    for name, images, other in (("learn from", train, "validated"), ("validate on", val, "trained")):
        met = patients[files.are_met(store.uids, store.pictures, np.setdiff1d(sides[other], both))]
        if other == "validated" and not len(both):
            met = np.union1d(met, base.validated_patients)  # also by images that this store does not have
        shared = np.intersect1d(patients[images], met)
        if len(shared):
            raise LeakageError(
                f"{base.path} was {other} on images of {len(shared)} patients that {store.path} would have it "
                f"{name}. Patients keep their splits: build the store from the manifest that the model was fitted on, "
                "or leave these patients out."
            )
    test = store.indices("test")
    seen = int(files.are_met(store.uids[test], store.pictures[test], *sides.values()).sum())
    if seen:
        warn(
            f"the model was fitted on {seen} test images of {store.path}; a test score would not be one on unseen ones"
        )


def _person(datasets: np.ndarray, patients: np.ndarray) -> np.ndarray:
    return np.char.add(np.char.add(datasets.astype(str), "\x1f"), patients.astype(str))


def target_of(base: Base, store: Store) -> str | None:
    """The dataset that the model is for, whose validation images judge what is added; None: all, or it is not here."""
    target = base.content["training"]["settings"].get("target")
    return target if target in set(store.datasets.tolist()) else None


def refuse_absent(store: Store, findings: tuple[str, ...]) -> None:
    """Refuse new findings of which nothing can be learned.

    Raises:
        ConfigError: one without a positive training image.
    """
    train = store.indices("train")
    for name in findings:
        if name not in store.findings:
            continue  # `open_examples` names the nearest
        column = store.labels[train, store.findings.index(name)]
        if not (column == POSITIVE).any():
            known = int((column >= 0).sum())
            raise ConfigError(
                f"{store.path} has no positive training image of {name!r} ({known} known labels). Nothing can be "
                "learned of it: label some positives, or score it from text alone (--zero-shot)."
            )


def _limit(
    labels: Int[np.ndarray, "N C"], images: np.ndarray, budget: int, seed: int, split: str, findings: tuple[str, ...]
) -> None:
    """Leave `budget` positives of every finding known among some images, in place; the others become unknown.

    RPIDIAL/CheXFound linear_glori.py forgets its few-shot budget in the second phase and trains on the whole validation
    set; here each split has its own, and what is not in it is unknown to every phase.
    """
    for column, name in enumerate(findings):
        positive = images[labels[images, column] == POSITIVE]
        order = stream(seed, "shots", split, name).permutation(len(positive))
        labels[positive[order[budget:]], column] = UNKNOWN
        if len(positive) < budget:
            warn(f"{name}: {len(positive)} positive images in {split}, fewer than the {budget} asked for")
