"""What a model says of one study, as `Model.predict` gives it. Holds values; decides nothing."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from hilum.core.types import RESEARCH_NOTICE
from hilum.deploy.screening import Flag
from hilum.deploy.study_images import Box


@dataclass(frozen=True)
class StudyResult:
    """What a model says of one study. Research use only; not a medical device."""

    findings: tuple[str, ...]
    """Names, in the model's order."""
    probabilities: dict[str, float | None]
    """Of the study, in [0, 1]; None for a finding that was never trained."""
    image_probabilities: list[dict[str, float | None]]
    """Of each view alone, calibrated as images are (or raw); a head that looks at whole studies gives all the same."""
    view_weights: list[float]
    """What each view contributes to `probabilities` by the model's study rule; they add up to 1. Equal ones say nothing
    where the head itself weighs views."""
    contributions: dict[str, list[float] | None]
    """The part of each view in a finding's probability, adding up to 1 (`study_images.contributions`); None for a
    finding that was never trained, and for heads that look at whole studies where maps were not asked for."""
    attention: dict[str, list[Float[np.ndarray, "h w"]] | None]
    """Where the answer came from (docs/explanation/where-it-looked.md): one map per view on the patch grid, 0 or more,
    each summing to 1; together, where a head looks at whole studies. None where untrained, or not asked for. Maps cover
    `boxes`."""
    boxes: list[Box]
    """Per view, the part of the image that was looked at: top, left, height, width as shares of its sides."""
    thresholds: dict[str, dict[str, float] | None]
    """Operating points (f1, youden, sens_at_spec95) for `probabilities`, from validation."""
    flags: dict[str, str]
    """Findings whose calibration has a reservation, with the reason."""
    quality: list[tuple[str, ...]]
    """Per view, flags of the decoder (constant, polarity_suspect, ...)."""
    views: list[str]
    """Per view, which one it is (`core.types.VIEWS`)."""
    view_sources: list[str]
    """Per view, who says so (`admission.VIEW_SOURCES`): given, header, classifier, unknown."""
    image_flags: list[list[Flag]]
    """Per view, what screening says of the picture: inverted, turned, not_a_chest_xray, not_screened."""
    scored: list[bool]
    """Per view, whether it took part. One that did not has weight and contributions of 0, no probabilities, and maps of
    zeros; where none did, every probability is None."""
    embedding: Float32[np.ndarray, " D"] | None
    """Mean over the scored views of the first network's [CLS] of the last block, each of length 1, and so the mean.
    None where no view was scored."""
    calibrated: bool
    """Whether calibrators were applied."""
    model: str
    """Identity of the model."""
    notice: str = RESEARCH_NOTICE
