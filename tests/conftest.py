"""Shared by all tests: runtime shape checks, the real sample, and quiet threads."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest

NIH_SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "nih-sample"


@pytest.fixture(scope="session")
def nih_sample() -> Path:
    """The 780 real NIH images beside the repository, or a skip with the reason."""
    if not (NIH_SAMPLE / "Data_Entry_2017_v2020.csv").exists():
        pytest.skip("the NIH sample is not beside this checkout (../shared/data/nih-sample)")
    return NIH_SAMPLE
