"""serve under load: no answer lost, mixed or of another version than it names, over many swaps."""

from __future__ import annotations

import pytest

from tests.rooms.serve.serving_load import ASKED_BY_CLIENTS, SHAPES, hammer

pytestmark = pytest.mark.reliability


@pytest.mark.parametrize(
    ("requests", "swaps"), [(1_000, 5), pytest.param(10_000, 50, marks=pytest.mark.timeout(3600))]
)
def test_each_answer_is_that_of_the_version_it_names(requests, swaps, tmp_path) -> None:
    seen = hammer(tmp_path, requests=requests, swaps=swaps, clients=8)
    assert seen.alone == {"equal": 2 * ASKED_BY_CLIENTS * len(SHAPES)}
    assert seen.wrong == []
    assert seen.answers.total() == requests
    assert len(seen.answers) == len(SHAPES)
    assert seen.near_ties <= requests // 100
    assert seen.base_is_the_same
    figures = seen.summary()
    assert figures["swaps"] == swaps
    adapters = [path.stat().st_size for path in tmp_path.glob("run-*/adapter/*.safetensors")]
    before, after = seen.bytes_at_rest
    assert after - before < min(adapters), "no version is in memory that was not there before"
