"""Tells Prefect's server at once what `serve` does: which champion is served, or refused and why.

Prefect is imported by a process of its own, which sends what is new and ends: a server is to
answer, and has neither the memory nor the seconds for it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from typing import Any, Self

from flows.commands.server_notice import may_have_server
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
        document = json.dumps({"registry": str(self._registry)} | asdict(news))
        command = [sys.executable, "-P", "-m", __name__]
        try:
            subprocess.run(
                command,
                input=document,
                capture_output=True,
                text=True,
                timeout=SECONDS_TO_SEND,
                check=True,
                start_new_session=True,  # a Ctrl-C at the server is not for it
            )
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or "").strip().splitlines()
            problem = said[-1] if said else f"{type(error).__name__}: {error}"
            if problem != self._problem:
                self._problem = problem
                logging.warning(
                    "Prefect's server was not told what is served (%.200s); it is tried again, "
                    "and the hourly reconcile looks at the registry itself",
                    problem,
                )
            return False
        self._problem = None
        return True


def main() -> None:
    """The process that sends: one piece of news, read from standard input."""
    os.nice(LOWER_PRIORITY)
    given: dict[str, Any] = json.loads(sys.stdin.read())
    news = ServingNews(given["name"], given["champion"], ServerStatus(**given["server"]))

    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    from tasks.serving import send_serving_news

    if get_current_settings().api.url is None:
        return
    try:
        with get_client(sync_client=True) as client:
            send_serving_news(client, Path(given["registry"]), news)
    except Exception as error:  # of the server or the way to it; the sender tries again
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
