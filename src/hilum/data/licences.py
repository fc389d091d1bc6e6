"""What a dataset's licence lets one do with copies of its images: a table, facts/licences.csv, and how it is asked.

Nothing here is legal advice: the table says what Hilum does by itself. The person who has an agreement may know
better, and says so with --accept-licence.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from hilum.core.errors import ConfigError


@dataclass(frozen=True)
class Licence:
    """One row of the table."""

    tag: str
    may_export: bool
    """Copies of the images, shrunk and encoded anew, may be given to others."""
    may_upload: bool
    """They may be sent to a service outside."""
    may_show_thumbnails: bool
    """Small ones may stand in a report that leaves the house."""
    cite: str
    """Whom to name, and what else is asked of those who pass copies on."""


@cache
def licences() -> dict[str, Licence]:
    """The table, by tag."""
    text = (files("hilum.data") / "facts" / "licences.csv").read_text(encoding="utf-8")
    answer = {"yes": True, "no": False}
    return {
        row["tag"]: Licence(
            row["tag"],
            answer[row["may_export"]],
            answer[row["may_upload"]],
            answer[row["may_show_thumbnails"]],
            row["cite"],
        )
        for row in csv.DictReader(text.splitlines())
    }


def check_export(tags: Iterable[str]) -> None:
    """Refuse tags whose images may not be passed on, and those that nobody wrote down.

    Raises:
        ConfigError: names the tags, and the option that takes the responsibility.
    """
    table = licences()
    refused = sorted({tag for tag in tags if tag not in table or not table[tag].may_export})
    if refused:
        told = "; ".join(
            f"{tag} ({table[tag].cite})" if tag in table else f"{tag or 'none'} (unknown)" for tag in refused
        )
        raise ConfigError(
            f"The licence does not let copies be passed on, or is not known: {told}. If yours does, or the copies stay "
            "with people who signed for the data, say so with --accept-licence."
        )
