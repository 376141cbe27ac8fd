"""Search over HTTP: a Ray Serve deployment with a JSON API and a web page. Untrusted input is validated here.

Every refusal is a 4xx with `{"error": ...}`. Images are requested by number, never by path.
"""

import asyncio
import base64
import errno
import hashlib
import importlib.resources
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, NoReturn

import numpy as np
import ray
import torch
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi import Query as Parameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from ray import serve
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nsl_dist import ray_internals
from nsl_dist.config import MOST_NEIGHBOURS, Kind, SearchConfig
from nsl_dist.retrieval.image_search import Answer, PreparedGallery, Query, Searcher, prepare_gallery
from nsl_dist.run import StoppedError

MOST_BYTES = 10 * 2**20  # of a query image
MULTIPART_BYTES = 64 * 2**10  # that a form may add to the image
MOST_SAMPLED = 100
MOST_AT_ONCE = 64  # requests that a replica handles at a time; more are queued
BATCH = 16  # queries embedded together
BATCH_WAIT = 0.01  # seconds that a query waits for others

Neighbours = Annotated[int, Parameter(ge=1, le=MOST_NEIGHBOURS)]


def _page() -> tuple[str, str]:
    """Return the page, and a Content-Security-Policy that allows its own script and style and nothing else."""
    html = importlib.resources.files("nsl_dist.retrieval").joinpath("pages/search.html").read_text()
    sources = {}
    for tag in ("script", "style"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        sources[tag] = f"{tag}-src 'sha256-{digest}'"
    policy = [
        "default-src 'none'", *sources.values(), "img-src 'self' blob: data:", "connect-src 'self'", "base-uri 'none'",
        "form-action 'none'", "frame-ancestors 'none'",
    ]  # fmt: skip
    return html, "; ".join(policy)


class _SecurityHeaders:
    """ASGI middleware that sets security headers on every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._headers = [
            (b"content-security-policy", _page()[1].encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-resource-policy", b"same-origin"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _make_app() -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # these pages load third-party scripts
    app.add_middleware(_SecurityHeaders)

    @app.exception_handler(StarletteHTTPException)
    def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)

    @app.exception_handler(ClientDisconnect)
    def left(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)  # to nobody; else the log would have a stack trace of each who hangs up

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]} {str(first['input'])[:50]!r}: {first['msg']}"}, 400)

    return app


async def _read_upload(request: Request) -> bytes:
    """Return the image of a request: its body, or the first file of a form. Refuse it as soon as it is too large.

    The HTTP server discards the rest of a refused request.
    """
    is_form = request.headers.get("content-type", "").startswith("multipart/form-data")
    most = MOST_BYTES + (MULTIPART_BYTES if is_form else 0)
    too_large = HTTPException(413, f"an image of more than {MOST_BYTES // 2**20} MiB")
    if int(request.headers.get("content-length", 0)) > most:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise too_large
    encoded = await _first_file(request, bytes(body)) if is_form else bytes(body)
    if not encoded:
        raise HTTPException(400, "there is no image: send its bytes as the body, or as a file of a form")
    if len(encoded) > MOST_BYTES:
        raise too_large
    return encoded


async def _first_file(request: Request, body: bytes) -> bytes:
    async def stream() -> AsyncIterator[bytes]:
        yield body

    try:
        form = await MultiPartParser(request.headers, stream(), max_files=1, max_fields=10).parse()  # type: ignore[arg-type]
    except (MultiPartException, KeyError, UnicodeError) as error:
        raise HTTPException(400, f"the form cannot be read: {getattr(error, 'message', error)}") from error
    for value in form.values():
        if isinstance(value, UploadFile):
            return await value.read()
    return b""


app = _make_app()


# Ray Serve pickles the class and its routes here, so all that they call must be defined above.
@serve.ingress(app)
class SearchService:
    """A replica: the model, the indexes and the routes."""

    def __init__(self, gallery: PreparedGallery, config: SearchConfig) -> None:
        ray_internals.keep_serve_to_loopback()
        logging.getLogger("python_multipart").setLevel(logging.ERROR)  # the sender of a bad form gets an answer
        self._searcher = Searcher(gallery, config)
        self._kinds: tuple[Kind, ...] = config.kinds
        self._html = _page()[0]
        # torch and faiss set their number of threads per calling thread.
        num_threads = max(1, (os.cpu_count() or 1) // config.replicas)
        # One core is left to Ray Serve, or queries would arrive one by one.
        self._computing = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(max(1, num_threads - 1),))
        self._decoding = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
        blank = torch.zeros((3, *[self._searcher.image_size] * 2), dtype=torch.uint8)
        warm_up = [Query(blank, kind, 1) for kind in config.kinds]
        self._computing.submit(self._searcher.search, warm_up).result()  # or the first request would wait for it

    @app.get("/", response_class=HTMLResponse)
    async def page(self) -> HTMLResponse:
        """Return the page."""
        return HTMLResponse(self._html)

    @app.get("/health")
    async def health(self) -> dict[str, Any]:
        """Return what is searched."""
        searcher = self._searcher
        return {
            "status": "ok",
            "images": searcher.num_images,
            "classes": len(searcher.class_names),
            "dimensions": searcher.dim,
            "kinds": self._kinds,
        }

    @app.get("/sample")
    async def sample(self, n: Annotated[int, Parameter(ge=1, le=MOST_SAMPLED)] = 12) -> list[dict[str, Any]]:
        """Return random images of the gallery."""
        num_images = self._searcher.num_images
        ids = np.random.default_rng().choice(num_images, min(n, num_images), replace=False)
        return [self._described(image_id) for image_id in ids.tolist()]

    @app.get("/images/{image_id}")
    async def image(self, image_id: int) -> Response:
        """Return a gallery image as it is in the data set."""
        encoded, media_type = await self._stored(image_id)
        return Response(encoded, media_type=media_type)

    @app.post("/search")
    async def search(self, request: Request, kind: Kind | None = None, k: Neighbours = 10) -> dict[str, Any]:
        """Search for the image in the request."""
        return await self._search(await _read_upload(request), kind, k)

    @app.post("/search/{image_id}")
    async def search_by_id(self, image_id: int, kind: Kind | None = None, k: Neighbours = 10) -> dict[str, Any]:
        """Search for an image of the gallery."""
        encoded, _ = await self._stored(image_id)
        return await self._search(encoded, kind, k)

    async def _search(self, encoded: bytes, kind: Kind | None, k: int) -> dict[str, Any]:
        kind = kind or self._kinds[0]
        if kind not in self._kinds:
            raise HTTPException(400, f"kind {kind!r} is not served, only {', '.join(self._kinds)}")
        try:
            pixels, seconds = await self._in(self._decoding, self._decode, encoded)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        answer: Answer = await self._answer(Query(pixels, kind, k))
        spent = {"decode": seconds, "embed": answer.embed_seconds, "search": answer.search_seconds}
        return {
            "kind": kind,
            "neighbours": [
                self._described(image_id) | {"score": score}
                for image_id, score in zip(answer.ids, answer.scores, strict=True)
            ],
            "milliseconds": {name: round(1000 * each, 2) for name, each in spent.items()},
        }

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_WAIT)
    async def _answer(self, queries: list[Query]) -> list[Answer]:
        return await self._in(self._computing, self._searcher.search, queries)

    def _decode(self, encoded: bytes) -> tuple[torch.Tensor, float]:
        started = time.perf_counter()
        return self._searcher.pixels(encoded), time.perf_counter() - started

    async def _stored(self, image_id: int) -> tuple[bytes, str]:
        try:
            return await self._in(self._decoding, self._searcher.image, image_id)
        except KeyError as error:
            raise HTTPException(404, error.args[0]) from error

    def _described(self, image_id: int) -> dict[str, Any]:
        return {
            "id": image_id,
            "class": self._searcher.class_name(image_id),
            "path": self._searcher.path(image_id),
            "image": f"/images/{image_id}",
        }

    @staticmethod
    async def _in(pool: ThreadPoolExecutor, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)


def run(config: SearchConfig) -> NoReturn:
    """Embed the gallery, serve it until a signal arrives, and shut down in order.

    Raises:
        FileNotFoundError: the checkpoint or the gallery does not exist.
        ValueError: checkpoint, gallery, index or address cannot be used.
        StoppedError: on SIGINT or SIGTERM, the normal end.

    """

    def interrupt(number: int, _: Any) -> NoReturn:
        raise KeyboardInterrupt(number)

    url = f"http://{config.host}:{config.port}"
    _check_address(config)
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    try:
        gallery = prepare_gallery(config)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        serve.start(
            proxy_location="HeadOnly", http_options={"host": config.host, "port": config.port}, logging_config=quiet
        )
        deployment = serve.deployment(
            SearchService,
            name="search",
            num_replicas=config.replicas,
            max_ongoing_requests=MOST_AT_ONCE,
            # Idle threads of torch and faiss would otherwise spin on cores that busy ones need.
            ray_actor_options={"runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}},
        )
        serve.run(deployment.bind(gallery, config), name="search", route_prefix="/", logging_config=quiet)
        print(f"   serving  {url} (page), POST {url}/search?kind=float&k=10 (API); Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        finally:
            serve.delete("search")  # after its pending requests; other services on the cluster go on
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the shutdown is complete
        raise StoppedError(stop.args[0] if stop.args else signal.SIGINT, f"{url} is closed") from None
    finally:
        ray.shutdown()
    raise AssertionError("only a signal ends the wait")


def _check_address(config: SearchConfig) -> None:
    """Check that the address can be listened on, before the gallery is embedded.

    Raises:
        ValueError: it cannot.

    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port is free once its server has ended
            probe.bind(address)
    except OSError as error:
        fix = "another --port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "an address of this machine"
        raise ValueError(f"cannot listen on {config.host}:{config.port}: {error.strerror}; give {fix}") from error
