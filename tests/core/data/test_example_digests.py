"""Digests of what was trained on, as provenance.json keeps them."""

from __future__ import annotations

import numpy as np

from nested_core.data import example_digests
from nested_core.data.example_digests import TrainedRows, decode_digests, encode_digests


def test_digests_are_kept_once_and_in_order() -> None:
    given = np.array([3, 2**64 - 1, 3, 0], np.uint64)
    assert decode_digests(encode_digests(given)).tolist() == [0, 3, 2**64 - 1]


def test_too_many_are_not_recorded_and_what_was_trained_on_is_then_not_known(monkeypatch) -> None:
    monkeypatch.setattr(example_digests, "MAX_RECORDED_DIGESTS", 2)
    recorded = TrainedRows(np.arange(3, dtype=np.uint64)).to_json()
    assert "more than 2" in str(TrainedRows.from_json(recorded, "it").unknown)


def test_digests_of_tokens_as_earlier_versions_recorded_them_are_not_known() -> None:
    earlier = {"training_examples": encode_digests(np.arange(3, dtype=np.uint64))}
    rows = TrainedRows.from_json(earlier, "version 0123")
    assert (rows.digests.size, rows.unknown) == (
        0,
        "no record says by its content which rows version 0123 was trained on",
    )
