"""Commands as a person gives them, and small bases with adapters."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.flows.conftest import nested_tune
from tests.rooms.export.small_bases import Trained, make_base, train_adapter

__all__ = ["nested_tune"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Makes each once, by its family and the base's bits."""
    made: dict[tuple[str, int | None], Trained] = {}

    def make(family: str = "llama", bits: int | None = None) -> Trained:
        if (family, bits) not in made:
            folder = tmp_path_factory.mktemp(family)
            base = make_base(folder / "base", family, bits=bits)
            made[family, bits] = Trained(base, train_adapter(base, folder / "adapter"))
        return made[family, bits]

    return make
