"""What tests of flows hold, for a flow that trains in ranks."""

from tests.flows.conftest import _prefect_is_quiet

__all__ = ["_prefect_is_quiet"]
