"""The flow that goes back to an earlier version; automation does not promote what it left again."""

from __future__ import annotations

from prefect import flow
from prefect.states import Completed, State
from pydantic import Field

from flows.flow_runs.allowed_folders import require_allowed
from flows.flow_runs.prefect_logs import prepare_logs
from flows.promote import AdapterParameters
from nested_core.records.outcome_names import Outcome
from nested_core.registry.ledger import describe_author
from nested_core.text.digest_format import shorten_digest
from tasks.promote import roll_back


class RollbackParameters(AdapterParameters):
    """Which adapter, and back to what."""

    to: str | None = Field(default=None, description="default: the champion before this one")
    by: str = Field(min_length=1, description="name of the person for the history")
    reason: str | None = Field(
        default=None, description="reason for the history, the alert and the champion's page"
    )


@flow(name="rollback", retries=0, flow_run_name="rollback {config.name}")
def rollback(config: RollbackParameters) -> State[None]:
    """Move the champion back; the message says what became of it."""
    prepare_logs()
    registry = require_allowed(config.registry, "registry")
    decision = roll_back(registry, config.name, config.to, config.by, reason=config.reason)
    if decision.outcome != "rolled_back":
        return Completed(message=decision.sentence)
    before = shorten_digest(decision.previous or "none")
    versions = f"from {before} to {shorten_digest(decision.version)}"
    author = describe_author({"by": config.by, "reason": config.reason})
    return Completed(name=Outcome.ROLLED_BACK, message=f"rolled_back {versions} by {author}")
