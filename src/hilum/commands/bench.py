"""`hilum bench NAME`: run a benchmark of the checkout's `benchmarks/` folder, each with a peer or a floor beside it.

The benchmarks are not part of the installed package: they carry the peers' pipelines as a yardstick.
"""

import runpy
import sys
import traceback
from pathlib import Path

from hilum.core.errors import HilumError, UnknownNameError
from hilum.core.tracking import say

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"


def run(name: str) -> None:
    """Run one benchmark, or all of them in alphabetical order, each whatever became of those before.

    Raises:
        HilumError: Hilum is not installed from a checkout, or some of all failed.
        UnknownNameError: no such benchmark.
    """
    found = {path.stem.replace("_", "-"): path for path in FOLDER.glob("*.py") if not path.stem.startswith("_")}
    if not found:
        raise HilumError(f"No benchmarks in {FOLDER}. They come with the source: clone it and `pip install -e .`.")
    if name != "all" and name not in found:
        raise UnknownNameError("benchmark", name, [*found, "all"])
    if name != "all":
        _run_alone(name, found[name])
        return
    failed = []
    for benchmark in sorted(found):
        try:
            _run_alone(benchmark, found[benchmark])
        except SystemExit as ended:
            if ended.code:
                failed.append(f"{benchmark} ({ended.code})")
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{benchmark} ({type(error).__name__}: {error})")
    if failed:
        raise HilumError(f"{len(failed)} of {len(found)} benchmarks failed: {', '.join(failed)}")


def _run_alone(name: str, path: Path) -> None:
    """As `python PATH` would: the words of `hilum bench` are not the benchmark's."""
    say(f"== {name}")
    words, sys.argv = sys.argv, [str(path)]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = words
