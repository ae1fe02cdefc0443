"""Random commands, flow steps, kills and edits from outside, against a model of the registry."""

from __future__ import annotations

import pytest

from tests.core.registry.conftest import no_time_to_decide  # noqa: F401  # a gc takes what is new
from tests.reliability.registry_sequences import run_sequences

# The children of these forks only touch files; that the parent has threads does not matter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("no_time_to_decide"),
]


@pytest.mark.parametrize(
    ("count", "seed"),
    [
        (1, 1),
        pytest.param(4, 2, marks=pytest.mark.slow("25 steps of processes, killed or not, each")),
        pytest.param(200, 1000, marks=pytest.mark.reliability),
    ],
)
def test_a_registry_is_sound_or_its_damage_is_named_and_mended_as_it_is_said(count, seed) -> None:
    seen = run_sequences(count, seed)
    assert seen["killed"] > 0
    assert sum(number for name, number in seen.items() if name.startswith("damage_")) > count
