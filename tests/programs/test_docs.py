"""Every command that the README and the docs show is run, in order, as printed: each document in a folder of its own.

Long runs are shortened by settings put behind the printed command; nothing else is changed.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hilum.data.images import read_image

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHORTER = {
    "pretrain": "architecture=demo16 steps=2 batch_size=8 precision=fp32",
    "fit": "search_epochs=2 refit_epochs=2 augmented_views=1 blocks=2",
}
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if BLOCK.search(path.read_text(encoding="utf-8"))
)


def commands(document: str) -> list[str]:
    """The `hilum` commands of a document; `make` targets and comments have tests of their own."""
    lines = "\n".join(BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.startswith("hilum ")]


def prepare(folder: Path) -> None:
    """What the documents assume to be there: a folder `xrays` of images with labels."""
    from hilum.data.phantoms.writing import write_phantoms

    write_phantoms(folder / "data", "nih", 40, seed=0, size=128, workers=1)
    table = (folder / "data" / "Data_Entry_2017_v2020.csv").read_text(encoding="utf-8").splitlines()[1:]
    rows = ["path,patient_id,Pleural Effusion,Cardiomegaly"]
    (folder / "xrays").mkdir()
    for line in table:
        name, labels, _, patient = line.split(",")[:4]
        present = labels.split("|")
        (folder / "xrays" / name).write_bytes((folder / "data" / "images" / name).read_bytes())
        rows.append(f"{name},{patient},{int('Effusion' in present)},{int('Cardiomegaly' in present)}")
    (folder / "xrays" / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert np.ptp(read_image(folder / "xrays" / name).pixels) > 0


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_of_a_document_works(document: str, tmp_path: Path) -> None:
    found = commands(document)
    if not found:
        pytest.skip(f"{document} shows no hilum command")
    prepare(tmp_path)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for command in found:
        words = shlex.split(command)
        full = [*words[:3], *SHORTER.get(words[1], "").split(), *words[3:]]
        done = subprocess.run(full, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_the_readme_names_only_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"^make (\w[\w-]*)", "\n".join(BLOCK.findall(text)), re.MULTILINE):
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), name
