"""One production stack for all tests of this folder; skipped by name where a part is missing.

The stack is what `deploy` makes: without that room there are no tests here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nested_core.seams import is_there
from tests.production.faults import FaultTable
from tests.production.postgresql import Cluster, find_binaries
from tests.production.stack import Stack
from tests.webhook_server import WebhookServer, serving_webhook

# Files of tests in this folder, and the rooms without which they are left out.
ROOMS_OF_TESTS = {
    "test_*.py": ("deploy",),
    "test_live_view.py": ("live",),
    "test_replayed_nights.py": ("housekeeping",),
    "test_report_page.py": ("compare",),
    "test_unattended_nights.py": ("housekeeping", "nights"),
}
collect_ignore_glob = [
    pattern for pattern, rooms in ROOMS_OF_TESTS.items() if not all(map(is_there, rooms))
]


@pytest.fixture(scope="session")
def binaries() -> Path:
    """Where PostgreSQL's programs are."""
    found = find_binaries()
    if found is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    return found


@pytest.fixture(scope="session")
def webhook() -> Iterator[WebhookServer]:
    """Where the stack's alerts go."""
    with serving_webhook() as server:
        yield server


@pytest.fixture(scope="session")
def stack(tmp_path_factory, binaries, webhook) -> Iterator[Stack]:
    """Database, server and workers, started fresh, with everything deployed; all stopped after."""
    made = Stack(tmp_path_factory.mktemp("production"), Cluster(binaries))
    try:
        made.start("--notify", webhook.url)
        for pool in ("mlx-gpu", "cpu"):
            made.start_worker(pool)
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def faults() -> Iterator[FaultTable]:
    """The table that fault tests add their rows to; kept where FAULTS_TABLE names a file."""
    table = FaultTable()
    yield table
    if path := os.environ.get("FAULTS_TABLE"):
        load = os.getloadavg()[0]
        table.write(Path(path), f"{os.cpu_count()} cores with {load:.0f} processes wanting them")
