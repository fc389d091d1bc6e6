"""When do labelled images of other datasets help, and when do they harm?

    python runs/label_sources.py STORE BACKBONE OUT [--target cxrlt] [--scale full|tiny] [--seeds 0,1]
        [--variants alone,masked,negative] [--device auto]

A decoder is fitted for one dataset of the store, alone and with the labelled images of the others, as they are and
with faults planted in copies (label_planting.py): unknown labels read as negative, wrong labels, another scanner; then
with what is said to repair it: weights, biases by dataset, pseudo-labels. Judged on the target's test images, raw, per
image. What is asked, and why so: docs/explanation/label-sources.md. Fixed before it is run: `Experiment`.

Units that are finished are kept, so a run that was stopped goes on; OUT/label_sources.json and .md are written after
every seed. Seeds may run side by side (`--seeds 0`, `--seeds 1`); the same command with all of them then makes the
table. `--variants` takes only some, for more seeds of them than of the rest, into OUT/label_sources_alone_masked_... .
Past 300 lines: every parameter beside what it does.
"""

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from label_planting import copy_store, flip_labels, keep_patients, shift_store, unknown_as_negative
from label_tables import markdown

from hilum.commands import fit
from hilum.commands.ablate_checkpoint import weights_digest
from hilum.core.config import to_dict
from hilum.core.errors import ConfigError, HilumError, UnknownNameError
from hilum.core.files import read_json, write_json, write_text
from hilum.core.tracking import say
from hilum.core.types import RESEARCH_NOTICE
from hilum.data.labels import frequency_groups
from hilum.data.store import Store
from hilum.deploy.model_files import read_config
from hilum.deploy.predictor import load
from hilum.evaluation.ablation import SeedResult, compare, measure, read_result, summarise, write_result
from hilum.heads.config import FitConfig
from hilum.recipes import fit_recipe

METRIC = "mAP"


@dataclass(frozen=True)
class Variant:
    """What one head learns from."""

    name: str
    added: bool = True
    """Also from the other datasets."""
    unknown: Literal["masked", "negative"] = "masked"
    """What becomes of unknown labels of added images; negative is the planted defect."""
    noise: float = 0.0
    """Share of the positives of added images that are something else."""
    shifted: bool = False
    """Whether added images come from another scanner."""
    weight: float = 1.0
    """`source_weights` of every added dataset."""
    bias: bool = False
    """`source_bias`."""
    pseudo: bool = False
    """Unknown labels filled by a head that was fitted on the target alone, to the same images of it."""


ALONE, MASKED = Variant("alone", added=False), Variant("masked")
NEGATIVE, SHIFTED = Variant("negative", unknown="negative"), Variant("shifted", shifted=True)
NOISE_10, NOISE_30 = Variant("noise_10", noise=0.1), Variant("noise_30", noise=0.3)


@dataclass(frozen=True)
class Experiment:
    """Every parameter."""

    variants: Mapping[float, tuple[Variant, ...]]
    """By the share of the target's own patients, in training and validation, that are used."""
    differences: tuple[tuple[str, str], ...]
    """Paired differences, first minus second, at every share that has both."""
    target: str = "cxrlt"
    seeds: tuple[int, ...] = (0, 1)
    """Of the head, of the noise, and of the patients that a share below 1 keeps."""
    recipe: str = "laptop_decoder"
    settings: tuple[str, ...] = ()
    """`key=value`; epochs are those of the target with everything that is added (`epochs`)."""
    gamma: float = 1.6
    """Grey levels of the other scanner: v to 255 (v / 255)^gamma."""
    blur: float = 1.5
    """Its blur: deviation of a Gaussian, pixels of the store."""
    minimum_positives: int = 20
    """Test positives that a finding needs to be in a mean."""
    bootstraps: int = 1000
    bootstrap_seed: int = 0


_LAPTOP = (
    "batch_size=64", "search_epochs=8", "refit_epochs=8", "augmented_views=2", "flip_average=false", "threads=1",
    "cache_dtype=float16", "blocks=2", "decoder_dim=64", "decoder_feed_forward=128", "learning_rates=[2e-3, 5e-3]",
)  # fmt: skip
_DIFFERENCES = (
    ("masked", "alone"), ("negative", "alone"), ("masked", "negative"), ("noise_10", "alone"), ("noise_30", "alone"),
    ("noise_10", "masked"), ("noise_30", "masked"), ("shifted", "alone"), ("shifted", "masked"),
    ("noise_30_weight_50", "noise_30"), ("noise_30_weight_25", "noise_30"), ("noise_30_bias", "noise_30"),
    ("noise_30_pseudo", "noise_30"), ("noise_30_weight_25", "alone"), ("shifted_weight_25", "shifted"),
    ("shifted_weight_25", "alone"), ("masked_bias", "masked"), ("masked_pseudo", "masked"), ("masked_pseudo", "alone"),
)  # fmt: skip
REPAIRS = (
    replace(NOISE_30, name="noise_30_weight_50", weight=0.5), replace(NOISE_30, name="noise_30_weight_25", weight=0.25),
    replace(NOISE_30, name="noise_30_bias", bias=True), replace(NOISE_30, name="noise_30_pseudo", pseudo=True),
    replace(SHIFTED, name="shifted_weight_25", weight=0.25), replace(MASKED, name="masked_bias", bias=True),
    replace(MASKED, name="masked_pseudo", pseudo=True),
)  # fmt: skip
SCALES: dict[str, Experiment] = {
    "full": Experiment(
        {1.0: (ALONE, MASKED, NEGATIVE, NOISE_10, NOISE_30, SHIFTED, *REPAIRS),
         0.1: (ALONE, MASKED, NEGATIVE, NOISE_30, SHIFTED)},
        _DIFFERENCES, settings=_LAPTOP,
    ),
    "tiny": Experiment(
        {1.0: (ALONE, MASKED, NEGATIVE, replace(NOISE_30, name="noise_30_weight_25", weight=0.25),
               replace(SHIFTED, name="shifted_bias", bias=True), replace(MASKED, name="masked_pseudo", pseudo=True)),
         0.5: (ALONE, MASKED)},
        (*_DIFFERENCES, ("shifted_bias", "masked")), seeds=(0,), minimum_positives=2, bootstraps=20,
        settings=(*_LAPTOP[4:7], "augmented_views=1", "search_epochs=2", "refit_epochs=2", "batch_size=16", "blocks=1",
                  "decoder_dim=8", "decoder_feed_forward=8", "decoder_heads=2", "learning_rates=[1e-2, 5e-2]",
                  "workers=1"),
    ),
}  # fmt: skip
"""full: for docs/results.md. tiny: to see that it runs."""


@dataclass(frozen=True)
class Unit:
    """One fit and its test predictions."""

    variant: Variant
    share: float
    seed: int
    teacher: bool = False
    """A head of the target alone that has not seen validation, for pseudo-labels; it is not judged."""


class Place:
    """An experiment on a store: which images it is about, what each unit is, and the units that are made.

    Args:
        data: a store with train, val and test images of the target, and labelled images of other datasets.
        backbone: a RUN folder, weights, or "random:SIZE".
        out: where everything goes.
        experiment: all parameters.
        device: auto, cpu or cuda.

    Raises:
        ConfigError, UnknownNameError: no such target, no test image of it, or nothing to add.
    """

    def __init__(self, data: Path, backbone: str, out: Path, experiment: Experiment, device: str = "auto") -> None:
        self.base, self.backbone, self.out, self.experiment = Store.open(data), backbone, out, experiment
        self.device = device
        self.digest = backbone if backbone.startswith("random:") else weights_digest(backbone)
        known = sorted(set(self.base.datasets.tolist()))
        if experiment.target not in known:
            raise UnknownNameError("dataset of the store", experiment.target, known)
        self.names = tuple(name for name in known if name != experiment.target)
        self.own = self.base.datasets == experiment.target
        self.test = np.flatnonzero(self.own & (self.base.splits == "test"))
        if not self.names or not len(self.test):
            raise ConfigError(
                f"{data}: expected test images of {experiment.target} and images of other datasets, found "
                f"{len(self.test)} and those of {', '.join(self.names) or 'none'}."
            )

    @cached_property
    def shifted(self) -> Store:
        """The store whose added images come from another scanner; made when it is first asked for."""
        chosen = self.experiment
        key = _digest([self.base.header["index_sha256"], chosen.target, chosen.gamma, chosen.blur])
        path = self.out / "stores" / f"shifted-{key[:12]}"
        if (path / "store.json").exists():
            return Store.open(path)
        mine = path.with_name(f"{path.name}.{os.getpid()}")  # another seed may be at it
        shift_store(self.base, mine, ~self.own, chosen.gamma, chosen.blur)
        try:
            mine.rename(path)
        except OSError:  # it was faster
            shutil.rmtree(mine)
        return Store.open(path)

    def splits(self, share: float, seed: int) -> np.ndarray:
        """Split of every image: of the target those of a share of its patients and all test images; all that is added
        is for training, whatever its own split (as the slides' label augmentation took all of NIH).
        """
        splits = np.where(self.own, self.base.splits, "train")
        for split in ("train", "val"):
            images = np.flatnonzero(self.own & (self.base.splits == split))
            splits[np.setdiff1d(images, keep_patients(self.base, images, share, seed))] = ""
        return splits

    def labels(self, variant: Variant, seed: int) -> np.ndarray:
        """Labels of every image with the faults of a variant."""
        labels = flip_labels(self.base, ~self.own, variant.noise, seed) if variant.noise else self.base.labels
        return unknown_as_negative(labels, ~self.own) if variant.unknown == "negative" else labels

    def epochs(self, unit: Unit, epochs: int) -> int:
        """So many that every unit of one share takes as many steps as one that learns from everything does in `epochs`.

        Otherwise "more images" would also be "more steps", and a head of few images of its own would hardly move.
        """
        splits = self.splits(unit.share, unit.seed)
        everything, own = (splits == "train").sum(), ((splits == "train") & self.own).sum()
        return epochs if unit.variant.added else max(1, round(epochs * float(everything / own)))

    def settings(self, unit: Unit) -> FitConfig:
        """Settings of the fit, without the place of a teacher."""
        config, variant = fit_recipe(self.experiment.recipe, self.experiment.settings), unit.variant
        return replace(
            config, target=self.experiment.target, seed=unit.seed, refit=not unit.teacher,
            datasets=None if variant.added else (self.experiment.target,),
            source_weights=tuple(f"{name}={variant.weight}" for name in self.names if variant.weight != 1.0),
            source_bias=variant.bias, search_epochs=self.epochs(unit, config.search_epochs),
            refit_epochs=self.epochs(unit, config.refit_epochs),
        )  # fmt: skip

    def folder(self, unit: Unit) -> Path:
        """Where a unit of exactly these parameters is."""
        chosen, described = self.experiment, asdict(unit.variant)
        described.pop("name")
        key = _digest([
            described, unit.share, to_dict(self.settings(unit)), self.base.header["index_sha256"], self.digest,
            [chosen.gamma, chosen.blur] if unit.variant.shifted else [], chosen.bootstraps, chosen.bootstrap_seed,
        ])  # fmt: skip
        name = f"{unit.variant.name}-{'teacher' if unit.teacher else 'judged'}"
        return self.out / "units" / f"{unit.share:g}" / name / f"seed{unit.seed}-{key[:12]}"

    def make(self, unit: Unit) -> Path:
        """Fit and judge a unit, unless it is there; its folder."""
        folder = self.folder(unit)
        if (folder / "unit.json").exists():
            return folder
        if folder.exists():
            shutil.rmtree(folder)  # what an interrupted run left
        config = self.settings(unit)
        if unit.variant.pseudo:
            teacher = Unit(ALONE, unit.share, unit.seed, teacher=True)
            config = replace(config, pseudo_labels=self.make(teacher) / "model")
        start, used = time.monotonic(), time.process_time()
        say(f"{folder.relative_to(self.out)}")
        pixels = self.shifted if unit.variant.shifted else self.base
        planted = copy_store(
            pixels, folder / "store", self.labels(unit.variant, unit.seed), self.splits(unit.share, unit.seed)
        )
        fit.run(config, planted.path, self.backbone, folder / "model", self.device)
        shutil.rmtree(planted.path)  # linked, and made from the parameters again if need be
        described = read_config(folder / "model")
        facts: dict[str, Any] = {"unit": asdict(unit), "sources": described["training"]["sources"],
                                 "learning_rate": described["training"]["learning_rate"],
                                 "refit_epochs": described["training"]["refit_epochs"]}  # fmt: skip
        if not unit.teacher:
            predictions = load(folder / "model", self.device).predict_store(
                self.base, self.test, raw=True, batch_size=config.batch_size, workers=config.workers
            )
            result = measure(
                predictions, self.base.labels[self.test], {}, self.experiment.bootstraps, self.experiment.bootstrap_seed
            )
            write_result(folder / "result.npz", result)
            facts["trained"] = int(result.trained.sum())
        seconds = {"seconds": time.monotonic() - start, "processor_seconds": time.process_time() - used}
        write_json(folder / "unit.json", facts | seconds)
        return folder

    def columns(self, results: Sequence[SeedResult]) -> dict[str, list[str]]:
        """Findings of each mean, by set: trained in every one of these results, with enough positives in test.

        Groups are by the share of all training images of the target. shared: some added dataset knows of positives
        and negatives; unshared: none does, so that all that added images can say of it is "unknown".
        """
        base, first = self.base, results[0]
        usable = np.all([result.trained for result in results], axis=0)
        usable &= (first.positives >= self.experiment.minimum_positives) & (first.negatives > 0)
        own = base.labels[self.own & (base.splits == "train")]
        positives = dict(zip(base.findings, (own == 1).sum(axis=0).tolist(), strict=True))
        groups, other = frequency_groups(positives, len(own)), base.labels[~self.own]
        shared = (other == 1).any(axis=0) & (other == 0).any(axis=0)
        sets: dict[str, list[str]] = {"all": [], "head": [], "medium": [], "tail": [], "shared": [], "unshared": []}
        for column in np.flatnonzero(usable).tolist():
            name = base.findings[column]
            for one in ("all", groups[name], "shared" if shared[column] else "unshared"):
                sets[one].append(name)
        return {name: found for name, found in sets.items() if found}


def only(experiment: Experiment, names: Sequence[str]) -> Experiment:
    """Of these variants; shares that have none of them are left out.

    Raises:
        UnknownNameError: a name that no variant has.
    """
    known = [variant.name for variant in experiment.variants[1.0]]
    for name in names:
        if name not in known:
            raise UnknownNameError("variant", name, known)
    kept = {
        share: tuple(one for one in variants if one.name in names) for share, variants in experiment.variants.items()
    }
    return replace(experiment, variants={share: variants for share, variants in kept.items() if variants})


def run(place: Place, name: str = "label_sources") -> dict[str, Any]:
    """Make every unit, seed after seed, and write the table after each; what OUT/NAME.json holds."""
    summary: dict[str, Any] = {}
    for count, seed in enumerate(place.experiment.seeds, start=1):
        for share, variants in place.experiment.variants.items():
            for variant in variants:
                place.make(Unit(variant, share, seed))
        summary = summarise_all(place, place.experiment.seeds[:count])
        write_json(place.out / f"{name}.json", summary)
        write_text(place.out / f"{name}.md", markdown(summary))
    return summary


def summarise_all(place: Place, seeds: Sequence[int]) -> dict[str, Any]:
    """Rows and differences by share, and whether a difference at a smaller share is another than at the largest."""
    chosen, root = place.experiment, place.experiment.bootstrap_seed
    everything = {
        share: {
            variant.name: {seed: read_result(place.make(Unit(variant, share, seed)) / "result.npz") for seed in seeds}
            for variant in variants
        }
        for share, variants in chosen.variants.items()
    }
    shares = []
    for share, rows in everything.items():
        columns = place.columns([result for row in rows.values() for result in row.values()])
        if not columns:
            raise HilumError(
                f"At {share:.0%} of the target no finding was trained in every row with {chosen.minimum_positives} "
                "test positives; there is nothing to compare. Take a larger store."
            )
        shares.append({
            "share": share, "columns": columns,
            "rows": {name: _only(summarise(results, columns, root)) for name, results in rows.items()},
            "facts": {variant.name: [read_json(place.folder(Unit(variant, share, seed)) / "unit.json", HilumError)
                                     for seed in seeds] for variant in chosen.variants[share]},
            "differences": [
                {"first": one, "second": other, "sets": _only(compare(rows[one], rows[other], columns, root))}
                for one, other in chosen.differences if one in rows and other in rows
            ],
        })  # fmt: skip
    return {
        "notice": RESEARCH_NOTICE, "experiment": {**asdict(replace(chosen, variants={})), "seeds": list(seeds)},
        "store": {"name": place.base.path.name, "index_sha256": place.base.header["index_sha256"],
                  "test_images": len(place.test), "test_patients": len(np.unique(place.base.patients[place.test])),
                  "added": {name: int((place.base.datasets == name).sum()) for name in place.names}},
        "backbone": place.digest, "shares": shares, "by_size": _by_size(place, everything),
    }  # fmt: skip


def _by_size(place: Place, everything: Mapping[float, Mapping[str, Mapping[int, SeedResult]]]) -> list[dict[str, Any]]:
    """Each difference at a smaller share minus the same at the largest, over findings trained in all four."""
    largest, found = max(everything), []
    for share, rows in everything.items():
        for one, other in place.experiment.differences:
            if share == largest or not {one, other} <= set(rows) & set(everything[largest]):
                continue
            small, large = (
                {s: _minus(at[one][s], at[other][s]) for s in at[one]} for at in (rows, everything[largest])
            )
            columns = place.columns([*small.values(), *large.values()])
            if columns:
                sets = _only(compare(small, large, columns, place.experiment.bootstrap_seed))
                found.append({"share": share, "first": one, "second": other, "columns": columns, "sets": sets})
    return found


def _minus(one: SeedResult, other: SeedResult) -> SeedResult:
    """The difference of two rows of one seed, as a row."""
    return replace(
        one, trained=one.trained & other.trained, points={k: v - other.points[k] for k, v in one.points.items()},
        samples={k: v - other.samples[k] for k, v in one.samples.items()},
    )  # fmt: skip


def _only(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: entry[METRIC] for name, entry in sets.items()}


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False, default=str).encode()).hexdigest()


def main(words: Sequence[str] | None = None) -> None:
    """Run everything; print the tables."""
    parser = argparse.ArgumentParser(description="When do labelled images of other datasets help?")
    parser.add_argument("data", type=Path, help="a store of several datasets")
    parser.add_argument("backbone", help='a RUN folder, weights, or "random:SIZE"')
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", choices=sorted(SCALES), default="full")
    parser.add_argument("--target", help="the dataset that is judged")
    parser.add_argument("--seeds", help="with commas")
    parser.add_argument("--variants", help="with commas; all without it")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(words)
    experiment = SCALES[given.scale]
    if given.target:
        experiment = replace(experiment, target=given.target)
    if given.seeds:
        experiment = replace(experiment, seeds=tuple(int(seed) for seed in given.seeds.split(",")))
    name = "label_sources"
    if given.variants:
        chosen = given.variants.split(",")
        experiment, name = only(experiment, chosen), "_".join([name, *chosen])
    say(markdown(run(Place(given.data, given.backbone, given.out, experiment, given.device), name)))


if __name__ == "__main__":
    main()
