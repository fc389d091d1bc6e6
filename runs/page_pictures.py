"""docs/figures/page.jpg and page-light.jpg: the page of `hilum serve` with the demo's model and a synthetic patient.

    make demo && python runs/page_pictures.py outputs/demo

The patient is of the demo's own test split, drawn again with more pixels and written as DICOM; the index of similar
cases is made of its training split. Needs Chromium and playwright. No real X-ray is shown.
"""

import io
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from hilum.data.phantoms.cohort import plan_cohort
from hilum.data.phantoms.encoding import dicom
from hilum.data.phantoms.render import render_study

PATIENTS, SEED = 600, 0
"""Of the demo's cohort."""
PATIENT, STUDY = 156, 0
SHAPES = ((1024, 1024), (1024, 860))
CHOSEN = "Pleural Effusion"
SIZE = {"width": 1440, "height": 900}
LARGEST = 200_000
"""Bytes of a picture."""
FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def study_files() -> list[dict]:
    """The images of one synthetic study, as files to be chosen."""
    patient = plan_cohort(PATIENTS, SEED)[PATIENT]
    assert patient.number == PATIENT
    assert patient.split == "test", "a picture of what the model has learned would flatter it"
    study = patient.studies[STUDY]
    positions = [image.position for image in study.images]
    drawn = render_study(SEED, PATIENT, STUDY, positions, study.findings, SHAPES)
    return [
        {"name": f"{position}.dcm", "mimeType": "application/dicom",
         "buffer": dicom(image.pixels, f"page {position}", ViewPosition=position, BurnedInAnnotation="NO")}
        for position, image in zip(positions, drawn, strict=True)
    ]  # fmt: skip


@contextmanager
def served(model: Path, index: Path) -> Iterator[str]:
    """`hilum serve` on a free port; gives its address."""
    words = ["serve", str(model), "--index", str(index), "--port", "0"]
    server = subprocess.Popen(
        [sys.executable, "-c", "from hilum.cli import main; main()", *words], stdout=subprocess.PIPE, text=True
    )
    try:
        found = None
        while found is None:
            line = server.stdout.readline() if server.stdout else ""
            if not line:
                raise SystemExit("hilum serve ended before it served.")
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
        yield found.group()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)


def photograph(page: Page, path: Path) -> None:
    """What is seen now, as a JPEG of at most LARGEST bytes."""
    seen = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    for quality in range(92, 40, -4):
        content = io.BytesIO()
        seen.save(content, "JPEG", quality=quality, optimize=True, subsampling=0)
        if content.tell() < LARGEST:
            break
    path.write_bytes(content.getvalue())
    print(f"{path}: {seen.width} x {seen.height}, quality {quality}, {content.tell():,} bytes")


def main(demo: Path, figures: Path) -> None:
    """Index, serve, choose, look, photograph, in both themes."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("No Chromium on this machine.")
    with tempfile.TemporaryDirectory() as temporary:
        index = Path(temporary) / "index"
        subprocess.run(
            [sys.executable, "-c", "from hilum.cli import main; main()", "index", str(demo / "model"),
             "--data", f"{demo / 'store'}:train", "--out", str(index), "--finding", CHOSEN],
            check=True,
        )  # fmt: skip
        with served(demo / "model", index) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport=SIZE)
            page.goto(address)
            page.set_input_files("#files", study_files())
            page.wait_for_selector(".case")
            page.locator(f'[data-finding="{CHOSEN}"]').click()
            page.wait_for_selector("figure.view.hot")
            page.mouse.move(5, 5)
            page.wait_for_load_state("networkidle")
            page.wait_for_timeout(500)
            photograph(page, figures / "page.jpg")
            page.click("#theme")
            page.mouse.move(5, 5)
            page.wait_for_timeout(300)
            photograph(page, figures / "page-light.jpg")
            browser.close()


if __name__ == "__main__":
    given = dict(enumerate(map(Path, sys.argv)))
    main(given.get(1, Path("outputs/demo")), given.get(2, FIGURES))
