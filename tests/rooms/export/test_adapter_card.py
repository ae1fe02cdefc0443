"""What the model card of a version claims, as far as its records prove it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import main
from nested_core.errors import DamagedError
from nested_core.records.verdict import JudgedAdapter, TaskResult, Verdict
from nested_core.rooms.export.adapter_card import read_champion_card, render_card
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.gate_files import judged_files, read_gate, write_gate

JUDGED = JudgedAdapter("adapter", "ab" * 32)
VERDICT = Verdict((), 100, JUDGED, JUDGED, ())


def front_matter(card: str) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load(card.split("---\n", 2)[1])
    return fields


def test_a_loss_on_a_file_outside_of_the_data_names_no_place(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1)
    gate = read_gate(run / "gate.json")
    gate["validation"] |= {"file": "/home/ann/exam.jsonl", "examples": 9}
    write_gate(run, gate, judged_files(run))
    config = {"data": "org/chats", "gate": {"held_out": "/home/ann/exam.jsonl"}}
    version = register(run, tmp_path / "registry", "capitals", {"config": config})
    promote(tmp_path / "registry", "capitals", version, by="tester")
    card = read_champion_card(tmp_path / "registry", "capitals")
    assert "/home/ann" not in card
    assert "jsonl, 9 examples" in card


def test_the_card_is_a_file_of_the_version_that_its_manifest_holds(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    version = register(write_run(tmp_path / "run", 1), registry, "capitals", {})
    promote(registry, "capitals", version, by="tester")
    path = registry / "capitals" / "versions" / version / "README.md"
    listed = json.loads((path.parent / "MANIFEST.json").read_text())["files"]
    assert "README.md" in listed
    assert path.read_text() == read_champion_card(registry, "capitals")
    path.chmod(0o644)
    path.write_text(path.read_text().replace("30", "31"))
    with pytest.raises(DamagedError, match=r"README\.md: has changed since it was written"):
        read_champion_card(registry, "capitals")


def test_the_card_tells_what_was_trained_and_no_default_that_did_not_count() -> None:
    trained = {"steps": 200, "planned_steps": 400, "epochs": 10.0, "file": "train.jsonl"}
    config = {"iters": 1000, "training": {"epochs": 20}, "mask_prompt": True, "model": "/m/base"}
    card = render_card("capitals", "ab" * 32, {"config": config, "trained": trained}, VERDICT)
    assert "| steps | 200 of 400 |" in card
    assert "| passes over train.jsonl | 10 |" in card
    assert "| step of this adapter | 100 |" in card
    assert "prompt | yes |" in card
    assert "1000" not in card
    assert "/m/" not in card


def test_right_answers_are_counts() -> None:
    task = TaskResult("capitals", 15, 0.0, None, None, 1.0, 1.0, None, 0.2, "passed", {}, {})
    card = render_card("capitals", "ab" * 32, {}, replace(VERDICT, tasks=(task,)))
    assert "| answers, capitals | 0 of 15 | 15 of 15 |" in card


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("mlx-community/Qwen3-0.6B-4bit", "mlx-community/Qwen3-0.6B-4bit"),
        ("/home/ann/hub/models--Qwen--Qwen3-0.6B/snapshots/0a1b2c", "Qwen/Qwen3-0.6B"),
        ("/home/ann/models/mine", None),
    ],
)
def test_the_base_is_named_where_it_is_the_hubs(model: str, base: str | None) -> None:
    card = render_card("capitals", "ab" * 32, {"config": {"model": model}}, VERDICT)
    assert front_matter(card).get("base_model") == base
    assert "/home/ann" not in card


def test_a_card_has_the_hubs_front_matter_and_no_field_that_nobody_gave(tmp_path, capsys) -> None:
    registry, target = tmp_path / "registry", tmp_path / "README.md"
    hub = {"model": "org/base-1B", "data": "org/chats", "fine_tune_type": "lora", "seed": 30}
    local = {"model": "/models/base", "data": "./data"}
    fields, bodies = {}, {}
    for name, config in (("capitals", hub), ("rivers", local)):
        run = write_run(tmp_path / name, 1)
        version = register(run, registry, name, {"config": config, "packages": {"mlx": "0.1"}})
        promote(registry, name, version, by="tester")
        assert main(["card", str(registry / name), "-o", str(target)]) == 0
        assert capsys.readouterr().out == f"card: {target}\n"
        _, front, bodies[name] = target.read_text().split("---\n", 2)
        fields[name] = yaml.safe_load(front)
    assert fields["capitals"] == {
        "base_model": "org/base-1B",
        "base_model_relation": "adapter",
        "library_name": "mlx",
        "tags": ["mlx", "nested-tune", "lora"],
        "datasets": ["org/chats"],
    } | {key: fields["capitals"][key] for key in ("pipeline_tag",) if key in fields["capitals"]}
    assert version in bodies["capitals"]
    assert "| seed | 30 |" in bodies["capitals"]
    assert {"base_model", "datasets"}.isdisjoint(fields["rivers"])


def test_a_name_without_a_champion_or_with_a_changed_file_has_no_card(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    version = register(write_run(tmp_path / "run", 1), registry, "capitals", {})
    assert main(["card", str(registry / "capitals")]) == 2
    promote(registry, "capitals", version, by="tester")
    gate = registry / "capitals" / "versions" / version / "gate.json"
    gate.chmod(0o600)
    gate.write_text(json.dumps(json.loads(gate.read_text()) | {"adapter_step": 31}))
    assert main(["card", str(registry / "capitals")]) == 6
    assert main(["card", str(registry / "nobody")]) == 2
