"""One name for each way that datasets write a projection: PA, AP, LATERAL, LL, "AP AXIAL", "postero-anterior" ...

The raw text stays in `view_raw`; nothing is guessed from pixels here.
"""

import polars as pl

from hilum.core.types import FRONTAL_VIEWS

RAW_VIEWS: dict[str, str] = {
    "PA": "PA",
    "POSTEROANTERIOR": "PA",
    "POSTERO ANTERIOR": "PA",
    "AP": "AP",
    "ANTEROPOSTERIOR": "AP",
    "ANTERO POSTERIOR": "AP",
    "AP AXIAL": "AP",
    "AP LORDOTIC": "AP",
    "AP SUPINE": "AP_SUPINE",
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
    "": "UNKNOWN",
    "UNKNOWN": "UNKNOWN",
    "NONE": "UNKNOWN",
    "NAN": "UNKNOWN",
}
"""Texts after upper-casing, with hyphens and underscores as spaces. Any other text is OTHER."""


def view_of(raw: pl.Expr) -> pl.Expr:
    """The view that a raw text names."""
    text = raw.fill_null("").str.to_uppercase().str.replace_all(r"[\s_-]+", " ").str.strip_chars()
    return text.replace_strict(RAW_VIEWS, default="OTHER", return_dtype=pl.String)


def is_frontal(view: pl.Expr) -> pl.Expr:
    """True for frontal views, false for the others, null where the projection is not known."""
    return pl.when(~view.is_in(["UNKNOWN", "OTHER"])).then(view.is_in(list(FRONTAL_VIEWS)))
