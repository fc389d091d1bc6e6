import json
import sys
from pathlib import Path

import pytest

from hilum.core import tracking
from hilum.core.errors import ConfigError, HilumError


def test_a_resumed_log_holds_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = tracking.MetricsLog(path)
    for step in range(1, 6):
        log.write(step, loss=float(step))
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    resumed = tracking.MetricsLog(path, resume_step=3)
    resumed.write(4, loss=4.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_plain_progress_says_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    with tracking.progress("Decoding", 3, "images") as bar:
        bar.advance(3)
        bar.note("1 refused")
    assert capsys.readouterr().err.startswith("Decoding: 3/3 images, in 0 s, 1 refused")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert tracking.duration(seconds) == text


def test_a_run_that_begins_anew_keeps_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracking.MetricsLog(path).write(0, knn_mAP=0.3)  # before the first step; killed before the first checkpoint
    again = tracking.MetricsLog(path)
    again.write(0, knn_mAP=0.3)
    assert [line["step"] for line in again.history()] == [0]


def test_history_is_what_was_written_by_all_processes_so_far(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert tracking.read_history(path) == []
    first = tracking.MetricsLog(path)
    assert first.history() == []
    first.write(0, knn_mAP=0.25)
    first.write(2, loss=1.5, alarms=["cls_collapse"])
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    resumed = tracking.MetricsLog(path, resume_step=2)
    resumed.write(4, loss=1.0)
    assert resumed.history() == [
        {"step": 0, "knn_mAP": 0.25}, {"step": 2, "loss": 1.5, "alarms": ["cls_collapse"]}, {"step": 4, "loss": 1.0},
    ]  # fmt: skip


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_shows_every_number_once_also_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    path = tmp_path / "metrics.jsonl"
    log = tracking.MetricsLog(path, tensorboard=True)
    for step in range(1, 6):
        log.write(step, loss=float(step), batch="0f3a", alarms=[], count=7, flag=True)
    log.close()
    resumed = tracking.MetricsLog(path, resume_step=3, tensorboard=True)
    for step in (4, 5, 6):
        resumed.write(step, loss=10.0 * step)
    resumed.close()
    shown = scalars(tmp_path / tracking.TENSORBOARD)
    assert shown == {
        "loss": [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)],
        "count": [(1, 7.0), (2, 7.0), (3, 7.0)],
    }
    anew = tracking.MetricsLog(path, tensorboard=True)
    anew.write(0, loss=0.5)
    anew.close()
    assert scalars(tmp_path / tracking.TENSORBOARD)["loss"] == [(0, 0.5)]


def test_tensorboard_that_is_not_installed_is_named_and_nothing_is_touched(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "metrics.jsonl"
    tracking.MetricsLog(path).write(1, loss=1.0)
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'hilum\[tensorboard\]'"):
        tracking.MetricsLog(path, tensorboard=True)
    assert tracking.read_history(path) == [{"step": 1, "loss": 1.0}]
    assert not (tmp_path / tracking.TENSORBOARD).exists()


def test_a_disk_that_fails_under_tensorboard_is_an_error_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    path, folder = tmp_path / "metrics.jsonl", tmp_path / tracking.TENSORBOARD
    folder.write_text("in the way")
    with pytest.raises(HilumError, match=f"Could not write {folder}"):
        tracking.MetricsLog(path, tensorboard=True)
    folder.unlink()
    log = tracking.MetricsLog(path, tensorboard=True)

    def full() -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(log._events._writer, "flush", full)  # type: ignore[union-attr]
        with pytest.raises(HilumError, match=f"Could not write {folder}: No space left"):
            log.write(1, loss=1.0)
    assert log.history() == [{"step": 1, "loss": 1.0}]
    log.close()
