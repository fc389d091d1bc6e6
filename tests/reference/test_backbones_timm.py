"""Hilum's backbone against `timm`'s DINOv2 models: the same state_dict, the same tokens, at every size.

Every parameter is redrawn so that no block is near the identity. timm needs torchvision, which the CPU wheel of torch
does not come with: these tests run where both are installed.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hilum.backbones.sources import Source
from hilum.backbones.vit import Tokens, VisionTransformer, ViTConfig
from hilum.backbones.weights import (
    GREY_MEAN,
    GREY_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    load_backbone,
    read_backbone_config,
)
from hilum.core.files import write_json
from hilum.core.seeding import torch_stream
from hilum.data.transforms import preprocessing
from hilum.deploy.exporting.huggingface import at_resolution, timm_config, to_timm

timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)

PATCH, SIDE = 14, 56
SIZES = {"native": (56, 56), "larger": (84, 84), "smaller": (28, 28), "wide": (56, 98), "tall and small": (70, 28)}
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
NAMES = [
    "vit_small_patch14_dinov2", "vit_base_patch14_dinov2", "vit_small_patch14_reg4_dinov2",
    "vit_base_patch14_reg4_dinov2", "small giant", "small giant with registers",
]  # fmt: skip


def build(name: str) -> Any:
    if not name.startswith("small giant"):
        return timm.create_model(name, pretrained=False, img_size=SIDE, dynamic_img_size=True, num_classes=0)
    from timm.layers import SwiGLUPacked

    registers = {"reg_tokens": 4, "no_embed_class": True} if "registers" in name else {}
    return timm.models.VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=192, depth=3, num_heads=3, init_values=1e-5,
        mlp_ratio=2.66667 * 2, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, num_classes=0, dynamic_img_size=True,
        **registers,
    )  # fmt: skip


def redraw(model: nn.Module) -> None:
    """Gains around 1, everything else far from 0, so that each token depends on each parameter."""
    generator = torch_stream(0, "redrawn")
    for name, parameter in model.named_parameters():
        gain = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
        spread = 0.2 if parameter.dim() != 2 else parameter.shape[1] ** -0.5
        drawn = torch.randn(parameter.shape, generator=generator) * spread
        parameter.data.copy_(drawn + 1 if gain else drawn)


def expected(model: Any, images: torch.Tensor, registers: int) -> Tokens:
    with torch.no_grad():
        tokens = model.forward_features(images)
    return Tokens(tokens[:, 0], tokens[:, 1 : 1 + registers], tokens[:, 1 + registers :])


def as_published(file: Path) -> VisionTransformer:
    """The file's own weights in our transformer, with three channels: before anything is folded."""
    source = Source.at(file)
    model = VisionTransformer(source.config)
    model.load_state_dict(source.read_checked())
    return model.eval()


def colours(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch_stream(0, "colours", height, width))


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, int]:
    model = build(request.param).eval()
    redraw(model)
    file = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(model.state_dict(), file)
    return model, file, 4 if "reg" in request.param else 0


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_tokens_are_equal(pair: tuple[Any, Path, int], size: str) -> None:
    model, file, registers = pair
    images = colours(*SIZES[size])
    with torch.no_grad():
        found = as_published(file)(images)
    for a, b in zip(found, expected(model, images, registers), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_what_load_backbone_returns_is_equal_on_grey_pixels(pair: tuple[Any, Path, int]) -> None:
    model, file, registers = pair
    pixels = torch.rand(2, 1, SIDE, SIDE, generator=torch_stream(0, "grey"))
    with torch.no_grad():
        found = load_backbone(file)((pixels - GREY_MEAN) / GREY_STD)
    mean, std = (torch.tensor(three).view(3, 1, 1) for three in (IMAGENET_MEAN, IMAGENET_STD))
    for a, b in zip(found, expected(model, (pixels.expand(-1, 3, -1, -1) - mean) / std, registers), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_every_parameter_matters(pair: tuple[Any, Path, int]) -> None:
    """The proof that the tests above can fail: any one tensor set to zero is seen a hundred times over."""
    model, file, registers = pair
    images = colours(28, 42)
    reference = expected(model, images, registers)
    ours = as_published(file)
    unseen = set()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if ".blocks." in f".{name}" and not name.startswith(("blocks.0.", "blocks.2.")):
                continue  # the other blocks are like these, and a dozen take minutes
            kept = parameter.clone()
            parameter.zero_()
            changes = [(a - b).abs().max() for a, b in zip(ours(images), reference, strict=True) if a.numel()]
            parameter.copy_(kept)
            if not max(changes) > 1e-3:
                unseen.add(name)
    assert unseen == {"mask_token"}


def test_the_description_names_what_timm_does_not_have(pair: tuple[Any, Path, int]) -> None:
    _, file, registers = pair
    described = read_backbone_config(file)
    assert described["layout"] == "timm"
    assert described["filled"].keys() == ({"mask_token", "pos_embed"} if registers else {"mask_token"})
    assert described["left_out"] == {}


def test_a_classifier_on_top_is_left_out_by_name(tmp_path: Path) -> None:
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=SIDE, depth=2, num_classes=5)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    described = read_backbone_config(tmp_path / "model.safetensors")
    assert described["left_out"] == {"a classifier": ["head.bias", "head.weight"]}


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("feed_forward", ["mlp", "swiglu"])
def test_what_is_exported_is_read_by_timm_alone(tmp_path: Path, feed_forward: str, registers: int) -> None:
    config = ViTConfig(
        128, 2, 2, patch_size=16, image_size=64, registers=registers, feed_forward=feed_forward, layer_scale=0.5
    )
    ours = VisionTransformer(config).eval()
    redraw(ours)
    state = at_resolution(ours.state_dict(), config, 64)
    save_file({name: value.contiguous() for name, value in to_timm(state).items()}, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", timm_config(config, 64, preprocessing("hilum-grey-1")))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    grey = torch.randn(2, 1, 64, 64, generator=torch_stream(0, "export"))
    with torch.no_grad():
        found = ours(grey)
    for a, b in zip(found, expected(theirs, grey.expand(-1, 3, -1, -1), registers), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
