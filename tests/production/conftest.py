"""One production stack for all tests of this folder; skipped by name where a part is missing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.production.postgresql import Cluster, find_binaries
from tests.production.stack import Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Database, server and workers, started fresh, with everything deployed; all stopped after."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    made = Stack(tmp_path_factory.mktemp("production"), Cluster(binaries))
    try:
        made.prepare_home()
        made.database.create()
        made.database.start()
        made.start_server()
        deployed = made.nested_tune("deploy", "-c", "small.yaml")
        assert deployed.returncode == 0, deployed.stderr + made.logs()
        for pool in ("mlx-gpu", "cpu"):
            made.start_worker(pool)
        yield made
    finally:
        made.stop()
