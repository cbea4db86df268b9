"""`make_app`: the routes of the server. They know no model, only a function that labels files."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import FastAPI, Request, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from tailtune.configs.errors import UserError
from tailtune.trainers.serving.limits import Limits
from tailtune.trainers.serving.uploads import discard, uploads

Answer = dict[str, Any]
"""What is said about a file: a prediction, or `path` and `error`."""
LabelFiles = Callable[[Sequence[str], Sequence[BinaryIO]], Sequence[Answer]]
"""Takes names and open files, and gives an answer for each."""

PAGE = Path(__file__).with_name("page.html")
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load: nothing from elsewhere."""

log = logging.getLogger("tailtune")


def make_app(label: LabelFiles, facts: Mapping[str, Any], limits: Limits) -> FastAPI:
    """The server.

    Requests are computed one after another by one thread, so an answer does not depend on other requests.

    Args:
        label: labels files; it is called by that thread only.
        facts: what `/health` says about the model.
        limits: what a request may cost.
    """
    app = FastAPI(openapi_url=None)  # its pages would load scripts from another host
    model, places, html = ThreadPoolExecutor(1, "model"), asyncio.Semaphore(limits.places), PAGE.read_bytes()
    about = {"max_files": limits.files, "max_bytes": limits.file_bytes}

    @app.get("/")
    async def page() -> Response:
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok", **facts, "limits": about})

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        if places.locked():
            await discard(request, limits)
            raise HTTPException(503, "too many requests at the same time: try again", {"Retry-After": "1"})
        async with places, uploads(request, limits) as files:
            started = time.perf_counter()
            loop = asyncio.get_running_loop()
            results = await loop.run_in_executor(model, _label_those_that_fit, label, files, limits)
        unreadable = sum("error" in result for result in results)
        seconds = time.perf_counter() - started
        log.info("POST /predict: images %d, unreadable %d, %.2f s", len(results), unreadable, seconds)
        return _json({"results": results})

    _answer_errors(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Let every error be answered by an object `{"error": …}`."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if request.url.path == "/predict":
            log.info("%s /predict: refused with status %d: %s", request.method, error.status_code, error.detail)
        return _json({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(UserError)
    async def failed(_: Request, error: UserError) -> Response:
        log.error("error: %s", error)
        return _json({"error": str(error)}, 500)

    @app.exception_handler(Exception)
    async def bug(_: Request, __: Exception) -> Response:
        return _json({"error": "an error of the server; its log has the traceback"}, 500)  # uvicorn writes it


def _label_those_that_fit(label: LabelFiles, files: Sequence[UploadFile], limits: Limits) -> list[Answer]:
    """The answers for files, in their order. Those that are too large are not read."""
    fits = [(file.size or 0) <= limits.file_bytes for file in files]
    read = [file for file, small in zip(files, fits, strict=True) if small]
    answers = iter(label([_name(file) for file in read], [file.file for file in read]))
    error = f"larger than {limits.mebibytes} MiB"
    return [
        next(answers) if small else {"path": _name(file), "error": error}
        for file, small in zip(files, fits, strict=True)
    ]


def _name(file: UploadFile) -> str:
    return file.filename or ""


def _json(value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: the name of a class may hold bytes that are no text."""
    return Response(json.dumps(value), status, headers, "application/json")
