"""The tokenizer of tests/core/data."""

from __future__ import annotations

from tests.core.data.conftest import tokenizer

__all__ = ["tokenizer"]
