"""Pickles: tensors come out, and nothing ever runs. Each hostile file would leave a mark if it did."""

import argparse
import io
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hilum.backbones import pickled
from hilum.backbones.pickled import NOT_TENSORS, convert_in_child, read_pickled
from hilum.core.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[3]


class Calls:
    """Unpickles into the result of a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def system(mark: Path) -> Any:
    return Calls(os.system, f"touch {mark}")


def evaluated(mark: Path) -> Any:
    return Calls(eval, f"__import__('os').mkdir({str(mark)!r})")


def executed(mark: Path) -> Any:
    return Calls(exec, f"import os; os.mkdir({str(mark)!r})")


def process(mark: Path) -> Any:
    return Calls(subprocess.Popen, ["touch", str(mark)])


def opened(mark: Path) -> Any:
    return Calls(open, str(mark), "w")


def beside_weights(mark: Path) -> Any:
    return {"model": {"cls_token": torch.zeros(1, 1, 64)}, "args": system(mark)}


def as_a_key(mark: Path) -> Any:
    return OrderedDict({Calls(os.mkdir, str(mark)): torch.zeros(2)})


def module_loader(mark: Path) -> Any:
    return Calls(__import__("importlib").import_module, "antigravity"), Calls(os.mkdir, str(mark))


def torch_loader(mark: Path) -> Any:
    """A name inside torch itself that would unpickle again, without restriction."""
    return Calls(torch.load, io.BytesIO(pickle.dumps(system(mark))))


HOSTILE = [system, evaluated, executed, process, opened, beside_weights, as_a_key, module_loader, torch_loader]


def write_zip(content: Any, file: Path) -> None:
    torch.save(content, file)


def write_legacy(content: Any, file: Path) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


def write_bare(content: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [write_zip, write_legacy, write_bare], ids=lambda one: one.__name__[6:])
@pytest.mark.parametrize("payload", HOSTILE, ids=lambda one: one.__name__)
def test_hostile_pickles_are_refused_and_not_run(tmp_path: Path, payload: Any, write: Any, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not matter
    mark, file = tmp_path / "it_ran", tmp_path / "weights.pth"
    write(payload(mark), file)
    with pytest.raises(CheckpointError, match="is refused") as refusal:
        read_pickled(file)
    assert not mark.exists()
    assert str(mark) not in str(refusal.value)
    if write is not write_bare:
        assert "Nothing of it was run" in str(refusal.value)


def test_the_payloads_are_live(tmp_path: Path) -> None:
    """Read by Python's own unpickler they do what they say; so the test above can fail."""
    for number, payload in enumerate((system, evaluated, executed)):
        mark = tmp_path / f"mark{number}"
        pickle.loads(pickle.dumps(payload(mark)))
        assert mark.exists()


def test_the_refusal_names_what_was_asked_for(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(2)}, "args": argparse.Namespace(lr=1)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"asks for .*argparse\.Namespace.* save its state_dict alone"):
        read_pickled(tmp_path / "w.pth")


def test_a_compressed_archive_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="is compressed, which no checkpoint"):
        read_pickled(tmp_path / "bomb.pth")


@pytest.mark.parametrize("content", [b"", b"\x80\x02.", b"no pickle", b"PK\x03\x04" + bytes(60), pickle.dumps([1, 2])])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is refused|holds no tensor"):
        read_pickled(tmp_path / "w.bin")


@pytest.mark.parametrize("write", [write_zip, write_legacy], ids=["zip", "legacy"])
def test_every_truncation_is_refused(tmp_path: Path, write: Any) -> None:
    write({"a": torch.arange(64.0), "b": torch.ones(3)}, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    for length in range(0, len(whole) - 1, max(len(whole) // 40, 1)):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"is refused|holds no tensor"):
            read_pickled(tmp_path / "cut.pth")


@pytest.mark.parametrize("write", [write_zip, write_legacy], ids=["zip", "legacy"])
def test_changed_bytes_are_read_or_refused(tmp_path: Path, write: Any) -> None:
    """Never another error, never a crash: 150 files with up to four bytes changed anywhere."""
    write({"model": {"a": torch.arange(6.0), "b": {"c": torch.ones(2, 3).half()}}, "step": 3}, tmp_path / "w.pth")
    whole, outcomes = (tmp_path / "w.pth").read_bytes(), set()
    generator = random.Random(0)
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        (tmp_path / "changed.pth").write_bytes(content)
        try:
            read_pickled(tmp_path / "changed.pth")
            outcomes.add("read")
        except CheckpointError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


CHECKPOINT = {
    "model": OrderedDict(cls_token=torch.randn(1, 1, 4), norm={"weight": torch.randn(4).half()}),
    "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
    "parameters": [torch.nn.Parameter(torch.ones(2)), torch.ones(3)],
    "iteration": 7,
}
TENSORS = {
    "model.cls_token", "model.norm.weight", "optimizer.state.0.exp_avg", "parameters.0", "parameters.1",
}  # fmt: skip


@pytest.mark.parametrize("write", [write_zip, write_legacy], ids=["zip", "legacy"])
def test_tensors_come_under_the_path_of_their_keys(tmp_path: Path, write: Any) -> None:
    write(CHECKPOINT, tmp_path / "w.pt")
    tensors, others = read_pickled(tmp_path / "w.pt")
    assert tensors.keys() == TENSORS
    assert others == ["optimizer.param_groups.0.lr (float)", "iteration (int)"]
    assert torch.equal(tensors["model.cls_token"], CHECKPOINT["model"]["cls_token"])
    assert tensors["model.norm.weight"].dtype == torch.float16
    assert not any(value.requires_grad for value in tensors.values())


def test_two_paths_that_read_alike_are_refused(tmp_path: Path) -> None:
    torch.save({"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"a\.b is in the checkpoint twice"):
        read_pickled(tmp_path / "w.pt")


@pytest.mark.slow
def test_the_child_writes_safetensors_and_passes_refusals_on(tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    torch.save({"a": shared, "view": shared[1], "turned": shared.T, "step": 3}, tmp_path / "w.pth")
    convert_in_child(tmp_path / "w.pth", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["view"], shared[1])
    assert torch.equal(found["turned"], shared.T)
    with safe_open(tmp_path / "out.safetensors", "pt") as opened_file:
        assert opened_file.metadata() == {NOT_TENSORS: '["step (int)"]'}
    mark = tmp_path / "it_ran"
    torch.save(system(mark), tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth is refused: it asks for .*system"):
        convert_in_child(tmp_path / "evil.pth", tmp_path / "evil.safetensors")
    assert not mark.exists()
    assert not (tmp_path / "evil.safetensors").exists()


def test_the_child_has_no_network_where_the_kernel_allows_that() -> None:
    code = """
import ctypes, os
from hilum.backbones.pickled import isolate
before = os.readlink("/proc/self/ns/net")
isolate()
print("apart" if os.readlink("/proc/self/ns/net") != before else "shared")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if done.stdout.strip() == "shared":
        pytest.skip("this kernel lets no process leave the network")


def test_nothing_else_unpickles() -> None:
    """One call of torch.load in the whole package, restricted, and no other way of reading a pickle."""
    calls, unsafe = [], []
    for file in (ROOT / "src").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        calls += [(file.name, call) for call in re.findall(r"torch\.load\(.*", text)]
        unsafe += [file.name for _ in re.findall(r"^\s*(?:import|from) (?:pickle|cPickle|dill|joblib)\b", text, re.M)]
        unsafe += [file.name for _ in re.findall(r"weights_only=False|allow_pickle=True|pickle\.loads?\(", text)]
    assert [name for name, _ in calls] == ["pickled.py"]
    assert "weights_only=True" in calls[0][1]
    assert unsafe == []


def test_containers_without_an_end_are_refused(tmp_path: Path) -> None:
    """One inside itself is of plain containers, which the unpickler lets pass; a deep one is merely deep."""
    endless: dict[str, Any] = {"tensor": torch.zeros(1)}
    endless["again"] = endless
    deep: Any = torch.zeros(1)
    for _ in range(50):
        deep = {"inside": deep}
    files = [tmp_path / "endless.pth", tmp_path / "deep.pth"]
    torch.save(endless, files[0])
    torch.save(deep, files[1])
    with pytest.raises(CheckpointError, match=r"endless.pth is refused.*RecursionError"):
        read_pickled(files[0])
    assert len(read_pickled(files[1])[0]) == 1


@pytest.mark.parametrize("inside", [{"tensor": torch.zeros(1)}, {"number": 1}, {}])
def test_containers_that_are_in_one_another_many_times_are_refused(
    tmp_path: Path, inside: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty dictionaries, each twice in the next: 3 kB in the file, and a trillion for whoever walks through them."""
    monkeypatch.setattr(pickled, "MOST_ENTRIES", 5_000)
    nested: Any = inside
    for _ in range(40):
        nested = {"one": nested, "two": nested}
    torch.save({"tensor": torch.zeros(1), "nested": nested}, tmp_path / "many.pth")
    assert (tmp_path / "many.pth").stat().st_size < 5_000
    with pytest.raises(CheckpointError, match=r"many.pth is refused: its containers have more than"):
        read_pickled(tmp_path / "many.pth")
