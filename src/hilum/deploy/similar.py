"""Similar cases: an index of the study embeddings of a store, and exact search in it.

Rows are studies: float16 vectors of length 1, read through a memory map, and beside them who each study is and what it
is known to have. Every search looks at all of them (`nearest.py`). How an index is made: `index_building.py`; how
images become vectors: `embeddings.py`; the files: docs/how-to/similar-cases.md. A little past 300 lines: one class, and
every question that is asked of an index.
"""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Float16, Float32, Float64, UInt8

from hilum.core.errors import CheckpointError, ConfigError, StoreError, UnknownNameError
from hilum.core.files import read_json
from hilum.core.types import NEGATIVE, POSITIVE
from hilum.data.images import shrink
from hilum.data.store import Store
from hilum.deploy.encoder import Encoder
from hilum.deploy.nearest import nearest
from hilum.deploy.predictor import Model

FORMAT = "hilum-index-1"
HEADER_NAME, ROWS_NAME, STUDIES_NAME = "index.json", "rows.npz", "studies.npy"
THUMBNAIL = 256


@dataclass(frozen=True)
class Match:
    """One similar study."""

    row: int
    """Its place in the index."""
    similarity: float
    """Cosine of the embeddings, in [-1, 1]."""
    image_uid: str
    """Of the image that stands for the study: a frontal one where there is one."""
    image_id: str
    """The same by its source's own id."""
    study_id: str
    """As in the store, namespaced by dataset."""
    dataset: str
    view: str
    """Of all its images: LATERAL+PA."""
    findings: dict[str, int]
    """What is known: 1 or 0 by name; a finding that is not annotated is left out."""

    @property
    def positive(self) -> list[str]:
        """Names of the findings that are there."""
        return [name for name, code in self.findings.items() if code == POSITIVE]


class Index:
    """Studies that can be searched. Opened by `Index.open`.

    Args:
        path: its folder.
        header: of `index.json`.
        columns: of `rows.npz`.
        vectors: one per row, of length 1 before they were rounded.
        lengths: of the rounded ones, from the centre.
        centre: what all of them have in common, taken from rows and query before their cosine; zeros for [CLS].
        asked: the finding whose query pooled the vectors; None: [CLS].
    """

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        columns: Mapping[str, np.ndarray],
        vectors: Float16[np.ndarray, "N D"],
        lengths: Float32[np.ndarray, " N"],
        centre: Float32[np.ndarray, " D"],
        asked: str | None = None,
    ) -> None:
        self.path, self.header, self.vectors, self.asked = path, header, vectors, asked
        self.lengths, self.centre = lengths, centre
        self.labels: tuple[str, ...] = tuple(header["labels"])
        """Findings of the store that was indexed, in order."""
        self._columns = columns
        self._store: Store | None = None

    @classmethod
    def open(cls, path: Path | str) -> "Index":
        """Open an index made by `hilum index`. Vectors stay on disk until they are searched.

        Raises:
            ConfigError: no index, not finished, of another version, or files that do not belong together.
        """
        path = Path(path)
        if not (path / HEADER_NAME).is_file():
            raise ConfigError(
                f"{path} is not a finished index: it has no {HEADER_NAME}, which is written last. Make one: "
                f"hilum index MODEL --data STORE --out {path}."
            )
        header = read_json(path / HEADER_NAME, ConfigError)
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        if found != FORMAT:
            raise ConfigError(f"{path / HEADER_NAME}: expected format {FORMAT!r}, found {found!r}. Index again.")
        try:
            with np.load(path / ROWS_NAME, allow_pickle=False) as arrays:
                columns = {name: arrays[name] for name in arrays.files}
            vectors = _open_vectors(path / STUDIES_NAME, header["rows"], header["dim"])
            centre = np.zeros(header["dim"], np.float32)
            return cls(path, header, columns, vectors, columns[column_of("length", STUDIES_NAME)], centre)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{path} cannot be read: {error}. Index again, or copy it again.") from error

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        return f"Index({str(self.path)!r}, {len(self)} studies, {self.asked or 'images'})"

    @property
    def findings(self) -> tuple[str, ...]:
        """Findings whose queries were indexed: what `finding` takes."""
        return tuple(one["name"] for one in self.header["queries"])

    def finding(self, name: str) -> "Index":
        """The same studies by what one finding's query pools from them.

        A query brings most of it along itself, so that everything looks alike: the mean over the index is taken away.

        Raises:
            UnknownNameError: it was not indexed.
            ConfigError: its file is missing or damaged.
        """
        if name not in self.findings:
            if not self.findings:
                raise ConfigError(f"{self.path} was made without finding queries. Index again with --finding {name!r}.")
            raise UnknownNameError("finding of this index", name, self.findings)
        [entry] = [one for one in self.header["queries"] if one["name"] == name]
        try:
            vectors = _open_vectors(self.path / entry["file"], len(self), entry["dim"])
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path / entry['file']} cannot be read: {error}. Index again.") from error
        lengths, centre = (self._columns[column_of(kind, entry["file"])] for kind in ("length", "centre"))
        return Index(self.path, self.header, self._columns, vectors, lengths, centre, name)

    def matches(self, model: Model | Encoder) -> None:
        """Refuse a model whose embeddings mean something else than those of the index.

        A search by image needs the same backbone at the same resolution; one by a finding also the same head.

        Raises:
            CheckpointError: another one; or, for a finding, one that runs as an exported graph.
        """
        if isinstance(model, Model) and model.digest == self.header["model"]:
            if self.asked is not None:
                Encoder.of(model)  # an exported graph has no queries to ask with
            return
        encoder = Encoder.of(model)
        kind = "backbone" if self.asked is None else "head"
        if encoder.digest != self.header["backbone"] or (self.asked and encoder.head_digest != self.header["head"]):
            raise CheckpointError(
                f"{self.path} was made with model {self.header['model'] or 'unknown'} and holds embeddings of another "
                f"{kind}: they cannot be compared with those of this one. Use that model, or index again."
            )

    def search(
        self,
        query: Float[np.ndarray, " D"],
        count: int = 8,
        exclude: Sequence[str] = (),
        banned: Bool[np.ndarray, " N"] | None = None,
    ) -> list[Match]:
        """The nearest studies, the most similar first; of equal ones the lower row.

        The same as a float64 search over the stored vectors.

        Args:
            query: of a study, or of one finding in it (`finding`); any length.
            count: how many; fewer where there are no more.
            exclude: ids of patients, studies or images that are left out, with or without `DATASET/` before them.
            banned: rows that are left out as well, as `left_out` finds them.

        Raises:
            ConfigError: a query of another size, not finite or zero, or a count below 1.
        """
        if count < 1:
            raise ConfigError(f"count: expected at least 1, found {count}.")
        unit, left_out = self._unit(query), self.left_out(exclude)
        left_out = left_out if banned is None else left_out | banned
        rows, similarities = nearest(self.vectors, self.lengths, self.centre, unit, count, left_out)
        return [self.case(row, value) for row, value in zip(rows.tolist(), similarities.tolist(), strict=True)]

    def case(self, row: int, similarity: float = 1.0) -> Match:
        """One row of the index as a match.

        Raises:
            IndexError: no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is out of range for {self!r}")
        codes = self._columns["label"][row].tolist()
        return Match(
            row=row,
            similarity=min(max(similarity, -1.0), 1.0),
            image_uid=self._text("image_uid", row),
            image_id=self._text("image_id", row),
            study_id=self._text("study", row),
            dataset=self._named("dataset", row),
            view=self._named("view", row),
            findings={
                name: code for name, code in zip(self.labels, codes, strict=True) if code in (POSITIVE, NEGATIVE)
            },
        )

    def left_out(self, exclude: Sequence[str]) -> Bool[np.ndarray, " N"]:
        """Rows whose patient, study or image is among these ids, with or without `DATASET/` before them."""
        banned = np.zeros(len(self), bool)
        spaces = ["", *(f"{name.decode()}/" for name in self._columns["dataset_names"].tolist())]
        wanted = [f"{space}{one}".encode() for one in exclude if one for space in spaces]
        names = self._columns["patient_names"]
        for one in wanted:
            place = int(np.searchsorted(names, one)) if len(names) else 0
            if place < len(names) and names[place] == one:
                banned |= self._columns["patient"] == place
            banned |= (self._columns["study"] == one) | (self._columns["image_uid"] == one)
        return banned

    def own(self, paths: Sequence[str | Path]) -> list[str]:
        """Whose the indexed images are that these files are, by name: an image's id is the end of the file's path.

        So that a film that was indexed is not answered with itself and its patient's other films. An id without a
        suffix (MIMIC-CXR's) is compared with the file's name without its own.
        """
        ends: dict[bytes, None] = {}
        for path in paths:
            parts = PurePosixPath(Path(path).as_posix()).parts
            for start in range(len(parts)):
                whole = "/".join(parts[start:])
                ends |= {whole.encode(): None, str(PurePosixPath(whole).with_suffix("")).encode(): None}
        names, rows = self._columns["every_image_id"], self._columns["every_row"]
        asked = list(ends)
        starts, stops = (np.searchsorted(names, asked, side) for side in ("left", "right"))  # two datasets may share it
        met = {int(row) for start, stop in zip(starts, stops, strict=True) for row in rows[start:stop]}
        return sorted({self._named("patient", row) or self._text("study", row) or self._text("image_uid", row)
                       for row in met})  # fmt: skip

    def thumbnail(self, row: int, side: int = THUMBNAIL) -> UInt8[np.ndarray, "H W"]:
        """The image that stands for a study, from the store that was indexed, its longer side `side` pixels at most.

        Raises:
            StoreError: the store is gone, has changed, or the image's record is damaged; says which.
            IndexError: no such row.
        """
        case = self.case(row)
        store = self._opened()
        place = int(self._columns["store_index"][row])
        if place >= len(store) or store.uids[place] != case.image_uid:
            found = np.flatnonzero(store.uids == case.image_uid)
            if not len(found):
                raise StoreError(
                    f"{store.path} no longer holds image {case.image_uid} of {self.path}: the store was built again "
                    "from other images. Index it again."
                )
            place = int(found[0])
        pixels = store.read(place)
        shorter = round(side * min(pixels.shape) / max(pixels.shape))
        return shrink(pixels, max(shorter, 1))

    def _opened(self) -> Store:
        if self._store is None:
            recorded = self.header["store"]
            places = [self.path / recorded["relative"], Path(recorded["path"])]
            there = next((place for place in places if (place / "store.json").is_file()), None)
            if there is None:
                raise StoreError(
                    f"The store that was indexed is not at {places[1]} any more; thumbnails come from it. Put it back, "
                    "or index again where it is now."
                )
            self._store = Store.open(there)
        return self._store

    def _unit(self, query: np.ndarray) -> Float64[np.ndarray, " D"]:
        values = np.asarray(query, dtype=np.float64)
        if values.shape != self.vectors.shape[1:]:
            raise ConfigError(
                f"The query has shape {values.shape}, the vectors of {self!r} have {self.vectors.shape[1]} numbers: it "
                "was made by another model, or for another kind of search."
            )
        length = float(np.linalg.norm(values))
        if not np.isfinite(length) or length == 0 or (values / length == self.centre).all():
            raise ConfigError("The query is zero or not finite; nothing is similar to it.")
        return values / length

    def _text(self, name: str, row: int) -> str:
        return self._columns[name][row].decode()

    def _named(self, name: str, row: int) -> str:
        return self._columns[f"{name}_names"][self._columns[name][row]].decode()


def column_of(kind: Literal["length", "centre"], file: str) -> str:
    """Name in `rows.npz` of what belongs to a file of vectors."""
    return f"{kind}.{Path(file).stem}"


def _open_vectors(path: Path, rows: int, dim: int) -> Float16[np.ndarray, "N D"]:
    # Mapped for writing in memory alone (mode c): torch wants writable arrays, and the file stays as it is.
    vectors = np.load(path, mmap_mode="c", allow_pickle=False)
    if vectors.shape != (rows, dim) or vectors.dtype != np.float16:
        raise ValueError(f"expected float16 ({rows}, {dim}), found {vectors.dtype} {vectors.shape}")
    return vectors
