"""The units of an ablation: a pretrained backbone, a fitted head, its predictions, a row of the table at one seed.
What each needs, is made from, and whether it is there; `ablate_making.py` makes them.

Each unit is a folder, OUT/KIND/NAME/SEED-FINGERPRINT, and is finished when `unit.json`, written last, is there. The
fingerprint is of everything that the unit is made from: its settings, the store, and the outputs of the units before
it. So a killed run goes on with what is there, a changed plan makes other folders for what it changes and nothing
else, and going back to an earlier plan finds the earlier folders. `ablate.py` decides what runs when. A little past 300
lines: what decides what a unit is, in one place.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

import hilum
from hilum.commands import ablate_checkpoint
from hilum.commands.ablate_plan import (
    RANDOM,
    PlannedBackbone,
    ResolvedPlan,
    build_order,
    parent,
)
from hilum.core.config import override, to_dict
from hilum.core.errors import ConfigError, HilumError
from hilum.core.files import read_json, write_json
from hilum.data.labels import frequency_groups
from hilum.data.store import Store
from hilum.deploy.model_files import CONFIG_NAME
from hilum.evaluation.ablation import SeedResult, read_result
from hilum.heads.config import FitConfig
from hilum.pretraining.config import PretrainConfig

FORMAT = "hilum-ablation-unit-1"
UNIT_NAME, LOG_NAME = "unit.json", "log.txt"
RUN, MODEL, TEST, RESULT = "run", "model", "test.parquet", "result.npz"
Kind = Literal["backbones", "heads", "predictions", "rows"]
OUTPUTS: dict[str, str] = {
    "backbones": f"{RUN}/{ablate_checkpoint.WEIGHTS_NAME}", "heads": f"{MODEL}/{CONFIG_NAME}", "predictions": TEST,
    "rows": RESULT,
}  # fmt: skip
"""By kind: the file that a unit is for."""


@dataclass(frozen=True)
class Unit:
    """One piece of work; units are equal when they are the same piece."""

    kind: Kind
    name: str
    seed: int | None
    """None: the same for every seed."""

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}" + ("" if self.seed is None else f" seed {self.seed}")


@dataclass(frozen=True)
class Workplace:
    """A resolved plan, and where it is carried out. Can be sent to another process."""

    resolved: ResolvedPlan
    data: Path
    out: Path
    device: str = "auto"
    _finished: dict[Unit, tuple[Path, dict[str, Any]]] = field(default_factory=dict, compare=False)
    """Folder and record of units that were found finished: from then on they stay so."""

    @cached_property
    def store(self) -> Store:
        """The store."""
        return Store.open(self.data)

    @cached_property
    def test(self) -> np.ndarray:
        """Store indices of the images that are judged."""
        return self._of_target("test")

    @cached_property
    def train(self) -> np.ndarray:
        """Store indices of the target's training images."""
        return self._of_target("train")

    @cached_property
    def validation(self) -> np.ndarray:
        """Store indices of the target's validation images."""
        return self._of_target("val")

    @cached_property
    def test_fingerprint(self) -> str:
        """Identity of the images that are judged."""
        return self.store.fingerprint(self.test)

    @cached_property
    def groups(self) -> dict[str, str]:
        """Head, medium or tail per finding, by its share of the target's training images."""
        labels = self.store.labels[self.train]
        positives = dict(zip(self.store.findings, (labels == 1).sum(axis=0).tolist(), strict=True))
        return frequency_groups(positives, len(labels))

    def _of_target(self, split: str) -> np.ndarray:
        chosen, target = self.store.indices(split), self.resolved.plan.target
        return chosen if target is None else chosen[self.store.datasets[chosen] == target]

    def units(self) -> list[Unit]:
        """Every unit of the plan, each after those that it needs."""
        plan = self.resolved.plan
        units = []
        for backbone in build_order(plan):
            if backbone.weights is None:
                units += [Unit("backbones", backbone.name, seed) for seed in self._backbone_seeds()]
        for seed in plan.seeds:
            units += [Unit("heads", head.name, seed) for head in plan.heads]
            units += [Unit("predictions", head.name, seed) for head in plan.heads]
            units += [Unit("rows", row.name, seed) for row in plan.rows]
        return units

    def _backbone_seeds(self) -> tuple[int | None, ...]:
        plan = self.resolved.plan
        return (None,) if plan.seeds_of == "heads" else plan.seeds

    def needs(self, unit: Unit) -> list[Unit]:
        """The units that one needs directly."""
        plan = self.resolved.plan
        if unit.kind == "backbones":
            before = parent(named(plan.backbones, unit.name))
            return self._backbone_units(before, unit.seed) if before is not None else []
        if unit.kind == "heads":
            return self._backbone_units(named(plan.heads, unit.name).backbone, unit.seed)
        if unit.kind == "predictions":
            return [Unit("heads", unit.name, unit.seed)]
        return [Unit("predictions", head, unit.seed) for head in named(plan.rows, unit.name).heads]

    def _backbone_units(self, name: str, seed: int | None) -> list[Unit]:
        backbone = named(self.resolved.plan.backbones, name)
        if backbone.weights is not None:
            return []
        return [Unit("backbones", name, None if self.resolved.plan.seeds_of == "heads" else seed)]

    def inputs(self, unit: Unit) -> dict[str, Any]:
        """Everything that decides what a unit will be; the units before it are finished.

        Raises:
            HilumError: a unit before it is not finished.
        """
        plan = self.resolved.plan
        before = {str(one): self.record(one)["output"] for one in self.needs(unit)}
        store = {"index": self.store.header["index_sha256"], "preprocess_id": self.store.preprocess_id}
        if unit.kind == "backbones":
            backbone = named(plan.backbones, unit.name)
            origin = self._weights_digest(backbone)
            if backbone.checkpoint_of is not None:
                return {"before": before, "at": backbone.at}
            return {"settings": to_dict(self.pretraining(unit)), "store": store, "before": before | origin}
        if unit.kind == "heads":
            chosen = named(plan.backbones, named(plan.heads, unit.name).backbone)
            settings = to_dict(self.fitting(unit))
            return {"settings": settings, "store": store, "before": before | self._weights_digest(chosen)}
        if unit.kind == "predictions":
            return {"store": store, "images": self.test_fingerprint, "before": before}
        row = named(plan.rows, unit.name)
        models = {head: self.record(Unit("heads", head, unit.seed))["output"] for head in row.heads}
        rule = {"study": row.study, "ensemble": row.ensemble, "calibrated": row.calibrated}
        if row.ensemble == "rank_mean":  # once among the images at hand: such rows are made again
            rule["ranks"] = "validation"
        settings = rule | {"bootstraps": plan.bootstraps, "bootstrap_seed": plan.bootstrap_seed, "target": plan.target}
        return {"settings": settings, "store": store, "before": before, "models": models, "order": list(row.heads)}

    def _weights_digest(self, backbone: PlannedBackbone) -> dict[str, str]:
        """Identity of weights that the plan does not make, its own or those that it starts from."""
        if backbone.init is not None:
            backbone = named(self.resolved.plan.backbones, backbone.init)
        if backbone.weights is None:
            return {}
        if backbone.weights.startswith(RANDOM):
            return {backbone.name: backbone.weights}
        return {backbone.name: ablate_checkpoint.weights_digest(backbone.weights)}

    def pretraining(self, unit: Unit) -> PretrainConfig:
        """Settings of a backbone that is pretrained."""
        config = self.resolved.pretraining[unit.name]
        return config if unit.seed is None else override(config, [f"seed={unit.seed}"])

    def fitting(self, unit: Unit) -> FitConfig:
        """Settings of a head at its seed."""
        return override(self.resolved.fitting[unit.name], [f"seed={unit.seed}"])

    def fingerprint(self, unit: Unit) -> str:
        """Hex SHA-256 of `inputs`."""
        return _fingerprint(self.inputs(unit))

    def folder(self, unit: Unit) -> Path:
        """Where a unit of these inputs is made."""
        if unit in self._finished:
            return self._finished[unit][0]
        return self._folder(unit, self.fingerprint(unit))

    def _folder(self, unit: Unit, fingerprint: str) -> Path:
        seed = "once" if unit.seed is None else f"seed{unit.seed}"
        return self.out / unit.kind / unit.name / f"{seed}-{fingerprint[:12]}"

    def is_finished(self, unit: Unit) -> bool:
        """Whether the unit, of exactly these inputs, is there."""
        if unit in self._finished:
            return True
        if not all(self.is_finished(one) for one in self.needs(unit)):
            return False
        folder = self.folder(unit)
        if not (folder / UNIT_NAME).is_file() or not (folder / OUTPUTS[unit.kind]).is_file():
            return False
        self._finished[unit] = folder, read_json(folder / UNIT_NAME, HilumError)
        return True

    def record(self, unit: Unit) -> dict[str, Any]:
        """What `unit.json` of a finished unit holds.

        Raises:
            HilumError: it is not finished.
        """
        if not self.is_finished(unit):
            raise HilumError(f"{unit} is not finished.")
        return self._finished[unit][1]

    def changed(self, unit: Unit) -> list[str]:
        """What differs from the latest earlier unit of this name and seed; nothing where there is none.

        The units that it needs are finished.
        """
        inputs, here = self.inputs(unit), self.folder(unit)
        seed = here.name.partition("-")[0]
        found = [path for path in here.parent.glob(f"{seed}-*/{UNIT_NAME}") if path.parent != here]
        if not found:
            return []
        latest = max(found, key=lambda path: path.stat().st_mtime)
        return _differences(read_json(latest, HilumError).get("inputs", {}), inputs)

    def finish(self, unit: Unit, folder: Path, output: str, seconds: float, **extra: Any) -> None:
        """Write the last file of a unit; from here on it is finished.

        Args:
            unit: the unit.
            folder: where it was made.
            output: identity of what was made, for the units that need it.
            seconds: that it took.
            extra: whatever else is worth keeping.
        """
        inputs = self.inputs(unit)
        record = {
            "format": FORMAT,
            "kind": unit.kind,
            "name": unit.name,
            "seed": unit.seed,
            "fingerprint": _fingerprint(inputs),
            "inputs": inputs,
            "output": output,
            "seconds": round(seconds, 2),
            "hilum": hilum.__version__,
            **extra,
        }
        write_json(folder / UNIT_NAME, record)
        self._finished[unit] = folder, record

    def backbone_path(self, name: str, seed: int | None) -> str:
        """What `hilum fit --backbone` and `hilum pretrain --init` take."""
        backbone = named(self.resolved.plan.backbones, name)
        if backbone.weights is not None:
            return backbone.weights
        return str(self.folder(self._backbone_units(name, seed)[0]) / RUN)

    def model_path(self, head: str, seed: int) -> Path:
        """The model of a head at a seed."""
        return self.folder(Unit("heads", head, seed)) / MODEL

    def result(self, row: str, seed: int) -> SeedResult:
        """The measured numbers of a finished row."""
        return read_result(self.folder(Unit("rows", row, seed)) / RESULT)


def named(parts: Any, name: str) -> Any:
    """The part of a plan of that name."""
    return next(part for part in parts if part.name == name)


def _fingerprint(inputs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """`key: old -> new` for every entry that differs, settings by their names."""
    lines = []
    for key in sorted({*old, *new}):
        before, after, name = old.get(key), new.get(key), f"{where}{key}"
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += _differences(before, after, "" if key == "settings" else f"{name}.")
        elif where.startswith("before.") or where.startswith(("store.", "models.")):
            lines.append(f"{name} is another one")
        else:
            lines.append(f"{name}: {before} -> {after}")
    return lines


def refuse_missing_splits(place: Workplace) -> None:
    """An ablation needs images to judge on.

    Raises:
        ConfigError: no test images (of the target).
    """
    if not len(place.test):
        target = place.resolved.plan.target
        raise ConfigError(
            f"{place.data} has no test images{f' of {target}' if target else ''} (split 'test'); rows are judged on "
            "them alone. Make the manifest again with a test split."
        )
