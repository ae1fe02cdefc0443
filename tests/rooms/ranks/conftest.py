"""The Prefect server of the tests of flows, for a flow that trains in ranks."""

from tests.flows.conftest import _prefect_is_quiet, prefect_home, prefect_server

__all__ = ["_prefect_is_quiet", "prefect_home", "prefect_server"]
