"""Every named run: a function that returns a complete configuration, and says where its numbers come from.

A variant edits another with `dataclasses.replace`. On the command line: `hilum pretrain NAME key=value ...`,
`hilum fit NAME key=value ...`; `hilum recipes` lists them. A path to a `config.yaml` works in place of a name.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hilum.core.config import override, read_yaml
from hilum.core.errors import UnknownNameError
from hilum.heads.config import FitConfig
from hilum.pretraining.config import PretrainConfig
from hilum.pretraining.crops import CropConfig
from hilum.pretraining.dinov2 import HeadConfig, LossConfig

if TYPE_CHECKING:
    from hilum.commands.demo import DemoPlan

SLIDES_CROPS = {224: (96, 224), 336: (128, 336), 448: (144, 448), 512: (144, 512)}
RELEASED_BATCH = {224: 304, 336: 96, 448: 112, 512: 80}
"""Images a step over 8 GPUs in CheXFound's released configurations; not on the slides."""


def _slides(architecture: str, resolution: int) -> PretrainConfig:
    local, size = SLIDES_CROPS[resolution]
    return PretrainConfig(
        architecture=architecture,
        registers=0,
        crops=CropConfig(global_size=size, local_size=local, augmentation="dinov2"),
        losses=LossConfig(dino=1.0, ibot=3.0),
        batch_size=RELEASED_BATCH[resolution],
        steps=100 * 25_000,
    )


def slides_vitb16_224() -> PretrainConfig:
    """ViT-B/16 at 224. Slides: 100 epochs of 25,000, crops 96/224, iBOT weight 3. Batch, rate: released configs."""
    return replace(_slides("vitb16", 224), drop_path=0.2)


def slides_vitb16_336() -> PretrainConfig:
    """ViT-B/16 at 336, started from the 224 run. Slides: crops 128/336."""
    return replace(_slides("vitb16", 336), drop_path=0.2)


def slides_vitl16_224() -> PretrainConfig:
    """ViT-L/16 at 224. Slides: 100 epochs of 25,000, crops 96/224, iBOT weight 3. Batch, rate: released configs."""
    return _slides("vitl16", 224)


def slides_vitl16_336() -> PretrainConfig:
    """ViT-L/16 at 336, started from the 224 run. Slides: crops 128/336."""
    return _slides("vitl16", 336)


def slides_vitl16_448() -> PretrainConfig:
    """ViT-L/16 at 448, started from the 224 run. Slides: crops 144/448."""
    return _slides("vitl16", 448)


def slides_vitl16_512() -> PretrainConfig:
    """ViT-L/16 at 512, started from the 224 run. Slides: crops 144/512."""
    return _slides("vitl16", 512)


def short_highres_vitl16_512() -> PretrainConfig:
    """ViT-L/16 at 512 from a 224 run in 10,000 steps, schedules compressed (DINOv2 section 6.6, appendix B.2)."""
    return replace(slides_vitl16_512(), steps=10_000, crops=CropConfig(512, 144, augmentation="cxr"))


def laptop_128() -> PretrainConfig:
    """4 blocks of 128 at 128 pixels, for hundreds to thousands of images: about 10 minutes on 2 cores.

    Small batches want few prototypes (an image spreads its Sinkhorn target over prototypes / views of them), a sharper
    teacher and one that follows faster; more steps of a small network cost less than fewer of a larger one and probed
    no worse (docs/log.md).
    """
    return PretrainConfig(
        architecture="demo16",
        crops=CropConfig(128, 48, local_crops=4, augmentation="cxr"),
        heads=HeadConfig(prototypes=256, hidden=512, dino_bottleneck=128, ibot_bottleneck=128),
        batch_size=64,
        steps=1200,
        learning_rate=4e-3,
        teacher_temperature=(0.02, 0.02),
        momentum=(0.95, 1.0),
        patch_embed_factor=1.0,
        drop_path=0.0,
        precision="auto",
        checkpoint_every=200,
    )


def laptop_192() -> PretrainConfig:
    """A short stage at 192 pixels, started from `laptop_128`."""
    return replace(
        laptop_128(),
        crops=CropConfig(192, 96, local_crops=4, augmentation="cxr"),
        steps=40,
        learning_rate=1e-3,
        batch_size=32,
    )


def demo_128() -> PretrainConfig:
    """First stage of `hilum demo`: 4 blocks of 128 at 128 pixels, under a minute on 2 cores."""
    return replace(laptop_128(), steps=60, checkpoint_every=1000)


def demo_160() -> PretrainConfig:
    """Second stage of `hilum demo`: 160 pixels, from the first."""
    return replace(
        demo_128(),
        crops=CropConfig(160, 64, local_crops=4, augmentation="cxr"),
        steps=16,
        learning_rate=1e-3,
        batch_size=32,
    )


PRETRAIN_RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        slides_vitb16_224, slides_vitb16_336, slides_vitl16_224, slides_vitl16_336, slides_vitl16_448,
        slides_vitl16_512, short_highres_vitl16_512, laptop_128, laptop_192, demo_128, demo_160,
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


def slides_decoder() -> FitConfig:
    """Slides: ML-Decoder, nine rates, BCE, refit on train + val stopped at epoch 2."""
    return FitConfig(head="ml_decoder", loss="masked_bce_sum", stop_epoch=2)


def chexfound_decoder() -> FitConfig:
    """CheXFound's released commands: [CLS] beside each query, and the refit that goes on from the search head."""
    return replace(slides_decoder(), cat_cls=True, refit_init="warm")


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
        linear, decoder, slides_linear, slides_decoder, chexfound_decoder, laptop_linear, laptop_decoder, demo_linear,
        demo_decoder,
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
