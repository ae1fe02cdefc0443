"""`verify`: the gate on any two adapters, its document, and adapters that cannot be read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.builders.file_damage import halve
from tests.flows.conftest import CommandRun, Ended, called

Run = Callable[..., Ended]


def test_an_adapter_against_itself_is_unchanged_and_exit_4(command_run, nested_tune) -> None:
    adapter = command_run.run_dir / "adapter"
    done = nested_tune("verify", adapter, adapter, "--json")
    assert done.code == 4
    assert done.document["verdict"] == "failed"
    (reason,) = done.document["reasons"]
    assert reason["code"] == "unchanged"
    assert len(reason["tensors"]) == 84
    assert not any(tensor["changed"] for tensor in done.document["tensors"])


def test_the_document_has_the_keys_of_design_and_nothing_else_is_printed(
    command_run: CommandRun, nested_tune: Run
) -> None:
    done = nested_tune(
        "verify", command_run.run_dir / "initial", command_run.run_dir / "adapter", "--json"
    )
    assert done.code == 0
    document = done.document
    assert document["verdict"] == "passed"
    assert (document["reasons"], document["tiers"], document["validation"]) == ([], [], None)
    assert document["adapter_step"] is None
    for side, folder in (("initial", "initial"), ("trained", "adapter")):
        assert set(document[side]) == {"path", "digest"}
        assert document[side]["path"] == str(command_run.run_dir / folder)
        assert len(document[side]["digest"]) == 64
    keys = {"name", "tier", "changed", "max_abs_delta", "relative_delta", "finite"}
    assert len(document["tensors"]) == 84
    for tensor in document["tensors"]:
        assert set(tensor) == keys
        assert (tensor["changed"], tensor["finite"]) == (True, True)
        assert tensor["max_abs_delta"] > 0
    assert done.stderr == ""


def test_a_person_reads_the_verdict_first_and_then_a_row_a_module(command_run) -> None:
    adapters = [command_run.run_dir / "initial", command_run.run_dir / "adapter"]
    done = called("verify", *adapters, cwd=command_run.folder)
    assert done.code == 0
    verdict, *table, hint = done.stdout.splitlines()
    assert verdict == "passed: 84 of 84 tensors changed"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table if "│" in line]
    assert len(rows) == 14  # 7 modules, 2 tensors in each of 6 layers
    assert [rows[0][i] for i in (0, 1, 4)] == ["mlp.down_proj.lora_a", "6 of 6", "yes"]
    assert hint == "--all shows the 84 tensors, --json everything."
    with_all = called("verify", *adapters, "--all", cwd=command_run.folder).stdout
    assert with_all.count("model.layers.") == 84
    rejected = called("verify", adapters[1], adapters[1], cwd=command_run.folder)
    assert rejected.code == 4
    assert rejected.stdout.splitlines()[0].startswith("Rejected: unchanged (all 84")


def replaced_by_a_pickle(path: Path) -> None:
    path.write_bytes(b"\x80\x04N.")


@pytest.mark.parametrize("damage", [halve, replaced_by_a_pickle])
def test_a_damaged_adapter_is_named_and_exit_6(command_run, nested_tune, tmp_path, damage) -> None:
    copy = shutil.copytree(command_run.run_dir / "adapter", tmp_path / "copy")
    damage(copy / "adapters.safetensors")
    done = nested_tune("verify", command_run.run_dir / "initial", copy, "--json")
    assert done.code == 6
    assert "copy/adapters.safetensors is not a sound safetensors file" in done.message()
