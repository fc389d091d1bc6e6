"""Example studies of the report: films, attention overlays, lesion outlines, probability bars.

A view is embedded once, as a JPEG of at most 320 pixels, and reused wherever it is shown. Attention is a transparent
PNG over it, the true lesion an outline. This module chooses no studies and reads no files; the caller passes arrays
and a title without patient identifiers.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from hilum.evaluation.markup import decimal, finite, share, text
from hilum.evaluation.tracks import bar_track

FILM_SIDE = 320
"""Longest side of an embedded view, in pixels."""
HEAT_SIDE = 160
"""Longest side of an embedded overlay; it is smooth, so the browser's own enlargement loses nothing."""
HEAT_STEPS = 64
HEAT_CLEAR = 0.1
"""Share of the highest attention below which an overlay is fully clear."""


@dataclass(frozen=True)
class ExampleFinding:
    """What the model said about one finding of a study, and what is true."""

    name: str
    probability: float | None
    """None or NaN: this model was never trained for the finding."""
    threshold: float | None
    """From validation; above it, the finding is flagged."""
    truth: int | None
    """1, 0; None or any other code: not annotated."""
    attention: tuple[Float[np.ndarray, "_ _"] | None, ...]
    """One map per view, of any size and scale, covering the whole view; None where there is none."""
    masks: tuple[Bool[np.ndarray, "_ _"] | None, ...]
    """True lesion per view, in the view's pixels; None where there is none."""


@dataclass(frozen=True)
class ReportExample:
    """One study of any number of views."""

    title: str
    """Without patient identifiers."""
    views: tuple[UInt8[np.ndarray, "_ _"], ...]
    view_names: tuple[str, ...]
    findings: tuple[ExampleFinding, ...]
    outlined: bool = True
    """Whether the data have outlines of lesions at all; False where a mask is never there."""


def study(example: ReportExample, number: int) -> str:
    """One study as an article: views beside all probabilities, then attention beside the true outline per finding."""
    prefix = f"study-{number}"
    films = [_Film(f"{prefix}-view-{index}", pixels) for index, pixels in enumerate(example.views)]
    definitions = "".join(film.definition() for film in films)
    plain = "".join(
        f'<figure class="film">{film.frame("", name)}<figcaption>{text(name)}</figcaption></figure>'
        for film, name in zip(films, example.view_names, strict=True)
    )
    rows = "".join(_probability_row(finding) for finding in example.findings)
    details = "".join(_maps(finding, example, films) for finding in example.findings if _has_maps(finding))
    views = f"{len(films)} view" + ("s" if len(films) != 1 else "")
    return (
        f'<article class="study" id="{prefix}"><header><h3>{text(example.title)}</h3><p>{views}: '
        f"{text(', '.join(example.view_names))}</p></header>"
        f'<svg class="definitions" aria-hidden="true"><defs>{definitions}</defs></svg>'
        f'<div class="study-top views-{min(len(films), 4)}"><div class="films">{plain}</div>'
        f'<table class="probabilities"><thead><tr><th>Finding</th><th>Probability, threshold</th>'
        f'<th class="number">p</th><th>Truth</th></tr></thead><tbody>{rows}</tbody></table></div>'
        f'<div class="maps views-{min(len(films), 4)}">{details}</div></article>'
    )


def poster(example: ReportExample) -> str:
    """The views of one study with the overlay of its most attended true finding; for the head of the page.

    Uses the definitions of `study(example, 1)` on the same page.
    """
    films = [_Film(f"study-1-view-{index}", pixels) for index, pixels in enumerate(example.views)][:2]
    mapped = [finding for finding in example.findings if _has_maps(finding)]
    mapped.sort(key=lambda finding: (finding.truth != 1, -(finite(finding.probability) or 0.0)))
    levels = heat_levels(mapped[0].attention) if mapped else tuple(None for _ in example.views)
    shown = zip(films, levels[:2], example.view_names[:2], strict=True)
    frames = [film.frame(_heat(level, film), name) for film, level, name in shown]
    caption = f"{text(mapped[0].name)}: where the model read" if mapped else text(example.title)
    return f'<figure class="poster"><div>{"".join(frames)}</div><figcaption>{caption}</figcaption></figure>'


def heat_levels(
    maps: Sequence[Float[np.ndarray, "_ _"] | None],
) -> tuple[Float[np.ndarray, "_ _"] | None, ...]:
    """Attention of one finding over all views of a study, from 0 (median or below) to 1 (highest in the study).

    One scale for all views, so that the view that carried the finding is the bright one. A map without a peak (all
    values equal) gives zeros.
    """
    given = [np.nan_to_num(np.asarray(part, np.float64)) for part in maps if part is not None]
    if not given:
        return tuple(None for _ in maps)
    values = np.concatenate([part.ravel() for part in given])
    low, high = float(np.median(values)), float(values.max())
    scale = high - low
    remaining = iter(given)
    return tuple(
        None if part is None else np.clip((next(remaining) - low) / scale, 0, 1) if scale > 0 else 0 * next(remaining)
        for part in maps
    )


def attention_inside(
    maps: Sequence[Float[np.ndarray, "_ _"] | None], masks: Sequence[Bool[np.ndarray, "_ _"] | None]
) -> tuple[float, float] | None:
    """Share of the attention inside the outlines, and the share of the area they take, over views that have both.

    None where no view has both, where the mask is empty, or where a map has negative values (a share means nothing).
    """
    weight = inside = area = covered = 0.0
    for part, mask in zip(maps, masks, strict=True):
        if part is None or mask is None or not mask.any():
            continue
        if not np.isfinite(part).all() or part.min() < 0:
            return None
        fraction = cv2.resize(mask.astype(np.float32), part.shape[::-1], interpolation=cv2.INTER_AREA)
        weight += float(part.sum())
        inside += float((part * fraction).sum())
        area += fraction.size
        covered += float(fraction.sum())
    return (inside / weight, covered / area) if weight > 0 and area else None


def outline(mask: Bool[np.ndarray, "H W"], width: int, height: int) -> str:
    """The edge of a mask as an SVG path in a frame of `width` x `height`; empty for an empty mask.

    The mask is enlarged first, so that a single pixel keeps a visible outline around it.
    """
    factor = 2
    size = (width * factor, height * factor)
    growing = size[0] >= mask.shape[1]
    method = cv2.INTER_LINEAR if growing else cv2.INTER_AREA
    smooth = cv2.resize(mask.astype(np.float32), size, interpolation=method)
    # A thin lesion must not vanish when the view is shrunk: a pixel that holds a quarter of it counts.
    inside = (smooth >= (0.5 if growing else 0.25)).astype(np.uint8)
    padded = cv2.copyMakeBorder(inside, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    contours, _ = cv2.findContours(padded, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    paths = []
    for contour in contours:
        corners = cv2.approxPolyDP(contour, 0.7, True).reshape(-1, 2)
        points = (np.clip(corners - 1, 0, np.array(size) - 1) + 0.5) / factor
        paths.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z")
    return "".join(sorted(paths))


class _Film:
    """One embedded view: a small picture under an id, and frames that show it with something on top."""

    def __init__(self, name: str, pixels: UInt8[np.ndarray, "H W"]) -> None:
        scale = min(FILM_SIDE / max(pixels.shape), 1.0)
        self.name = name
        self.height, self.width = (max(round(side * scale), 1) for side in pixels.shape)
        self.pixels = pixels

    def definition(self) -> str:
        small = cv2.resize(self.pixels, (self.width, self.height), interpolation=cv2.INTER_AREA)
        picture = embed(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 86])
        return f'<image id="{self.name}" width="{self.width}" height="{self.height}" href="{picture}"/>'

    def frame(self, content: str, label: str) -> str:
        return (
            f'<svg class="frame-film" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{text(label)}">'
            f'<use href="#{self.name}"/>{content}</svg>'
        )


def _heat(level: Float[np.ndarray, "h w"] | None, film: _Film) -> str:
    """The overlay of one map: inferno colours, clear where attention is low, bicubic between patches."""
    if level is None:
        return ""
    scale = HEAT_SIDE / max(film.height, film.width)
    size = (max(round(film.width * scale), 1), max(round(film.height * scale), 1))
    smooth = np.clip(cv2.resize(level.astype(np.float32), size, interpolation=cv2.INTER_CUBIC), 0, 1)
    steps = np.round(smooth * HEAT_STEPS) / HEAT_STEPS  # fewer colours: a third of the bytes, no visible edge
    colour = cv2.applyColorMap((70 + 185 * steps).astype(np.uint8), cv2.COLORMAP_INFERNO)
    ramp = np.clip((steps - HEAT_CLEAR) / 0.8, 0, 1) ** 0.7
    alpha = (215 * ramp).astype(np.uint8)
    picture = embed(".png", np.dstack([colour, alpha]), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    return (
        f'<image class="heat" width="{film.width}" height="{film.height}" preserveAspectRatio="none" href="{picture}"/>'
    )


def embed(suffix: str, pixels: UInt8[np.ndarray, "..."], options: list[int]) -> str:
    """Pixels as a `data:` address that holds a picture file.

    Args:
        suffix: .jpg or .png.
        pixels: grey (H, W), or blue-green-red (H, W, 3), or with alpha (H, W, 4).
        options: of OpenCV's writer.
    """
    done, encoded = cv2.imencode(suffix, pixels, options)
    assert done
    kind = {".jpg": "jpeg", ".png": "png"}[suffix]
    return f"data:image/{kind};base64,{base64.b64encode(encoded.tobytes()).decode()}"


def _has_maps(finding: ExampleFinding) -> bool:
    return any(part is not None for part in finding.attention) or any(mask is not None for mask in finding.masks)


def verdict(finding: ExampleFinding) -> tuple[str, str]:
    """A CSS class and words for how the decision at the threshold compares with the truth."""
    probability = finite(finding.probability)
    known = finding.truth in (0, 1)
    if probability is None:
        return "none", "not trained"
    if not known:
        return "none", "not annotated"
    if finding.threshold is None:
        return "none", "present" if finding.truth else "absent"
    flagged = probability > finding.threshold
    if finding.truth:
        return ("right", "present, flagged") if flagged else ("wrong", "present, missed")
    return ("wrong", "absent, flagged") if flagged else ("right", "absent, not flagged")


def _probability_row(finding: ExampleFinding) -> str:
    probability, (kind, words) = finite(finding.probability), verdict(finding)
    label = f"{finding.name}: probability {decimal(probability)}, threshold {decimal(finding.threshold)}, {words}"
    bar = bar_track(probability, threshold=finding.threshold, label=label)
    return (
        f'<tr><th scope="row">{text(finding.name)}</th><td>{bar}</td>'
        f'<td class="number">{decimal(probability, 2)}</td><td class="verdict {kind}">{text(words)}</td></tr>'
    )


def _maps(finding: ExampleFinding, example: ReportExample, films: Sequence[_Film]) -> str:
    kind, words = verdict(finding)
    levels = heat_levels(finding.attention)
    pairs = []
    for film, name, level, mask in zip(films, example.view_names, levels, finding.masks, strict=True):
        path = outline(mask, film.width, film.height) if mask is not None else ""
        edge = f'<path class="lesion halo" d="{path}"/><path class="lesion" d="{path}"/>' if path else ""
        again = f'<g class="also">{edge}</g>' if edge else ""
        heat = film.frame(_heat(level, film) + again, f"{name}: where the model looked for {finding.name}")
        outlined = f"{name}: true outline of {finding.name}" if edge else f"{name}: nothing outlined"
        truth = film.frame(edge, outlined if example.outlined else name)
        left = "where it looked" if level is not None else "no map"
        unseen = "no outline in this view" if example.outlined else "the same view"
        right = "true lesion" if edge else "absent" if finding.truth == 0 else unseen
        pairs.append(
            f'<div class="pair"><figure>{heat}<figcaption><b>{text(name)}</b> {left}</figcaption></figure>'
            f"<figure>{truth}<figcaption>{right}</figcaption></figure></div>"
        )
    inside = attention_inside(finding.attention, finding.masks)
    note = "" if inside is None else (
        f"{share(inside[0])} of the map lies inside the outline, which takes {share(inside[1])} of the area."
    )  # fmt: skip
    return (
        f'<section class="map"><header><h4>{text(finding.name)}</h4>'
        f'<p><span class="number">p = {decimal(finite(finding.probability), 2)}</span> '
        f'<span class="verdict {kind}">{text(words)}</span></p></header>'
        f'<div class="pairs">{"".join(pairs)}</div><p class="note">{note}</p></section>'
    )
