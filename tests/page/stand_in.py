"""A small server with the routes that the page speaks to and made-up answers, so that the page is tested by itself.

The shapes are those of `hilum serve` (docs/reference/http.md); `test_page_served.py` holds the page
against the real one.
By hand: `python tests/page/stand_in.py`. Past 300 lines: made-up findings for forty names.
"""

import io
import re
import socket
import threading
import time
from collections import deque
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from hilum.core.types import RESEARCH_NOTICE
from hilum.data.labels import CXRLT_2024_TASK1

STATIC = Path(str(files("hilum.deploy.server").joinpath("static")))
FINDINGS = CXRLT_2024_TASK1
NEVER_TRAINED = ("Azygos Lobe", "Kyphosis")
HEAD = (
    "Atelectasis", "Cardiomegaly", "Edema", "Enlarged Cardiomediastinum", "Lung Opacity", "Normal", "Pleural Effusion",
    "Pneumonia", "Support Devices",
)  # fmt: skip
TAIL = (
    "Azygos Lobe", "Clavicle Fracture", "Fissure", "Hydropneumothorax", "Kyphosis", "Lobar Atelectasis",
    "Pleural Other", "Pneumoperitoneum", "Pulmonary Embolism", "Pulmonary Hypertension", "Round(ed) Atelectasis",
    "Subcutaneous Emphysema", "Tuberculosis",
)  # fmt: skip
LIKELY = {
    "Pleural Effusion": 0.83, "Support Devices": 0.91, "Cardiomegaly": 0.62, "Lung Opacity": 0.58, "Atelectasis": 0.44,
    "Edema": 0.31, "Pneumonia": 0.22, "Enlarged Cardiomediastinum": 0.27, "Consolidation": 0.17, "Normal": 0.02,
    "Calcification of the Aorta": 0.12, "Tortuous Aorta": 0.09, "Pneumothorax": 0.034, "Rib Fracture": 0.045,
}  # fmt: skip
CSP = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
RULES = ("f1", "youden", "sens_at_spec95")
NOT_SCREENED = "This model cannot tell chest X-rays from other pictures; nobody has looked."


def group_of(name: str) -> str:
    return "head" if name in HEAD else "tail" if name in TAIL else "medium"


class StandIn:
    """State of the server: what it answers next, what it was asked, which studies it holds."""

    def __init__(self) -> None:
        self.failures: deque[tuple[int, dict, dict]] = deque()
        """(status, body, headers), given in turn to the next uploads."""
        self.names = dict.fromkeys(FINDINGS)
        self.studies: dict[str, tuple[dict, list[np.ndarray]]] = {}
        self.asked: list[tuple[str, str]] = []
        self.uploads: list[dict] = []
        self.withheld = self.odd = False
        self.similar, self.maps, self.calibrated, self.screened = True, True, True, True
        self.digest, self.leak = "3f9a1c27b0de4458", ""
        self.rules = RULES
        self.without: set[str] = set()
        """Findings that have no thresholds."""
        self.flags: list[dict] = []
        """Of every study that is scored."""
        self.most_similar = 0.98
        self.forgetting = 204
        """Status of DELETE."""
        self.labels = ["Pleural Effusion", "Cardiomegaly", "Support Devices", "Atelectasis", "Edema"]
        self.rename: dict[str, str] = {}
        self.pause = 0.0
        self.token = ""
        self.thumbnails: list[np.ndarray] = []

    def app(self) -> Starlette:
        routes = [
            Route("/", lambda request: FileResponse(STATIC / "index.html")),
            Route("/healthz", lambda request: JSONResponse({"status": "ok", "queue": 0, "limit": 8})),
            Route("/metadata", self.metadata),
            Route("/api/studies", self.upload, methods=["POST"]),
            Route("/api/studies/{study}", self.study, methods=["GET", "DELETE"]),
            Route("/api/studies/{study}/images/{number:int}.png", self.image),
            Route("/api/studies/{study}/maps/{finding:int}/{number:int}.png", self.heat),
            Route("/api/studies/{study}/similar", self.cases),
            Route("/api/cases/{row:int}.png", self.thumbnail),
            Route("/api/studies/{study}/{name:str}", self.report),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]
        app = Starlette(routes=routes)

        async def guarded(scope, receive, send):  # what the real server puts on every answer
            async def sending(message):
                if message["type"] == "http.response.start":
                    message["headers"] += [
                        (b"content-security-policy", CSP.encode()), (b"x-content-type-options", b"nosniff"),
                        (b"cache-control", b"no-store"), (b"referrer-policy", b"no-referrer"),
                    ]  # fmt: skip
                await send(message)

            if scope["type"] == "http":
                self.asked.append((scope["method"], scope["path"]))
                needs = scope["path"].startswith(("/api", "/metadata"))
                given = dict(scope["headers"])
                if needs and self.token and given.get(b"authorization") != f"Bearer {self.token}".encode():
                    return await refusal(401, "unauthorised", "A token is needed.")(scope, receive, sending)
                if scope["method"] == "POST" and b"x-hilum" not in given:
                    return await refusal(403, "header", "X-Hilum is missing.")(scope, receive, sending)
            return await app(scope, receive, sending)

        return guarded

    def named(self, name: str) -> str:
        return self.rename.get(name, name)

    @property
    def model(self) -> dict:
        return {
            "digest": self.digest, "calibrated": self.calibrated, "unit": "study", "accepted_leak": self.leak,
            "operating_points": list(self.rules),
        }  # fmt: skip

    async def metadata(self, request: Request) -> Response:
        return JSONResponse({
            "hilum": "0.1.0", "notice": RESEARCH_NOTICE,
            "model": self.model,
            "findings": [
                {"name": self.named(name), "group": group_of(name), "trained": name not in NEVER_TRAINED}
                for name in FINDINGS
            ],
            "thresholds": list(self.rules), "similar": self.similar, "maps": self.maps, "screened": self.screened,
            "limits": {"files": 20, "file_bytes": 64 << 20, "study_bytes": 256 << 20, "pixels": 64 << 20},
        })  # fmt: skip

    async def upload(self, request: Request) -> Response:
        form = await request.form()
        given = form.getlist("files")
        self.uploads.append({"names": [one.filename for one in given], "views": form.getlist("views")})
        contents = [await one.read() for one in given]
        await form.close()
        if self.pause:
            time.sleep(self.pause)
        if self.failures:
            status, body, headers = self.failures.popleft()
            return JSONResponse(body, status, headers)
        pictures = []
        for number, content in enumerate(contents, 1):
            try:
                pictures.append(np.asarray(Image.open(io.BytesIO(content)).convert("L")))
            except OSError:
                return refusal(422, "unreadable", "neither DICOM, PNG nor JPEG", number)
        study = f"study{len(self.uploads):04d}"
        self.studies[study] = (self.document(study, pictures, form.getlist("views")), pictures)
        return JSONResponse(self.studies[study][0])

    def document(self, study: str, pictures: list[np.ndarray], views: list[str]) -> dict:
        rng = np.random.default_rng(7)
        count = len(pictures)
        weight = np.linspace(2, 1, count) / np.linspace(2, 1, count).sum()
        images = []
        for number, pixels in enumerate(pictures, 1):
            view = ("PA", "LATERAL", "AP", "OBLIQUE")[(number - 1) % 4]
            source = ("header", "classifier", "header", "unknown")[(number - 1) % 4]
            if number <= len(views) and views[number - 1]:
                view, source = views[number - 1], "given"
            flags, scored = [], True
            if self.withheld or (self.odd and number == 2):
                flags = [{"code": "not_a_chest_xray", "message": "This does not look like a chest X-ray."}]
                scored = False
            elif self.odd and number == 1:
                flags = [{"code": "inverted", "message": "The grey levels look inverted."}]
            if not self.screened:
                flags.append({"code": "not_screened", "message": NOT_SCREENED})
            images.append({
                "number": number, "view": view, "view_source": source, "rows": pixels.shape[0],
                "columns": pixels.shape[1], "box": [0.05, 0.05, 0.9, 0.9], "weight": float(weight[number - 1]),
                "flags": flags, "scored": scored,
            })  # fmt: skip
        findings = []
        for name in FINDINGS:
            base = LIKELY.get(name, float(rng.beta(1.2, 60)))
            threshold = 0.28 if name in HEAD else 0.02 if name in TAIL else 0.08
            trained = name not in NEVER_TRAINED
            scored = trained and not self.withheld
            spread = 0.3 * base + 0.01
            share = rng.dirichlet(np.full(count, 4.0)) if count > 1 else np.ones(1)
            points = {"f1": threshold, "youden": 0.7 * threshold, "sens_at_spec95": min(0.9, 1.6 * threshold)}
            points = {} if name in self.without else {rule: points[rule] for rule in self.rules}
            near = [max(0.0, base - spread), min(1.0, base + 0.8 * spread)] if scored and name not in TAIL else None
            alone = [float(np.clip(base * (0.8 + 0.4 * one), 0, 1)) if scored else None for one in share]
            reserved = "uncalibrated: few positives" if name in TAIL and trained else None
            findings.append({
                "name": self.named(name), "group": group_of(name), "trained": trained,
                "probability": base if scored else None, "calibrated": self.calibrated and trained,
                "interval": near,
                "thresholds": points if points and trained else None,
                "above": {rule: base > at for rule, at in points.items()} if points and scored else None,
                "calibration_flag": reserved, "has_map": scored,
                "images": [
                    {"number": n + 1, "probability": alone[n], "contribution": float(share[n]) if scored else None}
                    for n in range(count)
                ],
            })  # fmt: skip
        flags = [{"code": "not_a_chest_xray", "message": "No image of this study looks like a chest X-ray."}]
        return {
            "format": "hilum-study-1", "notice": RESEARCH_NOTICE,
            "model": {"hilum": "0.1.0", **self.model},
            "study": {"id": study, "images": images}, "status": "withheld" if self.withheld else "scored",
            "flags": flags if self.withheld else self.flags, "findings": findings,
        }  # fmt: skip

    async def study(self, request: Request) -> Response:
        study = request.path_params["study"]
        if study not in self.studies:
            return refusal(404, "unknown_study", "There is no such study.")
        if request.method == "DELETE" and self.forgetting != 204:
            return refusal(self.forgetting, "internal", "It failed.")
        if request.method == "DELETE":
            del self.studies[study]
            return Response(status_code=204)
        return JSONResponse(self.studies[study][0])

    async def image(self, request: Request) -> Response:
        found = self.studies.get(request.path_params["study"])
        if found is None:
            return refusal(404, "unknown_study", "There is no such study.")
        return png(found[1][request.path_params["number"] - 1])

    async def heat(self, request: Request) -> Response:
        found = self.studies.get(request.path_params["study"])
        if found is None:
            return refusal(404, "unknown_study", "There is no such study.")
        number, finding = request.path_params["number"], request.path_params["finding"]
        return png(blob(found[1][number - 1].shape, seed=31 * finding + number))

    async def cases(self, request: Request) -> Response:
        count, by = int(request.query_params["count"]), request.query_params.get("finding")
        others = [[one for k, one in enumerate(self.labels) if (n + k) % 3 and one != by] for n in range(count)]
        cases = [
            {"rank": n + 1, "similarity": self.most_similar - 0.017 * n, "study_id": f"s{50000 + n}",
             "dataset": "phantom", "view": "PA", "findings": ([by] if by and n % 2 == 0 else []) + others[n],
             "thumbnail": f"/api/cases/{n}.png"} for n in range(count)
        ]  # fmt: skip
        return JSONResponse({"cases": cases})

    async def thumbnail(self, request: Request) -> Response:
        row = request.path_params["row"]
        return png(self.thumbnails[row % len(self.thumbnails)] if self.thumbnails else chest(96, seed=row))

    async def report(self, request: Request) -> Response:
        found = self.studies.get(request.path_params["study"])
        name = request.path_params["name"]
        if found is None or not re.fullmatch(r"report\.(html|json|fhir\.json)", name):
            return refusal(404, "unknown_study", "There is no such study.")
        if name == "report.html":
            return Response("<!doctype html><title>Study</title><p>Report", media_type="text/html")
        return JSONResponse(found[0] if name == "report.json" else {"resourceType": "DiagnosticReport"})


def refusal(status: int, code: str, message: str, image: int | None = None) -> JSONResponse:
    return JSONResponse(error_body(code, message, image), status)


def error_body(code: str, message: str, image: int | None = None) -> dict:
    return {"error": {"code": code, "message": message, "image": image}}


def chest(size: int, seed: int = 0) -> np.ndarray:
    """Something grey with two dark lungs, drawn: uint8 (size, size)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:size, 0:size] / size
    body = 190 * np.exp(-(((columns - 0.5) / 0.42) ** 6)) * np.exp(-(((rows - 0.55) / 0.55) ** 8))
    for centre in (0.32, 0.68):
        body -= 120 * np.exp(-((((columns - centre) / 0.12) ** 2 + ((rows - 0.45) / 0.25) ** 2) ** 2))
    noise = cv2.GaussianBlur(rng.normal(0, 30, (size, size)), (0, 0), size / 60)
    return np.clip(body + noise + 10, 0, 255).astype(np.uint8)


def blob(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Heat with two warm places: uint8 (rows, columns, 4) RGBA."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]] / np.array(max(shape))
    warm = np.zeros(shape)
    for height in (1.0, 0.5):
        row, column = rng.uniform(0.3, 0.7, 2)
        warm += height * np.exp(-(((rows - row) ** 2 + (columns - column) ** 2) / 0.006))
    warm = np.clip(warm, 0, 1)
    colours = cv2.applyColorMap((255 * warm).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    return np.dstack([colours, (255 * np.clip(1.6 * warm, 0, 1)).astype(np.uint8)])


def png(pixels: np.ndarray) -> Response:
    return Response(png_bytes(pixels), media_type="image/png")


def png_bytes(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", compress_level=1)
    return content.getvalue()


@contextmanager
def serving(app, port: int = 0):
    """Serve an ASGI application on a free port of this machine; gives its address."""
    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        if time.monotonic() > deadline:
            raise RuntimeError("The server did not start in 20 s.")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


if __name__ == "__main__":
    with serving(StandIn().app(), 8765) as address:
        print(address)
        while True:
            time.sleep(60)
