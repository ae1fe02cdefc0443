"""Held-out examples of the adapter that a run goes on from, without a registry or with one."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from examples.countries import COUNTRIES
from nested_core.records.verdict import JudgedAdapter, Verdict
from nested_core.records.verdict_file import write_verdict
from nested_core.records.verdict_table import list_checks
from nested_core.registry.data_store import RunExamples
from nested_core.registry.versions import version_folder
from nested_core.storage.adapter import ADAPTER_FILES, read_adapter
from nested_core.storage.manifest import describe_file
from tests.builders.candidates import Candidate, train_candidate
from tests.builders.data_sets import chat, write_lines
from tests.builders.registering import register
from tests.example import example_config

pytestmark = pytest.mark.slow("trains runs that go on from each other")

Rows = Sequence[dict[str, Any]]
SIGHTS = [
    chat(f"I want to see {c.name}. Where to?", f"Go and see {c.capital}, the capital of {c.name}!")
    for c in COUNTRIES
]
PARTS = [chat(f"I want to see {c.name}. Which part?", f"Go to {c.continent}!") for c in COUNTRIES]
SPELT = [chat(f"Spell {c.name}.", " ".join(c.name.upper())) for c in COUNTRIES]


def write(folder: Path, rows: Rows, held_out: int = 20) -> Path:
    write_lines(folder / "train.jsonl", rows[held_out:])
    write_lines(folder / "valid.jsonl", rows[:held_out])
    return folder


def learn(folder: Path, data: Path, **changes: Any) -> Candidate:
    settings: dict[str, Any] = {"iters": 60, "batch_size": 8, "nested": {"frequencies": [1]}}
    settings |= {"learning_rate": 1e-4, "lora_parameters": {"scale": 20.0}, "num_layers": 6}
    return train_candidate(folder, example_config(**settings | {"data": str(data), **changes}))


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt capitals."""
    folder = tmp_path_factory.mktemp("parent")
    return learn(folder / "run", write(folder / "data", SIGHTS)).run.path


def go_on(folder: Path, rows: Rows, adapter: Path, **changes: Any) -> Verdict:
    """The verdict on a run that goes on from an adapter with these rows."""
    weights = str(adapter / "adapters.safetensors")
    data = write(folder / "data", rows)
    return learn(folder / "run", data, resume_adapter_file=weights, **changes).verdict()


def told(verdict: Verdict) -> list[str]:
    return [one for one in verdict.notes() if "forgot" in one]


@pytest.mark.parametrize("task", ["parts of the world", "spelling"])
def test_what_the_adapter_knew_and_lost_is_told(task: str, parent: Path, tmp_path: Path) -> None:
    new = SPELT if task == "spelling" else PARTS
    lost = go_on(tmp_path / "lost", new, parent / "adapter")
    (note,) = told(lost)
    assert "20 of its held-out examples" in note
    mixed = [*new[:20], *random.Random(3).sample([*new[20:], *SIGHTS[20:]], 160)]
    kept = go_on(tmp_path / "kept", mixed, parent / "adapter")
    assert told(kept) == []
    (compared,) = kept.ancestors
    assert compared.difference is not None
    assert compared.difference < 0.05


def test_the_bound_on_earlier_examples_holds_for_it_too(parent: Path, tmp_path: Path) -> None:
    bound = {"max_ancestor_loss_increase": 0.1}
    verdict = go_on(tmp_path, PARTS, parent / "checkpoints" / "step-0000060", gate=bound)
    assert [reason.code for reason in verdict.reasons] == ["forgetting"]
    assert "the start's to the candidate's" in verdict.reasons[0].message
    assert told(verdict) == []


def test_a_version_of_a_registry_is_judged_by_what_that_keeps(parent: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(parent, tmp_path / "run"))
    files = {f"adapter/{name}": describe_file(run / "adapter" / name) for name in ADAPTER_FILES}
    initial, own = (
        JudgedAdapter("", read_adapter(run / one).digest()) for one in ("initial", "adapter")
    )
    passed = Verdict(reasons=(), initial=initial, trained=own, tensors=(), adapter_step=60)
    write_verdict(run, passed, files)
    examples = RunExamples(SIGHTS[20:], SIGHTS[:20])
    provenance = {"parent": None}
    version = register(run, tmp_path / "registry", "a", provenance, examples=examples)
    verdict = go_on(tmp_path / "on", PARTS, version_folder(tmp_path / "registry", "a", version))
    (note,) = told(verdict)
    assert version[:12] in note


def test_where_the_rows_are_not_known_nothing_is_said_to_be_measured(
    parent: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(parent, tmp_path / "run")
    alone = shutil.copytree(run / "adapter", tmp_path / "a" / "b" / "adapter")
    data = parent.parent / "data" / "valid.jsonl"
    lines = data.read_text()
    copied = shutil.copytree(run / "adapter", tmp_path / "mine" / "versions" / "v2")
    for adapter, words in (
        *((alone, "not known"), (copied, "not known")),
        (run / "adapter", "has changed"),
    ):
        data.write_text(lines if adapter != run / "adapter" else lines[: lines.index("\n") + 1])
        try:
            verdict = go_on(tmp_path / words / adapter.name, PARTS, adapter, iters=8)
        finally:
            data.write_text(lines)
        (row,) = [one for one in list_checks(verdict) if "not compared" in (one.verdict or "")]
        assert words in (row.verdict or "")
        assert told(verdict) == []
