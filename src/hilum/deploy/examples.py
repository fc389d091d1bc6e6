"""Studies to look at: what a model says of a stored study, where it looked, and what is true, for the report.

Chooses studies by the predictions it is given and explains them with the model; decides nothing and scores nothing.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from hilum.core.types import POSITIVE
from hilum.data.labels import NORMAL_NAMES
from hilum.data.store import Store
from hilum.deploy.overlays import of_study
from hilum.deploy.predictor import Model
from hilum.deploy.study_images import Box
from hilum.evaluation.predictions import Predictions
from hilum.evaluation.report import ExampleFinding, ReportExample
from hilum.evaluation.studies import study_uids

Masks = Callable[[str, str], Bool[np.ndarray, "H W"] | None]
"""(image_id, finding) -> the lesion in the source image, or None."""
SHOWN_NEGATIVES = 2
"""Findings that are absent and yet among the most probable, shown beside the present ones."""


def choose_studies(predictions: Predictions, labels: Int[np.ndarray, "N C"], count: int) -> list[np.ndarray]:
    """Row numbers of up to `count` studies, for each another finding that is present; several views first.

    Findings take turns from the rarest to the most common; the study is the one that the model ranks highest, except
    for every third finding, where it is the one ranked in the middle of its positives, so that misses are seen too.
    """
    p = predictions
    keys = study_uids(p.dataset, p.patient_id, p.study_id, p.image_uid)
    views = {key: int(size) for key, size in zip(*np.unique(keys, return_counts=True), strict=True)}
    positives = (labels == POSITIVE).sum(axis=0)
    turns = [
        column
        for column in np.argsort(positives, kind="stable").tolist()
        if positives[column] and predictions.trained[column] and predictions.findings[column] not in NORMAL_NAMES
    ]
    chosen: list[str] = []
    for turn, column in enumerate(_spread(turns, count)):
        rows = np.flatnonzero(labels[:, column] == POSITIVE)
        rows = rows[~np.isin(keys[rows], chosen)]
        if not len(rows):
            continue
        several = rows[[views[keys[row]] > 1 for row in rows]]
        candidates = several if len(several) else rows
        ranked = candidates[np.argsort(-predictions.probabilities[candidates, column], kind="stable")]
        chosen.append(keys[ranked[len(ranked) // 2 if turn % 3 == 2 else 0]])
    return [np.flatnonzero(keys == key) for key in chosen]


def _spread(turns: Sequence[int], count: int) -> Iterator[int]:
    """`count` of the turns at even distances, the most common first."""
    if turns:
        picks = np.unique(np.linspace(0, len(turns) - 1, min(count, len(turns))).round().astype(int))
        yield from (turns[pick] for pick in reversed(picks))


def explain_study(
    model: Model,
    store: Store,
    indices: Sequence[int] | Int[np.ndarray, " _"],
    title: str,
    masks: Masks | None = None,
    threshold: str = "f1",
) -> ReportExample:
    """One study of a store as an example for the report.

    Args:
        model: gives probabilities, thresholds and, if its head attends, maps.
        store: where the images are.
        indices: the images of one study.
        title: without patient identifiers.
        masks: true lesions; None where the data have none.
        threshold: which operating point.
    """
    views = [store.read(int(index)) for index in indices]
    names = [str(store.views[index]) for index in indices]
    result = model.predict(views, view_names=names, score_flagged=True)  # somebody has chosen what is in a store
    codes = store.labels[list(indices)].max(axis=0)  # of the study: positive where any image is
    truth = dict(zip(store.findings, codes.tolist(), strict=True))
    present = [name for name in result.findings if truth.get(name) == POSITIVE]
    absent = sorted(
        (name for name in result.findings if name not in present and result.probabilities[name] is not None),
        key=lambda name: -(result.probabilities[name] or 0.0),
    )
    findings = []
    for name in [*present, *absent[:SHOWN_NEGATIVES]]:
        operating_point = result.thresholds[name]
        maps = result.attention[name]
        attention = None if maps is None else of_study(maps, result.contributions[name])
        findings.append(
            ExampleFinding(
                name=name,
                probability=result.probabilities[name],
                threshold=operating_point[threshold] if operating_point else None,
                truth=truth.get(name),
                attention=tuple(attention) if attention else (None,) * len(views),
                masks=tuple(
                    _in_box(masks(str(store.image_ids[index]), name) if masks else None, box)
                    for index, box in zip(indices, result.boxes, strict=True)
                ),
            )
        )
    return ReportExample(
        title=title,
        views=tuple(_cut(view, box) for view, box in zip(views, result.boxes, strict=True)),
        view_names=tuple(str(store.views[index]) for index in indices),
        findings=tuple(findings),
        outlined=masks is not None,
    )


def _cut(pixels: np.ndarray, box: Box) -> np.ndarray:
    """The part of an image that the model looked at."""
    top, left, height, width = box
    rows, columns = pixels.shape
    first, start = round(top * rows), round(left * columns)
    return pixels[first : first + round(height * rows), start : start + round(width * columns)]


def _in_box(mask: np.ndarray | None, box: Box) -> np.ndarray | None:
    if mask is None:
        return None
    inside = _cut(mask, box)
    return inside if inside.any() else None
