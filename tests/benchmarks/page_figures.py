"""The figures that a page tells, held against those that its rows give."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pytest


def require_figures(text: str, expected: Mapping[str, Sequence[float]]) -> None:
    """Require that each pattern is in the text, and its groups are the figures as it rounds them.

    text: a page with one blank where it has white space. expected: figures by pattern.
    """
    for pattern, figures in expected.items():
        told = re.search(pattern, text)
        assert told is not None, pattern
        for group, figure in zip(told.groups(), figures, strict=True):
            digits = len(group.partition(".")[2])
            assert float(group) == pytest.approx(figure, abs=0.501 * 10**-digits), pattern
