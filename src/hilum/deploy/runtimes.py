"""The two optional runtimes, imported so that they keep quiet.

Importing OpenVINO sends a usage event and writes `~/intel` where the package `openvino_telemetry` is installed, which
comes with it; ONNX Runtime 1.32 writes an identifier and a queue of events under `~/.cache`. Neither happens here: the
first is imported as where that package is absent, the second is told by its own switch, before it starts. A process
that has imported either of them before Hilum has let it speak already.
"""

import logging
import os
import sys
from types import ModuleType

from hilum.core.errors import ConfigError

_REPORTING = "openvino_telemetry"
_SWITCHES = {"ORT_DISABLE_TELEMETRY": "1"}
_LOUD = ("torch.onnx", "onnxscript", "onnx_ir")


def onnxruntime() -> ModuleType:
    """ONNX Runtime, without usage reports.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.update(_SWITCHES)
    try:
        import onnxruntime as runtime
    except ImportError as error:
        raise ConfigError('--engine onnx needs the extra: pip install "hilum[export]".') from error
    runtime.disable_telemetry_events()
    return runtime  # type: ignore[no-any-return]


def openvino() -> ModuleType:
    """OpenVINO, without usage reports.

    Raises:
        ConfigError: it is not installed.
    """
    absent = _REPORTING not in sys.modules
    if absent:
        sys.modules[_REPORTING] = None  # type: ignore[assignment]  # "not installed", for the import below
    try:
        import openvino as runtime
    except ImportError as error:
        raise ConfigError('OpenVINO needs the extra: pip install "hilum[openvino]".') from error
    finally:
        if absent:
            del sys.modules[_REPORTING]
    return runtime  # type: ignore[no-any-return]


class quiet_exporters:  # noqa: N801 (used as a context)
    """Within it, what torch and ONNX tell of their own progress is not logged; errors are raised all the same."""

    def __enter__(self) -> None:
        self.levels = {name: logging.getLogger(name).level for name in _LOUD}
        for name in _LOUD:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for name, level in self.levels.items():
            logging.getLogger(name).setLevel(level)
