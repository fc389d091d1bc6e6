"""Every recipe loads, says where its numbers come from, and comes back from YAML; those of the slides hold to them."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from hilum import recipes
from hilum.backbones.vit import SIZES, ViTConfig
from hilum.commands.demo import DemoPlan
from hilum.core.config import write_yaml
from hilum.core.errors import UnknownNameError
from hilum.data.manifest import ManifestOptions
from hilum.data.rows import SourceOptions
from hilum.heads.config import FitConfig
from hilum.heads.features import Augmentation as HeadAugmentation
from hilum.heads.registry import HeadConfig
from hilum.pretraining.config import PretrainConfig
from hilum.pretraining.crops import Augmentation, CropConfig
from hilum.pretraining.dinov2 import HeadConfig as ProjectionConfig
from hilum.pretraining.dinov2 import LossConfig
from hilum.pretraining.schedules import Schedules

SLIDES_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
CONFIGURATIONS = (
    PretrainConfig, CropConfig, Augmentation, ProjectionConfig, LossConfig, Schedules, ViTConfig, FitConfig, HeadConfig,
    HeadAugmentation, DemoPlan, ManifestOptions, SourceOptions,
)  # fmt: skip
SOURCE = Path(recipes.__file__).parent


@pytest.mark.parametrize("name", recipes.PRETRAIN_RECIPES)
def test_pretraining_recipes_load(name: str, tmp_path: Path) -> None:
    config = recipes.pretrain_recipe(name)
    started_from = SIZES["vitb14" if "patch14" in name else "vitb16"] if config.architecture == "init" else None
    architecture = config.vit(started_from)
    assert architecture.image_size == config.crops.global_size
    assert config.crops.local_size % architecture.patch_size == 0
    assert config.schedules().at(0).learning_rate == 0.0
    write_yaml(tmp_path / "config.yaml", config)
    assert recipes.pretrain_recipe(str(tmp_path / "config.yaml")) == config
    assert recipes.pretrain_recipe(name, ["steps=7"]) == dataclasses.replace(config, steps=7)


@pytest.mark.parametrize("name", recipes.FIT_RECIPES)
def test_head_recipes_load(name: str, tmp_path: Path) -> None:
    config = recipes.fit_recipe(name)
    head = config.describe_head(192, 14)
    assert (head.name, head.embed_dim, head.findings) == (config.head, 192, 14)
    write_yaml(tmp_path / "config.yaml", config)
    assert recipes.fit_recipe(str(tmp_path / "config.yaml")) == config


def test_each_recipe_is_listed_with_its_source() -> None:
    listed = recipes.describe()
    for name, recipe in {**recipes.PRETRAIN_RECIPES, **recipes.FIT_RECIPES}.items():
        assert recipe.__doc__
        assert f"  {name} " in listed
    with pytest.raises(UnknownNameError, match="Did you mean 'slides_linear'"):
        recipes.fit_recipe("slide_linear")


@pytest.mark.parametrize("name", ["slides_linear", "slides_decoder", "chexfound_decoder"])
def test_heads_of_the_slides_follow_the_protocol(name: str) -> None:
    config = recipes.fit_recipe(name)
    assert (config.search_epochs, config.refit_epochs, config.stop_epoch) == (10, 10, 2)
    assert (config.learning_rates, config.batch_size, config.loss) == (SLIDES_RATES, 256, "masked_bce_sum")
    assert config.refit_init == ("warm" if name.startswith("chexfound_") else "cold")
    assert not config.standardise
    assert not config.prior_bias


def test_50_epochs_of_the_head_are_all_run() -> None:
    config = recipes.fit_recipe("slides_linear_50")
    assert (config.search_epochs, config.refit_epochs, config.stop_epoch) == (50, 50, 50)


def test_other_heads_leave_the_epoch_to_validation_and_name_their_loss() -> None:
    for name in recipes.FIT_RECIPES:
        if not name.startswith(("slides_", "chexfound_")):
            config = recipes.fit_recipe(name)
            assert (config.stop_epoch, config.refit_init, config.loss) == (None, "cold", "masked_bce_mean"), name


def test_stages_of_the_slides() -> None:
    for size, resolution, crops in (
        ("vitb16", 224, (96, 224)), ("vitb16", 336, (128, 336)), ("vitl16", 224, (96, 224)),
        ("vitl16", 336, (128, 336)), ("vitl16", 448, (144, 448)), ("vitl16", 512, (144, 512)),
    ):  # fmt: skip
        config = recipes.pretrain_recipe(f"slides_{size}_{resolution}")
        assert (config.crops.local_size, config.crops.global_size) == crops
        assert (config.losses.ibot, config.losses.dino, config.steps) == (3.0, 1.0, 2_500_000)
        batch = {224: 304, 336: 96, 448: 112, 512: 80}[resolution]
        assert config.schedules().learning_rate == pytest.approx(2e-4 * (batch / 1024) ** 0.5)


def test_stages_of_the_released_code_differ_where_it_does() -> None:
    for resolution, local, batch in ((224, 96, 304), (336, 128, 96), (448, 128, 112), (512, 144, 112)):
        config = recipes.pretrain_recipe(f"chexfound_vitl16_{resolution}")
        assert (config.crops.global_size, config.crops.local_size, config.batch_size) == (resolution, local, batch)
        assert (config.steps, config.drop_path, config.layer_decay) == (250_000, 0.4, 1.0)
        assert dataclasses.replace(config.vit(), image_size=512) == SIZES["vitl16_chexfound"]


def test_a_short_stage_is_its_stage_in_10_000_steps() -> None:
    for resolution in (336, 448, 512):
        short = recipes.pretrain_recipe(f"short_highres_vitl16_{resolution}")
        whole = recipes.pretrain_recipe(f"slides_vitl16_{resolution}")
        assert short.steps == 10_000
        assert dataclasses.replace(short, steps=whole.steps, crops=whole.crops, probe=whole.probe) == whole


def test_every_pretraining_recipe_of_a_whole_network_tells_its_cost() -> None:
    for name, recipe in recipes.PRETRAIN_RECIPES.items():
        text = recipe.__doc__ or ""
        small = name.startswith(("laptop_", "demo_", "continued_patch14"))
        assert small or ("Cost" in text and "computed" in text), name


def test_one_recipe_is_shown_whole() -> None:
    shown = recipes.show("slides_vitl16_336")
    assert "Expected: mAP 0.1922 linear" in shown
    assert "global_size: 336" in shown
    assert "learning_rates:" in recipes.show("linear")
    with pytest.raises(UnknownNameError, match="Did you mean 'vits16_onegpu'"):
        recipes.show("vits16_one")


def read_names(folder: Path) -> Iterator[str]:
    """Every attribute that the package reads, and every text in it: some fields are read by name."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                yield node.attr
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_field_of_a_configuration_is_read_somewhere() -> None:
    read = set(read_names(SOURCE))
    unread = [f"{kind.__name__}.{one.name}" for kind in CONFIGURATIONS for one in dataclasses.fields(kind)
              if one.name not in read]  # fmt: skip
    assert unread == []
