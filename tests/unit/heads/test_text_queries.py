"""Text vectors as encoders write them: any precision, exact as far as float32 goes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hilum.heads.text_queries import read_vectors


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_safetensors_file_may_be_of_any_precision(tmp_path: Path, kind: torch.dtype) -> None:
    """numpy knows no bfloat16, in which many encoders are kept."""
    vectors = torch.tensor([[0.1, -2.0, 3.0], [1.0, 0.0, -7.3]], dtype=torch.float64).to(kind)
    save_file({"Edema": vectors[0].clone(), "Mass": vectors[1].clone()}, tmp_path / "vectors.safetensors")
    found = read_vectors(tmp_path / "vectors.safetensors", ["Mass", "Edema"])
    expected = vectors.flip(0).double().numpy()
    expected *= np.sqrt(3) / np.linalg.norm(expected, axis=1, keepdims=True)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.astype(np.float32))
