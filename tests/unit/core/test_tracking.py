import json
from pathlib import Path

import pytest

from hilum.core import tracking


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
