"""The page before the real `hilum serve`: a process of its own, a tiny fitted model, an index, DICOM and PNG files."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fit_stores import DECODER
from reading import Reader, image_file, new_reader
from stand_in import StandIn, chest

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import save_backbone
from hilum.commands import fit
from hilum.core.seeding import forked
from hilum.data.labels import CXRLT_2024_TASK1
from hilum.data.phantoms.encoding import dicom
from hilum.data.store import Store, write_arrays
from hilum.deploy.embeddings import Encoder
from hilum.deploy.index_building import build_index
from hilum.deploy.predictor import load

pytestmark = pytest.mark.slow  # 20 s: a fit, an index, a server, a browser

NEVER = "Kyphosis"
DOWNLOADS = {"report.json": "hilum-study-1", "report.fhir.json": "DiagnosticReport", "report.html": "<html"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` of all 40 findings, one never trained, and an `index` of its training images."""
    path = tmp_path_factory.mktemp("served")
    rng = np.random.default_rng(0)
    splits = ["train"] * 60 + ["val"] * 30
    labels = (rng.random((len(splits), len(CXRLT_2024_TASK1))) < 0.3).astype(np.int8)
    labels[:, CXRLT_2024_TASK1.index(NEVER)] = -1
    images = [chest(32, seed) for seed in range(len(splits))]
    write_arrays(
        path / "store", images, labels, CXRLT_2024_TASK1, splits=splits,
        studies=[f"s{n // 2}" for n in range(len(splits))], patients=[f"p{n // 2}" for n in range(len(splits))],
    )  # fmt: skip
    with forked(0, "test"):
        backbone = VisionTransformer(ViTConfig(12, 2, 2, patch_size=8, image_size=32, layer_scale=0.5))
    save_backbone(backbone, path / "run", "hilum-grey-1")
    config = replace(DECODER, resolution=32, learning_rates=(1e-2,))
    fit.run(config, path / "store", path / "run", path / "model", device="cpu")
    encoder = Encoder.of(load(path / "model", "cpu"))
    build_index(encoder, Store.open(path / "store"), range(60), path / "index", findings=["Cardiomegaly"])
    return path


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[str]:
    words = ["serve", str(folder / "model"), "--port", "0", "--index", str(folder / "index"), "--device", "cpu"]
    server = subprocess.Popen(
        [sys.executable, "-c", "from hilum.cli import main; main()", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = []
    for line in server.stdout:
        said.append(line)
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        if found:
            break
    else:
        pytest.fail("hilum serve ended: " + "".join(said))
    log = (folder / "log").open("w")
    copier = subprocess.Popen(["cat"], stdin=server.stdout, stdout=log)
    yield found.group()
    server.send_signal(signal.SIGINT)
    server.wait(20)
    copier.wait(5)
    log.close()
    server.stdout.close()


@pytest.fixture
def reader(context, served: str) -> Reader:
    return new_reader(context, StandIn(), served).open()  # the stand-in is not asked: Reader wants one


def dicom_file(name: str = "Doe^Jane.dcm") -> dict:
    content = dicom(chest(96, 5), "page", PatientName="Doe^Jane", PatientID="page-7", ViewPosition="PA")
    return {"name": name, "mimeType": "application/dicom", "buffer": content}


def test_a_study_of_dicom_and_png_is_read_shown_and_forgotten(reader: Reader, served: str, folder: Path):
    page = reader.page
    reader.read(dicom_file(), image_file(2))
    assert sorted(reader.names()) == sorted(CXRLT_2024_TASK1)
    assert reader.row(NEVER).get_attribute("aria-label") == f"{NEVER}: never trained"
    assert page.locator(".source").first.inner_text() == "from header"
    assert page.locator("figcaption select").first.input_value() == "PA"
    assert reader.colours() == 0
    reader.choose("Cardiomegaly").settle()
    assert reader.colours() + reader.colours(2) > 50
    shares = [int(text.split()[0]) for text in page.locator(".contribution").all_inner_texts()]
    assert sum(shares) == pytest.approx(100, abs=1)
    page.wait_for_selector(".case")
    assert page.locator(".case").count() == 8
    with page.expect_response(re.compile("finding=Cardiomegaly")) as waiting:
        page.locator("input[name=by][value=finding]").check()
    assert waiting.value.status == 200
    for name, mark in (
        ("report.json", "hilum-study-1"),
        ("report.fhir.json", "DiagnosticReport"),
        ("report.html", "<html"),
    ):
        with page.expect_download() as loading:
            page.locator(f"[data-save='{name}']").click()
        content = Path(loading.value.path()).read_text()
        assert mark in content
        assert "Jane" not in content
        if name == "report.json":
            study = json.loads(content)["study"]["id"]
    page.locator("figcaption select").nth(1).select_option("LATERAL")
    with page.expect_response(lambda answer: answer.request.method == "DELETE") as waiting:
        page.locator("#rerun").click()
    assert waiting.value.status == 204
    page.wait_for_selector("#rerun", state="hidden")
    assert page.locator(".source").all_inner_texts() == ["from header", "given"]
    assert page.request.get(f"{served}/api/studies/{study}").status == 404
    page.locator("#clear").click()
    page.wait_for_selector("#choose:visible")
    assert reader.watched.foreign(served) == []
    assert reader.watched.troubles == []
    assert "Jane" not in (folder / "log").read_text()


def test_refusals_of_the_real_server_are_told(reader: Reader):
    page = reader.page
    reader.give(image_file(1), {"name": "notes.dcm", "mimeType": "", "buffer": b"no image at all"})
    page.wait_for_selector("figure.view.refused")
    assert "Image 2 (notes.dcm) cannot be used" in page.locator("#alert").inner_text()
    page.get_by_role("button", name="Go on without it").click()
    page.wait_for_selector(".row")
    assert page.locator("figure.view").count() == 1


def test_the_policy_of_the_real_server_lets_no_script_in(reader: Reader):
    page = reader.page
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit=1\">')")
    page.evaluate(
        "{ const one = document.createElement('script'); one.textContent = 'window.hit=1'; document.body.append(one); }"
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.hit") is None
    assert any("Content Security Policy" in trouble for trouble in reader.watched.troubles)
