"""The finished run of tests/core/gate, and copies of it."""

from __future__ import annotations

from tests.core.gate.conftest import candidate, finished

__all__ = ["candidate", "finished"]
