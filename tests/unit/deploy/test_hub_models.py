"""Models on the Hub, with a Hub that is a folder: what is sent, what is taken back, what is refused."""

import fnmatch
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import hilum
from hilum.backbones import hub
from hilum.core.errors import CheckpointError, ConfigError
from hilum.core.files import sha256_file
from hilum.data.store import Store
from hilum.deploy import predictor
from hilum.deploy.hub_models import INDEX_NAME, from_pretrained
from hilum.deploy.model_files import digest_of

NAME = "clinic/chest"


class Hub:
    """Repositories as folders, and a cache; says what was asked of it."""

    def __init__(self, path: Path) -> None:
        self.path, self.cache, self.asked, self.created = path / "hub", path / "cache", [], []

    def CommitOperationAdd(self, path_in_repo, path_or_fileobj):  # noqa: N802
        return path_in_repo, path_or_fileobj

    def HfApi(self):  # noqa: N802
        return self

    def create_repo(self, repository, private, exist_ok):
        assert exist_ok
        self.created.append((repository, private))

    def create_commit(self, repository, operations, commit_message):
        for place, source in operations:
            target = self.path / repository / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source if isinstance(source, bytes) else Path(source).read_bytes())
        return SimpleNamespace(commit_url=f"https://hub/{repository}/commit/1")

    def snapshot_download(self, repository, revision=None, allow_patterns=()):
        self.asked.append((revision, list(allow_patterns)))
        source = self.path / repository
        if not source.is_dir():
            raise OSError(f"404 for {repository}\nand more")
        for file in source.rglob("*"):
            place = file.relative_to(source).as_posix()
            if file.is_file() and any(fnmatch.fnmatch(place, pattern) for pattern in allow_patterns):
                (self.cache / repository / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, self.cache / repository / place)
        (self.cache / repository).mkdir(parents=True, exist_ok=True)
        return str(self.cache / repository)

    def sent(self) -> list[str]:
        source = self.path / NAME
        return sorted(file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file())


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path)
    monkeypatch.setattr(hub, "_package", lambda: found)
    return found


def test_a_model_comes_back_as_it_was_without_what_names_patients(fitted: Path, store: Store, stub: Hub) -> None:
    model = predictor.load(fitted / "linear", "cpu")
    assert model.push_to_hub(NAME) == f"https://hub/{NAME}/commit/1"
    assert stub.created == [(NAME, True)]
    assert not [name for name in stub.sent() if "validation" in name]
    assert {"README.md", "config.json", "exposure.npz", INDEX_NAME, "model.safetensors"} <= set(stub.sent())
    card = (stub.path / NAME / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: hilum\n")
    assert card.count("library_name") == 1
    again = hilum.from_pretrained(NAME, device="cpu")
    assert again.digest == model.digest
    indices = store.indices("test")
    np.testing.assert_array_equal(
        again.predict_store(store, indices).probabilities, model.predict_store(store, indices).probabilities
    )


def test_an_ensemble_keeps_its_members_places_and_identity(fitted: Path, store: Store, stub: Hub) -> None:
    model = predictor.load(fitted / "ensemble", "cpu")  # its members lie beside it
    model.push_to_hub(NAME, private=False, with_cases=True)
    assert stub.created == [(NAME, False)]
    assert {"ensemble/config.json", "linear/model.safetensors", "decoder/validation_logits.parquet"} <= set(stub.sent())
    assert not [name for name in stub.sent() if name.startswith(("store/", "run/"))]
    again = from_pretrained(f"{NAME}@v1", device="cpu")
    assert again.digest == model.digest
    assert len(again.networks) == 2
    assert {revision for revision, _ in stub.asked} == {"v1"}
    indices = store.indices("test")
    np.testing.assert_array_equal(
        again.predict_store(store, indices, unit="study").probabilities,
        model.predict_store(store, indices, unit="study").probabilities,
    )


def test_an_ensemble_that_names_folders_of_this_machine_is_not_sent(fitted: Path, stub: Hub, tmp_path: Path) -> None:
    shutil.copytree(fitted / "ensemble", tmp_path / "ensemble")
    content = json.loads((tmp_path / "ensemble" / "config.json").read_text())
    for member in content["members"]:
        member["path"] = str((fitted / "ensemble" / member["path"]).resolve())
    (tmp_path / "ensemble" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="by an absolute path"):
        predictor.load(tmp_path / "ensemble", "cpu").push_to_hub(NAME)
    assert stub.created == []


def test_only_the_files_of_a_model_are_taken(fitted: Path, stub: Hub) -> None:
    predictor.load(fitted / "linear", "cpu").push_to_hub(NAME)
    (stub.path / NAME / "pytorch_model.bin").write_bytes(b"pickle")
    (stub.path / NAME / "setup.py").write_text("")
    from_pretrained(NAME, device="cpu")
    assert not (stub.cache / NAME / "pytorch_model.bin").exists()
    assert not (stub.cache / NAME / "setup.py").exists()
    assert stub.asked[0][1] == [INDEX_NAME]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda root: (root / "model.safetensors").write_bytes(b"x"), "its SHA-256 differs"),
        (lambda root: (root / "exposure.npz").unlink(), "exposure.npz is missing"),
        (lambda root: (root / INDEX_NAME).unlink(), "no model that Hilum sent there"),
        (lambda root: (root / INDEX_NAME).write_text("[]"), "is not of format"),
    ],
)
def test_what_is_not_as_it_was_sent_is_refused(fitted: Path, stub: Hub, change, match: str) -> None:
    predictor.load(fitted / "linear", "cpu").push_to_hub(NAME)
    change(stub.path / NAME)
    with pytest.raises(CheckpointError, match=match):
        from_pretrained(NAME)


def test_an_ensemble_of_the_hub_names_no_folder_of_this_machine(fitted: Path, stub: Hub) -> None:
    predictor.load(fitted / "ensemble", "cpu").push_to_hub(NAME)
    root = stub.path / NAME
    for place in (str(fitted / "linear"), "../../../elsewhere/linear"):
        content = json.loads((root / "ensemble" / "config.json").read_text())
        content["members"][0]["path"] = place
        (root / "ensemble" / "config.json").write_text(json.dumps(content))
        index = json.loads((root / INDEX_NAME).read_text())
        index["files"]["ensemble/config.json"] = sha256_file(root / "ensemble" / "config.json")
        index["model"] = digest_of(root / "ensemble")
        (root / INDEX_NAME).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="not among the files that it names"):
            from_pretrained(NAME)


@pytest.mark.parametrize(
    ("place", "match"),
    [
        ("../../.ssh/config.json", "not a place inside"), ("/etc/model.safetensors", "not a place inside"),
        ("code/setup.py", "no file of a model"), ("pytorch_model.bin", "no file of a model"),
        ("a*/config.json", "not a place inside"),
    ],
)  # fmt: skip
def test_an_index_cannot_name_anything_else(fitted: Path, stub: Hub, place: str, match: str) -> None:
    predictor.load(fitted / "linear", "cpu").push_to_hub(NAME)
    index = json.loads((stub.path / NAME / INDEX_NAME).read_text())
    index["files"][place] = "0" * 64
    (stub.path / NAME / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=match):
        from_pretrained(NAME)
    assert len(stub.asked) == 1  # nothing but the index was asked for


def test_folders_need_no_hub_and_mistakes_are_answered(fitted: Path, stub: Hub, monkeypatch, tmp_path: Path) -> None:
    assert from_pretrained(fitted / "linear", device="cpu").findings
    assert stub.asked == []
    model = predictor.load(fitted / "linear", "cpu")
    with pytest.raises(CheckpointError, match=r"404 for nobody/nothing Behind a firewall"):
        from_pretrained("nobody/nothing")
    with pytest.raises(CheckpointError, match="expected a folder, or owner/name"):
        from_pretrained("no such folder")
    with pytest.raises(CheckpointError, match="expected a folder, or owner/name"):
        model.push_to_hub("one-word")
    model.folder = None
    with pytest.raises(ConfigError, match="loaded from a folder"):
        model.push_to_hub(NAME)
    monkeypatch.undo()
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r'needs? the extra: pip install "hilum\[hub\]"'):
        from_pretrained(NAME)
