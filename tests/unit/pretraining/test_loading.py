import hashlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from hilum.core.errors import ConfigError, HilumError, StoreError, UnknownNameError
from hilum.core.seeding import stream
from hilum.data.samplers import EndlessSampler, Window
from hilum.data.store import Store, write_arrays
from hilum.pretraining import loading
from hilum.pretraining.crops import CropConfig
from hilum.pretraining.loading import REPLACEMENT_TRIES, PretrainBatch, PretrainLoader, PretrainSource, Uncut
from hilum.pretraining.workers import _dead_soon

CROPS = CropConfig(global_size=32, local_size=16, local_crops=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    rng = stream(0, "images")
    images = [rng.integers(0, 256, (48 + index, 60 - index), dtype=np.uint8) for index in range(10)]
    return write_arrays(tmp_path_factory.mktemp("loading") / "store", images, np.zeros((10, 1), np.int8), ["Normal"])


Place = Literal["cpu", "device"]
PLACES: tuple[Place, ...] = ("cpu", "device")


def source(
    images: object, batch: int = 4, rank: int = 0, world: int = 1, seed: int = 7, crops_on: Place = "cpu"
) -> PretrainSource:
    sampler = EndlessSampler(np.arange(10), batch, seed, rank, world)
    return PretrainSource(images, sampler, CROPS, patch_size=8, crops_on=crops_on)  # type: ignore[arg-type]


def assert_same(a: PretrainBatch, b: PretrainBatch) -> None:
    assert a.digest() == b.digest()
    for moved_a, moved_b in ((a, b), (a.to("cpu"), b.to("cpu"))):
        for name in ("global_crops", "local_crops", "masks", "mask_weights", "indices"):
            assert torch.equal(getattr(moved_a, name), getattr(moved_b, name)), name
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


@pytest.mark.parametrize("crops_on", PLACES)
def test_a_step_is_the_same_after_resuming_and_differs_from_its_neighbours(store: Store, crops_on: Place) -> None:
    straight = list(PretrainLoader(source(store, crops_on=crops_on)).batches(0, 6))
    resumed = list(PretrainLoader(source(store, crops_on=crops_on)).batches(4, 6))
    assert_same(straight[4], resumed[0])
    assert_same(straight[5], resumed[1])
    assert straight[0].digest() != straight[1].digest()
    assert not torch.equal(straight[0].to("cpu").global_crops, straight[1].to("cpu").global_crops)


@pytest.mark.parametrize(
    ("workers", "crops_on"),
    [pytest.param(1, "cpu", marks=pytest.mark.slow), (2, "cpu"), pytest.param(2, "device", marks=pytest.mark.slow)],
)
def test_workers_change_nothing(store: Store, workers: int, crops_on: Place) -> None:
    here = list(PretrainLoader(source(store, crops_on=crops_on)).batches(2, 7))
    there = list(PretrainLoader(source(store, crops_on=crops_on), workers=workers).batches(2, 7))
    assert len(here) == len(there) == 5
    for a, b in zip(here, there, strict=True):
        assert_same(a, b)


def test_views_cut_on_the_device_are_those_that_are_cut_here(store: Store) -> None:
    """The same images and masks, the same views of them; levels differ where a tie was rounded the other way."""
    for step in range(3):
        here, uncut = source(store)[step], source(store, crops_on="device")[step]
        assert isinstance(uncut.uncut, Uncut)
        assert len(uncut.global_crops) == len(uncut.local_crops) == 0
        there = uncut.to("cpu")
        assert there.uncut is None
        for name in ("indices", "masks", "mask_weights"):
            assert torch.equal(getattr(here, name), getattr(there, name))
        for name in ("global_crops", "local_crops"):
            levels = (getattr(here, name).int() - getattr(there, name).int()).abs()
            assert levels.max() <= 3
            assert (levels > 0).float().mean() < 1e-3


def test_no_local_crops(store: Store) -> None:
    for crops_on in PLACES:
        none = replace(source(store, crops_on=crops_on), crops=replace(CROPS, local_crops=0))[0]
        assert none.to("cpu").local_crops.shape == (0, 1, 16, 16)
        assert len(none.digest()) == 16


def test_the_digest_names_what_the_batch_holds(store: Store) -> None:
    batch = source(store)[0]
    content = hashlib.sha256()
    for tensor in (batch.indices, batch.masks, batch.global_crops, batch.local_crops):
        content.update(tensor.numpy().data)
    assert batch.digest() == content.hexdigest()[:16]
    uncut = source(store, crops_on="device")[0]
    digests = {uncut.digest()}
    assert uncut.uncut is not None
    for tensor in (uncut.indices, uncut.masks, *uncut.uncut.tensors()):
        flat = tensor.numpy().reshape(-1)
        before = flat[0]
        flat[0] = not before if tensor.dtype == torch.bool else before + 1
        digests.add(uncut.digest())
        flat[0] = before
    assert len(digests) == 1 + 2 + 2 + 2 * 10  # every tensor counts
    assert uncut.digest() in digests


def test_the_same_image_in_the_next_epoch_is_cut_anew(store: Store) -> None:
    whole = source(store, batch=10)
    first, second = whole[0], whole[1]
    a, b = first.indices.tolist().index(3), second.indices.tolist().index(3)
    assert not torch.equal(first.global_crops[a], second.global_crops[b])


def test_a_place_of_the_order_is_cut_anew_in_each_epoch() -> None:
    class Same:
        uids = np.array([str(index) for index in range(10)])

        def read(self, index: int) -> np.ndarray:
            return stream(0, "same").integers(0, 256, (60, 60), dtype=np.uint8)

        def expect(self, indices: np.ndarray) -> None:
            pass

    crops = [source(Same(), batch=10)[step].global_crops for step in range(2)]
    assert not (crops[0] == crops[1]).flatten(1).all(dim=1).any()
    assert len(torch.unique(crops[0].flatten(1), dim=0)) == 20


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


def test_a_damaged_record_is_replaced_where_views_are_cut_on_the_device(store: Store) -> None:
    order = EndlessSampler(np.arange(10), 10, 7).batch(0)
    loader = PretrainLoader(source(Damaged(store, {int(order[2])}), batch=10, crops_on="device"))
    [batch] = loader.batches(0, 1)
    assert batch.indices[2] == batch.indices[3] == order[3]
    assert batch.replaced == (str(store.uids[order[2]]),)
    sound = source(store, batch=10, crops_on="device")[0].to("cpu")
    assert torch.equal(batch.to("cpu").global_crops[3:10], sound.global_crops[3:10])


def test_a_store_that_cannot_be_read_at_all_is_an_error(store: Store) -> None:
    with pytest.raises(StoreError, match="is damaged"):
        list(PretrainLoader(source(Damaged(store, set(range(10))))).batches(0, 1))
    assert REPLACEMENT_TRIES > 10


@pytest.mark.parametrize("error", [ConfigError("of a setting"), UnknownNameError("split", "of a setting", ["train"])])
def test_any_error_of_ours_comes_out_of_a_worker_as_a_sentence(store: Store, error: HilumError) -> None:
    class Refusing(Damaged):
        def read(self, index: int) -> np.ndarray:
            raise error

    told = pickle.loads(pickle.dumps(loading._Told(source(Refusing(store, set())))[0]))  # as a worker sends it
    assert isinstance(told, HilumError)
    assert str(told) == str(error)
    with pytest.raises(HilumError, match="of a setting"):
        list(PretrainLoader(source(Refusing(store, set()))).batches(0, 1))


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
    for crops_on in PLACES:
        moved = source(store, crops_on=crops_on)[0].to("meta")
        assert moved.global_crops.device.type == moved.mask_weights.device.type == "meta"
        assert moved.global_crops.shape == (8, 1, 32, 32)
        assert moved.local_crops.shape == (12, 1, 16, 16)


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


def killed_while(store: Store, waiting: bool) -> str:
    """Kill one of two workers while the next batch is waited for, or while something else is done; the message."""
    before = set(multiprocessing.active_children())
    batches = PretrainLoader(source(store), workers=2).batches(0, 1000)
    next(batches)
    workers = [process for process in multiprocessing.active_children() if process not in before]
    assert len(workers) == 2
    victim = workers[1].pid
    assert victim is not None
    if waiting:
        for process in workers:
            os.kill(process.pid or 0, signal.SIGSTOP)  # so that it really waits, and so that the other cannot help
        threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
    else:
        os.kill(victim, signal.SIGKILL)
        workers[1].join(timeout=30)
        time.sleep(0.05)  # nothing is raised here
    start = time.monotonic()
    with pytest.raises(HilumError) as error:
        for _ in batches:
            pass
    assert time.monotonic() - start < 30
    assert type(error.value) is HilumError
    for process in workers:
        process.join(timeout=30)
        assert not process.is_alive()
    assert "child_changed" not in repr(signal.getsignal(signal.SIGCHLD))
    assert str(victim) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("waiting", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_killed_worker_is_one_clear_error(store: Store, waiting: bool) -> None:
    message = killed_while(store, waiting)
    assert "killed by SIGKILL" in message
    assert "out of memory" in message
    assert "fewer workers" in message
    assert "Traceback" not in message


def die_slowly() -> None:
    """Let go of everything, as a process does when it is killed, and count as ended a little later."""
    os.closerange(3, 64)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_worker_that_is_dying_is_waited_for() -> None:
    process = multiprocessing.get_context("fork").Process(target=die_slowly)
    process.start()
    assert _dead_soon([process]) == [process]
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_what_a_worker_cannot_read_is_said_as_it_is_without_workers(store: Store, tmp_path: Path) -> None:
    images = [store.read(index) for index in range(10)]
    write_arrays(tmp_path / "store", images, np.zeros((10, 1), np.int8), ["Normal"])
    [shard] = (tmp_path / "store" / "shards").iterdir()
    shard.write_bytes(bytes(len(shard.read_bytes())))
    messages = []
    for workers in (0, 1):
        with pytest.raises(StoreError) as error:
            list(PretrainLoader(source(Store.open(tmp_path / "store")), workers).batches(0, 1))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "is damaged" in messages[0]
    assert "Traceback" not in messages[0]


@pytest.mark.gpu
@pytest.mark.parametrize("crops_on", PLACES)
def test_batches_reach_a_gpu_from_page_locked_memory(store: Store, crops_on: Place) -> None:
    [batch] = PretrainLoader(source(store, crops_on=crops_on), workers=1, pin_memory=True).batches(0, 1)
    assert batch.masks.is_pinned()
    if batch.uncut is not None:
        assert all(tensor.is_pinned() for tensor in batch.uncut.tensors() if tensor.numel())
    levels = (batch.to("cuda").global_crops.cpu().int() - source(store)[0].global_crops.int()).abs()
    assert levels.max() <= 3
    assert (levels > 0).float().mean() < 1e-3
