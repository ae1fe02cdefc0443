"""A finished run before the gate, and copies of it that a test may tamper with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders.candidates import Candidate


@pytest.fixture
def candidate(finished: Candidate, tmp_path: Path) -> Candidate:
    """A copy of the finished run."""
    return finished.copy(tmp_path / "copy")


@pytest.fixture(scope="session")
def judged_once(finished: Candidate, tmp_path_factory: pytest.TempPathFactory) -> Candidate:
    """A copy of the finished run that the gate has passed."""
    copied = finished.copy(tmp_path_factory.mktemp("judged") / "run")
    assert copied.judge().has_passed
    return copied


@pytest.fixture
def judged(judged_once: Candidate, tmp_path: Path) -> Candidate:
    """A copy of the finished run with its verdict."""
    return judged_once.copy(tmp_path / "judged")
