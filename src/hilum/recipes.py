"""Every named run: a function that returns a complete configuration, and says where its numbers come from.

A variant edits another with `dataclasses.replace`. On the command line: `hilum pretrain NAME key=value ...`,
`hilum fit NAME key=value ...`; `hilum recipes` lists them, `hilum recipes NAME` prints one whole. A path to a
`config.yaml` works in place of a name. Costs are computed from the operations of a step, not measured. Past 300 lines:
every recipe says what it costs and what to expect of it.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import yaml

from hilum.core.config import override, read_yaml, to_dict
from hilum.core.errors import UnknownNameError
from hilum.heads.config import FitConfig
from hilum.heads.tune_settings import TuneSettings
from hilum.pretraining.config import PretrainConfig
from hilum.pretraining.crops import CropConfig
from hilum.pretraining.dinov2 import HeadConfig, LossConfig
from hilum.pretraining.probing import ProbeConfig

if TYPE_CHECKING:
    from hilum.commands.demo import DemoPlan

SLIDES_CROPS = {224: (96, 224), 336: (128, 336), 448: (144, 448), 512: (144, 512)}
RELEASED_BATCH = {224: 304, 336: 96, 448: 112, 512: 80}
"""Images a step over 8 GPUs in CheXFound's released configurations; not on the slides."""


def _slides(architecture: str, resolution: int) -> PretrainConfig:
    """From the slides: patch 16, iBOT weight 3, DINO weight 1, crops, 100 epochs of 25,000 iterations.

    Not on the slides: batch, base rate 2e-4 x sqrt(batch / 1024), weight decay, momentum and temperatures (CheXFound's
    released configurations); no registers and GELU (DINOv2's defaults; the released model has 4 and SwiGLU); stochastic
    depth.
    """
    local, size = SLIDES_CROPS[resolution]
    return PretrainConfig(
        architecture=architecture,
        registers=0,
        crops=CropConfig(global_size=size, local_size=local, augmentation="dinov2"),
        losses=LossConfig(dino=1.0, ibot=3.0),
        batch_size=RELEASED_BATCH[resolution],
        steps=100 * 25_000,
        drop_path=0.4 if architecture == "vitl16" else 0.2,
        probe=ProbeConfig(every=5000),
    )


def slides_vitb16_224() -> PretrainConfig:
    """ViT-B/16 at 224, crops 96 / 224, iBOT weight 3: the slides' first stage.

    Source: slides, 100 epochs of 25,000; batch 304 and rate from the released configurations, drop path 0.2 assumed.
    Hardware: 8 GPUs of 80 GB, 38 images each. Cost: 760 M images, 306 EFLOP, 190 H200-hours at 45 % MFU (computed).
    Expected: linear head on CXR-LT development images mAP 0.1795 (slides).
    """
    return _slides("vitb16", 224)


def slides_vitb16_336() -> PretrainConfig:
    """ViT-B/16 at 336, crops 128 / 336, from the 224 run (--init).

    Source: slides; batch 96 and rate from the released configurations. Hardware: 8 GPUs, 12 images each.
    Cost: 240 M images, 203 EFLOP, 126 H200-hours at 45 % MFU (computed). Expected: linear head mAP 0.1852 (slides).
    """
    return _slides("vitb16", 336)


def slides_vitl16_224() -> PretrainConfig:
    """ViT-L/16 at 224, crops 96 / 224, iBOT weight 3: the slides' first stage.

    Source: slides, 100 epochs of 25,000 (the released code has 2,500, see `chexfound_vitl16_224`); batch 304 and rate
    from the released configurations. Hardware: 8 GPUs of 80 GB, 38 images each. Cost: 760 M images, 825 EFLOP, 515
    H200-hours at 45 % MFU (computed). Expected: linear head on CXR-LT development images mAP 0.1798 (slides).
    """
    return _slides("vitl16", 224)


def slides_vitl16_336() -> PretrainConfig:
    """ViT-L/16 at 336, crops 128 / 336, from the 224 run (--init).

    Source: slides; batch 96 and rate from the released configurations. Hardware: 8 GPUs, 12 images each. Cost: 240 M
    images, 546 EFLOP, 341 H200-hours at 45 % MFU (computed). Expected: mAP 0.1922 linear, 0.2311 decoder, 0.2449 with
    study means (slides).
    """
    return _slides("vitl16", 336)


def slides_vitl16_448() -> PretrainConfig:
    """ViT-L/16 at 448, crops 144 / 448, from the 224 run (--init).

    Source: slides (the released code has local crops of 128); batch 112 and rate from the released configurations.
    Hardware: 8 GPUs, 14 images each. Cost: 280 M images, 1,080 EFLOP, 674 H200-hours at 45 % MFU (computed).
    Expected: decoder with study means and added labels mAP 0.236 (slides).
    """
    return _slides("vitl16", 448)


def slides_vitl16_512() -> PretrainConfig:
    """ViT-L/16 at 512, crops 144 / 512, from the 224 run (--init).

    Source: slides; batch 80 and rate from the released configurations. Hardware: 8 GPUs, 10 images each. Cost: 200 M
    images, 987 EFLOP, 616 H200-hours at 45 % MFU (computed). Expected: decoder with study means and added labels mAP
    0.259; with 336 and 448 in an ensemble 0.271 (slides).
    """
    return _slides("vitl16", 512)


def _chexfound(resolution: int, local: int, batch: int) -> PretrainConfig:
    """RPIDIAL/CheXFound configs/train and the configuration logged with the released 512 model."""
    return PretrainConfig(
        architecture="vitl16",
        registers=4,
        feed_forward="swiglu",
        crops=CropConfig(global_size=resolution, local_size=local, augmentation="dinov2_as_released"),
        losses=LossConfig(dino=1.0, ibot=3.0),
        batch_size=batch,
        steps=100 * 2_500,
        drop_path=0.4,
        probe=ProbeConfig(every=5000),
    )


def chexfound_vitl16_224() -> PretrainConfig:
    """ViT-L/16 with 4 registers and SwiGLU at 224: CheXFound as released, 100 epochs of 2,500.

    Source: RPIDIAL/CheXFound. Hardware: 8 GPUs, 38 images each. Cost: 76 M images, 83 EFLOP, 52 H200-hours at 45 %
    MFU (computed). Expected: the paper states its model after four stages only.
    """
    return _chexfound(224, 96, 304)


def chexfound_vitl16_336() -> PretrainConfig:
    """CheXFound at 336, crops 128 / 336, from the 224 run (--init).

    Source: RPIDIAL/CheXFound. Hardware: 8 GPUs, 12 images each. Cost: 24 M images, 55 EFLOP, 34 H200-hours at 45 % MFU
    (computed). Unlike the released code, positions are resampled and the teacher is kept.
    """
    return _chexfound(336, 128, 96)


def chexfound_vitl16_448() -> PretrainConfig:
    """CheXFound at 448, crops 128 / 448 (the slides have 144), from the 224 run (--init).

    Source: RPIDIAL/CheXFound. Hardware: 8 GPUs, 14 images each. Cost: 28 M images, 104 EFLOP, 65 H200-hours at 45 % MFU
    (computed).
    """
    return _chexfound(448, 128, 112)


def chexfound_vitl16_512() -> PretrainConfig:
    """CheXFound at 512, crops 144 / 512, from the 448 run (--init), as the log of the released model tells.

    Source: RPIDIAL/CheXFound logs (14 images on each of 8 GPUs; its configuration file has 10, from the 224 run). Cost:
    28 M images, 138 EFLOP, 86 H200-hours at 45 % MFU (computed). Expected, the public weights with a decoder: AUROC
    0.840, AUPRC 0.265 on CXR-LT 2024 (as quoted by others from the paper).
    """
    return _chexfound(512, 144, 112)


def _short(stage: PretrainConfig) -> PretrainConfig:
    crops, probe = replace(stage.crops, augmentation="cxr"), ProbeConfig(every=1000)
    return replace(stage, steps=10_000, crops=crops, probe=probe)


def short_highres_vitl16_336() -> PretrainConfig:
    """ViT-L/16 at 336 from a 224 run in 10,000 steps, all schedules compressed (DINOv2 section 6.6, appendix B.2).

    Hardware: 8 GPUs, 12 images each, or any. Cost: 0.96 M images, 2.2 EFLOP, 1.4 H200-hours at 45 % MFU (computed).
    Expected: "almost as good" as a whole stage on natural images (DINOv2); on chest X-rays not shown: watch the probe.
    """
    return _short(slides_vitl16_336())


def short_highres_vitl16_448() -> PretrainConfig:
    """ViT-L/16 at 448 from a 224 run in 10,000 steps; see `short_highres_vitl16_336`.

    Cost: 1.1 M images, 4.3 EFLOP, 2.7 H200-hours at 45 % MFU (computed).
    """
    return _short(slides_vitl16_448())


def short_highres_vitl16_512() -> PretrainConfig:
    """ViT-L/16 at 512 from a 224 run in 10,000 steps; see `short_highres_vitl16_336`.

    Cost: 0.8 M images, 3.9 EFLOP, 2.5 H200-hours at 45 % MFU (computed).
    """
    return _short(slides_vitl16_512())


def short_highres_vitb16_512() -> PretrainConfig:
    """ViT-B/16 at 512 from a 224 run in 10,000 steps; see `short_highres_vitl16_336`.

    Cost: 0.8 M images, 1.5 EFLOP, 0.9 H200-hours at 45 % MFU (computed).
    """
    return _short(_slides("vitb16", 512))


def vits16_onegpu() -> PretrainConfig:
    """ViT-S/16 at 224 for one GPU: what DINOv2 tunes for batches of thousands is set for 128 images.

    Source: this project. Small batches spread a [CLS] target over few prototypes, so there are 8,192 and the teacher is
    sharper; the rate's square-root rule starts from a batch of 1,024. Hardware: one GPU of 16 GB or more; crops are cut
    on it, so 2 cores feed it. Cost: 12.8 M images, 1.6 EFLOP, 1 H200-hour at 45 % MFU (computed). Expected: not
    measured; the probe tells from step 0 on whether the features get better.
    """
    return PretrainConfig(
        architecture="vits16",
        crops=CropConfig(224, 96, augmentation="cxr"),
        heads=HeadConfig(prototypes=8192, hidden=2048, dino_bottleneck=256, ibot_bottleneck=256),
        losses=LossConfig(dino=1.0, ibot=3.0),
        batch_size=128,
        steps=100_000,
        learning_rate=1e-3,
        teacher_temperature=(0.03, 0.05),
        momentum=(0.992, 1.0),
        drop_path=0.1,
        probe=ProbeConfig(every=2000),
        crops_on="device",
        workers=2,
    )


def continued_224() -> PretrainConfig:
    """Go on from public weights at 224 (--init FILE): their network, new heads, a careful rate.

    Source: this project; the shape follows from what fails (facebookresearch/dinov2 issues 204 and 339: features get
    worse when new heads drive the backbone at a full rate). For 10 % of the run only the heads learn; then the rate
    grows to 5e-5 x sqrt(batch / 1024), with a factor 0.8 for each block below the top. The probe starts at step 0 and
    warns when k-NN falls below where it began. Hardware: any number of GPUs. Cost: ViT-B 2.6 M images, 1 EFLOP, 0.6
    H200-hours at 45 % MFU (computed). Expected: not measured.
    """
    return PretrainConfig(
        architecture="init",
        crops=CropConfig(224, 96, augmentation="cxr"),
        losses=LossConfig(dino=1.0, ibot=3.0),
        batch_size=128,
        steps=20_000,
        learning_rate=5e-5,
        layer_decay=0.8,
        head_warmup=0.1,
        momentum=(0.996, 1.0),
        weight_decay=(0.04, 0.04),
        drop_path=0.2,
        probe=ProbeConfig(every=500),
    )


def continued_patch14_224() -> PretrainConfig:
    """`continued_224` for networks of patch 14 (DINOv2, RAD-DINO): local crops of 98 pixels."""
    return replace(continued_224(), crops=CropConfig(224, 98, augmentation="cxr"))


def laptop_128() -> PretrainConfig:
    """4 blocks of 128 at 128 pixels, for hundreds to thousands of images: about 10 minutes on 2 cores.

    Small batches want few prototypes (an image spreads its Sinkhorn target over prototypes / views of them), a sharper
    teacher and one that follows faster; more steps of a small network cost less than fewer of a larger one and probed
    no worse (docs/log.md).
    """
    return PretrainConfig(
        architecture="demo16",
        crops=CropConfig(128, 48, local_crops=4, augmentation="cxr", rotation=0.0),
        heads=HeadConfig(prototypes=256, hidden=512, dino_bottleneck=128, ibot_bottleneck=128),
        batch_size=64,
        steps=1200,
        learning_rate=4e-3,
        teacher_temperature=(0.02, 0.02),
        momentum=(0.95, 1.0),
        patch_embed_factor=1.0,
        drop_path=0.0,
        probe=ProbeConfig(every=200),
        precision="auto",
        checkpoint_every=200,
    )


def laptop_192() -> PretrainConfig:
    """A short stage at 192 pixels, started from `laptop_128`."""
    return replace(
        laptop_128(),
        crops=CropConfig(192, 96, local_crops=4, augmentation="cxr", rotation=0.0),
        probe=ProbeConfig(every=40),
        steps=40,
        learning_rate=1e-3,
        batch_size=32,
    )


def demo_128() -> PretrainConfig:
    """First stage of `hilum demo`: 4 blocks of 128 at 128 pixels, under a minute on 2 cores."""
    return replace(laptop_128(), steps=60, probe=ProbeConfig(), checkpoint_every=1000)


def demo_160() -> PretrainConfig:
    """Second stage of `hilum demo`: 160 pixels, from the first."""
    return replace(
        demo_128(),
        crops=CropConfig(160, 64, local_crops=4, augmentation="cxr", rotation=0.0),
        steps=16,
        learning_rate=1e-3,
        batch_size=32,
    )


PRETRAIN_RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        slides_vitb16_224, slides_vitb16_336, slides_vitl16_224, slides_vitl16_336, slides_vitl16_448,
        slides_vitl16_512, chexfound_vitl16_224, chexfound_vitl16_336, chexfound_vitl16_448, chexfound_vitl16_512,
        short_highres_vitl16_336, short_highres_vitl16_448, short_highres_vitl16_512, short_highres_vitb16_512,
        vits16_onegpu, continued_224, continued_patch14_224, laptop_128, laptop_192, demo_128, demo_160,
    )
}  # fmt: skip


def linear() -> FitConfig:
    """[CLS] of the last 4 blocks and the mean patch token; the epoch comes from validation."""
    return FitConfig(head="linear", patch_mean=True, loss="masked_bce_mean", standardise=True, prior_bias=True)


def decoder() -> FitConfig:
    """ML-Decoder on the patch tokens of the last 4 blocks; the epoch comes from validation."""
    return FitConfig(head="ml_decoder", loss="masked_bce_mean", standardise=True, prior_bias=True)


def slides_linear() -> FitConfig:
    """Slides: [CLS] of the last 4 blocks, nine rates, BCE, refit on train + val stopped at epoch 2."""
    return FitConfig(head="linear", loss="masked_bce_sum", stop_epoch=2)


def slides_linear_concat() -> FitConfig:
    """Slides: as `slides_linear`, on [CLS] of an image beside that of another image of its study.

    The released code draws the other image at random in prediction too; here the mean of the others stands for it.
    """
    return replace(slides_linear(), views="concat")


def slides_linear_50() -> FitConfig:
    """Slides, "linear, epoch 50", read as 50 epochs of the head (the other reading: of pretraining)."""
    return replace(slides_linear(), search_epochs=50, refit_epochs=50, stop_epoch=50)


def slides_decoder() -> FitConfig:
    """Slides: ML-Decoder, nine rates, BCE, refit on train + val stopped at epoch 2."""
    return FitConfig(head="ml_decoder", loss="masked_bce_sum", stop_epoch=2)


def chexfound_decoder() -> FitConfig:
    """CheXFound's released commands: [CLS] beside each query, and the refit that goes on from the search head."""
    return replace(slides_decoder(), cat_cls=True, refit_init="warm")


def decoder_full() -> FitConfig:
    """The decoder with all that the later paper adds: trained queries, positions, [CLS], coarse features, temperature.

    Source: arXiv 2502.05142 v2 as described by others (the public code lacks pyramid and temperature).
    """
    return replace(
        decoder(), queries="learnable", positions="sincos", cat_cls=True, cls_memory=True, pyramid=True,
        attention_temperature=True,
    )  # fmt: skip


def multiview_decoder() -> FitConfig:
    """One decoder over the patches of all images of a study, with an embedding of each view's kind."""
    return replace(decoder(), views="memory")


def csra() -> FitConfig:
    """Class-specific residual attention (Zhu and Wu 2021), lambda 0.1, the head of the CXR-LT 2026 winner."""
    return replace(decoder(), head="csra")


def tuned_decoder() -> FitConfig:
    """The decoder, then low-rank updates of the backbone's attention, kept as far as validation gains.

    Source: rank 16, alpha 16, dropout 0.1 as RPIDIAL/CheXFound's option; rates and stopping are this project's.
    """
    return replace(decoder(), tune=TuneSettings("lora", learning_rate=1e-4))


def text_decoder() -> FitConfig:
    """A decoder whose queries come from text vectors (`text_vectors=FILE`), with one output row for all findings.

    The form that can score findings without labels (docs/how-to/add-findings.md).
    """
    return replace(decoder(), queries="text", shared_output=True)


def laptop_linear() -> FitConfig:
    """For hundreds of images: small batches, more epochs, features of 4 augmented views kept in memory."""
    return replace(linear(), batch_size=32, search_epochs=40, refit_epochs=40, augmented_views=4, flip_average=True)


def laptop_decoder() -> FitConfig:
    """For hundreds of images: a narrow decoder, small batches, features of 4 augmented views kept in memory."""
    return replace(
        decoder(), decoder_dim=128, decoder_feed_forward=256, decoder_heads=4, batch_size=32, search_epochs=20,
        refit_epochs=20, augmented_views=4, flip_average=True,
    )  # fmt: skip


def demo_linear() -> FitConfig:
    """Linear head of `hilum demo`."""
    return replace(linear(), search_epochs=24, refit_epochs=24, augmented_views=4, batch_size=32)


def demo_decoder() -> FitConfig:
    """Decoder of `hilum demo`: narrow, and three of the nine rates, for the sake of two minutes."""
    return replace(
        demo_linear(), head="ml_decoder", patch_mean=False, blocks=1, decoder_dim=64, decoder_feed_forward=128,
        decoder_heads=4, learning_rates=(1e-3, 2e-3, 5e-3), search_epochs=32, refit_epochs=32,
    )  # fmt: skip


FIT_RECIPES: dict[str, Callable[[], FitConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        linear, decoder, decoder_full, multiview_decoder, csra, tuned_decoder, text_decoder, slides_linear,
        slides_linear_concat, slides_linear_50, slides_decoder, chexfound_decoder, laptop_linear, laptop_decoder,
        demo_linear, demo_decoder,
    )
}  # fmt: skip


def demo_plan() -> "DemoPlan":
    """What `hilum demo` runs."""
    from hilum.commands.demo import DemoPlan  # its tables need packages that recipes for a GPU machine do not

    return DemoPlan(demo_128(), demo_160(), demo_linear(), demo_decoder())


Config = TypeVar("Config", PretrainConfig, FitConfig)


def pretrain_recipe(name: str, overrides: Sequence[str] = ()) -> PretrainConfig:
    """The named recipe, or the `config.yaml` at that path, with `key=value` changes."""
    return _find(PretrainConfig, PRETRAIN_RECIPES, name, overrides)


def fit_recipe(name: str, overrides: Sequence[str] = ()) -> FitConfig:
    """The named recipe, or the `config.yaml` at that path, with `key=value` changes."""
    return _find(FitConfig, FIT_RECIPES, name, overrides)


def _find(kind: type[Config], known: dict[str, Callable[[], Config]], name: str, overrides: Sequence[str]) -> Config:
    if name.endswith((".yaml", ".yml")):
        return override(read_yaml(kind, Path(name)), overrides)
    if name not in known:
        raise UnknownNameError("recipe", name, known)
    return override(known[name](), overrides)


def show(name: str) -> str:
    """What a recipe says of itself, and all its settings as YAML.

    Raises:
        UnknownNameError: no such recipe.
    """
    known: dict[str, Callable[[], PretrainConfig] | Callable[[], FitConfig]] = {**PRETRAIN_RECIPES, **FIT_RECIPES}
    if name not in known:
        raise UnknownNameError("recipe", name, known)
    return f"{inspect.getdoc(known[name])}\n\n{yaml.safe_dump(to_dict(known[name]()), sort_keys=False)}".rstrip()


def describe() -> str:
    """A table of the recipes for people."""
    lines = []
    for title, recipes in (("hilum pretrain", PRETRAIN_RECIPES), ("hilum fit", FIT_RECIPES)):
        lines.append(title)
        width = max(map(len, recipes))
        for name, recipe in recipes.items():
            first = (recipe.__doc__ or "").split("\n")[0]
            lines.append(f"  {name:{width}}  {first}")
    return "\n".join(lines)
