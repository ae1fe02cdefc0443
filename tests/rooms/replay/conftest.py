"""The run that the gate's tests judge, for the check of the ancestors."""

from tests.core.gate.conftest import candidate, finished

__all__ = ["candidate", "finished"]
