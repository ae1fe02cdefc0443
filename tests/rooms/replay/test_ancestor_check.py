"""Held-out examples of earlier nights: a candidate that is worse at them has forgotten them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nested_core.config.loading import render_config
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection
from nested_core.records.losses import ExampleLosses
from nested_core.records.verdict import AncestorLoss, Verdict
from nested_core.records.verdict_file import read_verdict
from nested_core.records.verdict_table import list_checks
from nested_core.registry.data_store import RunExamples, StoredRow
from nested_core.rooms.replay import ancestor_examples
from nested_core.rooms.replay.ancestor_examples import (
    AncestorExamples,
    choose_ancestor_examples,
    share_rows,
)
from nested_core.rooms.replay.gate_check import ancestor_reasons, summarise_ancestors
from nested_core.storage.adapter import write_adapter
from nested_core.text.digest_format import shorten_digest
from tests.builders.candidates import Arrays, Candidate
from tests.builders.judged_adapters import pass_by_hand
from tests.builders.registering import promote, register
from tests.example import DATA
from tests.registry_care import collect_garbage
from tests.rooms.replay.nights import FRESH, add_version, from_champion, row, write_split

pytestmark = pytest.mark.slow("judges nights by what their ancestors held out")

NAME = "capitals"
Row = dict[str, Any]


def visits(*countries: str, answer: str = "Go and see it!") -> list[Row]:
    """Rows with the example's question, which it has not about these countries."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"I want to see {country}. Where to?"},
                {"role": "assistant", "content": answer},
            ]
        }
        for country in countries
    ]


ATLANTIS = visits("Atlantis", "Utopia", "Arcadia", "Camelot", "Lemuria", "Avalon", "Elysium")


def rows_of(split: str) -> list[Row]:
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Night(Candidate):
    """The trained run, as a candidate for a registry whose champion has the run's own tensors."""

    registry: Path

    def meet(
        self,
        held_out: list[Row] | None,
        train: list[Row] | None = None,
        *,
        scale: float = 1.0,
        parent: str | None = None,
    ) -> str:
        """Make the champion an adapter of tensors times `scale`, with these examples kept."""
        folder = self.registry.parent / "champion"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "adapter").mkdir(parents=True)
        tensors = {name: tensor * scale for name, tensor in self.trained.items()}
        described = json.loads((self.run.adapter / "adapter_config.json").read_text())
        write_adapter(folder / "adapter", tensors, described)
        examples = None if held_out is None else RunExamples(train or [], held_out)
        run, provenance = pass_by_hand(folder, parent or "0" * 64), {"parent": parent}
        version = register(run, self.registry, NAME, provenance, examples=examples)
        promote(self.registry, NAME, version, by="ann")
        return version

    def forget(self) -> None:
        """Offer an adapter that has learnt less than a third."""

        def weaken(tensors: Arrays) -> None:
            tensors.update({name: tensor * 0.3 for name, tensor in tensors.items()})

        self.rewrite(change_adapter=weaken)


@pytest.fixture
def night(candidate: Candidate, tmp_path: Path) -> Night:
    section = {"path": str(tmp_path / "registry"), "name": NAME}
    changed = candidate.config.model_dump(mode="json") | {
        "registry": section,
        "gate": {"max_ancestor_loss_increase": 0.1},
    }
    config = FineTuneConfig.model_validate(changed)
    candidate.run.config.write_bytes(render_config(config))
    return Night(config, candidate.run, tmp_path / "registry")


def only_ancestor(verdict: Verdict) -> AncestorLoss:
    (ancestor,) = verdict.ancestors
    return ancestor


def test_a_candidate_that_lost_what_its_ancestor_was_judged_by_is_refused_with_its_night(
    night: Night,
) -> None:
    version = night.meet(ATLANTIS)
    night.forget()
    night.require_rejected(
        rf"Rejected: worse \(forgetting \({shorten_digest(version)}\): forgot what version "
        rf"{shorten_digest(version)} of 20\d\d-\d\d-\d\d was judged by: loss \d.* on 7 of its "
        r"held-out examples, .*gate.max_ancestor_loss_increase is 0.1"
    )
    verdict = read_verdict(night.run.gate)
    found = only_ancestor(verdict)
    assert (found.version, found.examples, found.conclusion) == (version, 7, "worse")
    assert found.corrected_interval is not None
    assert found.corrected_interval[0] > 0
    (row,) = [row for row in list_checks(verdict) if row.has_failed]
    which = f"on what {found.name} was judged by, 7 examples"
    assert row.name == f"champion vs this run, {which}"
    assert (row.before, row.verdict) == (f"{found.loss:.4g}", "forgetting")


@pytest.mark.slow("judges against an ancestor")
def test_without_the_bound_it_is_measured_and_no_reason(night: Night) -> None:
    night.meet(ATLANTIS)
    night.forget()
    verdict = night.bounded().verdict()
    assert verdict.has_passed
    assert only_ancestor(verdict).conclusion == "worse"


@pytest.mark.slow("judges a run with its ancestors")
def test_a_candidate_that_is_as_good_as_its_champion_passes(night: Night) -> None:
    night.meet(ATLANTIS, scale=0.999)
    verdict = night.judge()
    found = only_ancestor(verdict)
    assert abs(found.difference or 1.0) < 0.05
    assert read_verdict(night.run.gate).ancestors == verdict.ancestors
    night.confirm()


@pytest.mark.slow("judges against an ancestor")
def test_an_ancestor_with_fewer_than_five_prompts_left_is_no_reason(night: Night) -> None:
    night.meet(ATLANTIS[:4] + visits("Atlantis", answer="Go!"))
    night.forget()
    found = only_ancestor(night.judge())
    assert (found.examples, found.clusters, found.interval) == (5, 4, None)


def few_ancestors(rows: Sequence[int], rise: float) -> list[AncestorLoss]:
    """Versions with so many rows each, at which the candidate is worse by `rise` nats/token."""
    owners = np.repeat(np.arange(len(rows)), rows)
    before = np.linspace(0.8, 1.2, len(owners))
    after = before + rise + 0.05 * np.sin(np.arange(len(owners)))
    tokens = np.full(len(owners), 10.0)
    lines = np.arange(1, len(owners) + 1)
    losses = ExampleLosses("rows", lines, tokens, before, after)
    row = StoredRow("0" * 64, {})
    ancestors = [
        AncestorExamples(AncestorLoss(str(n)), (row,) * count) for n, count in enumerate(rows)
    ]
    bounds = GateSection(max_ancestor_loss_increase=0.1)
    return list(summarise_ancestors(ancestors, losses, owners, bounds))


@pytest.mark.parametrize(
    ("rows", "joined", "examples"),
    [
        ((4, 1), ("0", "1"), 5),
        ((3, 7, 4, 2), ("0", "2", "3"), 9),
        ((2, 2), None, 4),
        ((4, 9), None, 4),
    ],
)
def test_ancestors_with_too_few_rows_are_judged_together(rows, joined, examples) -> None:
    lost, kept = few_ancestors(rows, 0.5), few_ancestors(rows, 0.0)
    bounds = GateSection(max_ancestor_loss_increase=0.1)
    assert not list(ancestor_reasons(kept, bounds))
    reasons = list(ancestor_reasons(lost, bounds))
    few = [own for own in lost if own.interval is None]
    assert not any(own.is_forgotten("paired") for own in few)
    together = [own for own in lost if own.joined]
    assert [own.joined for own in together] == ([] if joined is None else [joined])
    if joined is not None:
        assert together[0].examples == examples
        assert reasons[-1].name == "forgetting (joined)"
        assert f"what each of {len(joined)} joined versions was judged by" in reasons[-1].message


SPREAD = np.array([-0.25, -0.125, 0.0, 0.125, 0.25])  # a standard deviation of 0.2


@pytest.mark.parametrize(
    ("nights", "lost", "own_spread", "is_refused"),
    [
        (10, 0.35, 1.0, True),  # 5.6 standard errors by itself, 3.0 by the spread of all
        (10, 0.2, 1.0, False),
        (10, 0.35, 4.0, False),  # its own examples lie too far apart
    ],
)
def test_a_night_of_five_rows_is_judged_by_the_spread_of_all_nights(
    nights: int, lost: float, own_spread: float, is_refused: bool
) -> None:
    owners = np.repeat(np.arange(nights), len(SPREAD))
    before = np.ones(len(owners))
    change = np.tile(SPREAD, nights) * np.where(owners == 0, own_spread, 1.0)
    after = before + change + np.where(owners == 0, lost, 0.0)
    lines = np.arange(1, len(owners) + 1)
    losses = ExampleLosses("rows", lines, np.full(len(owners), 10.0), before, after)
    rows = (StoredRow("0" * 64, {}),) * len(SPREAD)
    ancestors = [AncestorExamples(AncestorLoss(str(n)), rows) for n in range(nights)]
    bounds = GateSection(max_ancestor_loss_increase=0.1)
    compared = list(summarise_ancestors(ancestors, losses, owners, bounds))
    refused = [reason.ancestor for reason in ancestor_reasons(compared, bounds)]
    assert refused == (["0"] if is_refused else [])


def test_superseded_repeated_and_trained_rows_are_not_judged_by_and_are_counted(night) -> None:
    known = rows_of("train")
    corrected = [
        {"messages": [row["messages"][0], {"role": "assistant", "content": "Stay at home."}]}
        for row in known[:3]
    ]
    night.meet(ATLANTIS + corrected + rows_of("valid")[:2] + known[3:7], scale=0.999)
    found = only_ancestor(night.judge())
    assert (found.examples, found.superseded, found.repeated, found.left_out) == (7, 3, 2, 4)
    (row,) = [row for row in list_checks(read_verdict(night.run.gate)) if "version" in row.name]
    assert row.name.endswith(
        "7 examples (4 trained on, 3 superseded by newer data, 2 held out by newer data too)"
    )


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (None, "none of its examples are kept, or they cannot be read"),
        ([], "no held-out examples of it are there"),
        (
            rows_of("valid"),
            "its held-out examples are in newer held-out data too, and are compared there",
        ),
    ],
)
def test_why_nothing_of_an_ancestor_is_left_is_said(night, held_out, message) -> None:
    version = night.meet(held_out)
    (left,) = choose_ancestor_examples(night.config, night.registry, NAME, version)
    assert (left.rows, left.entry.not_compared) == ((), message)


@pytest.mark.slow("judges against an ancestor")
def test_an_ancestor_that_cannot_be_compared_is_said_and_no_reason(night: Night) -> None:
    night.meet(rows_of("train")[:7])
    night.forget()
    verdict = night.judge()
    (row,) = [row for row in list_checks(verdict) if row.name.startswith("earlier version ")]
    assert row.verdict == "not compared: all 7 that are left were trained on"


def test_an_ancestor_that_gc_removed_between_two_nights_or_whose_list_is_damaged_is_said(
    night: Night,
) -> None:
    first = night.meet(None, scale=0.996)  # gc keeps an ancestor whose examples are kept
    second = night.meet(visits("Oz", "Eden"), scale=0.997, parent=first)
    third = night.meet(visits("Mu"), scale=0.998, parent=second)
    assert collect_garbage(night.registry, NAME, by="ann", keep=0).collected == (first,)
    (night.registry / NAME / "data" / f"{second}.json").write_text("{")
    newest, *others = choose_ancestor_examples(night.config, night.registry, NAME, third)
    assert (newest.entry.version, len(newest.rows)) == (third, 1)
    assert [(other.entry.version, other.entry.not_compared) for other in others] == [
        (version, "none of its examples are kept, or they cannot be read")
        for version in (second, first)
    ]


def test_newer_nights_supersede_and_repeat_what_older_ones_held_out(night: Night) -> None:
    first = night.meet(ATLANTIS, scale=0.997)
    corrected = visits("Atlantis", answer="Stay at home.")
    second = night.meet(ATLANTIS[1:3] + visits("Oz"), corrected, scale=0.998, parent=first)
    newest, oldest = choose_ancestor_examples(night.config, night.registry, NAME, second)
    assert (newest.entry.version, len(newest.rows)) == (second, 3)
    assert (oldest.entry.version, len(oldest.rows)) == (first, 4)
    assert (oldest.entry.superseded, oldest.entry.repeated) == (1, 2)


def test_of_many_examples_each_night_draws_the_same(night, monkeypatch) -> None:
    monkeypatch.setattr(ancestor_examples, "MAX_ROWS_PER_ANCESTOR", 4)
    drawn = []
    for scale, rows in ((0.997, ATLANTIS), (0.998, ATLANTIS[::-1])):
        version = night.meet(rows, scale=scale)
        (left,) = choose_ancestor_examples(night.config, night.registry, NAME, version)
        drawn.append(left.rows)
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 4


def test_every_night_is_asked_of_however_many_there_are_with_fewer_rows_each(
    night, monkeypatch
) -> None:
    version = None
    for number in range(12):
        held_out = visits(*(f"Place {number} {row}" for row in range(4 if number else 2)))
        version = night.meet(held_out, scale=1 - number / 1000, parent=version)
    whole = choose_ancestor_examples(night.config, night.registry, NAME, str(version))
    assert [len(ancestor.rows) for ancestor in whole] == [4] * 11 + [2]
    monkeypatch.setattr(ancestor_examples, "MAX_ROWS", 35)
    parts = choose_ancestor_examples(night.config, night.registry, NAME, str(version))
    assert [len(ancestor.rows) for ancestor in parts] == [3] * 11 + [2]
    assert [one.rows for one in parts] == [one.rows[:3] for one in whole]


@pytest.mark.parametrize(
    ("counts", "most"), [([500], 200), ([200] * 10, 200), ([66] * 30, 200), ([200] * 100, 20)]
)
def test_all_nights_together_have_no_more_rows_than_a_gate_measures(counts, most) -> None:
    assert share_rows(counts) == most
    assert sum(min(count, most) for count in counts) <= 2_000


@pytest.mark.parametrize(("choice", "left"), [("auto", 2), ("valid", 0), ("file.jsonl", 1)])
def test_only_what_the_runs_gate_judges_by_is_left_out(
    tmp_path: Path, choice: str, left: int
) -> None:
    held_out = [row("held one?", "1"), row("held two?", "2")]
    write_split(tmp_path / "one", train=[row("a?", "1")], valid=held_out)
    version = add_version(tmp_path, FRESH, tmp_path / "one")
    test = [row("new?", "1")]
    write_split(tmp_path / "new", train=[row("c?", "1")], valid=held_out, test=test)
    write_split(tmp_path, file=held_out[:1])
    judged_by = str(tmp_path / choice) if "." in choice else choice
    config = from_champion(tmp_path, gate={"held_out": judged_by})
    (ancestor,) = choose_ancestor_examples(config, tmp_path / "registry", "capitals", version)
    assert (len(ancestor.rows), ancestor.entry.repeated) == (left, 2 - left)
