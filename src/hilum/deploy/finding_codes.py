"""Codes of findings in other people's systems: one of ours for each, and one of SNOMED CT where it is certain.

Findings are names (`data/labels.py`). Our codes are functions of the name alone, so that a finding added at home has
one too. SNOMED CT codes are only those that DICOM itself publishes for use with it (PS3.16), and only where the label
of the chest X-ray datasets means the same.
"""

import hashlib
import re
from typing import NamedTuple

SCHEME_NAME = "Hilum findings"
SCHEME_DESIGNATOR = "99HILUM"
"""In DICOM; 99 marks a private coding scheme."""
SCHEME_UID = "2.25.156939776016038108755120058384123093131"
"""UUID (version 5, URL namespace) of "hilum:findings" as an OID: no registry is needed for it."""
SCHEME_URI = f"urn:oid:{SCHEME_UID}"
"""In FHIR."""
SNOMED_URI = "http://snomed.info/sct"
LONGEST = 16
"""Characters of a DICOM code value (SH)."""


class Code(NamedTuple):
    """A code and what it means."""

    value: str
    meaning: str


SNOMED: dict[str, Code] = {
    "Adenopathy": Code("30746006", "Lymphadenopathy"),
    "Edema": Code("19242006", "Pulmonary edema"),
    "Pleural Effusion": Code("60046008", "Pleural effusion"),
    "Pneumomediastinum": Code("16838000", "Pneumomediastinum"),
    "Pneumothorax": Code("36118008", "Pneumothorax"),
    "Pulmonary Embolism": Code("59282003", "Pulmonary embolism"),
    "Pulmonary Hypertension": Code("70995007", "Pulmonary hypertension"),
}
"""By finding; a finding that is not here has none."""


def local_code(name: str) -> Code:
    """Our code of a finding, at most 16 characters: the name in small letters, cut and made unique where it is long."""
    value = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if len(value) > LONGEST or not re.fullmatch(r"[A-Za-z0-9]+( [A-Za-z0-9]+)*", name):
        value = f"{value[:7].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".lstrip("-")
    return Code(value, name)
