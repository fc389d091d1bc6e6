"""A study document as a page to read and to print: one HTML file that asks nothing of any network.

It has the look of the evaluation report, and computes nothing: numbers are those of the document, pictures come from
the caller. Nothing of a patient is on it that is not in the pictures themselves. Past 300 lines: one page, and the
words that explain it.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from hilum.deploy.overlays import COLOURS, heat, scale_of
from hilum.evaluation import report_assets as words
from hilum.evaluation.films import embed
from hilum.evaluation.markup import DASH, decimal, share, text
from hilum.evaluation.report import listing, page
from hilum.evaluation.report_rows import GROUPS, badge
from hilum.evaluation.thresholds import point_words
from hilum.evaluation.tracks import Position, bar_track

SIDE, HEAT_SIDE = 720, 240
"""Longest sides of an embedded view and of a map, pixels; a map is smooth."""
MOST_MAPS = 8
FEWEST_MAPS = 3
"""Maps are shown of the findings above their operating point, and of the most probable ones where these are fewer."""

NO_THRESHOLD = "no operating point"
LEAD = (
    "Probability of each finding in this study, and, as a line under the bar, how often the finding was present among "
    "the validation studies that scored alike (95 % interval)."
)
RAW_LEAD = "<b>These scores are not calibrated: they order studies and are no probabilities.</b>"
POINT_LEAD = " The tick is its operating point: {point} on the patients it was chosen on. Above it: bold."
MAPS_LEAD = (
    "Where the model looked for a finding, one scale for all images of the study. It is not a segmentation and does "
    "not say why: a right answer can be read from the wrong place."
)
PROBABILITY = (
    "Probability", "Of the whole study, calibrated on validation patients. It is no diagnosis, and holds for people "
    "like those of validation: elsewhere the same number can mean something else.",
)  # fmt: skip
SCORE = (
    "Score", "Of the whole study, from 0 to 1, not calibrated: it is no probability and no diagnosis. It orders "
    "studies by one finding, and says nothing across findings.",
)  # fmt: skip
POINT = (
    "Operating point", "A {score} from which on a finding is called present. The tick is {point} on the "
    "patients it was chosen on; others are in the file beside this page. A rare finding has a low one.",
)  # fmt: skip
READING = (
    ("Interval", "Among the validation studies whose score was nearest, the share in which the finding was present, "
     "with its 95 % interval (Wilson). It says how sure the validation is, not how sure anybody is of this study. "
     "Where it is missing, the model has too few validation studies or keeps none."),
    ("Images", "An image that does not look like an upright chest X-ray takes no part, and says so. The share of an "
     "image is its part in the study's {score}."),
    ("Head, medium, tail", "By share of training images: over 10 %, 1 to 10 %, under 1 %."),
)  # fmt: skip


def study_page(
    document: Mapping[str, Any],
    pixels: Sequence[UInt8[np.ndarray, "_ _"]],
    maps: Mapping[str, Sequence[Float[np.ndarray, "_ _"]] | None] | None = None,
    facts: Mapping[str, str] | None = None,
) -> str:
    """The page as text.

    Args:
        document: as `study_document` makes it.
        pixels: of each whole image as it is displayed, of any size.
        maps: by finding, one for each image, covering the `box` of the document (`StudyResult.attention`),
            scaled by what each image contributes (`overlays.of_study`).
        facts: name -> value, for the end of the page.

    Raises:
        ValueError: pixels of another number of images.
    """
    images = document["study"]["images"]
    if len(pixels) != len(images):
        raise ValueError(f"pixels of {len(pixels)} images for a document of {len(images)}")
    films = [_Film(f"image-{image['number']}", one) for image, one in zip(images, pixels, strict=True)]
    shown = [one for one in _leading(document) if one["has_map"] and (maps or {}).get(one["name"]) is not None]
    point = drawn_point(document)
    calibrated, has_points = document["model"]["calibrated"], bool(document["model"]["operating_points"])
    lead = (LEAD if calibrated else RAW_LEAD) + (POINT_LEAD.format(point=point_words(point)) if has_points else "")
    withheld = document["status"] == "withheld"
    answers = _withheld(document) if withheld else _answers(document)
    parts = [
        ("findings", "Findings", "" if withheld else lead, answers),
        ("images", "Images", "", _sheet(films, images)),
    ]
    if shown and maps:
        drawn = "".join(_map(one, maps[one["name"]] or (), films, document, _is_above(one, point)) for one in shown)
        key = words.examples_controls(False).replace("highest in the study", "strongest in the study")
        parts.append(("examples", "Maps", MAPS_LEAD, key + drawn))
    score = _score_word(document)
    explained = (PROBABILITY if calibrated else SCORE, *((POINT,) if has_points else ()), *READING)
    reading = "".join(
        f"<div><h3>{heading}</h3><p>{body.format(point=point_words(point), score=score)}</p></div>"
        for heading, body in explained
    )
    parts.append(("reading", "How to read this page", "", f'<div class="reading">{reading}</div>'))
    parts.append(("provenance", "Provenance", "", listing(_provenance(document, facts or {}))))
    definitions = "".join(film.definition() for film in films)
    hidden = f'<svg class="definitions" aria-hidden="true"><defs>{definitions}</defs></svg>'
    notes = [flag["message"] for flag in document["flags"] if flag["code"] != "withheld"]
    return page(f"Study {document['study']['id']}", _masthead(document) + hidden, parts, notes, _style())


@cache
def _style() -> str:
    """The packaged style, and the key of the maps in the colours that the maps have."""
    css = resources.files("hilum.deploy").joinpath("study_page.css").read_text(encoding="utf-8").strip()
    stops = ", ".join(
        f"rgb({r} {g} {b}) {round(100 * n / 255)}%" for n in range(0, 256, 51) for r, g, b in [COLOURS[n]]
    )
    return f"{css}\n.heat-key i {{ background: linear-gradient(90deg, {stops}); }}"


class _Film:
    """One view: embedded once, shown wherever it is wanted with something over it."""

    def __init__(self, name: str, pixels: UInt8[np.ndarray, "H W"]) -> None:
        scale = min(SIDE / max(pixels.shape), 1.0)
        self.name, self.pixels = name, pixels
        self.height, self.width = (max(round(side * scale), 1) for side in pixels.shape)

    def definition(self) -> str:
        small = cv2.resize(self.pixels, (self.width, self.height), interpolation=cv2.INTER_AREA)
        picture = embed(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 88])
        return f'<image id="{self.name}" width="{self.width}" height="{self.height}" href="{picture}"/>'

    def frame(self, label: str, over: str = "") -> str:
        return (
            f'<svg class="frame-film" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{text(label)}">'
            f'<use href="#{self.name}"/>{over}</svg>'
        )

    def heat(self, values: Float[np.ndarray, "h w"], box: Sequence[float], scale: tuple[float, float]) -> str:
        share_of = HEAT_SIDE / max(self.height, self.width)
        rows, columns = (max(round(side * share_of), 1) for side in (self.height, self.width))
        top, left, height, width = box
        rgba = heat(values, (top, left, height, width), rows, columns, scale)
        picture = embed(".png", rgba[..., [2, 1, 0, 3]], [cv2.IMWRITE_PNG_COMPRESSION, 9])
        return (
            f'<image class="heat" width="{self.width}" height="{self.height}" preserveAspectRatio="none" '
            f'href="{picture}"/>'
        )


def _leading(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The findings whose maps are shown."""
    known = sorted(
        (one for one in document["findings"] if one["probability"] is not None), key=lambda one: -one["probability"]
    )
    above = [one for one in known if _is_above(one, drawn_point(document))]
    return (above if len(above) >= FEWEST_MAPS else above + [one for one in known if one not in above])[
        : max(FEWEST_MAPS, min(len(above), MOST_MAPS))
    ]


def drawn_point(document: Mapping[str, Any]) -> str:
    """The operating point that pages draw and captures go by: the model's first."""
    return next(iter(document["model"]["operating_points"]), "f1")


def _score_word(document: Mapping[str, Any]) -> str:
    return "probability" if document["model"]["calibrated"] else "score"


def _is_above(finding: Mapping[str, Any], point: str) -> bool:
    return bool((finding["above"] or {}).get(point))


def _masthead(document: Mapping[str, Any]) -> str:
    model, images = document["model"], document["study"]["images"]
    known = [one for one in document["findings"] if one["probability"] is not None]
    point = drawn_point(document)
    judged = [one for one in known if point in (one["above"] or {})]
    above = f"{sum(_is_above(one, point) for one in judged)} of {len(judged)}"
    facts = [
        ("Study", document["study"]["id"]),
        ("Images", f"{sum(image['scored'] for image in images)} of {len(images)} scored"),
        ("Findings", f"{len(known)} of {len(document['findings'])} scored"),
        *([("Above their point", above)] if judged else []),
        ("Scores", "calibrated" if model["calibrated"] else "not calibrated"),
        ("Model", model["digest"]),
        ("Status", "withheld" if document["status"] == "withheld" else "preliminary, read by nobody"),
    ]
    details = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts)
    return (
        f'<header class="masthead"><div class="inner"><div class="words"><p class="maker">{words.BRAND}Hilum</p>'
        f"<h1>What a model says of one study</h1><dl>{details}</dl></div></div></header>"
    )


def _withheld(document: Mapping[str, Any]) -> str:
    messages = [flag["message"] for flag in document["flags"] if flag["code"] == "withheld"]
    return f'<p class="withheld">{text(" ".join(messages) or "Nothing was scored.")}</p>'


def _answers(document: Mapping[str, Any]) -> str:
    point = drawn_point(document)

    def order(finding: Mapping[str, Any]) -> tuple[bool, bool, float]:
        return finding["probability"] is None, not _is_above(finding, point), -(finding["probability"] or 0.0)

    rows = "".join(_answer(one, point) for one in sorted(document["findings"], key=order))
    head = "".join(
        f"<th{kind}>{name}</th>"
        for name, kind in (
            ("Finding", ""), ("0 to 1", ""), ("Probability", ' class="number"'), ("On validation", ' class="number"'),
            ("Operating point", ' class="number"'), ("Remarks", ""),
        )
    )  # fmt: skip
    if not document["model"]["calibrated"]:
        head = head.replace("Probability", "Score")
    return (
        '<div class="scroll"><table class="plain findings answers" data-sortable><thead><tr>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _answer(finding: Mapping[str, Any], point: str) -> str:
    probability, cut = finding["probability"], (finding["thresholds"] or {}).get(point)
    kind = "absent" if probability is None else "above" if _is_above(finding, point) else "below"
    mark = badge(finding["group"]) if finding["group"] in GROUPS else ""
    if probability is None:
        remark = "not scored" if finding["trained"] else "this model was never trained for it"
    else:
        judged = NO_THRESHOLD if cut is None else "above its operating point" if kind == "above" else ""
        remark = "; ".join(part for part in (judged, finding["calibration_flag"]) if part)
    ends = finding["interval"]
    between = f"{share(ends[0])} to {share(ends[1])}" if ends else DASH
    return (
        f'<tr class="{kind}"><th scope="row" data-sort="{text(finding["name"])}">{mark}{text(finding["name"])}</th>'
        f'<td class="bar-cell" data-sort="{_key(probability)}">{_bar(finding, cut)}</td>'
        f'<td class="number" data-sort="{_key(probability)}">{share(probability)}</td>'
        f'<td class="number" data-sort="{_key(ends[0] if ends else None)}">{between}</td>'
        f'<td class="number" data-sort="{_key(cut)}">{share(cut)}</td>'
        f'<td class="words" data-sort="{text(remark)}">{text(remark)}</td></tr>'
    )


def _bar(finding: Mapping[str, Any], cut: float | None) -> str:
    probability, ends = finding["probability"], finding["interval"]
    label = f"{finding['name']}: {decimal(probability)}, operating point {decimal(cut)}"
    drawn = bar_track(probability, threshold=cut, label=label)
    if not ends:
        return drawn
    scale = Position(0.0, 1.0)
    line = f'<line class="interval" x1="{scale(ends[0])}%" x2="{scale(ends[1])}%" y1="80%" y2="80%"/>'
    return drawn.removesuffix("</svg>") + f"{line}</svg>"


def _key(value: float | None) -> str:
    return "" if value is None else repr(value)


def _sheet(films: Sequence[_Film], images: Sequence[Mapping[str, Any]]) -> str:
    figures = []
    for film, image in zip(films, images, strict=True):
        said = {"given": "", "header": "from its header", "classifier": "told by the model"}.get(
            image["view_source"], ""
        )
        facts = [f"{image['rows']} x {image['columns']} pixels", said]
        facts.append(f"weight {share(image['weight'])}" if image["scored"] else "took no part")
        flags = "".join(f'<span class="flag">{text(flag["message"])}</span>' for flag in image["flags"])
        label = f"Image {image['number']}, {image['view']}"
        figures.append(
            f"<figure>{film.frame(label)}<figcaption><b>{text(label)}</b> "
            f"{text(', '.join(part for part in facts if part))}{flags}</figcaption></figure>"
        )
    return f'<div class="sheet views-{min(len(films), 4)}">{"".join(figures)}</div>'


def _map(
    finding: Mapping[str, Any],
    maps: Sequence[Float[np.ndarray, "_ _"]],
    films: Sequence[_Film],
    document: Mapping[str, Any],
    is_above: bool,
) -> str:
    images, score = document["study"]["images"], _score_word(document)
    used = [place for place, image in enumerate(images) if image["scored"]]
    scale = scale_of([maps[place] for place in used])
    shares = {image["number"]: image["contribution"] for image in finding["images"]}
    figures = []
    for place in used:
        image, film = images[place], films[place]
        label = f"Image {image['number']}, {image['view']}"
        part = shares.get(image["number"])
        said = f"{share(part)} of the study's {score}" if part is not None and len(used) > 1 else ""
        over = film.heat(maps[place], image["box"], scale)
        spoken = f"{label}: where the model looked for {finding['name']}"
        figures.append(
            f"<figure>{film.frame(spoken, over)}<figcaption><b>{text(label)}</b> {text(said)}</figcaption></figure>"
        )
    above = "above its operating point" if is_above else ""
    return (
        f'<section class="finding-map"><header><h3>{text(finding["name"])}</h3>'
        f"<p>{share(finding['probability'])} {above}</p></header>"
        f'<div class="sheet views-{min(len(used), 4)}">{"".join(figures)}</div></section>'
    )


def _provenance(document: Mapping[str, Any], facts: Mapping[str, str]) -> list[tuple[str, str]]:
    model = document["model"]
    return [
        *facts.items(),
        ("format", document["format"]),
        ("model", model["digest"]),
        ("hilum", model["hilum"]),
        ("calibrated", "yes" if model["calibrated"] else "no"),
        ("accepted leak", model["accepted_leak"] or "none"),
    ]
