"""Chest X-rays as features for scikit-learn: a transformer that learns nothing and holds a path, not weights."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from sklearn.base import BaseEstimator, TransformerMixin

from hilum.core.errors import CheckpointError, ConfigError, UnknownNameError
from hilum.data.store import Store
from hilum.deploy.embeddings import embed_many, study_means
from hilum.deploy.encoder import Encoder, load_encoder
from hilum.deploy.inputs import resolve
from hilum.deploy.network import Read, store_identity
from hilum.deploy.study_images import decode
from hilum.evaluation.studies import study_uids

WHATS = ("cls", "patch-mean", "study")


class ChestXrayFeatures(TransformerMixin, BaseEstimator):
    """Embeddings of chest X-rays by a backbone, as a scikit-learn transformer.

    Works in a `Pipeline`, with `clone`, `set_output` and in worker processes: it is copied and pickled by the path of
    the weights, and loads them where it is used. `fit` learns nothing; it checks the weights and remembers which they
    are, and a fitted one refuses others.

    Args:
        model: path of a MODEL, an ensemble (its first network is used), a pretraining run, or weights as
            `hilum.load_backbone` takes them.
        what: cls ([CLS] of the last block) or patch-mean (mean patch token), as the backbone gives them; study: the
            mean of the L2-normalised [CLS] of the images of a study, normalised again.
        batch_size: images at a time.
        device: auto, cpu or cuda.
        workers: threads that read images.
        resolution: of a backbone alone: side of the squares it sees, pixels; None: what it was trained for.

    Attributes:
        n_features_out_: numbers of an embedding.
        digest_: identity of the backbone, its resolution and its recipe.
    """

    def __init__(
        self,
        model: str | Path = "model",
        what: str = "cls",
        *,
        batch_size: int = 32,
        device: str = "auto",
        workers: int = 2,
        resolution: int | None = None,
    ) -> None:
        self.model = model
        self.what = what
        self.batch_size = batch_size
        self.device = device
        self.workers = workers
        self.resolution = resolution

    def fit(self, X: Any = None, y: Any = None) -> "ChestXrayFeatures":  # noqa: N803 (scikit-learn's name)
        """Load the weights and remember which they are; images and targets are not looked at.

        Raises:
            UnknownNameError: no such `what`.
            CheckpointError: weights that are absent or damaged.
            ConfigError: a setting out of range, or a loaded model in place of its path.
        """
        del X, y
        self._check()
        encoder = self._load()
        self.n_features_out_ = encoder.dim
        self.digest_ = encoder.digest
        return self

    def transform(self, X: Any) -> Float32[np.ndarray, "N D"]:  # noqa: N803
        """Embed images; needs no `fit` before it.

        Args:
            X: one of

                - a sequence of images: paths or contents of DICOM, PNG or JPEG files, uint8 (H, W) arrays;
                - a uint8 array (N, H, W);
                - with `what="study"`, a sequence of studies, each a sequence of images or one image;
                - a store: a `Store`, or the text "STORE:split". Rows are its images in its order; with
                  `what="study"` its studies, in the order in which they first come.

        Raises:
            ImageError: an image cannot be used; names it by its position. Nothing is left out: rows belong to inputs.
            ConfigError: X is none of these, or empty.
            CheckpointError: the weights are not those that `fit` has seen.
        """
        self._check()
        encoder = self._load()
        if hasattr(self, "digest_") and encoder.digest != self.digest_:
            raise CheckpointError(
                f"{self.model} does not hold the weights that this transformer was fitted with: what came after it was "
                "trained on other features. Put them back, or fit again."
            )
        read, groups = self._inputs(X, encoder)
        studies = groups if self.what == "study" else None  # its images come together
        positions, parts = [], []
        for places, found in embed_many(
            encoder, np.arange(len(groups)), read, (), studies, None, self.batch_size, self.workers
        ):
            if self.what == "study":
                rows, values = study_means(found.cls, groups[places])
            else:
                rows, values = places, found.cls if self.what == "cls" else found.patch_mean
            positions.append(rows)
            parts.append(values)
        return np.concatenate(parts)[np.argsort(np.concatenate(positions))]

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the columns: cls_0000, cls_0001, ...; `input_features` is not looked at."""
        del input_features
        width = self.n_features_out_ if hasattr(self, "n_features_out_") else self._load().dim
        stem = self.what.replace("-", "_")
        return np.array([f"{stem}_{number:04d}" for number in range(width)], dtype=object)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the weights."""
        state = dict(super().__getstate__())
        state.pop("_loaded", None)
        return state

    def __sklearn_is_fitted__(self) -> bool:
        """Always: there is nothing to learn."""
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.no_validation = True
        tags.input_tags.one_d_array = tags.input_tags.three_d_array = tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.transformer_tags.preserves_dtype = []
        return tags

    def _check(self) -> None:
        if not isinstance(self.model, str | os.PathLike):
            raise ConfigError(
                f"model: expected the path of a model or a backbone, found {type(self.model).__name__}. A path is what "
                "can be cloned and sent to other processes."
            )
        if self.what not in WHATS:
            raise UnknownNameError("kind of embedding (what)", str(self.what), WHATS)
        if self.batch_size < 1 or self.workers < 1:
            raise ConfigError(f"batch_size, workers: expected at least 1, found {self.batch_size}, {self.workers}.")

    def _load(self) -> Encoder:
        """The encoder, kept with what it was loaded for."""
        asked = (str(self.model), self.device, self.resolution)
        if getattr(self, "_loaded", (None, None))[0] != asked:
            self._loaded = (asked, load_encoder(self.model, self.device, self.resolution))
        return self._loaded[1]

    def _inputs(self, X: Any, encoder: Encoder) -> tuple[Read, np.ndarray]:  # noqa: N803
        """How image n is read, and which row of the result it goes to, ascending."""
        if isinstance(X, str):
            found = resolve([X])
            if found.store is None:
                raise ConfigError(f"{X!r} is one path. Give a list of images, or STORE:split.")
            return self._stored(found.store, found.indices, encoder)
        if isinstance(X, Store):
            return self._stored(X, np.arange(len(X)), encoder)
        if isinstance(X, np.ndarray) and not (X.dtype == object or X.dtype.kind in "US" or X.ndim == 3):
            raise ConfigError(
                f"Expected images: a list of paths or of uint8 arrays (H, W), a uint8 array (N, H, W), or a store; "
                f"found an array of {X.dtype} {X.shape}."
            )
        if not isinstance(X, Iterable) or isinstance(X, bytes | Path):
            raise ConfigError(f"Expected a list of images, or a store; found {type(X).__name__}.")
        listed = list(X)
        if not listed:
            raise ConfigError("There is no image to embed: an empty list.")
        images, rows = [], []
        for row, item in enumerate(listed):
            several = self.what == "study" and isinstance(item, list | tuple)
            for image in item if several else [item]:
                images.append(image)
                rows.append(row)
            if several and not item:
                raise ConfigError(f"Study {row} has no image.")
        return self._given(images, encoder), np.array(rows, dtype=np.int64)

    @staticmethod
    def _given(images: Sequence[Any], encoder: Encoder) -> Callable[[int], np.ndarray]:
        for number, image in enumerate(images):
            if not isinstance(image, str | Path | bytes | np.ndarray):
                raise ConfigError(
                    f"Image {number}: expected a path, the bytes of a file or a uint8 array (H, W); found "
                    f"{type(image).__name__}. A study is a list of images, with what='study'."
                )

        def read(position: int) -> np.ndarray:
            image = images[position]
            given = str(image) if isinstance(image, np.str_) else image
            return decode(given, position, encoder.short_side, encoder.preprocess_id)[0]

        return read

    def _stored(self, store: Store, indices: np.ndarray, encoder: Encoder) -> tuple[Read, np.ndarray]:
        store.check_recipe(encoder.preprocess_id)
        if not len(indices):
            raise ConfigError(f"{store.path} has no images to embed.")

        def read(position: int) -> np.ndarray:
            return store.read(int(indices[position]))

        if self.what != "study":
            return read, np.arange(len(indices))
        identity = store_identity(store, indices)
        uids = study_uids(*(identity[name] for name in ("dataset", "patient_id", "study_id", "image_uid")))
        _, first, number = np.unique(uids, return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        return read, rank[number.reshape(-1)]
