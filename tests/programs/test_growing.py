"""runs/growing.py on a tiny store: old findings stay, the curve keeps its findings, and nothing stale is taken."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.backbones.weights import save_backbone
from hilum.core.files import read_json
from hilum.core.seeding import forked
from hilum.data.labels import CXRLT_2024_TASK1, CXRLT_2024_TASK2, CXRLT_2024_TASK3
from hilum.data.store import write_arrays

FINDINGS = (*CXRLT_2024_TASK1, *CXRLT_2024_TASK3)
SMALL = ["search_epochs=1", "refit_epochs=1", "augmented_views=1", "blocks=1", "decoder_dim=8", "decoder_heads=2",
         "decoder_feed_forward=8", "learning_rates=[1e-2]", "resolution=32", "workers=1"]  # fmt: skip


@pytest.fixture
def growing(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "runs"))
    return importlib.import_module("growing")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images a patient. The last finding is rare: it is there at 2 positives of each and not at 12."""
    rng = np.random.default_rng(0)
    splits = ["train"] * 48 + ["val"] * 32 + ["test"] * 48
    labels = np.repeat(rng.random((len(splits) // 2, len(FINDINGS))) < 0.4, 2, axis=0).astype(np.int8)
    labels[4:48, -1] = 0
    labels[:4, -1] = 1
    images = [rng.integers(0, 90, (32, 32), np.uint8) + np.uint8(100 * int(y)) for y in labels[:, -1]]
    write_arrays(
        tmp_path / "store", images, labels, FINDINGS, splits=splits, views=["PA"] * len(splits),
        patients=[f"arrays/p{n // 2}" for n in range(len(splits))],
        studies=[f"arrays/s{n}" for n in range(len(splits))],
    )  # fmt: skip
    with forked(0, "test"):
        backbone = VisionTransformer(ViTConfig(12, 2, 2, patch_size=16, image_size=32))
    save_backbone(backbone, tmp_path / "run", "hilum-grey-1")
    return tmp_path


@pytest.mark.slow
def test_old_findings_stay_and_the_curve_keeps_its_findings(growing, folder, capsys) -> None:
    arguments = (folder / "store", folder / "run", folder / "out")
    growing.main(*arguments, [*SMALL, "shots=2,12", "seeds=1"])
    found = read_json(folder / "out" / "growing.json", ValueError)
    for name in ("40", "45"):
        assert found["increments"][name]["old"] == {"raw": 0.0, "calibrated": 0.0, "same_tensors": True}
    curve = found["few_labels"]
    assert FINDINGS[-1] in curve["k"]["2"]["findings"]
    assert FINDINGS[-1] not in curve["findings_at_every_k"] == curve["k"]["12"]["findings"]
    assert curve["k"]["12"]["mAP"] == curve["k"]["12"]["mAP_at_every_k"]
    [run] = curve["k"]["2"]["runs"]
    expected = [run["rows"][name]["AP"] for name in curve["findings_at_every_k"]]
    assert curve["k"]["2"]["mAP_at_every_k"] == pytest.approx(np.mean(expected))
    rows = found["increments"]["joint"]["rows"]
    joint = [rows[name]["AP"] for name in curve["findings_at_every_k"]]
    assert curve["joint_mAP_at_every_k"] == pytest.approx(np.mean(joint))
    assert f"k =   2: {len(curve['k']['2']['findings'])} findings" in capsys.readouterr().out

    common = found["common"]
    assert common["old"] == {"raw": 0.0, "calibrated": 0.0, "same_tensors": True}
    assert list(common["rows"]) == list(common["joint_rows"]) == list(growing.COMMON)
    assert common["joint_rows"] == {name: found["increments"]["26"]["rows"][name] for name in growing.COMMON}
    learned = [
        [one["name"] for one in read_json(folder / "out" / name / "config.json", ValueError)["findings"]]
        for name in ("common_21", "common_26")
    ]
    assert not set(learned[0]) & set(growing.COMMON)
    assert sorted(learned[1]) == sorted(CXRLT_2024_TASK2)

    made = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("*/model.safetensors")}
    (folder / "out" / "grown_40.seconds.json").unlink()  # killed between the model and its clock
    growing.main(*arguments, [*SMALL, "shots=2,12", "seeds=1"])
    assert made == {path: path.stat().st_mtime_ns for path in (folder / "out").glob("*/model.safetensors")}
    assert read_json(folder / "out" / "growing.json", ValueError)["increments"]["40"]["seconds_per_finding"] is None
    with pytest.raises(SystemExit, match="other settings"):
        growing.main(*arguments, [*SMALL, "shots=2,12", "seeds=1", "flip=0"])
