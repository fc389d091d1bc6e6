"""Exported backbones in other people's libraries: every tensor used, the same tokens, without Hilum.

transformers reads the directory itself. timm cannot be installed beside the CPU wheel of torch: without it, names and
shapes are held against timm's own (those of the models in test_backbones_timm.py), and the files are read back.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import load_backbone
from hilum.core.errors import ConfigError
from hilum.core.seeding import forked, torch_stream
from hilum.data.transforms import normalise
from hilum.deploy import model_files as files
from hilum.deploy.exporting.comparing import fixtures
from hilum.deploy.exporting.huggingface import at_resolution, to_timm, write_backbone
from hilum.deploy.network import Network
from hilum.heads.registry import HeadConfig, build_head

ARCHITECTURES = {
    "plain": ViTConfig(128, 3, 2, patch_size=8, image_size=32),
    "registers": ViTConfig(128, 3, 2, patch_size=8, image_size=32, registers=4),
    "swiglu": ViTConfig(128, 3, 2, patch_size=8, image_size=32, feed_forward="swiglu"),
    "giant with registers, another size": ViTConfig(
        192, 3, 3, patch_size=8, image_size=32, registers=4, feed_forward="swiglu", interpolate_antialias=True,
        interpolate_offset=0.0,
    ),
}  # fmt: skip
SIDE = {"giant with registers, another size": 48}


def network_of(config: ViTConfig, side: int) -> Network:
    """Every parameter is redrawn, so that each token depends on each."""
    with forked(0, "test"):
        backbone, head = VisionTransformer(config), build_head(HeadConfig("linear", config.embed_dim, 2, 1))
    generator = torch_stream(0, "redrawn")
    for name, parameter in backbone.named_parameters():
        gain = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
        spread = 0.2 if parameter.dim() != 2 else parameter.shape[1] ** -0.5
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * spread + float(gain))
    findings = tuple(files.Finding(name, "head", True, 5, 10) for name in ("Edema", "Hernia"))
    described = files.NetworkConfig(
        config, HeadConfig("linear", config.embed_dim, 2, 1), findings, "hilum-grey-1", side, None
    )
    return Network(described, backbone, head)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, Path]:
    pytest.importorskip("transformers", reason="transformers is not installed")
    network = network_of(ARCHITECTURES[request.param], SIDE.get(request.param, 32))
    folder = tmp_path_factory.mktemp("exported")
    facts = write_backbone(network, folder)
    assert facts["difference"]["embeddings"]["smallest_cosine"] > 0.999999
    assert facts["versions"]["read_by"].startswith("transformers ")
    return network, folder


def tokens_of(network: Network) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised grey images, and all tokens of the predictor's backbone."""
    images = normalise(torch.from_numpy(fixtures(network.config.resolution, 4)), network.recipe)
    with torch.no_grad():
        found = network.backbone(images)
    return images, torch.cat([found.cls[:, None], found.registers, found.patches], dim=1)


def test_transformers_loads_every_tensor_and_gives_the_same_tokens(case: tuple[Network, Path]) -> None:
    from transformers import AutoModel

    network, folder = case
    model, loading = AutoModel.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    assert {name: found for name, found in loading.items() if found} == {}
    images, expected = tokens_of(network)
    with torch.no_grad():
        found = model.eval()(pixel_values=images.expand(-1, 3, -1, -1)).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_tensor_of_the_file_reaches_the_tokens_in_transformers(case: tuple[Network, Path]) -> None:
    from transformers import AutoModel

    network, folder = case
    model = AutoModel.from_pretrained(str(folder), local_files_only=True).eval()
    images, expected = tokens_of(network)
    unseen = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter.zero_()
            found = model(pixel_values=images.expand(-1, 3, -1, -1)).last_hidden_state
            parameter.copy_(kept)
            if not (found - expected).abs().max() > 1e-3:
                unseen.add(name)
    # a constant added to every key changes no softmax
    assert {name for name in unseen if not name.endswith(("k_proj.bias", "key.bias"))} == {"embeddings.mask_token"}


def test_the_preprocessor_gives_the_predictors_pixels(case: tuple[Network, Path]) -> None:
    network, folder = case
    content = json.loads((folder / "preprocessor_config.json").read_text())
    pixels = torch.from_numpy(fixtures(network.config.resolution, 4))
    scaled = pixels.float() * content["rescale_factor"]
    mean, std = (torch.tensor(content[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    torch.testing.assert_close((scaled - mean) / std, normalise(pixels, network.recipe).expand(-1, 3, -1, -1))
    assert content["crop_size"] == {"height": network.config.resolution, "width": network.config.resolution}


@pytest.mark.parametrize("place", [".", "timm"])
def test_hilum_reads_its_own_exports_back(case: tuple[Network, Path], tmp_path: Path, place: str) -> None:
    network, folder = case
    (tmp_path / "model.safetensors").write_bytes((folder / place / "model.safetensors").read_bytes())
    found = load_backbone(tmp_path / "model.safetensors", channel_mean=(0.5,) * 3, channel_std=(0.25,) * 3)
    images, expected = tokens_of(network)
    # what load_backbone returns takes images as Hilum normalises them
    with torch.no_grad():
        tokens = found(images)
    again = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], dim=1)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


Shapes = dict[str, tuple]


def timm_shapes(dim: int, depth: int, patch: int, rows: int, registers: int, wide: int, narrow: int) -> Shapes:
    """Names and shapes of `vit_*_dinov2` in timm 1.0 (huggingface/pytorch-image-models vision_transformer.py)."""
    shapes: Shapes = {
        "cls_token": (1, 1, dim), "pos_embed": (1, rows, dim), "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,),
    }  # fmt: skip
    if registers:
        shapes["reg_token"] = (1, registers, dim)
    for block in range(depth):
        own = {
            "norm1.weight": (dim,), "norm1.bias": (dim,), "attn.qkv.weight": (3 * dim, dim),
            "attn.qkv.bias": (3 * dim,), "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,), "ls1.gamma": (dim,),
            "norm2.weight": (dim,), "norm2.bias": (dim,), "mlp.fc1.weight": (wide, dim), "mlp.fc1.bias": (wide,),
            "mlp.fc2.weight": (dim, narrow), "mlp.fc2.bias": (dim,), "ls2.gamma": (dim,),
        }  # fmt: skip
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in own.items()}
    return shapes


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ViTConfig(384, 12, 6, patch_size=14, image_size=518), timm_shapes(384, 12, 14, 1370, 0, 1536, 1536)),
        (
            ViTConfig(384, 12, 6, patch_size=14, image_size=518, registers=4),
            timm_shapes(384, 12, 14, 1369, 4, 1536, 1536),
        ),
        (
            ViTConfig(1536, 40, 24, patch_size=14, image_size=518, registers=4, feed_forward="swiglu"),
            timm_shapes(1536, 40, 14, 1369, 4, 8192, 4096),
        ),
    ],
    ids=["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_reg4_dinov2"],
)
def test_names_and_shapes_are_timms(config: ViTConfig, expected: Shapes) -> None:
    with torch.device("meta"):
        state = {name: torch.empty_like(value) for name, value in VisionTransformer(config).state_dict().items()}
    if config.embed_dim > 1000:  # shapes alone: a giant takes no memory on the meta device
        state = {name: value[:, :1].expand(-1, 3, -1, -1) if "proj.weight" in name and value.dim() == 4 else value
                 for name, value in state.items()}  # fmt: skip
        found = to_timm(state)
    else:
        real = {name: torch.zeros(value.shape) for name, value in state.items()}
        found = to_timm(at_resolution(real, config, config.image_size))
    assert {name: tuple(value.shape) for name, value in found.items()} == expected


def test_timm_loads_the_directory_and_gives_the_same_tokens(case: tuple[Network, Path]) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    network, folder = case
    model = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
    images, expected = tokens_of(network)
    with torch.no_grad():
        found = model.forward_features(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_files_are_safetensors_that_say_pt(case: tuple[Network, Path]) -> None:
    _, folder = case
    for place in (folder, folder / "timm"):
        with safe_open(place / "model.safetensors", "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert all(value.dtype == torch.float32 for value in load_file(place / "model.safetensors").values())


def test_what_transformers_has_no_form_for_is_refused(tmp_path: Path) -> None:
    wide = ViTConfig(128, 1, 2, patch_size=8, image_size=32, feed_forward="swiglu", swiglu_multiple=64)
    with pytest.raises(ConfigError, match=r"A SwiGLU of width 384 for 128 channels: transformers' DINOv2 has 344"):
        write_backbone(network_of(wide, 32), tmp_path)
