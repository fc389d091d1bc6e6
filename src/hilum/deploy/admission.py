"""What becomes of a picture before a network sees it: scored, turned back first, or withheld; and which view it is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from hilum.deploy.gradients import gradient_map, turned
from hilum.deploy.screening import INVERTED, NOT_SCREENED, Flag, Screening

VIEW_SOURCES = ("given", "header", "classifier", "unknown")
"""Where a view is known from: the caller or a table; a DICOM header; the view classifier; nowhere."""
_NOT_SCREENED = Flag(NOT_SCREENED, "This model cannot tell chest X-rays from other pictures; nobody has looked.")


class Admission(NamedTuple):
    """What becomes of one picture."""

    pixels: UInt8[np.ndarray, "H W"] | None
    """What the networks shall see; None: nothing, it is withheld."""
    view: str
    view_source: str
    """One of `VIEW_SOURCES`."""
    flags: tuple[Flag, ...]


@dataclass(frozen=True)
class Gate:
    """Decides what becomes of pictures. A flagged one is withheld, unless something else is said."""

    screening: Screening | None
    """None: nothing is known, everything is scored and flagged as not screened."""
    score_flagged: bool = False
    """Score flagged pictures as they are; they stay flagged."""
    correct_inverted: bool = False
    """Exchange bright and dark of inverted ones, and score them; they stay flagged."""

    def admit(self, pixels: UInt8[np.ndarray, "H W"], view: str, view_source: str) -> Admission:
        """What becomes of a picture.

        Args:
            pixels: display values.
            view: one of `core.types.VIEWS`; "" or UNKNOWN where nobody has said.
            view_source: who has said it.
        """
        known = view not in ("", "UNKNOWN")
        view, source = (view, view_source) if known else ("UNKNOWN", "unknown")
        if self.screening is None:
            return Admission(pixels, view, source, (_NOT_SCREENED,))
        maps = gradient_map(pixels)[None]
        flag = self.screening.judge(maps)[0].flag
        shown: np.ndarray | None = pixels
        if flag is not None and flag.code == INVERTED and self.correct_inverted:
            flag = Flag(INVERTED, f"{flag.message} They were exchanged back before it was scored.")
            shown, maps = 255 - pixels, turned(maps, "inverted")
        elif flag is not None and not self.score_flagged:
            shown = None
        if not known and shown is not None and self.screening.views is not None:
            view = self.screening.views.name(maps)[0]
            source = "classifier" if view != "UNKNOWN" else "unknown"
        return Admission(shown, view, source, () if flag is None else (flag,))


class Flagged(NamedTuple):
    """A flag of one image among those that were asked for."""

    position: int
    flag: Flag
    scored: bool


@dataclass(frozen=True)
class RawReading:
    """What the networks of a model say of N images: before studies, ensembles and calibration."""

    kept: Int64[np.ndarray, " N"]
    """Positions among the images that were asked for, ascending: those that could be read and were not withheld."""
    probabilities: list[Float64[np.ndarray, "N C"]]
    """Raw, of each network."""
    views: np.ndarray
    """(N,) one of `core.types.VIEWS`."""
    view_sources: np.ndarray | None = None
    """(N,) one of `VIEW_SOURCES`; None where nobody asked."""
    flagged: list[Flagged] = field(default_factory=list)
    """By position; withheld images among them. Images that were not screened are not listed."""

    @classmethod
    def join(cls, parts: Sequence["RawReading"]) -> "RawReading":
        """Readings of parts of the same images as one; positions stay as they are."""
        order = np.argsort(np.concatenate([part.kept for part in parts]), kind="stable")
        sources = [part.view_sources for part in parts if part.view_sources is not None]
        return cls(
            kept=np.concatenate([part.kept for part in parts])[order],
            probabilities=[
                np.concatenate(values)[order] for values in zip(*(p.probabilities for p in parts), strict=True)
            ],
            views=np.concatenate([part.views for part in parts])[order],
            view_sources=np.concatenate(sources)[order] if len(sources) == len(parts) else None,
            flagged=sorted((one for part in parts for one in part.flagged), key=lambda one: one.position),
        )
