"""The server as a whole: registry, base, generation thread, follower and HTTP, begun and ended."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any

from mlx_lm.utils import maybe_set_recommended_wired_limit

from nested_core.errors import ConfigError
from nested_core.models.base_model import find_model_folder, fingerprint_base_model
from nested_core.registry import read_verified_version
from nested_core.rooms.serve.engine import (
    PartialPromptCache,
    VersionedGenerator,
    VersionProvider,
)
from nested_core.rooms.serve.follower import ChampionFollower, require_champion
from nested_core.rooms.serve.http_handler import RegistryHandler
from nested_core.rooms.serve.metrics import ServingMetrics

SECONDS_TO_FINISH = 30.0  # for the answers under way when the server is told to end


class _HTTPServer(ThreadingHTTPServer):
    """A thread a connection; a client that goes away is no error."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log it."""
        if isinstance(sys.exception(), ConnectionError):
            logging.info("%s went away", client_address[0])
        else:
            logging.exception("a request of %s failed", client_address[0])


class RunningServer:
    """A server that listens; `serve` answers until `stop` is called or generation fails.

    generator: the generation thread.
    follower: the thread that follows the registry, with what is served for each name.
    address: http://HOST:PORT.
    """

    def __init__(
        self, http: _HTTPServer, generator: VersionedGenerator, follower: ChampionFollower
    ) -> None:
        self._http = http
        self.generator = generator
        self.follower = follower
        host, port = str(http.server_address[0]), http.server_address[1]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

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
def starting_server(
    options: argparse.Namespace, api_key: str | None = None
) -> Iterator[RunningServer]:
    """Load what is served, and listen; when the block ends, all of it ends.

    options: `registry`, its names in `name`, of which the first is what a request without `model`
        gets, and the options of mlx_lm.server; `model` is the base, or None for the one that the
        first champion's configuration names.
    api_key: what clients have to send; None asks for none.

    Requests that are under way then are finished, for at most SECONDS_TO_FINISH, unless the block
    ends by an exception.
    Raises ConfigError for a registry, name, base or port that cannot be served, DamagedError for a
    champion that is not what was registered, CanaryFailed for one whose canary fails where there is
    no champion before it to serve.
    """
    registry, names = options.registry, list(dict.fromkeys(options.name))
    champions = [require_champion(registry, name) for name in names]
    first = read_verified_version(registry, names[0], champions[0])
    base = find_model_folder(str(options.model or first.adapter.base_model))
    fingerprint_base_model(base, max_age=0)
    of_the_registry = {"model": str(base), "adapter_path": None, "pipeline": False}
    options = argparse.Namespace(**vars(options) | of_the_registry)
    maybe_set_recommended_wired_limit()
    with _listen(options.host, options.port) as http:
        cache = PartialPromptCache(options.prompt_cache_size)
        generator = VersionedGenerator(VersionProvider(options), cache)
        follower = ChampionFollower(registry, base, generator)
        try:
            generator.require_ready()
            follower.start(names)
            metrics = ServingMetrics(generator, follower.names, follower.problems)
            http.RequestHandlerClass = lambda *args: RegistryHandler(
                generator, *args, follower=follower, metrics=metrics, api_key=api_key
            )
            yield RunningServer(http, generator, follower)
            generator.wait_for_requests(SECONDS_TO_FINISH)
        finally:
            follower.stop()


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
