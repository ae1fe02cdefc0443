"""The events that automations listen to: adapter.verified, rejected, promoted and rolled_back.

An event is a hint that can get lost or come twice: what receives it looks at the registry again.
"""

from __future__ import annotations

from typing import Any, Literal

from prefect.events import emit_event

Happening = Literal["rejected", "promoted", "rolled_back"]


def emit_adapter_event(happening: Happening, name: str, payload: dict[str, Any]) -> None:
    """Emit `adapter.HAPPENING` on the resource `adapter.NAME`."""
    emit_event(f"adapter.{happening}", resource=adapter_resource(name), payload=payload)


def emit_verified_event(name: str, payload: dict[str, Any], *, promotion_is_open: bool) -> None:
    """Emit `adapter.verified`; `promotion_is_open` starts promote/auto, which decides.

    It is false for a run that promotes by its own policy as its last step.
    """
    promotion = {"nested-tune.promotion": "open" if promotion_is_open else "in the run"}
    emit_event("adapter.verified", resource=adapter_resource(name) | promotion, payload=payload)


def adapter_resource(name: str) -> dict[str, str]:
    """The resource that all events of an adapter are about."""
    return {"prefect.resource.id": f"adapter.{name}", "prefect.resource.name": name}
