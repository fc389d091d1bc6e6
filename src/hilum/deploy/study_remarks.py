"""What a study document says against itself, in words, for formats that leave the page which shows it in its places."""

from collections.abc import Mapping
from typing import Any


def remarks(document: Mapping[str, Any]) -> list[str]:
    """Messages about the study, its model's training, and each image, in this order.

    Args:
        document: as `study_document` makes it.
    """
    leak = document["model"]["accepted_leak"]
    return [
        *(flag["message"] for flag in document["flags"]),
        *([f"Accepted leak: {leak}"] if leak else []),
        *(
            f"Image {image['number']}: {flag['message']}"
            for image in document["study"]["images"]
            for flag in image["flags"]
        ),
    ]
