"""The built-in plans of `hilum ablate`: which rows, at which scale, beside which published numbers.

Plans name recipes, so they stand above `recipes.py`, and `cli.py` hands them to the program. Everything here is data:
each plan says what it asks, and at laptop scale, what stands for what. `resolve` turns recipes into settings, so that
a wrong name or setting is found before anything runs. Past 300 lines: every row of every plan is spelled out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from hilum.commands.ablate_plan import (
    ALL,
    AblationPlan,
    PlannedBackbone,
    PlannedHead,
    PlannedRow,
    PublishedNumber,
    ResolvedPlan,
    check,
    checkpoint_step,
    keep_rows,
    naming,
    needed,
    with_backbones,
)
from hilum.core.config import override, read_yaml, to_dict
from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.tracking import say
from hilum.data.store import Store
from hilum.evaluation.study_rules import AGGREGATIONS
from hilum.heads.config import FitConfig
from hilum.heads.losses import LOSSES
from hilum.pretraining.config import PretrainConfig
from hilum.recipes import fit_recipe, pretrain_recipe

SLIDES = "CXR-LT 2024 slides, development set"
TASK1, TASK2 = "cxrlt2024-task1", "cxrlt2024-task2"


@dataclass(frozen=True)
class Scale:
    """How large the roles of a plan are: two sizes of backbone at four resolutions, and two heads."""

    name: str
    note: str
    """What is not as published, in words."""
    backbones: tuple[PlannedBackbone, ...]
    """vitb_224, vitb_336, vitl_224, vitl_336, vitl_448, vitl_512: roles, which at a smaller scale others play."""
    titles: dict[str, str]
    """By backbone: what it is."""
    linear: tuple[str, tuple[str, ...]]
    """Recipe and overrides."""
    decoder: tuple[str, tuple[str, ...]]
    """Recipe and overrides."""


def _laptop_backbone(
    name: str, architecture: str, size: int, local: int, init: str | None, steps: int, *overrides: str
) -> PlannedBackbone:
    changes = (
        f"architecture={architecture}", f"crops.global_size={size}", f"crops.local_size={local}", f"steps={steps}",
        "probe.every=0",
    )  # fmt: skip
    later = ("learning_rate=1e-3", "batch_size=32") if init else ()
    return PlannedBackbone(name, "laptop_128", (*changes, *later, *overrides), init)


_FITTED_SMALL = ("batch_size=32", "search_epochs=10", "refit_epochs=10", "augmented_views=2", "flip_average=false",
                 "threads=1", "precision=bf16")  # fmt: skip
SCALES: dict[str, Scale] = {
    "full": Scale(
        "full",
        "",
        (
            PlannedBackbone("vitb_224", "slides_vitb16_224"),
            # 2 epochs of the slides' 25,000 iterations apart, so that epoch 50 is among the checkpoints that are kept
            PlannedBackbone("vitb_336", "slides_vitb16_336", ("checkpoint_every=50000", "keep=30"), "vitb_224"),
            PlannedBackbone("vitl_224", "slides_vitl16_224"),
            PlannedBackbone("vitl_336", "slides_vitl16_336", (), "vitl_224"),
            PlannedBackbone("vitl_448", "slides_vitl16_448", (), "vitl_224"),
            PlannedBackbone("vitl_512", "slides_vitl16_512", (), "vitl_224"),
        ),
        {f"vit{size}_{side}": f"ViT-{size.upper()}/16 @{side}" for size in "bl" for side in (224, 336, 448, 512)},
        ("slides_linear", ()),
        ("slides_decoder", ()),
    ),
    "laptop": Scale(
        "laptop",
        "Laptop scale: a network of 4 blocks of 128 channels stands for ViT-B/16 and one of 6 blocks of 192 channels "
        "for ViT-L/16; 96, 128, 160 and 192 pixels stand for 224, 336, 448 and 512. Pretraining has hundreds of steps "
        "in place of 2,500,000, heads are fitted in batches of 32 on features of 2 stored views in bfloat16, the "
        "decoder is 64 channels wide and reads 2 blocks, 3 of the nine learning rates are tried for it, and the "
        "stopping epoch comes from validation. Orderings can be compared with the published ones; levels cannot.",
        (
            _laptop_backbone("vitb_224", "demo16", 96, 48, None, 400),
            _laptop_backbone("vitb_336", "demo16", 128, 48, "vitb_224", 40, "checkpoint_every=20", "keep=3"),
            _laptop_backbone("vitl_224", "mini16", 96, 48, None, 400),
            _laptop_backbone("vitl_336", "mini16", 128, 48, "vitl_224", 40),
            _laptop_backbone("vitl_448", "mini16", 160, 64, "vitl_224", 40),
            _laptop_backbone("vitl_512", "mini16", 192, 96, "vitl_224", 40),
        ),
        {
            "vitb_224": "4 x 128 @96", "vitb_336": "4 x 128 @128", "vitl_224": "6 x 192 @96",
            "vitl_336": "6 x 192 @128", "vitl_448": "6 x 192 @160", "vitl_512": "6 x 192 @192",
        },
        ("laptop_linear", ("patch_mean=false", *_FITTED_SMALL)),
        (
            "laptop_decoder",
            (
                *_FITTED_SMALL, "blocks=2", "decoder_dim=64", "decoder_feed_forward=128",
                "learning_rates=[1e-3, 2e-3, 5e-3]",
            ),
        ),
    ),
}  # fmt: skip
"""full: the slides' recipes. laptop: the same plan in minutes a seed on 2 cores and a few thousand images."""


def _head(
    scale: Scale, kind: str, backbone: str, name: str, overrides: Sequence[str] = (), every: bool = False
) -> PlannedHead:
    recipe, base = scale.linear if kind == "linear" else scale.decoder
    return PlannedHead(name, backbone, recipe, (*base, *overrides), every)


def slides(scale: Scale, target: str | None, datasets: Sequence[str]) -> AblationPlan:
    """The 13 rows of the CXR-LT 2024 slides, for tasks 1 and 2; "linear, epoch 50" in both readings."""
    epochs = ("search_epochs=50", "refit_epochs=50", "stop_epoch=50")
    alone = len(datasets) < 2
    middle = PlannedBackbone("vitb_336_half", checkpoint_of="vitb_336", at=0.5)
    heads = (
        _head(scale, "linear", "vitb_224", "b224_linear"),
        _head(scale, "linear", "vitb_336", "b336_linear"),
        _head(scale, "linear", "vitb_336", "b336_linear_50", epochs),
        _head(scale, "linear", "vitb_336_half", "b336_half_linear"),
        _head(scale, "linear", "vitl_224", "l224_linear"),
        _head(scale, "linear", "vitl_336", "l336_linear"),
        _head(scale, "linear", "vitl_336", "l336_concat", ("views=concat",)),
        _head(scale, "decoder", "vitl_336", "l336_decoder"),
        *(() if alone else (_head(scale, "decoder", "vitl_336", "l336_decoder_added", every=True),)),
        _head(scale, "decoder", "vitl_448", "l448_decoder_added", every=True),
        _head(scale, "decoder", "vitl_512", "l512_decoder_added", every=True),
    )
    b224, b336, l224, l336, l448, l512 = (scale.titles[backbone.name] for backbone in scale.backbones)
    added = (f"l336_decoder{'' if alone else '_added'}", "l448_decoder_added", "l512_decoder_added")
    one = "No labels could be added: the store has one dataset. Only the resolution tells these rows apart."
    without = one if alone else ""

    def row(
        name: str, heads: Sequence[str], title: str, original: str, one: float, two: float,
        against: Sequence[str] = (), study: str | None = None, note: str = "",
    ) -> PlannedRow:  # fmt: skip
        published = (PublishedNumber(TASK1, one), PublishedNumber(TASK2, two))
        return PlannedRow(
            name, tuple(heads), title, study, against=tuple(against), published=published, stands_for=original,
            note=note,
        )  # fmt: skip

    rows = (
        row("b224_linear", ["b224_linear"], f"{b224}, linear", "ViT-B @224, linear", 0.1795, 0.2585),
        row("b336_linear", ["b336_linear"], f"{b336}, linear", "ViT-B @336, linear", 0.1852, 0.2649, ["b224_linear"]),
        row(
            "b336_linear_50", ["b336_linear_50"], f"{b336}, linear, 50 epochs of the head",
            "ViT-B @336, linear, epoch 50", 0.1842, 0.2642, ["b336_linear"],
            note="One reading of the slides' epoch 50: the head is trained for 50 epochs in place of 10.",
        ),
        row(
            "b336_half_linear", ["b336_half_linear"], f"{b336} at half of pretraining, linear",
            "ViT-B @336, linear, epoch 50", 0.1842, 0.2642, ["b336_linear"],
            note="The other reading of the slides' epoch 50: the checkpoint of epoch 50 of 100 of pretraining.",
        ),
        row("l224_linear", ["l224_linear"], f"{l224}, linear", "ViT-L @224, linear", 0.1798, 0.2605, ["b224_linear"]),
        row(
            "l336_linear", ["l336_linear"], f"{l336}, linear", "ViT-L @336, linear", 0.1922, 0.2766,
            ["l224_linear", "b336_linear"],
        ),
        row(
            "l336_linear_average", ["l336_linear"], f"{l336}, linear, study average", "ViT-L @336, average, linear",
            0.2031, 0.2896, ["l336_linear"], "mean",
        ),
        row(
            "l336_concat", ["l336_concat"], f"{l336}, linear on two views", "ViT-L @336, [CLS] concat, linear",
            0.1943, 0.2801, ["l336_linear", "l336_linear_average"],
        ),
        row(
            "l336_decoder", ["l336_decoder"], f"{l336}, decoder", "ViT-L @336, decoder", 0.2311, 0.3194,
            ["l336_linear"],
        ),
        row(
            "l336_decoder_average", ["l336_decoder"], f"{l336}, decoder, study average",
            "ViT-L @336, average, decoder", 0.2449, 0.3330, ["l336_decoder", "l336_linear_average"], "mean",
        ),
        row(
            "l336_added", [added[0]], f"{l336}, labels added, decoder, study average",
            "ViT-L @336, label aug., multiview, decoder", 0.235, 0.323, ["l336_decoder_average"], "mean", without,
        ),
        row(
            "l448_added", [added[1]], f"{l448}, labels added, decoder, study average",
            "ViT-L @448, label aug., multiview, decoder", 0.236, 0.323, ["l336_added"], "mean", without,
        ),
        row(
            "l512_added", [added[2]], f"{l512}, labels added, decoder, study average",
            "ViT-L @512, label aug., multiview, decoder", 0.259, 0.342, ["l336_added", "l448_added"], "mean", without,
        ),
        row(
            "ensemble", added, "Ensemble of the last three", "Ensemble of the last three", 0.271, 0.354,
            ["l512_added"], "mean",
        ),
    )  # fmt: skip
    return AblationPlan(
        "slides", (*scale.backbones, middle), heads, rows, "The rows of the CXR-LT 2024 slides",
        "Every configuration that the slides report, with one protocol, on one store; task 2 is 26 columns of the "
        "outputs of task 1.",
        tasks=(TASK1, TASK2), target=target, published_by=SLIDES, scale=scale.name, scale_note=scale.note,
    )  # fmt: skip


def _backbone_of(scale: Scale, name: str = "vitl_336") -> tuple[PlannedBackbone, ...]:
    """That backbone, and what it starts from."""
    by_name = {backbone.name: backbone for backbone in scale.backbones}
    chosen = by_name[name]
    return (by_name[chosen.init], chosen) if chosen.init else (chosen,)


def losses(scale: Scale, target: str | None, datasets: Sequence[str]) -> AblationPlan:
    """Every loss, and class-aware sampling, against masked BCE: overall and by head, medium and tail."""
    base = "masked_bce_mean"
    names = [base, *sorted(name for name in LOSSES if name != base)]
    heads = [_head(scale, "decoder", "vitl_336", name, (f"loss={name}",)) for name in names]
    heads.append(_head(scale, "decoder", "vitl_336", "class_aware", (f"loss={base}", "sampling=class_aware")))
    titles = {base: "masked BCE, mean over known labels", "class_aware": "masked BCE, rare findings drawn more often"}
    rows = [
        PlannedRow(head.name, (head.name,), titles.get(head.name, head.name.replace("_", " ")),
                   against=() if head.name == base else (base,))
        for head in heads
    ]  # fmt: skip
    return AblationPlan(
        "losses", _backbone_of(scale), tuple(heads), tuple(rows), "Losses for the long tail",
        "Does a loss made for rare findings raise their average precision, and what does it cost the common ones? One "
        "decoder, one backbone; each loss against masked BCE.",
        tasks=(ALL,), target=target, scale=scale.name, scale_note=scale.note,
    )  # fmt: skip


def labels(scale: Scale, target: str | None, datasets: Sequence[str]) -> AblationPlan:
    """Labelled images of other datasets, each source by itself and all of them, against none."""
    if target is None or not (others := [name for name in datasets if name != target]):
        raise ConfigError(
            "The plan `labels` adds labelled images of other datasets to those of the target: it needs a store with "
            f"several datasets and --target; this one has {', '.join(datasets) or 'none'}."
        )
    heads = [_head(scale, "decoder", "vitl_336", "none")]
    rows = [PlannedRow("none", ("none",), f"{target} alone")]
    for name in others:
        heads.append(_head(scale, "decoder", "vitl_336", f"with_{name}", (f"datasets=[{target}, {name}]",)))
        rows.append(PlannedRow(f"with_{name}", (f"with_{name}",), f"with {name}", against=("none",)))
    if len(others) > 1:
        heads.append(_head(scale, "decoder", "vitl_336", "with_all", every=True))
        rows.append(PlannedRow("with_all", ("with_all",), "with all of them", against=("none",)))
    return AblationPlan(
        "labels", _backbone_of(scale), tuple(heads), tuple(rows), "Labels from other datasets",
        f"Do labelled images of other datasets, unknown findings masked, help on {target}?",
        tasks=(ALL,), target=target, scale=scale.name, scale_note=scale.note,
    )  # fmt: skip


def study(scale: Scale, target: str | None, datasets: Sequence[str]) -> AblationPlan:
    """Single images against every way to use the other images of a study."""
    consistent = ("consistency=0.1", "consistency=1.0")
    heads = (
        _head(scale, "decoder", "vitl_336", "decoder"),
        *(_head(scale, "decoder", "vitl_336", f"consistency_{text.partition('=')[2]}", (text,)) for text in consistent),
        _head(scale, "decoder", "vitl_336", "memory", ("views=memory",)),
        _head(scale, "decoder", "vitl_336", "attention", ("views=attention",)),
        _head(scale, "linear", "vitl_336", "linear"),
        _head(scale, "linear", "vitl_336", "concat", ("views=concat",)),
        _head(scale, "linear", "vitl_336", "set", ("views=set",)),
    )
    rules = [name for name in AGGREGATIONS if name != "mean"]
    rows = [
        PlannedRow("single", ("decoder",), "decoder, each image by itself"),
        PlannedRow("mean", ("decoder",), "decoder, study mean", "mean", against=("single",)),
        *(
            PlannedRow(f"rule_{name}", ("decoder",), f"decoder, study rule {name}", name, against=("mean", "single"))
            for name in rules
        ),
        *(
            PlannedRow(name, (name,), f"decoder, consistency {name.partition('_')[2]}", against=("single",))
            for name in (head.name for head in heads)
            if name.startswith("consistency_")
        ),
        *(
            PlannedRow(f"{name}_mean", (name,), f"decoder, consistency {name.partition('_')[2]}, study mean", "mean",
                       against=("mean",))
            for name in (head.name for head in heads)
            if name.startswith("consistency_")
        ),
        PlannedRow("memory", ("memory",), "multi-view decoder, one memory of all images", against=("single", "mean")),
        PlannedRow("attention", ("attention",), "decoder, learned attention over images", against=("single", "mean")),
        PlannedRow("linear", ("linear",), "linear, each image by itself"),
        PlannedRow("linear_mean", ("linear",), "linear, study mean", "mean", against=("linear",)),
        PlannedRow("concat", ("concat",), "linear on two views", against=("linear", "linear_mean")),
        PlannedRow("set", ("set",), "linear on the set of views", against=("linear", "linear_mean", "concat")),
    ]  # fmt: skip
    return AblationPlan(
        "study", _backbone_of(scale), heads, tuple(rows), "The images of a study together",
        "What do the other images of a study add, by averaging, by training for consistency, or inside the head?",
        tasks=(ALL,), target=target, scale=scale.name, scale_note=scale.note,
    )  # fmt: skip


Builder = Callable[[Scale, str | None, Sequence[str]], AblationPlan]
PLANS: dict[str, Builder] = {plan.__name__: plan for plan in (slides, losses, labels, study)}
"""Built-in plans; each is given the scale, the target dataset and all datasets of the store."""


def find_plan(
    name: str,
    scale: str | None = None,
    target: str | None = None,
    datasets: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> AblationPlan:
    """The built-in plan of that name, or the YAML file at that path, checked.

    Args:
        name: a key of `PLANS`, or a path that ends in .yaml or .yml.
        scale: full or laptop, for built-in plans; None: full.
        target: the dataset that is judged; None: as the plan says.
        datasets: all datasets of the store.
        overrides: `key=value` of the plan's own settings (seeds, bootstraps, ...).

    Raises:
        ConfigError: the plan cannot be read, or is wrong; a scale for a file, or as a setting of a built-in plan;
            several datasets and no target.
        UnknownNameError: no such plan, scale, dataset or setting.
    """
    if name.endswith((".yaml", ".yml")):
        if scale is not None:
            raise ConfigError(f"{name} runs as it is written; --scale is for built-in plans ({', '.join(PLANS)}).")
        plan = read_yaml(AblationPlan, Path(name))
        plan = replace(plan, target=target) if target else plan
    else:
        if name not in PLANS:
            raise UnknownNameError("plan", name, PLANS)
        size = scale or "full"
        if size not in SCALES:
            raise UnknownNameError("scale", size, SCALES)
        for text in overrides:
            if text.partition("=")[0] in ("scale", "scale_note"):  # of a built plan they are only what it is called
                raise ConfigError(f"{text}: the scale of a built-in plan is an option; say --scale laptop, or full.")
        plan = PLANS[name](SCALES[size], target, datasets)
    plan = override(plan, overrides)
    check(plan)
    if plan.target is not None and datasets and plan.target not in datasets:
        raise UnknownNameError("dataset of the store", plan.target, datasets)
    if plan.target is None and len(datasets) > 1 and any(head.every_dataset for head in plan.heads):
        raise ConfigError(
            f"Some rows of {plan.name!r} are trained on added datasets and others are not; the store has "
            f"{', '.join(datasets)}. Say which one is judged: --target {datasets[0]}."
        )
    return plan


def resolve(plan: AblationPlan) -> ResolvedPlan:
    """Turn recipes into settings; every name and setting is looked up before anything runs.

    Raises:
        ConfigError: a recipe or a setting does not exist or is out of range; names the part of the plan.
    """
    check(plan)
    pretraining, fitting = {}, {}
    for backbone in plan.backbones:
        if backbone.recipe is not None:
            with naming(f"backbone {backbone.name!r}"):
                pretraining[backbone.name] = pretrain_recipe(backbone.recipe, backbone.overrides)
    for head in plan.heads:
        changes = list(head.overrides)
        if plan.target is not None:
            named = {text.partition("=")[0] for text in changes}
            changes += [f"target={plan.target}"] if "target" not in named else []
            changes += [f"datasets=[{plan.target}]"] if not head.every_dataset and "datasets" not in named else []
        with naming(f"head {head.name!r}"):
            fitting[head.name] = fit_recipe(head.recipe, changes)
            _check_head(fitting[head.name], changes)
    for backbone in plan.backbones:
        if backbone.checkpoint_of is not None and backbone.at is not None:
            _check_kept(backbone, pretraining)
    return ResolvedPlan(plan, pretraining, fitting)


def carry_out(
    name: str,
    overrides: Sequence[str],
    data: Path,
    out: Path,
    scale: str | None = None,
    target: str | None = None,
    only: Sequence[str] = (),
    backbones: Sequence[str] = (),
    workers: int = 1,
    device: str = "auto",
    show: bool = False,
) -> None:
    """What `hilum ablate` does with its options: find the plan, look everything up, run it.

    Args:
        name: as for `find_plan`; so for the next, scale and target.
        overrides: `key=value`, of the plan.
        data: store.
        out: folder of the results.
        scale: full or laptop.
        target: the dataset that is judged.
        only: rows to keep; all if empty.
        backbones: `NAME=WEIGHTS`, in place of pretraining.
        workers: heads made side by side.
        device: auto, cpu or cuda.
        show: print the plan and run nothing.

    Raises:
        ConfigError: anything in the plan that is wrong.
        HilumError: units that failed, after everything else was made.
    """
    from hilum.commands import ablate

    datasets = sorted(set(Store.open(data).datasets.tolist()))
    plan = find_plan(name, scale, target, datasets, overrides)
    plan = needed(with_backbones(keep_rows(plan, only) if only else plan, backbones))
    resolved = resolve(plan)
    if show:
        say(yaml.safe_dump(to_dict(plan), sort_keys=False, allow_unicode=True).rstrip())
        return
    ablate.run(resolved, data, out, device, workers)


def _check_head(config: FitConfig, changes: Sequence[str]) -> None:
    """What a row or the plan decides is not decided by a head as well: it would do nothing, or half of it."""
    if config.study != FitConfig.study or config.normal_damping != FitConfig.normal_damping:
        raise ConfigError(
            "study and normal_damping are not for heads of a plan: the images of a study become one value by the study "
            "of a row, and rows are not damped. Leave them out; hilum combine --normal-damping works on predictions."
        )
    if any(text.partition("=")[0] == "seed" for text in changes):
        raise ConfigError("seed is not for heads of a plan: it is set to each of the plan's seeds. Set those.")


def _check_kept(backbone: PlannedBackbone, pretraining: dict[str, PretrainConfig]) -> None:
    """The checkpoint part of the way must be written, and still be there at the end."""
    where, before = f"backbone {backbone.name!r}", str(backbone.checkpoint_of)
    config = pretraining.get(before)
    if config is None:
        raise ConfigError(
            f"{where} is a checkpoint of {before!r}, which this plan does not pretrain. Give it weights of its own "
            f"(--backbone {backbone.name}=RUN), or leave out the rows that use it (--only)."
        )
    step = checkpoint_step(config, backbone.at or 0.0)
    later = -(-(config.steps - step) // config.checkpoint_every)
    if step % config.checkpoint_every or config.keep <= later:
        raise ConfigError(
            f"{where}: step {step} of {config.steps} of {before!r} is not among the checkpoints that are kept "
            f"(checkpoint_every={config.checkpoint_every}, keep={config.keep}). Set checkpoint_every to a divisor of "
            f"{step} and keep to more than {later} in the overrides of {before!r}."
        )
