import dataclasses
import json
import sys

import numpy as np
import polars as pl
import pytest

from hilum.core.errors import PredictionError
from hilum.evaluation.metrics import evaluate
from hilum.evaluation.predictions import IDENTITY, bare_ids, read_predictions, write_predictions
from hilum.evaluation.table_files import sidecar


def same(a, b):
    assert a.findings == b.findings
    assert a.metadata == b.metadata
    for name in IDENTITY:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_array_equal(a.probabilities, b.probabilities)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_round_trip_keeps_every_bit_and_the_metadata(tmp_path, made_up, suffix):
    table, _ = made_up(stage="study", model="m", head_splits=["train"])
    values = np.random.default_rng(0).random(table.probabilities.shape)
    values[0, 0], values[1, 0], values[:, 2] = 5e-324, 1 - 2**-53, np.nan
    table = table.replace(values)
    write_predictions(table, tmp_path / f"p{suffix}")
    same(read_predictions(tmp_path / f"p{suffix}"), table)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_finding_never_trained_is_empty_in_csv_and_null_in_parquet(tmp_path, made_up):
    table, _ = made_up(count=3)
    values = table.probabilities.copy()
    values[:, 1] = np.nan
    write_predictions(table.replace(values), tmp_path / "p.csv")
    write_predictions(table.replace(values), tmp_path / "p.parquet")
    assert (tmp_path / "p.csv").read_text().splitlines()[1].split(",")[7] == ""
    assert pl.read_parquet(tmp_path / "p.parquet")["B"].null_count() == 3


@pytest.mark.parametrize("with_metadata", [True, False])
def test_columns_are_found_by_name_in_any_order(tmp_path, made_up, with_metadata):
    table, labels = made_up()
    write_predictions(table, tmp_path / "p.csv")
    frame = pl.read_csv(tmp_path / "p.csv", infer_schema=False)
    frame.select(reversed(frame.columns)).write_csv(tmp_path / "q.csv")
    if with_metadata:
        sidecar(tmp_path / "q.csv").write_text(sidecar(tmp_path / "p.csv").read_text())
    back = read_predictions(tmp_path / "q.csv")
    columns = [table.findings.index(name) for name in back.findings]
    assert (columns == [0, 1, 2, 3]) is with_metadata
    assert evaluate(back, labels[:, columns])["findings"] == {
        name: evaluate(table, labels)["findings"][name] for name in back.findings
    }


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
@pytest.mark.parametrize(("old", "new"), [("B", "Bee"), ("patient_id", "patient")])
def test_a_renamed_column_is_named(tmp_path, made_up, suffix, old, new):
    table, _ = made_up(count=4)
    path = tmp_path / f"p{suffix}"
    write_predictions(table, path)
    if suffix == ".parquet":
        meta = pl.read_parquet_metadata(path)
        meta.pop("ARROW:schema")
        pl.read_parquet(path).rename({old: new}).write_parquet(path, metadata=meta)
    elif suffix == ".csv":
        path.write_text(path.read_text().replace(f"{old},", f"{new},", 1))
    else:
        content = json.loads(path.read_text())
        for row in content["predictions"]:
            row[new] = row.pop(old)
        path.write_text(json.dumps(content))
    with pytest.raises(PredictionError, match=f"'{old}'"):
        read_predictions(path)


def test_a_removed_finding_is_named(tmp_path, made_up):
    table, _ = made_up(count=4)
    write_predictions(table, tmp_path / "p.parquet")
    meta = pl.read_parquet_metadata(tmp_path / "p.parquet")
    meta.pop("ARROW:schema")
    pl.read_parquet(tmp_path / "p.parquet").drop("C").write_parquet(tmp_path / "p.parquet", metadata=meta)
    with pytest.raises(PredictionError, match="'C'"):
        read_predictions(tmp_path / "p.parquet")


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.1, np.float16("inf")])
def test_a_value_that_is_no_probability_is_refused_with_item_and_finding(made_up, value):
    table, _ = made_up()
    values = table.probabilities.copy()
    values[7, 2] = value
    with pytest.raises(PredictionError, match=rf"{table.image_uid[7]}.*'C'"):
        table.replace(values)


def test_items_are_found_by_id(made_up):
    table, _ = made_up(count=5)
    wanted = table.image_uid[[3, 0, 4]]
    assert table.places(wanted).tolist() == [3, 0, 4]
    assert table.rows(np.array([4, 3, 0])).places(wanted).tolist() == [1, 2, 0]
    with pytest.raises(PredictionError, match="1 of 2 items are not predicted, for example 'nobody'"):
        table.places(np.array([wanted[0], "nobody"]))


def test_duplicate_ids_are_refused(made_up):
    table, _ = made_up()
    uids = table.image_uid.copy()
    uids[3] = uids[4]
    with pytest.raises(PredictionError, match=uids[4]):
        dataclasses.replace(table, image_uid=uids)


@pytest.mark.parametrize("change", [{"stage": "done"}, {"unit": "patient"}, {"note": float("nan")}])
def test_metadata_is_checked(made_up, change):
    table, _ = made_up()
    with pytest.raises(PredictionError):
        table.replace(table.probabilities, **change)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("thresholds", [1]), ("thresholds", {"A": 0.4}), ("thresholds", {"A": {"f1": "0.4"}}),
        ("thresholds", {"A": {"f1": 1.5}}), ("groups", ["head"]), ("groups", {"A": 1}), ("prevalence", {"A": None}),
        ("calibration", "x"), ("calibration", {"fitted_on": {"items": 3}}), ("calibration", {"fitted_on": "val"}),
        ("chosen_on", {"items": 3}), ("chosen_on", {"digests": "?"}), ("head_splits", None), ("head_splits", "train"),
        ("members", ["a", "b"]), ("members", [{"weight": "1"}]), ("exposed_images", "some"), ("accepted_leak", 3),
        ("study_aggregation", ["mean"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_metadata_of_another_shape_is_named_with_its_file(tmp_path, made_up, key, value, suffix):
    path = tmp_path / f"p{suffix}"
    write_predictions(made_up(count=3)[0], path)
    place = sidecar(path) if suffix == ".csv" else path
    content = json.loads(place.read_text())
    (content if suffix == ".csv" else content["metadata"])[key] = value
    place.write_text(json.dumps(content))
    with pytest.raises(PredictionError, match=rf"p\{suffix}: .*{key}.*expected"):
        read_predictions(path)


@pytest.mark.parametrize(
    "content",
    ["", "image_uid,image_id\n1,2\n", "image_uid,image_id,study_id,patient_id,dataset,view,A\na,b,c,d,e,PA,high\n",
     "image_uid,image_id,study_id,patient_id,dataset,view,A\na,b,c,d,e,PA\n",
     "image_uid,image_id,study_id,patient_id,dataset,view,A,A\na,b,c,d,e,PA,1,0\n",
     "image_uid,image_id,study_id,patient_id,dataset,view\na,b,c,d,e,PA\n"],
)  # fmt: skip
def test_a_malformed_csv_is_refused(tmp_path, content):
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(PredictionError, match=r"p\.csv"):
        read_predictions(tmp_path / "p.csv")


ROW = '"image_uid": "a", "image_id": "", "study_id": "", "patient_id": "", "dataset": "", "view": ""'


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"predictions": 3}', '{"metadata": [1], "predictions": []}', '{"predictions": [3]}',
     '{"metadata": {"findings": 5}, "predictions": [{ROW, "A": 0.5}]}',
     '{"metadata": {"findings": "A"}, "predictions": []}', '{"predictions": [{ROW, "A": [1]}]}',
     '{"predictions": [{ROW, "A": "high"}]}'],
)  # fmt: skip
def test_a_malformed_json_is_refused(tmp_path, content):
    (tmp_path / "p.json").write_text(content.replace("ROW", ROW))
    with pytest.raises(PredictionError, match=r"p\.json"):
        read_predictions(tmp_path / "p.json")


@pytest.mark.parametrize("header", ["[1]", "3", "{"])
def test_a_malformed_header_of_parquet_is_refused(tmp_path, header):
    frame = pl.DataFrame({name: ["a"] for name in IDENTITY} | {"A": [0.5]})
    frame.write_parquet(tmp_path / "p.parquet", metadata={"hilum": header})
    with pytest.raises(PredictionError, match="no JSON object"):
        read_predictions(tmp_path / "p.parquet")


def test_files_of_another_kind_are_refused(tmp_path, made_up):
    table, _ = made_up()
    with pytest.raises(PredictionError, match="does not exist"):
        read_predictions(tmp_path / "absent.csv")
    with pytest.raises(PredictionError, match=r"\.xlsx"):
        write_predictions(table, tmp_path / "p.xlsx")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(PredictionError, match="Parquet"):
        read_predictions(tmp_path / "p.parquet")


def test_select_is_by_name_and_names_what_is_missing(made_up):
    table, _ = made_up()
    np.testing.assert_array_equal(table.select(["C", "A"]).probabilities, table.probabilities[:, [2, 0]])
    with pytest.raises(PredictionError, match="'Z'"):
        table.select(["A", "Z"])


def test_bare_ids_drop_only_their_own_dataset():
    ids, datasets = np.array(["nih/1.png", "2.png", "mimic/3"]), np.array(["nih", "nih", "nih"])
    assert bare_ids(ids, datasets).tolist() == ["1.png", "2.png", "mimic/3"]


def test_parquet_without_polars(tmp_path, made_up, monkeypatch):
    """Files go between pyarrow (a bare GPU image) and polars, both ways, with their metadata."""
    pytest.importorskip("pyarrow", reason="pyarrow stands in for polars where that is absent")
    table, _ = made_up(stage="study", model="m")
    write_predictions(table, tmp_path / "polars.parquet")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "polars", None)
        same(read_predictions(tmp_path / "polars.parquet"), table)
        write_predictions(table, tmp_path / "arrow.parquet")
        same(read_predictions(tmp_path / "arrow.parquet"), table)
        (tmp_path / "damaged.parquet").write_bytes(b"PAR1 not really")
        with pytest.raises(PredictionError, match="Parquet"):
            read_predictions(tmp_path / "damaged.parquet")
    same(read_predictions(tmp_path / "arrow.parquet"), table)
