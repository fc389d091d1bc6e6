import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hilum.backbones.vit import SIZES, VisionTransformer, ViTConfig
from hilum.backbones.weights import (
    GREY_MEAN,
    GREY_RECIPE,
    GREY_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    load_backbone,
    read_backbone_config,
    save_backbone,
)
from hilum.core.errors import CheckpointError, ConfigError
from hilum.core.seeding import forked, torch_stream

SMALL = ViTConfig(64, 3, 1, patch_size=8, image_size=64, registers=2)
State = dict[str, torch.Tensor]


def random_model(config: ViTConfig = SMALL, seed: int = 0) -> VisionTransformer:
    with forked(seed, "weights"):
        model = VisionTransformer(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.1, 0.2)
    return model.eval()


def grey(batch: int = 2, side: int = 64) -> torch.Tensor:
    """Pixels in [0, 1]."""
    return torch.rand(batch, 1, side, side, generator=torch_stream(0, "pixels"))


def assert_equal_models(a: VisionTransformer, b: VisionTransformer) -> None:
    assert a.config == b.config
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_saved_then_loaded_is_equal(tmp_path: Path) -> None:
    model = random_model(replace(SMALL, feed_forward="swiglu", interpolate_offset=0.0))
    save_backbone(model, tmp_path / "run", GREY_RECIPE, {"seen": "abc", "step": 5})
    loaded = load_backbone(tmp_path / "run")
    assert_equal_models(loaded, model)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written == read_backbone_config(tmp_path / "run")
    assert (written["format"], written["resolution"], written["seen"]) == ("hilum-backbone-1", 64, "abc")
    assert written["preprocess_id"] == GREY_RECIPE


def test_the_weights_file_alone_is_enough(tmp_path: Path) -> None:
    model = random_model(replace(SMALL, num_heads=4))  # 16 channels per head cannot be guessed from shapes
    save_backbone(model, tmp_path / "run", GREY_RECIPE)
    alone = tmp_path / "elsewhere.safetensors"
    (tmp_path / "run" / "teacher.safetensors").rename(alone)
    assert_equal_models(load_backbone(alone), model)


def test_a_folder_with_config_and_plain_weights(tmp_path: Path) -> None:
    model = random_model(replace(SMALL, num_heads=4))
    save_backbone(model, tmp_path, GREY_RECIPE)
    save_file(load_file(tmp_path / "teacher.safetensors"), tmp_path / "model.safetensors")  # no header entry
    (tmp_path / "teacher.safetensors").unlink()
    assert_equal_models(load_backbone(tmp_path), model)


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        save_backbone(random_model(), tmp_path / name, GREY_RECIPE, {"seen": "abc"})
    first, second = (tmp_path / name / "teacher.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    save_backbone(random_model(), tmp_path, GREY_RECIPE)
    before = torch.get_rng_state()
    load_backbone(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_a_failed_save_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    save_backbone(model, tmp_path, GREY_RECIPE)

    def full_disk(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hilum.backbones.weights.save_file", full_disk)
    with pytest.raises(Exception, match="No space left"):
        save_backbone(random_model(seed=1), tmp_path, GREY_RECIPE)
    assert_equal_models(load_backbone(tmp_path), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "teacher.safetensors"]


def chunked(state: State) -> State:
    out = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts.insert(1, str(int(parts[1]) // 2))
        out[".".join(parts)] = value
    return out


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: value for name, value in state.items()}


def hub_names(state: State) -> State:
    return {
        "model." + name.replace("ls1.gamma", "ls1.weight").replace("ls2.gamma", "ls2.weight"): value
        for name, value in state.items()
    }


def training_checkpoint(state: State) -> State:
    out = {"model.teacher.backbone." + name: value for name, value in chunked(state).items()}
    out |= {"model.student.backbone." + name: value + 1 for name, value in chunked(state).items()}
    extra = {"model.teacher.dino_head.mlp.0.weight", "model.student.ibot_head.last_layer.weight_v"}
    return out | {name: torch.zeros(2, 3) for name in extra | {"model.dino_loss.center"}}


def half(state: State) -> State:
    return {name: value.half() for name, value in state.items()}


@pytest.mark.parametrize(
    "layout",
    [lambda state: state, chunked, prefixed("module."), prefixed("teacher.backbone."), hub_names, training_checkpoint],
    ids=["flat", "chunked", "module", "teacher.backbone", "hub", "training"],
)
@pytest.mark.parametrize("feed_forward", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 2])
def test_public_layouts(tmp_path: Path, layout: Callable[[State], State], feed_forward: str, registers: int) -> None:
    model = random_model(replace(SMALL, feed_forward=feed_forward, registers=registers))
    file = tmp_path / "weights.safetensors"
    save_file(layout(model.state_dict()), file)
    assert_equal_models(load_backbone(file), model)
    described = read_backbone_config(file)
    assert (described["format"], described["preprocess_id"], described["resolution"]) == ("imported", "", 64)


def test_half_precision_files_load_in_float32(tmp_path: Path) -> None:
    model = random_model()
    save_file(half(model.state_dict()), tmp_path / "half.safetensors")
    loaded = load_backbone(tmp_path / "half.safetensors")
    assert loaded.cls_token.dtype == torch.float32
    torch.testing.assert_close(loaded.cls_token, model.cls_token.half().float())


def test_dinov2_with_registers_keeps_its_own_interpolation(tmp_path: Path) -> None:
    model = random_model(replace(SMALL, patch_size=14, image_size=56))
    save_file(model.state_dict(), tmp_path / "reg.safetensors")
    config = load_backbone(tmp_path / "reg.safetensors").config
    assert (config.interpolate_offset, config.interpolate_antialias) == (0.0, True)


@pytest.mark.parametrize("multiple", [8, 64, 128])
def test_swiglu_width_is_read_from_shapes(tmp_path: Path, multiple: int) -> None:
    model = random_model(replace(SMALL, feed_forward="swiglu", swiglu_multiple=multiple))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert load_backbone(tmp_path / "w.safetensors").config.feed_forward_hidden == model.config.feed_forward_hidden


@pytest.mark.parametrize(
    ("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), ((0.53, 0.53, 0.53), (0.25, 0.24, 0.23))], ids=["imagenet", "own"]
)
def test_three_channel_kernels_fold_to_equal_outputs(
    tmp_path: Path, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> None:
    model = random_model(replace(SMALL, in_channels=3))
    save_file(model.state_dict(), tmp_path / "rgb.safetensors")
    loaded = load_backbone(tmp_path / "rgb.safetensors", channel_mean=mean, channel_std=std)
    assert loaded.config == replace(model.config, in_channels=1)
    assert read_backbone_config(tmp_path / "rgb.safetensors")["preprocess_id"] == GREY_RECIPE
    pixels = grey().double()
    channels = (pixels.expand(-1, 3, -1, -1) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = model.double()(channels)
        found = loaded.double()((pixels - GREY_MEAN) / GREY_STD)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_positions_are_resized_to_another_image_size(tmp_path: Path) -> None:
    model = random_model()
    save_backbone(model, tmp_path, GREY_RECIPE)
    loaded = load_backbone(tmp_path, image_size=96)
    assert loaded.config == replace(SMALL, image_size=96)
    assert loaded.pos_embed.shape == (1, 145, 64)
    batch = grey(side=96)
    for a, b in zip(loaded(batch), model(batch), strict=True):  # the same as interpolating at every forward
        torch.testing.assert_close(a, b)
    with pytest.raises(ConfigError, match="100 is not a multiple"):
        load_backbone(tmp_path, image_size=100)


def corrupt_key(state: State) -> None:
    state["blocks.1.attn.qkv.wieght"] = state.pop("blocks.1.attn.qkv.weight")


def drop_key(state: State) -> None:
    del state["blocks.2.ls2.gamma"]


def extra_key(state: State) -> None:
    state["rope.periods"] = torch.zeros(4)


def wrong_shape(state: State) -> None:
    state["blocks.0.mlp.fc1.bias"] = torch.zeros(7)


def not_finite(state: State) -> None:
    state["norm.weight"][3] = float("nan")


def lose_block(state: State) -> None:
    for name in [name for name in state if name.startswith("blocks.1.")]:
        del state[name]


PLANTED = {
    corrupt_key: r"1 missing: blocks\.1\.attn\.qkv\.weight; 1 unexpected: blocks\.1\.attn\.qkv\.wieght",
    drop_key: r"1 missing: blocks\.2\.ls2\.gamma",
    extra_key: r"1 unexpected: rope\.periods",
    wrong_shape: r"1 of the wrong shape: blocks\.0\.mlp\.fc1\.bias is \(7,\), expected \(256,\)",
    not_finite: r"1 with NaN or infinite values: norm\.weight",
    lose_block: r"14 missing: blocks\.1\..* and 8 more",
}


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("own", [True, False], ids=["hilum", "imported"])
def test_any_unexplained_tensor_fails(tmp_path: Path, fault: Callable[[State], None], own: bool) -> None:
    """Defect C3 of the public code: a lenient load left blocks random and nothing failed."""
    state = {name: value.clone() for name, value in random_model().state_dict().items()}
    fault(state)
    if own:
        save_backbone(random_model(), tmp_path, GREY_RECIPE)
        save_file(state, tmp_path / "teacher.safetensors")
    else:
        save_file(state, tmp_path / "teacher.safetensors")
    with pytest.raises(CheckpointError, match=PLANTED[fault]):
        load_backbone(tmp_path / "teacher.safetensors")


def test_chunked_weights_never_leave_a_block_random(tmp_path: Path) -> None:
    """The very case of defect C3: chunked names, and a description that says nothing of chunks."""
    model = random_model()
    save_backbone(model, tmp_path, GREY_RECIPE)
    save_file(chunked(model.state_dict()), tmp_path / "teacher.safetensors")
    assert_equal_models(load_backbone(tmp_path), model)


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    state = random_model().state_dict()
    save_file(state | {"module.cls_token": torch.zeros(1, 1, 64)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="both cls_token"):
        load_backbone(tmp_path / "w.safetensors")


def test_what_is_not_a_backbone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_backbone(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no backbone"):
        load_backbone(tmp_path)
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged, or not a checkpoint of torch"):
        load_backbone(tmp_path / "w.pth")
    (tmp_path / "w.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(CheckpointError, match="damaged"):
        load_backbone(tmp_path / "w.safetensors")
    save_file({"conv1.weight": torch.zeros(4, 3, 7, 7)}, tmp_path / "r.safetensors")
    with pytest.raises(CheckpointError, match="not a vision transformer"):
        load_backbone(tmp_path / "r.safetensors")
    save_file({name: value.long() for name, value in random_model().state_dict().items()}, tmp_path / "i.safetensors")
    with pytest.raises(CheckpointError, match=r"floating point, found .*int64"):
        load_backbone(tmp_path / "i.safetensors")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_backbone(random_model(), tmp_path, GREY_RECIPE)
    content = (tmp_path / "teacher.safetensors").read_bytes()
    (tmp_path / "teacher.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load_backbone(tmp_path)


def test_a_folder_of_another_project_is_read_by_its_tensors(tmp_path: Path) -> None:
    """As CheXFound on the Hub: DINOv2's names, and a config.json that only its own code understands."""
    save_file(hub_names(random_model().state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "chexfound", "architectures": ["CheXFoundModel"]}')
    assert load_backbone(tmp_path).config == SMALL
    assert read_backbone_config(tmp_path)["layout"] == "dinov2"


@pytest.mark.parametrize("name", ["teacher.safetensors", "model.safetensors"])
def test_a_description_of_another_format_is_refused_with_advice(tmp_path: Path, name: str) -> None:
    save_file(random_model().state_dict(), tmp_path / name)
    (tmp_path / "config.json").write_text('{"format": "hilum-backbone-9"}')
    with pytest.raises(CheckpointError, match=r"found 'hilum-backbone-9'\. To load weights of another project"):
        load_backbone(tmp_path)


def test_descriptions_cannot_be_redefined(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="preprocess_id"):
        save_backbone(random_model(), tmp_path, GREY_RECIPE, {"preprocess_id": "other"})
    with pytest.raises(ConfigError, match="one channel"):
        save_backbone(random_model(replace(SMALL, in_channels=3)), tmp_path, GREY_RECIPE)


def test_an_unknown_architecture_entry_is_refused(tmp_path: Path) -> None:
    save_backbone(random_model(), tmp_path, GREY_RECIPE)
    state = load_file(tmp_path / "teacher.safetensors")
    save_file(state, tmp_path / "teacher.safetensors")
    content = json.loads((tmp_path / "config.json").read_text())
    content["architecture"]["rope"] = True
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="rope"):
        load_backbone(tmp_path)


def test_folded_kernels_expect_the_recipe_that_the_data_layer_applies() -> None:
    from hilum.data.transforms import PREPROCESSING

    recipe = PREPROCESSING[GREY_RECIPE]
    assert (recipe.mean, recipe.std) == (GREY_MEAN, GREY_STD)


@pytest.mark.slow
def test_the_largest_published_layout_loads(tmp_path: Path) -> None:
    config = replace(SIZES["vitl16_chexfound"], in_channels=3, depth=4)
    model = random_model(config)
    save_file(hub_names(model.state_dict()), tmp_path / "model.safetensors")
    loaded = load_backbone(tmp_path / "model.safetensors", image_size=224)
    assert loaded.config == replace(config, in_channels=1, image_size=224, layer_scale=1e-5)


def test_a_file_that_the_system_does_not_open_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's RuntimeError in place of an OSError: what a failing disk gives."""
    from hilum.backbones import sources

    def refuse(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("unable to open file in read-only mode: Input/output error (5)")

    (tmp_path / "model.safetensors").write_bytes(b"x")
    monkeypatch.setattr(sources, "safe_open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*Input/output error"):
        load_backbone(tmp_path / "model.safetensors")
