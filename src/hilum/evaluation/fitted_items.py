"""On which items something was fitted or chosen, and that nothing is judged on them.

Ids are kept as short digests: enough to tell whether an item was among them, too little to say who it was.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hilum.core.errors import StageError
from hilum.evaluation.predictions import Predictions

DIGEST_BYTES = 6


def fingerprint(uids: Iterable[str]) -> str:
    """Hex SHA-256 of the sorted ids: the same for the same set, whatever the order."""
    return hashlib.sha256("\n".join(sorted(str(uid) for uid in uids)).encode()).hexdigest()


def describe_items(uids: Iterable[str]) -> dict[str, Any]:
    """What a calibrator keeps of the items it was fitted on: fingerprint, count, and a short digest of each id."""
    names = sorted({str(uid) for uid in uids})
    packed = b"".join(sorted(_digest(name) for name in names))
    return {"fingerprint": fingerprint(names), "items": len(names), "digests": base64.b64encode(packed).decode()}


def merge_items(described: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Several `describe_items` as one, of every item that is in any; None of none.

    One that holds all others stands as it is. Else the ids are gone, so the fingerprint is that of the digests, which
    `items` counts.
    """
    if not described:
        return None
    digests = set().union(*map(_digests, described))
    whole = next((one for one in described if _digests(one) == digests), None)
    if whole is not None:
        return dict(whole)
    every = sorted(digests)
    return {
        "fingerprint": fingerprint(one.hex() for one in every),
        "items": len(every),
        "digests": base64.b64encode(b"".join(every)).decode(),
    }


def _digest(uid: str) -> bytes:
    return hashlib.sha256(uid.encode()).digest()[:DIGEST_BYTES]


def are_among(uids: Iterable[str], fitted_on: Mapping[str, Any]) -> bool:
    """Whether something was fitted on each of these items (and perhaps on more)."""
    seen = _digests(fitted_on)
    return all(_digest(str(uid)) in seen for uid in uids)


def _digests(fitted_on: Mapping[str, Any]) -> set[bytes]:
    packed = base64.b64decode(fitted_on["digests"])
    return {packed[start : start + DIGEST_BYTES] for start in range(0, len(packed), DIGEST_BYTES)}


def check_out_of_sample(predictions: Predictions, fitted_on: Mapping[str, Any], what: str) -> None:
    """Refuse to judge predictions by something that was fitted on any of their items.

    Raises:
        StageError: with the number of items in both.
    """
    seen = _digests(fitted_on)
    both = [uid for uid in predictions.image_uid.tolist() if _digest(uid) in seen]
    if both:
        raise StageError(
            f"{what} was fitted on {len(both)} of the {len(predictions)} evaluated items (for example {both[0]!r}); "
            "nothing is judged on what it was fitted on. Evaluate the uncalibrated file, or items of another split."
        )
