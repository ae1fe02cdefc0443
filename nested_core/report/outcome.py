"""What became of a run, from its files and from its registry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import NestedTuneError
from nested_core.records.outcome_names import Outcome
from nested_core.records.run_status import Run
from nested_core.records.start import read_start
from nested_core.records.verdict import Verdict, describe_examples
from nested_core.records.verdict_table import list_checks
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.digest_format import shorten_digest
from nested_core.text.loss_format import format_change, format_loss

if TYPE_CHECKING:
    from nested_core.registry.ledger import Entry, Ledger


def find_outcome(run: Run) -> Outcome | None:
    """Return what became of a run, from its files and its registry.

    Returns None if the run has no verdict yet, or never began and no reason for that is recorded.
    """
    if run.state in ("running", "damaged"):
        return Outcome.RUNNING if run.state == "running" else Outcome.DAMAGED
    if run.verdict is not None:
        outcome = run.verdict.outcome
        is_passed = outcome == Outcome.VERIFIED
        return (_find_in_registry(run, run.verdict) if is_passed else None) or outcome
    if run.state != "never began":
        return None
    if run.skip is not None:
        return run.skip.outcome
    return Outcome.DATA_REFUSED if run.dataset is not None and run.dataset.errors else None


def _find_in_registry(run: Run, verdict: Verdict) -> Outcome | None:
    """Return the outcome of a run that passed the gate, from the history of its registry name.

    None if the run names a registry that lacks the run's adapter, although it was to be registered.
    KEPT_CHAMPION if it was not, as it is not better. VERIFIED if the run names no registry, if the
    registry cannot be read, or if the version was removed from it.
    """
    from nested_core.registry.folders import name_exists
    from nested_core.registry.link_and_views import reading  # brings mlx
    from nested_core.registry.versions import registered_versions

    if run.registered_as is None:
        return Outcome.VERIFIED
    if run.registered_as[0].is_dir() and not name_exists(*run.registered_as):
        return None
    version = verdict.trained.digest
    try:
        with reading(*run.registered_as) as (folder, ledger):
            changes = ledger.changes()
            if any(change.version == version for change in changes):
                return _find_in_changes(changes, version)
            if any((e.action, e.version) == ("declined", version) for e in ledger.entries):
                return Outcome.DECLINED
            if version in registered_versions(folder):
                return _outcome_of_unpromoted(folder, ledger, version)
            if ledger.is_removed(version):
                return Outcome.VERIFIED
        config = run.config
        is_kept = config is not None and find_kept_champion(config, run.folder, verdict) is not None
    except (NestedTuneError, OSError):  # `audit` says what is wrong with a registry
        return Outcome.VERIFIED
    return Outcome.KEPT_CHAMPION if is_kept else None


def _find_in_changes(changes: Sequence[Entry], version: str) -> Outcome:
    """Return how a version that was champion at least once came to be it, or lost it again.

    ROLLED_BACK if a rollback replaced the version last, APPROVED if a person's answer to a flow
    run promoted it, PROMOTED otherwise.

    changes: all changes of the champion, oldest first.
    """
    last = [change for change in changes if version in (change.version, change.previous)][-1]
    if last.action == "rollback" and last.previous == version:
        return Outcome.ROLLED_BACK
    rise = [change for change in changes if change.version == version][-1]
    is_answer = rise.action == "promote" and not rise.automatic and rise.flow_run is not None
    return Outcome.APPROVED if is_answer else Outcome.PROMOTED


def _outcome_of_unpromoted(folder: Path, ledger: Ledger, version: str) -> Outcome:
    """Return the outcome of a registered version that never was champion.

    folder: the adapter's folder in the registry, REGISTRY/NAME. ledger: the adapter's history.

    WAITS_FOR_APPROVAL if a person has yet to decide, SUPERSEDED if another version was registered,
    judged or promoted meanwhile. KEPT_CHAMPION if the policy refused it for not being better than
    the champion, VERIFIED otherwise.
    """
    # Imported here because the registry imports mlx, which takes long
    from nested_core.registry.ledger import CHAMPION_CHANGE_ACTIONS, REGISTRATION_ACTIONS
    from nested_core.registry.link_and_views import read_link
    from nested_core.registry.policy import PromotionRule, policy_of
    from nested_core.registry.promotion_policy import (
        choose_candidate,
        find_refusal_as_recorded,
        recorded_section,
    )

    candidate = choose_candidate(folder, ledger, version, read_link(folder))
    if candidate.facts.policy is None:
        return Outcome.VERIFIED
    # What the policy recorded with the version says against promoting it; None for nothing
    decision = find_refusal_as_recorded(folder, ledger, candidate)
    if decision is None or decision.outcome != "waiting":
        was_refused = decision is not None and decision.outcome == "refused"
        was_compared = candidate.facts.champion_at_gate is not None
        promote = recorded_section(folder, candidate).promote
        rule = PromotionRule.of(promote, policy_of(folder, ledger))
        is_kept = was_refused and was_compared and rule.must_be_better
        return Outcome.KEPT_CHAMPION if is_kept else Outcome.VERIFIED
    later = ledger.entries[candidate.line_number + 1 :]
    superseding_actions = (*REGISTRATION_ACTIONS, *CHAMPION_CHANGE_ACTIONS)
    of_others = [line.action for line in later if line.version != version]
    is_superseded = any(action in superseding_actions for action in of_others)
    return Outcome.SUPERSEDED if is_superseded else Outcome.WAITS_FOR_APPROVAL


def find_kept_champion(config: FineTuneConfig, run: RunDirectory, verdict: Verdict) -> str | None:
    """Return the champion if a new adapter has to be better than it, and is not; else None.

    Not better means: the mean held-out loss is not lower, and no suite's answers improved beyond
    chance. (The gate has passed the adapter, so it is not much worse either.)
    None without a champion, for a run that does not follow one, and without held-out losses.
    """
    from nested_core.registry.promotion_policy import effective_rule

    if verdict.rival is None or (losses := verdict.losses_beside(verdict.rival)) is None:
        return None
    if verdict.rival != verdict.initial.digest:
        start = read_start(config, run)
        if start is None or start.choice.policy != "rebuild":
            return None
    has_proven_gain = any(task.conclusion == "better" for task in verdict.tasks)
    if losses[0] < losses[1] or has_proven_gain:
        return None
    return verdict.rival if effective_rule(config.registry).must_be_better else None


def describe_kept_champion(verdict: Verdict, champion: str) -> str:
    """Return a line that says why nothing was registered, with the champion's loss and its own.

    champion: the digest of the champion that stays.
    """
    losses, change = verdict.losses_beside(champion), "no loss"
    if losses is not None and verdict.validation is not None:
        loss, champion_loss = losses
        examples = describe_examples(verdict.validation)
        change = f"loss {format_change(champion_loss, loss)} on {examples}"
    return (
        f"kept the champion {shorten_digest(champion)}: {change}, not better, and within the "
        f"threshold"
    )


def find_reason_kept(run: Run) -> str | None:
    """Return why a run that passed the gate did not replace the champion, as a sentence.

    Returns None for every run whose outcome is not KEPT_CHAMPION, and where no reason is recorded.
    An adapter that was not even registered is explained by its losses, a registered one by what the
    promotion policy says.
    """
    from nested_core.registry.link_and_views import read_link, reading
    from nested_core.registry.promotion_policy import choose_candidate, find_refusal_as_recorded
    from nested_core.registry.versions import registered_versions

    is_kept = find_outcome(run) == Outcome.KEPT_CHAMPION
    if run.verdict is None or run.registered_as is None or not is_kept:
        return None
    version, rival = run.verdict.trained.digest, run.verdict.rival
    with reading(*run.registered_as) as (folder, ledger):
        if version in registered_versions(folder):
            candidate = choose_candidate(folder, ledger, version, read_link(folder))
            decision = find_refusal_as_recorded(folder, ledger, candidate)
            return None if decision is None else decision.sentence
    return None if rival is None else describe_kept_champion(run.verdict, rival)


def describe_outcome(run: Run) -> str:
    """Return the outcome of a run in one line, such as `Promoted: passed, better`.

    The text after the colon describes a passed verdict and says if its adapter is missing in the
    run's registry; or it is the first problem of a damaged run, or the reason why training was
    skipped. A run without an outcome is described by its state.
    """
    outcome = find_outcome(run)
    if outcome is None:
        return describe_state(run).capitalize()
    if outcome == Outcome.DAMAGED and run.problems:
        return f"{outcome}: {run.problems[0]}"
    if run.skip is not None and outcome == run.skip.outcome:
        return f"{outcome}: {run.skip.reason}"
    if outcome == Outcome.RUNNING or run.verdict is None or not run.verdict.has_passed:
        return outcome
    is_missing = outcome == Outcome.VERIFIED and _find_in_registry(run, run.verdict) is None
    return f"{outcome}: {run.verdict.describe()}{'; not registered' if is_missing else ''}"


def describe_state(run: Run) -> str:
    """Return the state of a run in words; a flow run can begin before training does."""
    return "training not started" if run.state == "never began" else run.state


def describe_end(run: Run) -> str:
    """Return the verdict of a run as a sentence; without a verdict, the step and last losses."""
    if run.verdict is not None:
        return " ".join(filter(None, [f"{run.verdict.summary()}.", _describe_ends(run)]))
    if run.state == "never began":
        return f"Nothing was trained{'' if run.skip is None else f': {run.skip.describe()}'}."
    of_all = "" if run.steps is None else f" of {run.steps:,}"
    losses = {"training": run.last_loss("train_loss"), "validation": run.last_loss("val_loss")}
    texts = [f", {name} loss {format_loss(last[1])}" for name, last in losses.items() if last]
    goes_on = "; --resume continues from its last checkpoint" if run.state == "resumable" else ""
    return f"At step {run.step:,}{of_all}{''.join(texts)}{goes_on}."


def _describe_ends(run: Run) -> str | None:
    return None if run.plan is None else run.plan.describe_ends(run.result)


def measure_speed(run: Run) -> dict[str, float | None]:
    """Return the median tokens per second, the seconds of training and the peak memory in GB."""
    speeds = [r["tokens_per_second"] for r in run.metrics if r.get("tokens_per_second") is not None]
    return {
        "tokens_per_second": median(speeds) if speeds else None,
        "training_seconds": max(run.seconds, default=None),
        "peak_memory_gb": run.last("peak_memory_gb"),
    }


def list_figures(run: Run) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return three tables of figures by name: the run's result, its gate checks, its training.

    A figure that there is not (yet) is None.
    """
    end = {
        "state": describe_state(run),
        "outcome": describe_outcome(run),
        "champion kept, because": find_reason_kept(run),
        "selected: the adapter of step": run.offered_step,
        "its validation loss": run.offered_val_loss,
    }
    checks = [] if run.verdict is None else list_checks(run.verdict)
    losses = run.describe_last_losses()
    training = {
        "trained": run.describe_length(),
        "how it ended": _describe_ends(run),
        "training loss, last report": losses.get("training loss"),
        "validation loss, last report": losses.get("validation loss"),
        **{name.replace("_", " "): value for name, value in measure_speed(run).items()},
    }
    return end, {check.name: check.figures for check in checks}, training


LIST_COLUMNS = ("run", "adapter", "outcome", "selected step", "val loss", "gate loss", "minutes")
LIST_NOTE = (
    "Losses of the selected checkpoint, in nats/token or the unit of training.loss: val loss on "
    "the validation set, gate loss on the examples of the gate. (last): of the last evaluation, "
    "before a checkpoint is selected."
)


def list_row(run: Run) -> tuple[object, ...]:
    """Return the cells of a run in the list of runs: its row.

    These are name, adapter, outcome, step, validation loss, loss in the gate and minutes. A run
    that offers no adapter yet shows the step that it is at, and its last validation loss.
    """
    if run.state == "damaged":
        return (run.name, None, describe_outcome(run), None, None, None, None)
    of_all = "" if run.steps is None else f" of {run.steps:,}"
    last, minutes = run.last_loss("val_loss"), run.minutes
    if run.offered_step is not None:
        step = f"{run.offered_step:,}{of_all}"
        val_loss = None if run.offered_val_loss is None else format_loss(run.offered_val_loss)
    else:
        step = f"- (at {run.step:,}{of_all})"
        val_loss = None if last is None else f"{format_loss(last[1])} (last)"
    return (
        run.name,
        None if run.registered_as is None else run.registered_as[1],
        describe_outcome(run),
        step,
        val_loss,
        run.gate_loss,
        None if minutes is None else f"{minutes:.1f}" if minutes < 10 else f"{minutes:.0f}",
    )


def run_to_json(run: Run) -> dict[str, object]:
    """Return the JSON object that commands print for a run with `--json`."""
    skipped = None if run.skip is None else asdict(run.skip)
    outcome = find_outcome(run) or run.state.capitalize()
    return run.to_json() | {"outcome": outcome, "skipped": skipped}
