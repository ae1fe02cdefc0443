"""The events that automations listen to: adapter.verified, rejected, promoted and rolled_back.

An event is a hint that can get lost or come twice: what receives it looks at the registry again.
"""

from __future__ import annotations

from typing import Any, Literal

from prefect.events import emit_event

Happening = Literal["verified", "rejected", "promoted", "rolled_back"]


def emit_adapter_event(happening: Happening, name: str, payload: dict[str, Any]) -> None:
    """Emit `adapter.HAPPENING` on the resource `adapter.NAME`."""
    resource = {"prefect.resource.id": f"adapter.{name}", "prefect.resource.name": name}
    emit_event(f"adapter.{happening}", resource=resource, payload=payload)
