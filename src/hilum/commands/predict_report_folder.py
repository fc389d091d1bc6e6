"""What lies in a folder of reports beside the studies: which study is which, with which options, what was not written.

Several jobs write into one folder, and a run that was stopped goes on: every study has a list of its own of what could
not be made of it, and the list of all is made from those.
"""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hilum.commands.predict_report_options import FHIR_FORMATS, ReportOptions
from hilum.core.errors import ConfigError, HilumError, ImageError
from hilum.core.files import read_json, write_json, write_text
from hilum.core.tracking import warn

INDEX_NAME, LEFT_OUT_NAME = "studies.csv", "not_written.csv"
OPTIONS_NAME, LEFT_OUT_FOLDER = "options.json", "not_written"
LEFT_OUT_COLUMNS = ("folder", "what", "reason", "message")


@dataclass
class LeftOut:
    """What could not be made of one study."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(self, folder: str, what: str, error: HilumError) -> None:
        """One thing, with the reason."""
        reason = error.reason if isinstance(error, ImageError) else type(error).__name__
        self.rows.append((folder, what, reason, str(error)))

    def write(self, path: Path) -> None:
        """Before the study's document, so that who finds that has this too."""
        path.unlink(missing_ok=True)  # of an earlier run
        if self.rows:
            write_text(path, _csv(LEFT_OUT_COLUMNS, self.rows))


def write_index(folder: Path, studies: Iterable[tuple[str, str, int, str]]) -> None:
    """List the studies: folder, id in the input, images, digest of the files that these are.

    Raises:
        ConfigError: the folder has the reports of others, or of other files under the same names.
    """
    text = _csv(("folder", "study_id", "images", "files"), studies)
    path = folder / INDEX_NAME
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(
            f"{path} lists other studies than these inputs, or other files of them, or files that have changed since: "
            "reports of both would be mixed. Choose another folder."
        )
    write_text(path, text)


def write_options(options: ReportOptions, study_rule: str, score_flagged: bool, correct_inverted: bool) -> None:
    """Remember what changes a report, so that those of one folder are all made with the same.

    Raises:
        ConfigError: the folder has reports that were made with others.
    """
    asked: dict[str, Any] = {
        "score_flagged": score_flagged, "correct_inverted": correct_inverted, "study": study_rule,
    }  # fmt: skip
    if set(options.formats) & set(FHIR_FORMATS):
        listed = sorted((study, str(one)) for study, one in options.references.items())
        asked["references"] = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    path = options.folder / OPTIONS_NAME
    before = read_json(path, ConfigError) if path.exists() else {}
    differing = [name for name, value in asked.items() if before.get(name, value) != value]
    if differing:
        raise ConfigError(
            f"{options.folder} holds reports that were made with other options "
            f"({', '.join('--' + name.replace('_', '-') for name in differing)}): they would be mixed. Choose another "
            "folder."
        )
    write_json(path, {**before, **asked})


def left_out_path(folder: Path, study: str) -> Path:
    """Where the list of one study is."""
    return folder / LEFT_OUT_FOLDER / f"{study}.csv"


def write_left_out(folder: Path, mine: Collection[str]) -> None:
    """Put the lists of all studies together, of other jobs and of earlier runs too; warn of those of this job."""
    rows: list[tuple[str, ...]] = []
    for path in sorted((folder / LEFT_OUT_FOLDER).glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows += [tuple(row) for row in list(csv.reader(file))[1:]]
    path = folder / LEFT_OUT_NAME
    path.unlink(missing_ok=True)  # of an earlier run
    if rows:
        write_text(path, _csv(LEFT_OUT_COLUMNS, sorted(rows)))
    reasons = Counter(f"{what.split()[0]}: {reason}" for study, what, reason, _ in rows if study in mine)
    if reasons:
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        warn(f"{reasons.total()} reports or images were left out ({listed}); {path} says why")


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
