"""Files of text vectors: one vector for each finding, made by any sentence encoder (docs/how-to/add-findings.md)."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.torch import load_file  # numpy's knows no bfloat16

from hilum.core.errors import ConfigError, UnknownNameError


def read_vectors(path: Path, findings: Sequence[str]) -> Float32[np.ndarray, "C T"]:
    """The vectors of some findings, in their order, each scaled to length sqrt(T), so that its entries are of size 1.

    Args:
        path: `.npz` or `.safetensors`, an array (T,) under the name of each finding; others may be there too.
        findings: exact names.

    Raises:
        ConfigError: no such file, damaged, vectors of different or no length, or numbers that are not finite.
        UnknownNameError: a finding without a vector; names the nearest one.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                found = {name: np.asarray(arrays[name], np.float64) for name in arrays.files}
        elif path.suffix == ".safetensors":
            found = {name: value.double().numpy() for name, value in load_file(path).items()}
        else:
            raise ConfigError(f"{path}: text vectors are read from .npz or .safetensors, found {path.suffix!r}.")
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} cannot be read as text vectors: {error}.") from error
    for name in findings:
        if name not in found:
            raise UnknownNameError(f"finding with a text vector in {path.name}", name, found)
    shapes = sorted({found[name].shape for name in findings})
    if len(shapes) != 1 or len(shapes[0]) != 1 or not shapes[0][0]:
        raise ConfigError(f"{path}: expected one vector (T,) per finding, all of one length, found shapes {shapes}.")
    vectors = np.stack([found[name] for name in findings])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(vectors).all() or not (lengths > 0).all():
        bad = [name for name, row in zip(findings, vectors, strict=True) if not np.isfinite(row).all() or not row.any()]
        raise ConfigError(f"{path}: the vectors of {', '.join(bad)} are zero or not finite. Encode them again.")
    return (vectors / lengths * np.sqrt(vectors.shape[1])).astype(np.float32)
