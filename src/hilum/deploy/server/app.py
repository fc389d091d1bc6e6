"""The parts of the server put together: an ASGI application, ready for a server or for a test."""

import json
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import hilum
from hilum.core.types import RESEARCH_NOTICE
from hilum.deploy.server.errors import RefusedError, standard
from hilum.deploy.server.gate import Gate
from hilum.deploy.server.logs import RequestLog
from hilum.deploy.server.page import page_routes
from hilum.deploy.server.routes import routes
from hilum.deploy.server.service import Service
from hilum.deploy.server.settings import Settings

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "image"],
            "additionalProperties": False,
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string"},
                "image": {"type": ["integer", "null"], "minimum": 1},
            },
        }
    },
}

CASES_SCHEMA = {
    "type": "object",
    "required": ["cases"],
    "properties": {
        "cases": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["rank", "similarity", "study_id", "dataset", "view", "findings", "thumbnail"],
                "additionalProperties": False,
                "properties": {
                    "rank": {"type": "integer", "minimum": 1},
                    "similarity": {"type": "number", "minimum": -1, "maximum": 1},
                    "study_id": {"type": ["string", "null"]},
                    "dataset": {"type": "string"},
                    "view": {"type": "string"},
                    "findings": {"type": ["array", "null"], "items": {"type": "string"}},
                    "thumbnail": {"type": ["string", "null"]},
                },
            },
        }
    },
}


def create_app(service: Service, settings: Settings) -> Gate:
    """The application.

    Args:
        service: a model and what it remembers; closed by whoever made it.
        settings: who may ask.
    """
    inner = FastAPI(
        title="Hilum", version=hilum.__version__, description=RESEARCH_NOTICE, docs_url=None, redoc_url=None,
        openapi_url=None, redirect_slashes=False,
    )  # fmt: skip
    inner.include_router(routes(service))
    inner.include_router(page_routes())

    @inner.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Response(json.dumps(describe(inner)), media_type="application/json")

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError), "it is registered for no other"
        return _answer(error)

    async def by_framework(_: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return _answer(standard(422))
        refused = standard(error.status_code)
        refused.headers = {name: value for name, value in (error.headers or {}).items() if name.lower() == "allow"}
        return _answer(refused)

    async def unexpected(_: Request, error: Exception) -> Response:
        return _answer(standard(500))  # the gate writes down where it came from

    inner.add_exception_handler(RefusedError, refused)
    inner.add_exception_handler(HTTPException, by_framework)
    inner.add_exception_handler(RequestValidationError, by_framework)
    inner.add_exception_handler(Exception, unexpected)
    return Gate(inner, settings, RequestLog())


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the schema of studies and of errors, and without what frameworks add of their own."""
    described = dict(app.openapi())
    study = json.loads(resources.files("hilum.deploy").joinpath("study.schema.json").read_text(encoding="utf-8"))
    described["components"] = {"schemas": {"Study": _inlined(study), "Error": ERROR_SCHEMA, "Cases": CASES_SCHEMA}}
    return described


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema whose own definitions are found from the root of an OpenAPI document."""
    return json.loads(json.dumps(schema).replace('"#/$defs/', '"#/components/schemas/Study/$defs/'))


def _answer(refusal: RefusedError) -> Response:
    return Response(refusal.body(), refusal.status, refusal.headers, "application/json")
