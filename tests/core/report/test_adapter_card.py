"""What a model card claims of a champion, as far as its records prove it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nested_core.registry import promote, register
from nested_core.registry.gate_file import read_gate, require_verdict_manifest, write_gate
from nested_core.report.adapter_card import render_card
from tests.core.registry.conftest import write_run


@pytest.mark.parametrize(
    ("held_out", "is_listed"), [("auto", True), ("/home/ann/exam.jsonl", False)]
)
def test_a_loss_on_a_file_outside_of_the_data_is_no_number_of_the_data_set(
    tmp_path: Path, held_out: str, is_listed: bool
) -> None:
    run = write_run(tmp_path / "run", 1)
    gate = read_gate(run / "gate.json")
    gate["validation"] |= {"file": "test.jsonl" if is_listed else held_out, "examples": 9}
    write_gate(run, gate, require_verdict_manifest(run, gate))
    config = {"data": "org/chats", "gate": {"held_out": held_out}}
    version = register(run, tmp_path / "registry", "capitals", {"config": config})
    promote(tmp_path / "registry", "capitals", version, by="tester")
    card = render_card(tmp_path / "registry", "capitals")
    fields = yaml.safe_load(card.split("---\n", 2)[1])
    assert ("model-index" in fields) is is_listed
    assert "/home/ann" not in card
    assert "jsonl, 9 examples" in card
