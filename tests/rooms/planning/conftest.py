"""`explain` tries steps for a fifth of a second, where it has two seconds otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nested_core.seams import is_there


@pytest.fixture(autouse=True, scope="session")
def _little_is_tried() -> Iterator[None]:
    if not is_there("minutes"):
        yield  # nothing is tried
        return

    from nested_core.rooms.minutes import forecast

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "TRIED_SECONDS", 0.2)
        yield
