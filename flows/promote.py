"""The flow that makes a version the champion: by its policy, or when a person approves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from prefect import flow
from prefect.states import Completed, State
from pydantic import Field

from flows.flow_runs.allowed_folders import require_allowed
from flows.flow_runs.prefect_logs import prepare_logs
from nested_core import seams
from nested_core.config.names import NAME_PATTERN
from nested_core.config.section_base import Section, key
from nested_core.records.outcome_names import Outcome
from nested_core.registry import read_champion
from nested_core.registry.policy import APPROVE_KEY
from nested_core.registry.promotion_policy import effective_rule, read_candidate, recorded_section
from tasks import promote as promotion_tasks


class AdapterParameters(Section):
    """Which adapter, in which registry."""

    registry: str = key(..., "the registry's folder, on the worker's machine", path="local")
    name: str = Field(pattern=f"^{NAME_PATTERN.pattern}$", description="the adapter's name in it")


class PromoteParameters(AdapterParameters):
    """Which version of an adapter."""

    version: str = Field(pattern="^[0-9a-f]{64}$", description="the folder's name under versions/")
    requires_approval: bool = Field(
        default=False, description="ask a person, whatever the policy recorded with the version"
    )
    night: UUID | None = Field(
        default=None, description="the fine-tune's flow run, which gets the answer"
    )


@dataclass(frozen=True)
class Asking:
    """A room's part of this flow under `approve`.

    ask: returns the state in which the flow ends once a person has answered. Of the parameters, the
        registry and the champion. Raises Pause without an answer.
    """

    ask: Callable[[PromoteParameters, Path, str | None], State[None]]


@flow(
    name="promote",
    retries=0,
    flow_run_name="promote {config.name} {config.version:.12}",
    persist_result=True,
)
def promote(config: PromoteParameters) -> State[None]:
    """Promote by the recorded policy; under `approve` suspend until a person has answered.

    Completed in every case but damage: the message says what became of it. Resumed, the flow starts
    again from its top, and the answer is there.
    """
    prepare_logs()
    registry = require_allowed(config.registry, "registry")
    champion = read_champion(registry, config.name)
    is_champion = config.version == champion
    is_done = is_champion and promotion_tasks.find_own_change(registry, config.name) is None
    if not is_done and (config.requires_approval or _asks_person(registry, config)):
        return seams.load_only(Asking, APPROVE_KEY).ask(config, registry, champion)
    decision = promotion_tasks.promote(registry, config.name, config.version)
    name = Outcome.PROMOTED if decision.outcome == "promoted" else None
    return Completed(name=name, message=decision.sentence)


def _asks_person(registry: Path, config: PromoteParameters) -> bool:
    """Whether the version's own policy, or the registry's, leaves it to a person."""
    candidate = read_candidate(registry, config.name, config.version)
    if candidate.facts.policy is None:
        return False
    return effective_rule(recorded_section(registry / config.name, candidate)).asks_person
