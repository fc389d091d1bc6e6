"""`hilum inspect`: a page from whatever a run's folder holds."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hilum.backbones.vit import SIZES, VisionTransformer
from hilum.backbones.weights import save_backbone
from hilum.commands import pretrain_pictures
from hilum.commands.pretrain_pictures import choose, patch_colours
from hilum.commands.pretrain_report import past_alarms, run, write_report
from hilum.core.config import write_yaml
from hilum.core.errors import ConfigError
from hilum.core.seeding import forked
from hilum.data.store import Store, write_arrays
from hilum.pretraining.alarms import RECENT
from hilum.pretraining.config import PretrainConfig
from hilum.pretraining.crops import CropConfig
from hilum.pretraining.dinov2 import HeadConfig

CONFIG = PretrainConfig(
    architecture="demo8", embed_dim=16, depth=2, num_heads=2, crops=CropConfig(32, 16, local_crops=2),
    heads=HeadConfig(16, 16, 8, 8), batch_size=4, steps=300, log_every=1,
)  # fmt: skip


def lines(steps: int, **last: float) -> list[dict]:
    healthy = {"loss": 3.0, "nearest_distance": 0.5, "teacher_effective_rank": 9.0, "images_per_second": 12.5}
    return [{"step": step, **healthy} | (last if step > steps - RECENT else {}) for step in range(1, steps + 1)]


def write_run(folder: Path, history: list[dict], backbone: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    write_yaml(folder / "config.yaml", CONFIG)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    if backbone:
        with forked(0, "test"):
            network = VisionTransformer(CONFIG.vit())
        extra = {"step": history[-1]["step"], "seen": {"images": 24, "sha256": "ab" * 32}, "init": "/home/me/other"}
        save_backbone(network, folder, "hilum-grey-1", extra)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    rng = np.random.default_rng(0)
    images = []
    for _ in range(24):
        image = rng.integers(1, 256, (36, 40), dtype=np.uint8)
        image[:, :10] = 0  # a black border
        images += [image, image - (image > 200)]  # two that are nearly the same, of one patient
    return write_arrays(
        tmp_path_factory.mktemp("report") / "store", images, rng.integers(-1, 2, (48, 3)).astype(np.int8),
        ["Mass", "Edema", "Hernia"], patients=[f"secret-{index // 2}" for index in range(48)],
        image_ids=[f"private-{index}" for index in range(48)], views=["PA", "LATERAL"] * 24,
        splits=["test"] * 8 + ["val"] * 10 + ["train"] * 30,
    )  # fmt: skip


def test_the_page_has_pictures_and_names_no_one(store: Store, tmp_path: Path, capsys) -> None:
    folder = write_run(tmp_path / "run", lines(120))
    page = run(folder, store.path, "cpu").read_text()
    assert capsys.readouterr().out == f"Report: {folder / 'report.html'}\n"
    for word in ("secret", "private", *store.uids.tolist(), "/home/me"):
        assert word not in page
    assert page.count("<img") == 2 + 8 * 2 + 4 * 6
    assert "demo8: 2 blocks of 16, patch 8" in page
    assert "120 of 300" in page
    assert "about 58 s" in page  # 180 steps of 4 images at 12.5 a second
    assert "24 different ones" in page
    assert "started from" in page.lower()
    assert "learning_rate: " in page  # the configuration
    again = write_report(folder, store, "cpu").read_text()
    assert again == page


def test_without_a_store_or_weights_a_sentence_stands_in_for_pictures(store: Store, tmp_path: Path, capsys) -> None:
    folder = write_run(tmp_path / "run", lines(120), backbone=False)
    page = run(folder).read_text()
    assert "No pictures: the page was written without the store." in page
    assert "<img" not in page
    assert f"Next: hilum inspect {folder} --data STORE" in capsys.readouterr().out
    assert "No pictures yet" in write_report(folder, store).read_text()


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [], backbone=False)
    (folder / "metrics.jsonl").unlink()
    assert "No step has been logged yet." in write_report(folder, None).read_text()


def test_a_run_from_weights_has_a_page_before_it_has_saved_its_network(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", lines(10), backbone=False)
    write_yaml(folder / "config.yaml", dataclasses.replace(CONFIG, architecture="init"))
    assert "init: that of the weights it starts from" in write_report(folder, None).read_text()


def test_what_is_no_run_or_another_store_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run of hilum pretrain: it has no config\.yaml"):
        run(tmp_path, None)
    folder = write_run(tmp_path / "run", lines(10))
    header = json.loads((folder / "config.json").read_text()) | {"preprocess_id": "mimic-cxr-jpg-1"}
    (folder / "config.json").write_text(json.dumps(header))
    with pytest.raises(ConfigError, match="Give the store that the run was trained on"):
        write_report(folder, store, "cpu")


def test_alarms_have_their_spells_and_the_newest_line_is_judged_again() -> None:
    history = lines(120, teacher_effective_rank=1.0)
    for line in history[59:69]:
        line |= {"alarms": ["loss_spike"]}
    for line in history[79:84]:
        line |= {"alarms": ["loss_spike", "of_another_version"]}
    rows = past_alarms(history, CONFIG)
    assert [(row.name, row.first, row.last, row.standing) for row in rows] == [
        ("cls_collapse", 120, 120, True), ("loss_spike", 80, 84, False), ("of_another_version", 80, 84, False),
    ]  # fmt: skip
    assert rows[2].what == "of another version"
    assert past_alarms([], CONFIG) == []


def test_pictures_are_of_validation_images_if_there_are_enough_and_never_of_test_images(store: Store) -> None:
    few = choose(store, 0, 8)
    assert len(set(few.tolist())) == 8
    assert set(store.splits[few]) == {"val"}
    assert abs((store.views[few] == "PA").sum() - 4) == 0  # views take turns
    many = choose(store, 0, 30)
    assert len(set(many.tolist())) == 30
    assert "test" not in store.splits[choose(store, 0, 1000)]
    assert len(choose(store, 0, 1000)) == 40
    assert not np.array_equal(few, choose(store, 1, 8))


def test_neighbours_are_never_of_the_same_patient_and_in_the_order_of_their_cosine(store: Store) -> None:
    with forked(0, "test"):
        network = VisionTransformer(CONFIG.vit()).eval()
    rows = pretrain_pictures._neighbour_rows(network, store, np.arange(8, 48), 32)
    assert len(rows) == pretrain_pictures.QUERIES
    films = {pretrain_pictures._film(store, index, 32).tobytes(): store.patients[index] for index in range(48)}
    for asked, found in rows:
        cosines = [one.similarity for one in found]
        assert cosines == sorted(cosines, reverse=True)
        assert len(found) == 5
        assert films[asked.film.tobytes()] not in {films[one.film.tobytes()] for one in found}


def test_colours_are_components_of_all_images_together_and_black_takes_no_part() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, (2, 16))  # three kinds of patches, the same in both images
    tokens = np.eye(3)[kinds] @ rng.normal(size=(3, 12)) * 5 + rng.normal(size=(2, 16, 12)) * 0.01
    inside = np.ones((2, 16), bool)
    inside[0, :3] = False
    tokens[0, :3] = 1000.0  # would take every component
    colours, shares = patch_colours(tokens, inside)
    assert not colours[~inside].any()
    assert shares[:2].sum() > 0.99
    for kind in range(3):
        of_kind = colours[inside & (kinds == kind)].astype(int)
        assert np.ptp(of_kind[:, :2], axis=0).max() < 12
    centres = [colours[inside & (kinds == kind)].astype(int).mean(axis=0)[:2] for kind in range(3)]
    assert min(np.abs(centres[a] - centres[b]).max() for a, b in ((0, 1), (0, 2), (1, 2))) > 60
    flipped, _ = patch_colours(-tokens, inside)
    assert flipped.shape == colours.shape
    nothing, _ = patch_colours(tokens, np.zeros((2, 16), bool))
    assert not nothing.any()


def test_large_networks_on_a_cpu_are_asked_about_fewer_images() -> None:
    with torch.device("meta"):
        small, large = VisionTransformer(SIZES["demo16"]), VisionTransformer(SIZES["vitl16"])
    assert pretrain_pictures._corpus_size(small, 128) == 500
    assert 50 <= pretrain_pictures._corpus_size(large, 224) < 300
    assert pretrain_pictures._corpus_size(large, 512) == 50


def test_a_damaged_image_is_left_out(store: Store, tmp_path: Path, monkeypatch) -> None:
    folder = write_run(tmp_path / "run", lines(20))
    bad = set(choose(store, CONFIG.seed, 8)[:3].tolist())
    real = Store.read

    def read(self: Store, index: int) -> np.ndarray:
        if index in bad:
            raise self._damage(index, "planted")
        return real(self, index)

    monkeypatch.setattr(Store, "read", read)
    page = write_report(folder, store, "cpu").read_text()
    assert page.count('class="patch-map"') == 5
