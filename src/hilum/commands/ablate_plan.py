"""The plan of an ablation: backbones, heads on them, rows of the table made from those, seeds and tasks.

A plan is data: dataclasses here, YAML on disk (`core/config.py`), the built-in ones in `plans.py`, which also turns
names of recipes into settings. `check` reads a plan whole, before anything runs; `ablate.py` runs it. Past 300 lines:
every part of a plan, and every way in which one can be wrong.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.data.labels import TASKS
from hilum.evaluation.ensemble import ENSEMBLES
from hilum.evaluation.study_rules import StudyRule
from hilum.heads.config import FitConfig
from hilum.pretraining.config import PretrainConfig

ALL = "all"
"""The task of every finding of the store."""
RANDOM = "random:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class PlannedBackbone:
    """Where a backbone comes from: exactly one of `recipe`, `weights`, `checkpoint_of`."""

    name: str
    """Letters, digits, `_ . -`; the name of a folder."""
    recipe: str | None = None
    """Pretrain with this recipe, or the `config.yaml` at this path."""
    overrides: tuple[str, ...] = ()
    """`key=value`, of the recipe."""
    init: str | None = None
    """Another backbone of the plan that the recipe starts from."""
    weights: str | None = None
    """Nothing to pretrain: a RUN folder, weights, or "random:SIZE"."""
    checkpoint_of: str | None = None
    """Another backbone of the plan, as it was part of the way."""
    at: float | None = None
    """Which part of the way of `checkpoint_of`, between 0 and 1."""


@dataclass(frozen=True)
class PlannedHead:
    """A head on a backbone, fitted once per seed."""

    name: str
    """Letters, digits, `_ . -`; the name of a folder."""
    backbone: str
    """A backbone of the plan."""
    recipe: str = "decoder"
    """A recipe of `hilum fit`, or the `config.yaml` at this path."""
    overrides: tuple[str, ...] = ()
    """`key=value`, of the recipe."""
    every_dataset: bool = False
    """Also train on datasets of the store other than the plan's `target` (label augmentation)."""


@dataclass(frozen=True)
class PublishedNumber:
    """What others have reported for a row; on other data, so that levels cannot be compared."""

    task: str
    """A task of the plan."""
    value: float
    """mAP, in [0, 1]."""


@dataclass(frozen=True)
class PlannedRow:
    """A row of the table: one head or several, and what becomes of their predictions."""

    name: str
    """Letters, digits, `_ . -`; the name of a folder."""
    heads: tuple[str, ...]
    """One head of the plan; or several, an ensemble."""
    title: str = ""
    """What people read; the name, if empty."""
    study: str | None = None
    """A rule of `evaluation.study_rules` as text (mean, frontal_weighted:0.8, learned); None: each image by itself."""
    ensemble: str = "mean"
    """A key of `evaluation.ensemble.ENSEMBLES`, for several heads."""
    calibrated: bool = False
    """Judge calibrated probabilities; F1@tuned has thresholds from validation in any case."""
    against: tuple[str, ...] = ()
    """Rows that this one is compared with, paired by patient and seed."""
    published: tuple[PublishedNumber, ...] = ()
    """Reported numbers, shown beside."""
    stands_for: str = ""
    """What the published numbers belong to, in words."""
    note: str = ""
    """A sentence for the reader."""

    @property
    def label(self) -> str:
        """Title, or name."""
        return self.title or self.name


@dataclass(frozen=True)
class AblationPlan:
    """Everything that an ablation does, fixed before it runs. Nothing in it is chosen on test."""

    name: str
    """Of the plan."""
    backbones: tuple[PlannedBackbone, ...]
    """Pretrained once, in the order that `init` asks for."""
    heads: tuple[PlannedHead, ...]
    """Fitted once per seed."""
    rows: tuple[PlannedRow, ...]
    """Of the table, in order."""
    title: str = ""
    """Heading of the report."""
    note: str = ""
    """What the plan asks, in words."""
    seeds: tuple[int, ...] = (0,)
    """Of heads."""
    seeds_of: Literal["heads", "everything"] = "heads"
    """everything: pretraining runs once per seed too."""
    tasks: tuple[str, ...] = (ALL,)
    """Sets of columns that are averaged: keys of `data.labels.TASKS`, or all."""
    target: str | None = None
    """The dataset of the store that is judged and selected on, and that heads without `every_dataset` are trained on;
    None: all of them."""
    bootstraps: int = 1000
    """Resamples of patients and seeds for the intervals."""
    bootstrap_seed: int = 0
    """Root of the resamples."""
    minimum_positives: int = 10
    """Findings with fewer test positives stay out of the means, and are listed."""
    published_by: str = ""
    """Whose numbers the rows carry as published."""
    scale: str = "as written"
    """full, laptop, or as written."""
    scale_note: str = ""
    """What a smaller scale changes, in words; goes into every result."""


@dataclass(frozen=True)
class ResolvedPlan:
    """A checked plan with every recipe turned into settings (`plans.resolve`)."""

    plan: AblationPlan
    pretraining: dict[str, PretrainConfig]
    """By backbone, of those with a recipe."""
    fitting: dict[str, FitConfig]
    """By head; the seed is set when it is fitted."""


def check(plan: AblationPlan) -> None:
    """Read a plan whole: names, references, cycles, duplicates, ranges.

    Raises:
        ConfigError: says which part and what is wrong.
        UnknownNameError: a reference to something that is not there, with the nearest name.
    """
    backbones = _unique("backbones", [one.name for one in plan.backbones])
    heads = _unique("heads", [one.name for one in plan.heads])
    rows = _unique("rows", [one.name for one in plan.rows])
    if not rows:
        raise ConfigError("rows: expected at least one.")
    for backbone in plan.backbones:
        _check_backbone(backbone, backbones)
    build_order(plan)
    for head in plan.heads:
        _known(f"backbone of head {head.name!r}", head.backbone, backbones)
    for row in plan.rows:
        _check_row(row, plan, heads, rows)
    for name in ("seeds", "tasks"):
        values = getattr(plan, name)
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{name}: expected one or more, all different, found {list(values)}.")
    if min(plan.seeds) < 0:
        raise ConfigError(f"seeds: expected 0 or more, found {list(plan.seeds)}.")
    for task in plan.tasks:
        _known("task", task, (*TASKS, ALL))
    for name in ("bootstraps", "minimum_positives"):
        if getattr(plan, name) < 0:
            raise ConfigError(f"{name}: expected 0 or more, found {getattr(plan, name)}.")


def build_order(plan: AblationPlan) -> list[PlannedBackbone]:
    """The backbones, each after the one that it starts from.

    Raises:
        ConfigError: backbones that start from each other, in a circle.
    """
    by_name = {backbone.name: backbone for backbone in plan.backbones}
    order: dict[str, PlannedBackbone] = {}
    for backbone in plan.backbones:
        chain = [backbone.name]
        while (before := parent(by_name[chain[-1]])) is not None:
            if before in chain:
                raise ConfigError(f"backbones: {' <- '.join([*chain, before])} start from each other.")
            chain.append(before)
        order |= {name: by_name[name] for name in reversed(chain)}
    return list(order.values())


def parent(backbone: PlannedBackbone) -> str | None:
    """The backbone that this one needs first."""
    return backbone.init or backbone.checkpoint_of


def checkpoint_step(config: PretrainConfig, at: float) -> int:
    """The step that lies part of the way of a run."""
    return round(config.steps * at)


def keep_rows(plan: AblationPlan, names: Sequence[str]) -> AblationPlan:
    """The plan with these rows only, compared among themselves.

    Raises:
        UnknownNameError: no such row.
    """
    known = [row.name for row in plan.rows]
    for name in names:
        _known("row", name, known)
    rows = (row for row in plan.rows if row.name in names)
    return replace(
        plan, rows=tuple(replace(row, against=tuple(one for one in row.against if one in names)) for row in rows)
    )


def needed(plan: AblationPlan) -> AblationPlan:
    """The plan without heads and backbones that no row needs."""
    used = {head for row in plan.rows for head in row.heads}
    heads = tuple(head for head in plan.heads if head.name in used)
    by_name = {backbone.name: backbone for backbone in plan.backbones}
    wanted: set[str] = set()
    for head in heads:
        name: str | None = head.backbone
        while name is not None:
            wanted.add(name)
            name = parent(by_name[name])
    return replace(plan, heads=heads, backbones=tuple(one for one in plan.backbones if one.name in wanted))


def with_backbones(plan: AblationPlan, given: Iterable[str]) -> AblationPlan:
    """The plan with weights in place of pretraining, from texts `NAME=WEIGHTS`.

    Raises:
        ConfigError: not of that form.
        UnknownNameError: no such backbone in the plan.
    """
    backbones = {backbone.name: backbone for backbone in plan.backbones}
    for text in given:
        name, separator, weights = text.partition("=")
        if not separator or not weights:
            raise ConfigError(f"--backbone: expected NAME=RUN, as in {next(iter(backbones))}=runs/ssl, found {text!r}.")
        _known("backbone of the plan", name, backbones)
        backbones[name] = PlannedBackbone(name, weights=weights)
    return replace(plan, backbones=tuple(backbones.values()))


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Errors inside say which part of the plan it is."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_backbone(backbone: PlannedBackbone, names: Sequence[str]) -> None:
    where = f"backbone {backbone.name!r}"
    origins = [name for name in ("recipe", "weights", "checkpoint_of") if getattr(backbone, name)]
    if len(origins) != 1:
        raise ConfigError(
            f"{where}: expected exactly one of recipe, weights and checkpoint_of, found {', '.join(origins) or 'none'}."
        )
    if origins != ["recipe"] and (backbone.overrides or backbone.init):
        raise ConfigError(f"{where}: overrides and init belong to a recipe, and it has none.")
    if (backbone.at is None) != (backbone.checkpoint_of is None) or not 0 < (backbone.at or 0.5) < 1:
        raise ConfigError(f"{where}: checkpoint_of needs at, a part of its run between 0 and 1; found {backbone.at}.")
    if (before := parent(backbone)) is not None:
        _known(f"{'init' if backbone.init else 'checkpoint_of'} of {where}", before, names)


def _check_row(row: PlannedRow, plan: AblationPlan, heads: Sequence[str], rows: Sequence[str]) -> None:
    where = f"row {row.name!r}"
    if not row.heads or len(set(row.heads)) < len(row.heads):
        raise ConfigError(f"heads of {where}: expected one or more, all different, found {list(row.heads)}.")
    for name in row.heads:
        _known(f"head of {where}", name, heads)
    if row.study is not None:
        with naming(where):
            StudyRule.parse(row.study)
    _known(f"ensemble of {where}", row.ensemble, ENSEMBLES)
    for name in row.against:
        _known(f"row that {where} is compared with", name, rows)
    if row.name in row.against or len(set(row.against)) < len(row.against):
        raise ConfigError(f"against of {where}: expected other rows, each once, found {list(row.against)}.")
    for number in row.published:
        _known(f"task of a published number of {where}", number.task, plan.tasks)
        if not 0 <= number.value <= 1:
            raise ConfigError(f"{where}: a published mAP is in [0, 1], found {number.value}.")
    if len({number.task for number in row.published}) < len(row.published):
        raise ConfigError(f"{where}: two published numbers for one task.")


def _unique(kind: str, names: Sequence[str]) -> list[str]:
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{kind}: {name!r} is no name; expected letters, digits, `_`, `.` and `-`.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"{kind}: {', '.join(map(repr, repeated))} is there more than once; names are unique.")
    return list(names)


def _known(kind: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        raise UnknownNameError(kind, name, known)
