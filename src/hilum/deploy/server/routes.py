"""The addresses: what is asked, taken from `service.py`. docs/reference/http.md describes each.

Every answer is made of our own words, or of the study document; nothing of a request is repeated.
"""

import asyncio
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response

from hilum.deploy.fhir import fhir_bundle
from hilum.deploy.server.errors import RefusedError
from hilum.deploy.server.logs import NOTES
from hilum.deploy.server.results import Study
from hilum.deploy.server.service import Service, no_such
from hilum.deploy.server.uploads import client_gone, receive_upload

MOST_CASES = 50
_NAME = re.compile(r"[A-Za-z0-9_-]{22}")
_ERROR = {
    "description": "Refused: a code, a sentence, and the number of the image that is meant.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
_STUDY = {
    "description": "A study document, hilum-study-1.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Study"}}},
}
_PNG = {"description": "A picture.", "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}
_HTML = {"description": "A page.", "content": {"text/html": {"schema": {"type": "string"}}}}
_CASES = {
    "description": "Cases, the most similar first.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Cases"}}},
}
_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {
                            "type": "array", "minItems": 1, "maxItems": 20,
                            "items": {"type": "string", "format": "binary"},
                            "description": "The images of one study: DICOM, PNG or JPEG.",
                        },
                        "views": {
                            "type": "array", "items": {"type": "string"},
                            "description": "PA, AP, LATERAL, ... or empty, one for each file.",
                        },
                    },
                }
            }
        },
    }
}  # fmt: skip


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    # What the gate in front of all routes can say belongs to every one of them.
    return dict.fromkeys((*statuses, 400, 401, 403, 421, 422, 429, 500), _ERROR)


def routes(service: Service) -> APIRouter:
    """Every route but the page's.

    Args:
        service: what they answer from.
    """
    router = APIRouter()

    @router.get("/healthz", summary="Whether the server lives, and how full its line is", responses=_refusals())
    async def healthz() -> Response:
        return _json(service.health())

    @router.get("/metadata", summary="The model, its findings, and the limits", responses=_refusals())
    async def metadata() -> Response:
        return _json(service.metadata())

    @router.post(
        "/api/studies", summary="Findings of one study", openapi_extra=_UPLOAD,
        responses={200: _STUDY, **_refusals(408, 411, 413, 415, 503)},
    )  # fmt: skip
    async def post_study(request: Request) -> Response:
        service.line.check()
        headers = {name.lower(): value for name, value in request.headers.items()}
        upload = await receive_upload(request.receive, headers, service.limits, service.held)
        try:
            views = upload.views or [""] * len(upload.files)
            digest = await asyncio.to_thread(_digest, upload.files, views, service.key)
            notes = request.scope[NOTES]
            notes |= {"images": len(upload.files), "received": upload.size}
            known = service.results.find(digest)
            if known is not None:
                notes["known"] = "yes"
                again = known.renamed()
                service.results.add(again)
                return _json(again.document)
            study, took = await _until_gone(request, service.line.study(upload.files, views, digest))
            service.results.add(study)
            notes |= took
            return _json(study.document)
        finally:
            upload.release()

    @router.get("/api/studies/{study}", summary="The same again", responses={200: _STUDY, **_refusals(404)})
    async def get_study(study: str) -> Response:
        return _json(_find(service, study).document)

    @router.delete("/api/studies/{study}", summary="Forget a study", status_code=204, responses=_refusals(404))
    async def delete_study(study: str) -> Response:
        if not service.results.remove(study):
            raise no_such()
        return Response(status_code=204)

    @router.get("/api/studies/{study}/images/{number}.png", summary="An image, grey, as it is displayed",
                responses={200: _PNG, **_refusals(404)}, response_class=Response)  # fmt: skip
    async def image(study: str, number: int) -> Response:
        pictures = _find(service, study).pictures
        if not 1 <= number <= len(pictures):
            raise no_such()
        return Response(pictures[number - 1], media_type="image/png")

    @router.get("/api/studies/{study}/maps/{finding}/{number}.png", summary="What a finding looked at in an image",
                responses={200: _PNG, **_refusals(404)}, response_class=Response)  # fmt: skip
    async def heat(study: str, finding: int, number: int) -> Response:
        found = _find(service, study)
        return Response(await asyncio.to_thread(service.heat, found, finding, number), media_type="image/png")

    @router.get("/api/studies/{study}/similar", summary="The nearest cases of the index",
                responses={200: _CASES, **_refusals(404)})  # fmt: skip
    async def similar(
        study: str, count: Annotated[int, Query(ge=1, le=MOST_CASES)] = 8, finding: str | None = None
    ) -> Response:
        found, cases = _find(service, study), service.cases
        if cases is None:
            raise RefusedError(404, "no_index", "This server was started without an index of cases.")
        return _json(await service.line.in_model_thread(lambda: cases.similar(found, count, finding)))

    @router.get("/api/cases/{row}.png", summary="The picture of a case",
                responses={200: _PNG, **_refusals(404)}, response_class=Response)  # fmt: skip
    async def case(row: Annotated[int, Path(ge=0)]) -> Response:
        if service.cases is None:
            raise no_such()
        return Response(await asyncio.to_thread(service.cases.thumbnail, row), media_type="image/png")

    @router.get("/api/studies/{study}/report.json", summary="The study document, to keep",
                responses={200: _STUDY, **_refusals(404)})  # fmt: skip
    async def report_json(study: str) -> Response:
        return _file(json.dumps(_find(service, study).document, indent=1, allow_nan=False), "application/json", "json")

    @router.get("/api/studies/{study}/report.fhir.json", summary="The study as a FHIR Bundle, to keep",
                responses={200: {"description": "A Bundle."}, **_refusals(404)}, response_class=Response)  # fmt: skip
    async def report_fhir(study: str) -> Response:
        bundle = fhir_bundle(_find(service, study).document)
        return _file(json.dumps(bundle, indent=1, allow_nan=False), "application/fhir+json", "fhir.json")

    @router.get("/api/studies/{study}/report.html", summary="The study as a page of its own, to keep",
                responses={200: _HTML, **_refusals(404)}, response_class=Response)  # fmt: skip
    async def report_html(study: str) -> Response:
        return _file(await asyncio.to_thread(service.report, _find(service, study)), "text/html", "html")

    return router


def _file(content: str, kind: str, suffix: str) -> Response:
    """Something to keep: the browser saves it and never shows it as a page of this server."""
    headers = {
        "Content-Disposition": f'attachment; filename="study.{suffix}"',
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox",
    }
    return Response(content, headers=headers, media_type=kind)


def _json(value: Any) -> Response:
    return Response(json.dumps(value, allow_nan=False), media_type="application/json")


def _find(service: Service, name: str) -> Study:
    study = service.results.get(name) if _NAME.fullmatch(name) else None
    if study is None:
        raise no_such()
    return study


def _digest(files: Sequence[bytes], views: Sequence[str], key: bytes) -> bytes:
    digest = hashlib.blake2b(key=key)
    for content, view in zip(files, views, strict=True):
        digest.update(f"{len(content)} {view} ".encode() + content)
    return digest.digest()


async def _until_gone(request: Request, work: Any) -> Any:
    """The result of some work, which is given up when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise client_gone()
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
