"""What the server says when it does not do what it was asked: fixed sentences in one shape, no word of the input.

`{"error": {"code": ..., "message": ..., "image": number or null}}`. A message never repeats a header, a name of a file,
a field or a path: they may name a patient, and they may be an attack on whoever reads them.
"""

import json
from collections.abc import Mapping

REASONS: tuple[str, ...] = (
    "zero_bytes", "not_an_image", "truncated", "damaged", "damaged_header", "too_large", "multi_frame",
    "unsupported_mode", "no_pixel_data", "size_mismatch", "unsupported_transfer_syntax", "missing_decoder",
    "unsupported_pixels", "decoder_crashed", "decoder_slow",
)  # fmt: skip
"""Why an image can be refused (`data/images.py`), and the two ways in which the decoding process can fail."""


class RefusedError(Exception):
    """An answer that is not what was asked for.

    Args:
        status: HTTP status, 4xx or 5xx.
        code: a short name for programs.
        message: a sentence for people, of our own words only.
        image: number of the image that is meant, counted from 1.
        headers: to send with it.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        image: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(code)
        self.status, self.code, self.message, self.image = status, code, message, image
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """As it is sent."""
        return json.dumps({"error": {"code": self.code, "message": self.message, "image": self.image}}).encode()


def busy(code: str, message: str, seconds: float) -> RefusedError:
    """503 with the time after which to try again, seconds."""
    return RefusedError(503, code, message, headers={"Retry-After": str(max(1, min(60, round(seconds))))})


STATUS: dict[int, tuple[str, str]] = {
    400: ("bad_request", "The request cannot be understood."),
    404: ("not_found", "There is nothing here. Studies are remembered for a while only: send the images again."),
    405: ("method_not_allowed", "This address does not take that method."),
    422: ("invalid", "A value in the address is not one that is possible there."),
    500: ("internal", "Something went wrong in the server. Its log says where."),
}
"""What is said of a status that a framework, not we, decided on."""


def standard(status: int) -> RefusedError:
    """The refusal of a status without a sentence of its own."""
    code, message = STATUS.get(status, ("refused", "The request was refused."))
    return RefusedError(status, code, message)
