"""Views made by matrix products, beside OpenCV's. Torch on the CPU stands for any device; a GPU has its own tests."""

from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hilum.core.seeding import stream
from hilum.pretraining import device_crops
from hilum.pretraining.crops import (
    AUGMENTATIONS,
    CropConfig,
    Jitter,
    Noise,
    View,
    Window,
    change,
    cut,
    draw_views,
    make_crops,
)
from hilum.pretraining.device_crops import render, stack_views

SHAPES = ((64, 64), (70, 96), (120, 64), (24, 30), (41, 40))


def grainy(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """White noise: every tie that rounding can meet, and the steepest edges."""
    return stream(seed, "grain").integers(0, 256, shape, dtype=np.uint8)


def smooth(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Fields with a little grain, as in a radiograph."""
    rng = stream(seed, "smooth")
    coarse = cv2.resize(rng.uniform(20, 235, (8, 8)).astype(np.float32), shape[::-1], interpolation=cv2.INTER_CUBIC)
    return np.clip(coarse + rng.normal(0, 2, shape), 0, 255).astype(np.uint8)


def rendered(
    images: list[np.ndarray], views: list[list[View]], device: str = "cpu", chunk_bytes: int | None = None
) -> np.ndarray:
    """Views of one size by the device's way, (B, K, S, S)."""
    shapes = torch.tensor([image.shape for image in images])
    sources = np.full((len(images), *shapes.amax(dim=0).tolist()), 255, np.uint8)  # what is beyond must not matter
    for place, image in zip(sources, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    stacked = stack_views(views, views[0][0].size)
    moved = stacked.each(lambda tensor: tensor.to(device))
    made = render(torch.from_numpy(sources).to(device), moved, stacked, shapes, chunk_bytes)
    return made.view(len(views[0]), len(images), *made.shape[2:]).transpose(0, 1).cpu().numpy()


def reference(images: list[np.ndarray], views: list[list[View]]) -> np.ndarray:
    """The same by OpenCV."""
    return np.array(
        [
            [change(cut(image, image.astype(np.float32), view), view) for view in row]
            for image, row in zip(images, views, strict=True)
        ]
    )


def differences(images: list[np.ndarray], config: CropConfig, seed: int = 0, device: str = "cpu") -> np.ndarray:
    """Grey levels between the two ways, over all pixels of all views."""
    drawn = [draw_views(*image.shape, config, stream(seed, "views", place)) for place, image in enumerate(images)]
    parts = [views[: config.global_crops] for views in drawn], [views[config.global_crops :] for views in drawn]
    found = [rendered(images, part, device).astype(int) - reference(images, part) for part in parts]
    return np.abs(np.concatenate([values.ravel() for values in found]))


@pytest.mark.parametrize("sizes", [(32, 16), (48, 40), (96, 64)])
@pytest.mark.parametrize("rotation", [0.0, 20.0])
def test_cut_resized_turned_and_flipped_within_one_level_everywhere(sizes: tuple[int, int], rotation: float) -> None:
    """Boxes that shrink, that grow, and that do one in each direction; sources of several sizes in one batch."""
    config = CropConfig(*sizes, augmentation="none", rotation=rotation)
    images = [grainy(shape, seed) for seed, shape in enumerate(SHAPES)]
    levels = np.concatenate([differences(images, config, seed) for seed in range(3)])
    assert levels.max() <= 1
    assert (levels > 0).mean() < 2e-3


@pytest.mark.parametrize(
    "box", [(50, 40), (40, 50), (64, 20), (20, 64), (32, 40), (40, 32), (33, 31), (64, 64), (9, 9)]
)
def test_a_box_is_resized_as_the_reference_does(box: tuple[int, int]) -> None:
    height, width = box
    image = grainy((64, 64), height)
    view = View(32, (64 - height, 64 - width, height, width))
    expected = cut(image, image.astype(np.float32), view).astype(int)
    found = rendered([image], [[view]])[0, 0]
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 0.1  # without IPP, OpenCV rounds cubic weights to 11 bits


CHANGES = {
    "brightness, contrast": {"jitter": Jitter(1.3, 0.7, True)},
    "contrast, brightness": {"jitter": Jitter(0.7, 1.35, False)},
    "window": {"window": Window(0.8, 0.8, 0.1)},
    "both": {"jitter": Jitter(0.9, 1.1, False), "window": Window(1.2, 1.3, -0.1)},
    "little blur": {"blur": 0.4},
    "much blur": {"blur": 2.0},
    "noise": {"noise": Noise(6.0, 0.999, 0.0)},
    "solarised": {"solarise": True},
    "turned far": {"angle": 77.0},
    "turned": {"angle": -3.0},
    "turned and flipped": {"angle": 30.0, "flip": True},
    "flipped": {"flip": True},
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_alone_is_within_one_level_of_the_reference(name: str) -> None:
    """On a box that needs no resizing: both ways begin with the same levels. Other views of the batch do not change."""
    images = [grainy((40, 40), seed) for seed in range(3)]
    plain = View(40, (0, 0, 40, 40))
    changed = plain._replace(**CHANGES[name])
    views = [[plain, changed], [changed, changed], [plain, plain]]
    found, expected = rendered(images, views).astype(int), reference(images, views).astype(int)
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 2e-3
    assert not np.array_equal(found[1, 0], images[1])
    for at in ((0, 0), (2, 0), (2, 1)):
        assert np.array_equal(found[at], images[at[0]])


@pytest.mark.parametrize("rotation", [None, 0.0, 5.0])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_whole_views_differ_rarely_and_little(name: str, rotation: float | None) -> None:
    """A tie that is rounded the other way early may become two or three levels where the look-up tables are steep."""
    config = CropConfig(48, 24, augmentation=name, rotation=rotation)
    levels = np.concatenate(
        [
            differences([make(shape, seed) for shape in SHAPES], config, seed)
            for make in (grainy, smooth)
            for seed in (1, 2)
        ]
    )
    assert levels.max() <= 3
    assert (levels > 1).mean() < 2e-4
    assert (levels > 0).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_hundreds_of_large_views_differ_rarely_and_little(name: str) -> None:
    """Views of 96 to 512 pixels of rectangular sources; without changes of levels, within one level everywhere."""
    shapes = ((512, 512), (512, 700), (640, 512), (300, 200))
    for global_size, local_size in ((224, 96), (336, 128), (512, 144)):
        config = CropConfig(global_size, local_size, augmentation=name, rotation=5.0)
        images = [make(shape) for shape in shapes for make in (grainy, smooth)]
        levels = np.concatenate([differences(images, config, seed) for seed in range(2)])
        assert levels.max() <= (1 if name == "none" else 4)
        assert (levels > 1).mean() < 2e-4
        assert (levels > 0).mean() < 2e-3


def test_a_planted_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a pixel too far, or no averaging of what shrinks: the comparison must not be blind to either."""
    config = CropConfig(32, 16, augmentation="none")
    images = [smooth((64, 64), 3)]
    real = device_crops._area_weights
    monkeypatch.setattr(device_crops, "_area_weights", lambda start, *rest: real(start, *rest).roll(1, dims=-1))
    assert differences(images, config).max() > 1
    monkeypatch.setattr(device_crops, "_area_weights", device_crops._cubic_weights)
    assert differences([grainy((64, 64))], config).max() > 20


def test_what_is_together_in_a_chunk_does_not_matter() -> None:
    config = CropConfig(32, 16)
    images = [grainy(shape, seed) for seed, shape in enumerate(SHAPES)]
    drawn = [draw_views(*image.shape, config, stream(9, "views", place))[:2] for place, image in enumerate(images)]
    whole = rendered(images, drawn)
    assert np.abs(whole.astype(int) - rendered(images, drawn, chunk_bytes=1)).max() <= 1
    chunks = list(device_crops._chunks(torch.tensor([image.shape for image in images]), 32, 2, 2**20))
    assert 1 < len(chunks) < len(images)
    assert [place for part, _ in chunks for place in range(part.start, part.stop)] == list(range(len(images)))
    for part, (height, width) in chunks:
        assert height == max(image.shape[0] for image in images[part])
        assert width == max(image.shape[1] for image in images[part])


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor (of what it is a view of) that any operation makes."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.size = max(self.size, made.untyped_storage().nbytes())
        return made


def test_memory_is_bounded() -> None:
    """What is made on the way is a few images' at a time, however many there are."""
    config = CropConfig(96, 48, rotation=5.0)
    images = [grainy((128, 160), seed) for seed in range(16)]
    drawn = [draw_views(128, 160, config, stream(1, "views", place))[:2] for place in range(16)]
    rendered(images[:1], drawn[:1])  # what is kept for the next time

    def largest(count: int, chunk_bytes: int | None) -> int:
        with Largest() as noted:
            rendered(images[:count], drawn[:count], chunk_bytes=chunk_bytes)
        return noted.size

    field = 2**20
    assert largest(16, 2**21) <= field
    assert largest(4, 2**21) <= field
    assert largest(16, None) > field


def test_views_of_no_number_and_batches_of_nowhere() -> None:
    images = [grainy((40, 40))]
    empty = stack_views([[]], 16)
    made = render(torch.from_numpy(np.array(images)), empty, empty, torch.tensor([[40, 40]]))
    assert made.shape == (0, 1, 16, 16)
    stacked = stack_views([draw_views(40, 40, CropConfig(16, 8), stream(0, "v"))[:2]], 16)
    meta = stacked.each(lambda tensor: tensor.to("meta"))
    sources = torch.empty((1, 40, 40), dtype=torch.uint8, device="meta")
    assert render(sources, meta, stacked, torch.tensor([[40, 40]])).shape == (2, 1, 16, 16)


def test_autocast_outside_changes_nothing() -> None:
    config = CropConfig(32, 16)
    images = [grainy((64, 64))]
    drawn = [draw_views(64, 64, config, stream(0, "v"))[:2]]
    plain = rendered(images, drawn)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(rendered(images, drawn), plain)


def test_full_precision_is_asked_for_and_given_back() -> None:
    """The switch works without a GPU: what the program allows is as before, whichever of torch's two ways it used."""
    cuda = torch.device("cuda")
    before = torch.get_float32_matmul_precision()
    try:
        for allowed in ("highest", "high"):
            torch.set_float32_matmul_precision(allowed)
            with device_crops._full_precision(cuda):
                assert torch.get_float32_matmul_precision() == "highest"
                assert torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")
            assert torch.get_float32_matmul_precision() == allowed
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with device_crops._full_precision(cuda):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)


def test_no_step_reads_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of tensors that would be on the device are never asked for: a GPU would have to finish first."""
    config = CropConfig(32, 16)
    images = [grainy((64, 64), seed) for seed in range(2)]
    drawn = [draw_views(64, 64, config, stream(seed, "v"))[:2] for seed in range(2)]
    stacked, shapes = stack_views(drawn, 32), torch.tensor([[64, 64]] * 2)
    asked: list[str] = []
    real_chunk = device_crops._render_chunk

    def chunk(pixels: torch.Tensor, views: object, here: object) -> torch.Tensor:
        chosen = device_crops._Chosen(here.each(lambda tensor: tensor.flatten(0, 1)), pixels.device)  # type: ignore[attr-defined]
        names = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "cpu", "numpy")
        with patch.object(device_crops, "_Chosen", lambda *_: chosen):
            for name in names:
                monkeypatch.setattr(torch.Tensor, name, lambda self, *_a, _name=name, **_k: asked.append(_name))
            made = real_chunk(pixels, views, here)  # type: ignore[arg-type]
            monkeypatch.undo()
        return made

    device_crops._field(32, torch.device("cpu")), device_crops._band(32, torch.device("cpu"))
    with patch.object(device_crops, "_render_chunk", chunk):
        render(torch.from_numpy(np.array(images)), stacked, stacked, shapes)
    assert asked == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_gpu_makes_the_same_views(name: str) -> None:
    config = CropConfig(224, 96, augmentation=name, rotation=5.0)
    images = [make(shape) for shape in ((512, 512), (512, 600), (300, 200)) for make in (grainy, smooth)]
    torch.set_float32_matmul_precision("high")
    try:
        levels = differences(images, config, device="cuda")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert levels.max() <= (1 if name == "none" else 4)
    assert (levels > 1).mean() < 2e-4
    assert (levels > 0).mean() < 2e-3


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for() -> None:
    images = [grainy((64, 64), seed) for seed in range(2)]
    drawn = [draw_views(64, 64, CropConfig(32, 16), stream(seed, "v"))[:2] for seed in range(2)]
    stacked = stack_views(drawn, 32)
    moved = stacked.each(lambda tensor: tensor.cuda())
    sources = torch.from_numpy(np.array(images)).cuda()
    for _ in range(2):  # fields that are kept are made in the first round
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            render(sources, moved, stacked, torch.tensor([[64, 64]] * 2))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_two_ways_draw_the_same_views() -> None:
    config = CropConfig(32, 16, augmentation="none")
    image = smooth((64, 64))
    global_views, _ = make_crops(image, config, stream(5, "v"))
    found = rendered([image], [draw_views(64, 64, config, stream(5, "v"))[:2]])[0]
    assert np.abs(found.astype(int) - global_views).max() <= 1
