"""policy: show or set what an automatic promotion of a name needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.commands.adapter_places import add_registry_arguments
from flows.commands.command_output import result_printer
from flows.commands.prefect_notice import tell_server
from flows.terminal.console import print_progress, print_table
from nested_core.errors import ConfigError
from nested_core.process.current_user import current_user


def add_commands(commands: Any) -> None:
    """Add the command."""
    policy = commands.add(
        "policy", run_policy, "Registry", "support-bot --promote better", json=True
    )
    policy.add_argument(
        "--promote",
        choices=("never", "approve", "better", "always", "null"),
        help="the loosest registry.promote that counts (null: as configured)",
    )
    policy.add_argument(
        "--max-val-loss-increase",
        metavar="X",
        help="the largest gate.max_val_loss_increase that counts (null: as configured)",
    )
    policy.add_argument(
        "--tasks",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="eval sets of every run: YAML with gate.tasks, or questions, scored by contains "
        "(without FILE none)",
    )
    policy.add_argument(
        "--reference",
        metavar="VERSION|nights:N",
        help="version that no automatic promotion may be worse than, within a margin (null: none)",
    )
    add_registry_arguments(policy)


def run_policy(arguments: argparse.Namespace) -> Callable[[], int]:
    """Show or set what a promotion needs."""
    from nested_core.registry.policy import NO_REFERENCE, RegistryPolicy, read_policy, set_policy

    changes = _read_policy_changes(arguments)
    if changes:
        policy = set_policy(arguments.registry, arguments.name, by=current_user(), changes=changes)
        tell_server(arguments.registry, arguments.name)
    else:
        policy = read_policy(arguments.registry, arguments.name) or RegistryPolicy()
    fields = policy.fields()

    def show() -> None:
        """A row for each key."""
        rows: list[tuple[str, str]] = [("promote", policy.promote or "as configured")]
        bound = policy.max_val_loss_increase
        rows.append(("max_val_loss_increase", "as configured" if bound is None else f"{bound:g}"))
        rows += [(f"eval set {task.name}", f"{task.score}, {task.file}") for task in policy.tasks]
        rows.append(("reference", policy.reference or "none"))
        print_table(("key", "at least"), rows, title=f"{arguments.name}: policy")
        if policy.promote == "always" and policy.reference is None:
            print_progress(f"note: {NO_REFERENCE}")

    return result_printer(arguments, lambda: {"name": arguments.name, "policy": fields}, show)


def _read_policy_changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keys that the flags change; `null` leaves a key to the run."""
    changes: dict[str, Any] = {}
    for key in ("promote", "reference"):
        if (value := getattr(arguments, key)) is not None:
            changes[key] = None if value == "null" else value
    if (bound := arguments.max_val_loss_increase) is not None:
        try:
            changes["max_val_loss_increase"] = None if bound == "null" else float(bound)
        except ValueError:
            raise ConfigError(
                f"--max-val-loss-increase {bound!r:.40}: expected a number, such as 0.02, or null."
            ) from None
    if arguments.tasks is not None:
        changes["tasks"] = [task for path in arguments.tasks for task in _read_suites(path)]
    return changes


def _read_suites(path: Path) -> list[dict[str, Any]]:
    """Return the suites of a YAML file's gate.tasks, or a file of questions as one of them.

    With absolute paths; each is read to check it.
    """
    from pydantic import ValidationError

    from nested_core.config.loading import read_yaml
    from nested_core.config.sections import GateSection
    from nested_core.errors import describe_first_problem
    from nested_core.measure.answers.suite_answers import read_suites
    from nested_core.measure.answers.suite_files import holds_questions

    if holds_questions(path):
        tasks: object = [{"name": path.stem, "file": str(path), "score": "contains"}]
    else:
        values = read_yaml(path)
        section = values.get("gate", values)
        tasks = section.get("tasks") if isinstance(section, dict) else None
    if not tasks:
        raise ConfigError(
            f"--tasks {path} has no eval sets. Expected YAML with gate.tasks, as in a run's "
            f"config.yaml: a list of eval sets, each with name, file and score. Or a file of "
            f"questions: JSON Lines, CSV or a list in YAML."
        )
    try:
        gate = GateSection.model_validate({"tasks": tasks})
    except ValidationError as error:
        raise ConfigError(f"--tasks {path}: {describe_first_problem(error)}.") from error
    read_suites(gate)
    return [t.model_dump(mode="json") | {"file": str(Path(t.file).absolute())} for t in gate.tasks]
