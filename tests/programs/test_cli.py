"""The command line as people use it wrongly: one line that says what to do, exit status 1, and never a traceback."""

import sys
from pathlib import Path

import pytest

from hilum import cli
from hilum.data.phantoms.writing import write_phantoms


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NIH phantoms, their manifest, a store and a model; and things that are none of these."""
    path = tmp_path_factory.mktemp("cli")
    write_phantoms(path / "nih", "nih", 30, seed=0, size=64, minimum_patients=2, workers=1)
    (path / "empty").mkdir()
    (path / "file").write_text("text")
    (path / "latin.csv").write_bytes("path\nLungenödem\n".encode("latin-1"))
    (path / "settings.yaml").write_bytes(b"\xff\xfe\x00")
    table = (path / "nih" / "Data_Entry_2017_v2020.csv").read_text()
    for name, old, new in (("no_column", "Finding Labels", "Findings"), ("no_label", "Effusion", "Efusion")):
        (path / name).mkdir()
        (path / name / "images").symlink_to(path / "nih" / "images")
        (path / name / "Data_Entry_2017_v2020.csv").write_text(table.replace(old, new))
    for name, rows in (
        ("leaving", "path,Edema\n../nih/a.png,1\n"),
        ("crossing", "path,patient_id,split,Edema\na.png,1,train,1\nb.png,1,test,0\n"),
        ("no_image", "path,study_id,Edema\na.png,1,1\n,2,0\n"),
    ):
        (path / name).mkdir()
        for image in ("a.png", "b.png"):
            (path / name / image).write_bytes(next((path / "nih" / "images").glob("*.png")).read_bytes())
        (path / name / "labels.csv").write_text(rows)
    for command in (
        f"manifest nih={path}/nih --out {path}/manifest.parquet",
        f"build {path}/manifest.parquet --out {path}/store --size 32 --workers 1",
        f"fit linear blocks=1 resolution=32 search_epochs=1 refit_epochs=1 learning_rates=[0.01] threads=1 --data "
        f"{path}/store --backbone random:demo16 --out {path}/model --device cpu",
        f"predict {path}/model {path}/store:test --out {path}/test.parquet --device cpu",
    ):
        assert run(command.split()) == 0, command
    return path


def run(words: list[str]) -> int:
    """The status with which `hilum WORDS` ends; anything but a status is a traceback, and fails the test."""
    before, sys.argv = sys.argv, ["hilum", *words]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    return 0


MISTAKES = {
    "manifest nih={}/nowhere": "is not a folder",
    "manifest nhi={}/nih": "Did you mean 'nih'",
    "manifest nih={}/no_column": "lacks 'Finding Labels' (nearest: 'Findings')",
    "manifest nih={}/no_label": "Did they mean 'Effusion'",
    "manifest folder={}/leaving": "leaves its folder",
    "manifest folder={}/crossing": "on both sides of the given split",
    "manifest folder={}/no_image": "remove studies that have none",
    "manifest folder={}/empty": "holds no image",
    "manifest nih={}/nih --out {}/file/m.parquet": "Could not write",
    "audit {}/store": "is a folder",
    "build {}/file --out {}/s": "cannot be read as Parquet",
    "build {}/manifest.parquet --out {}/file": "is a file",
    "build {}/manifest.parquet --out {}/store": "asked for",
    "build {}/manifest.parquet --out {}/s --workers -1": "expected at least 1 process",
    "build {}/manifest.parquet --out {}/s --encoding gif": "Known: jpeg95, png, raw",
    "verify {}/empty": "is not a finished store",
    "pretrain laptop --data {}/store": "Did you mean 'laptop_",
    "pretrain {}/settings.yaml --data {}/store": "cannot be read as a configuration",
    "pretrain laptop_128 threads=0 --data {}/store": "threads",
    "pretrain laptop_128 stepz=1 --data {}/store": "Did you mean 'steps'",
    "pretrain laptop_128 batch_size=4 --data {}/store --out {}/file": "cannot be written as a folder",
    "pretrain laptop_128 batch_size=4 --data {}/file": "is not a store",
    "fit linear --data {}/store --backbone random:demo16 --out {}/file": "is a file",
    "fit linear --data {}/store --backbone random:demo17 --out {}/m": "Did you mean 'demo16'",
    "fit linear --data {}/store --backbone {}/file --out {}/m": "expected a .safetensors file",
    "predict {}/store {}/store:test": "does not exist",
    "predict {}/model {}/empty": "holds no DICOM, PNG or JPEG file",
    "predict {}/model {}/latin.csv": "cannot be read as a CSV",
    "predict {}/model {}/file --out {}/p.csv": "None of 1 inputs could be read (not_an_image: 1)",
    "predict {}/model {}/store:test --out {}/p.txt": "expected a name that ends in",
    "predict {}/model {}/store:test --device mps": "expected auto, cpu or cuda",
    "combine {}/test.parquet --study mean": "Start from raw predictions",
    "combine {}/latin.csv --study mean": "cannot be read as a CSV",
    "combine {}/model {}/model --out {}/e": "two or more different models",
    "combine {}/model {}/model --unit study --out {}/e": "leave out --unit",
    "calibrate {}/test.parquet --labels {}/store --split test": "Nothing is fitted on the test split",
    "calibrate {}/test.parquet --use {}/file": "cannot be read as JSON",
    "evaluate {}/test.parquet --labels {}/store --bootstraps -1": "expected 0 or more",
    "evaluate {}/test.parquet --labels {}/file": "labels come from a store",
    "evaluate {}/test.parquet --labels {}/store --out {}/file --bootstraps 0": "Could not write",
    "submit {}/test.parquet --task cxrlt2024-task2 --ids {}/latin.csv": "cannot be read as a CSV of ids",
    "bench nothing": "Unknown benchmark",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line(command: str, world: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([word.replace("{}", str(world)) for word in command.split()]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert MISTAKES[command] in last
    assert (world / "file").read_text() == "text"


def test_what_the_system_refuses_is_one_line_too(monkeypatch, capsys) -> None:
    def refuse(name: str) -> None:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr("hilum.commands.bench.run", refuse)
    assert run(["bench", "crops"]) == 1
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: 'crops'\n"


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", before or "")
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    found: list[str | None] = []
    monkeypatch.setattr(cli, "app", lambda: found.append(cli.os.environ.get("OMP_WAIT_POLICY")))
    cli.main()
    assert found == [after]
