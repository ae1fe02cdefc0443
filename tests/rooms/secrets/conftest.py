"""Data sets are written as the tests of tests/core/data write them."""

from __future__ import annotations

from tests.core.data.conftest import write_data

__all__ = ["write_data"]
