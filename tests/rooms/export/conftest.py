"""Commands as a person gives them."""

from __future__ import annotations

from tests.flows.conftest import nested_tune

__all__ = ["nested_tune"]
