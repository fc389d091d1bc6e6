"""What `hilum predict --reports` is asked for: formats, captures, and whose studies are on a FHIR server."""

import csv
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hilum.core.errors import ConfigError, MissingColumnError, UnknownNameError
from hilum.deploy.fhir import References

FORMATS = ("json", "html", "fhir", "fhir-r4b", "sr", "sc")
DICOM_FORMATS, FHIR_FORMATS = ("sr", "sc"), ("fhir", "fhir-r4b")
CAPTURES = ("above", "all")


@dataclass(frozen=True)
class ReportOptions:
    """What to write, and where.

    Raises:
        UnknownNameError: no such format, or choice of captures.
        ConfigError: a format that needs what is not installed, or something said of a format that is not asked for.
    """

    folder: Path
    formats: tuple[str, ...] = ("json",)
    """Names in FORMATS; the JSON document is always written."""
    captures: str = "above"
    """Secondary captures of the findings above the model's first operating point, or of all that have maps."""
    references: Mapping[tuple[str, str], References] = field(default_factory=dict)
    """Whose a study is on a FHIR server, by the ids of study and patient in the input; "": whoever the patient is."""

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in FORMATS:
                raise UnknownNameError("report format", name, FORMATS)
        if self.captures not in CAPTURES:
            raise UnknownNameError("choice of captures", self.captures, CAPTURES)
        if self.captures == "all" and "sc" not in self.formats:
            raise ConfigError("--captures all is said of secondary captures, and none are asked for: --formats sc.")
        if self.references and not set(self.formats) & set(FHIR_FORMATS):
            raise ConfigError("--references is said of FHIR reports, and none are asked for: --formats fhir.")
        if set(self.formats) & set(DICOM_FORMATS) and importlib.util.find_spec("highdicom") is None:
            raise ConfigError('DICOM reports (sr, sc) need the extra: pip install "hilum[pacs]".')


def read_references(path: Path) -> dict[tuple[str, str], References]:
    """Whose studies are on a FHIR server: a CSV with `study_id`, and `patient` or `imaging_study` or both.

    A column `patient_id` says which patient's study is meant, as the inputs call them.

    Returns:
        by study id and patient id; "" where there is no such column.

    Raises:
        ConfigError: it cannot be read, names a study twice, holds what is no reference, or lacks a patient in a row.
        MissingColumnError: a column is missing.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as a CSV: {error}.") from error
    if "study_id" not in columns or not {"patient", "imaging_study"} & set(columns):
        raise MissingColumnError(
            f"{path}: expected the columns study_id, and patient or imaging_study; found "
            f"{', '.join(columns) or 'no header'}."
        )
    found: dict[tuple[str, str], References] = {}
    for number, row in enumerate(rows, 2):
        study, whose = (row["study_id"] or "").strip(), (row.get("patient_id") or "").strip()
        if "patient_id" in columns and not whose:
            raise ConfigError(f"{path}, row {number}: its patient_id is empty. Say it, or leave the column out.")
        try:
            one = References(
                (row.get("patient") or "").strip() or None, (row.get("imaging_study") or "").strip() or None
            )
        except ConfigError as error:
            raise ConfigError(f"{path}, row {number}: {error}") from error
        if found.get((study, whose), one) != one:
            raise ConfigError(f"{path}, row {number}: this study has other references in an earlier row.")
        found[study, whose] = one
    return found


def parse_options(
    folder: Path | None, formats: str = "json", captures: str = "above", references: Path | None = None
) -> ReportOptions | None:
    """Options from the command line.

    Args:
        folder: where reports go; None: there are none, and nothing may be said of them.
        formats: names with commas between them.
        captures: a name in CAPTURES.
        references: a CSV for `read_references`.

    Raises:
        ConfigError: as `ReportOptions` and `read_references`, or something said of reports without a folder for them.
    """
    if folder is None:
        if (formats, captures, references) != ("json", "above", None):
            raise ConfigError(
                "--formats, --captures and --references are said of reports: name their folder, --reports."
            )
        return None
    names = tuple(dict.fromkeys(name.strip() for name in formats.split(",") if name.strip()))
    return ReportOptions(Path(folder), names, captures, read_references(references) if references else {})
