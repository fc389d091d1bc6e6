"""docs/reference/images.md names every reason and flag that the code gives, and no other; and every recipe."""

import re
from pathlib import Path

from hilum.data.intensity import RECIPES

ROOT = Path(__file__).resolve().parents[3]
MODULES = "images containers raw dicom dicom_pixels dicom_display decoding checksums"
SOURCE = "\n".join((ROOT / "src" / "hilum" / "data" / f"{name}.py").read_text("utf-8") for name in MODULES.split())
DOCUMENT = (ROOT / "docs" / "reference" / "images.md").read_text("utf-8")
REASONS = set(re.findall(r'(?:Unreadable|Unsupported)?ImageError\(\s*"([a-z_]+)"', SOURCE))
REASONS |= set(re.findall(r'reason ?= ?"([a-z_]+)"', SOURCE)) | set(re.findall(r'else "(unreadable)"', SOURCE))
FLAGS = set(re.findall(r'flags\.append\("([a-z_]+)"\)', SOURCE)) | set(re.findall(r'(?<!: )\("([a-z_]+)",\)', SOURCE))


def listed(title: str) -> set[str]:
    """What the first column of a section's table names."""
    section = re.split(r"^## ", DOCUMENT, flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(title))
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return set(re.findall(r"`([a-z0-9_-]+)`", " ".join(cells)))


def test_reasons() -> None:
    assert len(REASONS) >= 15
    assert listed("Reasons") == REASONS


def test_flags() -> None:
    assert len(FLAGS) >= 12
    assert listed("Flags") == FLAGS


def test_recipes() -> None:
    assert listed("Recipes") == set(RECIPES)
