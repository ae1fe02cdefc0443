"""What a server keeps of runs and events, and for how long, as it says itself."""

from __future__ import annotations

from datetime import timedelta

import httpx
from prefect.client.orchestration import SyncPrefectClient
from pydantic import TypeAdapter

from flows.commands.check import Check

MEND = (
    "give the server the lines of deployments/settings.env that begin with "
    "PREFECT_SERVER_SERVICES_DB_VACUUM, and restart it"
)
_PERIOD_VALIDATOR = TypeAdapter(timedelta)


def check_retention(client: SyncPrefectClient) -> Check:
    """Return whether the server removes old events, and old runs with their logs and pages."""
    try:
        answer = client.request("GET", "/admin/settings").raise_for_status().json()["server"]
    except (httpx.HTTPStatusError, KeyError) as error:  # of a server that tells nobody
        return Check("retention", True, f"unknown: {type(error).__name__}")
    vacuum = answer["services"]["db_vacuum"]
    enabled = vacuum["enabled"]
    if isinstance(enabled, bool):  # as Prefect reads it: events in any case
        enabled = ["events", "flow_runs"] if enabled else ["events"]
    periods = {
        kind: _PERIOD_VALIDATOR.validate_python(section["retention_period"]).days
        for kind, section in {"events": answer["events"], "flow_runs": vacuum}.items()
        if kind in (enabled or ())
    }
    shown = [f"{kind.replace('_', ' ')} for {days} days" for kind, days in periods.items()]
    is_well = len(periods) == 2
    seen = f"kept: {', '.join(shown)}{'' if is_well else ', the rest for ever'}"
    return Check("retention", is_well, seen, "" if is_well else MEND)
