"""Import graph: what may not be imported, and what must stay cheap, each shown in a fresh interpreter."""

import subprocess
import sys

import pytest

# Blocked packages can be looked up, as lazy importers do, and not loaded.
BLOCKER = """
import sys
from importlib.machinery import ModuleSpec

class Blocker:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.split(".")[0] in BLOCKED else None

    def create_module(self, spec):
        raise ImportError(f"{spec.name} is blocked in this test")

    def exec_module(self, module):
        raise AssertionError("never reached")

sys.meta_path.insert(0, Blocker())
"""


def run_blocked(blocked: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter in which the top-level packages `blocked` cannot be imported."""
    program = f"BLOCKED = {blocked!r}\n{BLOCKER}\n{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_the_blocker_blocks() -> None:
    assert "yaml is blocked" in run_blocked({"yaml"}, "import hilum.core.config").stderr


@pytest.mark.parametrize("program", ["hilum.commands.pretrain", "hilum.commands.fit", "hilum.recipes"])
def test_the_training_path_runs_on_a_bare_gpu_image(program: str) -> None:
    blocked = {"polars", "pydicom", "pydantic", "fastapi", "torchvision", "timm", "transformers", "xformers"}
    done = run_blocked(blocked, f"import {program}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "hilum",
        "hilum.cli",
        "hilum.evaluation.metrics",
        "hilum.evaluation.predictions",
        "hilum.evaluation.report",
        "hilum.data.images",
        "hilum.data.store",
        "hilum.data.webdataset_reading",
        "hilum.data.manifest",
        "hilum.data.phantoms.writing",
    ],
)
def test_tables_and_numbers_need_no_torch(module: str) -> None:
    done = run_blocked({"torch", "lightning_fabric", "lightning"}, f"import {module}")
    assert done.returncode == 0, done.stderr


def test_public_names_are_these() -> None:
    import hilum

    assert hilum.__all__ == ["ChestXrayFeatures", "__version__", "from_pretrained", "load", "load_backbone"]
    for name in hilum.__all__:
        assert getattr(hilum, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        hilum.lod  # noqa: B018
