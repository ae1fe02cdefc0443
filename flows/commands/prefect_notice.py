"""Tells Prefect's server, where one is configured, what a command has changed in a registry.

The change is made by then: a server that is away, or does not answer, is waited for a few seconds
and fails nothing. Its hourly reconcile looks at the registry itself.
"""

from __future__ import annotations

import os
import threading
from contextvars import copy_context
from pathlib import Path

from flows.terminal.console import print_progress

SECONDS_TO_TELL = 5.0
SERVER_VARIABLE = "PREFECT_API_URL"


def tell_server(registry: Path, name: str) -> None:
    """Send the events of an adapter's changes that the server has not heard of."""
    if not may_have_server():
        return
    # Not in the thread: where the process ends within an import of it, it is aborted.
    from prefect.client.orchestration import get_client
    from prefect.settings import (
        PREFECT_CLIENT_MAX_RETRIES,
        get_current_settings,
        temporary_settings,
    )

    from tasks.events import send_missing_events

    if get_current_settings().api.url is None:
        return
    problems: list[str] = []
    silences: list[str] = []

    def tell() -> None:
        """Ask and send; what goes wrong, or why nothing is sent, is only said."""
        try:
            once = temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0})
            with once, get_client(sync_client=True) as client:
                if (reason := send_missing_events(client, registry, name)) is not None:
                    silences.append(reason)
        except Exception as error:  # of a server that nothing rests on
            problems.append(type(error).__name__)

    context = copy_context()  # which Prefect's settings belong to
    teller = threading.Thread(target=context.run, args=(tell,), name="tell-server", daemon=True)
    teller.start()
    teller.join(SECONDS_TO_TELL)
    for reason in silences:
        print_progress(f"note: {reason}")
    if problems or teller.is_alive():
        reason = problems[0] if problems else f"no answer within {SECONDS_TO_TELL:g} seconds"
        print_progress(
            f"note: Prefect's server got no event ({reason}); the next reconcile/{name}-hourly "
            f"brings its pages and events into line"
        )


def may_have_server() -> bool:
    """Whether the environment or a profile names a server; seen without importing Prefect."""
    if os.environ.get(SERVER_VARIABLE):
        return True
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    try:
        return SERVER_VARIABLE in (home / "profiles.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
