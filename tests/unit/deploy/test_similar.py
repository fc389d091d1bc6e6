"""Exact search, against a plain float64 search; who is left out; which models may ask; what an index keeps."""

import json
import shutil
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from hilum.core.errors import CheckpointError, ConfigError, EmptyStudyError, StoreError, UnknownNameError
from hilum.data.store import Store, write_arrays
from hilum.deploy.embeddings import embed_finding, embed_images, embed_study
from hilum.deploy.encoder import Encoder
from hilum.deploy.index_building import build_index, joined_labels
from hilum.deploy.nearest import BLOCK, centre_of, lengths_of, nearest
from hilum.deploy.predictor import load
from hilum.deploy.similar import Index

TOLERANCE = 1e-12


def brute_force(vectors, query, count, banned=None, centre=0.0):
    """Cosines in float64, one row at a time."""
    wide, query = vectors.astype(np.float64) - centre, query - centre
    query = query / np.linalg.norm(query)
    products = [float(np.sum(row * query) / np.sqrt(np.sum(row * row))) for row in wide]
    rows = [row for row in range(len(vectors)) if banned is None or not banned[row]]
    rows.sort(key=lambda row: (-products[row], row))
    return rows[:count], [products[row] for row in rows[:count]]


def plain(vectors, query, count, banned=None, centre=None):
    centre = np.zeros(vectors.shape[1], np.float32) if centre is None else centre
    return nearest(vectors, lengths_of(vectors, centre), centre, query, count, banned)


def random_vectors(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize(("rows", "dim", "count"), [(1, 3, 1), (7, 5, 20), (BLOCK, 16, 3), (3 * BLOCK + 11, 48, 25)])
def test_search_is_a_plain_float64_search(rows: int, dim: int, count: int) -> None:
    vectors = random_vectors(rows, dim)
    rng = np.random.default_rng(1)
    for _ in range(3):
        query = rng.standard_normal(dim)
        query /= np.linalg.norm(query)
        banned = rng.random(rows) < 0.2
        for out in (None, banned):
            found, products = plain(vectors, query, count, out)
            expected, values = brute_force(vectors, query, count, out)
            assert found.tolist() == expected
            np.testing.assert_allclose(products, values, rtol=0, atol=TOLERANCE)


def test_what_all_rows_share_is_taken_away_first() -> None:
    """Rows that crowd around one direction, one of them exactly in the middle: their cosines from the centre."""
    rng = np.random.default_rng(5)
    vectors = random_vectors(1, 40)[0].astype(np.float64) + 0.02 * rng.standard_normal((2500, 40))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    centre = vectors[17].astype(np.float32)
    query = vectors[3].astype(np.float64) + 0.01 * rng.standard_normal(40)
    query /= np.linalg.norm(query)
    found, cosines = plain(vectors, query, 60, centre=centre)
    rest = np.arange(2500) == 17
    expected, values = brute_force(np.where(rest[:, None], 0, vectors), query, 60, rest, centre.astype(np.float64))
    assert found.tolist() == expected
    np.testing.assert_allclose(cosines, values, rtol=0, atol=TOLERANCE)
    assert found.tolist() != brute_force(vectors, query, 60)[0]
    np.testing.assert_allclose(centre_of(vectors), vectors.astype(np.float64).mean(axis=0), rtol=0, atol=1e-7)
    everything, _ = plain(vectors, query, 2500, centre=centre)
    assert 17 in everything  # with cosine 0


def test_equal_rows_come_in_their_order_and_near_ties_are_told_apart() -> None:
    """Nearly equal rows, closer than float32 can tell: their order must still be that of float64."""
    dim, rng = 512, np.random.default_rng(3)
    base = random_vectors(1, dim)[0]
    vectors = np.tile(base, (4000, 1))
    steps = rng.integers(0, dim, 4000)
    for row in range(1000, 4000):  # one number of each to the next float16 up or down
        vectors[row, steps[row]] = np.nextafter(base[steps[row]], np.float16(np.inf if row % 2 else -np.inf))
    query = base.astype(np.float64) + 1e-3 * rng.standard_normal(dim)
    query /= np.linalg.norm(query)
    found, _ = plain(vectors, query, 1500)
    expected, _ = brute_force(vectors, query, 1500)
    assert found.tolist() == expected
    wide = vectors.astype(np.float32)
    narrow = wide @ query.astype(np.float32) / np.linalg.norm(wide, axis=1)
    assert np.lexsort((np.arange(4000), -narrow))[:1500].tolist() != expected  # what float32 alone would say
    twice = np.tile(base, (3000, 1))
    same, _ = plain(twice, query, 700)
    assert same.tolist() == list(range(700))


def test_all_banned_is_an_empty_answer_and_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    found, products = plain(random_vectors(9, 4), np.eye(4)[0], 3, np.ones(9, bool))
    assert len(found) == len(products) == 0
    assert torch.get_num_threads() == before


def test_searches_side_by_side_leave_the_threads_of_torch_as_they_were() -> None:
    """Each in a thread that torch has not met: what one search sets while it runs is not what the next puts back."""
    before, vectors, found = torch.get_num_threads(), random_vectors(3 * BLOCK, 32), []
    torch.set_num_threads(3)
    try:
        threads = [
            threading.Thread(target=lambda: found.append(plain(vectors, np.eye(32)[0], 2)[0])) for _ in range(12)
        ]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        seen: list[int] = []
        last = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        last.start()
        last.join()
        assert seen == [3]
        assert all(one.tolist() == found[0].tolist() for one in found)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def index(fitted: Path, tmp_path_factory) -> Index:
    """Of the whole store by the ensemble's first network has no queries: by the decoder, with two findings."""
    store, model = Store.open(fitted / "store"), load(fitted / "decoder", "cpu")
    out = tmp_path_factory.mktemp("index") / "index"
    return build_index(
        Encoder.of(model), store, range(len(store)), out, ["Mass", "Edema"], 8, model_path=fitted / "decoder"
    )


def test_rows_are_studies_with_their_views_and_labels(index: Index, store: Store) -> None:
    assert len(index) == len(set(store.studies.tolist())) == 38
    assert index.findings == ("Mass", "Edema")
    for row in range(len(index)):
        case = index.case(row)
        images = np.flatnonzero(store.studies == case.study_id)
        assert case.image_uid in store.uids[images]
        assert case.dataset == "arrays"
        for column, name in enumerate(store.findings):
            assert case.findings[name] == store.labels[images, column].max()
    with pytest.raises(IndexError, match="out of range"):
        index.case(38)


def test_a_study_is_the_normalised_mean_of_its_normalised_images(index: Index, store: Store, fitted: Path) -> None:
    """Independently: the backbone called by itself on each image, everything else in float64."""
    network = load(fitted / "decoder", "cpu").networks[0]
    for row in (0, 20, 37):
        images = np.flatnonzero(store.studies == index.case(row).study_id).tolist()
        vectors = []
        for image in images:
            square = torch.from_numpy(network.crop(store.read(image))[None, None]).float()
            with torch.no_grad():
                vectors.append(network.backbone(square * (1 / (255 * 0.25)) - 0.5 / 0.25).cls[0].double().numpy())
        mean = np.mean([one / np.linalg.norm(one) for one in vectors], axis=0)
        expected = mean / np.linalg.norm(mean)
        np.testing.assert_allclose(index.vectors[row].astype(np.float64), expected, rtol=0, atol=2**-11)
        query = embed_study(Encoder.of(load(fitted / "decoder", "cpu")), [store.read(image) for image in images])
        np.testing.assert_allclose(query, expected, rtol=0, atol=1e-5)
        assert index.search(query, 1)[0].row == row
        assert index.search(query, 1)[0].similarity == pytest.approx(1, abs=1e-3)


def test_search_gives_matches_in_order_and_leaves_out_who_asks(index: Index, store: Store) -> None:
    query = index.vectors[4].astype(np.float32)
    found = index.search(3 * query, 38)
    assert [one.row for one in found] == brute_force(index.vectors, query / np.linalg.norm(query), 38)[0]
    assert found[0].row == 4
    assert all(a.similarity >= b.similarity for a, b in pairwise(found))
    own = found[0]
    patient = str(store.patients[store.uids == own.image_uid][0])
    theirs = set(store.studies[store.patients == patient].tolist())
    assert len(theirs) == 2
    for asked in (patient, patient.removeprefix("arrays/")):
        rest = index.search(query, 38, exclude=[asked])
        assert theirs.isdisjoint(one.study_id for one in rest)
        assert len(rest) == 36
    rest = index.search(query, 38, exclude=[own.study_id, "no such study", ""])
    assert {one.row for one in rest} == set(range(38)) - {4}


def test_an_indexed_image_is_known_by_its_name(index: Index, store: Store) -> None:
    name, patient = str(store.image_ids[7]), str(store.patients[7])
    assert index.own([f"/somewhere/{name}.png"]) == [patient]
    assert index.own([f"/somewhere/{name}"]) == [patient]
    assert index.own([f"/{name}/other.png", "x.dcm"]) == []


def test_names_that_are_folders_are_compared_whole(tmp_path: Path, fitted: Path) -> None:
    images = [np.full((20, 20), 40 * number, np.uint8) for number in range(3)]
    ids = [f"patient{number}/study1/view1_frontal.jpg" for number in range(3)]
    store = write_arrays(
        tmp_path / "s", images, np.zeros((3, 1), np.int8), ["Edema"], image_ids=ids, patients=["p0", "p1", "p2"]
    )
    index = build_index(Encoder.of(load(fitted / "linear", "cpu")), store, range(3), tmp_path / "i")
    assert index.own([f"/data/train/{ids[1]}"]) == ["p1"]
    assert index.own(["/data/train/patient9/study1/view1_frontal.jpg"]) == []


def test_own_films_are_known_in_every_dataset_and_without_patient_or_study(tmp_path: Path, fitted: Path) -> None:
    images = [np.full((20, 20), 40 * number, np.uint8) for number in range(4)]
    store = write_arrays(
        tmp_path / "s", images, np.zeros((4, 1), np.int8), ["Edema"], image_ids=["1.png", "1.png", "2.png", "3.png"],
        patients=["p0", "p1", "", ""], studies=["s0", "s1", "", ""], datasets=["one", "two", "two", "two"],
    )  # fmt: skip
    index = build_index(Encoder.of(load(fitted / "linear", "cpu")), store, range(4), tmp_path / "i")
    assert index.own(["/films/1.png"]) == ["p0", "p1"]
    own = index.own(["/films/2.png"])
    assert np.flatnonzero(index.left_out(own)).tolist() == [2]


def test_a_finding_is_searched_by_what_its_query_pools(index: Index, store: Store, fitted: Path) -> None:
    model = load(fitted / "decoder", "cpu")
    by_mass = index.finding("Mass")
    assert by_mass.vectors.shape == (38, 8)  # the decoder's width
    images = np.flatnonzero(store.studies == index.case(5).study_id).tolist()
    query = embed_finding(model, [store.read(image) for image in images], "Mass")
    np.testing.assert_allclose(by_mass.vectors[5].astype(np.float32), query, rtol=0, atol=2**-10)
    assert by_mass.search(query, 1)[0].row == 5
    other = embed_finding(model, [store.read(image) for image in images], "Edema")
    assert abs(float(query @ other)) < 0.999
    with pytest.raises(UnknownNameError, match="Mass"):
        index.finding("Masss")


def test_only_the_model_that_made_an_index_may_ask(index: Index, fitted: Path) -> None:
    decoder, linear = load(fitted / "decoder", "cpu"), load(fitted / "linear", "cpu")
    index.matches(decoder)
    index.finding("Mass").matches(decoder)
    with pytest.raises(CheckpointError, match="another backbone"):
        index.matches(linear)  # the same weights at 24 pixels
    head = Encoder.of(load(fitted / "decoder", "cpu"))
    next(head.head.parameters()).data.add_(1)
    index.matches(head)
    with pytest.raises(CheckpointError, match="another head"):
        index.finding("Mass").matches(head)
    other = Encoder.of(load(fitted / "decoder", "cpu"))
    other.backbone.cls_token.data[..., 0] += 1e-3
    with pytest.raises(CheckpointError, match="another backbone"):
        index.matches(other)


def test_thumbnails_come_from_the_store_or_are_refused(fitted: Path, tmp_path: Path) -> None:
    shutil.copytree(fitted / "store", tmp_path / "one" / "store")
    store, encoder = Store.open(tmp_path / "one" / "store"), Encoder.of(load(fitted / "linear", "cpu"))
    index = build_index(encoder, store, range(30, 40), tmp_path / "one" / "index")
    shown = index.thumbnail(3, 16)
    assert max(shown.shape) == 16
    assert shown.dtype == np.uint8
    (tmp_path / "one").rename(tmp_path / "two")  # both together: found by the relative path
    moved = Index.open(tmp_path / "two" / "index")
    np.testing.assert_array_equal(moved.thumbnail(3, 16), shown)
    shutil.rmtree(tmp_path / "two" / "store")
    with pytest.raises(StoreError, match=r"not at .*store any more"):
        Index.open(tmp_path / "two" / "index").thumbnail(3)
    order = np.random.default_rng(0).permutation(len(store))
    old = Store.open(fitted / "store")
    write_arrays(
        tmp_path / "two" / "store", [old.read(int(n)) for n in order], old.labels[order], old.findings,
        image_ids=old.image_ids[order].tolist(),
    )  # fmt: skip
    np.testing.assert_array_equal(Index.open(tmp_path / "two" / "index").thumbnail(3, 16), shown)
    shutil.rmtree(tmp_path / "two" / "store")
    write_arrays(tmp_path / "two" / "store", [old.read(0)], old.labels[:1], old.findings)
    with pytest.raises(StoreError, match="no longer holds image"):
        Index.open(tmp_path / "two" / "index").thumbnail(3)


def test_what_cannot_be_searched_is_said(index: Index, fitted: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a finished index"):
        Index.open(tmp_path)
    with pytest.raises(ConfigError, match="at least 1"):
        index.search(np.ones(12), 0)
    for query, said in ((np.ones(11), "shape"), (np.zeros(12), "zero or not finite"), (np.full(12, np.nan), "finite")):
        with pytest.raises(ConfigError, match=said):
            index.search(query)
    shutil.copytree(index.path, tmp_path / "copy")
    np.save(tmp_path / "copy" / "studies.npy", np.zeros((3, 12), np.float16))
    with pytest.raises(ConfigError, match=r"expected float16 \(38, 12\)"):
        Index.open(tmp_path / "copy")
    header = json.loads((tmp_path / "copy" / "index.json").read_text())
    (tmp_path / "copy" / "index.json").write_text(json.dumps(header | {"format": "hilum-index-9"}))
    with pytest.raises(ConfigError, match="hilum-index-9"):
        Index.open(tmp_path / "copy")
    store, encoder = Store.open(fitted / "store"), Encoder.of(load(fitted / "linear", "cpu"))
    with pytest.raises(ConfigError, match="already holds an index"):
        build_index(encoder, store, [0], tmp_path / "copy")
    with pytest.raises(EmptyStudyError):
        build_index(encoder, store, [], tmp_path / "new")
    plain = build_index(encoder, store, range(4), tmp_path / "plain")
    with pytest.raises(ConfigError, match="without finding queries"):
        plain.finding("Mass")


def test_labels_of_a_study_are_present_where_any_image_has_them() -> None:
    codes = np.array([[1, -1, 0], [0, -2, -1], [0, 0, -1]], np.int8)
    found = joined_labels(codes, np.array([0, 0, 1]), 2)
    assert found.tolist() == [[1, -1, 0], [0, 0, -1]]


def test_images_of_any_kind_give_the_same_embedding(fitted: Path, tmp_path: Path) -> None:
    import cv2

    model, pixels = load(fitted / "linear", "cpu"), np.random.default_rng(0).integers(0, 255, (30, 26), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    found = embed_images(model, [pixels, tmp_path / "a.png", (tmp_path / "a.png").read_bytes()])
    assert found.shape == (3, 12)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found[1:], found[:1].repeat(2, 0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(embed_study(model, pixels), found[0], rtol=0, atol=1e-6)
    with pytest.raises(EmptyStudyError):
        embed_images(model, [])
