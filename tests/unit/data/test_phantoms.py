"""Phantoms in memory: every sign is where its mask says, both views show one patient, the cohort keeps its rules."""

import numpy as np
import pytest

from hilum.core.errors import UnknownNameError
from hilum.data.labels import CXRLT_2024_TASK1, CXRLT_2024_TASK3
from hilum.data.phantoms import prevalence
from hilum.data.phantoms.canvas import Canvas, View
from hilum.data.phantoms.cohort import (
    FINDINGS,
    MORE,
    add_finding,
    assign_splits,
    plan_cohort,
    plan_patient,
)
from hilum.data.phantoms.render import patient_anatomy, render_study
from hilum.data.phantoms.signs import CHILDREN, SIGNS

SIZE = 160
# Findings whose sign is the shape of the whole chest: what lies outside the mask moves too.
WHOLE_CHEST = {"Emphysema", "Kyphosis", "Fibrosis"}
# Findings that a lateral view does not show, by their nature.
FRONTAL_ONLY = {"Azygos Lobe", "Clavicle Fracture", "Scoliosis"}


def pictures(finding, patient=4, positions=("PA", "LATERAL"), severity=0.85, size=SIZE, seed=11):
    return render_study(seed, patient, 0, positions, {finding: severity}, [(size, size)] * len(positions))


def test_every_finding_has_a_sign_a_prevalence_and_loadings():
    assert set(SIGNS) == {*CXRLT_2024_TASK1, *CXRLT_2024_TASK3} - {"Normal"}
    assert set(MORE) == set(CXRLT_2024_TASK3) <= set(prevalence.LASTING)
    assert set(prevalence.TRAIN_POSITIVES) == set(CXRLT_2024_TASK1)
    assert set(prevalence.LOADINGS) == set(FINDINGS)
    assert all(sum(value**2 for value in row.values()) < 1 for row in prevalence.LOADINGS.values())
    for shares in prevalence.VIEW_SETS.values():
        assert sum(share for share, _ in shares) == pytest.approx(1)


@pytest.mark.parametrize("finding", SIGNS)
def test_sign_changes_the_image_inside_its_mask(finding):
    shown = 0
    for with_sign, without in zip(pictures(finding), pictures("Normal"), strict=True):
        change = np.abs(with_sign.pixels.astype(float) - without.pixels)
        mask = with_sign.masks.get(finding)
        if mask is None:
            continue
        shown += 1
        assert mask.shape == with_sign.pixels.shape
        assert mask.dtype == bool
        outside = change[~mask].mean()
        if finding not in WHOLE_CHEST:
            assert change[mask].mean() > 3 * outside, (finding, with_sign.view.position)
        assert change[mask].max() > 5, (finding, with_sign.view.position)
    if finding == "Kyphosis":
        assert shown == 1
    elif finding == "Fracture":
        assert shown >= 1
    else:
        assert shown >= (1 if finding in FRONTAL_ONLY | {"Pleural Thickening"} else 2)


def test_frontal_only_findings_have_no_lateral_mask():
    for finding in FRONTAL_ONLY:
        frontal, lateral = pictures(finding)
        assert finding in frontal.masks
        assert finding not in lateral.masks
    frontal, lateral = pictures("Kyphosis")
    assert "Kyphosis" not in frontal.masks
    assert "Kyphosis" in lateral.masks


def test_normal_study_has_no_mask_and_a_chest_that_looks_like_one():
    frontal, lateral = pictures("Normal", size=256)
    assert frontal.masks == {} == lateral.masks
    anatomy = patient_anatomy(11, 4)
    view = frontal.view
    row = int(view.centre[1])
    lung = [int(view.project(np.array([[side * 8.0, 12.0, 0.0]]))[0, 0]) for side in (-1, 1)]
    middle = int(view.project(np.array([[0.0, 12.0, 0.0]]))[0, 0])
    below = int(view.project(np.array([[-6.0, anatomy.dome + 4, 0.0]]))[0, 1])
    blurred = frontal.pixels.astype(float)
    for column in lung:
        area = blurred[row - 4 : row + 4, column - 4 : column + 4].mean()
        assert area < blurred[row - 4 : row + 4, middle - 4 : middle + 4].mean() - 50
        assert area < blurred[below - 3 : below + 3, lung[0] - 4 : lung[0] + 4].mean() - 40


@pytest.mark.parametrize("finding", ["Mass", "Nodule", "Consolidation", "Round(ed) Atelectasis", "Granuloma"])
def test_frontal_and_lateral_show_the_lesion_at_one_height_and_of_one_size(finding):
    for patient in range(5):
        frontal, lateral = pictures(finding, patient, severity=0.9, size=256)
        heights = []
        for image in (frontal, lateral):
            mask = image.masks[finding]
            rows = np.flatnonzero(mask.any(1))
            heights.append((np.array([rows[0], rows[-1]]) - image.view.centre[1]) / image.view.scale)
        # breath and tilt differ between exposures
        assert np.abs(heights[0] - heights[1]).max() < 2.6


def test_heart_is_as_enlarged_in_both_views_and_larger_in_ap():
    def heart_width(position, severity):
        findings = {"Cardiomegaly": severity} if severity is not None else {}
        image = render_study(3, 0, 0, [position], {**findings, "Kyphosis": 0.0}, [(256, 256)])[0]
        columns = np.flatnonzero(image.masks["Cardiomegaly"].any(0))
        return (columns[-1] - columns[0]) / image.view.scale

    for position in ("PA", "LATERAL"):
        assert heart_width(position, 1.0) > 1.08 * heart_width(position, 0.1)
    assert heart_width("AP", 0.5) > heart_width("PA", 0.5)
    anatomy = patient_anatomy(3, 0)
    pa, ap = (
        Canvas(anatomy, View(position, 256, 256, 6.0, (128.0, 128.0))).heart_half > 0 for position in ("PA", "AP")
    )
    assert ap.any(0).sum() > 1.03 * pa.any(0).sum()


def test_side_of_a_lesion_is_the_patients():
    sides = set()
    for patient in range(12):
        image = pictures("Mass", patient, ("PA",))[0]
        again = render_study(11, patient, 1, ["AP"], {"Mass": 0.85}, [(SIZE, SIZE)])[0]
        columns = [np.nonzero(i.masks["Mass"])[1].mean() - i.view.centre[0] for i in (image, again)]
        assert np.sign(columns[0]) == np.sign(columns[1])
        sides.add(np.sign(columns[0]))
    assert sides == {-1, 1}


def test_severity_grows_the_sign():
    for finding in ("Pleural Effusion", "Pneumothorax", "Mass", "Pneumoperitoneum"):
        small, large = (
            render_study(2, 1, 0, ["PA"], {finding: severity}, [(SIZE, SIZE)])[0].masks[finding].sum()
            for severity in (0.1, 0.95)
        )
        assert large > 1.5 * small


def test_parents_share_the_childs_mask():
    images = render_study(
        5, 0, 0, ["PA"], {"Hydropneumothorax": 0.8, "Pneumothorax": 0.3, "Pleural Effusion": 0.9}, [(SIZE, SIZE)]
    )
    masks = images[0].masks
    assert (masks["Hydropneumothorax"] >= (masks["Pneumothorax"] | masks["Pleural Effusion"])).all()
    assert not np.array_equal(masks["Pneumothorax"], masks["Pleural Effusion"])
    masks = render_study(5, 0, 0, ["PA"], {"Rib Fracture": 0.8, "Fracture": 0.1}, [(SIZE, SIZE)])[0].masks
    assert np.array_equal(masks["Fracture"], masks["Rib Fracture"])


def test_unknown_finding_is_named():
    with pytest.raises(UnknownNameError, match="Cardiomegaly"):
        render_study(1, 0, 0, ["PA"], {"Cardiomegally": 0.5}, [(SIZE, SIZE)])


def test_rendering_is_determined_by_the_seed():
    first, again = (pictures("Pneumonia", seed=1)[0].pixels for _ in range(2))
    other = pictures("Pneumonia", seed=2)[0].pixels
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_cohort_rules():
    cohort = plan_cohort(300, 5, minimum_patients=8)
    studies = [study for patient in cohort for study in patient.studies]
    for study in studies:
        names = set(study.findings)
        assert names
        assert names == {"Normal"} or "Normal" not in names
        for parent, children in CHILDREN.items():
            assert parent in names or not names & set(children)
        assert 1 <= len(study.images) <= 4
        assert any(image.position in ("PA", "AP") for image in study.images)
        assert all(0 <= value <= 1 for value in study.findings.values())
        assert list(study.labels()) == list(CXRLT_2024_TASK1)
    for name in CXRLT_2024_TASK1:
        assert sum(name in patient.findings() for patient in cohort) >= 8


def test_published_prevalence_and_views():
    cohort = plan_cohort(2500, 6, minimum_patients=0)
    studies = [study for patient in cohort for study in patient.studies]
    for name in CXRLT_2024_TASK1:
        expected = prevalence.TRAIN_POSITIVES[name] / prevalence.TRAIN_IMAGES
        seen = np.mean([name in study.findings for study in studies])
        # studies of one patient are alike, so allow about twice the binomial deviation
        assert abs(seen - expected) < 0.006 + 0.08 * expected + 3.5 * np.sqrt(expected / len(studies)), name
    images = [image for study in studies for image in study.images]
    assert 1.55 < len(images) / len(studies) < 1.78
    assert 0.03 < np.mean([image.blank_view for image in images]) < 0.053
    assert abs(np.mean([image.position == "AP" for image in images]) - 100_024 / 248_120) < 0.04
    assert abs(np.mean([image.position in ("LATERAL", "LL") for image in images]) - 81_626 / 248_120) < 0.04


def test_findings_occur_together_as_in_disease():
    studies = [study for number in range(1500) for study in plan_patient(8, number).studies]

    def ratio(first, second):
        a, b = (np.array([name in study.findings for study in studies]) for name in (first, second))
        return (a & b).mean() / (a.mean() * b.mean())

    assert ratio("Edema", "Cardiomegaly") > 1.3
    assert ratio("Pneumonia", "Consolidation") > 1.3
    assert ratio("Pneumothorax", "Rib Fracture") > 1.3


def test_a_patient_does_not_depend_on_the_number_of_patients():
    few, many = plan_cohort(5, 9, 0), plan_cohort(40, 9, 0)
    for one, other in zip(few, many[: len(few)], strict=True):
        assert [s.findings for s in one.studies] == [s.findings for s in other.studies]
        assert [s.images for s in one.studies] == [s.images for s in other.studies]


def test_more_findings_leave_the_others_as_they_were():
    plain, more = (plan_cohort(400, 5, 8, more=more) for more in (False, True))
    studies = [
        (a, b) for one, two in zip(plain, more, strict=True) for a, b in zip(one.studies, two.studies, strict=True)
    ]
    for without, having in studies:
        added = having.findings.keys() - without.findings.keys()
        assert added <= set(MORE)
        assert {name: having.findings[name] for name in without.findings} == without.findings
        assert not (added and "Normal" in without.findings)
        assert [image.position for image in having.images] == [image.position for image in without.images]
    for name, share in prevalence.MORE_SHARES.items():
        found = np.mean([name in having.findings for _, having in studies])
        assert share / 3 < found < 3 * share
    assert all(
        {name in patient.findings() for patient in more if patient.split == "test"} == {False, True} for name in MORE
    )


def test_top_up_adds_the_parents_and_removes_normal():
    study = plan_patient(1, 0).studies[0]
    study.findings = {"Normal": 0.5}
    add_finding(1, 0, study, "Hydropneumothorax")
    assert set(study.findings) == {"Hydropneumothorax", "Pneumothorax", "Pleural Effusion"}


def test_splits_are_70_10_20_and_share_rare_findings():
    cohort = plan_cohort(400, 2, 8)
    shares = {split: sum(p.split == split for p in cohort) / 400 for split in ("train", "val", "test")}
    assert shares["train"] == pytest.approx(0.7, abs=0.03)
    assert shares["test"] == pytest.approx(0.2, abs=0.03)
    for name in FINDINGS:
        held = [p.split for p in cohort if name in p.findings()]
        assert held.count("train") >= 3, name
        assert held.count("test") >= 1, name
    before = [p.split for p in cohort]
    assign_splits(cohort, 2)
    assert before == [p.split for p in cohort]
