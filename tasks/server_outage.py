"""What a run does where Prefect's server is away for a while: it says so, and goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect import get_run_logger
from prefect.exceptions import PrefectException


@contextmanager
def tolerating_server_outage(what: str) -> Iterator[None]:
    """Log that `what` has to wait or be left out, where the server or the way to it fails.

    For what a page shows and a run does not rest on. A new client of Prefect's tries a connection
    that is refused only once, so that an outage of a second is an error here.
    """
    try:
        yield
    except (httpx.HTTPError, PrefectException, OSError) as error:
        get_run_logger().warning(
            "Prefect's server cannot be reached: %s (%s: %s). The run goes on.",
            what,
            type(error).__name__,
            error,
        )
