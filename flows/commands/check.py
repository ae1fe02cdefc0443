"""One thing that `doctor` looked at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing looked at: whether it is well, what was seen, and the mend where it is not."""

    name: str
    ok: bool
    seen: str
    mend: str = ""
