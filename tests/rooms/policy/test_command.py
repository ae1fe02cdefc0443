"""`nested-tune policy`: what it shows, writes and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from nested_core.registry import history
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.flows.conftest import Ended, called
from tests.left_out import needs_rooms
from tests.registry_care import audit

NAME = "capitals"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A registry with a champion and the version before it, and a file with a suite."""
    for seed in (1, 2):
        run = write_run(tmp_path / f"run-{seed}", seed)
        promote(
            tmp_path / "registry", NAME, register(run, tmp_path / "registry", NAME, {}), by="ann"
        )
    (tmp_path / "questions.jsonl").write_text(
        '{"prompt": "Capital of Peru?", "expected": "Lima"}\n'
    )
    suite = "{name: capitals, file: questions.jsonl, score: contains, min: 0.5}"
    (tmp_path / "suites.yaml").write_text(f"gate:\n  tasks:\n    - {suite}\n")
    return tmp_path


def policy(folder: Path, *words: object) -> Ended:
    return called("policy", NAME, *words, cwd=folder)


def test_a_policy_is_shown_set_and_recorded(folder: Path) -> None:
    assert "as configured" in policy(folder).stdout
    bounds = ("--promote", "better", "--max-val-loss-increase", "0.02")
    done = policy(folder, *bounds, "--tasks", "suites.yaml")
    assert done.code == 0, done.stderr
    shown = policy(folder, "--json").document
    (task,) = shown["policy"].pop("tasks")
    assert shown == {
        "name": NAME,
        "policy": {"promote": "better", "max_val_loss_increase": 0.02, "reference": None},
    }
    assert (task["file"], task["min"]) == (str(folder / "questions.jsonl"), 0.5)
    line = history(folder / "registry", NAME)[-1]
    assert (line["action"], line["after"]["promote"]) == ("policy", "better")
    assert audit(folder / "registry", NAME).is_sound


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("asked.jsonl", '{"prompt": "Capital of Peru?", "expected": "Lima"}\n'),
        pytest.param(
            "asked.csv", "prompt;expected\nCapital of Peru?;Lima\n", marks=needs_rooms("tables")
        ),
        ("asked.yaml", "# asked each night\n- {prompt: 'Capital of Peru?', expected: Lima}\n"),
    ],
)
def test_a_file_of_questions_is_a_suite_scored_by_what_it_contains(folder, name, content) -> None:
    (folder / name).write_text(content)
    (task,) = policy(folder, "--tasks", name, "--json").document["policy"]["tasks"]
    assert task["file"] == str(folder / name)
    assert (task["name"], task["score"]) == ("asked", "contains")
    (folder / name).write_text(content.replace("expected", "answer"))
    done = policy(folder, "--tasks", name)
    assert done.code == 3
    assert "answer: there is no such key" in " ".join(done.stderr.split())


def test_null_and_no_file_leave_a_key_to_the_run(folder: Path) -> None:
    policy(folder, "--promote", "never", "--tasks", "suites.yaml")
    done = policy(folder, "--promote", "null", "--tasks", "--json")
    bounds = {"promote": None, "max_val_loss_increase": None, "reference": None}
    assert done.document["policy"] == bounds | {"tasks": []}
    assert len([x for x in history(folder / "registry", NAME) if x["action"] == "policy"]) == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--max-val-loss-increase", "much"), "expected a number, such as 0.02, or null"),
        (("--max-val-loss-increase", "-1"), "policy: max_val_loss_increase"),
        (("--tasks", "absent.yaml"), "absent.yaml"),
        (("--tasks", "empty.yaml"), "--tasks empty.yaml has no eval sets. Expected YAML with gate"),
    ],
)
def test_what_is_no_policy_is_refused(folder: Path, words: tuple[str, ...], told: str) -> None:
    (folder / "empty.yaml").write_text("gate: {}\n")
    done = policy(folder, *words)
    assert done.code == 2, done.stdout
    assert told in " ".join(done.stderr.split())
    assert not (folder / "registry" / NAME / "policy.json").exists()
