"""The audit finds each planted fault, finds none in a clean table, and names no patient."""

import polars as pl
import pytest

from hilum.data.audit import audit, positives_table
from hilum.data.schema import Manifest, complete

FINDINGS = ("Atelectasis", "Fracture", "Normal", "Rib Fracture", "Support Devices")


def table(rows: int = 120, **changes) -> Manifest:
    """Sixty patients with one study of two images each: forty in train, ten in val, ten in test."""
    patient = [index // 2 for index in range(rows)]
    split = ["train" if p < 40 else "val" if p < 50 else "test" for p in patient]
    columns = {
        "image_uid": [f"{index:016x}" for index in range(rows)],
        "dataset": ["d"] * rows,
        "source_relpath": [f"{index}.png" for index in range(rows)],
        "source_root_key": ["d"] * rows,
        "patient_id": [f"d/SECRET{p}" for p in patient],
        "study_id": [f"d/SECRET{p}/1" for p in patient],
        "image_id": [f"{index}.png" for index in range(rows)],
        "view": ["PA", "LL"] * (rows // 2),
        "split_project": split,
        "ssl_ok": [name == "train" for name in split],
        "ssl_reason": [""] * rows,
        "label.Atelectasis": [int(p % 2) for p in patient],
        "label.Fracture": [0] * rows,
        "label.Normal": [0] * rows,
        "label.Rib Fracture": [0] * rows,
        "label.Support Devices": [0] * rows,
    } | changes
    return Manifest(complete(pl.DataFrame(columns), FINDINGS), FINDINGS, {})


def with_value(manifest: Manifest, column: str, row: int, value) -> Manifest:
    values = manifest.frame[column].to_list()
    values[row] = value
    frame = manifest.frame.with_columns(pl.Series(column, values, dtype=manifest.frame.schema[column]))
    return Manifest(frame, manifest.findings, manifest.metadata)


def kinds(problems) -> set[str]:
    return {problem.kind for problem in problems}


def test_a_clean_table_has_no_leak():
    report = audit(table())
    assert report.clean
    assert kinds(report.warnings) == {"few positives"}
    assert report.counts["images"].to_list() == [20, 80, 20]
    assert report.counts["patients"].to_list() == [10, 40, 10]
    assert report.views.filter(pl.col("split_project") == "val")["images"].to_list() == [10, 10]


@pytest.mark.parametrize(
    ("column", "row", "value", "kind"),
    [
        ("patient_id", 119, "d/SECRET0", "patient across splits"),
        ("study_id", 119, "d/SECRET0/1", "study across splits"),
        ("image_id", 119, "0.png", "image across splits"),
        ("source_relpath", 119, "0.png", "path across splits"),
        ("split_project", 1, "test", "patient across splits"),
        ("split_project", 119, "val", "patient across splits"),
        ("ssl_ok", 119, True, "evaluation in pretraining"),
    ],
)
def test_each_planted_leak_is_found(column, row, value, kind):
    report = audit(with_value(table(), column, row, value))
    assert kind in kinds(report.leaks)
    assert all("SECRET" not in problem.message + "".join(problem.examples) for problem in report.leaks)
    assert all(0 < len(problem.examples) <= 3 for problem in report.leaks)


@pytest.mark.parametrize("column", ["source_sha256", "pixel_sha256"])
def test_equal_content_across_splits_is_a_leak_and_within_one_a_warning(column):
    name = {"source_sha256": "file", "pixel_sha256": "pixels"}[column]
    across = with_value(with_value(table(), column, 0, "f" * 64), column, 119, "f" * 64)
    assert f"{name} across splits" in kinds(audit(across).leaks)
    within = with_value(with_value(table(), column, 0, "f" * 64), column, 2, "f" * 64)
    report = audit(within)
    assert report.clean
    (problem,) = [problem for problem in report.warnings if problem.kind == f"duplicate {name}"]
    assert problem.count == 2
    assert "2 of them under several patients" in problem.message


def test_pretraining_outside_the_splits_counts_as_training():
    """A patient in test whose other image belongs to no split, yet is open to pretraining."""
    manifest = with_value(with_value(table(), "split_project", 119, ""), "ssl_ok", 119, True)
    assert {"patient across splits", "evaluation in pretraining"} <= kinds(audit(manifest).leaks)
    closed = with_value(with_value(table(), "split_project", 119, ""), "ssl_ok", 119, False)
    assert audit(closed).clean


def test_copied_files_are_found_by_their_bytes(tmp_path):
    for index in range(120):
        (tmp_path / f"{index}.png").write_bytes(b"%03d" % index)
    (tmp_path / "119.png").write_bytes(b"000")
    (tmp_path / "7.png").unlink()
    manifest = table()
    manifest = Manifest(manifest.frame, manifest.findings, {"roots": f'{{"d": "{tmp_path}"}}'})
    assert audit(manifest).clean
    report = audit(manifest, hash_files=True)
    assert kinds(report.leaks) == {"file across splits"}
    assert report.leaks[0].count == 2
    assert "unreadable file" in kinds(report.warnings)


def test_conflicts_within_a_study():
    manifest = with_value(table(), "label.Atelectasis", 0, 1)
    (problem,) = [problem for problem in audit(manifest).warnings if problem.kind == "conflicting labels"]
    assert problem.count == 2
    assert "Atelectasis 2" in problem.message
    unknown = with_value(table(), "label.Atelectasis", 0, -1)  # unknown contradicts nothing
    assert "conflicting labels" not in kinds(audit(unknown).warnings)


def test_hierarchy():
    clean = with_value(table(), "label.Rib Fracture", 0, 1)
    assert [p.message for p in audit(clean).warnings if p.kind == "hierarchy"] == [
        "Rib Fracture is positive and Fracture negative"
    ]
    assert "hierarchy" not in kinds(audit(with_value(clean, "label.Fracture", 0, 1)).warnings)
    assert "hierarchy" not in kinds(audit(with_value(clean, "label.Fracture", 0, -1)).warnings)
    normal = with_value(table(), "label.Normal", 2, 1)  # this patient has atelectasis
    assert "Normal is positive beside another finding" in {p.message for p in audit(normal).warnings}
    device = with_value(with_value(table(), "label.Normal", 0, 1), "label.Support Devices", 0, 1)
    assert "hierarchy" not in kinds(audit(device).warnings)


def test_official_evaluation_in_train_is_said():
    report = audit(with_value(table(), "split_official", 0, "test"))
    assert report.clean
    (problem,) = [p for p in report.warnings if p.kind == "official evaluation images in train"]
    assert problem.count == 2  # both images of that patient


def test_empty_split_and_few_positives():
    report = audit(table(split_project=["train"] * 120, ssl_ok=[True] * 120))
    assert {p.message for p in report.warnings if p.kind == "empty split"} == {
        "no image is in val",
        "no image is in test",
    }
    (few,) = [p for p in report.warnings if p.kind == "few positives"]
    assert "Atelectasis" not in few.message  # it has sixty
    assert "train: 4 findings have under 30 positives" in few.message


def test_positives_by_hand():
    manifest = with_value(table(), "label.Atelectasis", 118, -1)
    rows = positives_table(manifest).filter(pl.col("finding") == "Atelectasis")
    assert rows.select("split", "known", "positives").rows() == [("train", 80, 40), ("val", 20, 10), ("test", 19, 9)]
