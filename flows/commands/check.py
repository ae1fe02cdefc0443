"""One thing that `doctor` looked at, and what rooms look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing looked at: whether it is well, what was seen, and the mend where it is not."""

    name: str
    ok: bool
    seen: str
    mend: str = ""


@dataclass(frozen=True)
class DoctorChecks:
    """What a room looks at for `doctor`.

    of_server: looks at the Prefect server of PREFECT_API_URL.
    """

    of_server: Callable[[], Iterable[Check]]
