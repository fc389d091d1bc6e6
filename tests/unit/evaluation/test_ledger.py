import json
import threading

import pytest

from hilum.core.errors import HilumError, PredictionError
from hilum.evaluation.ledger import record_opening


def test_looks_are_counted_by_labels_and_split(tmp_path):
    path = tmp_path / "ledger.jsonl"
    looks = [("a", "test"), ("a", "test"), ("a", "val"), ("b", "test"), ("a", None), ("a", "test"), ("a", None)]
    assert [record_opening(path, *look, stage="raw") for look in looks] == [1, 2, 1, 1, 1, 3, 2]
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert entries[5] == {"labels": "a", "split": "test", "opening": 3, "stage": "raw"}


def test_looks_at_the_same_time_are_all_kept(tmp_path):
    path = tmp_path / "ledger.jsonl"
    threads = [threading.Thread(target=record_opening, args=(path, "a", "test")) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert record_opening(path, "a", "test") == 17


@pytest.mark.parametrize("line", ["no json", "[]", '{"labels": "a"}', ""])
def test_another_file_is_refused_and_left_as_it_is(tmp_path, line):
    path = tmp_path / "notes.txt"
    path.write_text(f"{line}\n")
    with pytest.raises(PredictionError, match="line 1"):
        record_opening(path, "a", "test")
    assert path.read_text() == f"{line}\n"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(HilumError, match="Nothing was judged"):
        record_opening(tmp_path / "absent" / "ledger.jsonl", "a", "test")
    with pytest.raises(HilumError, match="ledger cannot be read"):
        record_opening(tmp_path, "a", "test")
