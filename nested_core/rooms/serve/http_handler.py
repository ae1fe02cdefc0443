"""mlx_lm.server's HTTP handler and routes; models are names, and every answer has its version."""

from __future__ import annotations

import hmac
import json
import logging
import math
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.client import LineTooLong
from http.server import ThreadingHTTPServer
from io import BytesIO
from ipaddress import ip_address
from typing import Any

from mlx_lm.server import APIHandler, CompletionRequest

from nested_core.backend import release_freed_memory
from nested_core.errors import ConfigError, NestedTuneError
from nested_core.models.tokenizer_cell import asking_client
from nested_core.process.turns import Turns
from nested_core.rooms.serve.engine import VersionedGenerator, VersionedRequest
from nested_core.rooms.serve.follower import ChampionFollower
from nested_core.rooms.serve.metrics import CLIENT_CLOSED_REQUEST, CONTENT_TYPE, ServingMetrics
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

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_LENGTH_DIGITS = 9
MAX_HEADER_BYTES = 64 * 1024
LARGE_BODY_BYTES = 16 * 1024
BODY_SHARE, LARGE_BODY_SHARE = 0.5, 0.1  # of the time, at most, that goes into parsing bodies
MAX_HELD_BYTES = 64 * 1024 * 1024  # of requests under way; more large ones are refused
MAX_PORT = 65535
MAX_WAITING_REQUESTS = 1024
MAX_CONNECTIONS = 1280  # of the 2,048 files that mlx_lm lets a process open
ENDED_AT_A_TIME = 32
ARRIVAL_SECONDS = 30.0  # for a request to come as a whole
LINGER_SECONDS = 2.0  # in which a client that was refused may send the rest
BUSY = b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
UNLOCKED_ROUTES = ("/health", "/metrics")  # need no key, so that who watches has none
LOOPBACK_HOST = re.compile(r"(localhost|127(\.\d{1,3}){1,3}|\[::1\])(:\d*)?", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Return whether a host's addresses are of this machine alone; False without any."""
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    addresses = [ip_address(str(place[0]).partition("%")[0]) for *_, place in found]
    return all((getattr(one, "ipv4_mapped", None) or one).is_loopback for one in addresses)


class HeaderLines:
    """The lines of a request's headers, of a bounded size in all."""

    def __init__(self, file: Any) -> None:
        """Read them from a file of bytes."""
        self._file = file
        self._left = MAX_HEADER_BYTES

    def readline(self, limit: int = -1) -> bytes:
        """Return a line; LineTooLong, which http.server answers with 431, beyond the bound."""
        line: bytes = self._file.readline(min(limit, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise LineTooLong("header")
        return line


class RegistryHandler(APIHandler):
    """One connection of a client."""

    server: ServingServer
    timeout = 120  # seconds without a byte, on a connection of which something is expected

    # A connection has one request, as mlx_lm's: http.server speaks HTTP/1.0.
    _status = 0  # that was sent last
    _request: VersionedRequest | None = None
    _is_streaming = False
    _has_called_tool = False

    def parse_request(self) -> bool:
        """Read the headers as http.server does, within their bound."""
        whole: Any = self.rfile
        self.rfile: Any = HeaderLines(whole)
        try:
            return super().parse_request()
        finally:
            self.rfile = whole

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Remember the status; http.server calls it when an answer begins."""
        self._status = int(code)

    def do_GET(self) -> None:
        """Answer as mlx_lm does, and /metrics."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Answer as mlx_lm does."""
        self._answer(self._post)

    def do_OPTIONS(self) -> None:
        """Answer what a browser asks before it lets a page of another origin ask."""
        self._answer(super().do_OPTIONS)

    def _answer(self, answer: Callable[[], None]) -> None:
        """Answer a request, and count and log it when it has ended."""
        if self.connection not in self.server.connections:
            raise ConnectionAbortedError("the server ended it before its request had come")
        began = time.monotonic()
        try:
            self._require_permission()
            answer()
        except RequestRefused as refused:
            self._send_error(str(refused), refused.status, refused.code)
        except ConnectionError:
            self._status = CLIENT_CLOSED_REQUEST
            raise
        finally:
            self._note_ended_request(time.monotonic() - began)

    def _get(self) -> None:
        if self.path == "/metrics":
            self._send(200, self.server.metrics.render(), CONTENT_TYPE)
        elif self.path == "/health" or self.path.startswith("/v1/models"):
            super().do_GET()
        else:
            raise _no_route(self.path)

    def _post(self) -> None:
        size = self._find_size()
        with self.server.holding(size) as hold:
            body = self._receive(size, hold)
            self.server.connections[self.connection] = math.inf
            if [*self.server.connections.values()].count(math.inf) > MAX_WAITING_REQUESTS:
                raise RequestRefused("Too many requests wait here. Ask again later.", 503)
            turns = self.server.large_bodies if size > LARGE_BODY_BYTES else self.server.bodies
            with turns.taking(size):  # no other thread runs while Python parses one
                if self._is_client_gone():  # while it waited
                    raise ConnectionAbortedError("the client left")
                body = json.dumps(read_request(self.path, body)).encode()
            self.rfile = BytesIO(body)
            self.headers.replace_header("Content-Length", str(len(body)))
            super().do_POST()

    def _receive(self, size: int, hold: Callable[[int], None]) -> bytes:
        """Read the body; `hold` is called with the size of each part of it that has come.

        Raises RequestRefused where it ends before its size.
        """
        parts: list[bytes] = []
        while size > 0 and (part := self.rfile.read1(min(size, LARGE_BODY_BYTES))):
            hold(len(part))
            parts.append(part)
            size -= len(part)
        if size > 0:
            status = 400 if self.connection in self.server.connections else 503  # as it was told
            raise RequestRefused(f"The body ended {size} bytes before its Content-Length.", status)
        return b"".join(parts)

    def _require_permission(self) -> None:
        """Raise RequestRefused where the client, or the web page that asks, may not ask."""
        options = self.server.generator.cli_args
        origin, host = self.headers.get("Origin"), self.headers.get("Host")
        if origin is not None and not {"*", origin} & {*options.allowed_origins}:
            said = f"The origin {origin!r:.80} may not ask here; see --allowed-origins."
            raise RequestRefused(said, 403)
        # A web page whose name was made to lead to this machine sends that name.
        if host is not None and self.server.is_local:
            is_own = host.partition(":")[0].lower() == options.host.lower()
            if not (is_own or LOOPBACK_HOST.fullmatch(host)):
                said = f"This server is {options.host}, and the request is for {host!r:.80}."
                raise RequestRefused(said, 421)
        if self.server.api_key is None or self.command == "OPTIONS" or self.path in UNLOCKED_ROUTES:
            return
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        given = given[:7].lower() + given[7:]  # of a scheme, capitals do not count
        if not hmac.compare_digest(given, f"bearer {self.server.api_key}".encode()):
            said = "Give the server's API key: Authorization: Bearer KEY."
            raise RequestRefused(said, 401, "invalid_api_key")

    def _find_size(self) -> int:
        """Return the bytes of the body. Raises RequestRefused where it is not to be read."""
        if self.path not in ROUTES:
            raise _no_route(self.path)
        given = self.headers.get("Content-Length")
        if given is None:
            raise RequestRefused("The header Content-Length is required.", 411)
        if not (given.isascii() and given.isdigit()):
            raise RequestRefused("The header Content-Length is no number of bytes.")
        if len(given) > MAX_LENGTH_DIGITS or int(given) > MAX_BODY_BYTES:
            raise RequestRefused(f"A request has at most {MAX_BODY_BYTES} bytes.", 413)
        return int(given)

    def handle_completion(self, request: CompletionRequest, stop_words: list[str]) -> None:
        """Answer with the version that the request is for. Raises RequestRefused without one."""
        asking_client.set((self.client_address[0], self.server.hanging_clients))
        names = self.server.follower.names
        if self.requested_model == DEFAULT_MODEL:
            self.requested_model = next(iter(names))  # the answer says which model gave it
        name, _, wanted = self.requested_model.partition("@")
        if name not in names:
            said = f"No model {self.requested_model!r:.80} here; served: {', '.join(names)}."
            raise RequestRefused(said, 404, "model_not_found")
        try:
            version = self.server.follower.find_version(name, wanted)
        except (NestedTuneError, OSError, RuntimeError) as error:
            raise RequestRefused(str(error), 404, "model_not_found") from error
        names[name].requests += 1
        if version.lacks_system_text(request):
            if not names[name].without_system_text:
                logging.warning("%s: a request lacks the system text of training", name)
            names[name].without_system_text += 1
        tokenizer = self.server.generator.model_provider.tokenizer
        if not names[name].has_plain_text and version.lacks_template(request, tokenizer):
            names[name].has_plain_text = True
            told = "%s: a text came without the chat template of training: use /v1/chat/completions"
            logging.warning(told, name)
        count_token = names[name].rate.add_token
        self._request = VersionedRequest(
            **vars(request),
            name=name,
            version=version,
            count_token=count_token,
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
            self.server.generator.forget(self._request)

    def _is_client_gone(self) -> bool:
        """Return whether the client closed or reset its connection, or closed its sending side.

        These look alike. What it sends beyond its request is thrown away, and hides no end.
        """
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        try:
            return bool(poll.poll(0)) and not self.connection.recv(2**16)
        except OSError:
            return True

    def _send_failure(self, error: Exception) -> None:
        """Say that an answer cannot be given, or that a streamed one will not be finished."""
        status, code = (503 if isinstance(error, RuntimeError) else 500), None
        if isinstance(error, RequestRefused):
            status, code = error.status, error.code
        if self._is_streaming:
            document = json.dumps(describe_error(str(error), status, code))
            self.wfile.write(f"data: {document}\n\n".encode())
            return
        self._headers_buffer: list[bytes] = []  # mlx_lm has written 200 there, and not sent it
        self._send_error(str(error), status, code)

    def _set_completion_headers(self, status_code: int = 200) -> None:
        if self._request is not None and self._request.failure is not None:
            raise self._request.failure  # mlx_lm would say it with 404, in a shape of its own
        super()._set_completion_headers(status_code)
        self._name_version()

    def _set_stream_headers(self, status_code: int = 200) -> None:
        self._is_streaming = True
        super()._set_stream_headers(status_code)
        self._name_version()

    def generate_response(
        self, text: str, finish_reason: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Answer as mlx_lm; the reason is "length" only if the answer did not end by itself."""
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
            self.send_header("X-Adapter-Version", self.system_fingerprint)

    def handle_health_check(self) -> None:
        """Report if answers are generated, what is served for each name, and what is in the way.

        A registry that cannot be read is a problem, and no reason to stop a server that answers.
        """
        is_healthy = self.server.generator.is_healthy
        said = {
            "status": "ok" if is_healthy else "unavailable",
            "names": {name: status.fields() for name, status in self.server.follower.names.items()},
            "problems": list(self.server.follower.problems.values()),
        }
        self._send(200 if is_healthy else 503, json.dumps(said).encode())

    def handle_models_request(self) -> None:
        """List the names, their base, and every version that can be asked for."""
        wanted = self.path.removeprefix("/v1/models").strip("/")
        list_versions = self.server.follower.list_versions
        models = [
            f"{name}{version}"
            for name in self.server.follower.names
            for version in ("", f"@{BASE_VERSION}", *map("@{}".format, list_versions(name)))
        ]
        more = {"object": "model", "created": self.created}
        listed = [{"id": model} | more for model in models if wanted in ("", model)]
        self._send(200, json.dumps({"object": "list", "data": listed}).encode())

    def _send(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        """Send a whole answer: status, headers and, unless the request was HEAD, the body."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", "1")
        if hasattr(self, "headers"):  # they could be read
            self._set_cors_headers()
        self._name_version()
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_error(self, message: str, status: int, code: str | None = None) -> None:
        self._send(status, json.dumps(describe_error(message, status, code)).encode())

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send what http.server itself refuses, such as another method, as all errors are."""
        status = 405 if code == HTTPStatus.NOT_IMPLEMENTED else code
        self.log_message("%s %d", self.requestline, status)
        self._send_error(message or HTTPStatus(status).phrase, status)

    def _note_ended_request(self, seconds: float) -> None:
        """Count a question, and log any request in one line with control characters escaped."""
        request = self._request
        name = None if request is None else request.name
        version = None if request is None else request.version.version
        if self.command == "POST":
            self.server.metrics.note_request(name, self._status, seconds)
        fields = {
            "client": self.address_string(),
            "request": escape(self.requestline),
            "status": self._status,
            "seconds": round(seconds, 4),
            "adapter": name,
            "version": version,
        }
        answered = "" if version is None else f" {name}@{shorten_digest(version)}"
        said = f"{fields['client']} {fields['request']} {self._status}{answered} {seconds:.3f} s"
        logging.info("%s", said, extra=fields)

    def log_message(self, format: str, *args: Any) -> None:
        """Log what http.server tells of a connection, such as that it timed out."""
        logging.info("%s %s", self.address_string(), escape(format % args))


class ServingServer(ThreadingHTTPServer):
    """A server that listens, with a thread a connection; `serve` answers until `shutdown`.

    generator: the generation thread.
    follower: the thread that follows the registry, with what is served for each name.
    metrics: the counts of requests.
    api_key: what clients have to send; None asks for none.
    address: http://HOST:PORT.
    is_local: whether this machine alone reaches it.
    connections: those that are open, the oldest first, each with the time by which its request has
        to be there, by time.monotonic(); math.inf once it is.
    """

    generator: VersionedGenerator
    follower: ChampionFollower
    metrics: ServingMetrics
    request_queue_size = MAX_CONNECTIONS  # that wait to be taken; Python's 5 cost others a second

    def __init__(self, host: str, port: int, api_key: str | None) -> None:
        """Raises ConfigError for an address or a port that cannot be listened at."""
        self.api_key = api_key
        self.connections: dict[Any, float] = {}
        self.bodies = Turns(BODY_SHARE)
        self.large_bodies = Turns(LARGE_BODY_SHARE)
        self.hanging_clients: set[str] = set()  # as `asking_client` has them
        self._held_bytes = 0
        self._holding = threading.Lock()
        try:
            if not 0 <= port <= MAX_PORT:  # which getaddrinfo would take modulo 65536
                raise OverflowError(f"ports are from 0 to {MAX_PORT}")
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, _, _, _, address = found[0]
            super().__init__(address, RegistryHandler)  # type: ignore[arg-type]
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"{host}:{port} cannot be listened at ({error}). Expected an address of this "
                f"machine and a port that is free: --host, --port."
            ) from error
        name = str(self.server_address[0])
        self.is_local = is_loopback(name)
        self.address = f"http://{f'[{name}]' if ':' in name else name}:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection; of too many, end the one whose request is longest in coming."""
        self.connections[request] = time.monotonic() + ARRIVAL_SECONDS
        if len(self.connections) > MAX_CONNECTIONS:
            self._end(next(one for one, by in self.connections.copy().items() if by < math.inf))
        super().process_request(request, client_address)

    @contextmanager
    def holding(self, length: int) -> Iterator[Callable[[int], None]]:
        """Yield what counts a body's bytes as they come; they count until they are answered.

        It raises RequestRefused for bytes of a large body while as many are held as may be, half of
        them by the largest.
        """
        held, is_large = 0, length > LARGE_BODY_BYTES
        room = MAX_HELD_BYTES // (2 if length > MAX_BODY_BYTES // 4 else 1)

        def hold(size: int) -> None:
            """Count so many bytes that have come."""
            nonlocal held
            with self._holding:
                if is_large and self._held_bytes + size > room:
                    said = f"Requests of {self._held_bytes} bytes wait here already."
                    raise RequestRefused(f"{said} Ask again later.", 503)
                self._held_bytes += size
                held += size

        try:
            yield hold
        finally:
            with self._holding:
                self._held_bytes -= held
                is_over = self._held_bytes == 0
            if is_over and is_large:
                release_freed_memory()

    def service_actions(self) -> None:
        """End some of the connections whose requests did not come in time; called often.

        Each end wakes a thread: a thousand at once would keep the others waiting.
        """
        late = [one for one, by in self.connections.copy().items() if by <= time.monotonic()]
        for connection in late[:ENDED_AT_A_TIME]:
            self._end(connection)

    def _end(self, late: Any) -> None:
        """End a connection whose request has not come; its thread is told by that, too."""
        self.connections.pop(late, None)
        with suppress(OSError):
            late.send(BUSY, socket.MSG_DONTWAIT)
            late.shutdown(socket.SHUT_RDWR)

    def wait_for_requests(self, seconds: float) -> None:
        """Return when each request whose body came is answered, or so many seconds are over."""
        deadline = time.monotonic() + seconds
        while self.generator.generation_available() and time.monotonic() < deadline:
            if math.inf not in self.connections.copy().values():
                return
            time.sleep(0.05)

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection that has ended.

        What a client sends on after a refusal is thrown away for some seconds: a connection closed
        meanwhile is reset, and the client never reads why (RFC 9112, section 9.6).
        """
        if self.connections.get(request, math.inf) < math.inf:
            with suppress(OSError):
                request.shutdown(socket.SHUT_WR)
                request.settimeout(LINGER_SECONDS)
                deadline = time.monotonic() + LINGER_SECONDS
                while request.recv(2**16) and time.monotonic() < deadline:
                    pass
        self.connections.pop(request, None)
        super().shutdown_request(request)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection."""
        RegistryHandler(self.generator, request, client_address, self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a connection ended by; a client that goes away is no error."""
        if isinstance(sys.exception(), ConnectionError):
            logging.info("%s went away", client_address[0])
        else:
            logging.exception("a request of %s failed", client_address[0])

    def serve(self) -> None:
        """Answer requests. Raises what ended the generation thread, if that is why it ends."""
        threading.Thread(target=self._stop_with_generation, daemon=True).start()
        self.serve_forever(poll_interval=0.1)
        if self.generator.failure is not None:
            raise self.generator.failure

    def _stop_with_generation(self) -> None:
        self.generator.join()
        self.shutdown()


def _no_route(path: str) -> RequestRefused:
    routes = ", ".join([*ROUTES, "/v1/models", *UNLOCKED_ROUTES])
    return RequestRefused(f"Nothing is at {path!r:.80}; there are {routes}.", 404)
