"""Names shared by all layers: the legend of dimensions, label codes, views, splits. No torch here.

Dimensions in shape strings: B batch, V views of a study, N patch tokens, D embedding, C findings, Q queries,
R registers, H W pixels (height first), P patch size, K prototypes, M masked tokens, G / L global and local crops.
"""

POSITIVE, NEGATIVE, UNKNOWN, UNCERTAIN = 1, 0, -1, -2
"""Label codes (int8). UNKNOWN: not annotated. UNCERTAIN: the source itself says uncertain."""

VIEWS: tuple[str, ...] = (
    "PA", "AP", "AP_SUPINE", "LATERAL", "LL", "RL", "OBLIQUE", "DECUBITUS", "OTHER", "UNKNOWN",
)  # fmt: skip
FRONTAL_VIEWS = frozenset({"PA", "AP", "AP_SUPINE"})

SPLITS: tuple[str, ...] = ("train", "val", "test", "")
"""An image with split "" belongs to none: it is stored, and used for nothing that looks at labels."""

STAGES: tuple[str, ...] = ("raw", "study", "ensemble", "calibrated")
UNITS: tuple[str, ...] = ("image", "study")

RESEARCH_NOTICE = "Research use only; not a medical device. Not for diagnosis, triage or patient management."
