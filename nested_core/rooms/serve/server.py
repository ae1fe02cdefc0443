"""The server as a whole: registry, base, generation thread, follower and HTTP, begun and ended."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_lm.utils import maybe_set_recommended_wired_limit

from nested_core.models.base_model import find_model_folder, fingerprint_base_model
from nested_core.registry import read_verified_version
from nested_core.rooms.serve.engine import PartialPromptCache, VersionedGenerator, VersionProvider
from nested_core.rooms.serve.follower import ChampionFollower, require_champion
from nested_core.rooms.serve.http_handler import ServingServer
from nested_core.rooms.serve.metrics import ServingMetrics

SECONDS_TO_FINISH = 30.0  # for the answers under way when the server is told to end


@contextmanager
def starting_server(
    options: argparse.Namespace, api_key: str | None = None
) -> Iterator[ServingServer]:
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
    with ServingServer(options.host, options.port, api_key) as server:
        cache = PartialPromptCache(options.prompt_cache_size)
        server.generator = VersionedGenerator(VersionProvider(options), cache)
        follower = server.follower = ChampionFollower(registry, base, server.generator)
        try:
            server.generator.require_ready()
            follower.start(names)
            server.metrics = ServingMetrics(server.generator, follower.names, follower.problems)
            yield server
            server.wait_for_requests(SECONDS_TO_FINISH)
        finally:
            follower.stop()
