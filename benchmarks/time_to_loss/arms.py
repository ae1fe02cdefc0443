"""What is compared: mlx_lm's uniform updates, and ours under every tier setting; no framework.

An arm is `mlx_lm`, or `ours` with words: frequencies (`1-2-4`), the fast end (`deep`; shallow
without it), `accumulate` (of slow gradients; skipped without it), `scaled` (a tier's rate times its
frequency), or `frozen` (the fast third of the layers is trained and nothing else).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

RIVAL = "mlx_lm"
TIERED = ("", "+scaled", "+accumulate", "+accumulate+scaled")
ARMS = (
    RIVAL,
    "ours",
    *(f"ours+1-2-4{end}{mode}" for end in ("+deep", "") for mode in TIERED),
    *(f"ours+{each}{end}" for each in ("1-2", "1-4-16", "frozen") for end in ("+deep", "")),
)
WORDS = ("deep", "accumulate", "scaled", "frozen")
FREQUENCIES = re.compile(r"\d+(-\d+)+")


@dataclass(frozen=True)
class Arm:
    """One of our settings, in the words of the section `nested` of a configuration."""

    frequencies: tuple[int, ...] = (1,)
    fast: Literal["shallow", "deep"] = "shallow"
    slow_gradients: Literal["skip", "accumulate"] = "skip"
    learning_rate_scale: tuple[float, ...] | None = None
    frozen: bool = False
    strategy: str = "layer_depth"


def arm_of(name: str) -> Arm:
    """The setting that a name stands for; ValueError where it is not one of ours."""
    first, *words = name.split("+")
    numbers = [word for word in words if FREQUENCIES.fullmatch(word)]
    unknown = [word for word in words if word not in (*WORDS, *numbers)]
    if first != "ours" or unknown or len(numbers) > 1:
        raise ValueError(f"{name!r} is no arm: expected mlx_lm, or ours with {WORDS} or 1-2-4")
    frequencies = tuple(int(n) for n in numbers[0].split("-")) if numbers else (1,)
    return Arm(
        frequencies,
        "deep" if "deep" in words else "shallow",
        "accumulate" if "accumulate" in words else "skip",
        tuple(map(float, frequencies)) if "scaled" in words else None,
        "frozen" in words,
    )
