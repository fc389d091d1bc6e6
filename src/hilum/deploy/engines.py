"""Exported graphs as engines of prediction: the same squares in, the same readings out, by ONNX Runtime or OpenVINO.

An EXPORT directory (docs/how-to/export.md) holds everything of its MODEL but the weights, and a graph for each network.
`open_networks` is what `predictor.load` calls; studies, ensembles and calibration are the predictor's either way.
Past 300 lines: both runtimes, which have little but their calls apart, and what chooses between them.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, UInt8
from scipy.special import expit
from torch import Tensor

from hilum.core.errors import CheckpointError, ConfigError, UnknownNameError
from hilum.core.files import read_json, sha256_file
from hilum.deploy import model_files as files
from hilum.deploy.model_files import NetworkConfig
from hilum.deploy.network import Engine, Reading, square_of
from hilum.deploy.runtimes import onnxruntime, openvino

EXPORT_NAME, EXPORT_FORMAT = "export.json", "hilum-export-1"
PRECISIONS = ("fp32", "bf16", "auto")


Session = Callable[[np.ndarray, bool], dict[str, np.ndarray]]
"""A graph that is ready to run: uint8 squares (B, 1, S, S), and whether maps are wanted, to its outputs by name
(`exporting.graph.OUTPUTS`); maps may come unasked."""


class GraphNetwork:
    """A network whose forward pass is an exported graph.

    Args:
        config: of the network that was exported.
        session: its graph.
    """

    def __init__(self, config: NetworkConfig, session: Session) -> None:
        self.config, self.session = config, session
        self.trained = np.array([finding.trained for finding in config.findings])

    @property
    def findings(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(finding.name for finding in self.config.findings)

    @property
    def needs_studies(self) -> bool:
        """Never: a head that looks at whole studies is not exported."""
        return False

    @property
    def over_study(self) -> Bool[np.ndarray, " C"]:
        """Nowhere."""
        return np.zeros(len(self.config.findings), bool)

    def crop(self, pixels: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "S S"]:
        """The square that the network sees of a decoded image."""
        return square_of(pixels, self.config)

    def read(
        self,
        squares: UInt8[Tensor, "B 1 S S"],
        study: Int64[np.ndarray, " B"] | None = None,
        view: Int64[np.ndarray, " B"] | None = None,
        attention: bool = False,
    ) -> Reading:
        """As `Network.read`; `study` and `view` are not looked at."""
        pixels = squares.cpu().numpy()
        found = self.session(pixels, attention)
        values = _sigmoid(found)
        if self.config.flip_average:
            mirrored = self.session(np.ascontiguousarray(pixels[..., ::-1]), False)
            values = (values + _sigmoid(mirrored)) / 2
        values[:, ~self.trained] = np.nan
        maps = found["attention"].astype(np.float64) if attention and "attention" in found else None
        return Reading(values, maps, found["cls"], found["patch_mean"])


def _sigmoid(found: Mapping[str, np.ndarray]) -> Float64[np.ndarray, "B C"]:
    return expit(found["logits"].astype(np.float64))  # in float64, as the predictor's own


class OnnxSession:
    """A graph in ONNX Runtime, float32.

    Args:
        file: `model.onnx`.
        device: cpu, or cuda where that build of ONNX Runtime is installed.
    """

    def __init__(self, file: Path, device: str = "cpu") -> None:
        runtime = onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
        if provider not in runtime.get_available_providers():
            raise ConfigError(f"--device {device}: this build of ONNX Runtime cannot; it has onnxruntime-gpu for that.")
        self.session = runtime.InferenceSession(str(file), options, providers=[provider])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.along_the_way = runtime.RunOptions()
        self.along_the_way.only_execute_path_to_fetches = True

    def __call__(self, squares: UInt8[np.ndarray, "B 1 S S"], maps: bool) -> dict[str, np.ndarray]:
        """Run it; what only the maps need is left out where they are not asked for."""
        wanted = [name for name in self.outputs if maps or name != "attention"]
        found = self.session.run(wanted, {"squares": squares}, self.along_the_way)
        return dict(zip(wanted, found, strict=True))


class OpenVinoSession:
    """A graph in OpenVINO on the CPU.

    Args:
        file: `model.xml`, beside its `model.bin`.
        precision: fp32, or bf16 for matrix products in bfloat16.
    """

    def __init__(self, file: Path, precision: str = "fp32") -> None:
        runtime = openvino()
        core = runtime.Core()
        hints = {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],  # left alone, it decides by itself
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "CACHE_DIR": "",
        }

        def compiled(maps: bool) -> Any:
            model = core.read_model(file)
            if not maps:
                without = [result for result in model.get_results() if "attention" not in result.output(0).names]
                model = runtime.Model(without, model.get_parameters(), "without maps")
            return core.compile_model(model, "CPU", hints)

        self.compile = compiled
        self.ready: dict[bool, Any] = {}

    def __call__(self, squares: UInt8[np.ndarray, "B 1 S S"], maps: bool) -> dict[str, np.ndarray]:
        """Run it; a graph with maps and one without are made when they are first asked for."""
        if maps not in self.ready:
            self.ready[maps] = self.compile(maps)
        model = self.ready[maps]
        request = model.create_infer_request()  # of its own, so that threads do not meet
        results = request.infer([squares])
        return {output.any_name: np.array(results[output]) for output in model.outputs}


def bf16_is_fast() -> bool:
    """Whether this processor has instructions for bfloat16 (AVX-512 BF16 or AMX)."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def choose_precision(asked: str | None, stated: str, device: torch.device | str = "cpu") -> str:
    """fp32 or bf16.

    Args:
        asked: fp32, bf16, auto (bf16 where the processor has instructions for it), or None.
        stated: what the model says, which None leaves as it is; `auto` never makes a bf16 model fp32.
        device: where it runs; every CUDA device counts as having them.

    Raises:
        UnknownNameError: another name.
    """
    if asked is None:
        return stated
    if asked not in PRECISIONS:
        raise UnknownNameError("precision", asked, PRECISIONS)
    if asked == "auto":
        return "bf16" if stated == "bf16" or torch.device(device).type != "cpu" or bf16_is_fast() else "fp32"
    return asked


@dataclass(frozen=True)
class Export:
    """An EXPORT directory, from its `export.json`."""

    path: Path
    content: Mapping[str, Any]

    @property
    def format(self) -> str:
        """onnx, openvino, torch-export or huggingface."""
        return str(self.content["export"])

    def folders(self) -> list[Path]:
        """Where each network is, checked to be of the model that was exported.

        Raises:
            CheckpointError: a member's description is missing or has changed.
        """
        found = []
        for member in self.content["networks"]:
            folder = self.path / str(member["folder"])
            if files.digest_of(folder) != member["model"]:
                raise CheckpointError(f"{folder / files.CONFIG_NAME} has changed since the export. Export again.")
            found.append(folder)
        return found

    def graph(self, number: int) -> Path:
        """The graph of a network, its files held against their digests.

        Raises:
            CheckpointError: a file is missing or has changed.
        """
        member = self.content["networks"][number]
        folder = self.path / str(member["folder"])
        for name, digest in member["files"].items():
            if not (folder / name).is_file() or sha256_file(folder / name) != digest:
                raise CheckpointError(f"{folder / name} is missing or has changed since the export. Export again.")
        return folder / str(member["graph"])


def read_export(path: Path) -> Export | None:
    """The description of an EXPORT directory; None for any other.

    Raises:
        CheckpointError: it is malformed, names files outside, or is of a version that this one does not know.
    """
    if not (path / EXPORT_NAME).is_file():
        return None
    content = read_json(path / EXPORT_NAME, CheckpointError)
    try:
        known = content["format"] == EXPORT_FORMAT and all(
            {"folder", "model", "graph", "files"} <= one.keys() for one in content["networks"]
        )
    except (KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise CheckpointError(f"{path / EXPORT_NAME}: expected format {EXPORT_FORMAT!r}. Export the model again.")
    for name in (str(name) for one in content["networks"] for name in (one["folder"], one["graph"], *one["files"])):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path / EXPORT_NAME} names {name!r}, outside of the export. Do not use it.")
    return Export(path, content)


def _open_onnx(file: Path, precision: str, device: str) -> Session:
    if precision == "bf16":
        raise ConfigError("ONNX Runtime computes in fp32 here: --precision bf16 needs --engine torch or openvino.")
    return OnnxSession(file, "cuda" if device.startswith("cuda") else "cpu")


def _open_openvino(file: Path, precision: str, device: str) -> Session:
    if device.startswith("cuda"):
        raise ConfigError(f"--device {device}: OpenVINO runs on the CPU here; use --engine torch or onnx.")
    return OpenVinoSession(file, precision)


OPENERS: dict[str, Callable[[Path, str, str], Session]] = {"onnx": _open_onnx, "openvino": _open_openvino}
"""Engines that run exported graphs: file, precision, device."""
ENGINES = ("torch", *OPENERS)


def check_engine(path: Path, engine: str | None, export: Export | None) -> None:
    """Whether an engine can run what a directory holds.

    Args:
        path: a MODEL, an ensemble, or an EXPORT directory.
        engine: one of `ENGINES`; None: whatever it holds.
        export: its description, where it is an EXPORT.

    Raises:
        UnknownNameError: no such engine.
        ConfigError: it holds something else.
    """
    if engine is not None and engine not in ENGINES:
        raise UnknownNameError("engine", engine, ENGINES)
    if export is None:
        if engine in OPENERS:
            raise ConfigError(
                f"{path} holds no graph for --engine {engine}. Make one: hilum export {path} --format {engine} "
                "--out EXPORT, and predict with EXPORT."
            )
        return
    if export.format not in OPENERS:
        raise ConfigError(f"{path} is an export for other programs ({export.format}); predict with its MODEL.")
    if engine not in (None, export.format):
        raise ConfigError(f"{path} holds a graph for --engine {export.format}, not for {engine}.")


def open_network(
    export: Export, number: int, config: NetworkConfig, device: str, precision: str | None
) -> GraphNetwork:
    """A network of an EXPORT, ready to run.

    Args:
        export: checked by `check_engine`.
        number: which of its networks.
        config: that network's.
        device: auto, cpu or cuda.
        precision: as `choose_precision`; auto is fp32 where the engine has no other.

    Raises:
        CheckpointError: a graph that is missing, has changed or cannot be read.
        ConfigError: a device or precision that this engine does not have, or a missing extra.
    """
    chosen = choose_precision(precision, "fp32" if export.format == "onnx" else config.precision)
    if export.format == "onnx" and precision == "auto":
        chosen = "fp32"
    file = export.graph(number)
    try:
        session = OPENERS[export.format](file, chosen, device)
    except (ConfigError, CheckpointError):
        raise
    except Exception as error:  # the runtimes raise what they like
        raise CheckpointError(f"{os.fspath(file)} cannot be opened: {str(error).splitlines()[0]}.") from error
    return GraphNetwork(replace(config, precision=chosen), session)


def computed_by(export: Export | None, networks: Sequence[Engine], stated: Sequence[str]) -> dict[str, str]:
    """For the metadata of predictions: engine and precision, where they are not torch and what the models say."""
    used = [network.config.precision for network in networks]
    return {
        **({} if export is None else {"engine": export.format}),
        **({"precision": ", ".join(sorted(set(used)))} if used != list(stated) else {}),
    }
