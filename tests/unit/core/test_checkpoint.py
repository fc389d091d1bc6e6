"""Checkpoints under kills, full disks, flipped bits and cut files; the digest; the optimizer state; the folder lock."""

import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hilum.core import checkpoint
from hilum.core.errors import CheckpointError, HilumError


def tensors(step: int) -> dict[str, Tensor]:
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4) + step
    return {"student.weight": weight, "tied": weight, "view": weight.T, "count": torch.tensor(step), "none": weight[:0]}


def save(folder: Path, step: int, keep: int = 3) -> Path:
    return checkpoint.save_checkpoint(folder, step, tensors(step), {"step_again": step, "text": "é"}, keep)


def save_behind(folder: Path, step: int, keep: int = 3) -> Path:
    """As `save`, by the background writer."""
    with checkpoint.CheckpointWriter() as writer:
        writer.save(folder, step, tensors(step), {"step_again": step, "text": "é"}, keep)
    return folder / f"step_{step:08d}"


BOTH = pytest.mark.parametrize("save", [save, save_behind])
Save = Callable[..., Path]


@BOTH
def test_round_trip_with_shared_strided_and_empty_tensors(tmp_path: Path, save: Save) -> None:
    save(tmp_path, 5)
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None
    assert loaded.step == 5
    assert loaded.values == {"step_again": 5, "text": "é"}
    assert checkpoint.digest(loaded.tensors) == checkpoint.digest(tensors(5))
    assert sorted(path.name for path in loaded.path.iterdir()) == ["index.json", "state.safetensors"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path) is None
    assert checkpoint.load_newest(tmp_path / "absent") is None


@BOTH
def test_keeps_the_last_few_and_refuses_to_keep_one(tmp_path: Path, save: Save) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]
    with pytest.raises(HilumError, match="at least 2"):
        save(tmp_path, 5, keep=1)


@BOTH
def test_damaged_checkpoints_of_later_steps_push_out_no_whole_one(tmp_path: Path, save: Save) -> None:
    """A run that went back to step 10 past two damaged ones still has two whole ones after its next save."""
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    for step in (20, 30):
        (tmp_path / f"step_{step:08d}" / "state.safetensors").write_bytes(b"")
    save(tmp_path, 15, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_00000015"]


def test_a_failed_removal_of_an_old_checkpoint_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        save(tmp_path, step, keep=2)
    monkeypatch.setattr(checkpoint, "_remove", lambda path: (_ for _ in ()).throw(OSError(13, "Permission denied")))
    save(tmp_path, 3, keep=2)
    assert "could not remove the checkpoint" in capsys.readouterr().err
    monkeypatch.undo()
    assert checkpoint.load_newest(tmp_path).step == 3


def test_digest_sees_names_types_shapes_and_every_bit() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    same = {"b": torch.ones(1), "a": torch.zeros(3, 2).T.contiguous()}
    assert checkpoint.digest(base) == checkpoint.digest(same)
    for other in (
        {"a": torch.zeros(2, 3), "c": torch.ones(1)},
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": torch.nextafter(torch.ones(1), torch.tensor(2.0))},
        {"a": -torch.zeros(2, 3), "b": torch.ones(1)},
    ):
        assert checkpoint.digest(other) != checkpoint.digest(base)
    assert len(checkpoint.digest({"half": torch.ones(3, dtype=torch.bfloat16), "flag": torch.ones(2) > 0})) == 64


def test_every_flipped_bit_and_every_cut_is_detected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    generator = np.random.default_rng(0)
    trials = 0
    for name in ("state.safetensors", "index.json"):
        original = (bad / name).read_bytes()
        for trial in range(125):
            damaged = bytearray(original)
            if trial % 5 == 4:
                damaged = damaged[: int(generator.integers(len(original)))]
            else:
                damaged[int(generator.integers(len(original)))] ^= 1 << int(generator.integers(8))
            (bad / name).write_bytes(bytes(damaged))
            loaded = checkpoint.load_newest(tmp_path)
            assert loaded is not None
            assert loaded.step == 1, (name, trial)
            trials += 1
        (bad / name).write_bytes(original)
    assert trials == 250
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 250
    assert all(line.startswith("warning: skipped") and "step_00000002" in line for line in lines)
    assert checkpoint.load_newest(tmp_path).step == 2
    assert good.exists()


def test_missing_files_and_a_copied_folder_are_not_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in ("state.safetensors", "index.json"):
        broken = save(tmp_path, 2)
        (broken / name).unlink()
        assert checkpoint.load_newest(tmp_path).step == 1
        shutil.rmtree(broken)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000009")
    assert checkpoint.load_newest(tmp_path).step == 1


def test_nothing_whole_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "index.json").unlink()
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints is whole"):
        checkpoint.load_newest(tmp_path)


@BOTH
def test_a_damaged_checkpoint_of_the_same_step_is_replaced_and_a_whole_one_kept(tmp_path: Path, save: Save) -> None:
    path = save(tmp_path, 1)
    written = (path / "index.json").stat().st_mtime_ns
    assert save(tmp_path, 1) == path
    assert (path / "index.json").stat().st_mtime_ns == written
    (path / "state.safetensors").write_bytes(b"")
    save(tmp_path, 1)
    assert checkpoint.load_newest(tmp_path).step == 1


KILLED_SAVE = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_checkpoint
count, limit = 0, int(sys.argv[2])
WATCHED = {{"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.fsync", "os.truncate"}}
def hook(event, arguments):
    global count
    if event in WATCHED and sys.argv[1] in str(arguments[:2]):
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
getattr(test_checkpoint, sys.argv[3])(Path(sys.argv[1]), 3, keep=2)
print(count)
"""


@pytest.mark.slow
@BOTH
def test_killed_at_every_file_operation_leaves_a_whole_checkpoint(tmp_path: Path, save: Save) -> None:
    """Real SIGKILLs. The newest whole checkpoint is the old or the new one, never a mixture, and saving works again."""
    script = tmp_path / "kill.py"
    script.write_text(textwrap.dedent(KILLED_SAVE.format(tests=str(Path(__file__).parent))))
    point, survived = 1, False
    while not survived:
        folder = tmp_path / f"run{point}"
        for step in (1, 2):
            save(folder, step, keep=2)
        command = [sys.executable, script, folder, str(point), save.__name__]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        survived = done.returncode == 0
        loaded = checkpoint.load_newest(folder)
        assert loaded is not None
        assert loaded.step in ((3,) if survived else (2, 3)), done.stderr
        assert checkpoint.digest(loaded.tensors) == checkpoint.digest(tensors(loaded.step))
        save(folder, 4, keep=2)
        assert not list(folder.glob(".*tmp"))
        assert checkpoint.load_newest(folder).step == 4
        point += 1
    assert point > 8


@BOTH
@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_failing_disk_names_the_path_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, save: Save
) -> None:
    save(tmp_path, 1)
    real, calls = getattr(os, name), 0

    def failing(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, name, failing)
    limit = 0
    save(tmp_path, 2)
    total = calls
    for step in range(3, total + 3):
        calls, limit = 0, step - 2
        with pytest.raises(HilumError, match=str(tmp_path)):
            save(tmp_path, step)
        newest = checkpoint.load_newest(tmp_path)
        assert checkpoint.digest(newest.tensors) == checkpoint.digest(tensors(newest.step))
        assert not list(tmp_path.glob(".*tmp"))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that takes nothing until the event is set."""
    opened, real = threading.Event(), checkpoint.save_file

    def slow(*arguments: object) -> None:
        assert opened.wait(20)
        real(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    return opened


def test_the_writer_copies_at_once_and_writes_later(tmp_path: Path, gate: threading.Event) -> None:
    """What a run does to its weights after `save` has returned is not in the file."""
    moving, wanted = tensors(1), checkpoint.digest(tensors(1))
    with checkpoint.CheckpointWriter() as writer:
        writer.save(tmp_path, 1, moving, {})
        moving["student.weight"].add_(5)
        writer.check()  # nothing has failed, and it does not wait
        assert not list(tmp_path.glob("step_*"))
        gate.set()
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded is not None
    assert checkpoint.digest(loaded.tensors) == wanted != checkpoint.digest(moving)


def test_the_writer_writes_one_checkpoint_at_a_time(tmp_path: Path, gate: threading.Event) -> None:
    """The memory of the first copy is used again by the second, which must therefore wait."""
    with checkpoint.CheckpointWriter() as writer:
        writer.save(tmp_path, 1, tensors(1), {})
        second = threading.Thread(target=writer.save, args=(tmp_path, 2, tensors(2), {}))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        gate.set()
        second.join(20)
        assert (tmp_path / "step_00000001" / "index.json").exists()
    for step in (1, 2):
        loaded = checkpoint.load_checkpoint(tmp_path / f"step_{step:08d}")
        assert checkpoint.digest(loaded.tensors) == checkpoint.digest(tensors(step))


def test_both_ways_of_writing_make_the_same_files(tmp_path: Path) -> None:
    now, behind = save(tmp_path / "now", 7), save_behind(tmp_path / "behind", 7)
    for name in ("state.safetensors", "index.json"):
        assert (now / name).read_bytes() == (behind / name).read_bytes()


def test_what_follows_a_checkpoint_sees_its_copies_and_its_name(tmp_path: Path, gate: threading.Event) -> None:
    moving, seen = tensors(4), {}

    def then(copies: dict[str, Tensor]) -> None:
        assert checkpoint.load_newest(tmp_path).step == 4
        seen["digest"] = checkpoint.digest(copies)

    with checkpoint.CheckpointWriter() as writer:
        writer.save(tmp_path, 4, moving, {}, then=then)
        moving["student.weight"].zero_()
        gate.set()
    assert seen["digest"] == checkpoint.digest(tensors(4))


def test_what_precedes_a_checkpoint_is_there_before_it_and_without_it_there_is_none(tmp_path: Path) -> None:
    found = []

    def first(copies: dict[str, Tensor]) -> None:
        assert checkpoint.digest(copies) == checkpoint.digest(tensors(4))
        found.append(sorted(path.name for path in tmp_path.iterdir()))

    def full(copies: dict[str, Tensor]) -> None:
        raise OSError(28, "No space left on device")

    with checkpoint.CheckpointWriter() as writer:
        writer.save(tmp_path, 4, tensors(4), {}, first=first)
        writer.wait()
        assert found == [[]]
        writer.save(tmp_path, 5, tensors(5), {}, first=full)
        with pytest.raises(HilumError, match="No space left"):
            writer.wait()
    assert checkpoint.load_newest(tmp_path).step == 4


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), HilumError("of the export")])
def test_what_fails_behind_a_run_is_raised_once_by_its_next_call(tmp_path: Path, failure: Exception) -> None:
    def then(_: dict[str, Tensor]) -> None:
        raise failure

    named = "step_00000001.*No space left" if isinstance(failure, OSError) else "of the export"
    for call in ("check", "save", "wait", "close"):
        folder = tmp_path / call
        writer = checkpoint.CheckpointWriter()
        writer.save(folder, 1, tensors(1), {}, then=then)
        writer._thread.join()
        with pytest.raises(HilumError, match=named):
            getattr(writer, call)(*((folder, 2, tensors(2), {}) if call == "save" else ()))
        writer.check()
        assert checkpoint.load_newest(folder).step == 1
        writer.save(folder, 3, tensors(3), {})
        writer.close()
        assert checkpoint.load_newest(folder).step == 3


def raise_after(what: Callable[..., None], *arguments: object) -> None:
    what(*arguments)
    raise ZeroDivisionError


def test_a_failed_write_does_not_hide_the_error_that_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ZeroDivisionError), checkpoint.CheckpointWriter() as writer:
        raise_after(writer.save, tmp_path, 1, tensors(1), {})
    assert "No space left" in capsys.readouterr().err
    with pytest.raises(HilumError, match="No space left"), checkpoint.CheckpointWriter() as writer:
        writer.save(tmp_path, 1, tensors(1), {})


def test_values_that_are_no_json_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with checkpoint.CheckpointWriter() as writer, pytest.raises(TypeError):
        writer.save(tmp_path, 1, tensors(1), {"path": tmp_path})
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_the_writer_copies_from_a_gpu_before_it_returns(tmp_path: Path) -> None:
    moving = {name: tensor.cuda() for name, tensor in tensors(1).items()}
    with checkpoint.CheckpointWriter() as writer:
        for step in (1, 2):
            writer.save(tmp_path, step, moving, {})
            for tensor in moving.values():
                tensor.add_(1)
    loaded = checkpoint.load_checkpoint(tmp_path / "step_00000001")
    assert checkpoint.digest(loaded.tensors) == checkpoint.digest(tensors(1))


def make_optimizer(fused: bool) -> tuple[nn.Module, torch.optim.AdamW, dict[Tensor, str]]:
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=generator)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused)
    return module, optimizer, {parameter: name for name, parameter in module.named_parameters()}


def advance(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(inputs).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_optimizer_state_resumes_bit_for_bit(tmp_path: Path, fused: bool) -> None:
    straight, optimizer, names = make_optimizer(fused)
    advance(straight, optimizer, range(4))
    wanted = checkpoint.digest(straight.state_dict() | checkpoint.flatten_optimizer(optimizer, names))

    first, optimizer, names = make_optimizer(fused)
    advance(first, optimizer, range(2))
    flat = checkpoint.flatten_optimizer(optimizer, names)
    assert {"0.weight.exp_avg", "0.weight.exp_avg_sq", "1.bias.step"} <= set(flat)
    checkpoint.save_checkpoint(tmp_path, 2, first.state_dict() | {f"optimizer.{k}": v for k, v in flat.items()}, {})

    loaded = checkpoint.load_newest(tmp_path).tensors
    second, optimizer, names = make_optimizer(fused)
    state = {key: value for key, value in loaded.items() if not key.startswith("optimizer.")}
    checkpoint.load_strictly(second, state, "the test")
    flat = {key.removeprefix("optimizer."): value for key, value in loaded.items() if key.startswith("optimizer.")}
    checkpoint.restore_optimizer(optimizer, names, flat)
    advance(second, optimizer, range(2, 4))
    assert checkpoint.digest(second.state_dict() | checkpoint.flatten_optimizer(optimizer, names)) == wanted


def test_optimizer_state_of_another_model_is_refused() -> None:
    _, optimizer, names = make_optimizer(False)
    with pytest.raises(CheckpointError, match="no parameter"):
        checkpoint.restore_optimizer(optimizer, names, {"2.weight.exp_avg": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="shape"):
        checkpoint.restore_optimizer(optimizer, names, {"0.weight.exp_avg": torch.zeros(9, 9)})


def test_strict_loading_names_what_does_not_fit() -> None:
    module = nn.Linear(2, 3)
    for state, found in (
        ({"weight": module.weight}, r"1 missing \(bias\)"),
        (module.state_dict() | {"gain": module.bias}, r"1 unexpected \(gain\)"),
        ({"weight": torch.zeros(3, 9), "bias": module.bias}, r"weight is \(3, 9\), expected \(3, 2\)"),
    ):
        with pytest.raises(CheckpointError, match=found):
            checkpoint.load_strictly(module, state, "x")
