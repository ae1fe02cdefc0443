"""mlx_lm.server's HTTP handler and routes; models are names, and every answer has its version."""

from __future__ import annotations

import hmac
import json
import logging
from io import BytesIO
from typing import Any

from mlx_lm.server import APIHandler, CompletionRequest

from nested_core.errors import NestedTuneError
from nested_core.serve.champion_follower import ChampionFollower
from nested_core.serve.response_generator import (
    RegistryResponseGenerator,
    SwapWaitOver,
    VersionedRequest,
)
from nested_core.serve.served_version import BASE_VERSION

VERSION_HEADER = "X-Adapter-Version"
DEFAULT_MODEL = "default_model"  # what mlx_lm takes for a request without `model`
AGAIN_AFTER_SECONDS = 1
MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_ANSWER_TOKENS = 2**20
MAX_DRAFT_TOKENS = 64
MAX_SEED = 2**64 - 1  # mx.random.seed
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_WAITING_REQUESTS = 1024


class RegistryHandler(APIHandler):
    """One connection of a client."""

    def __init__(
        self,
        response_generator: RegistryResponseGenerator,
        *args: Any,
        follower: ChampionFollower,
        api_key: str | None,
        **kwargs: Any,
    ) -> None:
        """`api_key` is what clients have to send; None asks for none."""
        self._generator = response_generator
        self._follower = follower
        self._api_key = api_key
        self._request: VersionedRequest | None = None
        super().__init__(response_generator, *args, **kwargs)

    timeout = 120  # seconds without a byte, on a connection of which something is expected

    def do_POST(self) -> None:
        """Answer, where the client may ask, and the body is no larger than a request is."""
        if not self._require_api_key():
            return
        given = self.headers.get("Content-Length")
        if given is not None and given.isascii() and given.isdigit():
            if int(given) > MAX_BODY_BYTES:
                self.close_connection = True  # the body is not read
                self._send_json(413, {"error": f"A request has at most {MAX_BODY_BYTES} bytes."})
                return
            body = self.rfile.read(int(given))
            try:
                json.loads(body)
            except (ValueError, RecursionError) as error:  # mlx_lm's handler ends at some of them
                said = f"Invalid JSON in request body: {type(error).__name__}: {error}"
                self._send_json(400, {"error": said})
                return
            self.rfile = BytesIO(body)
        elif given is not None:  # mlx_lm's would wait for the end of the connection at -1
            self._send_json(400, {"error": "Invalid Content-Length header"})
            return
        super().do_POST()

    def do_GET(self) -> None:
        """As mlx_lm's; `/health` is open to all, so that a supervisor needs no key."""
        if self.path == "/health" or self._require_api_key():
            super().do_GET()

    def _require_api_key(self) -> bool:
        """Whether the client may ask; else it is told that it may not."""
        given = self.headers.get("Authorization", "")
        if self._api_key is None or hmac.compare_digest(
            given.encode("latin-1", "replace"), f"Bearer {self._api_key}".encode()
        ):
            return True
        self._send_json(401, {"error": "Give the server's API key: Authorization: Bearer KEY."})
        return False

    def validate_model_parameters(self) -> None:
        """As mlx_lm's; what would load something past the registry is refused."""
        super().validate_model_parameters()
        self._validate_bounds()
        if self.adapter is not None:
            raise ValueError(
                "adapters is not taken here: what is served is chosen by model, as NAME or "
                "NAME@VERSION of the registry."
            )
        if self.requested_draft_model != DEFAULT_MODEL:
            raise ValueError("draft_model is not taken here: --draft-model chooses it.")

    def _validate_bounds(self) -> None:
        """Raise ValueError for what mlx_lm's handler takes without a bound."""
        self._validate("max_tokens", int, max_val=MAX_ANSWER_TOKENS)
        self._validate("num_draft_tokens", int, max_val=MAX_DRAFT_TOKENS)
        self._validate("seed", int, min_val=0, max_val=MAX_SEED, optional=True)
        self._validate("stream_options", dict, optional=True)
        if self.stream_options is not None:  # which mlx_lm's reads as if the key were there
            include_usage = self.stream_options.get("include_usage", False)
            if not isinstance(include_usage, bool):
                raise ValueError("stream_options.include_usage must be of type bool")
            self.stream_options = {"include_usage": include_usage}
        stop = self.body.get("stop")
        stops = [stop] if isinstance(stop, str) else stop or []
        is_list = isinstance(stops, list) and all(isinstance(text, str) for text in stops)
        if not is_list or len(stops) > MAX_STOPS or any(len(s) > MAX_STOP_LENGTH for s in stops):
            raise ValueError(
                f"stop must be a text or a list of at most {MAX_STOPS} texts, each of at most "
                f"{MAX_STOP_LENGTH} characters"
            )

    def handle_completion(self, request: CompletionRequest, stop_words: list[str]) -> None:
        """Answer with the version that the request is for, or say why it is not served."""
        generator = self._generator
        wanted = self.requested_model
        name, _, version = wanted.partition("@")
        name = generator.default_name if wanted == DEFAULT_MODEL else name
        if name not in generator.names:
            served = ", ".join(generator.names)
            self._send_json(404, {"error": f"No model {wanted!r:.80} here; served: {served}."})
            return
        try:
            pinned = self._follower.find_version(name, version) if version else None
        except (NestedTuneError, OSError) as error:
            self._send_json(404, {"error": str(error)})
            return
        if generator.requests.qsize() >= MAX_WAITING_REQUESTS:
            self._send_json(503, {"error": "Too many requests wait here. Ask again later."})
            return
        self._request = VersionedRequest(**vars(request), name=name, pinned=pinned)
        generator.count_request(name)
        try:
            super().handle_completion(self._request, stop_words)
        except ConnectionError:
            raise
        except Exception as error:  # whatever it is, the client is told
            self._end_begun_answer(error)
        finally:
            generator.count_outcome(self._request)
            generator.forget(self._request)

    def _end_begun_answer(self, error: Exception) -> None:
        """Say that an answer which was begun will not be finished."""
        if self.stream:
            self.wfile.write(f"data: {json.dumps({'error': str(error)})}\n\n".encode())
            return
        self._headers_buffer: list[bytes] = []  # mlx_lm has written 200 there, and not sent it
        status = 503 if isinstance(error, SwapWaitOver | RuntimeError) else 500
        self._send_json(status, {"error": str(error)})

    def _set_completion_headers(self, status_code: int = 200) -> None:
        if self._request is not None and self._request.failure_status is not None:
            status_code = self._request.failure_status
        super()._set_completion_headers(status_code)
        if status_code == 503:
            self.send_header("Retry-After", str(AGAIN_AFTER_SECONDS))
        self._name_version()

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)
        self._name_version()

    def _name_version(self) -> None:
        """Name the version that answers; mlx_lm sets the headers before the rest of an answer."""
        if self._request is not None and self._request.bound is not None:
            self.system_fingerprint = self._request.bound.version
            self.send_header(VERSION_HEADER, self._request.bound.version)

    def handle_health_check(self) -> None:
        """Whether answers are generated, what is served for each name, and what is in the way.

        A registry that cannot be read is a problem, and no reason to stop a server that answers.
        """
        is_healthy = self._generator.is_healthy
        names = {name: status.fields() for name, status in self._generator.names.items()}
        status = "ok" if is_healthy else "unavailable"
        problems = list(self._follower.problems.values())
        said = {"status": status, "names": names, "problems": problems}
        self._send_json(200 if is_healthy else 503, said)

    def handle_models_request(self) -> None:
        """The names, their base, and every version that can be asked for."""
        wanted = self.path.removeprefix("/v1/models").strip("/")
        models = [
            model
            for name in self._generator.names
            for model in (
                name,
                f"{name}@{BASE_VERSION}",
                *(f"{name}@{version}" for version in self._follower.list_versions(name)),
            )
            if wanted in ("", model)
        ]
        listed = [{"id": model, "object": "model", "created": self.created} for model in models]
        self._send_json(200, {"object": "list", "data": listed})

    def _send_json(self, status_code: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self._set_completion_headers(status_code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """One line a request, in the log."""
        logging.info("%s %s", self.address_string(), format % args)
