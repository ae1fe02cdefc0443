"""Thousands of edits of the ledger: each is refused by audit and every writer, or does no harm."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nested_core.errors import DamagedError
from nested_core.registry import (
    history,
    list_versions,
    read_champion,
    read_champion_changes,
    rollback,
    verify,
)
from nested_core.registry.promotion_policy import promote_missed_versions
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.core.registry.ledger_edits import Edit, ledger_edits
from tests.core.registry.states import NAME, assert_settled
from tests.registry_care import audit, collect_garbage

pytestmark = pytest.mark.usefixtures("no_time_to_decide")
MEMORY = Path("/dev/shm")
EVERY, SAMPLE = pytest.param(1, marks=pytest.mark.reliability), 41


@pytest.fixture
def memory() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def registry(memory: Path) -> Path:
    """A history with each action in it."""
    registry = memory / "registry"
    versions = [register(write_run(memory / f"run-{n}", n), registry, NAME, {}) for n in range(4)]
    first, second, third, _ = versions
    for version in (first, second, third):
        promote(registry, NAME, version, by="ann")
    rollback(registry, NAME, by="bob")
    rollback(registry, NAME, to=first, by="bob")
    promote(registry, NAME, second, by="flow", expected_champion=first, automatic=True)
    promote(registry, NAME, first, by="ann")
    collect_garbage(registry, NAME, by="gc", keep=3)
    register(write_run(memory / "run-9", 9), registry, NAME, {})
    actions = {line["action"] for line in history(registry, NAME)}
    assert actions == {"promote", "rollback", "collected"}
    assert_settled(registry)
    return registry


def calls(registry: Path) -> dict[str, Callable[[], Any]]:
    """All that writes, or decides by the history."""
    version = list_versions(registry, NAME)[0]
    run = registry.parent / "run-1"
    return {
        "promote": lambda: promote(registry, NAME, version, by="eve"),
        "rollback": lambda: rollback(registry, NAME, by="eve"),
        "rollback --to": lambda: rollback(registry, NAME, to=version, by="eve"),
        "gc": lambda: collect_garbage(registry, NAME, by="eve", keep=0),
        "gc --dry-run": lambda: collect_garbage(registry, NAME, by="eve", keep=0, dry_run=True),
        "register": lambda: register(run, registry, NAME, {}),
        "reconcile": lambda: promote_missed_versions(registry, NAME),
        "changes": lambda: read_champion_changes(registry, NAME),
        "verify": lambda: verify(registry, NAME, version),
    }


def write(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".lock"}


def refusal(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except DamagedError as error:
        return str(error)
    return None


def assert_refused(registry: Path, edit: Edit) -> None:
    folder = registry / NAME
    before, champion = contents(folder), read_champion(registry, NAME)
    found = {finding.file.name for finding in audit(registry, NAME).findings}
    assert found & {"history.jsonl", "champion.json"}, edit.name
    for name, call in calls(registry).items():
        message = refusal(call)
        assert message is not None, f"{edit.name}: {name} went on"
        assert str(folder / "history.jsonl") in message or str(folder / "champion.json") in message
        assert "\n" not in message
    assert contents(folder) == before, edit.name
    assert read_champion(registry, NAME) == champion


def assert_mended(registry: Path, edit: Edit, sound: dict[str, bytes]) -> None:
    has_finding = not audit(registry, NAME).is_sound
    assert has_finding == (edit.outcome == "mended"), edit.name
    champion = read_champion(registry, NAME)
    assert champion is not None
    assert promote(registry, NAME, champion, by="eve").outcome == "already_champion"
    if edit.outcome != "same":
        assert contents(registry / NAME) == sound, edit.name
    assert_settled(registry)


@pytest.mark.claim(
    "A registry has one champion; an edit of its history is found, unless all is rewritten"
)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stride", [SAMPLE, EVERY])
def test_every_edit_of_the_ledger_is_refused_or_does_no_harm(registry, stride, capsys) -> None:
    folder = registry / NAME
    sound = contents(folder)
    edits = list(ledger_edits(sound["history.jsonl"], sound["champion.json"]))
    outcomes: Counter[str] = Counter()
    for edit in edits[::stride]:
        write(folder / "history.jsonl", edit.history)
        write(folder / "champion.json", edit.record)
        if contents(folder) == sound:
            continue  # an edit that changes nothing here
        if edit.outcome == "refused":
            assert_refused(registry, edit)
        else:
            assert_mended(registry, edit, sound)
        outcomes[edit.outcome] += 1
        for name, content in sound.items():
            write(folder / name, content)
    with capsys.disabled():
        print(f"\n{len(edits)} edits, tried {dict(outcomes)}")
    assert outcomes["refused"] > 900 // stride
