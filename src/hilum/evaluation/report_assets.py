"""What the report says in words, and its packaged style and script. Numbers and layout are elsewhere."""

from importlib import resources


def asset(name: str) -> str:
    """A text file packaged beside this module (`report.css`, `report.js`)."""
    return resources.files("hilum.evaluation").joinpath(name).read_text(encoding="utf-8").strip()


BRAND = (
    '<svg class="brand" viewBox="0 0 32 32" aria-hidden="true"><path d="M16 3V29M16 13C11 13 8 10 6 5'
    "M16 13C21 13 24 10 26 5M16 18C10 18 7 20 4 24M16 18C22 18 25 20 28 24M10.5 11.6C8 13 6 13.5 3 13.5"
    'M21.5 11.6C24 13 26 13.5 29 13.5"/></svg>'
)
"""Vessels leaving the hilum."""

STEPS = "What each step of the pipeline adds."
STEPS_NOTE = (
    "Arrows say which way is better; the best value of a column is bold. Differences are paired over the same "
    "patients, with 95 % intervals; <b>not shown</b> (hollow mark) means that the interval includes zero."
)
DIFFERENCES_NOTE = (
    "<b>Not shown</b>: the 95 % interval of that finding includes zero. With many findings some intervals leave out "
    "zero by chance; p is corrected for their number (Holm), bold under 0.05."
)
OVERVIEW = (
    "Each finding on one line: average precision on the left, area under the ROC curve on the right, with 95 % "
    "intervals. Findings run from the most to the least common inside each group."
)
NUMBERS = (
    "The same, in figures, with 95 % intervals. Click a heading to sort. A dash is a value that is not defined, with "
    "the reason beside the name."
)
PRECISION = (
    "From left to right, more of the true cases are found; the height is the share of true cases among those found so "
    "far. The dashed line is the prevalence, where guessing would lie. The tinted area is AP."
)
RELIABILITY = "Whether a probability can be taken at its word."
RELIABILITY_NOTE = (
    "A dot is one of fifteen equal bins of predicted probability: its height is how often the finding was really "
    "there. On the dashed line the two agree; above it the model is too shy, below it too bold. The whisker is the "
    "95 % interval of that share, and the bars below count the items (square-root scale): a dot that rests on three "
    "items may sit anywhere. Axes end at 0.1, 0.25 or 0.5 where nothing lies beyond."
)
THRESHOLDS = (
    "A threshold turns a probability into a yes or a no. Each finding has its own, chosen on validation patients, so "
    "that F1 is highest there; none was chosen on the patients of this page. A well-calibrated rare finding seldom "
    "reaches 0.5, so its best threshold lies far below: that is expected, and it is why F1 at 0.5 says little about "
    "the tail."
)


def examples_lead(mapped: bool, outlined: bool) -> str:
    """What the example studies show.

    Args:
        mapped: some finding has an attention map.
        outlined: the data have outlines of lesions.
    """
    if not mapped and not outlined:
        return "Each study as it came, with the model's probabilities. This model has no maps to show."
    beside = "what is truly there (outline)." if outlined else "the same view: these data have no outlines of lesions."
    return (
        "Each study first as it came, with the model's probabilities; then, finding by finding, where the model read "
        f"(colour) beside {beside} Colour has one scale for all views of a finding, so the view that carried it is "
        "the bright one."
    )


def examples_controls(outlined: bool) -> str:
    """Strength of the overlay, its key, and with `outlined` a box that draws the outline over the attention."""
    box = '<label><input type="checkbox" id="outline"> outline on the map too</label>' if outlined else ""
    return (
        '<div class="panel-row"><div class="controls" hidden>'
        f'<label>Overlay <input type="range" id="heat" min="0" max="100" value="85"></label>{box}</div>'
        '<p class="heat-key"><span>median or below</span><i aria-hidden="true"></i>'
        "<span>highest in the study</span></p></div>"
    )


_READING: tuple[tuple[str, str], ...] = (
    (
        "AP",
        "Average precision: the mean of precision over recall. It rewards putting the true cases first and is hard to "
        "earn when they are rare; guessing earns the prevalence. mAP is its plain mean over findings.",
    ),
    (
        "AUC",
        "The chance that a positive is scored above a negative. Guessing earns 0.5. It hardly feels prevalence, so a "
        "rare finding can have a high AUC and still a low AP.",
    ),
    (
        "F1",
        "Balance of precision and recall at one threshold: at 0.5 for all findings, or at each finding's own from "
        "validation (tuned). Missed is the share of true cases under that threshold (1 - sensitivity), false alarms "
        "the share of all others above it (1 - specificity).",
    ),
    (
        "ECE",
        "Expected calibration error: how far predicted probability and observed share lie apart, on average over 15 "
        "equal bins. Lower is better. The challenge's own mECE is inferred from its leaderboard; a well-calibrated "
        "model does badly on it, so it is given for comparison only. The calibration slope is 1 where probabilities "
        "spread as they should, below 1 where they are too extreme, above 1 where too timid.",
    ),
    (
        "Intervals",
        "95 %, from resampling whole patients. Two models whose intervals overlap may still differ; the paired "
        "difference is the fair comparison. &ldquo;Not shown&rdquo; means that the data at hand cannot tell. "
        "Resampling adds scatter that ECE counts as error, so its interval lies high and may leave out its own value.",
    ),
    (
        "Head, medium, tail",
        "By share of training images: over 10 %, 1 to 10 %, under 1 %. An undefined value is left out of every mean.",
    ),
    (
        "Attention",
        "Which patches the classifier read for a finding. It is not a segmentation and does not say why: a right "
        "answer can be read from the wrong place. Where the data have outlines of lesions, they stand beside it to "
        "show that.",
    ),
    (
        "Present, absent, flagged, missed",
        "Flagged: probability above the threshold. Present and absent are the reference labels, which may themselves "
        "be wrong where they come from reports.",
    ),
)
READING = "".join(f"<div><h3>{heading}</h3><p>{words}</p></div>" for heading, words in _READING)
READING = f'<div class="reading">{READING}</div>'
