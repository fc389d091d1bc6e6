"""What became of every input of `hilum predict`, to the last one: predicted, withheld, refused, or given twice.

`OUT.quarantine.csv` lists what could not be read, `OUT.flags.csv` what is no upright chest X-ray; neither is there
where it would be empty.
"""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hilum.commands.predict_parts import Part, Work
from hilum.core.files import write_text
from hilum.deploy.admission import Flagged
from hilum.deploy.inputs import Inputs, Refused
from hilum.deploy.screening import STRANGER

MANY = 0.05
"""Share of inputs unlike the training images from which a person is told what that may mean."""


@dataclass(frozen=True)
class Account:
    """Counts and lists of what became of the inputs of a job."""

    work: Work
    predicted: int
    flagged: list[Flagged]
    """Positions are those in `work`."""
    refused: list[Refused]
    repeated: int

    @property
    def withheld(self) -> int:
        """Images that were read and not scored."""
        return len({one.position for one in self.flagged if not one.scored})

    @property
    def lost(self) -> int:
        """Inputs that have no row."""
        return self.withheld + len(self.refused)

    @property
    def given(self) -> int:
        """All inputs: predicted, withheld, refused and repeated."""
        return self.predicted + self.withheld + len(self.refused) + self.repeated

    def counts(self) -> dict[str, Any]:
        """For the metadata of the prediction file."""
        codes = Counter(one.flag.code for one in self.flagged)
        return {
            "given": self.given, "predicted": self.predicted, "withheld": self.withheld,
            "refused": len(self.refused), "repeated": self.repeated, "flagged": dict(sorted(codes.items())),
        }  # fmt: skip

    def line(self) -> str:
        """One sentence that adds up."""
        parts = [
            f"{self.predicted} predicted", *([f"{self.withheld} withheld"] if self.withheld else []),
            *([f"{len(self.refused)} refused"] if self.refused else []),
            *([f"{self.repeated} given twice"] if self.repeated else []),
        ]  # fmt: skip
        return f"{self.given} inputs: {', '.join(parts)}"

    def warnings(self, out: Path) -> list[str]:
        """What a person must be told, with the tables that say more."""
        lines = []
        if self.refused:
            listed = _listed(one.reason for one in self.refused)
            lines.append(f"{len(self.refused)} inputs were left out ({listed}); {quarantine_of(out)} says why")
        for scored, what in ((False, "withheld"), (True, "scored all the same")):
            codes = [one.flag.code for one in self.flagged if one.scored is scored]
            if codes:
                lines.append(f"{len(codes)} images were flagged and {what} ({_listed(codes)}); see {flags_of(out)}")
        strangers = sum(one.flag.code == STRANGER for one in self.flagged)
        if strangers > MANY * self.given and self.given >= 20:
            lines.append(
                f"{strangers} of {self.given} do not look like the model's training images. If they are chest X-rays "
                "(of another machine, with other borders), the model is untried on such; --score-flagged scores them"
            )
        return lines

    def nothing(self) -> str:
        """Why there is no prediction."""
        reasons = Counter(one.reason for one in self.refused)
        reasons.update(one.flag.code for one in self.flagged if not one.scored)
        listed = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        what = "could be read" if not self.withheld else "could be scored"
        return f"None of {self.given} inputs {what} ({listed}). Nothing was predicted."

    def write(self, out: Path) -> None:
        """Write the two tables, or remove those of an earlier prediction under this name."""
        refused = sorted(self.refused, key=lambda one: str(one.path))
        _write(
            quarantine_of(out), ("path", "reason", "message"), [(one.path, one.reason, one.message) for one in refused]
        )
        identity = self.work.identity
        rows = [
            (
                identity["image_uid"][one.position], identity["image_id"][one.position],
                identity["study_id"][one.position], one.flag.code, "yes" if one.scored else "no", one.flag.message,
            )
            for one in self.flagged
        ]  # fmt: skip
        _write(flags_of(out), ("image_uid", "image_id", "study_id", "flag", "scored", "message"), rows)


def account_of(work: Work, found: Inputs, parts: Sequence[Part]) -> Account:
    """What became of the inputs, from the parts that were read.

    Args:
        work: what was to be read.
        found: the inputs of this job; what was refused before anything was read.
        parts: of all of `work`.
    """
    refused = [
        Refused(Path(work.places[one.position]), one.reason, one.message) for part in parts for one in part.refused
    ]
    flagged = sorted((one for part in parts for one in part.reading.flagged), key=lambda one: one.position)
    predicted = sum(len(part.reading.kept) for part in parts)
    account = Account(work, predicted, flagged, [*found.refused, *refused], found.repeated)
    assert predicted + account.withheld + len(refused) == len(work), "every image is predicted, withheld or refused"
    return account


def quarantine_of(out: Path) -> Path:
    """Where what could not be read is listed."""
    return out.with_name(out.name + ".quarantine.csv")


def flags_of(out: Path) -> Path:
    """Where flagged images are listed."""
    return out.with_name(out.name + ".flags.csv")


def _listed(codes: Any) -> str:
    ordered = sorted(Counter(codes).items(), key=lambda one: (-one[1], one[0]))
    return ", ".join(f"{count} {code}" for code, count in ordered)


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    path.unlink(missing_ok=True)  # of an earlier prediction under this name
    if rows:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
        write_text(path, text.getvalue())
