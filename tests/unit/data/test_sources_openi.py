"""Open-i: terms as exact tokens, images of reports, XML that means harm, DICOM headers, and phantoms read back."""

import json

import numpy as np
import pytest

from hilum.core.errors import EmptyStudyError, ManifestError, PathError, UnknownLabelError
from hilum.data.build import build_store
from hilum.data.label_maps import LabelPolicy, load_map
from hilum.data.manifest import ManifestOptions, SourceSpec, build_manifest
from hilum.data.phantoms.cohort import plan_cohort
from hilum.data.phantoms.encoding import dicom, encode
from hilum.data.phantoms.layouts.jobs import names_of
from hilum.data.phantoms.writing import write_phantoms
from hilum.data.rows import SourceOptions
from hilum.data.sources import openi

GREY = np.tile(np.array([0, 0, 60, 120, 180, 240, 255, 255], np.uint8), (8, 1))


def report(number, majors=("normal",), images=("1_IM-0001-3001",), automatic=("pneumonia",)):
    terms = "".join(f"<major>{term}</major>" for term in majors)
    terms += "".join(f"<automatic>{term}</automatic>" for term in automatic)
    parents = "".join(f'<parentImage id="CXR{number}_{name}"><caption>PA</caption></parentImage>' for name in images)
    return (
        f'<?xml version="1.0" encoding="utf-8"?>\n<eCitation><meta type="rr"/><uId id="CXR{number}"/>'
        "<MedlineCitation><Article><Abstract>"
        '<AbstractText Label="FINDINGS">Clear. No effusion &amp; no pneumothorax.</AbstractText>'
        f"</Abstract></Article></MedlineCitation><MeSH>{terms}</MeSH>{parents}</eCitation>"
    )


@pytest.fixture
def make(tmp_path):
    def write(reports, images=None, folder="NLMCXR_png"):
        (tmp_path / "ecgen-radiology").mkdir(exist_ok=True)
        (tmp_path / folder).mkdir(exist_ok=True)
        for name, text in reports.items():
            (tmp_path / "ecgen-radiology" / f"{name}.xml").write_text(text)
        for name in images or ():
            (tmp_path / folder / f"{name}.png").touch()
        return SourceOptions("openi", tmp_path)

    return write


def labels(make, terms, tier="strict") -> dict[str, int]:
    options = make({"1": report(1, terms)}, ["CXR1_1_IM-0001-3001"])
    frame = openi.read(SourceOptions("openi", options.root, policy=LabelPolicy(tier=tier))).frame
    return {name.removeprefix("label."): frame[name][0] for name in frame.columns if name.startswith("label.")}


def test_rows(make):
    rows = openi.read(
        make(
            {
                "1": report(1, images=("1_IM-0001-3001", "1_IM-0001-4001")),
                "2": report(2, ["Cardiomegaly/borderline", "Pulmonary Artery/enlarged"], ["2_IM-0652-1001"]),
                "10": report(10, ["normal"], []),
            },
            ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001", "CXR2_2_IM-0652-1001"],
        )
    )
    frame = rows.frame
    assert frame["patient_id"].to_list() == ["CXR1", "CXR1", "CXR2"]
    assert frame["source_relpath"][1] == "NLMCXR_png/CXR1_1_IM-0001-4001.png"
    assert json.loads(frame["raw_labels"][2]) == ["Cardiomegaly/borderline", "Pulmonary Artery/enlarged"]
    assert frame["view_raw"].to_list() == ["", "", ""]
    assert frame["view_source"].to_list() == ["unknown"] * 3
    assert frame["label.Normal"].to_list() == [1, 1, 0]
    assert frame["label.Cardiomegaly"].to_list() == [0, 0, -1]  # borderline is neither
    assert rows.notes == (
        "1 of 3 reports have no image: left out",
        "3 images without their DICOM file: projection, sex and age unknown",
    )
    assert (rows.origin, frame["licence_tag"][0]) == ("openi", "cc-by-nc-nd-4.0")


@pytest.mark.parametrize("policy", [LabelPolicy(blank="zero"), LabelPolicy(blank="zero", imply_negatives=True)])
def test_a_report_that_nobody_gave_a_term_stays_unknown(make, policy):
    options = make({"1": report(1, ()), "2": report(2, ["normal"], ["2_IM-0652-1001"])},
                   ["CXR1_1_IM-0001-3001", "CXR2_2_IM-0652-1001"])  # fmt: skip
    frame = openi.read(SourceOptions("openi", options.root, policy=policy)).frame
    values = frame.select([name for name in frame.columns if name.startswith("label.")]).rows()
    assert set(values[0]) == {-1}
    assert 0 in values[1]


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        (["Subcutaneous  Emphysema/neck/left"], {"Subcutaneous Emphysema": 1, "Emphysema": 0, "Normal": 0}),
        (["Pericardial Effusion"], {"Pleural Effusion": 0, "Normal": 0}),
        (["Fractures, Bone/ribs/right/healed"], {"Fracture": 1, "Rib Fracture": 1, "Clavicle Fracture": 0}),
        (["Fractures, Bone/clavicle"], {"Fracture": 1, "Rib Fracture": 0, "Clavicle Fracture": 1}),
        (["Aorta/tortuous/mild"], {"Tortuous Aorta": 1}),
        (["Aorta"], {"Tortuous Aorta": 0, "Normal": 0}),
        (["Calcinosis/aorta"], {"Calcification of the Aorta": 1, "Granuloma": 0}),
        (["Calcinosis/lung/hilum"], {"Calcification of the Aorta": 0, "Granuloma": -1}),
        (["Calcified Granuloma/lung/upper lobe   \t\n"], {"Granuloma": 1, "Nodule": 0}),
        (["Opacity/lung/base/left"], {"Lung Opacity": 1}),
        (["Opacity/ribs/right"], {"Lung Opacity": -1}),
        (["Hydropneumothorax/left"], {"Hydropneumothorax": 1, "Pneumothorax": 1, "Pleural Effusion": 1}),
        (["Lymph nodes/enlarged"], {"Adenopathy": 1}),
        (["Cardiomegaly/mild", "Cardiomegaly/borderline"], {"Cardiomegaly": -1}),
        (["Catheters, Indwelling/right"], {"Support Devices": 1, "Normal": -1}),
        (["Implanted Medical Device"], {"Support Devices": -1, "Normal": -1}),
        (["Hernia, Hiatal"], {"Hernia": 1}),
        (["Pulmonary Disease, Chronic Obstructive"], {"Emphysema": -1, "Normal": 0}),
        (["Thickening/pleura/apex"], {"Pleural Thickening": 1}),
    ],
)
def test_terms_are_whole_words_of_the_table(make, terms, expected):
    found = labels(make, terms)
    assert {name: found[name] for name in expected} == expected


def test_terms_that_make_a_report_useless_and_hints_that_are_believed_when_asked(make):
    assert set(labels(make, ["No Indexing"]).values()) == {-1}
    assert set(labels(make, ["Cardiomegaly", "Technical Quality of Image Unsatisfactory "]).values()) == {-1}
    assert set(labels(make, []).values()) == {-1}  # nobody gave it a term: unknown, not healthy
    hinted = ["Pulmonary Disease, Chronic Obstructive", "Nodule"]
    assert labels(make, hinted, "weak")["Emphysema"] == 1
    assert (labels(make, hinted)["Lung Lesion"], labels(make, hinted, "weak")["Lung Lesion"]) == (-1, 1)
    frame = openi.read(make({"1": report(1, ["Technical Quality of Image Unsatisfactory "])})).frame
    assert frame["quality"].to_list() == [["suboptimal"]]


def test_every_head_of_the_release_is_in_the_table():
    """121 terms with their cases and spaces: as many as the release's list of problems has."""
    heads = {label.split("/")[0].casefold() for label in load_map("openi").labels}
    assert len(heads) == 119  # 118 without the two spellings of three of them, and Azygos Lobe


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (report(1, ["Cardiomegally/mild"]), UnknownLabelError, "1.xml: unknown label 'Cardiomegally'.*'Cardiomegaly'"),
        (report(1).replace("</eCitation>", ""), ManifestError, "1.xml, line 2: not XML"),
        ("", ManifestError, "1.xml, line 1: not XML"),
        ("<html/>", ManifestError, "no element 'uId'"),
        (report(1, images=["../../x"]), PathError, "a 'parentImage' whose id is not an image's name"),
        (report(1, images=["a", "a"]), ManifestError, "an image is listed twice"),
        (report(1, images=[]), PathError, "none of 1 reports lists an image"),
        ("<a>" * 40 + "</a>" * 40, ManifestError, "more than 32 deep"),
        (
            '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;&b;&b;">]><a>&c;</a>',
            ManifestError,
            "a document type declaration",
        ),
        (
            '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]><a>&b;</a>',
            ManifestError,
            "a document type declaration",
        ),
        ("x" * (2**20 + 1), ManifestError, "1048577 bytes; a report has some thousands"),
    ],
)
def test_reports_that_are_none(make, text, error, message):
    with pytest.raises(error, match=message):
        openi.read(make({"1": text}, ["CXR1_1_IM-0001-3001"]))


def test_two_reports_of_one_number(make):
    with pytest.raises(ManifestError, match="an image is listed twice"):
        openi.read(make({"1": report(1), "2": report(1)}))
    with pytest.raises(ManifestError, match="1 reports repeat the 'uId' of another"):
        openi.read(make({"1": report(1), "2": report(1, images=["9"])}))


def test_missing_images(make, tmp_path):
    options = make({"1": report(1), "2": report(2, images=["2_IM-1"])}, ["CXR2_2_IM-1"])
    with pytest.raises(EmptyStudyError, match="1 of 2 listed images"):
        openi.read(options)
    assert openi.read(SourceOptions("openi", tmp_path, allow_missing=True)).frame["image_id"].to_list() == [
        "CXR2_2_IM-1"
    ]
    with pytest.raises(PathError, match=r"holds no ecgen-radiology/\*.xml"):
        openi.read(SourceOptions("openi", tmp_path / "NLMCXR_png"))


def test_headers_of_the_dicom_files(make, tmp_path):
    options = make({"1": report(1, images=["1_IM-0001-3001", "1_IM-0001-4001"]), "2": report(2, images=["2_IM-7"])})
    (tmp_path / "NLMCXR_png" / "CXR1_1_IM-0001-3001.png").write_bytes(encode("png", GREY, ""))
    (tmp_path / "NLMCXR_png" / "CXR2_2_IM-7.png").write_bytes(encode("png_rgb", GREY, ""))
    (tmp_path / "1").mkdir()
    for name, view in (("1_IM-0001-3001", "PA"), ("1_IM-0001-4001", "LATERAL")):
        content = dicom(GREY, name, ViewPosition=view, PatientSex="F", PatientAge="061Y", photometric="MONOCHROME1")
        (tmp_path / "1" / f"{name}.dcm").write_bytes(content)
    frame = openi.read(options).frame
    assert frame["source_relpath"].to_list() == [
        "NLMCXR_png/CXR1_1_IM-0001-3001.png", "1/1_IM-0001-4001.dcm", "NLMCXR_png/CXR2_2_IM-7.png",
    ]  # fmt: skip
    assert frame["view_raw"].to_list() == ["PA", "LATERAL", ""]
    assert frame["view_source"].to_list() == ["stated", "stated", "unknown"]
    assert frame["sex"].to_list() == ["F", "F", None]
    assert frame["age_years"].to_list() == [61, 61, None]
    manifest, _ = build_manifest([SourceSpec("openi", "openi", tmp_path)], ManifestOptions())
    assert manifest.frame["view"].to_list() == ["PA", "LATERAL", "UNKNOWN"]
    summary = build_store(manifest, tmp_path / "store", size=8, encoding="raw", workers=1)
    assert (summary.stored, summary.quarantined) == (3, {})


def test_phantoms_come_back_as_the_cohort_that_they_were_made_from(tmp_path):
    write_phantoms(tmp_path / "out", "openi", 24, 4, 64, 1, workers=1)
    rows = openi.read(SourceOptions("openi", tmp_path / "out"))
    assert "2 of 26 reports have no image: left out" in rows.notes
    table = load_map("openi")
    closed = {row.finding for row in table.rows if row.present == "1" and row.tier == "strict"} - {"Normal"}
    made = {f"CXR{patient.number + 1}": patient.studies[0].findings for patient in plan_cohort(24, 4, 1)}
    seen = dict.fromkeys((1, 0, -1), 0)
    for row in rows.frame.iter_rows(named=True):
        turn, findings = int(row["patient_id"][3:]) - 1, made[row["patient_id"]]
        useless = turn % 20 in (11, 13)
        for finding in closed:
            code = row[f"label.{finding}"]
            seen[code] += 1
            allowed = {-1} if useless else {1} if finding in findings else {0, -1}  # -1: a hint that is not believed
            assert code in allowed, finding
        if not useless:
            assert row["label.Normal"] in ({1} if "Normal" in findings else {0, -1})
    assert min(seen.values()) > 10
    assert names_of({"Fracture": 1.0}, table, 0) == ["Fractures, Bone"]
