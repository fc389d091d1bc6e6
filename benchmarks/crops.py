"""Multi-crop samples per second and core: Hilum's one-channel uint8 views beside the peers' PIL RGB pipeline.

Both sides read the same JPEGs (512 x 512, quality 95) and draw crops from the same distribution (2 global, 8 local)
with the changes that DINOv2's released code runs (blur 0.0 / 0.9 / 0.5). The peer is written here as the public code
composes it: PIL decode to RGB, bicubic crop-resize, brightness, contrast, saturation and hue in random order,
greyscale, blur, solarisation, normalised half-precision tensor of three channels. Its blur is a 9 x 9 convolution on
a float tensor and back, which is what torchvision runs on a PIL image.

What differs besides channels: the resampling filter. PIL's bicubic is antialiased over the crop's full support;
Hilum's is OpenCV's area average when shrinking and cubic when growing. The row "equal filter" is Hilum with PIL's
filter on one-channel images, so the gain that is due to the filter can be seen. And the work: the peer's time includes
normalising its views to floats, Hilum's views are left as bytes, for the device to normalise, which is less work for
the CPU. The row "normalised to float on the CPU" is Hilum with as much of it. The `cxr` preset turns its views, the
others do not. The last row is what is left to a CPU where the device cuts the views: decoding, and drawing them.

Times are CPU time of one thread; pipelines alternate, and the table shows medians over the rounds.
"""

import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.nn import functional as F
from torch.utils.data import Dataset

from hilum.core.seeding import stream
from hilum.data.store import Store, write_arrays
from hilum.data.transforms import crop_box, normalise, preprocessing
from hilum.pretraining import crops as hilum_crops
from hilum.pretraining.crops import CropConfig, draw_views, make_crops
from hilum.pretraining.device_crops import stack_views

SIZES = ((224, 96), (512, 144))
IMAGES, WARM_UP, ROUNDS, SAMPLES_A_ROUND = 16, 4, 9, 12
SIDE, QUALITY = 512, 95
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
BLUR = {"global 1": 0.0, "global 2": 0.9, "local": 0.5}


def example_images(count: int = IMAGES) -> list[np.ndarray]:
    """Smooth anatomy-like fields with film grain; about 1.6 bits a pixel as JPEG, like radiographs."""
    rng = stream(0, "benchmark images")
    images = []
    for _ in range(count):
        coarse = cv2.resize(
            rng.uniform(20, 235, (8, 8)).astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC
        )
        fine = cv2.GaussianBlur(rng.normal(0, 60, (SIDE, SIDE)).astype(np.float32), (0, 0), 4)
        grain = rng.normal(0, 1.7, (SIDE, SIDE))
        images.append(np.clip(coarse + fine + grain, 0, 255).astype(np.uint8))
    return images


class PeerImages(Dataset[list[torch.Tensor]]):
    """The peer's pipeline as a loader sees it: an endless supply of samples of a few files."""

    def __init__(self, files: list[bytes], config: CropConfig, length: int) -> None:
        self.files, self.config, self.length = files, config, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return peer_sample(self.files[index % len(self.files)], self.config, stream(0, "peer", index))


def peer_sample(content: bytes, config: CropConfig, rng: np.random.Generator) -> list[torch.Tensor]:
    """The views of one image as the public code makes them."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    kinds = ["global 1", "global 2"] + ["local"] * config.local_crops
    return [peer_view(image, kind, config, rng) for kind in kinds]


def peer_view(image: Image.Image, kind: str, config: CropConfig, rng: np.random.Generator) -> torch.Tensor:
    size, scale = (
        (config.local_size, config.local_scale) if kind == "local" else (config.global_size, config.global_scale)
    )
    top, left, height, width = crop_box(image.height, image.width, scale, config.ratio, rng)
    view = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.8:
        view = peer_jitter(view, rng)
    if rng.random() < 0.2:
        view = view.convert("L").convert("RGB")
    if rng.random() < BLUR[kind]:
        view = peer_blur(view, rng.uniform(0.1, 2.0))
    if kind == "global 2" and rng.random() < 0.2:
        view = ImageOps.solarize(view, 128)
    tensor = torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous().float().div_(255)
    return tensor.sub_(IMAGENET_MEAN).div_(IMAGENET_STD).half()


def peer_jitter(view: Image.Image, rng: np.random.Generator) -> Image.Image:
    enhancers = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }
    strength = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2}
    for change in rng.permutation([*enhancers, "hue"]):
        if change == "hue":
            hue, saturation, value = view.convert("HSV").split()
            shifted = np.array(hue) + np.uint8(int(rng.uniform(-0.1, 0.1) * 255) % 256)
            view = Image.merge("HSV", (Image.fromarray(shifted, "L"), saturation, value)).convert("RGB")
        else:
            view = enhancers[change](view).enhance(1 + strength[change] * rng.uniform(-1, 1))
    return view


def peer_blur(view: Image.Image, sigma: float) -> Image.Image:
    tensor = torch.from_numpy(np.array(view)).permute(2, 0, 1)[None].float()
    taps = torch.exp(-0.5 * (torch.arange(-4.0, 5.0) / sigma) ** 2)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    padded = F.pad(tensor, (4, 4, 4, 4), mode="reflect")
    blurred = F.conv2d(padded, kernel.expand(3, 1, 9, 9), groups=3)
    return Image.fromarray(blurred[0].round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def pil_resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """PIL's antialiased bicubic on one channel."""
    return np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC))


def measure(global_size: int, local_size: int, images: list[np.ndarray], folder: Path) -> dict[str, dict[str, float]]:
    released = CropConfig(global_size, local_size, augmentation="dinov2_as_released")
    cxr = CropConfig(global_size, local_size, augmentation="cxr")
    options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    files = [cv2.imencode(".jpg", image, options)[1].tobytes() for image in images]
    stores = {name: open_store(folder / name, images, name) for name in ("jpeg95", "raw")}
    recipe = preprocessing("hilum-grey-1")

    def ours(store: Store, config: CropConfig, floats: bool = False) -> Callable[[int, np.random.Generator], None]:
        def sample(index: int, rng: np.random.Generator) -> None:
            for views in make_crops(store.read(index), config, rng):
                if floats:
                    normalise(torch.from_numpy(views[:, None]), recipe)

        return sample

    def drawn(index: int, rng: np.random.Generator) -> None:
        pixels = stores["jpeg95"].read(index)
        views = draw_views(pixels.shape[0], pixels.shape[1], cxr, rng)
        stack_views([views[: cxr.global_crops]], cxr.global_size)
        stack_views([views[cxr.global_crops :]], cxr.local_size)

    def equal_filter(index: int, rng: np.random.Generator) -> None:
        with patch.multiple(hilum_crops, resize=pil_resize, shrink=pil_resize):
            make_crops(stores["jpeg95"].read(index), released, rng)

    rows = {
        "peer: PIL, RGB, JPEG": lambda index, rng: peer_sample(files[index], released, rng),
        "hilum, same changes, JPEG store": ours(stores["jpeg95"], released),
        "  equal filter (PIL bicubic)": equal_filter,
        "  normalised to float on the CPU": ours(stores["jpeg95"], released, floats=True),
        "  raw store": ours(stores["raw"], released),
        "  cxr preset, JPEG store": ours(stores["jpeg95"], cxr),
        "  cxr preset, cut on the device": drawn,
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for round_number in range(-WARM_UP, ROUNDS):
        for name, sample in rows.items():
            samples = SAMPLES_A_ROUND if name.startswith("peer") else 4 * SAMPLES_A_ROUND
            start = time.process_time()
            for number in range(samples):
                sample(number % IMAGES, stream(0, "sample", round_number, number))
            if round_number >= 0:
                times[name].append((time.process_time() - start) / samples)
    peer = times["peer: PIL, RGB, JPEG"]
    results = {}
    for name, values in times.items():
        ratios = [theirs / mine for theirs, mine in zip(peer, values, strict=True)]
        results[name] = {
            "samples_per_second": 1 / statistics.median(values),
            "times_peer": statistics.median(ratios),
            "times_peer_low": min(ratios),
            "times_peer_high": max(ratios),
        }
    return results


def open_store(path: Path, images: list[np.ndarray], encoding: str) -> Store:
    if (path / "store.json").exists():
        return Store.open(path)
    return write_arrays(path, images, np.zeros((len(images), 1), np.int8), ["Normal"], encoding=encoding)


def main() -> dict[str, dict[str, dict[str, float]]]:
    """Print one table per size; return what it shows."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    images = example_images()
    bits = statistics.mean(
        8 * len(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]) / SIDE**2 for image in images
    )
    print(
        f"{IMAGES} images of {SIDE} x {SIDE}, JPEG quality {QUALITY}, {bits:.1f} bits a pixel; 2 global + 8 local crops"
    )
    print("median over rounds of CPU time, one thread; in brackets the range of the ratio over rounds")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for global_size, local_size in SIZES:
            key = f"{global_size}/{local_size}"
            results[key] = measure(global_size, local_size, images, Path(folder))
            print(f"\n{key:36}{'samples/s/core':>16}{'times the peer':>18}")
            for name, row in results[key].items():
                spread = f"({row['times_peer_low']:.1f}-{row['times_peer_high']:.1f})"
                print(f"{name:36}{row['samples_per_second']:16.0f}{row['times_peer']:10.1f}  {spread}")
    return results


if __name__ == "__main__":
    main()
    sys.stdout.flush()
