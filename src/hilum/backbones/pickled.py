"""Pickled checkpoints (.pth, .pt, .bin) as named tensors, and nothing else: the only place that unpickles.

A pickle is a program. It is read by torch's restricted unpickler, which builds tensors and plain containers and
nothing else; what it refuses is refused, with no second try by any other means. `hilum import-weights` does even that
in a child process without network (`convert_in_child`), and from then on only safetensors is read.
Imports torch inside its functions, so that the child is shut in before anything else runs.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hilum.core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".pth", ".pt", ".bin")
LARGEST_BYTES = 16 * 2**30
"""Of a file that is opened at all: a ViT-g in float32 with its optimiser is 14 GB."""
MOST_ENTRIES = 200_000
"""Of its containers, each counted as often as it is met: a checkpoint has some thousands. Forty dictionaries, each of
them twice in the next, are small in the file and have no end for whoever walks through them."""
NOT_TENSORS = "hilum_not_tensors"
"""Entry of the header that `convert_in_child` writes: what else was in the pickle."""
_ZIP = b"PK\x03\x04"
_REFUSED_STATUS = 3
_SHARED = 4
_NEW_NETWORK, _NEW_USER = 0x40000000, 0x10000000  # CLONE_NEWNET, CLONE_NEWUSER of Linux
_CHILD = "import sys; from hilum.backbones.pickled import child; child(*sys.argv[1:])"


def read_pickled(file: Path) -> tuple[dict[str, "Tensor"], list[str]]:
    """Read every tensor of a pickled checkpoint, on the CPU, under the dotted path of its keys.

    Returns:
        The tensors, and what else is in the file, named as "path (type)".

    Raises:
        CheckpointError: the file needs more than tensors and plain containers, is damaged, too large, larger inside
            than outside, or holds no tensor.
    """
    import torch

    walk = _Walk(file)
    size = file.stat().st_size
    if size > LARGEST_BYTES:
        raise CheckpointError(f"{file} is refused: {size} bytes; at most {LARGEST_BYTES} are read.")
    with file.open("rb") as opened:
        zipped = opened.read(len(_ZIP)) == _ZIP  # by which torch itself tells them apart
    try:
        if zipped:
            _refuse_compressed(file)
        # Explicit, so that no environment variable can turn it off.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
        walk.through(content, "")
        _refuse_swollen(file, size, walk.tensors)
    except CheckpointError:
        raise
    except Exception as error:  # a hostile file can make the unpickler raise anything; all of it is refusal
        raise CheckpointError(_refusal(file, zipped, error)) from error
    if not walk.tensors:
        raise CheckpointError(f"{file} holds no tensor: expected a checkpoint, found {type(content).__name__}.")
    return walk.tensors, walk.others


def _refuse_compressed(file: Path) -> None:
    """Torch stores tensors uncompressed; a compressed entry can be a thousand times its size on disk."""
    with zipfile.ZipFile(file) as archive:
        if packed := [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]:
            raise CheckpointError(
                f"{file} is refused: {packed[0]} in it is compressed, which no checkpoint of torch is."
            )


def _refuse_swollen(file: Path, size: int, tensors: Mapping[str, "Tensor"]) -> None:
    """A tensor may say that one stored number is a million rows; copied out, it would fill any memory."""
    for name, value in tensors.items():
        if value.numel() * value.element_size() > size:
            raise CheckpointError(
                f"{file} is refused: {name} says it has shape {tuple(value.shape)}, more than the whole file of {size} "
                "bytes holds."
            )
    # Shared by a few names each at most, as tied weights and a teacher beside its student are.
    if sum(value.numel() * value.element_size() for value in tensors.values()) > _SHARED * size:
        raise CheckpointError(f"{file} is refused: its tensors are more than {_SHARED} times the size of the file.")


def _refusal(file: Path, zipped: bool, error: Exception) -> str:
    import torch

    # As the file itself names them: letters, digits and dots only, whatever else it says is not repeated.
    names = set(re.findall(r"GLOBAL ([\w.]+)", str(error)))
    if zipped:
        with suppress(Exception):  # a scan of the names in it, which builds nothing
            names |= {name for name in torch.serialization.get_unsafe_globals_in_checkpoint(file) if name.isascii()}
    if names:
        return (
            f"{file} is refused: it asks for {', '.join(sorted(names)[:6])}, and weights are tensors and plain "
            "containers. Nothing of it was run. If you trust where it comes from, save its state_dict alone with "
            "the program that wrote it."
        )
    return f"{file} is refused: it is damaged, or not a checkpoint of torch ({type(error).__name__})."


class _Walk:
    """Through the containers of a pickle, which is refused where they have no end."""

    def __init__(self, file: Path) -> None:
        self.file, self.met = file, 0
        self.tensors: dict[str, Tensor] = {}
        self.others: list[str] = []

    def through(self, value: Any, path: str) -> None:
        """Gather the tensors in a value under the dotted paths of their keys, and name what else there is."""
        import torch

        self._count(1)
        if isinstance(value, torch.Tensor):
            if path in self.tensors:
                raise CheckpointError(f"{path} is in the checkpoint twice.")
            self.tensors[path] = value.detach()
        elif isinstance(value, dict):
            for key, item in value.items():
                self.through(item, f"{path}.{key}" if path else str(key))
        elif isinstance(value, (list, tuple)) and self._holds_more(value):
            for index, item in enumerate(value):
                self.through(item, f"{path}.{index}" if path else str(index))
        else:
            self.others.append(f"{path} ({type(value).__name__})")

    def _holds_more(self, values: list[Any] | tuple[Any, ...]) -> bool:
        import torch

        self._count(len(values) // 100)  # a long list of numbers is looked at, not walked through
        return any(isinstance(item, (torch.Tensor, dict)) for item in values)

    def _count(self, entries: int) -> None:
        self.met += entries
        if self.met > MOST_ENTRIES:
            raise CheckpointError(
                f"{self.file} is refused: its containers have more than {MOST_ENTRIES:,} entries, each counted as "
                "often as it is met; a checkpoint has some thousands."
            )


def convert_in_child(file: Path, out: Path) -> None:
    """Write the tensors of a pickled checkpoint as safetensors, under the same names, in a process of its own.

    The child has no network where the kernel lets it give that up, and leaves no core dump.

    Raises:
        CheckpointError: as `read_pickled`; or the child was killed.
    """
    command = [sys.executable, "-c", _CHILD, str(file), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode == _REFUSED_STATUS:
        raise CheckpointError(last)
    raise CheckpointError(f"{file}: the process that read it ended with status {done.returncode}: {last}")


def child(file: str, out: str) -> None:
    """What runs in the child process of `convert_in_child`; exits with status 3 when the file is refused."""
    isolate()
    try:
        convert(Path(file), Path(out))
    except CheckpointError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(_REFUSED_STATUS)


def convert(file: Path, out: Path) -> None:
    """Write the tensors of a pickled checkpoint as safetensors, under the same names, in this process.

    Raises:
        CheckpointError: as `read_pickled`.
    """
    from safetensors.torch import save_file

    tensors, others = read_pickled(file)
    # Copies: tensors of one checkpoint may share memory, which the format does not have.
    copies = {name: value.clone().contiguous() for name, value in tensors.items()}
    save_file(copies, out, {NOT_TENSORS: json.dumps(others)})


def isolate() -> None:
    """Give up the network, as far as the kernel lets an ordinary process do so, and core dumps."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        # Alone where that is allowed; in a user namespace of its own otherwise, which is where it usually is.
        if libc.unshare(_NEW_NETWORK) != 0 and os.getuid() != 0:
            libc.unshare(_NEW_USER | _NEW_NETWORK)
