"""The page and its files: read once, served by name, nothing else of the disk can be reached."""

from importlib import resources
from importlib.abc import Traversable
from pathlib import PurePosixPath

from fastapi import APIRouter, Response

from hilum.core.types import RESEARCH_NOTICE
from hilum.deploy.server.errors import RefusedError

TYPES = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml", ".png": "image/png", ".woff2": "font/woff2", ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
}  # fmt: skip
"""By suffix; a file of another kind is not served."""
_WITHOUT_PAGE = f"<!doctype html><title>Hilum</title><p>{RESEARCH_NOTICE}</p><p>The API: /openapi.json</p>"


def page_files() -> dict[str, bytes]:
    """Every file of the page, by its path below `static/`."""
    folder = resources.files("hilum.deploy.server").joinpath("static")
    return dict(_walk(folder, "")) if folder.is_dir() else {}


def _walk(folder: Traversable, prefix: str) -> list[tuple[str, bytes]]:
    found = []
    for entry in sorted(folder.iterdir(), key=lambda one: one.name):
        if entry.is_dir():
            found += _walk(entry, f"{prefix}{entry.name}/")
        elif PurePosixPath(entry.name).suffix in TYPES:
            found.append((prefix + entry.name, entry.read_bytes()))
    return found


def page_routes() -> APIRouter:
    """`/` and `/static/*`."""
    files, router = page_files(), APIRouter()

    def answer(name: str) -> Response:
        return Response(files[name], media_type=TYPES[PurePosixPath(name).suffix])

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return answer("index.html") if "index.html" in files else Response(_WITHOUT_PAGE, media_type="text/html")

    @router.get("/static/{name:path}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in files:
            raise RefusedError(404, "not_found", "There is no such file.")
        return answer(name)

    return router
