"""Markers that say why a test is slow, and the last line of a run: how many tests it left out.

`make test` runs what changes are made between; `@pytest.mark.slow("why")` leaves a test to
`make test-all`. The reason says what takes the time, so that whoever makes it faster knows where.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from nested_core import seams

# A marker, and the command that runs what it leaves out. A test with two belongs to the last.
COMMANDS = {
    "slow": "make test-all",
    "reliability": "make reliability",
    "production": "make production-test",
    "real": "make real-test",
    "soak": "make soak",
}


def _has_kernels_for_avx512() -> bool:
    """Whether OpenBLAS takes its kernels for AVX-512 (SkylakeX and its like) on this processor."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    chosen = os.environ.get("OPENBLAS_CORETYPE", "SkylakeX" if "GenuineIntel" in text else "")
    return "avx512f" in text and chosen == "SkylakeX"


# These give other last bits from one run to the next: seen on an Intel Xeon, where the tests with
# this mark fail, and pass under OPENBLAS_CORETYPE=Haswell.
needs_steady_kernels = pytest.mark.skipif(
    _has_kernels_for_avx512(), reason="OpenBLAS's kernels for AVX-512 differ from run to run"
)


class LeftOut:
    """Counts the tests that `-m` leaves out, on the workers, and says so at the end of the run."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._counts: Counter[str] = Counter()

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """Count by the command that runs them; a worker hands its counts to the main process."""
        self._counts.update(filter(None, map(marker_of, items)))
        if hasattr(self._config, "workeroutput"):
            self._config.workeroutput["left_out"] = dict(self._counts)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take the counts of a worker: all collect the same."""
        self._counts = Counter(getattr(node, "workeroutput", {}).get("left_out", {}))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self) -> Any:
        """After everything else, the line of what was left out."""
        yield
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if self._counts and reporter is not None and not hasattr(self._config, "workerinput"):
            reporter.ensure_newline()
            reporter.write_line(sentence(self._counts))


def slow_except(values: Iterable[Any], *fast: Any, reason: str) -> list[Any]:
    """Values for `parametrize`, of which `make test` has those named and `make test-all` all."""
    mark = pytest.mark.slow(reason)
    return [value if value in fast else pytest.param(value, marks=mark) for value in values]


def needs_rooms(*rooms: str) -> pytest.MarkDecorator:
    """A marker for a test of the core with these rooms; it is skipped where one was deleted.

    A test of one room's alone lies in tests/rooms/ROOM.
    """
    deleted = [room for room in rooms if not seams.is_there(room)]
    return pytest.mark.skipif(bool(deleted), reason=f"no room {', '.join(deleted)} here")


def leave_out_room(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program find one room fewer than there are, until the test ends."""
    is_there = seams.is_there
    monkeypatch.setattr(seams, "is_there", lambda name: name != room and is_there(name))


def marker_of(item: pytest.Item) -> str | None:
    """The marker that decides which command runs a test, or None if `make test` does."""
    names = [name for name in COMMANDS if item.get_closest_marker(name) is not None]
    return names[-1] if names else None


def sentence(counts: Counter[str]) -> str:
    """What was left out, and the commands that run it."""
    parts = [
        f"{counts[name]:,} marked {name} (`{command}`)"
        for name, command in COMMANDS.items()
        if counts[name]
    ]
    return f"Tests left out: {', '.join(parts)}."


def check_reasons(items: list[pytest.Item]) -> None:
    """Refuse a test that is slow and does not say why."""
    unexplained = [
        item.nodeid
        for item in items
        for marker in item.iter_markers("slow")
        if len(marker.args) != 1 or not str(marker.args[0]).strip()
    ]
    if unexplained:
        raise pytest.UsageError(
            f"{unexplained[0]} is marked slow without a reason (and {len(unexplained) - 1} more): "
            'say what takes the time, as in @pytest.mark.slow("trains two ranks").'
        )
