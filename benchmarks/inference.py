"""Prediction beside torch eager fp32: on a CPU ViT-B/16 at 224 and 512, on a GPU ViT-L/16 at 512 with decoding.

CPU. Every side is given the same uint8 squares and gives [CLS] and logits of a random network (speed needs no trained
one). The peer is `transformers`' DINOv2 with registers in float32, what others ship; ratios are to Hilum's own torch
eager fp32, which stands beside it. Sides take turns, one thread, CPU time, medians over rounds; the load of the machine
is printed, since what runs beside slows bf16 products more than float32. Exports are made by `hilum export`'s own
functions. Where `outputs/demo` is (`make demo`), a second table says what each engine does to a trained model's values.

GPU. Decoding of JPEG files included; the ideal is the products of one forward pass at 790 TFLOP/s (one H200); the peer
is timm in eager bf16 with PIL, where timm can be imported. Without a GPU the row says "not measured".

HILUM_BENCH_QUICK: fewer rounds and a small network, to try this program out.
"""

import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from hilum.backbones.vit import SIZES, VisionTransformer, ViTConfig
from hilum.core.seeding import forked, torch_stream
from hilum.data.images import read_image
from hilum.data.store import Store
from hilum.deploy import model_files as files
from hilum.deploy import predictor
from hilum.deploy.engines import GraphNetwork, OnnxSession, OpenVinoSession
from hilum.deploy.exporting.comparing import fixtures, smallest_cosine
from hilum.deploy.exporting.directory import export_model
from hilum.deploy.exporting.formats import write_onnx
from hilum.deploy.exporting.huggingface import at_resolution, to_transformers, transformers_config
from hilum.deploy.network import Network, raw_probabilities
from hilum.deploy.runtimes import openvino
from hilum.heads.registry import HeadConfig, build_head
from hilum.pretraining.flops import _blocks, _embedding

QUICK = bool(os.environ.get("HILUM_BENCH_QUICK"))
SUSTAINED = 790e12
"""bf16 operations a second of one H200 (../shared reference/flops.py)."""
CASES = ((224, 4), (512, 1))
"""Side and batch on a CPU."""
ROUNDS = 2 if QUICK else 5
GOALS = {"torch bf16, packed": ">= 3x", "OpenVINO bf16": ">= 4x"}


def network_of(architecture: ViTConfig, side: int, precision: str = "fp32", device: str = "cpu") -> Network:
    """A random network with a linear head."""
    head = HeadConfig("linear", architecture.embed_dim, 40, 1)
    with forked(0, "inference"):
        backbone, built = VisionTransformer(architecture), build_head(head)
    generator = torch_stream(0, "inference")
    for name, parameter in backbone.named_parameters():
        if name.endswith("gamma"):  # so that every block counts
            parameter.data.copy_(0.1 + 0.02 * torch.randn(parameter.shape, generator=generator))
    findings = tuple(files.Finding(f"finding {number}", "head", True, 1, 2) for number in range(40))
    config = files.NetworkConfig(architecture, head, findings, "hilum-grey-1", side, None, precision=precision)
    return Network(config, backbone, built, device)


def peer_of(network: Network) -> Callable[[np.ndarray], np.ndarray] | None:
    """The same weights in transformers, float32."""
    try:
        import transformers
    except ImportError:
        return None
    architecture, side = network.config.backbone, network.config.resolution
    settings = transformers_config(architecture, side)
    kind = transformers.Dinov2WithRegistersModel if architecture.registers else transformers.Dinov2Model
    config_kind = transformers.Dinov2WithRegistersConfig if architecture.registers else transformers.Dinov2Config
    with tempfile.TemporaryDirectory() as folder:
        state = to_transformers(at_resolution(network.backbone.state_dict(), architecture, side))
        save_file({name: value.contiguous() for name, value in state.items()}, Path(folder) / "model.safetensors",
                  {"format": "pt"})  # fmt: skip
        config_kind(**settings).save_pretrained(folder)
        transformers.utils.logging.disable_progress_bar()
        model = kind.from_pretrained(folder, local_files_only=True).eval()

    def run(squares: np.ndarray) -> np.ndarray:
        images = (torch.from_numpy(squares).float() / 255 - 0.5) / 0.25
        with torch.inference_mode():
            return model(pixel_values=images.expand(-1, 3, -1, -1)).last_hidden_state[:, 0].numpy()

    return run


def sides_of(architecture: ViTConfig, side: int, folder: Path) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Name -> squares to [CLS]."""
    plain = network_of(architecture, side)

    def of(network: Any) -> Callable[[np.ndarray], np.ndarray]:
        return lambda squares: network.read(torch.from_numpy(squares)).cls

    sides = {"torch eager fp32": of(plain)}
    peer = peer_of(plain)
    if peer is not None:
        sides["peer: transformers eager fp32"] = peer
    sides["torch bf16, autocast"] = of(network_of(architecture, side, "bf16"))
    fast = network_of(architecture, side, "bf16")
    if fast.speed_up():
        sides["torch bf16, packed"] = of(fast)
    write_onnx(plain, folder, {})
    sides["ONNX Runtime fp32"] = of(GraphNetwork(plain.config, OnnxSession(folder / "model.onnx")))
    openvino()  # quietly
    for precision in ("fp32", "bf16"):
        session = OpenVinoSession(folder / "model.onnx", precision)
        sides[f"OpenVINO {precision}"] = of(GraphNetwork(plain.config, session))
    return sides


def on_cpu() -> list[dict[str, Any]]:
    """Print and return a row a side."""
    torch.set_num_threads(1)
    rows = []
    for side, batch in CASES:
        architecture = replace(SIZES["vits16" if QUICK else "vitb16"], image_size=side)
        squares = fixtures(side, batch + 2)[2:]
        with tempfile.TemporaryDirectory() as folder:
            sides = sides_of(architecture, side, Path(folder))
            first = {name: run(squares) for name, run in sides.items()}  # warms up, and what it says
            times: dict[str, list[float]] = {name: [] for name in sides}
            loads = []
            for _ in range(ROUNDS):
                loads.append(os.getloadavg()[0])
                for name, run in sides.items():
                    started = time.process_time()
                    run(squares)
                    times[name].append(time.process_time() - started)
        own = times["torch eager fp32"]
        for name, seconds in times.items():
            ratios = [a / b for a, b in zip(own, seconds, strict=True)]
            row = {
                "case": f"ViT-{'S' if QUICK else 'B'}/16 {side}, batch {batch}", "side": name,
                "images a second and core": round(batch / statistics.median(seconds), 2),
                "times torch eager fp32": round(statistics.median(ratios), 2),
                "range": f"{min(ratios):.2f} to {max(ratios):.2f}",
                "cosine": round(smallest_cosine(first["torch eager fp32"], first[name]), 6),
                "goal": GOALS.get(name, ""),
            }  # fmt: skip
            rows.append(row)
            print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
        print(f"load of this machine, {os.cpu_count()} processors: {min(loads):.1f} to {max(loads):.1f}", flush=True)
        del sides
        gc.collect()
    return rows


def accuracy(demo: Path) -> list[dict[str, Any]]:
    """What each engine does to the values of a trained model, on the test split of its store."""
    store = Store.open(demo / "store")
    indices = store.indices("test")
    labels = store.labels[indices]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for engine in ("onnx", "openvino"):
            export_model(demo / "model", engine, Path(folder) / engine)
            made[engine] = Path(folder) / engine
        exact = predictor.load(demo / "model", "cpu")
        expected = exact.predict_store(store, indices).probabilities
        squares = torch.from_numpy(np.stack([exact.networks[0].crop(store.read(int(one))) for one in indices])[:, None])
        cls = exact.networks[0].read(squares).cls
        for name, path, engine, precision in (
            ("torch bf16, packed", demo / "model", "torch", "bf16"), ("ONNX Runtime fp32", made["onnx"], "onnx", None),
            ("OpenVINO fp32", made["openvino"], "openvino", "fp32"),
            ("OpenVINO bf16", made["openvino"], "openvino", "bf16"),
        ):  # fmt: skip
            model = predictor.load(path, "cpu", engine, precision)
            found = model.predict_store(store, indices).probabilities
            row = {
                "engine": name, "images": len(indices),
                "cosine of [CLS]": f"{smallest_cosine(cls, model.networks[0].read(squares).cls):.6f}",
                "largest probability difference": f"{np.nanmax(np.abs(found - expected)):.2g}",
                "largest AUC difference": f"{np.abs(_auc_gaps(labels, expected, found, 1)).max():.2g}",
                "with 10 positives or more": f"{np.abs(_auc_gaps(labels, expected, found, 10)).max():.2g}",
                "difference of mAUC": f"{abs(np.mean(_auc_gaps(labels, expected, found, 1))):.2g}",
            }  # fmt: skip
            rows.append(row)
            print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
    return rows


def _auc_gaps(labels: np.ndarray, one: np.ndarray, other: np.ndarray, positives: int) -> list[float]:
    """Differences of AUC, of findings with so many positives; with one or two, an exchange of ranks is a large one."""
    from sklearn.metrics import roc_auc_score

    gaps = []
    for column in range(labels.shape[1]):
        known = (labels[:, column] >= 0) & np.isfinite(one[:, column])
        truth = labels[known, column]
        if positives <= truth.sum() < len(truth):
            gaps.append(float(roc_auc_score(truth, one[known, column]) - roc_auc_score(truth, other[known, column])))
    return gaps


def on_gpu(images: int = 2048, batch: int = 64, workers: int = 12) -> list[dict[str, Any]]:
    """ViT-L/16 512, JPEG files in, probabilities out; beside the ideal and timm."""
    side, architecture = 512, replace(SIZES["vitl16"], image_size=512)
    case = "ViT-L/16 512, decoding included; GPU"
    if not torch.cuda.is_available():
        print(f"| {case} | not measured: no GPU |")
        return [{"case": case, "failure": "no GPU: not measured", "goal": ">= 75 % of the ideal, >= 1.2x timm eager"}]
    patches = (side // architecture.patch_size) ** 2
    ideal = SUSTAINED / (_blocks(architecture, patches) + _embedding(architecture, patches))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, picture in enumerate(fixtures(side, 64)):
            paths.append(Path(folder) / f"{number}.jpg")
            cv2.imwrite(str(paths[-1]), picture[0], [cv2.IMWRITE_JPEG_QUALITY, 90])
        chosen = [paths[number % len(paths)] for number in range(images)]

        def read(index: int) -> np.ndarray:
            return read_image(chosen[index], chosen[index].name).pixels

        rates = {}
        for name in ("hilum bf16", "hilum bf16, blocks compiled"):
            network = network_of(architecture, side, "bf16", "cuda")
            if "compiled" in name:
                network.backbone.compile_blocks()
            raw_probabilities([network], range(4 * batch), read, batch, workers)
            torch.cuda.synchronize()
            started = time.perf_counter()
            raw_probabilities([network], range(images), read, batch, workers)
            torch.cuda.synchronize()
            rates[name] = images / (time.perf_counter() - started)
        peer = _timm_rate(chosen, batch, workers, side)
    for name, rate in rates.items():
        row = {
            "case": case, "side": name, "images a second": round(rate, 1), "share of the ideal": round(rate / ideal, 3),
            "times timm eager": round(rate / peer, 2) if isinstance(peer, float) else peer,
            "goal": ">= 75 % of the ideal, >= 1.2x timm eager",
        }  # fmt: skip
        rows.append(row)
        print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
    return rows


def _timm_rate(paths: list[Path], batch: int, workers: int, side: int) -> float | str:
    """Images a second of timm's eager loop, or why there is none."""
    try:
        import timm
    except ImportError as error:
        return f"not measured: {error}"
    from PIL import Image

    model = timm.create_model("vit_large_patch16_224", img_size=side, num_classes=0, reg_tokens=4).cuda().eval()

    def decode(path: Path) -> torch.Tensor:
        with Image.open(path) as opened:
            return torch.from_numpy(np.asarray(opened.convert("RGB")).copy()).permute(2, 0, 1)

    def run(chosen: list[Path]) -> None:
        with ThreadPoolExecutor(workers) as pool, torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            waiting = pool.map(decode, chosen)
            for _ in range(0, len(chosen), batch):
                images = torch.stack([next(waiting) for _ in range(batch)]).cuda(non_blocking=True)
                F.normalize(model((images.float() / 255 - 0.5) / 0.25)).cpu()

    run(paths[: 4 * batch])
    started = time.perf_counter()
    run(paths)
    return len(paths) / (time.perf_counter() - started)


def main() -> dict[str, Any]:
    """Print and return all tables."""
    found: dict[str, Any] = {"gpu": on_gpu()}
    if torch.cuda.is_available() and "--cpu" not in sys.argv:
        return found
    found["cpu"] = on_cpu()
    demo = Path(__file__).resolve().parents[1] / "outputs" / "demo"
    if (demo / "model" / "config.json").is_file():
        found["accuracy"] = accuracy(demo)
    else:
        print("Accuracy on a trained model: not measured; `make demo` makes one.")
    return found


if __name__ == "__main__":
    main()
