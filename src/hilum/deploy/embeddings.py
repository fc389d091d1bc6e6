"""Images to embeddings: of many images, of one study, of what one finding's query pools from it, and study means.

Cosines are what embeddings are compared by: of a study, the mean of the L2-normalised embeddings of its images,
normalised again. What makes them: `encoder.py`; searching them: `similar.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int64, UInt8

from hilum.core.errors import EmptyStudyError
from hilum.core.types import view_kind
from hilum.data.store import Indices
from hilum.deploy.encoder import Embedded, Encoder
from hilum.deploy.network import Read
from hilum.deploy.predictor import Model
from hilum.deploy.study_images import Image, decode, view_names_of
from hilum.heads.batches import in_order
from hilum.heads.features import read_ahead, to_batch


def embed_many(
    encoder: Encoder,
    indices: Indices,
    read: Read,
    findings: Sequence[str] = (),
    studies: np.ndarray | None = None,
    views: np.ndarray | None = None,
    batch_size: int = 32,
    workers: int = 2,
    done: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[Int64[np.ndarray, " B"], Embedded]]:
    """Embeddings of many images, batch by batch; each image is decoded once, by threads, ahead of its use.

    Args:
        encoder: what makes them.
        indices: what `read` takes.
        read: decoded pixels of an image, uint8 (H, W), or None to leave it out.
        findings: also what the queries of these pool.
        studies: (N,) study of each; its images then come in one batch. None: every image is one.
        views: (N,) names (`core.types.VIEWS`); None: not known. Heads that look at views see those that the model's
            view classifier names, where nobody has.
        batch_size: images at a time; a study that does not fit makes a larger batch.
        workers: threads that read.
        done: told how many images were finished, after each batch.

    Yields:
        positions in `indices` (those that were left out are missing), and their embeddings.
    """
    chosen = np.asarray(list(indices), dtype=np.int64)
    number = None if studies is None else np.unique(studies, return_inverse=True)[1].reshape(-1)
    said = ["UNKNOWN"] * len(chosen) if views is None else views.tolist()
    kinds = np.array([view_kind(name) for name in said], dtype=np.int64)

    def square(position: int) -> np.ndarray | None:
        pixels = read(int(chosen[position]))
        if pixels is None:
            return None
        if findings:  # before the head of its batch asks for it
            kinds[position] = view_kind(encoder.view_of(pixels, said[position]))
        return encoder.crop(pixels)

    batches = (batch.images for batch in in_order(np.arange(len(chosen)), batch_size, number))
    for positions, squares in read_ahead(batches, square, workers):
        seen = positions[[one is not None for one in squares]]
        if len(seen):
            images = to_batch([one for one in squares if one is not None])
            study = None if number is None else np.unique(number[seen], return_inverse=True)[1].reshape(-1)
            yield seen, encoder.read(images, findings, study, kinds[seen])
        done(len(positions))


def embed_images(model: Model | Encoder, images: Sequence[Image] | Image) -> Float32[np.ndarray, "V D"]:
    """L2-normalised [CLS] of each image.

    Args:
        model: or an encoder.
        images: paths or contents of DICOM, PNG or JPEG files, or uint8 (H, W) arrays.

    Raises:
        EmptyStudyError: no image.
        ImageError: one cannot be used; names it by its position.
    """
    encoder = Encoder.of(model)
    squares = to_batch([encoder.crop(pixels) for pixels in _decoded(encoder, _listed(images))])
    return unit(encoder.read(squares).cls)


def embed_study(model: Model | Encoder, images: Sequence[Image] | Image) -> Float32[np.ndarray, " D"]:
    """The embedding of one study: the mean of `embed_images`, normalised again. What `Index.search` takes."""
    return mean_of(embed_images(model, images))


def embed_finding(
    model: Model | Encoder, images: Sequence[Image] | Image, name: str, view_names: Sequence[str] | None = None
) -> Float32[np.ndarray, " E"]:
    """What one finding's query pools from a study: the mean over its images of L2-normalised vectors, normalised again.

    Of a decoder, what it makes of the patch tokens before the finding's class weights; of other heads the mean of the
    last block's patch tokens, weighted by the finding's map. What `Index.finding(name).search` takes.

    Args:
        model: or the encoder of one.
        images: as `embed_images`.
        name: the finding.
        view_names: as `Model.predict`, for heads that look at views.

    Raises:
        UnknownNameError: no such finding, or no such view.
        ConfigError: it was never trained.
        EmptyStudyError: no image.
        ImageError: one cannot be used; names it by its position.
    """
    encoder = Encoder.of(model)
    encoder.check_findings([name])
    listed = _listed(images)
    decoded = _decoded(encoder, listed)
    said = view_names_of(listed, view_names)
    kinds = [view_kind(encoder.view_of(pixels, view)) for pixels, view in zip(decoded, said, strict=True)]
    squares = to_batch([encoder.crop(pixels) for pixels in decoded])
    found = encoder.read(squares, [name], np.zeros(len(listed), np.int64), np.array(kinds, dtype=np.int64))
    return mean_of(unit(found.pooled[name]))


def unit(vectors: Float[np.ndarray, "N D"]) -> Float32[np.ndarray, "N D"]:
    """Each row divided by its length; a row of zeros stays one."""
    wide = np.asarray(vectors, dtype=np.float64)
    return (wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-30)).astype(np.float32)


def mean_of(vectors: Float[np.ndarray, "N D"]) -> Float32[np.ndarray, " D"]:
    """The mean of vectors of length 1, of length 1 again."""
    return unit(np.asarray(vectors, dtype=np.float64).mean(axis=0)[None])[0]


def study_means(
    vectors: Float[np.ndarray, "N D"], study: Int64[np.ndarray, " N"]
) -> tuple[Int64[np.ndarray, " S"], Float32[np.ndarray, "S D"]]:
    """The embedding of each study from the embeddings of its images, of any length, and which study each row is."""
    names, of_image = np.unique(study, return_inverse=True)
    sums = np.zeros((len(names), vectors.shape[1]))
    np.add.at(sums, of_image.reshape(-1), unit(vectors).astype(np.float64))
    return names, unit(sums)


def _listed(images: Sequence[Image] | Image) -> Sequence[Image]:
    listed = [images] if isinstance(images, Path | str | bytes | np.ndarray) else images
    if not len(listed):
        raise EmptyStudyError("A study needs at least one image, found none.")
    return listed


def _decoded(encoder: Encoder, images: Sequence[Image]) -> list[UInt8[np.ndarray, "H W"]]:
    return [
        decode(image, number, encoder.short_side, encoder.preprocess_id)[0] for number, image in enumerate(images, 1)
    ]
