import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from hilum.core.errors import ConfigError, StoreError
from hilum.core.seeding import stream
from hilum.data.samplers import EndlessSampler, Window
from hilum.data.store import Store, write_arrays
from hilum.pretraining.crops import CropConfig
from hilum.pretraining.loading import REPLACEMENT_TRIES, PretrainBatch, PretrainLoader, PretrainSource

CROPS = CropConfig(global_size=32, local_size=16, local_crops=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    rng = stream(0, "images")
    images = [rng.integers(0, 256, (48 + index, 60 - index), dtype=np.uint8) for index in range(10)]
    return write_arrays(tmp_path_factory.mktemp("loading") / "store", images, np.zeros((10, 1), np.int8), ["Normal"])


def source(images: object, batch: int = 4, rank: int = 0, world: int = 1, seed: int = 7) -> PretrainSource:
    sampler = EndlessSampler(np.arange(10), batch, seed, rank, world)
    return PretrainSource(images, sampler, CROPS, patch_size=8)  # type: ignore[arg-type]


def assert_same(a: PretrainBatch, b: PretrainBatch) -> None:
    for name in ("global_crops", "local_crops", "masks", "mask_weights", "indices"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.replaced == b.replaced


def test_shapes_types_and_crop_major_order(store: Store) -> None:
    batch = source(store)[0]
    assert batch.global_crops.shape == (8, 1, 32, 32)
    assert batch.local_crops.shape == (12, 1, 16, 16)
    assert batch.masks.shape == (8, 16)
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.uint8
    assert batch.mask_weights.shape == (int(batch.masks.sum()),)
    assert batch.indices.tolist() == EndlessSampler(np.arange(10), 4, 7).batch(0).tolist()


def test_crops_of_an_image_are_a_batch_apart(store: Store) -> None:
    class Flat:
        uids = np.array([str(index) for index in range(10)])

        def read(self, index: int) -> np.ndarray:
            return np.full((40, 40), 10 * index, np.uint8)

        def expect(self, indices: np.ndarray) -> None:
            pass

    plain = PretrainSource(
        Flat(), EndlessSampler(np.arange(10), 4, 7), CropConfig(32, 16, local_crops=3, augmentation="none"), 8
    )
    batch = plain[3]
    levels = 10 * batch.indices
    assert torch.equal(batch.global_crops[:, 0, 0, 0].reshape(2, 4), levels.expand(2, 4).to(torch.uint8))
    assert torch.equal(batch.local_crops[:, 0, 0, 0].reshape(3, 4), levels.expand(3, 4).to(torch.uint8))


def test_a_step_is_the_same_after_resuming_and_differs_from_its_neighbours(store: Store) -> None:
    straight = list(PretrainLoader(source(store)).batches(0, 6))
    resumed = list(PretrainLoader(source(store)).batches(4, 6))
    assert_same(straight[4], resumed[0])
    assert_same(straight[5], resumed[1])
    assert not torch.equal(straight[0].global_crops, straight[1].global_crops)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_workers_change_nothing(store: Store, workers: int) -> None:
    here = list(PretrainLoader(source(store)).batches(2, 7))
    there = list(PretrainLoader(source(store), workers=workers).batches(2, 7))
    assert len(here) == len(there) == 5
    for a, b in zip(here, there, strict=True):
        assert_same(a, b)


def test_the_same_image_in_the_next_epoch_is_cut_anew(store: Store) -> None:
    whole = source(store, batch=10)
    first, second = whole[0], whole[1]
    a, b = first.indices.tolist().index(3), second.indices.tolist().index(3)
    assert not torch.equal(first.global_crops[a], second.global_crops[b])


def test_processes_share_one_global_batch(store: Store) -> None:
    whole = source(store, batch=4)[1]
    parts = [source(store, batch=2, rank=rank, world=2)[1] for rank in range(2)]
    assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)
    crops = torch.cat([part.global_crops.reshape(2, 2, 32, 32) for part in parts], dim=1)
    assert torch.equal(crops, whole.global_crops.reshape(2, 4, 32, 32))
    assert not torch.equal(parts[0].masks, parts[1].masks)


def test_loading_touches_no_global_generator(store: Store) -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(PretrainLoader(source(store)).batches(0, 2))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


class Damaged:
    """A store whose records in `bad` cannot be read."""

    def __init__(self, store: Store, bad: set[int]) -> None:
        self.store, self.bad, self.uids = store, bad, store.uids

    def expect(self, indices: np.ndarray) -> None:
        self.store.expect(indices)

    def read(self, index: int) -> np.ndarray:
        if index in self.bad:
            raise StoreError(f"image {self.uids[index]} is damaged")
        return self.store.read(index)


def test_a_damaged_record_is_replaced_by_the_next_of_the_order_and_named(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    order = EndlessSampler(np.arange(10), 10, 7).batch(0)
    bad = {int(order[2]), int(order[3])}
    loader = PretrainLoader(source(Damaged(store, bad)))
    batches = list(loader.batches(0, 5))
    found = torch.cat([batch.indices for batch in batches]).numpy()
    assert found[2] == found[3] == found[4] == order[4]
    assert not np.isin(found, list(bad)).any()
    names = {str(store.uids[index]) for index in bad}
    assert set(loader.replaced) == names
    assert batches[0].replaced[0] == str(store.uids[order[2]])
    printed = capsys.readouterr().err
    assert all(printed.count(name) == 1 for name in names)  # once each, however often
    # Nothing else changes: the other samples of the batch keep their pixels.
    sound = source(store)[0]
    assert torch.equal(batches[0].global_crops[:2], sound.global_crops[:2])
    assert torch.equal(batches[0].masks, sound.masks)
    assert_same(batches[0], source(Damaged(store, bad))[0])


def test_a_store_that_cannot_be_read_at_all_is_an_error(store: Store) -> None:
    with pytest.raises(StoreError, match="is damaged"):
        list(PretrainLoader(source(Damaged(store, set(range(10))))).batches(0, 1))
    assert REPLACEMENT_TRIES > 10


def test_a_record_damaged_on_disk_is_replaced(store: Store, tmp_path: Path) -> None:
    images = [store.read(index) for index in range(10)]
    write_arrays(tmp_path / "store", images, np.zeros((10, 1), np.int8), ["Normal"])
    [shard] = (tmp_path / "store" / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    content[5] ^= 0xFF
    shard.write_bytes(content)
    loader = PretrainLoader(source(Store.open(tmp_path / "store"), batch=10))
    assert 0 not in torch.cat([batch.indices for batch in loader.batches(0, 2)])
    assert loader.replaced == {str(store.uids[0]): 2}


def test_sources_travel_to_workers(store: Store) -> None:
    assert_same(pickle.loads(pickle.dumps(source(store)))[1], source(store)[1])


def test_batches_move(store: Store) -> None:
    moved = source(store)[0].to("meta")
    assert moved.global_crops.device.type == moved.mask_weights.device.type == "meta"


def test_sizes_that_do_not_fit_the_patches_are_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"local_size: 16 .* patch size 32"):
        PretrainSource(store, EndlessSampler(np.arange(10), 2, 0), CROPS, patch_size=32)
    with pytest.raises(ConfigError, match="workers"):
        PretrainLoader(source(store), workers=-1)


def test_the_next_window_is_fetched_once_and_in_runs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system is asked for are the bytes of the next window's records, neighbours in one request."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, start, length, _how: asked.append((start, length)))
    sampler = EndlessSampler(store.in_storage_order(range(10)), 2, 7, window=Window(3, 2))
    windowed = PretrainSource(store, sampler, CROPS, patch_size=8)
    sizes = [store.record(index).nbytes for index in range(10)]
    starts = np.cumsum([0, *sizes]).tolist()
    for step in range(20):
        asked.clear()
        windowed[step]
        expected = sampler.opens(step)
        covered = {byte for start, length in asked for byte in range(start, start + length, 7)}
        assert covered <= {byte for index in expected for byte in range(starts[index], starts[index + 1])}
        assert sum(length for _, length in asked) == sum(sizes[index] for index in expected)
        assert len(asked) == (1 + (np.diff(expected) > 1).sum() if len(expected) else 0)
    asked.clear()
    source(store)[3]
    assert not asked
