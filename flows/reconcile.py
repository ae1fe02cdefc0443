"""The flow that catches what was missed: versions never decided on, pages that are old."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.states import Completed, Failed, State
from pydantic import Field

from flows.flow_runs.allowed_folders import require_allowed
from flows.flow_runs.prefect_logs import prepare_logs
from flows.flow_runs.watchers import list_watchers
from nested_core import seams
from nested_core.config.section_base import Section, key
from nested_core.config.sections import AdapterName
from nested_core.errors import DamagedError
from nested_core.records.outcome_names import Outcome
from nested_core.registry import Decision, list_names, read_champion_changes
from nested_core.registry.folders import name_exists
from nested_core.registry.ledger import describe_author
from nested_core.text.digest_format import shorten_digest
from tasks.events import ServerPages
from tasks.promote import check_champion
from tasks.promote import promote_missed as reconcile_name
from tasks.retrying import exception_of

# The first of these that an hour saw names the state of its run.
BY_RANK = (Outcome.ENDED_DEAD_RUNS, Outcome.PROMOTED, Outcome.SAW_ROLLBACK, Outcome.SAW_LONG_RUN)


class ReconcileParameters(Section):
    """Which registry, and which of its adapters."""

    registry: str = key(..., "the registry's folder, on the worker's machine", path="local")
    names: tuple[AdapterName, ...] | None = Field(default=None, description="default: all of them")
    stale_after_nights: float | None = Field(
        default=3.0,
        gt=0,
        description="days after which an old champion raises an alert (null: never)",
    )

    @property
    def subject(self) -> str:
        """What a run is about, for its name in Prefect's list."""
        return self.registry if self.names is None else ", ".join(self.names)


@flow(name="reconcile", retries=0, flow_run_name="reconcile {config.subject}")
def reconcile(config: ReconcileParameters) -> State[None]:
    """Apply each version's own policy once more; again, it changes nothing.

    What is damaged keeps no other version or name from its promotion: the flow goes through all of
    them, and then ends Failed, as Damaged, saying what is damaged and what to do.
    """
    prepare_logs()
    registry = require_allowed(config.registry, "registry")
    wanted = list_names(registry) if config.names is None else config.names
    names = [name for name in wanted if name_exists(registry, name)]
    decided = {name: reconcile_name(registry, name, return_state=True) for name in names}
    checked = {name: check_champion(registry, name, return_state=True) for name in names}
    absent = sorted({*wanted} - {*names})
    for name, state in decided.items():
        outcomes = state.result() if state.is_completed() else {}
        waiting = [v for v, decision in outcomes.items() if decision.outcome == "waiting"]
        for version in waiting[:1]:  # the newest: its question closes those about older ones
            for watcher in list_watchers():
                watcher.ask(registry, name, version, night=None)
    sound = [name for name in names if checked[name].is_completed()]
    sightings = [
        sighting
        for watcher in list_watchers()
        for sighting in watcher.look(registry, names, sound, config.stale_after_nights)
    ]
    rollbacks = _bring_pages_up_to_date(registry, sound)
    damage, other_problems = _find_problems(registry, decided, checked, absent)
    if damage:
        return Failed(name=Outcome.DAMAGED, message="; ".join(damage + other_problems))
    if other_problems:
        return Failed(message="; ".join(other_problems))
    promoted = [
        name
        for name, state in decided.items()
        if any(decision.outcome == "promoted" for decision in state.result().values())
    ]
    seen = {sighting.outcome for sighting in sightings}
    seen |= {Outcome.PROMOTED} if promoted else set()
    seen |= {Outcome.SAW_ROLLBACK} if rollbacks else set()
    outcome = next((outcome for outcome in BY_RANK if outcome in seen), None)
    message = f"promoted: {', '.join(promoted) or 'nothing'}"
    if absent:  # the hour comes before an adapter's first night
        message += f"; nothing is registered yet as {', '.join(absent)}"
    message += "".join(f"; {sentence}" for sentence in rollbacks)
    message += "".join(f"; {sighting.sentence}" for sighting in sightings)
    return Completed(name=outcome, message=message)


def _find_problems(
    registry: Path,
    decided: Mapping[str, State[dict[str, Decision]]],
    checked: Mapping[str, State[str | None]],
    absent: Sequence[str],
) -> tuple[list[str], list[str]]:
    """What is damaged, and what failed for another reason; each once, with its adapter's name."""
    damage: list[str] = []
    other: list[str] = []
    for states in (checked, decided):
        for name, state in states.items():
            if state.is_failed():
                is_damage = isinstance(exception_of(state), DamagedError)
                (damage if is_damage else other).append(f"{name}: {state.message}")
    for name, state in decided.items():
        outcomes = state.result() if state.is_completed() else {}
        damage += [
            f"{name} {shorten_digest(version)}: {decision.sentence}"
            for version, decision in outcomes.items()
            if decision.outcome == "damaged"
        ]
    damage += [
        f"{name}: {registry / name} is gone, and it had a champion. Is a disk or a share not "
        f"mounted? Mount it, or restore the folder from a backup"
        for name in absent
        if any(page.had_champion(registry, name) for page in seams.load_all(ServerPages))
    ]
    return list(dict.fromkeys(damage)), list(dict.fromkeys(other))


def _bring_pages_up_to_date(registry: Path, names: Sequence[str]) -> list[str]:
    """Publish the pages of champions that were changed elsewhere.

    Returns a sentence for each rollback that no page had yet.
    """
    rollbacks: list[str] = []
    for name in names:
        try:
            pages = seams.load_all(ServerPages)
            is_news = [page.publish_if_changed(registry, name) for page in pages]
            if any(is_news) and (rollback := _describe_rollback(registry, name)) is not None:
                rollbacks.append(rollback)
        except Exception as error:  # of the server or the way to it; nothing depends on a page
            get_run_logger().warning("The page of %s's champion was not read: %s", name, error)
    return rollbacks


def _describe_rollback(registry: Path, name: str) -> str | None:
    """Who went back to the champion that stands now; None where it was promoted."""
    changes = read_champion_changes(registry, name)
    if not changes or changes[-1].action != "rollback":
        return None
    last = changes[-1]
    author = describe_author(last.fields())
    return f"{name}: rolled back to {shorten_digest(str(last.version))} by {author}"
