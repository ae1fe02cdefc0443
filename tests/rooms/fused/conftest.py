"""Copies of the finished run."""

from __future__ import annotations

from tests.core.gate.conftest import candidate

__all__ = ["candidate"]
