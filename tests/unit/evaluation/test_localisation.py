"""The localisation score on planted truths: a map that is the mask, an even map, a flipped map, and known means."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from hilum.core.errors import PredictionError
from hilum.data.regions import Regions, union
from hilum.evaluation.localisation import MEASURES, localise, pair_up, score
from hilum.evaluation.map_files import Maps, read_maps, write_maps
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.report_localisation import localisation_section
from hilum.evaluation.summary import localisation_table

FINDINGS = ("Edema", "Mass", "Never")
SIDE = 8
COUNT = 24


def truth(count: int = COUNT, shift: bool = True) -> Regions:
    """Of image n: Mass is two by two patches at a place of its own; every second image has Edema, a wide band."""
    readers = {}
    for n in range(count):
        top, left = (n % 6 if shift else 2), ((n // 2) % 6 if shift else 2)
        box = [top / SIDE, left / SIDE, (top + 2) / SIDE, (left + 2) / SIDE]
        readers[f"i{n}", "Mass"] = lambda box=box: union([box])
        if n % 2 == 0:
            readers[f"i{n}", "Edema"] = lambda: union([[0.5, 0.0, 0.75, 1.0]])
    return Regions("r.csv", "boxes", "0" * 64, {"label X: no one finding": 3}, readers)


def predictions(count: int = COUNT, **changes) -> Predictions:
    ids = np.array([f"i{n}" for n in range(count)])
    columns = {
        "image_uid": np.array([f"u{n}" for n in range(count)]), "image_id": ids, "study_id": ids,
        "patient_id": np.array([f"p{n // 2}" for n in range(count)]), "dataset": np.full(count, "d"),
        "view": np.full(count, "PA"),
    }  # fmt: skip
    return Predictions(**columns, findings=FINDINGS, probabilities=np.full((count, 3), 0.5), **changes)


def maps_of(regions: Regions, make, boxes=(0.0, 0.0, 1.0, 1.0), uid: str = "u") -> Maps:
    """A map for each region: `make` of the share of each patch that it takes."""
    keys = sorted(regions.keys)
    images = sorted({image for image, _ in keys}, key=lambda name: int(name[1:]))
    values = []
    for image, finding in keys:
        region = regions.region(image, finding)
        mask = np.zeros((SIDE, SIDE))
        rows, columns = (np.round(lines * SIDE).astype(int) for lines in (region.rows, region.columns))
        for r, c in np.argwhere(region.mask):
            mask[rows[r] : rows[r + 1], columns[c] : columns[c + 1]] = 1
        values.append(make(mask))
    return Maps(
        np.array([image.replace("i", uid) for image in images]), np.array(images), FINDINGS,
        np.array([images.index(image) for image, _ in keys]), np.array([FINDINGS.index(name) for _, name in keys]),
        np.array(values), np.tile(np.array(boxes), (len(images), 1)),
        {"model": "m", "kind": "attention", "over": "image"},
    )  # fmt: skip


def even(mask: np.ndarray) -> np.ndarray:
    return np.full(mask.shape, 1 / mask.size)


def flipped(mask: np.ndarray) -> np.ndarray:
    return 1.0 - mask


def judged(make, **options):
    regions = truth()
    return localise(predictions(), {"one": maps_of(regions, make)}, regions, bootstraps=100, **options)["maps"][0]


def test_a_map_that_is_the_mask_scores_one() -> None:
    macro = judged(lambda mask: mask)["macro"]
    assert macro["energy"] == macro["pointing"] == 1
    assert macro["ci95"]["energy"] == macro["ci95"]["pointing"] == [1, 1]
    assert macro["above_chance"]["energy"]["shown"]


def test_an_even_map_scores_what_chance_scores() -> None:
    """Of energy that is the area, 4 of 64 patches and a quarter of the picture; no interval says otherwise."""
    found = judged(even)
    assert found["findings"]["Mass"]["energy"] == pytest.approx(4 / 64) == found["findings"]["Mass"]["area"]
    assert found["findings"]["Edema"]["energy"] == pytest.approx(0.25)
    assert found["macro"]["energy"] == pytest.approx((4 / 64 + 0.25) / 2)
    assert found["macro"]["pointing"] == pytest.approx(found["macro"]["pointing_chance"])
    for gap in found["macro"]["above_chance"].values():
        assert abs(gap["difference"]) < 1e-12


def test_a_flipped_map_fails() -> None:
    macro = judged(flipped, tolerance=0.0)["macro"]
    assert macro["energy"] == macro["pointing"] == 0
    assert macro["above_chance"]["pointing"]["difference"] < 0


def test_a_map_that_knows_the_finding_and_not_the_image_is_not_above_that_of_others() -> None:
    """The same map on every image is better than chance, for findings keep to their places, and not than others'."""
    regions = truth()
    band = np.zeros((8, 8))
    band[3:6] = 1

    same = localise(predictions(), {"one": maps_of(regions, lambda mask: band)}, regions, bootstraps=100)["maps"][0]
    edema = same["findings"]["Edema"]
    assert edema["above_chance"]["energy"]["shown"]
    assert edema["energy_of_others"] == pytest.approx(edema["energy"]) == pytest.approx(2 / 3)
    assert not same["macro"]["above_others"]["energy"]["shown"]
    own = judged(lambda mask: mask)
    mass = own["findings"]["Mass"]
    by_hand = []
    for n in range(COUNT):
        boxes = [(m % 6, (m // 2) % 6) for m in range(COUNT)]
        others = np.zeros((8, 8))
        for m, (top, left) in enumerate(boxes):
            if m != n:
                others[top : top + 2, left : left + 2] += 1
        top, left = boxes[n]
        by_hand.append(others[top : top + 2, left : left + 2].sum() / others.sum())
    assert mass["energy_of_others"] == pytest.approx(np.mean(by_hand))
    assert own["macro"]["above_others"]["energy"]["shown"]


def test_the_tolerance_is_a_distance_from_the_region() -> None:
    """The region is the patch in row 2, column 2; the middle of its neighbour is half a patch away."""
    region = union([[2 / 8, 2 / 8, 3 / 8, 3 / 8]])
    regions = Regions("r", "boxes", "0", {}, {("i0", "Mass"): lambda: region})

    def beside(mask: np.ndarray) -> np.ndarray:
        values = np.zeros((8, 8))
        values[2, 4] = 1  # one patch of distance between, its middle at 1.5 patches from the edge
        return values

    for tolerance, hit in ((0.0, 0), (1.49 / 8, 0), (1.51 / 8, 1)):
        [file] = localise(predictions(2), {"one": maps_of(regions, beside)}, regions, tolerance=tolerance,
                          bootstraps=0, min_images=1)["maps"]  # fmt: skip
        assert file["macro"]["pointing"] == hit, tolerance
    [file] = localise(
        predictions(2), {"one": maps_of(regions, even)}, regions, tolerance=0.5 / 8, bootstraps=0, min_images=1
    )["maps"]
    assert file["macro"]["pointing_chance"] == 5 / 64  # itself and four neighbours


def test_scores_of_one_map_in_float64() -> None:
    rng = np.random.default_rng(0)
    values, area = rng.random((5, 6)), rng.random((5, 6))
    distance = np.where(area > 0.7, 0.0, 0.3)
    energy, share, pointing, chance = score(values, area, distance, 0.1)
    assert energy == pytest.approx(sum(v * a for v, a in zip(values.ravel(), area.ravel(), strict=True)) / values.sum())
    assert share == pytest.approx(area.sum() / 30)
    assert pointing == float(area.ravel()[values.argmax()] > 0.7)
    assert chance == pytest.approx((area > 0.7).mean())


def test_scale_and_other_maps_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    regions = truth()
    base = maps_of(regions, lambda mask: rng.random(mask.shape) + mask)
    scaled = dataclasses.replace(base, maps=base.maps * rng.uniform(0.1, 9, (len(base), 1, 1)))
    order = rng.permutation(len(base))
    mixed = dataclasses.replace(
        base, maps=base.maps[order], image=base.image[order], finding=base.finding[order]
    )  # fmt: skip
    results = [localise(predictions(), {"one": one}, regions, bootstraps=50)["maps"] for one in (base, scaled, mixed)]
    for other in results[1:]:
        for name in MEASURES:
            assert other[0]["macro"][name] == pytest.approx(results[0][0]["macro"][name], abs=1e-12)


def test_means_are_over_images_and_then_over_findings_and_patients_are_resampled() -> None:
    """Mass is hit in the images of even patients alone: 0.5, with the binomial interval of 12 patients."""
    regions = truth(shift=False)

    def half(number: int, mask: np.ndarray) -> np.ndarray:
        return mask if (number // 2) % 2 == 0 else flipped(mask)

    base = maps_of(regions, lambda mask: mask)
    values = [
        half(int(base.image_id[image][1:]), one) for image, one in zip(base.image.tolist(), base.maps, strict=True)
    ]
    found = localise(
        predictions(), {"one": dataclasses.replace(base, maps=np.array(values))}, regions,
        {"Mass": "tail", "Edema": "head"}, tolerance=0.0, bootstraps=600,
    )  # fmt: skip
    [file] = found["maps"]
    assert file["macro"]["pointing"] == pytest.approx(0.5)
    assert (file["tail"]["counted"], file["head"]["counted"], file["medium"]["counted"]) == (1, 1, 0)
    low, high = file["tail"]["ci95"]["pointing"]
    deviation = np.sqrt(0.25 / 12)
    assert low == pytest.approx(0.5 - 1.96 * deviation, abs=0.06)
    assert high == pytest.approx(0.5 + 1.96 * deviation, abs=0.06)
    assert found["n_pairs"] == 36
    assert found["n_images"] == 24
    few = localise(predictions(), {"one": base}, regions, bootstraps=0, min_images=13)
    assert few["few_images"] == ["Edema"]
    assert few["maps"][0]["macro"]["counted"] == 1


def test_a_single_patient_proves_nothing() -> None:
    """Two images of one patient: no resample differs from another, so there is no interval and nothing is shown."""
    regions, table = truth(2), predictions(2)
    found = localise(table, {"one": maps_of(regions, lambda mask: mask), "two": maps_of(regions, even)}, regions,
                     bootstraps=50, min_images=1)  # fmt: skip
    mass = found["maps"][0]["findings"]["Mass"]
    assert (mass["images"], mass["energy"], mass["ci95"]) == (2, 1, {})
    assert not mass["above_chance"]["energy"]["shown"]
    assert not found["differences"][0]["by_finding"]["Mass"]["energy"]["shown"]
    with pytest.raises(PredictionError, match="No finding has 5 images"):
        localise(table, {"one": maps_of(regions, even)}, regions)


def test_files_are_compared_on_the_same_pairs_and_patients() -> None:
    regions = truth()
    good, bad = maps_of(regions, lambda mask: mask + 0.1), maps_of(regions, even)
    missing = dataclasses.replace(bad, maps=bad.maps[1:], image=bad.image[1:], finding=bad.finding[1:])
    found = localise(predictions(), {"good": good, "bad": missing}, regions, bootstraps=100)
    assert found["left_out"]["without a map"] == 1
    [difference] = found["differences"]
    assert (difference["first"], difference["second"]) == ("good", "bad")
    assert difference["energy"]["shown"]
    gap = found["maps"][0]["macro"]["energy"] - found["maps"][1]["macro"]["energy"]
    assert difference["energy"]["difference"] == pytest.approx(gap)
    assert difference["by_finding"]["Mass"]["energy"]["p_holm"] < 0.05
    same = localise(predictions(), {"a": good, "b": good}, regions, bootstraps=50)["differences"][0]
    assert same["energy"]["difference"] == 0
    assert not same["energy"]["shown"]
    text = localisation_table(found)
    assert "good (attention)" in text
    assert "good - bad: energy +" in text
    page = localisation_section(found)
    assert "Compared" in page
    assert "not shown to be above chance" in page
    assert "1 without a map" in page


def test_regions_outside_the_square_that_was_seen_are_left_out_and_counted() -> None:
    regions = truth()
    left = maps_of(regions, even, boxes=(0.0, 0.0, 0.5, 1.0))
    found = localise(predictions(), {"one": left}, regions, bootstraps=0)
    assert found["left_out"]["outside the square that was seen"] > 12  # all bands, and some of the others
    band = [image for image, name in regions.keys if name == "Edema"]
    assert len(band) == 12
    assert "Edema" not in found["maps"][0]["findings"]


def test_what_cannot_be_judged_is_refused() -> None:
    regions = truth()
    with pytest.raises(PredictionError, match="one row per study"):
        pair_up(predictions(metadata={"unit": "study"}), [maps_of(regions, even)], regions, 0.1)
    with pytest.raises(PredictionError, match="No pair of image and finding"):
        localise(predictions(), {"one": maps_of(regions, even, uid="x")}, regions)
    twice = predictions(4)
    twice = dataclasses.replace(twice, image_id=np.array(["i0", "i0", "i2", "i3"]))
    with pytest.raises(PredictionError, match="several datasets"):
        localise(twice, {"one": maps_of(regions, even)}, regions)


def test_map_files_come_back_as_they_were(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    regions = truth()
    maps = maps_of(regions, lambda mask: rng.random(mask.shape) ** 8 * 10 ** rng.uniform(-9, 2))
    write_maps(maps, tmp_path / "maps.npz")
    found = read_maps(tmp_path / "maps.npz")
    peaks = maps.maps.max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(found.maps / peaks, maps.maps / peaks, rtol=6e-4, atol=1e-7)
    assert found.findings == FINDINGS
    assert found.image_uid.tolist() == maps.image_uid.tolist()
    np.testing.assert_array_equal(found.boxes, maps.boxes)
    np.testing.assert_array_equal(found.image, maps.image)
    assert found.metadata["kind"] == "attention"
    assert found.maps.argmax() == maps.maps.argmax()


def test_damaged_map_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "maps.npz"
    with pytest.raises(PredictionError, match="hilum explain"):
        read_maps(path)
    write_maps(maps_of(truth(), even), path)
    content = path.read_bytes()
    for end in (0, 10, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:end])
        with pytest.raises(PredictionError, match="cannot be read"):
            read_maps(path)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(PredictionError, match="cannot be read"):
        read_maps(tmp_path / "other.npz")


def test_map_files_of_another_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "maps.npz"
    with monkeypatch.context() as later:
        later.setattr("hilum.evaluation.map_files.FORMAT", "hilum-maps-2")
        write_maps(maps_of(truth(), even), path)
    with pytest.raises(PredictionError, match="of format 'hilum-maps-2'; this Hilum reads 'hilum-maps-1'"):
        read_maps(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": -np.ones((36, 8, 8))}, "0 or more"),
        ({"maps": np.zeros((36, 8, 8))}, "more than 0 somewhere"),
        ({"image": np.zeros(36, int)}, "occurs twice"),
        ({"finding": np.full(36, 7)}, "not there"),
        ({"boxes": np.zeros((24, 4))}, "height and a width"),
        ({"image_id": np.array(["a"])}, "as many ids"),
    ],
)
def test_maps_that_cannot_be_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(PredictionError, match=message):
        dataclasses.replace(maps_of(truth(), even), **change)
