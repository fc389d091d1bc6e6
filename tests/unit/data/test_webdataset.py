"""WebDataset tars: out of a store and back without a change; from other tools, strictly, with every sample counted."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hilum.commands import convert, verify
from hilum.core.errors import ConfigError, LeakageError, StoreError, UnknownNameError
from hilum.core.types import image_uid
from hilum.data.build import build_store
from hilum.data.licences import check_export, licences
from hilum.data.shards import IN_PLACE
from hilum.data.store import Store, write_arrays
from hilum.data.webdataset import ExportOptions, listed
from hilum.data.webdataset_json import identity_of
from hilum.data.webdataset_reading import read_tars, tars_of

FINDINGS = ("Edema", "Round(ed) Atelectasis", "Our Own Finding")
LABELS = np.random.default_rng(1).choice([1, 0, -1, -2], (12, 3)).astype(np.int8)


def film(seed: int, height: int = 48, width: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 200, (height, width), dtype=np.uint8)


def filled(path: Path, encoding: str, count: int = 12) -> Store:
    """A store of two datasets, some of whose images are no part of pretraining."""
    return write_arrays(
        path,
        [film(number, 40 + number) for number in range(count)],
        LABELS[:count],
        FINDINGS,
        datasets=["ab"[number % 2] for number in range(count)],
        image_ids=[f"SECRET-{number}" for number in range(count)],
        patients=[f"{'ab'[number % 2]}/SECRET-p{number // 4}" for number in range(count)],
        studies=[f"{'ab'[number % 2]}/SECRET-s{number // 2}" for number in range(count)],
        views=[("PA", "AP_SUPINE", "LATERAL", "UNKNOWN")[number % 4] for number in range(count)],
        splits=[("train", "val", "")[number // 4 % 3] for number in range(count)],
        ssl_ok=[number // 4 % 3 != 1 and number != 2 for number in range(count)],
        encoding=encoding,
    )


def export(store: Path, out: Path, **options: Any) -> None:
    convert.to_tars(store, out, ExportOptions(**({"accept_licence": True} | options)))


def bring(out: Path, *inputs: Path, **options: Any) -> Store:
    convert.to_store(inputs, out, convert.ImportOptions(**({"size": 64, "workers": 1} | options)))
    return Store.open(out)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    """A tar as another tool would write it; text is a link to that name."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                file.addfile(member)
            else:
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return path


def refused(store: Path) -> dict[str, int]:
    reasons = pl.read_csv(store / "quarantine.csv")["reason"]
    return {reason: int((reasons == reason).sum()) for reason in reasons.unique().sort()}


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as file:
        return {item.name: file.extractfile(item).read() for item in file.getmembers()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("encoding", ["jpeg95", "png", "raw"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_out_and_back_is_the_same(tmp_path, encoding, with_ids):
    store = filled(tmp_path / "store", encoding)
    export(tmp_path / "store", tmp_path / "tars", with_ids=with_ids)
    back = bring(tmp_path / "back", tmp_path / "tars", encoding=encoding)
    assert back.findings == store.findings
    where = {uid: index for index, uid in enumerate(back.uids.tolist())}
    order = [where[uid] for uid in store.uids.tolist()]
    assert sorted(order) == list(range(12))
    for index, other in enumerate(order):
        np.testing.assert_array_equal(back.read(other), store.read(index))
    np.testing.assert_array_equal(back.labels[order], store.labels)
    for name in ("splits", "views", "datasets", "ssl_ok"):
        np.testing.assert_array_equal(getattr(back, name)[order], getattr(store, name))
    assert back.fingerprint(range(12)) == store.fingerprint(range(12))
    if with_ids:
        for name in ("image_ids", "patients", "studies"):
            np.testing.assert_array_equal(getattr(back, name)[order], getattr(store, name))


def test_the_bytes_of_records_stay_and_are_the_same_again(tmp_path):
    store = filled(tmp_path / "store", "jpeg95")
    for name in ("one", "two"):
        export(tmp_path / "store", tmp_path / name)
    export(tmp_path / "store", tmp_path / "one")  # again, into the same folder
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    found = members(tmp_path / "one" / "a-000000.tar") | members(tmp_path / "one" / "b-000000.tar")
    for index, uid in enumerate(store.uids):
        assert found[f"{uid}.jpg"] == store.record(index).tobytes()
    said = json.loads(found[f"{store.uids[0]}.json"])
    assert said["labels"] == {name: {1: 1, 0: 0, -1: None, -2: "uncertain"}[int(code)]
                              for name, code in zip(FINDINGS, LABELS[0], strict=True)}  # fmt: skip
    with tarfile.open(tmp_path / "one" / "a-000000.tar") as file:
        assert {(item.mtime, item.uid, item.gid, item.uname, item.mode) for item in file} == {(0, 0, 0, "", 0o644)}


def test_no_ids_unless_asked_for(tmp_path, capsys):
    filled(tmp_path / "store", "png")
    export(tmp_path / "store", tmp_path / "without")
    export(tmp_path / "store", tmp_path / "with", with_ids=True)
    assert not any(b"SECRET" in content for content in contents(tmp_path / "without").values())
    assert any(b"SECRET" in content for content in contents(tmp_path / "with").values())
    assert "SECRET" not in capsys.readouterr().out


def test_one_split_and_small_tars(tmp_path):
    filled(tmp_path / "store", "png")
    export(tmp_path / "store", tmp_path / "tars", split="train", tar_bytes=24000)
    tars = listed(tmp_path / "tars")
    assert [(item.name, item.dataset) for item in tars] == [
        ("a-000000.tar", "a"), ("a-000001.tar", "a"), ("b-000000.tar", "b"), ("b-000001.tar", "b"),
    ]  # fmt: skip
    assert sum(item.images for item in tars) == 4
    assert all(item.bytes <= 24000 for item in tars)
    assert set(bring(tmp_path / "back", tmp_path / "tars").splits) == {"train"}
    with pytest.raises(UnknownNameError, match="test"):
        export(tmp_path / "store", tmp_path / "none", split="test")


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    filled(tmp_path / "store", "png")
    tar(tmp_path / "foreign" / "x.tar", [("a.png", png(film(0)))])
    export(tmp_path / "store", tmp_path / "ours", split="train")
    for folder in ("foreign", "ours"):
        before = contents(tmp_path / folder)
        with pytest.raises(StoreError, match="--out"):
            export(tmp_path / "store", tmp_path / folder)
        assert contents(tmp_path / folder) == before


def test_an_export_that_was_stopped(tmp_path, monkeypatch):
    filled(tmp_path / "store", "png")
    export(tmp_path / "store", tmp_path / "straight")
    read, calls = Store.record, []

    def stopping(self: Store, index: int) -> np.ndarray:
        calls.append(index)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(Store, "record", stopping)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "store", tmp_path / "tars")
    for use in (lambda: verify.run(tmp_path / "tars"), lambda: bring(tmp_path / "back", tmp_path / "tars")):
        with pytest.raises(StoreError, match="not a finished export"):
            use()
    export(tmp_path / "store", tmp_path / "tars")
    assert contents(tmp_path / "tars") == contents(tmp_path / "straight")


def test_licences_are_obeyed(tmp_path):
    filled(tmp_path / "store", "png")
    with pytest.raises(ConfigError, match="--accept-licence"):
        export(tmp_path / "store", tmp_path / "tars", accept_licence=False)
    assert not (tmp_path / "tars").exists()
    check_export(["nih-open", "nlm-open"])
    for tag in (
        "physionet-credentialed",
        "stanford-rua",
        "padchest-form",
        "kaggle-rules",
        "jsrt-registration",
        "",
        "x",
    ):
        with pytest.raises(ConfigError, match=tag or "none"):
            check_export(["nih-open", tag])
    assert all(row.cite for row in licences().values())


def test_verify_reads_tars_of_ours(tmp_path, capsys):
    filled(tmp_path / "store", "png")
    export(tmp_path / "store", tmp_path / "tars")
    verify.run(tmp_path / "tars")
    assert "12 images in 2 tars, 0 faults." in capsys.readouterr().out
    path = tmp_path / "tars" / "b-000000.tar"
    sound = path.read_bytes()
    for damage in (sound[:2000] + b"\0" + sound[2001:], sound[: len(sound) // 2], sound + b"\0" * 512, None):
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(StoreError, match="damaged"):
            verify.run(tmp_path / "tars")
        assert "b-000000.tar" in capsys.readouterr().out
    with pytest.raises(StoreError, match=r"b-000000\.tar is missing"):
        tars_of([tmp_path / "tars"])


def test_out_of_a_store_that_reads_in_place_go_pixels_only(tmp_path):
    bring(tmp_path / "store", tar(tmp_path / "in" / "x.tar", [("a.png", png(film(0)))]))
    (tmp_path / "films").mkdir()
    note = "SECRET"
    Image.fromarray(film(3, 90, 80)).save(tmp_path / "films" / "x.jpg", comment=note)
    assert note.encode() in (tmp_path / "films" / "x.jpg").read_bytes()
    from hilum.commands import manifest

    manifest.run([f"folder={tmp_path / 'films'}"], tmp_path / "m.parquet")
    build_store(tmp_path / "m.parquet", tmp_path / "place", size=32, encoding=IN_PLACE, workers=1)
    export(tmp_path / "place", tmp_path / "tars")
    place = Store.open(tmp_path / "place")
    assert not any(note.encode() in content for content in contents(tmp_path / "tars").values())
    back = bring(tmp_path / "back", tmp_path / "tars", encoding="png")
    np.testing.assert_array_equal(back.read(0), place.read(0))


# Tars of other tools


def test_samples_of_another_tool(tmp_path, capsys):
    first = tar(
        tmp_path / "in" / "x-000000.tar",
        [
            ("p1/0001.png", png(film(0))),
            (
                "p1/0001.json",
                b'{"labels": {"edema": 1, "Mass": "uncertain"}, "patient_id": "7", "split": "Validation"}',
            ),
            ("p1/0002.v1.JPG", b""),  # its extension is "v1.jpg": another kind of member
            ("0003.JPG", png(film(1))),  # a PNG whatever its name says
            ("0003.cls", b"4"),
            ("0004.seg.png", png(film(2))),
            ("README.txt", b"hello"),
            ("0005.png", png(film(3))),
            ("0005.json", b'{"labels": {"Mass": null, "Pneumonia": 0.0}, "view": "lateral", "caption": "x"}'),
        ],
    )
    second = tar(tmp_path / "in" / "x-000001.tar", [("0006.png", png(film(4)))])
    store = bring(tmp_path / "store", second, first, dataset="other", split="train", encoding="png")
    assert store.image_ids.tolist() == ["p1/0001", "0003", "0005", "0006"]
    assert store.uids.tolist() == [image_uid("other", key) for key in store.image_ids]
    assert store.findings == ("Edema", "Mass", "Pneumonia")
    assert store.labels.tolist() == [[1, -2, -1], [-1, -1, -1], [-1, -1, 0], [-1, -1, -1]]
    assert store.splits.tolist() == ["val", "train", "train", "train"]
    assert store.ssl_ok.tolist() == [False, True, True, True]
    assert store.patients.tolist() == ["other/7", "other/0003", "other/0005", "other/0006"]
    assert store.views.tolist() == ["UNKNOWN", "UNKNOWN", "LATERAL", "UNKNOWN"]
    for index, seed in enumerate((0, 1, 3, 4)):
        np.testing.assert_array_equal(store.read(index), film(seed))
    out = capsys.readouterr().out
    assert "4 samples in 2 tars" in out
    assert "2 without labels" in out
    assert "3 other members left out" in out


DAMAGED_JSON = (
    b"{", b"[]", b'{"labels": 3}', b'{"labels": {"Mass": 2}}', b'{"labels": {"Mass": "yes"}}',
    b'{"labels": {"Mass": NaN}}',
    b'{"labels": {"Mass": -1}}', b'{"labels": {"Mass": 1, "mass": 0}}', b'{"labels": {"Mass": 1, "Mass": 0}}',
    b'{"patient_id": 7}', b'{"split": "holdout"}', b'{"dataset": "../x"}', b"\xff", b"[" * 5000, b" " * (2**20 + 1),
    b'{"format": "hilum-webdataset-1", "uid": "SHOUT"}',
)  # fmt: skip


def test_an_image_whose_labels_cannot_be_trusted_is_refused(tmp_path):
    files: list[tuple[str, bytes | str]] = [("sound.png", png(film(0))), ("sound.json", b'{"labels": {"Mass": 1}}')]
    for number, content in enumerate(DAMAGED_JSON):
        files += [(f"{number}.png", png(film(1))), (f"{number}.json", content)]
    store = bring(tmp_path / "store", tar(tmp_path / "in" / "x.tar", files), budget=1.0)
    assert store.image_ids.tolist() == ["sound"]
    assert refused(tmp_path / "store") == {"damaged_labels": len(DAMAGED_JSON)}


FAULTS: dict[str, tuple[list[tuple[str, bytes | str]], str]] = {
    "absolute": ([("/etc/a.png", png(film(1)))], "path_leaves_root"),
    "outside": ([("../a.png", png(film(1)))], "path_leaves_root"),
    "link": ([("a.png", "/etc/passwd")], "not_a_file"),
    "link of labels": ([("a.png", png(film(1))), ("a.json", "/etc/passwd")], "not_a_file"),
    "no image": ([("a.json", b"{}")], "no_image"),
    "two images": ([("a.png", png(film(1))), ("a.jpg", png(film(2)))], "several_images"),
    "empty": ([("a.png", b"")], "zero_bytes"),
    "cut image": ([("a.png", png(film(1))[:-9])], "truncated"),
    "no picture": ([("a.jpg", b"hello" * 99)], "not_an_image"),
    "damaged image": ([("a.png", png(film(1)).replace(b"IDAT", b"IDAT\1", 1))], "damaged"),
    "key twice": ([("b.png", png(film(5)))], "duplicate_key"),
    "other labels": ([("b.png", png(film(0))), ("b.json", b'{"labels": {"Mass": 1}}')], "duplicate_key"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_used_is_in_quarantine_and_the_rest_is_stored(tmp_path, name):
    odd, reason = FAULTS[name]
    path = tar(tmp_path / "in" / "x.tar", [("b.png", png(film(0))), *odd, ("c.png", png(film(9)))])
    store = bring(tmp_path / "store", path, budget=0.5, encoding="png")
    assert store.image_ids.tolist() == ["b", "c"]
    np.testing.assert_array_equal(Store.open(tmp_path / "store").read(1), film(9))
    assert refused(tmp_path / "store") == {reason: 1}


def test_an_image_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("hilum.data.webdataset_reading.MAX_FILE_BYTES", 2000)
    path = tar(tmp_path / "in" / "x.tar", [("a.png", png(film(0))), ("b.png", png(film(1, 9, 9)))])
    assert bring(tmp_path / "store", path, budget=0.5).image_ids.tolist() == ["b"]
    assert refused(tmp_path / "store") == {"too_large": 1}


def test_copies_are_counted_and_left_out(tmp_path, capsys):
    one = [("a.png", png(film(0))), ("b.png", png(film(1))), ("a.png", png(film(0)))]
    tar(tmp_path / "in" / "x.tar", one)
    tar(tmp_path / "in" / "y.tar", [*one[:2], ("c.png", png(film(2)))])
    store = bring(tmp_path / "store", tmp_path / "in", tmp_path / "in" / "x.tar")
    assert store.image_ids.tolist() == ["a", "b", "c"]
    assert "6 samples in 2 tars: 3 to read, 3 copies of another left out." in capsys.readouterr().out


def test_a_cut_tar_gives_what_is_whole_and_says_that_it_is_cut(tmp_path):
    path = tar(tmp_path / "in" / "x.tar", [(f"{n}.png", png(film(n))) for n in range(4)])
    whole = path.read_bytes()
    for length, expected, reasons in (
        (len(png(film(0))) + 512 + 500, 0, {"tar_truncated": 2}),  # the first may have had labels behind it
        (6000, 2, {"tar_truncated": 1, "truncated": 1}),
        (512 + 1000, 0, {"tar_truncated": 1, "truncated": 1}),
    ):
        path.write_bytes(whole[:length])
        out = tmp_path / f"store{length}"
        assert len(bring(out, path, budget=1.0)) == expected
        assert refused(out) == reasons


def test_a_patient_in_two_splits_is_a_leak(tmp_path):
    said = [b'{"patient_id": "7", "split": "%s"}' % split for split in (b"train", b"test")]
    files = [(f"{n}.{kind}", content) for n in (0, 1) for kind, content in (("png", png(film(n))), ("json", said[n]))]
    with pytest.raises(LeakageError):
        bring(tmp_path / "store", tar(tmp_path / "in" / "x.tar", files))


def test_spaces_around_an_id_make_nobody_another_patient():
    said = [{"patient_id": "7", "study_id": "s"}, {"patient_id": " 7", "study_id": "s "}, {"patient_id": " "}]
    known = [identity_of(one, "key", ("other", "train", "")) for one in said]
    assert [one["patient_id"] for one in known] == ["other/7", "other/7", "other/key"]
    assert [one["study_id"] for one in known] == ["other/s", "other/s", "other/key"]


def test_what_is_no_input(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(999))
    for path in (tmp_path / "empty", tmp_path / "absent.tar", tmp_path / "x.tar"):
        with pytest.raises(StoreError):
            bring(tmp_path / "store", path)
    assert not (tmp_path / "store").exists()


def test_again_decodes_nothing_and_changes_nothing(tmp_path, monkeypatch):
    path = tar(tmp_path / "in" / "x.tar", [("a.png", png(film(0))), ("b.png", b""), ("c.png", "c")])
    bring(tmp_path / "store", path, budget=1.0)
    before = contents(tmp_path / "store")
    monkeypatch.setattr("hilum.data.decoding.decode_one", None)
    bring(tmp_path / "store", path, budget=1.0)
    assert contents(tmp_path / "store") == before


def test_what_was_met_and_which_leak_was_accepted_stays_known(tmp_path):
    from hilum.data.schema import Manifest

    first = read_tars([tar(tmp_path / "in" / "x.tar", [(f"{n}.png", png(film(n))) for n in range(3)])], "x", "train")
    origin = pl.Series("origin_image", ["nih/0001.png", None, "nih/0002.png"])
    frame = first.manifest.frame.with_columns(origin, view_source=pl.lit("derived")).drop("member_picture")
    leaky = Manifest(frame, (), first.manifest.metadata | {"accepted_leak": "siblings on both sides"})
    build_store(leaky, tmp_path / "store", encoding="png", workers=1)
    store = Store.open(tmp_path / "store")
    assert store.pictures.tolist() == [image_uid("nih", "0001.png"), store.uids[1], image_uid("nih", "0002.png")]
    export(tmp_path / "store", tmp_path / "tars")
    back = bring(tmp_path / "back", tmp_path / "tars")
    assert back.pictures.tolist() == store.pictures.tolist()
    assert back.accepted_leak == store.accepted_leak == "siblings on both sides"
    assert back.view_sources.tolist() == ["derived"] * 3


def test_members_of_tars_are_not_read_in_place(tmp_path):
    reading = read_tars([tar(tmp_path / "in" / "x.tar", [("a.png", png(film(0)))])], "x", "")
    with pytest.raises(ConfigError, match="tar"):
        build_store(reading.manifest, tmp_path / "store", encoding=IN_PLACE, workers=1)


KINDS = ["good", "empty", "link", "copy", "clash", "labels", "none"]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=9), st.integers(0, 60000))
def test_every_sample_is_stored_refused_or_a_copy(tmp_path_factory, kinds, cut):
    root = tmp_path_factory.mktemp("case")
    files: list[tuple[str, bytes | str]] = [("first.png", png(film(0)))]
    for number, kind in enumerate(kinds):
        content: bytes | str = {"empty": b"", "link": "/x", "clash": png(film(99)), "copy": png(film(0))}.get(
            kind, png(film(number + 1))
        )
        if kind != "none":
            files.append(("first.png" if kind in ("copy", "clash") else f"{number}.png", content))
        if kind in ("labels", "none"):
            files.append((f"{number}.json", b"?"))
    path = tar(root / "in" / "x.tar", files)
    reading = read_tars([path], "x", "")
    assert reading.samples == 1 + len(kinds)
    assert reading.duplicates == kinds.count("copy")
    summary = build_store(reading.manifest, root / "store", size=16, encoding="raw", workers=1)
    assert summary.stored == 1 + kinds.count("good")
    assert summary.inputs == summary.stored + sum(summary.quarantined.values())
    assert summary.inputs + reading.duplicates == reading.samples
    path.write_bytes(path.read_bytes()[: 512 + cut])
    again = read_tars([path], "x", "")
    counted = build_store(again.manifest, root / "cut", size=16, encoding="raw", workers=1)
    assert counted.inputs == counted.stored + sum(counted.quarantined.values())
    assert counted.stored <= summary.stored
    if counted.stored < summary.stored:
        assert counted.quarantined["tar_truncated"] in (1, 2)  # what is gone, and the last sample before the cut


def test_a_sample_whose_labels_were_cut_off_is_not_stored_without_them(tmp_path):
    files = [("a.png", png(film(0))), ("a.json", b"{}"), ("b.png", png(film(1))), ("b.json", b'{"Edema": 1}')]
    path = tar(tmp_path / "in" / "x.tar", files)
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b'{"Edema"') - 512])  # up to the header of b.json
    reading = read_tars([path], "x", "")
    summary = build_store(reading.manifest, tmp_path / "store", size=16, encoding="raw", workers=1)
    assert summary.stored == 1
    assert summary.quarantined == {"tar_truncated": 2}
