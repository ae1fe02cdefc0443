"""The events of an adapter: adapter.verified, rejected, promoted, rolled_back and not_followed.

An event is a hint that can get lost or come twice: nothing is decided by one.
"""

from __future__ import annotations

from typing import Any, Literal

from prefect.events import emit_event

Happening = Literal["verified", "rejected", "promoted", "rolled_back", "not_followed"]


def emit_adapter_event(happening: Happening, name: str, payload: dict[str, Any]) -> None:
    """Emit `adapter.HAPPENING` on the resource `adapter.NAME`."""
    emit_event(f"adapter.{happening}", resource=adapter_resource(name), payload=payload)


def adapter_resource(name: str) -> dict[str, str]:
    """The resource that all events of an adapter are about."""
    return {"prefect.resource.id": f"adapter.{name}", "prefect.resource.name": name}
