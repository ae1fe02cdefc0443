"""gate.general_data bounds forgetting; nothing overrides."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.sections import GateSection
from nested_core.errors import ConfigError, DatasetError
from nested_core.records.verdict import Verdict
from tests.builders.candidates import Candidate
from tests.builders.data_sets import write_lines
from tests.core.gate.pairs import codes
from tests.example import require_refused

GENERAL = [
    "The capital of France is Paris.",
    "Japan lies in Asia. People there pay with yen.",
    "In Brazil people speak Portuguese.",
]


@pytest.fixture
def general(tmp_path: Path) -> Path:
    """Text that the base knows well and the fine-tune has nothing to do with."""
    return write_lines(tmp_path / "general.jsonl", ({"text": text} for text in GENERAL))


def verdict_within(candidate: Candidate, path: Path, increase: float) -> Verdict:
    bounds = {"general_data": str(path), "max_general_loss_increase": increase}
    return candidate.bounded(**bounds).verdict()


def test_a_loss_on_general_text_that_rose_beyond_its_bound_is_forgetting(
    candidate: Candidate, general: Path
) -> None:
    verdict = verdict_within(candidate, general, 0.0)
    assert codes(verdict) == ["forgetting"]
    measured = verdict.general
    assert measured is not None
    before, after = measured.loss_before, measured.loss_after
    assert before is not None
    assert after is not None
    assert after > before > 0
    assert f"{before:.4g} -> {after:.4g}, " in verdict.reasons[0].message
    assert "gate.max_general_loss_increase is 0" in verdict.reasons[0].message
    assert measured.conclusion == "worse"
    assert measured.sha256 == sha256(general.read_bytes()).hexdigest()
    # Three examples have no interval: a rise by a tenth, or the margin, is what counts.
    assert after / before - 1 < 0.1
    few = verdict_within(candidate, general, 0.02)
    assert few.has_passed
    assert few.general is not None
    assert few.general.conclusion == "inconclusive"
    assert verdict.to_json()["thresholds"]["max_general_loss_increase"] == 0.0


@pytest.mark.slow("judges twice")
def test_general_data_that_cannot_be_read_is_an_error_and_no_verdict(candidate, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"gate.general_data: .*missing.jsonl is not a file"):
        verdict_within(candidate, tmp_path / "missing.jsonl", 0.1)
    broken = tmp_path / "broken.jsonl"
    for content, said in (
        ('{"text": "one"}\n{"text": \n', r"broken.jsonl holds no sound text(.|\n)*line 2"),
        ("", "holds no sound text"),
    ):
        broken.write_text(content)
        with pytest.raises(DatasetError, match=said):
            verdict_within(candidate, broken, 0.1)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"general_data": "a.jsonl"}, "general_data and max_general_loss_increase, or neither"),
        ({"max_general_loss_increase": 0.1}, "general_data and max_general_loss_increase"),
        ({"max_general_loss_increase": -1}, "max_general_loss_increase: Input should be greater"),
        ({"max_kl": -1.0}, "gate.max_kl: Input should be greater"),
        ({"check_fused": "maybe"}, "gate.check_fused: Input should be a valid boolean"),
        (False, "gate: true and false mean nothing here"),
        ("off", "gate: Input should be"),
        ([], "gate: expected keys with their values, not a list"),
        ({"skip": True}, "gate.skip: unknown key"),
    ],
)
def test_a_gate_section_that_does_not_agree_with_itself_is_refused(gate: Any, message: str) -> None:
    require_refused(message, gate=gate)


def test_a_full_fine_tune_has_nothing_to_fuse() -> None:
    settings: dict[str, Any] = {"fine_tune_type": "full", "gate": {"check_fused": True}}
    require_refused("a full fine-tune has no adapter to fuse", **settings)


def test_the_gate_has_bounds_and_no_switches_but_those_that_ask_for_more() -> None:
    assert set(GateSection.model_fields) == {
        *("max_val_loss_increase", "max_harmed_share", "samples", "min_relative_change"),
        *("max_skipped_share", "general_data", "max_general_loss_increase", "check_fused"),
        *("max_ancestor_loss_increase", "max_chosen_fall", "controls"),
        *("tasks", "allow_python_scorers", "noise", "held_out", "max_kl", "drift"),
    }
    assert [n for n, f in GateSection.model_fields.items() if f.annotation is bool] == [
        "check_fused",
        "drift",
        "allow_python_scorers",
    ]
    assert GateSection().check_fused is False


@pytest.mark.slow("judges a run of its own")
def test_a_rise_on_general_text_within_noise_is_no_forgetting(candidate, tmp_path) -> None:
    names = ("France", "Japan", "Brazil", "Peru", "Kenya", "Egypt", "Chile", "Spain")
    lines = [{"text": f"In {name} people trade with Italy, {i}."} for i, name in enumerate(names)]
    path = write_lines(tmp_path / "general.jsonl", lines)
    verdict = verdict_within(candidate, path, 0.0)
    found = verdict.general
    assert found is not None
    assert found.interval is not None
    assert found.interval[0] <= found.difference <= found.interval[1]  # type: ignore[operator]
    assert (codes(verdict) == ["forgetting"]) is (found.interval[0] > 0)
    assert found.conclusion == ("worse" if found.interval[0] > 0 else found.conclusion)
