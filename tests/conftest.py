"""Shared by all tests: annotations checked while running, the real sample, quiet threads, and what was measured."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import jaxtyping
import pytest

# Before anything of hilum is imported: every annotation of the package is checked in every call, shapes too. An int
# passes for a float, as it does for mypy. Programs that tests start as processes of their own are not checked, and
# nothing is where there is no beartype, as on a GPU image.
with contextlib.suppress(ModuleNotFoundError):
    import beartype  # noqa: F401

    jaxtyping.install_import_hook("hilum", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

LINES = pytest.StashKey[list[str]]()
NIH_SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "nih-sample"


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not checked, as outside the tests: for what a public edge says itself of input that is wrong."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def nih_sample() -> Path:
    """The 780 real NIH images beside the repository, or a skip with the reason."""
    if not (NIH_SAMPLE / "Data_Entry_2017_v2020.csv").exists():
        pytest.skip("the NIH sample is not beside this checkout (../shared/data/nih-sample)")
    return NIH_SAMPLE


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Add a line to the summary of the run: a figure that a document may name."""
    return request.config.stash.setdefault(LINES, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(LINES, [])
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)
