"""Resume state on disk: tensors as safetensors, the rest as JSON, complete or not there at all.

A checkpoint is a folder `step_00001000/` with `state.safetensors` and `index.json`. The folder is written under a
temporary name; the index, with the size and SHA-256 of every file, is written last; then the folder is renamed. The
loader checks the hashes and takes the newest that is whole. Nothing here is pickle, and nothing knows a model, nor how
many processes wrote or read it: on disk every tensor is whole (`core.sharding`).

`save_checkpoint` waits for the disk. `CheckpointWriter` copies the tensors to CPU memory and writes them in a thread
while training goes on, with the same guarantees.

More than 300 lines: both ways of writing share every step after the copy, and the loader is their proof.
"""

import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from hilum.core.errors import CheckpointError, HilumError
from hilum.core.files import flush_to_disk, sha256_file, write_json
from hilum.core.sharding import is_divided, part_like
from hilum.core.tracking import warn

FORMAT = "hilum-checkpoint-1"
STATE_NAME, INDEX_NAME = "state.safetensors", "index.json"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint."""

    step: int
    """Steps made when it was written."""
    tensors: dict[str, Tensor]
    """On the CPU."""
    values: dict[str, Any]
    """JSON values: configuration, thread count, ..."""
    path: Path


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write one checkpoint; drop the oldest ones past `keep`, and any of later steps, from which nothing went on.

    Args:
        folder: of the run's checkpoints; created when absent.
        step: steps made so far; a whole checkpoint of that step is left as it is.
        tensors: any device, any names.
        values: JSON values.
        keep: how many to keep, at least 2: with one, a damaged file would be the only copy.

    Raises:
        HilumError: the disk is full or the folder cannot be written; names the path. What was there is unchanged.
    """
    _check_keep(keep)
    final = folder / _folder_name(step)
    if _is_whole(final):
        return final
    return _write(folder, step, {name: _plain(tensor) for name, tensor in tensors.items()}, values, keep)


class CheckpointWriter:
    """Writes checkpoints in the background: `save` returns as soon as the tensors are copied to CPU memory.

    At most one write is under way; the next `save` waits for it. A write that failed is reported by the next call, so
    that a run never goes on for long without checkpoints. Leaving the context waits for the last write.

    The copies live in memory that is kept from save to save (page-locked where the tensors are on a GPU), so that a
    save neither asks the system for memory nor waits for it: the price is one more state of the run in CPU memory.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        folder: Path,
        step: int,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        keep: int = 2,
        then: Callable[[Mapping[str, Tensor]], None] | None = None,
        first: Callable[[Mapping[str, Tensor]], object] | None = None,
    ) -> None:
        """Copy the state now, write it behind the caller's back; what `save_checkpoint` guarantees holds here too.

        Args:
            folder: of the run's checkpoints; created when absent.
            step: steps made so far; a whole checkpoint of that step is left as it is.
            tensors: any device, any names; may be changed as soon as this returns.
            values: JSON values.
            keep: how many to keep, at least 2.
            then: called in the background once the checkpoint has its name, with the copies by name (on the CPU, to be
                read only until it returns); its failure is reported like one of the write.
            first: likewise, before anything of the checkpoint is written; if it fails, none is.

        Raises:
            HilumError: `keep`; or the write before this one failed (the message names its path), and this one is not
                begun.
        """
        _check_keep(keep)
        self.wait()
        copied, snapshot = json.loads(json.dumps(dict(values), allow_nan=False)), self._copied(tensors)
        self._thread = threading.Thread(
            target=self._run, args=(folder, step, snapshot, copied, keep, then, first), name=f"checkpoint {step}"
        )
        self._thread.start()

    def check(self) -> None:
        """Raise, once, the failure of a write that has ended; do not wait.

        Raises:
            HilumError: the disk is full or the folder cannot be written; names the path.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way, and raise its failure, once.

        Raises:
            HilumError: as `check`.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait for the write under way, raise its failure, and give the memory back.

        Raises:
            HilumError: as `check`.
        """
        self._memory = {}
        self.wait()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            warn(f"{failure}")  # the error that ended the run is the one to show

    def _run(
        self, folder: Path, step: int, snapshot: dict[str, Tensor], values: dict[str, Any], keep: int,
        then: Callable[[Mapping[str, Tensor]], None] | None, first: Callable[[Mapping[str, Tensor]], object] | None,
    ) -> None:  # fmt: skip
        final = folder / _folder_name(step)
        try:
            if first is not None:
                first(snapshot)
            if not _is_whole(final):
                _write(folder, step, snapshot, values, keep)
            if then is not None:
                then(snapshot)
        except OSError as error:
            self._failure = HilumError(
                f"Beside the checkpoint {final}: {error}. Every checkpoint that is there is whole."
            )
        except BaseException as error:  # of a thread nobody watches: kept for the caller's next call
            self._failure = error

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in this writer's own memory; copies from GPUs are queued first and waited for together."""
        devices = set()
        for name, tensor in tensors.items():
            held = self._memory.get(name)
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._memory[name] = held
            held.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            devices.update([tensor.device] if tensor.is_cuda else [])
        for device in devices:
            torch.cuda.synchronize(device)
        return {name: self._memory[name] for name in tensors}


def _check_keep(keep: int) -> None:
    if keep < 2:
        raise HilumError(f"keep={keep}: expected at least 2 checkpoints, because the newest may turn out damaged.")


def _write(folder: Path, step: int, snapshot: Mapping[str, Tensor], values: Mapping[str, Any], keep: int) -> Path:
    """Write contiguous CPU tensors, none sharing memory with another, as a checkpoint; then drop those past `keep`."""
    final = folder / _folder_name(step)
    temporary = folder / f".{final.name}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir(parents=True)
        state = temporary / STATE_NAME
        save_file(dict(snapshot), state)
        state.chmod(temporary.stat().st_mode & 0o666)  # the library makes it private; the folder follows the umask
        flush_to_disk(state)
        files = {STATE_NAME: {"size": state.stat().st_size, "sha256": sha256_file(state)}}
        content = {"format": FORMAT, "step": step, "files": files, "values": dict(values)}
        write_json(temporary / INDEX_NAME, content | {"sha256": _digest_json(content)})
        if final.exists():  # damaged, and in the way: a folder cannot replace a folder that is not empty
            _remove(final)
        temporary.replace(final)
        flush_to_disk(folder)
    except (OSError, SafetensorError) as error:
        raise HilumError(
            f"Could not write the checkpoint {final}: {error}. Older checkpoints are unchanged."
        ) from error
    finally:
        for leftover in folder.glob(".step_*.tmp"):  # of this save, or of one that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    # Whatever is there of later steps was not whole, or this run would have gone on from it: it counts for nothing.
    there = _checkpoints(folder)
    later = there[: there.index(final)]
    for old in later + there[len(later) + keep :]:
        try:
            _remove(old)
        except OSError as error:  # an old file that stays must not stop a run
            warn(f"could not remove the checkpoint {old}: {error.strerror or error}")
    return final


def _plain(tensor: Tensor) -> Tensor:
    """A copy of its own memory: safetensors refuses tensors that share storage."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _is_whole(checkpoint: Path) -> bool:
    if not checkpoint.exists():
        return False
    try:
        load_checkpoint(checkpoint)
    except CheckpointError:
        return False
    return True


def _folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _digest_json(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _remove(checkpoint: Path) -> None:
    """The index goes first, so that what a kill leaves behind is not a checkpoint."""
    (checkpoint / INDEX_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first, whole or not.

    Raises:
        CheckpointError: the folder cannot be listed. `glob` would take it for empty, and the run would begin again.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror or error}.") from error
    return sorted((folder / name for name in names if name.startswith("step_") and name[5:].isdigit()), reverse=True)


def any_in(folder: Path) -> bool:
    """Whether a folder has a checkpoint, whole or not."""
    return bool(_checkpoints(folder))


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose hashes match; None when the folder has none at all.

    Damaged ones are skipped with one line each.

    Raises:
        CheckpointError: there are checkpoints and none is whole.
    """
    found = _checkpoints(Path(folder))
    for path in found:
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            warn(f"skipped {error}")
    if found:
        raise CheckpointError(
            f"{folder}: none of its {len(found)} checkpoints is whole. Restore one from a copy, or start again in "
            "another folder."
        )
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and check every byte of it.

    Raises:
        CheckpointError: incomplete, damaged or of another format.
    """
    try:
        index = json.loads((path / INDEX_NAME).read_text(encoding="utf-8"))
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise CheckpointError(f"{path}: {INDEX_NAME} is not of format {FORMAT!r}.")
        if index.pop("sha256", "") != _digest_json(index) or path.name != _folder_name(index["step"]):
            raise CheckpointError(f"{path}: {INDEX_NAME} was changed after it was written.")
        for name, expected in index["files"].items():
            size = (path / name).stat().st_size
            if size != expected["size"]:
                raise CheckpointError(f"{path}: {name} has {size} bytes, expected {expected['size']}.")
            if sha256_file(path / name) != expected["sha256"]:
                raise CheckpointError(f"{path}: the SHA-256 of {name} is not the one recorded.")
        return Checkpoint(int(index["step"]), load_file(path / STATE_NAME), dict(index["values"]), path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: {Path(error.filename).name} is missing; it was not finished.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of names: equal only for bit-for-bit equal states."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = _plain(tensors[name])
        total.update(f"{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def flatten_optimizer(optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The tensors of an optimizer's state as `<parameter name>.<entry>`, e.g. `backbone.norm.weight.exp_avg`.

    Args:
        optimizer: whose state holds tensors only, like AdamW's.
        names: parameter -> name.
    """
    return {
        f"{names[parameter]}.{entry}": value
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
    }


def restore_optimizer(optimizer: Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `flatten_optimizer`; every tensor must find its parameter.

    Args:
        optimizer: its parameters may be divided among processes.
        names: parameter -> name.
        tensors: whole.

    Raises:
        CheckpointError: a tensor of no parameter, or of another shape.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, entry = key.rpartition(".")
        if name not in parameters:
            raise CheckpointError(f"The optimizer state {key!r} belongs to no parameter of this model.")
        parameter = parameters[name]
        if value.dim() and value.shape != parameter.shape:
            raise CheckpointError(
                f"The optimizer state {key!r} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}."
            )
        if value.dim():
            optimizer.state[parameter][entry] = part_like(value, parameter).clone()
        else:
            scalar_on_cpu = not optimizer.defaults.get("fused")
            optimizer.state[parameter][entry] = value.to("cpu" if scalar_on_cpu else parameter.device, copy=True)


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """`load_state_dict` whose failure is a CheckpointError that names the tensors.

    Args:
        module: its parameters may be divided among processes; each then takes its part.
        tensors: whole, equal on all processes.
        where: they are from, for the message.

    Raises:
        CheckpointError: a tensor missing, unexpected or of the wrong shape.
    """
    expected = module.state_dict()
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(f"{where} does not fit this model. Tensors: {'; '.join(problems)}.")
    parts = {
        name: part_like(tensors[name], like) if is_divided(like) else tensors[name] for name, like in expected.items()
    }
    module.load_state_dict(parts)
