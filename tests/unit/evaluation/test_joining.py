import csv
import dataclasses

import numpy as np
import pytest

from hilum.core.errors import ConfigError, PredictionError, UnknownLabelError, UnknownNameError
from hilum.evaluation.bootstrap import clusters_of
from hilum.evaluation.joining import join, labelled, match_findings
from hilum.evaluation.metrics import evaluate
from hilum.evaluation.studies import mean_over_studies
from hilum.evaluation.truth import read_truth


def write_csv(path, table, labels, order=None, id_column="image_id", extra=None, **columns):
    """A plain CSV of labels, rows in `order`; -1 becomes a blank."""
    order = np.arange(len(table)) if order is None else order
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([id_column, *columns, *table.findings])
        for row in order:
            cells = ["" if code == -1 else int(code) for code in labels[row]]
            writer.writerow([table.image_id[row], *(values[row] for values in columns.values()), *cells])
    return path


def test_rows_are_joined_by_id_not_by_position(tmp_path, made_up):
    table, labels = made_up()
    expected = evaluate(table, labels)
    for order in (np.roll(np.arange(60), 1), np.random.default_rng(0).permutation(60)):
        joined = join(read_truth(write_csv(tmp_path / "l.csv", table, labels, order)), table)
        np.testing.assert_array_equal(joined.labels, labels)
        assert evaluate(joined.predictions, joined.labels) == expected
    assert evaluate(table, np.roll(labels, 1, axis=0))["macro"]["mAUC"] < expected["macro"]["mAUC"] - 0.1


@pytest.mark.parametrize("id_column", ["image_id", "dicom_id", "ImageID", "Image Index", "id"])
def test_known_id_columns(tmp_path, made_up, id_column):
    table, labels = made_up()
    labels[5, 1] = -1
    joined = join(read_truth(write_csv(tmp_path / "l.csv", table, labels, id_column=id_column)), table)
    np.testing.assert_array_equal(joined.labels, labels)
    assert joined.findings == table.findings


def test_namespaced_and_bare_ids_meet(tmp_path, made_up):
    table, labels = made_up()
    path = write_csv(tmp_path / "l.csv", table, labels)
    spaced = dataclasses.replace(table, image_id=np.array([f"d/{name}" for name in table.image_id.tolist()]))
    np.testing.assert_array_equal(join(read_truth(path), spaced).labels, labels)


def test_an_unlabelled_prediction_is_refused(tmp_path, made_up):
    table, labels = made_up()
    truth = read_truth(write_csv(tmp_path / "l.csv", table, labels, np.arange(59)))
    with pytest.raises(PredictionError, match=rf"1 of 60 predicted items.*{table.image_uid[59]}"):
        join(truth, table)


def test_duplicate_label_rows_are_refused(tmp_path, made_up):
    table, labels = made_up()
    truth = read_truth(write_csv(tmp_path / "l.csv", table, labels, np.append(np.arange(60), 7)))
    with pytest.raises(PredictionError, match="more than one row"):
        join(truth, table)


def test_names_of_splits(tmp_path, made_up):
    table, labels = made_up()
    names = ["Dev", "development", "VALID", "val", "Training", "train", "Test", "Fold 3", "", "test "]
    truth = read_truth(write_csv(tmp_path / "l.csv", table, labels, split=np.array(names * 6)))
    assert truth.split[:10].tolist() == ["val"] * 4 + ["train"] * 2 + ["test", "Fold 3", "", "test"]


def test_splits_select_and_must_be_predicted_whole(tmp_path, made_up):
    table, labels = made_up()
    split = np.where(np.arange(60) < 20, "development", "test")
    truth = read_truth(write_csv(tmp_path / "l.csv", table, labels, split=split))
    joined = join(truth, table, "val")
    np.testing.assert_array_equal(joined.labels, labels[:20])
    assert joined.left_out == {"other_split": 40, "unpredicted": 0}
    part = table.rows(np.arange(1, 60))
    with pytest.raises(PredictionError, match=r"1 of 20 labelled items of split 'val'.*image-0"):
        join(truth, part, "val")
    assert join(truth, part, "val", allow_missing=True).left_out["unpredicted"] == 1
    assert join(truth, part).left_out["unpredicted"] == 1
    with pytest.raises(PredictionError, match="No predicted item"):
        join(truth, table, "train")


def test_study_predictions_take_the_labels_of_their_images(tmp_path, made_up):
    table, labels = made_up()
    keys = [*zip(table.patient_id.tolist(), table.study_id.tolist(), strict=True)]
    labels = labels[[keys.index(key) for key in keys]]  # one label a study
    labels[0, 0] = -1 if keys.count(keys[0]) > 1 else labels[0, 0]
    columns = {"study_id": table.study_id, "patient_id": table.patient_id}
    truth = read_truth(write_csv(tmp_path / "l.csv", table, labels, **columns))
    studies = mean_over_studies(table, unit="study")
    joined = join(truth, studies)
    for row in range(len(studies)):
        key = (studies.patient_id[row], studies.study_id[row])
        images = [index for index, other in enumerate(keys) if other == key]
        np.testing.assert_array_equal(joined.labels[row], labels[images].max(axis=0))
    images = [index for index, key in enumerate(keys) if keys.count(key) > 1]
    labels[images[0], 1] = 1 - labels[images[0], 1]
    truth = read_truth(write_csv(tmp_path / "l.csv", table, labels, **columns))
    with pytest.raises(PredictionError, match=r"1 studies disagree.*'B'"):
        join(truth, studies)


def test_labels_per_study_are_spread_over_the_images(tmp_path, made_up):
    table, _ = made_up(count=4, findings=1)
    table = dataclasses.replace(
        table, study_id=np.array(["s", "s", "s", "t"]), patient_id=np.array(["d/1", "d/1", "d/2", "d/2"])
    )
    path = tmp_path / "l.csv"
    path.write_text("patient_id,study_id,A\n1,s,1\n2,s,0\n2,t,\n")
    assert join(read_truth(path), table).labels[:, 0].tolist() == [1, 1, 0, -1]
    path.write_text("study_id,A\ns,1\nt,0\n")
    with pytest.raises(PredictionError, match="several predicted items"):
        join(read_truth(path), table)


def test_missing_patients_are_taken_from_the_labels(tmp_path, made_up):
    table, labels = made_up()
    path = write_csv(tmp_path / "l.csv", table, labels, patient_id=table.patient_id)
    without = dataclasses.replace(table, patient_id=np.full(60, ""))
    assert join(read_truth(path), without).predictions.patient_id.tolist() == table.patient_id.tolist()


def loose_files(table):
    """The same pictures as `hilum predict` knows them from files: whose they are, the name says, or a header."""
    studies = np.array([f"study-{index // 2}" for index in range(len(table))])
    whose = np.array([f"MRN{index // 2}" for index in range(len(table))])
    return dataclasses.replace(table, dataset=np.full(len(table), "files"), study_id=studies, patient_id=whose)


@pytest.mark.parametrize("by", ["image_id", "study_id"])
@pytest.mark.parametrize("spelled", ["person {}", "d/person {}"])
def test_whose_loose_files_are_the_labels_say(tmp_path, made_up, by, spelled):
    table, labels = made_up()
    table = loose_files(table)
    labels[1::2] = labels[::2]  # one label a study
    people = np.array([spelled.format(index // 6) for index in range(60)])
    columns = {"patient_id": people, "dataset": np.full(60, "d")}
    columns |= {"study_id": table.study_id} if by == "image_id" else {}
    ids = dataclasses.replace(table, image_id=getattr(table, by))
    truth = read_truth(write_csv(tmp_path / "l.csv", ids, labels, id_column=by, **columns))
    for predicted in (table, mean_over_studies(table, unit="study")):
        joined = join(truth, predicted)
        assert labelled(truth, predicted).all()
        assert len(np.unique(clusters_of(joined.predictions))) == 10
    np.testing.assert_array_equal(join(truth, table).labels, labels)
    assert join(truth, table).predictions.patient_id.tolist() == people.tolist()


def test_studies_of_loose_files_meet_labels_that_name_images_by_uid(tmp_path, made_up):
    table, labels = made_up()
    table = loose_files(table)
    labels[1::2] = labels[::2]
    people = np.array([f"person {index // 6}" for index in range(60)])
    columns = {"study_id": table.study_id, "patient_id": people}
    ids = dataclasses.replace(table, image_id=table.image_uid)
    truth = read_truth(write_csv(tmp_path / "l.csv", ids, labels, id_column="image_uid", **columns))
    studies = mean_over_studies(table, unit="study")
    joined = join(truth, studies)
    assert len(joined.predictions) == 30
    assert len(np.unique(clusters_of(joined.predictions))) == 10
    place = table.study_id.tolist().index
    np.testing.assert_array_equal(joined.labels, labels[[place(name) for name in studies.study_id.tolist()]])


def test_what_the_labels_leave_open_of_loose_files_stays(tmp_path, made_up):
    table, labels = made_up()
    table = loose_files(table)
    nobody = np.where(np.arange(60) < 30, "", np.array([f"person {index}" for index in range(60)]))
    truth = read_truth(write_csv(tmp_path / "l.csv", table, labels, study_id=table.study_id, patient_id=nobody))
    found = join(truth, table).predictions.patient_id
    assert found[:30].tolist() == table.patient_id[:30].tolist()
    assert found[30:].tolist() == nobody[30:].tolist()  # two people in a study: the image says whose it is
    known = dataclasses.replace(table, dataset=np.full(60, "d"))
    assert join(truth, known).predictions.patient_id.tolist() == table.patient_id.tolist()


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [("image_id,A\na,2\n", UnknownLabelError, "'A', row 2 holds '2'"),
     ("image_id,A\na,yes\n", UnknownLabelError, "'yes'"),
        ("image_id,A,age in years\na,1,44\n", UnknownLabelError, "'age in years'"),
     ("image_id,path\na,b\n", PredictionError, "per finding"),
     ("name,A\na,1\n", PredictionError, "found name, A"),
     ("A\n1\n", PredictionError, "id column")],
)  # fmt: skip
def test_a_malformed_csv_is_refused(tmp_path, content, error, message):
    (tmp_path / "l.csv").write_text(content)
    with pytest.raises(error, match=message):
        read_truth(tmp_path / "l.csv")


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(PredictionError, match="store"):
        read_truth(tmp_path / "labels.txt")


def test_labels_from_a_store(tmp_path, made_up):
    from hilum.data.store import write_arrays

    table, labels = made_up(count=6)
    labels[0, 0], labels[1, 1] = -1, -2
    splits = ["train", "train", "val", "val", "test", "test"]
    store = write_arrays(
        tmp_path / "store", [np.zeros((4, 4), np.uint8)] * 6, labels, table.findings,
        patients=table.patient_id.tolist(), studies=table.study_id.tolist(), splits=splits,
        image_ids=table.image_id.tolist(), datasets=["d"] * 6,
    )  # fmt: skip
    table = dataclasses.replace(table, image_uid=store.uids)
    truth = read_truth(tmp_path / "store")
    order = np.array([5, 0, 3, 1, 2, 4])
    np.testing.assert_array_equal(join(truth, table.rows(order)).labels, labels[order])
    assert join(truth, table, "test").predictions.image_uid.tolist() == store.uids[4:].tolist()
    assert set(truth.groups()) == set("ABCD")
    table = dataclasses.replace(
        table, study_id=np.array([f"d/s{i // 2}" for i in range(6)]), patient_id=np.full(6, "d/p")
    )
    with pytest.raises(PredictionError, match="no row"):
        join(truth, mean_over_studies(table, unit="study"))


def test_findings_are_matched_by_name():
    assert match_findings("BAC", "ABC", None, "l")[0] == ("B", "A", "C")
    names, only = match_findings(["A", "B", "C"], ["C", "A"], None, "l")
    assert names == ("A", "C")
    assert only == {"unlabelled": ["B"], "unpredicted": []}
    assert match_findings(["A", "B"], ["B", "A"], ["B"], "l")[0] == ("B",)
    with pytest.raises(PredictionError, match=r"'Edema' \(nearest: 'Oedema'\)"):
        match_findings(["Mass", "Edema"], ["Mass", "Oedema"], None, "labels.csv")
    with pytest.raises(PredictionError, match="Not in the predictions: 'Hernia'"):
        match_findings(["Mass"], ["Mass", "Hernia"], ["Mass", "Hernia"], "labels.csv")
    with pytest.raises(PredictionError, match="'B'"):
        match_findings(["A"], ["B"], None, "l")


def test_labels_from_a_manifest(tmp_path, made_up):
    import polars as pl

    from hilum.data.schema import Manifest, complete, write_manifest

    table, labels = made_up(count=8, patients=4)
    labels[3, 2] = -2
    order = np.array([4, 2, 0, 1, 7, 5, 3, 6])
    identity = {
        name: getattr(table, name)[order] for name in ("image_uid", "dataset", "patient_id", "study_id", "image_id")
    }
    split = ["val" if int(name[-1]) % 2 else "train" for name in table.patient_id[order].tolist()]
    frame = pl.DataFrame(
        {
            **identity, "view": ["PA"] * 8, "source_relpath": ["a.png"] * 8, "source_root_key": ["root"] * 8,
            "split_project": split, "ssl_ok": [False] * 8, "ssl_reason": ["test"] * 8,
            **{f"label.{name}": labels[order, c] for c, name in enumerate(table.findings)},
        }
    )  # fmt: skip
    write_manifest(Manifest(complete(frame, table.findings), table.findings, {}), tmp_path / "manifest.parquet")
    truth = read_truth(tmp_path / "manifest.parquet")
    np.testing.assert_array_equal(join(truth, table).labels, labels)
    wanted = np.array([int(name[-1]) % 2 == 1 for name in table.patient_id.tolist()])
    np.testing.assert_array_equal(join(truth, table, "val").labels, labels[wanted])
    assert set(join(truth, table, "val").splits.tolist()) == {"val"}


def test_attributes_come_from_a_csv(tmp_path, made_up):
    table, labels = made_up()
    sex = np.where(np.arange(60) % 3, "F", "M")
    path = write_csv(tmp_path / "l.csv", table, labels, sex=sex, ViewPosition=table.view, scanner=np.full(60, "x"))
    order = np.random.default_rng(0).permutation(60)
    truth = read_truth(path, ["scanner", "B"], ["sex", "view", "age"])
    assert truth.findings == table.findings
    joined = join(truth, table.rows(order))
    assert list(joined.attributes) == ["scanner", "B", "sex", "view"]
    assert joined.attributes["sex"].tolist() == sex[order].tolist()
    assert joined.attributes["view"].tolist() == table.view[order].tolist()
    assert joined.attributes["B"].tolist() == ["present" if code else "absent" for code in labels[order, 1]]
    assert not read_truth(write_csv(tmp_path / "m.csv", table, labels)).attributes
    with pytest.raises(UnknownNameError, match=r"'scaner'.*Did you mean 'scanner'"):
        read_truth(path, ["scaner", "scanner"])
    for name in ("patient_id", "image_id", "path"):
        with pytest.raises(ConfigError, match="names people or pictures"):
            read_truth(path, [name])


def test_attributes_of_a_study_whose_images_differ_are_joined(tmp_path, made_up):
    table, labels = made_up()
    keys = [*zip(table.patient_id.tolist(), table.study_id.tolist(), strict=True)]
    labels = labels[[keys.index(key) for key in keys]]
    columns = {"study_id": table.study_id, "patient_id": table.patient_id, "view": table.view}
    truth = read_truth(write_csv(tmp_path / "l.csv", table, labels, **columns), (), ["view"])
    studies = mean_over_studies(table, unit="study")
    assert join(truth, studies).attributes["view"].tolist() == studies.view.tolist()
    assert "LATERAL+PA" in studies.view


def test_attributes_come_from_a_manifest_and_from_the_copy_in_a_store(tmp_path, made_up):
    import polars as pl

    from hilum.data.schema import Manifest, complete, write_manifest
    from hilum.data.store import write_arrays

    table, labels = made_up(count=8, patients=4)
    store = write_arrays(
        tmp_path / "store", [np.zeros((2, 2), np.uint8)] * 8, labels, table.findings, datasets=["d"] * 8,
        image_ids=table.image_id.tolist(), patients=table.patient_id.tolist(), studies=table.study_id.tolist(),
        views=["PA"] * 8,
    )  # fmt: skip
    table = dataclasses.replace(table, image_uid=store.uids)
    assert list(read_truth(tmp_path / "store", (), ["sex", "view"]).attributes) == ["view"]
    with pytest.raises(UnknownNameError, match="'sex'"):
        read_truth(tmp_path / "store", ["sex"])
    order = np.array([4, 2, 0, 1, 7, 5, 3])  # one image of the store is not in it
    names = ("image_uid", "dataset", "patient_id", "study_id", "image_id")
    frame = pl.DataFrame(
        {
            **{name: getattr(table, name)[order] for name in names}, "view": ["PA"] * 7,
            "source_relpath": ["a.png"] * 7, "source_root_key": ["root"] * 7, "split_project": ["train"] * 7,
            "ssl_ok": [False] * 7, "ssl_reason": ["test"] * 7, "sex": [*"FMFMF", None, "F"],
            "age_years": [float(row) for row in order * 10],
            **{f"label.{name}": labels[order, c] for c, name in enumerate(table.findings)},
        },
        schema_overrides={"age_years": pl.Float32},
    )  # fmt: skip
    manifest = Manifest(complete(frame, table.findings), table.findings, {})
    write_manifest(manifest, tmp_path / "manifest.parquet")
    write_manifest(manifest, tmp_path / "store" / "manifest.parquet")
    for path, rows in ((tmp_path / "manifest.parquet", order), (tmp_path / "store", np.arange(8))):
        joined = join(read_truth(path, ["sex"], ["age"]), table.rows(rows))
        expected = dict(zip(order.tolist(), [*"FMFMF", "", "F"], strict=True))
        assert joined.attributes["sex"].tolist() == [expected.get(row, "") for row in rows.tolist()]
        assert joined.attributes["age"].tolist() == [f"{row * 10}.0" if row != 6 else "" for row in rows.tolist()]
