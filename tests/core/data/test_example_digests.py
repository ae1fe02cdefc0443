"""Digests of what was trained on, as provenance.json keeps them."""

from __future__ import annotations

import numpy as np
import pytest

from nested_core.data import example_digests
from nested_core.data.example_digests import decode_digests, encode_digests


def test_digests_are_kept_once_and_in_order() -> None:
    given = np.array([3, 2**64 - 1, 3, 0], np.uint64)
    assert decode_digests(encode_digests(given)).tolist() == [0, 3, 2**64 - 1]


def test_too_many_are_not_kept_and_a_warning_says_what_follows(monkeypatch) -> None:
    monkeypatch.setattr(example_digests, "MAX_RECORDED_DIGESTS", 2)
    with pytest.warns(UserWarning, match="the 3 examples .* later verdicts cannot leave them out"):
        assert encode_digests(np.arange(3, dtype=np.uint64)) is None
