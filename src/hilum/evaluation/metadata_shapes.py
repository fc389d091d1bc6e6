"""The shape of what a prediction file says besides its numbers, of every key that some program here reads.

What the keys mean: docs/reference/predictions.md. The same for other programs: `predictions.schema.json` beside this
file. Keys that are not listed may hold anything.
"""

import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from hilum.core.errors import PredictionError

Check = Callable[[Any], bool]
_DIGESTS = re.compile(r"[0-9A-Za-z+/]*")
"""Base64 of 6 bytes, so 8 letters, for each item."""


def check_shapes(metadata: Mapping[str, Any]) -> None:
    """Raise PredictionError, with what was found and expected, for the first key whose value has another shape."""
    for key, (fits, words) in SHAPES.items():
        if key in metadata and not fits(metadata[key]):
            raise PredictionError(f"Prediction metadata has {key} {reprlib.repr(metadata[key])}; expected {words}.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_member(value: Any) -> bool:
    weight = value.get("weight", 1) if isinstance(value, dict) else None
    return isinstance(weight, int | float) and not isinstance(weight, bool)


def _is_items(value: Any) -> bool:
    """What `fitted_items.describe_items` gives: without the digests nothing can be kept from being judged on them."""
    digests = value.get("digests") if isinstance(value, dict) else None
    return isinstance(digests, str) and _DIGESTS.fullmatch(digests) is not None and len(digests) % 8 == 0


def _is_calibration(value: Any) -> bool:
    return isinstance(value, dict) and (not value.get("fitted_on") or _is_items(value["fitted_on"]))


def _list_of(fits: Check) -> Check:
    return lambda value: isinstance(value, list | tuple) and all(map(fits, value))


def _object_of(fits: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


TEXT = (_is_text, "text")
ITEMS = "an object with the `digests` of the items, as hilum calibrate and hilum combine write it"
SHAPES: dict[str, tuple[Check, str]] = {
    "model": TEXT,
    "split": TEXT,
    "accepted_leak": TEXT,
    "uncalibrated": TEXT,
    "exposure_not_recorded": TEXT,
    "study_aggregation": TEXT,
    "ensemble": TEXT,
    "scale": TEXT,
    "normal_damping": TEXT,
    "exposed_images": (_is_count, "a whole number of at least 0"),
    "head_splits": (_list_of(_is_text), "a list of names of splits"),
    "members": (_list_of(_is_member), "a list of objects, whose `weight`, where there is one, is a number"),
    "groups": (_object_of(_is_text), "an object: finding -> head, medium or tail"),
    "prevalence": (_object_of(_is_share), "an object: finding -> share in [0, 1]"),
    "thresholds": (_object_of(_object_of(_is_share)), "an object: finding -> operating point -> number in [0, 1]"),
    "calibration": (_is_calibration, f"an object whose `fitted_on` is null or {ITEMS}"),
    "chosen_on": (_is_items, ITEMS),
}
"""Key -> whether a value has its shape, and that shape in words."""
