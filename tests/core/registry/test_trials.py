"""Runs that made no version, as lines of the history: one for the same conditions, however many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nested_core.config.sections import RegistrySection
from nested_core.records.outcome_names import Outcome
from nested_core.registry import history, list_versions, read_champion
from nested_core.registry.ledger import LEDGER_NAME, read_ledger
from nested_core.registry.trials import find_reason_to_skip, record_trial
from tests.builders.registering import promote, register
from tests.core.registry.faults import in_processes
from tests.core.registry.states import NAME
from tests.registry_care import audit

CONDITIONS = "c0" * 32


def record(registry: Path, conditions: str = CONDITIONS, reason: str = "loss_regressed") -> None:
    digests = {"dataset_digest": "da" * 32, "settings_digest": "5e" * 32, "adapter": "ad" * 32}
    more = {"outcome": Outcome.WORSE, "run": "night"}
    record_trial(registry, NAME, conditions, reason, **digests, **more)


def asked(registry: Path) -> RegistrySection:
    return RegistrySection(path=str(registry), name=NAME, promote="better")


def test_a_trial_leaves_champion_versions_and_audit_as_they_are(three, registry: Path) -> None:
    before = read_champion(registry, NAME), list_versions(registry, NAME)
    record(registry)
    assert (read_champion(registry, NAME), list_versions(registry, NAME)) == before
    assert audit(registry, NAME).findings == ()
    assert history(registry, NAME)[-1]["action"] == "tried"
    assert promote(registry, NAME, three[2], by="ann").outcome == "promoted"


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_of_eight_processes_that_record_the_same_at_once_one_adds_a_line(registry: Path) -> None:
    in_processes(8, lambda index: record(registry, reason=f"by {index}"))
    assert [line["action"] for line in history(registry, NAME)] == ["tried"]


def test_a_line_that_a_crash_cut_short_is_none_and_is_written_again(registry: Path) -> None:
    record(registry)
    path = registry / NAME / LEDGER_NAME
    path.write_bytes(path.read_bytes()[:-2])
    (registry / NAME / "champion.json").unlink()  # is written after the line
    assert find_reason_to_skip(asked(registry), CONDITIONS, None) is None
    record(registry)
    assert find_reason_to_skip(asked(registry), CONDITIONS, None) is not None


def test_other_conditions_are_another_trial(registry: Path) -> None:
    record(registry)
    assert find_reason_to_skip(asked(registry), "d1" * 32, None) is None
    record(registry, "d1" * 32)
    assert len(history(registry, NAME)) == 2


def test_a_version_that_was_collected_or_lost_is_made_again(make_run, registry: Path) -> None:
    made = {"conditions_digest": CONDITIONS, "config": {"registry": {"promote": "never"}}}
    version = register(make_run(1), registry, NAME, made)
    section = asked(registry).model_copy(update={"promote": "never"})
    skip = find_reason_to_skip(section, CONDITIONS, None)
    assert skip is not None
    assert (skip.outcome, skip.version) == (Outcome.SKIPPED_UNCHANGED, version)
    (registry / NAME / "versions" / version).rename(registry / "elsewhere")
    assert find_reason_to_skip(section, CONDITIONS, None) is None


def test_a_long_reason_is_cut_and_the_line_has_no_more_than_it_needs(registry: Path) -> None:
    record(registry, reason="too\nlong " * 200)
    line = json.loads((registry / NAME / LEDGER_NAME).read_text())
    assert len(line["reason"]) == 500
    assert "\n" not in line["reason"]
    (entry,) = read_ledger(registry / NAME).entries
    assert (entry.version, entry.previous, entry.outcome) == (None, None, "Rejected: worse")
