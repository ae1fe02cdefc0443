"""mlx_lm.server's HTTP handler and routes; models are names, and every answer has its version."""

from __future__ import annotations

import hmac
import json
import logging
import select
import socket
import time
from http import HTTPStatus
from io import BytesIO
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from mlx_lm.server import APIHandler, CompletionRequest

from nested_core.errors import NestedTuneError
from nested_core.rooms.serve.engine import VersionedGenerator, VersionedRequest
from nested_core.rooms.serve.follower import ChampionFollower
from nested_core.rooms.serve.metrics import CONTENT_TYPE, ServingMetrics
from nested_core.rooms.serve.request_model import (
    DEFAULT_MODEL,
    ROUTES,
    RequestRefused,
    describe_error,
    read_request,
)
from nested_core.rooms.serve.served_version import BASE_VERSION
from nested_core.text.digest_format import shorten_digest
from nested_core.text.foreign_text import escape

VERSION_HEADER = "X-Adapter-Version"
AGAIN_AFTER_SECONDS = 1
MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_LENGTH_DIGITS = 9
MAX_WAITING_REQUESTS = 1024
UNLOCKED_ROUTES = ("/health", "/metrics")


class RegistryHandler(APIHandler):
    """One connection of a client."""

    def __init__(
        self,
        response_generator: VersionedGenerator,
        *args: Any,
        follower: ChampionFollower,
        metrics: ServingMetrics,
        api_key: str | None,
        **kwargs: Any,
    ) -> None:
        """`api_key` is what clients have to send; None asks for none."""
        self._generator = response_generator
        self._follower = follower
        self._metrics = metrics
        self._status = 0  # that was sent last, of the request at hand
        self._began = time.monotonic()
        self._api_key = api_key
        self._request: VersionedRequest | None = None
        self._is_streaming = False
        super().__init__(response_generator, *args, **kwargs)

    timeout = 120  # seconds without a byte, on a connection of which something is expected

    def handle_one_request(self) -> None:
        """As http.server's, which waits for one; its line is written when it has ended."""
        self._status, self._request = 0, None
        self._has_called_tool = False
        super().handle_one_request()
        if self._status:
            self._log_ended_request()

    def parse_request(self) -> bool:
        """As http.server's; the request's seconds are counted from here."""
        self._began = time.monotonic()
        return super().parse_request()

    def do_POST(self) -> None:
        """Answer, and count it."""
        try:
            self._answer()
        finally:
            name = None if self._request is None else self._request.name
            self._metrics.note_request(name, self._status, time.monotonic() - self._began)

    def send_response(self, code: int, message: str | None = None) -> None:
        """As http.server's; the code is remembered."""
        self._status = int(code)
        super().send_response(code, message)

    def _answer(self) -> None:
        """Answer, where the client may ask, and what it asks is a request that is answered here."""
        try:
            self._require_permission()
            body = self._read_body()
            body = json.dumps(read_request(self.path, body, self._defaults())).encode()
        except RequestRefused as refused:
            self._refuse(refused)
            return
        self.rfile = BytesIO(body)
        self.headers.replace_header("Content-Length", str(len(body)))
        super().do_POST()

    def do_GET(self) -> None:
        """As mlx_lm's; `/health` and `/metrics` need no key, so that who watches has none."""
        try:
            self._require_permission(needs_key=self.path not in UNLOCKED_ROUTES)
        except RequestRefused as refused:
            self._refuse(refused)
            return
        if self.path == "/metrics":
            self._send_body(200, self._metrics.render(), CONTENT_TYPE)
        elif self.path == "/health" or self.path.startswith("/v1/models"):
            super().do_GET()
        else:
            self._refuse(_no_route(self.path))

    def do_OPTIONS(self) -> None:
        """As mlx_lm's: what a browser asks before it lets a page of another origin ask."""
        try:
            self._require_permission(needs_key=False)
        except RequestRefused as refused:
            self._refuse(refused)
            return
        super().do_OPTIONS()

    def _require_permission(self, *, needs_key: bool = True) -> None:
        """Raise RequestRefused where the client, or the web page that asks, may not ask."""
        options = self._generator.cli_args
        origin = self.headers.get("Origin")
        if "*" not in options.allowed_origins:
            if origin is not None and origin not in options.allowed_origins:
                raise RequestRefused(
                    f"The origin {origin!r:.80} may not ask here; --allowed-origins of the server "
                    f"names those that may.",
                    403,
                )
            if not _is_own_host(self.headers.get("Host"), options.host):
                raise RequestRefused(
                    f"This server is {options.host}, and the request is for "
                    f"{self.headers.get('Host')!r:.80}.",
                    421,
                )
        given = self.headers.get("Authorization", "")
        if (
            needs_key
            and self._api_key is not None
            and not hmac.compare_digest(
                given.encode("latin-1", "replace"), f"Bearer {self._api_key}".encode()
            )
        ):
            raise RequestRefused(
                "Give the server's API key: Authorization: Bearer KEY.", 401, "invalid_api_key"
            )

    def _read_body(self) -> bytes:
        """The bytes of the body. Raises RequestRefused where it is not to be read."""
        if self.path not in ROUTES:
            raise _no_route(self.path)
        given = self.headers.get("Content-Length")
        if given is None:
            raise RequestRefused("The header Content-Length is required.", 411)
        if not (given.isascii() and given.isdigit()):
            raise RequestRefused("The header Content-Length is no number of bytes.")
        if len(given) > MAX_LENGTH_DIGITS or int(given) > MAX_BODY_BYTES:
            raise RequestRefused(f"A request has at most {MAX_BODY_BYTES} bytes.", 413)
        return self.rfile.read(int(given))

    def _defaults(self) -> dict[str, Any]:
        """What the server's own options say where a request says nothing."""
        options = self._generator.cli_args
        return {
            "max_tokens": options.max_tokens,
            "temperature": options.temp,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "min_p": options.min_p,
            "num_draft_tokens": options.num_draft_tokens,
        }

    def _refuse(self, refused: RequestRefused) -> None:
        self.close_connection = True  # the body may not have been read
        self._send_error_document(str(refused), refused.status, refused.code)

    def handle_completion(self, request: CompletionRequest, stop_words: list[str]) -> None:
        """Answer with the version that the request is for, or say why it is not served."""
        names = self._follower.names
        name, _, wanted = self.requested_model.partition("@")
        name = next(iter(names)) if self.requested_model == DEFAULT_MODEL else name
        if name not in names:
            served = ", ".join(names)
            self._refuse(
                _no_model(f"No model {self.requested_model!r:.80} here; served: {served}.")
            )
            return
        try:
            status = names[name]
            version = self._follower.find_version(name, wanted) if wanted else status.current
        except (NestedTuneError, OSError, RuntimeError) as error:
            self._refuse(_no_model(str(error)))
            return
        if len(self._generator.under_way) >= MAX_WAITING_REQUESTS:
            self._send_error_document("Too many requests wait here. Ask again later.", 503)
            return
        status.requests += 1
        self._request = VersionedRequest(
            **vars(request),
            name=name,
            version=version,
            count_token=status.rate.add_token,
            is_client_gone=self._is_client_gone,
        )
        try:
            super().handle_completion(self._request, stop_words)
        except ConnectionError:
            raise
        except Exception as error:  # whatever it is, the client is told
            self._request.failure = None
            self._send_failure(error)
        finally:
            self._generator.forget(self._request)

    def _is_client_gone(self) -> bool:
        """Whether the client closed its connection."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)

    def _send_failure(self, error: Exception) -> None:
        """Say that an answer cannot be given, or that a streamed one will not be finished."""
        status, code = (503 if isinstance(error, RuntimeError) else 500), None
        if isinstance(error, RequestRefused):
            status, code = error.status, error.code
        if self._is_streaming:
            document = describe_error(str(error), status, code)
            self.wfile.write(f"data: {json.dumps(document)}\n\n".encode())
            return
        self._headers_buffer: list[bytes] = []  # mlx_lm has written 200 there, and not sent it
        self._send_error_document(str(error), status, code)

    def _set_completion_headers(self, status_code: int = 200) -> None:
        if self._request is not None and self._request.failure is not None:
            raise self._request.failure  # mlx_lm would say it with 404, in a shape of its own
        super()._set_completion_headers(status_code)
        if status_code == 503:
            self.send_header("Retry-After", str(AGAIN_AFTER_SECONDS))
        self._name_version()

    def _set_stream_headers(self, status_code: int = 200) -> None:
        self._is_streaming = True
        super()._set_stream_headers(status_code)
        self._name_version()

    def generate_response(
        self, text: str, finish_reason: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As mlx_lm's; the reason is "length" only where the answer did not end by itself."""
        self._has_called_tool = self._has_called_tool or bool(kwargs.get("tool_calls"))
        answer = None if self._request is None else self._request.answer
        if finish_reason == "length" and answer is not None and answer.is_ended:
            finish_reason = "tool_calls" if self._has_called_tool else "stop"
        response: dict[str, Any] = super().generate_response(text, finish_reason, *args, **kwargs)
        return response

    def _name_version(self) -> None:
        """Name the version that answers; mlx_lm sets the headers before the rest of an answer."""
        if self._request is not None:
            self.system_fingerprint = self._request.version.version
            self.send_header(VERSION_HEADER, self._request.version.version)

    def handle_health_check(self) -> None:
        """Whether answers are generated, what is served for each name, and what is in the way.

        A registry that cannot be read is a problem, and no reason to stop a server that answers.
        """
        is_healthy = self._generator.is_healthy
        names = {name: status.fields() for name, status in self._follower.names.items()}
        status = "ok" if is_healthy else "unavailable"
        problems = list(self._follower.problems.values())
        said = {"status": status, "names": names, "problems": problems}
        self._send_json(200 if is_healthy else 503, said)

    def handle_models_request(self) -> None:
        """The names, their base, and every version that can be asked for."""
        wanted = self.path.removeprefix("/v1/models").strip("/")
        models = [
            model
            for name in self._follower.names
            for model in (
                name,
                f"{name}@{BASE_VERSION}",
                *(f"{name}@{version}" for version in self._follower.list_versions(name)),
            )
            if wanted in ("", model)
        ]
        listed = [{"id": model, "object": "model", "created": self.created} for model in models]
        self._send_json(200, {"object": "list", "data": listed})

    def _send_body(self, status_code: int, body: bytes, content_type: str) -> None:
        self.send_response(status_code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_json(self, status_code: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self._set_completion_headers(status_code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _send_error_document(self, message: str, status: int, code: str | None = None) -> None:
        self._send_json(status, describe_error(message, status, code))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, such as another method, in the shape of all errors."""
        status = 405 if code == HTTPStatus.NOT_IMPLEMENTED else code
        body = json.dumps(describe_error(message or HTTPStatus(status).phrase, status)).encode()
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing: http.server calls it when an answer begins."""

    def _log_ended_request(self) -> None:
        """One line a request, in which a client's control characters are escaped."""
        request, seconds = self._request, time.monotonic() - self._began
        version = None if request is None else request.version.version
        fields = {
            "client": self.address_string(),
            "request": escape(self.requestline),
            "status": self._status,
            "seconds": round(seconds, 4),
            "adapter": None if request is None else request.name,
            "version": version,
        }
        answered = "" if version is None else f" {fields['adapter']}@{shorten_digest(version)}"
        logging.info(
            "%s %s %s%s %.3f s",
            *(fields[key] for key in ("client", "request", "status")),
            answered,
            seconds,
            extra=fields,
        )

    def log_message(self, format: str, *args: Any) -> None:
        """What http.server tells of a connection, such as that it timed out."""
        logging.info("%s %s", self.address_string(), escape(format % args))


def _no_route(path: str) -> RequestRefused:
    routes = ", ".join([*ROUTES, "/v1/models", *UNLOCKED_ROUTES])
    return RequestRefused(f"Nothing is at {path!r:.80}; there are {routes}.", 404)


def _no_model(message: str) -> RequestRefused:
    return RequestRefused(message, 404, "model_not_found")


def _is_own_host(given: str | None, host: str) -> bool:
    """Whether a request's Host is the server's; asked of one that listens to its own machine.

    A web page whose name was made to lead to this machine sends that name.
    """
    if given is None or not is_loopback(host):
        return True
    try:
        name = urlsplit(f"//{given}").hostname
    except ValueError:
        return False
    return name is not None and (name == host or is_loopback(name))


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, reached from itself alone."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
