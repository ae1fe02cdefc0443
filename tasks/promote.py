"""The tasks that move the champion: promote, as policy or a person asks, and roll back."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger, runtime

from nested_core import registry, seams
from nested_core.registry import Decision, promotion_policy
from nested_core.registry.ledger import Entry, Origin
from nested_core.registry.promotion_outcome import Outcome
from nested_core.text.digest_format import shorten_digest
from tasks.events import ServerPages, announce_changes
from tasks.prefect_server import tolerating_server_outage
from tasks.retrying import REGISTRY_RETRY_DELAYS, retried_task


@retried_task("promote", "promote {name} {version:.12}", REGISTRY_RETRY_DELAYS)
def promote(path: Path, name: str, version: str) -> Decision:
    """Promote by the policy that was recorded with the version."""
    done = promotion_policy.promote_by_recorded_policy(path, name, version, origin=read_origin())
    return announce_promotion(path, name, done)


@retried_task("roll-back", "roll-back {name}", REGISTRY_RETRY_DELAYS)
def roll_back(
    path: Path, name: str, to: str | None, by: str, *, reason: str | None = None
) -> Decision:
    """Make `to`, or the champion before this one, the champion again; `by` and `reason` are noted.

    A flow run goes back once, however often it is tried. `to` has to be a former champion: no
    parameter of a flow promotes what its policy does not.
    """
    if (change := find_own_change(path, name)) is not None:
        return announce_promotion(path, name, _decision_of(change))
    done = registry.rollback(
        path, name, to=to, by=by, only_former_champions=True, reason=reason, origin=read_origin()
    )
    return announce_promotion(path, name, done)


@retried_task("reconcile", "reconcile {name}", REGISTRY_RETRY_DELAYS)
def promote_missed(path: Path, name: str) -> dict[str, Decision]:
    """Promote what was missed; the outcome of each version that never was champion.

    The server is told of what was changed at the command line, too.
    """
    outcomes = promotion_policy.promote_missed_versions(path, name, origin=read_origin())
    if (change := find_own_change(path, name)) is not None:
        outcomes[str(change.version)] = _decision_of(change)
    for version, decision in outcomes.items():
        get_run_logger().info("%s %s: %s", name, shorten_digest(version), decision.sentence)
        if decision.outcome == "promoted":
            for page in seams.load_all(ServerPages):
                page.publish(path, name)
    announce_changes(path, name)
    return outcomes


@retried_task("check-champion", "check-champion {name}", REGISTRY_RETRY_DELAYS)
def check_champion(path: Path, name: str) -> str | None:
    """Compare the champion's files and the history with what was recorded; the champion."""
    return registry.check_champion(path, name)


def read_origin() -> Origin:
    """The flow run that is at work, and the deployment that started it, as Prefect knows them.

    The environment has both ids; the deployment's name is the server's, which may be away.
    """
    flow_run, deployment = runtime.flow_run.id, runtime.deployment.id
    if deployment is not None:
        with tolerating_server_outage("the history has the deployment's id in place of its name"):
            deployment = runtime.deployment.name
    return Origin(
        None if flow_run is None else str(flow_run), None if deployment is None else str(deployment)
    )


def find_own_change(path: Path, name: str) -> Entry | None:
    """Return the last change of the champion that this flow run made; None if it made none.

    A process can die after the change, or an I/O error come as it is forced onto the disk: the next
    try of the task, or the flow run that a person retries, finds its own work done.
    """
    own = runtime.flow_run.id
    changes = [] if own is None else registry.read_champion_changes(path, name)
    return next((change for change in reversed(changes) if change.flow_run == str(own)), None)


def _decision_of(change: Entry) -> Decision:
    """Return a line of the history as the decision that it records."""
    outcome: Outcome = "rolled_back" if change.action == "rollback" else "promoted"
    return Decision(outcome, str(change.version), change.previous)


def announce_promotion(path: Path, name: str, done: Decision) -> Decision:
    """Log what became of it; where the champion has moved, tell the server and publish its page.

    A version that this flow run made champion, and that still is, was promoted, not found there.
    """
    change = find_own_change(path, name)
    if change is not None and change == registry.read_champion_changes(path, name)[-1]:
        registry.check_champion(path, name)  # a writer, which finishes what an earlier try began
        done = _decision_of(change)
    get_run_logger().info("%s %s: %s", name, shorten_digest(done.version), done.sentence)
    if done.outcome in ("promoted", "rolled_back"):
        announce_changes(path, name)
        for page in seams.load_all(ServerPages):
            page.publish(path, name)
    return done
