"""The server as a whole: registry, base, generation thread, follower and HTTP, begun and ended."""

from __future__ import annotations

import argparse
import errno
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mlx_lm.utils import maybe_set_recommended_wired_limit

from nested_core.errors import ConfigError
from nested_core.models.base_model import find_model_folder
from nested_core.registry import VerifiedVersion, read_champion, read_verified_version
from nested_core.registry.serving_status import ServingNews
from nested_core.serve.champion_follower import ChampionFollower
from nested_core.serve.http_handler import RegistryHandler
from nested_core.serve.prometheus_metrics import ServingMetrics
from nested_core.serve.response_generator import (
    RegistryModelProvider,
    RegistryPromptCache,
    RegistryResponseGenerator,
)
from nested_core.serve.served_version import ServedVersion, require_same_base

MAX_CONNECTIONS_WITHOUT_REQUEST = 256
SECONDS_TO_CLOSE = 0.5


@dataclass(frozen=True)
class ServeSettings:
    """What is served, and how.

    registry: its folder.
    names: in the registry; the first is what a request without `model` gets.
    swap_wait: seconds that a swap waits for running requests.
    api_key: what clients have to send; None asks for none.
    options: those of mlx_lm.server, by its names; `model` is the base, or None for the one that the
        first champion's configuration names.
    tell: called, from the thread that follows, with what was done with each champion.
    """

    registry: Path
    names: Sequence[str]
    swap_wait: float
    api_key: str | None
    options: argparse.Namespace
    tell: Callable[[ServingNews], None] = lambda news: None


class _HTTPServer(ThreadingHTTPServer):
    """A thread a connection; a client that goes away is no error.

    Of the connections that have not sent a whole request, the oldest is closed where there are too
    many, or where the process may open no more files.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._without_request: dict[int, socket.socket] = {}  # by id(), oldest first
        self._has_changed = threading.Condition()
        super().__init__(*args, **kwargs)

    def get_request(self) -> tuple[socket.socket, Any]:
        """As socketserver's, which asks again after an OSError."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._close_oldest()
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin its thread."""
        with self._has_changed:
            self._without_request[id(request)] = request
            are_too_many = len(self._without_request) > MAX_CONNECTIONS_WITHOUT_REQUEST
        if are_too_many:
            self._close_oldest()
        super().process_request(request, client_address)

    def note_request(self, connection: Any) -> None:
        """A connection has sent its whole request."""
        with self._has_changed:
            self._without_request.pop(id(connection), None)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        super().shutdown_request(request)
        with self._has_changed:
            self._without_request.pop(id(request), None)
            self._has_changed.notify_all()

    def _close_oldest(self) -> None:
        """End the oldest connection without a request, and wait until any is closed."""
        with self._has_changed:
            oldest = next(iter(self._without_request.values()), None)
            if oldest is not None:
                with suppress(OSError):  # it was closed by its client
                    oldest.shutdown(socket.SHUT_RDWR)
            self._has_changed.wait(SECONDS_TO_CLOSE)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log it."""
        if isinstance(sys.exception(), ConnectionError):
            logging.info("%s went away", client_address[0])
        else:
            logging.exception("a request of %s failed", client_address[0])


class RunningServer:
    """A server that listens; `serve` answers until `stop` is called or generation fails.

    generator: the generation thread, with what is served for each name.
    follower: the thread that follows the registry.
    address: http://HOST:PORT.
    """

    def __init__(
        self, http: _HTTPServer, generator: RegistryResponseGenerator, follower: ChampionFollower
    ) -> None:
        self._http = http
        self.generator = generator
        self.follower = follower
        self.address = _address(http)

    def serve(self) -> None:
        """Answer requests. Raises what ended the generation thread, if that is why it ends."""
        watch = threading.Thread(target=self._stop_with_generation, daemon=True)
        watch.start()
        self._http.serve_forever(poll_interval=0.1)
        if self.generator.failure is not None:
            raise self.generator.failure

    def stop(self) -> None:
        """Have `serve` return; call it from another thread."""
        self._http.shutdown()

    def _stop_with_generation(self) -> None:
        self.generator.join()
        self._http.shutdown()


@contextmanager
def starting_server(settings: ServeSettings) -> Iterator[RunningServer]:
    """Load what is served, and listen; when the block ends, all of it ends.

    Requests that are under way then are finished, for as long as a swap would wait for them, unless
    the block ends by an exception.
    Raises ConfigError for a registry, name, base or port that cannot be served, DamagedError for a
    champion that is not what was registered, CanaryFailed for one whose canary fails where there is
    no champion before it to serve.
    """
    champions = {name: _read_champion(settings.registry, name) for name in settings.names}
    first = next(iter(champions.values())).adapter
    base = find_model_folder(str(settings.options.model or first.config.get("model")))
    for champion in champions.values():
        require_same_base(champion, base)
    versions = [ServedVersion.of(name, champion) for name, champion in champions.items()]
    of_the_registry = {"model": str(base), "adapter_path": None, "pipeline": False}
    options = argparse.Namespace(**vars(settings.options) | of_the_registry)
    maybe_set_recommended_wired_limit()
    http = _listen(options.host, options.port)
    try:
        cache = RegistryPromptCache(options.prompt_cache_size)
        provider = RegistryModelProvider(options, cache, versions)
        generator = RegistryResponseGenerator(provider, cache, versions)
        try:
            generator.require_ready()
            follower = ChampionFollower(
                settings.registry,
                base,
                generator,
                address=_address(http),
                swap_wait=settings.swap_wait,
                tell=settings.tell,
            )
            metrics = ServingMetrics(generator, lambda: len(follower.problems))
            http.RequestHandlerClass = lambda *args: RegistryHandler(
                generator, *args, follower=follower, metrics=metrics, api_key=settings.api_key
            )
            follower.start()
            try:
                yield RunningServer(http, generator, follower)
                generator.wait_for_requests(settings.swap_wait)
            finally:
                follower.stop()
        finally:
            generator.stop_and_join()
    finally:
        http.server_close()


def _read_champion(registry: Path, name: str) -> VerifiedVersion:
    champion = read_champion(registry, name)
    if champion is None:
        raise ConfigError(
            f"{registry / name} has no champion yet. Expected a version that was promoted: "
            f"`nested-tune promote RUN_DIR --registry {registry} --name {name}` makes one."
        )
    return read_verified_version(registry, name, champion)


def _listen(host: str, port: int) -> _HTTPServer:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        server = type("_Server", (_HTTPServer,), {"address_family": family})
        return server(address, RegistryHandler)  # type: ignore[no-any-return]
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{host}:{port} cannot be listened at ({error}). Expected an address of this machine "
            f"and a port that is free: --host, --port."
        ) from error


def _address(http: ThreadingHTTPServer) -> str:
    host, port = str(http.server_address[0]), http.server_address[1]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"
