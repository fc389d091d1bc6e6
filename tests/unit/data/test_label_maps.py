"""The label tables and the logic over them, against a decision table written out by hand."""

import itertools
from importlib.resources import files

import numpy as np
import pytest

from hilum.core.errors import ConfigError, UnknownNameError
from hilum.data.label_maps import LabelMap, LabelPolicy, MapRow, apply_hierarchy, apply_map, load_map
from hilum.data.labels import CXRLT_2024_TASK1, CXRLT_2024_TASK3, IMPLIES, ordered

TABLES = sorted(
    file.name.removesuffix(".csv")
    for file in (files("hilum.data") / "facts" / "labels").iterdir()
    if file.name != "hierarchy.csv"
)


def table(*rows: tuple[str, ...]) -> LabelMap:
    made = tuple(MapRow(*row, note="") for row in rows)
    labels = tuple(dict.fromkeys(row.label for row in made if row.label != "*"))
    return LabelMap("test", made, labels, ordered(row.finding for row in made if row.finding not in ("", "*")))


@pytest.mark.parametrize("name", TABLES)
def test_every_table_of_the_package_is_sound(name):
    loaded = load_map(name)
    known = {*CXRLT_2024_TASK1, *CXRLT_2024_TASK3, "No Finding"}
    assert loaded.labels
    assert set(loaded.findings) <= known
    for finding in loaded.findings:
        rows = loaded.about(finding)
        assert len({row.label for row in rows}) == len(rows)  # one verdict of each label


def test_hierarchy_is_a_table_too():
    assert IMPLIES["Hydropneumothorax"] == ("Pneumothorax", "Pleural Effusion")
    assert set(IMPLIES) == {
        "Clavicle Fracture", "Rib Fracture", "Lobar Atelectasis", "Round(ed) Atelectasis", "Hydropneumothorax",
    }  # fmt: skip


SMALL = table(
    ("nodule", "Nodule", "1", "0", "strict"),
    ("many nodules", "Nodule", "1", "0", "strict"),
    ("metastasis", "Nodule", "1", "", "weak"),
    ("nodule or mass", "Nodule", "unknown", "0", "strict"),
    ("healthy", "Normal", "1", "", "strict"),
    ("tube", "Normal", "unknown", "", "strict"),
    ("*", "Normal", "0", "", "strict"),
    ("spoiled", "*", "unknown", "", "strict"),
)


def by_hand(values: dict[str, int], weak: bool) -> tuple[int, int]:
    """Nodule and Normal of one image, in words of a program that knows one image only."""
    if values["spoiled"] == 1:
        return -1, -1
    one = values["nodule"] == 1 or values["many nodules"] == 1 or (weak and values["metastasis"] == 1)
    if values["nodule or mass"] == 1:
        nodule = -1
    elif one:
        nodule = 1
    elif values["nodule"] == -2 or values["many nodules"] == -2 or (weak and values["metastasis"] == -2):
        nodule = -2
    elif values["metastasis"] == 1:
        nodule = -1
    else:
        closed = all(values[name] == 0 for name in ("nodule", "many nodules", "nodule or mass"))
        nodule = 0 if closed else -1
    diseased = any(values[name] == 1 for name in ("nodule", "many nodules", "metastasis", "nodule or mass"))
    if diseased:
        normal = -1 if values["healthy"] == 1 else 0
    elif values["tube"] == 1:
        normal = -1
    elif values["healthy"] in (1, -2):
        normal = values["healthy"]
    else:
        normal = -1
    return nodule, normal


@pytest.mark.parametrize("tier", ["strict", "weak"])
def test_all_combinations_of_seven_labels(tier):
    combinations = np.array(list(itertools.product((1, 0, -1, -2), repeat=len(SMALL.labels))), np.int8)
    mapped = apply_map(combinations, SMALL, LabelPolicy(tier=tier))
    rows = [dict(zip(SMALL.labels, row, strict=True)) for row in combinations.tolist()]
    expected = np.array([by_hand(row, tier == "weak") for row in rows])
    assert SMALL.findings == ("Nodule", "Normal")
    np.testing.assert_array_equal(mapped.codes, expected)
    contradicted = sum(row["healthy"] == 1 and any(row[name] == 1 for name in SMALL.labels[:4]) for row in rows)
    assert mapped.conflicts == {"Normal": contradicted}


@pytest.mark.parametrize(
    ("policy", "value", "code"),
    [
        (LabelPolicy(), -2, -2),
        (LabelPolicy(uncertain="zero"), -2, 0),
        (LabelPolicy(uncertain="one"), -2, 1),
        (LabelPolicy(), -1, -1),
        (LabelPolicy(blank="zero"), -1, 0),
        (LabelPolicy(blank="zero"), -2, -2),
    ],
)
def test_policies_change_only_the_cells_they_are_about(policy, value, code):
    plain = table(("edema", "Edema", "1", "0", "strict"))
    values = np.array([[1], [0], [value]], np.int8)
    assert apply_map(values, plain, policy).codes[:, 0].tolist() == [1, 0, code]


def test_implied_negatives():
    labels = table(
        ("healthy", "Normal", "1", "", "strict"),
        ("edema", "Edema", "1", "", "strict"),
        ("tube", "Support Devices", "1", "", "strict"),
    )
    values = np.array([[1, -1, -1], [0, -1, -1]], np.int8)
    off, on = (apply_map(values, labels, LabelPolicy(imply_negatives=flag)).codes for flag in (False, True))
    assert labels.findings == ("Edema", "Normal", "Support Devices")
    assert off.tolist() == [[-1, 1, -1], [-1, -1, -1]]
    assert on.tolist() == [[0, 1, -1], [-1, -1, -1]]  # a pacemaker may sit in a healthy chest


def test_hierarchy_fills_the_unknown_and_counts_what_it_may_not_touch():
    findings = ("Fracture", "Normal", "Rib Fracture", "Support Devices")
    given = np.array(
        [
            [-1, -1, 1, -1],  # a rib fracture is a fracture, and no normal chest
            [0, -1, -1, -1],  # no fracture: no rib fracture
            [0, -1, 1, -1],  # contradiction: kept, counted
            [-1, 1, -1, -1],  # normal: no fracture; devices stay unknown
            [-1, -1, -1, 1],  # a device says nothing of Normal
            [1, 1, -1, -1],  # contradiction
        ],
        np.int8,
    )
    mapped = apply_hierarchy(given, findings)
    assert mapped.codes.tolist() == [
        [1, 0, 1, -1], [0, -1, 0, -1], [0, 0, 1, -1], [0, 1, 0, -1], [-1, -1, -1, 1], [1, 1, -1, -1],
    ]  # fmt: skip
    assert mapped.conflicts == {"Fracture": 1, "Normal": 1}
    assert given[0, 0] == -1  # the input is not written to


def test_policy_is_recorded_and_checked(unchecked):
    text = "uncertain=mask,blank=mask,tier=strict,imply_negatives=off,hierarchy=off"
    assert str(LabelPolicy()) == text
    with pytest.raises(UnknownNameError, match="zero"):
        LabelPolicy(uncertain="zeros")


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("a,Edema,2,0,strict,", "present is '2'"),
        ("a,Edema,1,0,firm,", "tier is 'firm'"),
        ("a,Edema,1,0,strict", "5 cells"),
        (",Edema,1,0,strict,", "label is empty"),
        ("a,*,1,,strict,", "can only say `unknown`"),
        ("a,Edema,1,0,strict,\na,Edema,0,,strict,", "row 3"),
    ],
)
def test_a_wrong_edit_is_named(monkeypatch, tmp_path, row, found):
    folder = tmp_path / "facts" / "labels"
    folder.mkdir(parents=True)
    (folder / "mine.csv").write_text("label,finding,present,absent,tier,note\n" + row + "\n")
    monkeypatch.setattr("hilum.data.label_maps.files", lambda package: tmp_path)
    with pytest.raises(ConfigError, match=found):
        load_map.__wrapped__("mine")
