"""The store gives back what was put in, notices every damage, and works in other processes and threads."""

import hashlib
import json
import pickle
import resource
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from hilum.core.errors import ConfigError, StoreError, UnknownNameError
from hilum.core.types import image_uid
from hilum.data import store as store_module
from hilum.data.shards import ENCODINGS, decode, encode, new_shard
from hilum.data.store import Store, write_arrays


def images(count: int = 7, seed: int = 0) -> list[np.ndarray]:
    """Smooth images of different sizes."""
    rng, out = np.random.default_rng(seed), []
    for number in range(count):
        y, x = np.mgrid[0 : 40 + number, 0 : 30 + 3 * number]
        out.append((110 + 80 * np.sin(x / 9 + number) * np.cos(y / 7) + rng.normal(0, 2, y.shape)).astype(np.uint8))
    return out


LABELS = np.random.default_rng(1).choice([1, 0, -1, -2], (7, 3)).astype(np.int8)


def filled(path: Path, encoding: str = "raw") -> Store:
    return write_arrays(
        path,
        images(),
        LABELS,
        ["Edema", "Mass", "Round(ed) Atelectasis"],
        datasets=list("aababba"),
        image_ids=[f"dicom-{number}" for number in range(7)],
        patients=[f"{name}/p{number // 2}" for number, name in enumerate("aababba")],
        studies=[f"{name}/s{number}" for number, name in enumerate("aababba")],
        views=["PA", "AP", "PA", "LATERAL", "PA", "PA", "LL"],
        splits=["train", "val", "train", "test", "", "val", "train"],
        ssl_ok=[True, False, True, False, True, False, True],
        encoding=encoding,
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gives_back_what_was_put_in(tmp_path, encoding):
    store = filled(tmp_path / "store", encoding)
    assert len(store) == 7
    assert store.findings == ("Edema", "Mass", "Round(ed) Atelectasis")
    assert (store.encoding, store.preprocess_id) == (encoding, "hilum-grey-1")
    for index, image in enumerate(images()):
        pixels = store.read(index)
        assert pixels.shape == image.shape == (store.heights[index], store.widths[index])
        assert pixels.dtype == np.uint8
        if encoding == "jpeg95":
            assert np.abs(pixels.astype(int) - image).mean() < 1.5
        else:
            np.testing.assert_array_equal(pixels, image)
        pixels[:] = 0  # a fresh array: changing it changes nothing
        assert store.read(index).any()
    np.testing.assert_array_equal(store.labels, LABELS)
    assert store.datasets.tolist() == list("aababba")
    assert store.views.tolist() == ["PA", "AP", "PA", "LATERAL", "PA", "PA", "LL"]
    assert store.splits.tolist() == ["train", "val", "train", "test", "", "val", "train"]
    assert store.ssl_ok.tolist() == [True, False, True, False, True, False, True]
    assert store.image_ids.tolist() == [f"dicom-{number}" for number in range(7)]
    assert store.patients.tolist() == ["a/p0", "a/p0", "b/p1", "a/p1", "b/p2", "b/p2", "a/p3"]
    assert store.studies.tolist()[2] == "b/s2"
    assert store.uids.tolist() == [image_uid(name, f"dicom-{number}") for number, name in enumerate("aababba")]


def test_a_shard_holds_one_dataset(tmp_path):
    store = filled(tmp_path / "store")
    header = json.loads((tmp_path / "store" / "store.json").read_text())
    assert [shard["dataset"] for shard in header["shards"]] == ["a", "b"]
    assert [shard["records"] for shard in header["shards"]] == [4, 3]
    for shard in store.shards:
        content = (tmp_path / "store" / "shards" / shard.name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard.sha256


def test_indices_and_fingerprint(tmp_path):
    store = filled(tmp_path / "store")
    assert store.indices("train").tolist() == [0, 2, 6]
    assert store.indices("train").dtype == np.int64
    assert store.indices("").tolist() == [4]
    assert store.fingerprint([2, 0, 6]) == store.fingerprint(store.indices("train"))
    assert store.fingerprint([2, 0]) != store.fingerprint([2, 0, 6])
    lines = sorted((store.uids[index], "train") for index in (0, 2))
    expected = hashlib.sha256("\n".join(f"{uid}\x1f{split}" for uid, split in lines).encode()).hexdigest()
    assert store.fingerprint(np.array([0, 2])) == expected


def test_same_arrays_same_bytes(tmp_path):
    for name in ("one", "two"):
        filled(tmp_path / name, "jpeg95")
    for path in sorted((tmp_path / "one").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_the_index_holds_no_pickle(tmp_path):
    filled(tmp_path / "store")
    with np.load(tmp_path / "store" / "index.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)
        assert len(arrays["uid"]) == 7


def test_an_empty_store(tmp_path):
    store = write_arrays(tmp_path / "store", [], np.zeros((0, 2), np.int8), ["a", "b"])
    assert len(store) == 0
    assert store.uids.tolist() == store.splits.tolist() == store.indices("train").tolist() == []
    assert store.labels.shape == (0, 2)


def test_index_out_of_range(tmp_path):
    store = filled(tmp_path / "store")
    np.testing.assert_array_equal(store.read(-1), images()[-1])
    for index in (7, -8):
        with pytest.raises(IndexError):
            store.read(index)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_flipped_bit_is_noticed_and_named(tmp_path, encoding):
    store = filled(tmp_path / "store", encoding)
    file = tmp_path / "store" / "shards" / store.shards[0].name
    sound = file.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(sound), 40):
        changed = bytearray(sound)
        changed[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(changed)
        damaged = []
        for index in range(len(store)):
            try:
                store.read(index)
            except StoreError as error:
                damaged.append((index, str(error)))
        assert len(damaged) == 1
        assert store.uids[damaged[0][0]] in damaged[0][1]
    file.write_bytes(sound)
    assert store.read(0).size


def test_a_shard_of_the_wrong_length_is_noticed_on_opening(tmp_path):
    store = filled(tmp_path / "store")
    file = tmp_path / "store" / "shards" / store.shards[1].name
    content = file.read_bytes()
    for other in (content[:-1], content + b"\0"):
        file.write_bytes(other)
        with pytest.raises(StoreError, match=store.shards[1].name):
            Store.open(tmp_path / "store")
    file.write_bytes(content[:100])
    with pytest.raises(StoreError, match="expected"):
        store.read(2)
    file.unlink()
    with pytest.raises(StoreError, match="missing"):
        Store.open(tmp_path / "store")


def test_what_is_not_a_finished_store(tmp_path):
    with pytest.raises(StoreError, match="no such folder"):
        Store.open(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="hilum build"):
        Store.open(tmp_path / "empty")
    (tmp_path / "empty" / "store.json").write_text('{"format": "hilum-store-99"}')
    with pytest.raises(StoreError, match="hilum-store-99"):
        Store.open(tmp_path / "empty")
    (tmp_path / "empty" / "store.json").write_text("[")
    with pytest.raises(StoreError, match="JSON"):
        Store.open(tmp_path / "empty")


@pytest.mark.parametrize("change", [{"findings": None}, {"shards": [{"name": "x"}]}, {"encoding": ...}])
def test_a_header_that_was_edited_is_an_error_of_ours(tmp_path, change):
    write_arrays(tmp_path / "store", [np.zeros((4, 4), np.uint8)], np.zeros((1, 1), np.int8), ["Edema"])
    path = tmp_path / "store" / "store.json"
    header = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in header.items() if value is not ...}))
    with pytest.raises(StoreError, match="does not describe a store"):
        Store.open(tmp_path / "store")


def test_an_index_of_another_store_is_refused(tmp_path):
    filled(tmp_path / "one")
    filled(tmp_path / "two", "png")
    (tmp_path / "one" / "index.npz").write_bytes((tmp_path / "two" / "index.npz").read_bytes())
    with pytest.raises(StoreError, match="not the index"):
        Store.open(tmp_path / "one")
    (tmp_path / "one" / "index.npz").unlink()
    with pytest.raises(StoreError, match=r"index\.npz"):
        Store.open(tmp_path / "one")


def read_sum(store: Store, index: int) -> int:
    return int(store.read(index).sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(tmp_path, method):
    store = filled(tmp_path / "store")
    expected = [read_sum(store, index) for index in range(7)]  # the parent's files are open when it forks
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        assert list(pool.map(read_sum, [store] * 7, range(7))) == expected
    assert [read_sum(store, index) for index in range(7)] == expected


def test_pickle_is_small(tmp_path):
    store = filled(tmp_path / "store")
    store.read(0)
    content = pickle.dumps(store)
    assert len(content) < 500
    np.testing.assert_array_equal(pickle.loads(content).read(1), images()[1])


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", 2)
    names = [f"d{number}" for number in range(12)]
    store = write_arrays(tmp_path / "store", images(12), np.zeros((12, 1), np.int8), ["a"], datasets=names)
    before = len(list(Path("/proc/self/fd").iterdir()))
    failures: list[int] = []
    expected = images(12)

    def work(seed: int) -> None:
        chosen = np.random.default_rng(seed).integers(0, 12, 300).tolist()
        failures.extend(index for index in chosen if not np.array_equal(store.read(index), expected[index]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"labels": np.zeros((6, 3), np.int8)}, "Labels"),
        ({"labels": np.full((7, 3), 2, np.int8)}, "Labels"),
        ({"images": [*images()[:6], np.zeros((3, 3))]}, "Image 6"),
        ({"images": [*images()[:6], np.zeros((0, 3), np.uint8)]}, "Image 6"),
        ({"splits": ["train"]}, "split"),
        ({"image_ids": ["same"] * 7}, "same id"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, what):
    arguments = {"images": images(), "labels": LABELS, "findings": ["a", "b", "c"], **change}
    with pytest.raises(ConfigError, match=what):
        write_arrays(tmp_path / "store", **arguments)
    assert not (tmp_path / "store").exists()


def test_a_store_is_not_overwritten_and_an_encoding_must_exist(tmp_path):
    filled(tmp_path / "store")
    with pytest.raises(StoreError, match="already"):
        filled(tmp_path / "store")
    with pytest.raises(UnknownNameError, match="jpeg95"):
        filled(tmp_path / "other", "jpeg")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_record_that_is_no_image_of_that_size(encoding):
    record = np.frombuffer(encode(images()[0], encoding), np.uint8)
    height, width = images()[0].shape
    assert decode(record, encoding, height, width).shape == (height, width)
    with pytest.raises(ValueError, match=r"reshape|expected"):
        decode(record, encoding, height + 1, width)
    if encoding != "raw":
        with pytest.raises(ValueError, match="expected"):
            decode(np.zeros(50, np.uint8), encoding, height, width)


def test_two_writers_of_one_shard(tmp_path):
    path = tmp_path / "shards" / "00000.bin"
    with new_shard(path) as writer:
        writer.append(b"first")
        with pytest.raises(StoreError, match="Another build"), new_shard(path):
            pass
        assert not path.exists()
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in path.parent.iterdir()] == ["00000.bin"]


def test_a_failed_shard_leaves_nothing_and_what_a_killed_one_left_is_overwritten(tmp_path):
    path = tmp_path / "00000.bin"
    writing = new_shard(path)
    writing.__enter__().append(b"half")
    assert not writing.__exit__(RuntimeError, RuntimeError(), None), "the error goes on to the caller"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".00000.bin.partial").write_bytes(b"left by a killed process, longer than the next")
    with new_shard(path) as writer:
        assert writer.append(b"whole")[0] == 0
    assert path.read_bytes() == b"whole"


def test_a_full_disk_is_an_error_that_names_the_shard(tmp_path):
    def limit() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    program = (
        "import numpy as np, sys; from pathlib import Path; from hilum.core.errors import StoreError;"
        "from hilum.data.store import write_arrays\n"
        "try: write_arrays(Path(sys.argv[1]), [np.zeros((200, 200), np.uint8)], np.zeros((1, 1), np.int8), ['a'])\n"
        "except StoreError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "store")],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "00000.bin" in done.stdout
    assert "make room" in done.stdout
    assert not list((tmp_path / "store" / "shards").iterdir())


def test_reading_a_store_needs_no_table_library():
    program = (
        "import sys; import hilum.data.store; "
        "print([name for name in ('polars', 'pydicom', 'torch', 'PIL', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
