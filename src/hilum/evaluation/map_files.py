"""Map files: where a model's answers came from, for chosen pairs of image and finding of a store.

`hilum explain` writes them, `hilum evaluate --maps` reads them; neither reader nor writer knows a model or a region.
The format is in docs/reference/maps.md.
"""

import json
import zipfile
import zlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from hilum.core.errors import PredictionError
from hilum.core.files import atomic_file
from hilum.core.types import RESEARCH_NOTICE

FORMAT = "hilum-maps-1"


@dataclass(frozen=True)
class Maps:
    """M maps of pairs of an image and a finding, on one grid.

    Args:
        image_uid: (N,) of the images, unique.
        image_id: (N,) the source's own ids.
        findings: C names.
        image: (M,) position of each map's image.
        finding: (M,) position of its finding.
        maps: values, 0 or more; of any scale, since a map is judged by its shares.
        boxes: the part of each image that its maps cover: top, left, height, width as shares of its sides.
        metadata: `model`, `kind` ("attention" or "evidence"), `over` ("image" or "study": what a map sums to 1 over),
            and whatever else is worth keeping; JSON values.

    Raises:
        PredictionError: lengths, positions or values that cannot be, or a pair that occurs twice.
    """

    image_uid: np.ndarray
    image_id: np.ndarray
    findings: tuple[str, ...]
    image: Int[np.ndarray, " M"]
    finding: Int[np.ndarray, " M"]
    maps: Float[np.ndarray, "M h w"]
    boxes: Float[np.ndarray, "N 4"]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count, pairs = len(self.image_uid), len(self.maps)
        if (len(self.image_id), self.boxes.shape) != (count, (count, 4)) or not (
            len(self.image) == len(self.finding) == pairs
        ):
            raise PredictionError(
                f"Maps of {count} images and {pairs} pairs need as many ids, boxes and positions; found "
                f"{len(self.image_id)} ids, boxes of shape {self.boxes.shape}, {len(self.image)} and "
                f"{len(self.finding)} positions."
            )
        for positions, limit in ((self.image, count), (self.finding, len(self.findings))):
            if pairs and (int(positions.min()) < 0 or int(positions.max()) >= limit):
                raise PredictionError(f"A map belongs to an image or finding that is not there (0 to {limit - 1}).")
        distinct = set(zip(self.image.tolist(), self.finding.tolist(), strict=True))
        if len(set(self.image_uid.tolist())) < count or len(distinct) < pairs:
            raise PredictionError("An image, or a pair of image and finding, occurs twice among the maps.")
        if not (np.isfinite(self.maps).all() and (self.maps >= 0).all() and (self.maps.sum(axis=(1, 2)) > 0).all()):
            raise PredictionError("Every map must be finite, 0 or more, and more than 0 somewhere.")
        if not ((self.boxes[:, 2:] > 0).all() and (self.boxes >= 0).all()):
            raise PredictionError("Every box needs a height and a width above 0.")

    def __len__(self) -> int:
        return len(self.maps)


def write_maps(maps: Maps, path: Path) -> None:
    """Write a `.npz`: values in float16, each map scaled by its highest value so that none is lost.

    The scale is kept beside them, in float32.
    """
    peak = maps.maps.reshape(len(maps), -1).max(axis=1, initial=0) if len(maps) else np.zeros(0)
    header = {"format": FORMAT, "notice": RESEARCH_NOTICE, **maps.metadata}
    arrays = {
        "image_uid": maps.image_uid.astype(str), "image_id": maps.image_id.astype(str),
        "findings": np.array(maps.findings, dtype=str), "image": maps.image.astype(np.int32),
        "finding": maps.finding.astype(np.int32), "peak": peak.astype(np.float32),
        "maps": (maps.maps / peak[:, None, None]).astype(np.float16), "boxes": maps.boxes.astype(np.float64),
        "header": np.frombuffer(json.dumps(header, allow_nan=False).encode(), np.uint8),
    }  # fmt: skip
    with atomic_file(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_maps(path: Path) -> Maps:
    """Read what `write_maps` wrote.

    Raises:
        PredictionError: no such file, another kind or version, or damaged.
    """
    try:
        with np.load(BytesIO(Path(path).read_bytes()), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        header = json.loads(arrays["header"].tobytes().decode())
        found = header.pop("format")
        if found != FORMAT:
            raise PredictionError(f"{path} is of format {found!r}; this Hilum reads {FORMAT!r}. Make it again.")
        values = arrays["maps"].astype(np.float64) * arrays["peak"].astype(np.float64)[:, None, None]
        return Maps(
            arrays["image_uid"], arrays["image_id"], tuple(arrays["findings"].tolist()), arrays["image"],
            arrays["finding"], values, arrays["boxes"], header,
        )  # fmt: skip
    except FileNotFoundError:
        raise PredictionError(
            f"{path} does not exist. Make it with `hilum explain MODEL STORE:test --maps {path}`."
        ) from None
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, zipfile.BadZipFile, zlib.error) as error:
        raise PredictionError(
            f"{path} cannot be read as a map file ({type(error).__name__}). Make it again."
        ) from error
    except PredictionError as error:
        raise PredictionError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
