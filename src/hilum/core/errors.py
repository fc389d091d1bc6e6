"""Every error a user can meet, as one tree.

HilumError
├── ConfigError                 a setting is wrong
│   └── UnknownNameError        a name that does not exist, with the nearest one that does
├── ManifestError               a table of images is wrong
│   ├── MissingColumnError
│   ├── UnknownLabelError
│   ├── PathError               a path leaves its root, or nothing is there
│   └── LeakageError            evaluation material is on the training side
├── ImageError                  one image file is wrong; carries a reason code for the quarantine list
│   ├── UnreadableImageError
│   └── UnsupportedImageError
├── StoreError                  a store is damaged, incomplete or of another kind
├── CheckpointError             weights or resume state do not fit or are damaged
│   └── PreprocessingMismatchError
├── NonFiniteLossError          training stopped before any weight moved
├── PeerError                   another process of the same run is gone
├── PredictionError             a prediction file is wrong or does not fit its labels
│   └── StageError              a step out of order (calibrated before combined, fitted on what it is judged by)
└── EmptyStudyError             a study without an image

A message says what was found, what was expected, where, and what to do. The command line prints it without a
traceback and exits with status 1.
"""

import difflib
from collections.abc import Iterable


class HilumError(Exception):
    """Base of every error that Hilum raises on purpose."""


class ConfigError(HilumError):
    """A setting is missing, of the wrong type or out of range."""


class UnknownNameError(ConfigError):
    """A name (recipe, source, finding, option) that does not exist.

    Args:
        kind: what was looked up, in the singular ("recipe", "source").
        name: what was asked for.
        known: the names that exist; the nearest is suggested.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names)}.")


class ManifestError(HilumError):
    """A table of images is inconsistent."""


class MissingColumnError(ManifestError):
    """A table lacks a column that its layout requires."""


class UnknownLabelError(ManifestError):
    """A label that the source's vocabulary does not contain."""


class PathError(ManifestError):
    """A path is absolute, leaves its root, or nothing is there."""


class LeakageError(ManifestError):
    """A patient, study or image of an evaluation set is on the training side."""


class ImageError(HilumError):
    """One image file cannot be used.

    Args:
        reason: short code for the quarantine list ("truncated", "zero_bytes", "no_pixel_data", ...).
        message: the full sentence.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class UnreadableImageError(ImageError):
    """The file is damaged, truncated or not an image."""


class UnsupportedImageError(ImageError):
    """The file is sound, and of a kind that Hilum refuses (several frames, CMYK, an unknown transfer syntax)."""


class StoreError(HilumError):
    """A store is damaged, incomplete or of another version."""


class CheckpointError(HilumError):
    """Weights or resume state do not fit the model, or are damaged."""


class PreprocessingMismatchError(CheckpointError):
    """A model names a preprocessing recipe that this version does not know."""


class NonFiniteLossError(HilumError):
    """A loss or gradient is NaN or infinite; nothing was updated."""


class PeerError(HilumError):
    """Another process of the run was killed, has left or does not answer."""


class PredictionError(HilumError):
    """A prediction file is malformed, or does not fit the labels or files it is used with."""


class StageError(PredictionError):
    """A step is out of order: calibrated predictions combined, or a calibrator judged on what it was fitted on."""


class EmptyStudyError(HilumError):
    """A study has no image."""
