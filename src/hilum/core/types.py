"""Names shared by all layers: the legend of dimensions, label codes, views, splits, identities. No torch, no polars.

Dimensions in shape strings: B batch, V views of a study, N patch tokens, D embedding, C findings, Q queries,
R registers, H W pixels (height first), P patch size, K prototypes, M masked tokens, G / L global and local crops.
"""

import hashlib

POSITIVE, NEGATIVE, UNKNOWN, UNCERTAIN = 1, 0, -1, -2
"""Label codes (int8). UNKNOWN: not annotated. UNCERTAIN: the source itself says uncertain."""

VIEWS: tuple[str, ...] = (
    "PA", "AP", "AP_SUPINE", "LATERAL", "LL", "RL", "OBLIQUE", "DECUBITUS", "OTHER", "UNKNOWN",
)  # fmt: skip
FRONTAL_VIEWS = frozenset({"PA", "AP", "AP_SUPINE"})
VIEW_KINDS: tuple[str, ...] = ("PA", "AP", "lateral", "other")
"""What heads and study rules tell apart."""
_KIND_OF_VIEW = {"PA": 0, "AP": 1, "AP_SUPINE": 1, "LATERAL": 2, "LL": 2, "RL": 2}

SPLITS: tuple[str, ...] = ("train", "val", "test", "")
"""An image with split "" belongs to none: it is stored, and used for nothing that looks at labels."""
SPLIT_NAMES = {
    "train": "train", "val": "val", "valid": "val", "validate": "val", "validation": "val", "dev": "val",
    "development": "val", "test": "test",
}  # fmt: skip
"""What people call splits in tables of their own."""

STAGES: tuple[str, ...] = ("raw", "study", "ensemble", "calibrated")
UNITS: tuple[str, ...] = ("image", "study")
LOOSE_FILES = "files"
"""Dataset of images that were predicted from files, outside any manifest: they are known by name alone."""


def view_kind(view: str) -> int:
    """Position in `VIEW_KINDS` of a view; what is not known is "other"."""
    return _KIND_OF_VIEW.get(view, 3)


RESEARCH_NOTICE = "Research use only; not a medical device. Not for diagnosis, triage or patient management."


def image_uid(dataset: str, source_id: str) -> str:
    """16 hex digits that name an image for good: a function of its dataset and the source's own id alone."""
    return hashlib.sha256(f"{dataset}\x1f{source_id}".encode()).hexdigest()[:16]
