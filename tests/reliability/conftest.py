"""The warm process and small stores."""

from collections.abc import Iterator

import pytest
from warm import Warm

import programs


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    process = Warm(tmp_path_factory.mktemp("said"))
    yield process
    process.close()


@pytest.fixture(scope="session")
def bench(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> programs.Bench:
    return programs.Bench(warm, tmp_path_factory.mktemp("reliability"))
