"""`registry`: every name, with its champion and its last change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nested_core.records.verdict_file import read_verdict
from nested_core.registry import read_champion
from nested_core.text.loss_format import format_loss
from tests.flows.conftest import CommandRun, called

NAME = "capitals"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, command_run: CommandRun) -> Path:
    """A run, and a registry of which its adapter is a champion."""
    folder = tmp_path_factory.mktemp("registry")
    shutil.copytree(command_run.run_dir, folder / "first")
    promote = ("promote", "first", "--registry", "registry", "--name", NAME)
    assert called(*promote, cwd=folder).code == 0
    return folder


def test_registry_lists_every_name_with_champion_loss_and_last_change(folder: Path) -> None:
    (row,) = called("registry", "--json", cwd=folder).document["names"]
    verdict = read_verdict(folder / "first" / "gate.json")
    validation = verdict.validation
    assert validation is not None
    history = called("history", NAME, "--registry", "registry", "--json", cwd=folder)
    last = history.document["history"][-1]
    champion = read_champion(folder / "registry", NAME)
    assert row["name"] == NAME
    assert row["champion"] == champion
    assert (row["loss"], row["file"]) == (validation.loss_after, validation.file)
    assert (row["last_action"], row["last_time"], row["since"]) == (
        last["action"],
        *[last["time"]] * 2,
    )
    assert row["problem"] is None
    assert row["verdict"] == verdict.describe() == "passed, better loss; no questions asked"
    table = called("registry", cwd=folder).stdout
    assert str(champion)[:12] in table
    assert format_loss(validation.loss_after) in table
    assert all(word in table for word in ("verdict", *verdict.describe().split()))


def test_registry_names_a_damaged_name_beside_the_others_and_exits_6(folder, tmp_path) -> None:
    for name in ("sound", "torn"):
        shutil.copytree(folder / "registry" / NAME, tmp_path / "registry" / name, symlinks=True)
    history = tmp_path / "registry" / "torn" / "history.jsonl"
    history.write_bytes(history.read_bytes().replace(b'"promote"', b'"pr0mote"', 1))
    listed = called("registry", "--json", cwd=tmp_path)
    assert listed.code == 6
    sound, torn = listed.document["names"]
    assert sound["problem"] is None
    assert sound["champion"] is not None
    assert torn["champion"] is None
    assert "history.jsonl" in torn["problem"]
    assert called("registry", tmp_path / "none", cwd=tmp_path).code == 2
