"""Figures that are computed again are those recorded, within what another machine's sums differ."""

from __future__ import annotations

from typing import Any

import pytest

from nested_core.gate.recheck import is_close_figure

RECORDED = {
    "name": "capitals",
    "questions": 40,
    "candidate": 0.925,
    "difference": -0.0045,
    "interval": [-0.0125, 0.0035],
    "seconds": {"base": 1.25, "candidate": 0.5},
    "champion": None,
}


def test_sums_in_another_order_are_the_same_figures() -> None:
    recomputed = RECORDED | {"difference": -0.004499999999999999, "interval": (-0.0125, 0.0035)}
    assert is_close_figure(RECORDED, recomputed)


@pytest.mark.parametrize(
    "edit",
    [
        {"difference": -0.0046},
        {"candidate": 0.95},
        {"interval": [-0.0125, 0.0036]},
        {"interval": [-0.0125]},
        {"interval": None},
        {"questions": 41},
        {"seconds": {"base": 1.25}},
        {"seconds": {"base": 1.25, "candidate": 0.6}},
        {"champion": 0.0},
        {"name": "cities"},
        {"candidate": "0.925"},
    ],
    ids=str,
)
def test_an_edited_figure_is_another_one(edit: dict[str, Any]) -> None:
    assert not is_close_figure(RECORDED | edit, RECORDED)
