"""Registries of small runs; and what Prefect leaves behind ends with the test."""

from tests.core.registry.conftest import (
    add,
    make_run,
    no_time_to_decide,
    registry,
    three,
    three_made_once,
)
from tests.flows.conftest import _prefect_is_quiet

__all__ = [
    "_prefect_is_quiet",
    "add",
    "make_run",
    "no_time_to_decide",
    "registry",
    "three",
    "three_made_once",
]
