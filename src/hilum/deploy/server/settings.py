"""What the server allows: sizes, times, places in line, and who may ask. One object each, given once at the start."""

from dataclasses import dataclass, field

from hilum.data.containers import MAX_PIXELS

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine by which no other machine can reach it."""
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Limits:
    """How much one request, and all of them together, may take. Bytes, seconds, counts."""

    files: int = 20
    """Images of one study."""
    file_bytes: int = 64 * MEBIBYTE
    """Of one file as it is sent."""
    study_bytes: int = 256 * MEBIBYTE
    """Of all files of one request."""
    held_bytes: int = 512 * MEBIBYTE
    """Of all requests that are being received or wait."""
    pixels: int = MAX_PIXELS
    """Of one image as its header declares it (`data.containers`)."""
    queue: int = 8
    """Studies that wait or are worked on; one more is refused with 503."""
    connections: int = 256
    """Open at once, whatever they do."""
    header_seconds: float = 10.0
    """Until a request's headers have arrived."""
    body_seconds: float = 30.0
    """Until its body has arrived, and one more second for every mebibyte that has."""
    send_seconds: float = 30.0
    """Until a client takes a piece of an answer."""
    decode_seconds: float = 10.0
    """For one file, by the clock and of the processor."""
    decode_memory: int = 1024 * MEBIBYTE
    """Address space of the decoding process beyond what it has when it starts."""
    display_pixels: int = 1024
    """Longer side of an image as the page shows it."""
    results: int = 16
    """Studies that are remembered; the oldest goes first."""
    result_bytes: int = 256 * MEBIBYTE
    """What they may take together."""
    result_seconds: float = 3600.0
    """How long one is remembered."""
    wrong_tokens: int = 20
    """From one address in a minute; then 429."""


@dataclass(frozen=True)
class Settings:
    """Who may ask, and under which name."""

    token: str | None = None
    """What every request must show; None: anyone on this machine may ask."""
    hosts: tuple[str, ...] = LOOPBACK
    """Names and addresses, in lower case and without port, that the Host header may hold."""
    limits: Limits = field(default_factory=Limits)
