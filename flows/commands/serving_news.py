"""Tells Prefect's server at once what `serve` does: which champion is served, or refused and why.

Prefect is imported by a process of its own, which sends what is new and ends: a server is to
answer, and has neither the memory nor the seconds for it.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from typing import Any, Self

from flows.commands.prefect_notice import may_have_server
from nested_core.errors import NestedTuneError, shorten
from nested_core.process.child import Child
from nested_core.registry.serving_status import ServerStatus, ServingNews

SECONDS_BETWEEN_TRIES, MAX_SECONDS_BETWEEN_TRIES = 30.0, 600.0
SECONDS_TO_SEND = 120.0
SECONDS_TO_END = 5.0
LOWER_PRIORITY = 10


class NewsSender:
    """Sends what a server did, in the order in which it was done, until Prefect's server has it."""

    def __init__(self, registry: Path) -> None:
        """`registry` is the one that is served."""
        self._registry = registry.resolve()
        self._is_configured = may_have_server()
        self._news: Queue[ServingNews | None] = Queue()
        self._is_stopping = threading.Event()
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, name="news sender", daemon=True)

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait a few seconds for what is still to be sent; the hourly reconcile tells the rest."""
        self._is_stopping.set()
        self._news.put(None)
        self._thread.join(SECONDS_TO_END)

    def send(self, news: ServingNews) -> None:
        """Send it soon; nothing where no server of Prefect is configured."""
        if self._is_configured:
            self._news.put(news)

    def _run(self) -> None:
        while (news := self._news.get()) is not None:
            seconds = SECONDS_BETWEEN_TRIES
            while not self._try_to_send(news):
                if self._is_stopping.wait(seconds):
                    return
                seconds = min(2 * seconds, MAX_SECONDS_BETWEEN_TRIES)

    def _try_to_send(self, news: ServingNews) -> bool:
        """Whether it was sent; what prevents that is logged once."""
        request = {"registry": str(self._registry)} | asdict(news)
        try:
            with Child(f"{__name__}:send_to_prefect") as child:
                child.ask(request, SECONDS_TO_SEND)
        except (NestedTuneError, OSError, MemoryError) as error:
            problem = shorten(error, 200)
            if problem != self._problem:
                self._problem = problem
                logging.warning(
                    "Prefect's server got no event of what is served (%s); it is tried again, "
                    "and the hourly reconcile looks at the registry itself",
                    problem,
                )
            return False
        self._problem = None
        return True


def send_to_prefect(request: dict[str, Any]) -> None:
    """Send one piece of news, in the process that imports Prefect."""
    os.nice(LOWER_PRIORITY)
    server = ServerStatus(**request["server"])
    news = ServingNews(request["name"], request["champion"], server)

    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    from tasks.serving import send_serving_news

    if get_current_settings().api.url is not None:
        with get_client(sync_client=True) as client:
            send_serving_news(client, Path(request["registry"]), news)
