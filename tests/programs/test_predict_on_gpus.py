"""`hilum predict --devices` on GPUs. A file of its own, which imports nothing that a GPU image may lack."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fit_stores import DECODER, make_store

from hilum.commands import fit, predict
from hilum.core.config import override
from hilum.evaluation.predictions import read_predictions


@pytest.mark.gpu
def test_a_process_for_every_gpu_says_what_a_cpu_says(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    fit.run(override(DECODER, ["resolution=32"]), tmp_path / "store", "random:demo16", tmp_path / "model", device="cpu")
    target, devices = [f"{tmp_path / 'store'}:train"], torch.cuda.device_count()
    predict.run(tmp_path / "model", target, tmp_path / "one.csv", device="cpu", batch_size=2)
    predict.run(tmp_path / "model", target, tmp_path / "all.csv", device="cuda", batch_size=2, devices=devices)
    one, every = read_predictions(tmp_path / "one.csv"), read_predictions(tmp_path / "all.csv")
    np.testing.assert_allclose(one.probabilities, every.probabilities, atol=1e-3)
    assert one.image_uid.tolist() == every.image_uid.tolist()
