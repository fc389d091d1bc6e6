"""A model, what may be asked of it, and the studies that it remembers: everything behind the routes."""

import dataclasses
import json
import secrets
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

import hilum
from hilum.core.errors import CheckpointError, HilumError
from hilum.core.types import RESEARCH_NOTICE
from hilum.deploy.predictor import Model
from hilum.deploy.server.cases import Cases
from hilum.deploy.server.decoding import Decoder, Picture
from hilum.deploy.server.errors import RefusedError, standard
from hilum.deploy.server.results import Results, Study, new_name
from hilum.deploy.server.settings import Limits
from hilum.deploy.server.uploads import Held
from hilum.deploy.server.work import Job, Line
from hilum.deploy.similar import Index
from hilum.deploy.study_report import ImageFacts, study_document
from hilum.deploy.study_result import StudyResult

OTHER_MODALITIES = frozenset({"CT", "MR", "US", "NM", "PT", "MG", "XA"})
"""What a header can say that no chest radiograph is."""
_BURNED_IN = "The header does not say that the picture is free of burnt-in text: look before it is shown to others."
_NO_RADIOGRAPH = "The header says that this is another kind of picture than a radiograph; the model knows no other."
_NO_NUMBER = (
    "The model gave no number for a finding that it knows, so nothing is reported: its weights may be damaged, or the "
    "image is one that it cannot read."
)


class Service:
    """What the routes answer from.

    Args:
        model: loaded; it stays the one model of this server.
        limits: sizes, times, places.
        index: of similar cases, made with the same backbone; None: there is none.
        shared: other machines can ask, so that cases of an index are shown only where their licence allows that.

    Raises:
        CheckpointError: the index was made with another backbone.
        HilumError: the process that decodes does not start.
    """

    def __init__(self, model: Model, limits: Limits, index: Index | None = None, shared: bool = False) -> None:
        self.model, self.limits = model, limits
        self.cases = None if index is None else Cases(index, model, shared)
        self.results, self.held = Results(limits), Held(limits.held_bytes)
        self.key = secrets.token_bytes(16)
        """Of the digests by which the same upload is known again; it ends with the process, as they do."""
        decoder = Decoder(model.short_side, model.preprocess_id, limits, whose=index is not None)
        decoder.start()
        self.line = Line(decoder, self.accept, self.judge, limits.queue)

    def close(self) -> None:
        """End its threads and its process, and forget every study."""
        self.line.close()
        self.results = Results(self.limits)

    def health(self) -> dict[str, Any]:
        """How full the line is."""
        return {"status": "ok", "queue": len(self.line.jobs), "limit": self.limits.queue}

    def metadata(self) -> dict[str, Any]:
        """What a page needs to know before it has a study."""
        model, limits = self.model, self.limits
        return {
            "hilum": hilum.__version__,
            "notice": RESEARCH_NOTICE,
            "model": {
                "digest": model.digest, "calibrated": not model.reservations.uncalibrated, "unit": "study",
                "accepted_leak": model.leak,
            },
            "findings": [
                {"name": name, "group": model.groups.get(name) or None, "trained": trained}
                for name, trained in model.trained.items()
            ],
            "thresholds": list(model.operating_points),
            "limits": {
                "files": limits.files, "file_bytes": limits.file_bytes, "study_bytes": limits.study_bytes,
                "pixels": limits.pixels,
            },
            "similar": self.cases is not None,
            "maps": True,  # every head has them
            "screened": model.screening is not None,
        }  # fmt: skip

    def accept(self, pictures: list[Picture]) -> None:
        """Whether the study goes on, after the last of these pictures.

        Raises:
            RefusedError: 413 more pixels than fit, 422 another kind of picture than a radiograph.
        """
        if sum(picture.pixels.nbytes for picture in pictures) > self.limits.study_bytes:
            raise RefusedError(413, "study_too_large", "The images of this study are larger than fit, once decoded.")
        if pictures[-1].modality in OTHER_MODALITIES:
            raise RefusedError(422, "not_a_radiograph", _NO_RADIOGRAPH, len(pictures))

    def judge(self, pictures: list[Picture], job: Job) -> Study:
        """Findings of decoded images; runs in the model's thread.

        Raises:
            RefusedError: 422 the model refuses the images, 500 it gives no numbers.
        """
        views = [given or picture.view for given, picture in zip(job.views, pictures, strict=True)]
        pixels = [picture.pixels for picture in pictures]
        try:
            result = self.model.predict(pixels, view_names=views)
        except CheckpointError as error:
            raise RefusedError(500, "not_a_number", _NO_NUMBER) from error
        except HilumError as error:
            raise RefusedError(422, "not_possible", "The model cannot read these images as one study.") from error
        self._check_numbers(result)
        result = _with_what_files_say(result, pictures, job.views)
        from hilum.deploy.overlays import of_study

        name = new_name()
        document = study_document(
            result,
            self.model,
            study_id=name,
            images=[ImageFacts.of(one.rows, one.columns, one.display.shape) for one in pictures],
        )
        _add_flags(document, pictures)
        ids = sorted({one for picture in pictures for one in picture.ids})
        json.dumps(document, allow_nan=False)  # before anybody is answered
        return Study(
            name=name,
            document=document,
            pictures=tuple(png(picture.display) for picture in pictures),
            shapes=tuple((picture.display.shape[0], picture.display.shape[1]) for picture in pictures),
            maps={
                name: None if maps is None else of_study(maps, result.contributions[name])
                for name, maps in result.attention.items()
            },
            boxes=tuple(result.boxes),
            embedding=result.embedding,
            scored=tuple(result.scored),
            model_views=tuple(zip(pixels, result.views, strict=True)) if self.cases is not None else (),
            own_cases=None if self.cases is None else self.cases.index.left_out(ids),
            digest=job.digest,
        )

    def _check_numbers(self, result: StudyResult) -> None:
        withheld = not any(result.scored)
        for name, trained in self.model.trained.items():
            value = result.probabilities[name]
            missing = value is None and trained and not withheld
            if missing or (value is not None and not (np.isfinite(value) and 0 <= value <= 1)):
                raise RefusedError(500, "not_a_number", _NO_NUMBER)

    def heat(self, study: Study, finding: int, number: int) -> bytes:
        """PNG of what one finding looked at in one image, over the whole image, transparent where nothing is.

        Raises:
            RefusedError: 404; there is no such finding, image or map.
        """
        from hilum.deploy.overlays import heat_png, scale_of

        if not 0 <= finding < len(self.model.findings) or not 1 <= number <= len(study.pictures):
            raise no_such()
        maps = study.maps.get(self.model.findings[finding])
        if maps is None:
            raise RefusedError(404, "no_map", "There is no map of that finding.")
        rows, columns = study.shapes[number - 1]
        seen = scale_of([one for one in maps if one.any()])  # of all images, so that the one that carried it is bright
        return heat_png(maps[number - 1], study.boxes[number - 1], rows, columns, seen)

    def report(self, study: Study) -> str:
        """The study as a page of its own, that asks nothing of any network."""
        from hilum.deploy.study_page import study_page

        content = (np.frombuffer(one, np.uint8) for one in study.pictures)
        pixels = [np.asarray(cv2.imdecode(one, cv2.IMREAD_GRAYSCALE), np.uint8) for one in content]
        return study_page(study.document, pixels, study.maps)


def png(pixels: UInt8[np.ndarray, "H W"]) -> bytes:
    """A grey PNG."""
    done, content = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 3])
    assert done, "a grey image can always be encoded"
    return content.tobytes()


def no_such() -> RefusedError:
    """404."""
    return standard(404)


def _with_what_files_say(result: StudyResult, pictures: list[Picture], given: Sequence[str]) -> StudyResult:
    """With the quality of the files, which the model, given pixels, did not see, and where views came from."""
    quality = [tuple(dict.fromkeys((*one.quality, *said))) for one, said in zip(pictures, result.quality, strict=True)]
    changed: dict[str, Any] = {"quality": quality}
    changed["view_sources"] = [
        "header" if source == "given" and not view else source
        for view, source in zip(given, result.view_sources, strict=True)
    ]
    return dataclasses.replace(result, **changed)


def _add_flags(document: dict[str, Any], pictures: list[Picture]) -> None:
    """What the files together say: images of several people, and text that may be burnt into pixels."""
    for described, picture in zip(document["study"]["images"], pictures, strict=True):
        if picture.burned_in == "unknown":
            described["flags"].append({"code": "burned_in_unknown", "message": _BURNED_IN})
    subjects = {picture.subject for picture in pictures if picture.subject}
    if len(subjects) > 1:
        document["flags"].append({
            "code": "several_studies",
            "message": "The files name different patients or studies; they were read as one study all the same.",
        })  # fmt: skip
