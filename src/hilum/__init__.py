"""Hilum: foundation models for chest X-rays, and calibrated, explained, study-level findings.

Research use only; not a medical device.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hilum.backbones.weights import load_backbone
    from hilum.deploy.feature_transformer import ChestXrayFeatures
    from hilum.deploy.hub_models import from_pretrained
    from hilum.deploy.predictor import load

__version__ = "0.1.0"
__all__ = ["ChestXrayFeatures", "__version__", "from_pretrained", "load", "load_backbone"]

_HOMES = {
    "ChestXrayFeatures": "hilum.deploy.feature_transformer",
    "from_pretrained": "hilum.deploy.hub_models",
    "load": "hilum.deploy.predictor",
    "load_backbone": "hilum.backbones.weights",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import hilum` stays fast and torch-free."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hilum' has no attribute {name!r}")
