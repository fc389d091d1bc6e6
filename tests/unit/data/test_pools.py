"""Pools: the slides' numbers exactly, the clean twins sound, differences said."""

import json

import numpy as np
import polars as pl
import pytest

from hilum.core.errors import ConfigError, LeakageError, UnknownNameError
from hilum.data import manifest as manifest_module
from hilum.data.manifest import ManifestOptions, SourceSpec, build_manifest
from hilum.data.pools import differences, open_pool, pools, split_by_part
from hilum.data.rows import SourceRows
from hilum.data.schema import Manifest, patients_across_splits, read_manifest, write_manifest


def images(count: int, per_patient: int, official: list[str] | None = None, name: str = "i") -> pl.DataFrame:
    patients = [f"p{number // per_patient}" for number in range(count)]
    return pl.DataFrame(
        {
            "image_id": [f"{name}{number}" for number in range(count)],
            "patient_id": patients,
            "split_official": official or [""] * count,
        }
    )


def split(part: str, frame: pl.DataFrame, seed: int = 0) -> np.ndarray:
    return split_by_part(part, "d", frame, np.zeros((frame.height, 0), np.int8), seed)


def test_the_slides_numbers_add_up():
    assert [m.expected for m in pools()["slides-710k"].members] == [207_096, 223_648, 160_861, 86_524, 32_748]
    assert pools()["slides-710k"].expected == 710_877


@pytest.mark.parametrize(
    ("part", "rows", "taken"),
    [("image_cut:80", 258_871, 207_096), ("image_share:32748/40967", 40_967, 32_748), ("all", 160_861, 160_861)],
)
def test_parts_of_the_published_sizes(part, rows, taken):
    frame = images(rows, 5)
    chosen = split(part, frame)
    assert (chosen == "train").sum() == taken
    moved = split(part, frame, seed=1)
    assert (moved == "train").sum() == taken
    assert part == "all" or (moved != chosen).any()
    backwards = split(part, frame.reverse())[::-1]  # nobody's place depends on the order of rows
    np.testing.assert_array_equal(backwards, chosen)


def test_a_cut_by_image_leaks_and_a_cut_by_patient_does_not():
    official = ["train"] * 4000 + ["val"] * 400 + ["test"] * 600
    frame = images(5000, 4, official)
    for part, leaks in (("image_cut:80", True), ("patients:80", False)):
        chosen = split(part, frame)
        assert (chosen[:4000] != "").all()
        assert set(chosen[4000:4400]) == {""}  # the development set judges, and is not learned from
        assert set(chosen[4400:]) == {"test"}
        assert abs((chosen == "train").sum() - 3200) <= (0 if leaks else 4)
        placed = frame.with_columns(split_project=pl.Series(chosen), dataset=pl.lit("d"))
        assert (patients_across_splits(placed).height > 0) == leaks


def test_own_splits():
    frame = images(10, 1, ["train"] * 5 + ["val"] * 2 + ["test"] * 3)
    assert split("train", frame).tolist() == frame["split_official"].to_list()
    assert split("train+val", frame).tolist() == ["train"] * 7 + ["test"] * 3
    with pytest.raises(ConfigError, match="its own training split"):
        split("train", images(3, 1))


def test_a_leaky_pool_must_be_accepted():
    with pytest.raises(LeakageError, match=r"slides-710k-clean.*--accept-leak"):
        open_pool("slides-710k", accept_leak=False)
    assert open_pool("slides-710k", accept_leak=True).leak
    assert not open_pool("slides-710k-clean", accept_leak=False).leak
    with pytest.raises(UnknownNameError, match="slides-710k"):
        open_pool("slides-710", accept_leak=True)


def test_a_banned_source_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"does not take padchest: CXR-LT 2026 .* bans models"):
        pools()["cxrlt2026-eligible"].member("padchest")


def test_differences_have_causes():
    pool = pools()["slides-710k-clean"]
    rows = {row.source: row for row in differences(pool, {"cxrlt": 207_500, "chexpert": 223_400, "nih": 86_524})}
    assert rows["cxrlt"].cause == ""  # within the 1 % of a cut by patient
    assert "223414" in rows["chexpert"].cause
    assert rows["nih"].cause == ""
    assert rows["padchest"].cause == "this source was not given"
    (row,) = [one for one in differences(pools()["cxrlt2026-eligible"], {}) if one.source == "cxrlt2026"]
    assert row.cause == "this source was not given"  # nobody of its evaluation images is held back then


@pytest.fixture
def make(monkeypatch, tmp_path):
    """A manifest under a pool, of sources that are tables in memory."""

    def of(pool: str, accept_leak: bool = False, **frames: pl.DataFrame) -> Manifest:
        for source, frame in frames.items():
            rows = frame.with_columns(
                study_id=pl.lit("s") + pl.col("image_id"), source_relpath=pl.col("image_id") + ".png",
                view_raw=pl.lit("PA"), **({"label.Edema": pl.lit(0, dtype=pl.Int8)}),
            )  # fmt: skip
            made = SourceRows(rows, ("Edema",), tmp_path, False, {}, origin=source)
            monkeypatch.setitem(manifest_module.SOURCES, source, lambda options, made=made: made)
        specs = [SourceSpec(source, source, tmp_path) for source in frames]
        return build_manifest(specs, ManifestOptions(pool=pool, accept_leak=accept_leak))[0]

    return of


OFFICIAL = ["train"] * 80 + ["val"] * 8 + ["test"] * 12


def test_a_leaky_manifest_says_so_and_can_be_read(make, tmp_path):
    frames = {"cxrlt": images(100, 4, OFFICIAL), "chexpert": images(100, 4, OFFICIAL, "c")}
    manifest = make("slides-710k", accept_leak=True, **frames)
    assert "CheXpert's validation set is inside" in manifest.accepted_leak
    counts = json.loads(manifest.metadata["pool_counts"])
    assert counts == {"cxrlt": 64, "chexpert": 88}
    chexpert = manifest.frame.filter(pl.col("dataset") == "chexpert")
    assert chexpert.filter(pl.col("split_official") == "val")["ssl_ok"].all()
    assert not manifest.frame.filter(pl.col("split_official") == "test")["ssl_ok"].any()
    write_manifest(manifest, tmp_path / "m.parquet")
    assert read_manifest(tmp_path / "m.parquet").accepted_leak == manifest.accepted_leak


def test_a_clean_pool_has_no_patient_of_an_evaluation_list(make):
    frames = {"cxrlt": images(100, 4, OFFICIAL), "chexpert": images(100, 4, OFFICIAL, "c"), "brax": images(50, 5)}
    manifest = make("slides-710k-clean", **frames)
    assert manifest.accepted_leak == ""
    assert not patients_across_splits(manifest.frame).height
    judged = manifest.frame.filter(
        pl.col("split_project").is_in(["val", "test"]) | pl.col("split_official").is_in(["val", "test"])
    )
    open_people = set(manifest.frame.filter("ssl_ok")["patient_id"])
    assert open_people
    assert not open_people & set(judged["patient_id"])
    assert json.loads(manifest.metadata["pool_counts"])["chexpert"] == 80
    assert set(json.loads(manifest.metadata["split"])) == {"rules"}  # the pool has no fractions


def test_what_a_clean_pool_does_not_take_stays_out_of_pretraining(make):
    """Images of no list are not of the training list."""
    frame = make("slides-710k-clean", nih=images(30, 1, ["train"] * 10 + ["test"] * 10 + [""] * 10)).frame
    outside = frame.filter(pl.col("split_official") == "")
    assert not outside["ssl_ok"].any()
    assert outside["ssl_reason"].unique().to_list() == ["not in slides-710k-clean"]
    assert frame.filter("ssl_ok")["split_official"].to_list() == ["train"] * 10


@pytest.mark.parametrize("first", ["nih", "cxrlt2026"])
def test_the_challenges_own_images_only_hold_back_their_people(make, first):
    nih = images(40, 2, ["train"] * 30 + ["test"] * 10)
    own = images(12, 1, ["train"] * 6 + ["val"] * 2 + ["test"] * 4, "c").with_columns(
        origin_patient=pl.Series([None] * 8 + [f"nih/p{number}" for number in (3, 4, 5, 19)], dtype=pl.String)
    )
    given = {"nih": nih, "cxrlt2026": own}
    frame = make("cxrlt2026-eligible", **{first: given.pop(first), **given}).frame
    challenge = frame.filter(pl.col("dataset") == "cxrlt2026")
    assert not challenge["ssl_ok"].any()
    assert challenge.group_by("split_project").len().sort("split_project").rows() == [("", 6), ("test", 4), ("val", 2)]
    open_people = set(frame.filter("ssl_ok")["patient_id"])
    assert open_people == {f"nih/p{number}" for number in range(15)} - {"nih/p3", "nih/p4", "nih/p5"}


def test_another_dataset_of_the_same_people_yields_to_evaluation(make):
    """The same patients under two names: what one evaluates on, the other does not train on."""
    first, second = images(40, 4, ["train"] * 20 + ["test"] * 20), images(40, 4)
    rows = {"cxrlt": first, "brax": second.with_columns(origin_patient=pl.format("cxrlt/{}", "patient_id"))}
    manifest = make("slides-710k-clean", **rows)
    brax = manifest.frame.filter(pl.col("dataset") == "brax")
    tested = brax["origin_patient"].is_in([f"cxrlt/p{number}" for number in range(5, 10)])
    assert tested.sum() == 20
    assert not brax.filter(tested)["ssl_ok"].any()
    assert brax.filter(tested)["split_project"].unique().to_list() == [""]
