"""Names on the Hub, without a network: the download is replaced by a folder."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hilum.backbones import hub
from hilum.backbones.hub import resolve_weights
from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import load_backbone, read_backbone_config
from hilum.core.errors import CheckpointError
from hilum.core.seeding import forked

STATISTICS = '{"image_mean": [0.5307, 0.5307, 0.5307], "image_std": [0.2583, 0.2583, 0.2583]}'


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    hub._download.cache_clear()
    yield
    hub._download.cache_clear()


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """What owner/name holds on the Hub."""
    folder = tmp_path / "remote"
    folder.mkdir()
    with forked(0, "hub"):
        model = VisionTransformer(ViTConfig(64, 2, 1, patch_size=14, image_size=56, in_channels=3))
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.1, 0.2)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text(STATISTICS)
    return folder


def downloads(monkeypatch: pytest.MonkeyPatch, action: Callable[..., str]) -> list[tuple[str, Any, list[str]]]:
    calls: list[tuple[str, Any, list[str]]] = []

    def snapshot_download(repository: str, revision: Any = None, allow_patterns: Any = None) -> str:
        calls.append((repository, revision, allow_patterns))
        return action(allow_patterns)

    package = ModuleType("huggingface_hub")
    package.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    monkeypatch.setattr(hub, "find_spec", lambda name: object())
    return calls


def test_a_name_is_downloaded_once_and_loaded(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = downloads(monkeypatch, lambda _: str(remote))
    assert read_backbone_config("owner/name")["normalisation"]["mean"] == [0.5307] * 3
    loaded, local = load_backbone("owner/name", patch_size=16), load_backbone(remote, patch_size=16)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), local.parameters(), strict=True))
    [(repository, revision, patterns)] = calls
    assert (repository, revision) == ("owner/name", None)
    assert {"model.safetensors", "config.json", "preprocessor_config.json"} <= set(patterns)
    assert not [pattern for pattern in patterns if pattern.endswith((".bin", ".pth", ".pt"))]


def test_a_revision_can_be_named(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = downloads(monkeypatch, lambda _: str(remote))
    assert resolve_weights("owner/name@41b966c") == remote
    assert calls[0][:2] == ("owner/name", "41b966c")


def test_a_pickle_is_taken_only_where_there_is_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "old"
    folder.mkdir()

    def only_pickled(patterns: list[str]) -> str:
        if "pytorch_model.bin" in patterns:
            (folder / "pytorch_model.bin").write_bytes(b"")
        return str(folder)

    calls = downloads(monkeypatch, only_pickled)
    assert resolve_weights("owner/old") == folder
    assert [("pytorch_model.bin" in patterns) for _, _, patterns in calls] == [False, True]


def test_a_path_is_never_asked_for(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = downloads(monkeypatch, lambda _: "")
    (Path("owner") / "name").mkdir(parents=True)
    assert resolve_weights("owner/name") == Path("owner/name")
    for name in ("weights.safetensors", "runs/w.pth", "/no/where", "./run", "a/b/c", "run", "../x/y", "https://h/a"):
        with pytest.raises(CheckpointError, match="does not exist"):
            resolve_weights(name)
    assert calls == []


def test_without_the_extra_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"runs/ssl does not exist; .* pip install \"hilum\[hub\]\""):
        load_backbone("runs/ssl")


def test_a_refused_download_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(_: list[str]) -> str:
        raise ConnectionError("Cannot reach the Hub: offline mode is enabled.\nMore lines.")

    downloads(monkeypatch, offline)
    with pytest.raises(CheckpointError, match=r"owner/name .* offline mode is enabled\. Behind a firewall, copy"):
        load_backbone("owner/name")


def test_a_repository_without_weights_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, lambda _: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"owner/name on the Hugging Face Hub holds none of model\.safetensors"):
        load_backbone("owner/name")


def test_the_cache_is_read_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package, its real cache layout, and no network at all."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"weights")
    references = tmp_path / "cache" / "models--owner--name" / "refs"
    references.mkdir()
    (references / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert huggingface_hub.snapshot_download is not None
    assert resolve_weights("owner/name") == snapshot
    with pytest.raises(CheckpointError, match="could not be had"):
        resolve_weights("owner/other")
