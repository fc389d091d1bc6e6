"""How long one X-ray takes from nothing: `hilum predict MODEL one.dcm`, as whole processes, beside the floors.

    hilum bench cold-start        MODEL=folder for a model of yours

The floors: an interpreter that imports torch, and one that imports torch and pydicom and runs the same forward pass on
zeros. The default is a decoder at 128 pixels on a backbone of the laptop's size, fitted here on noise: what is in
the weights does not matter to the clock. Seconds of the wall, median and range of RUNS, after one warm-up, and seconds
of the processor, which another program on the machine does not lengthen.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RUNS = 7
FORWARD = """
import sys, torch, pydicom
from hilum.backbones.vit import SIZES, VisionTransformer
import dataclasses
with torch.no_grad():
    VisionTransformer(dataclasses.replace(SIZES["demo16"], image_size=128))(torch.zeros(1, 1, 128, 128))
"""


def timed(command: list[str]) -> tuple[list[float], float]:
    """Wall seconds of RUNS processes after a warm-up, and mean processor seconds of all but the warm-up."""
    walls, used = [], []
    for _ in range(RUNS + 1):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        walls.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return walls[1:], statistics.mean(used[1:])


def make_model(folder: Path) -> Path:
    """A decoder at 128 pixels with its two views of flip averaging, on noise."""
    from hilum.commands import fit
    from hilum.core.config import override
    from hilum.data.store import write_arrays
    from hilum.recipes import laptop_decoder

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (128, 128), np.uint8) for _ in range(120)]
    labels = (rng.random((120, 26)) < 0.5).astype(np.int8)
    findings = [f"finding {number}" for number in range(26)]
    write_arrays(folder / "store", images, labels, findings, splits=["train"] * 100 + ["val"] * 20)
    config = override(
        laptop_decoder(), ["resolution=128", "search_epochs=1", "refit_epochs=1", "learning_rates=[0.001]"]
    )
    fit.run(config, folder / "store", "random:demo16", folder / "model", device="cpu")
    return folder / "model"


def write_dicom(path: Path) -> None:
    """A chest radiograph of usual size: 2500 x 2048, 12 bits, uncompressed."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID, dataset.PatientID, dataset.ViewPosition = generate_uid(), "P1", "PA"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 2500, 2048, 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    y, x = np.mgrid[-1:1:2500j, -1:1:2048j]
    pixels = 3000 * np.exp(-(x**2) - y**2) + np.random.default_rng(0).normal(0, 20, y.shape) + 200
    dataset.PixelData = pixels.clip(0, 4095).astype("<u2").tobytes()
    dataset.save_as(path, enforce_file_format=True)


def main() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Path(os.environ["MODEL"]) if "MODEL" in os.environ else make_model(folder)
        write_dicom(folder / "one.dcm")
        python, hilum = sys.executable, str(Path(sys.executable).with_name("hilum"))
        commands = {
            "import torch": [python, "-c", "import torch"],
            "torch, pydicom, a forward pass": [python, "-c", FORWARD],
            "hilum predict MODEL one.dcm": [
                hilum, "predict", str(model), str(folder / "one.dcm"), "--out", str(folder / "one.json"), "--device",
                "cpu", "--score-flagged",
            ],
        }  # fmt: skip
        rows = {}
        print(f"load of the machine before: {os.getloadavg()[0]:.1f}, processors: {os.cpu_count()}")
        for label, command in commands.items():
            walls, used = timed(command)
            rows[label] = statistics.median(walls)
            print(f"{label:32} {rows[label]:6.2f} s [{min(walls):.2f}, {max(walls):.2f}]  processor {used:5.2f} s")
        assert json.loads((folder / "one.json").read_text())["predictions"]
        return rows


if __name__ == "__main__":
    main()
