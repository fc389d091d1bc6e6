"""hilum import-weights: other people's backbone to a folder of Hilum's own, strictly, with a report of every tensor."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hilum.backbones.pickled import SUFFIXES, convert_in_child
from hilum.backbones.sources import CONFIG_NAME, PROCESSOR_NAME, WEIGHTS_NAME, find_weights
from hilum.backbones.weights import load_backbone, read_backbone_config, resolve_weights, save_backbone
from hilum.core.errors import CheckpointError, ConfigError
from hilum.core.files import sha256_file
from hilum.core.tracking import next_step, say

SHOWN = 3
"""Keys of each kind that are printed; config.json lists all."""


def run(source: str, out: Path, patch_size: int | None = None, image_size: int | None = None) -> None:
    """Convert, and print what was mapped, what was left out and what was filled in.

    A pickled file is read in a child process without network; this process reads safetensors only.

    Args:
        source: a weights file, a folder with one, or `owner/name` on the Hugging Face Hub.
        out: a new folder; gets `teacher.safetensors` and `config.json` with everything that was done.
        patch_size: resample the patch kernel to patches of this side, pixels.
        image_size: lay the positions out for squares of this side, pixels.

    Raises:
        CheckpointError: refused, damaged, or any tensor that cannot be explained.
        ConfigError: `out` holds weights already, the source is Hilum's own, or a size that does not fit.
        HilumError: the disk is full or the folder cannot be written.
    """
    if taken := [name for name in (WEIGHTS_NAME, CONFIG_NAME) if (out / name).exists()]:
        raise ConfigError(f"{out} holds {', '.join(taken)} already; choose a new folder.")
    with readable(source) as (file, tensors):
        _convert(file, tensors, out, patch_size, image_size)


@contextmanager
def readable(source: str) -> Iterator[tuple[Path, Path]]:
    """The file that a source names, and what this process may read in its place: a pickle is converted in a child.

    Raises:
        CheckpointError: nothing there, refused, or damaged.
    """
    path = resolve_weights(source)
    file = find_weights(path)
    if file.suffix not in SUFFIXES:
        yield file, path
        return
    with tempfile.TemporaryDirectory(prefix="hilum-import-") as temporary:
        tensors = Path(temporary) / "model.safetensors"
        convert_in_child(file, tensors)
        for name in (CONFIG_NAME, PROCESSOR_NAME):
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, Path(temporary) / name)
        try:
            yield file, tensors
        except CheckpointError as error:  # the temporary name means nothing to anybody
            raise CheckpointError(str(error).replace(str(tensors), str(file))) from error


def _convert(file: Path, readable: Path, out: Path, patch_size: int | None, image_size: int | None) -> None:
    """Load `readable`, which holds the tensors of `file`, and save it as Hilum's own."""
    described = read_backbone_config(readable)
    if described["format"] != "imported":
        raise ConfigError(f"{file} is Hilum's own already: name it as it is, wherever weights are asked for.")
    model = load_backbone(readable, image_size=image_size, patch_size=patch_size)
    record: dict[str, Any] = {
        "file": file.name,
        "sha256": sha256_file(file),
        "stored": {key: described["architecture"][key] for key in ("patch_size", "image_size")},
    }
    record |= {key: described[key] for key in ("layout", "normalisation", "left_out", "filled")}
    save_backbone(model, out, described["preprocess_id"], {"imported": record})
    config, sizes = model.config, [parameter.numel() for parameter in model.parameters()]
    say(
        f"{file.name}: layout of {record['layout']}; ViT of {config.depth} blocks of {config.embed_dim} channels, "
        f"{config.registers} registers, {config.feed_forward}; {sum(sizes):,} numbers."
    )
    say(f"  mapped: all {len(sizes)} tensors are filled, from the file but for what is named here; none is left over")
    for name, what in record["filled"].items():
        say(f"  filled in, {name}: {what}")
    for reason, keys in record["left_out"].items():
        rest = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        say(f"  left out, {reason}: {', '.join(keys[:SHOWN])}{rest}")
    _say_normalisation(record["normalisation"], described["preprocess_id"])
    if config.patch_size != record["stored"]["patch_size"]:
        say(f"  patches of {record['stored']['patch_size']} pixels resampled to {config.patch_size}")
    if config.image_size != record["stored"]["image_size"]:
        say(f"  positions for {config.image_size} pixels; stored for {record['stored']['image_size']}")
    say(f"  which images these weights have seen is not recorded; {out / CONFIG_NAME} records the rest")
    next_step(f"hilum fit linear --data store --backbone {out} --out model")


def _say_normalisation(normalisation: dict[str, Any] | None, preprocess_id: str) -> None:
    if normalisation is None:
        say("  nothing tells how its images were normalised: heads cannot be fitted on it")
        return
    mean, std = (", ".join(f"{one:g}" for one in normalisation[key]) for key in ("mean", "std"))
    say(f"  absorbed for {preprocess_id}: mean {mean}; deviation {std} ({normalisation['from']})")
