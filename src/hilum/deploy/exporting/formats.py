"""A traced network to a file of another program, and that file as something that reads squares again.

To add a format: a function here, and a line in `FORMATS`.
"""

import io
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from hilum.core.errors import ConfigError
from hilum.deploy.engines import OnnxSession, OpenVinoSession, Session
from hilum.deploy.exporting.graph import INPUT, OUTPUTS, program_of
from hilum.deploy.network import Network
from hilum.deploy.runtimes import openvino, quiet_exporters

OPSET = 18
"""Version of ONNX's operators: the first with all that is used, so that old runtimes read the graph too."""


@dataclass(frozen=True)
class Written:
    """A graph that was written."""

    graph: str
    """Name of the file to open."""
    facts: dict[str, Any]
    """For `export.json`: opset, versions."""
    reopen: Callable[[Path], Session]
    """Opens that file as its users do."""


def write_onnx(network: Network, folder: Path, notes: Mapping[str, str]) -> Written:
    """`model.onnx`; above 1.5 GB the weights lie beside it, as ONNX has it.

    Raises:
        ConfigError: a package is missing.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch translates with it)
    except ImportError as error:
        raise ConfigError('This format needs the extra: pip install "hilum[export]".') from error
    with torch.no_grad(), warnings.catch_warnings(), quiet_exporters(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        translated = torch.onnx.export(
            program_of(network), dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=list(OUTPUTS),
            verbose=False,
        )  # fmt: skip
        assert translated is not None
        translated.model.metadata_props.update(notes)
        translated.save(folder / "model.onnx")
    return Written("model.onnx", {"opset": OPSET, "onnx": onnx.__version__, "torch": torch.__version__}, OnnxSession)


def write_openvino(network: Network, folder: Path, notes: Mapping[str, str]) -> Written:
    """`model.xml` and `model.bin`, weights in float32, by way of ONNX; nothing is sent anywhere.

    Raises:
        ConfigError: a package is missing.
    """
    runtime = openvino()
    with TemporaryDirectory() as temporary:
        facts = write_onnx(network, Path(temporary), notes).facts
        model = runtime.Core().read_model(Path(temporary) / "model.onnx")
        for name, text in notes.items():
            model.set_rt_info(text, name)
        runtime.save_model(model, folder / "model.xml", compress_to_fp16=False)
        del model  # it maps the file that is about to go
    return Written("model.xml", {**facts, "openvino": runtime.__version__}, OpenVinoSession)


def write_torch_export(network: Network, folder: Path, notes: Mapping[str, str]) -> Written:
    """`model.pt2`, for `torch.export.load`. Hilum itself reads none: the format allows pickles."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(
            program_of(network), folder / "model.pt2", extra_files={"hilum.txt": "\n".join(notes.values())}
        )
    return Written("model.pt2", {"torch": torch.__version__}, _ProgramSession)


class _ProgramSession:
    """An exported program that this process has just written."""

    def __init__(self, file: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.run = torch.export.load(file).module()

    def __call__(self, squares: UInt8[np.ndarray, "B 1 S S"], maps: bool) -> dict[str, np.ndarray]:
        """Run it."""
        with torch.no_grad():
            found = self.run(torch.from_numpy(np.ascontiguousarray(squares)))
        return {name: value.numpy() for name, value in zip(OUTPUTS, found, strict=True)}


FORMATS: dict[str, Callable[[Network, Path, Mapping[str, str]], Written]] = {
    "onnx": write_onnx,
    "openvino": write_openvino,
    "torch-export": write_torch_export,
}
"""Graphs, by name on the command line; "huggingface" is weights and has a module of its own."""
