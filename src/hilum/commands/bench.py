"""`hilum bench NAME`: run a benchmark of the checkout's `benchmarks/` folder, each with a peer or a floor beside it.

The benchmarks are not part of the installed package: they carry the peers' pipelines as a yardstick.
"""

import runpy
from pathlib import Path

from hilum.core.errors import HilumError, UnknownNameError
from hilum.core.tracking import say

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"


def run(name: str) -> None:
    """Run one benchmark, or all of them in alphabetical order.

    Raises:
        HilumError: Hilum is not installed from a checkout.
        UnknownNameError: no such benchmark.
    """
    found = {path.stem.replace("_", "-"): path for path in FOLDER.glob("*.py") if not path.stem.startswith("_")}
    if not found:
        raise HilumError(f"No benchmarks in {FOLDER}. They come with the source: clone it and `pip install -e .`.")
    if name != "all" and name not in found:
        raise UnknownNameError("benchmark", name, [*found, "all"])
    for benchmark in sorted(found) if name == "all" else [name]:
        say(f"== {benchmark}")
        runpy.run_path(str(found[benchmark]), run_name="__main__")
