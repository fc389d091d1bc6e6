"""One name for each way that datasets write a projection: PA, AP, LATERAL, LL, "AP AXIAL", "postero-anterior" ...

The raw text stays in `view_raw`; nothing is guessed from pixels here.
"""

import polars as pl

from hilum.core.types import FRONTAL_VIEWS, VIEWS
from hilum.data.tables import SHOWN_CHARACTERS

RAW_VIEWS: dict[str, str] = {
    "PA": "PA",
    "POSTEROANTERIOR": "PA",
    "POSTERO ANTERIOR": "PA",
    "PA ERECT": "PA",
    "ERECT PA": "PA",
    "PA UPRIGHT": "PA",
    "UPRIGHT PA": "PA",
    "AP": "AP",
    "ANTEROPOSTERIOR": "AP",
    "ANTERO POSTERIOR": "AP",
    "AP AXIAL": "AP",
    "AP LORDOTIC": "AP",
    "AP ERECT": "AP",
    "ERECT AP": "AP",
    "AP UPRIGHT": "AP",
    "UPRIGHT AP": "AP",
    "AP SEMI ERECT": "AP",
    "AP SITTING": "AP",
    "AP PORTABLE": "AP",
    "PORTABLE AP": "AP",
    "AP MOBILE": "AP",
    "MOBILE AP": "AP",
    "AP SUPINE": "AP_SUPINE",
    "SUPINE AP": "AP_SUPINE",
    "AP HORIZONTAL": "AP_SUPINE",
    "LATERAL": "LATERAL",
    "LAT": "LATERAL",
    "L": "LATERAL",
    "XTABLE LATERAL": "LATERAL",
    "LL": "LL",
    "LEFT LATERAL": "LL",
    "RL": "RL",
    "RIGHT LATERAL": "RL",
    "OBLIQUE": "OBLIQUE",
    "LAO": "OBLIQUE",
    "RAO": "OBLIQUE",
    "LPO": "OBLIQUE",
    "RPO": "OBLIQUE",
    "LLO": "OBLIQUE",
    "RLO": "OBLIQUE",
    "DECUBITUS": "DECUBITUS",
    "PA LLD": "DECUBITUS",
    "PA RLD": "DECUBITUS",
    "AP LLD": "DECUBITUS",
    "AP RLD": "DECUBITUS",
    "LLD": "DECUBITUS",
    "RLD": "DECUBITUS",
    "SWIMMERS": "OTHER",
    "OTHER": "OTHER",
    "": "UNKNOWN",
    "UNKNOWN": "UNKNOWN",
    "NONE": "UNKNOWN",
    "NAN": "UNKNOWN",
    "FRONTAL": "UNKNOWN",
    "AP/PA": "UNKNOWN",
    "PA/AP": "UNKNOWN",
}
"""Texts after upper-casing, with hyphens and underscores as spaces. Any other text is OTHER."""
FRONTAL_TEXTS = ("FRONTAL", "AP/PA", "PA/AP")
"""Frontal, and nobody has said which: the view is not known, that it is frontal is."""
SHOWN_TEXTS = 5


def view_of(raw: pl.Expr) -> pl.Expr:
    """The view that a raw text names."""
    return _text(raw).replace_strict(RAW_VIEWS, default="OTHER", return_dtype=pl.String)


def is_frontal(raw: pl.Expr) -> pl.Expr:
    """True where a raw text names a frontal view, false where another, null where the projection is not known."""
    view = view_of(raw)
    known = pl.when(~view.is_in(["UNKNOWN", "OTHER"])).then(view.is_in(list(FRONTAL_VIEWS)))
    return pl.when(_text(raw).is_in(FRONTAL_TEXTS)).then(True).otherwise(known)


def view_notes(raw: pl.Series) -> list[str]:
    """Notes on the texts of a person's own table that name no view, or half of one."""
    text = pl.select(_text(pl.lit(raw))).to_series()
    half, unknown = text.is_in(FRONTAL_TEXTS).sum(), raw.filter(~text.is_in(list(RAW_VIEWS)))
    notes = [f"{half} images are frontal, without PA or AP: their view is UNKNOWN"] if half else []
    if len(unknown):
        texts = unknown.unique(maintain_order=True).to_list()
        shown = [repr(one) if len(one) <= SHOWN_CHARACTERS else f"a text of {len(one)} characters" for one in texts]
        named = ", ".join(shown[:SHOWN_TEXTS]) + (", ..." if len(shown) > SHOWN_TEXTS else "")
        notes.append(
            f"{len(unknown)} images have a view that is not known ({named}): OTHER. Known are "
            f"{', '.join(VIEWS)} and other words for them, which docs/how-to/add-a-dataset.md lists"
        )
    return notes


def _text(raw: pl.Expr) -> pl.Expr:
    return raw.fill_null("").str.to_uppercase().str.replace_all(r"[\s_-]+", " ").str.strip_chars()
