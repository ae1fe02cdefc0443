"""A float32 base, and runs with adapters of it, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.example import MODEL
from tests.rooms.serve.versions import (
    NAME,
    AdapterShape,
    Client,
    make_base,
    promote_run,
    record_canary,
    serving,
    settings,
    write_version_run,
)

SHAPES = {
    1: AdapterShape(),
    2: AdapterShape(),
    3: AdapterShape(rank=8, keys=("self_attn.k_proj", "mlp.up_proj")),
    4: AdapterShape(fine_tune_type="dora"),
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's model in float32."""
    return make_base(MODEL, tmp_path_factory.mktemp("base") / "geography-float32")


@pytest.fixture(scope="session")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run directory by seed: 1 and 2 have the same layers and a canary, 3 others, 4 is DoRA."""
    folder = tmp_path_factory.mktemp("serve-runs")
    made = {
        seed: write_version_run(folder / f"run-{seed}", base, seed, shape)
        for seed, shape in SHAPES.items()
    }
    for seed in (1, 2):
        record_canary(made[seed], base)
    return made


@pytest.fixture(scope="module")
def version_and_registry(runs, tmp_path_factory) -> tuple[str, Path]:
    """A champion that the tests of a file do not replace, and its registry."""
    registry = tmp_path_factory.mktemp("served") / "registry"
    return promote_run(runs[1], registry), registry


@pytest.fixture(scope="module")
def client(version_and_registry: tuple[str, Path]) -> Iterator[Client]:
    """A client of a server of it."""
    with serving(settings(version_and_registry[1], "--name", NAME)) as running:
        yield running


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """A path for a registry; nothing is there yet."""
    return tmp_path / "registry"


@pytest.fixture
def promote(runs: dict[int, Path], registry: Path) -> Callable[..., str]:
    """Promote the run of a seed under a name; the version."""

    def promote_seed(seed: int, name: str = "capitals") -> str:
        return promote_run(runs[seed], registry, name)

    return promote_seed
