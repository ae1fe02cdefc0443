"""Runs beside each other: what differs, and on which examples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nested_core.errors import ConfigError
from nested_core.records.losses import ExampleLosses
from nested_core.records.paired_difference import PairedDifference, compare_pairs
from nested_core.records.verdict import Reason
from nested_core.rooms.compare.comparison import _describe_difference, compare_runs
from tests.runs import HOSTILE_ROW, add_metrics, begin_run, finished_run, judge, make_verdict


def test_only_the_settings_that_differ_are_compared(tmp_path: Path) -> None:
    one = finished_run(tmp_path / "one", learning_rate=1e-3)
    two = finished_run(tmp_path / "two", learning_rate=2e-3, nested={"frequencies": [1]})
    document = compare_runs([one.path, two.path]).to_json()
    assert [run["gate_loss"] for run in document["runs"]] == [pytest.approx(2.675)] * 2
    settings = document["config"]
    assert settings.pop("data") != []
    assert settings == {"learning_rate": [1e-3, 2e-3], "nested.frequencies": [[1, 2, 4], [1]]}
    assert document["difference_to_first"][1]["difference"] == 0
    assert document["tasks"] == {"capitals": [2 / 3, 2 / 3]}
    assert document["speed"]["tokens_per_second"][0] > 0


def test_losses_of_a_file_outside_of_the_data_are_not_compared(tmp_path: Path) -> None:
    """Its digest is not recorded: two files of one length may hold different examples."""
    gate = {"held_out": str(tmp_path / "kept.jsonl")}
    runs = [finished_run(tmp_path / name, gate=gate) for name in ("one", "two")]
    comparison = compare_runs([run.path for run in runs])
    assert comparison.paired_with_first() == [None, None]
    assert "may have been measured on different" in comparison.to_html()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"training": {"loss": "simpo", "loss_config": {"gamma": 0.0}}}, "training.loss_config"),
        ({"training": {"loss": "dpo"}}, "training.loss, training.loss_config"),
        ({"max_seq_length": 512}, "max_seq_length"),
        ({"prompt_feature": "question"}, "prompt_feature"),
    ],
)
def test_losses_that_are_made_otherwise_are_not_compared(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    training = {"loss": "simpo", "loss_config": {"gamma": 1.0}} if "training" in changes else {}
    one = finished_run(tmp_path / "one", training=training)
    runs = [
        one,
        finished_run(tmp_path / "two", **changes),
        finished_run(tmp_path / "three", training=training),
    ]
    comparison = compare_runs([run.path for run in runs])
    _, other, same = comparison.paired_with_first()
    assert other is None
    assert same is not None
    document = comparison.to_json()
    assert document["no_difference_because"] == [None, f"it has another {reason}", None]
    said = f"The loss of two is no comparison with that of one: it has another {reason}."
    assert said in comparison.to_html()


def test_losses_with_another_tokenizer_or_base_model_are_not_compared(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / name) for name in ("one", "tokenizer", "base", "unknown")]
    _, tokenizer, base, unknown = runs
    written = tokenizer.dataset.read_text().replace("70" * 32, "71" * 32)
    tokenizer.dataset.write_text(written)
    config = base.initial / "adapter_config.json"
    config.write_text(json.dumps({"base_fingerprint": "e" * 64}))
    (unknown.initial / "adapter_config.json").unlink()
    assert compare_runs([run.path for run in runs]).reasons_not_paired() == [
        None,
        "it has another tokenizer",
        "it has another base model",
        "what it is made of is not known",
    ]


def test_rows_of_a_prompt_are_drawn_together_and_rows_that_were_trained_on_are_left_out(
    tmp_path: Path,
) -> None:
    generator = np.random.default_rng(0)
    prompts = np.repeat(np.arange(8), 6)
    before = np.full(48, 3.0)
    losses = []
    for left_out in (3, 40):
        after = before + generator.normal(-0.1, 0.1, 8)[prompts] + generator.normal(0, 0.01, 48)
        columns = ExampleLosses("valid.jsonl", np.arange(1, 49), np.ones(48), before, after)
        is_left_out = np.arange(48) == left_out
        losses.append(replace(columns, clusters=prompts, left_out=is_left_out))
    runs = [finished_run(tmp_path / name) for name in ("one", "two")]
    for run, own in zip(runs, losses, strict=True):
        judge(run, make_verdict(own, step=8), own, "How much?")
    (_, found) = compare_runs([run.path for run in runs]).paired_with_first()
    is_counted = ~np.isin(np.arange(48), (3, 40))
    one, two = (own.after[is_counted] for own in losses)
    expected = compare_pairs(one, two, None, prompts[is_counted])
    assert found is not None
    assert found.examples == 8
    figures = [(each.mean, each.low, each.high) for each in (found, expected)]
    assert figures[0] == pytest.approx(figures[1])


def test_a_rejected_and_a_going_run_are_compared_too(tmp_path: Path) -> None:
    rejected = finished_run(tmp_path / "one", reasons=[Reason("unchanged", "nothing moved")])
    going = begin_run(tmp_path / "two")
    add_metrics(going, 4)
    comparison = compare_runs([rejected.path, going.path])
    rows = {str(name): cells for name, *cells in comparison.rows()}
    assert rows["outcome"] == ["Rejected: unchanged", "Resumable"]
    assert rows["trained"] == ["8 of 8 steps", "4 of 8 steps"]
    assert comparison.names == ["one", "two"]


def test_the_page_overlays_the_curves_and_escapes(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / name / "run", text=HOSTILE_ROW) for name in ("a", "b")]
    comparison = compare_runs([run.path for run in runs])
    assert comparison.names == ["a/run", "b/run"]
    page = comparison.to_html()
    assert page.count("<svg") == 4
    assert page.count("<path") == 8
    assert "<script" not in page
    assert comparison._repr_html_().startswith("<div")


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ConfigError, match="no run to compare"):
        compare_runs([])


def test_a_difference_has_its_interval_where_there_are_examples_enough() -> None:
    few, many = (PairedDifference(n, -0.25, 0.1, -0.45, -0.05) for n in (2, 40))
    assert _describe_difference(None) is None
    assert _describe_difference(few) == "-0.25"
    assert _describe_difference(many) == "-0.25 (-0.45 to -0.05)"


def test_what_differs_of_a_suite_is_a_key_by_its_name(tmp_path: Path) -> None:
    file = str(tmp_path / "q.jsonl")
    suite = {"name": "facts", "file": file, "score": "contains"}
    gates: list[dict[str, Any]] = [{"tasks": [suite | {"min": least}]} for least in (0.5, 0.9)]
    runs = [finished_run(tmp_path / str(n), gate=gate) for n, gate in enumerate([*gates, {}])]
    one_suite = compare_runs([run.path for run in runs[:2]]).differing_settings()
    del one_suite["data"]
    assert one_suite == {"gate.tasks.facts.min": [0.5, 0.9]}
    settings = compare_runs([run.path for run in runs]).differing_settings()
    del settings["data"]
    assert settings == {
        "gate.tasks.facts.file": [file, file, None],
        "gate.tasks.facts.score": ["contains", "contains", None],
        "gate.tasks.facts.min": [0.5, 0.9, None],
    }


def test_each_row_says_what_its_figure_is_of(tmp_path: Path) -> None:
    names = [row[0] for row in compare_runs([finished_run(tmp_path / "run").path]).rows()]
    assert len(set(names)) == len(names)
    assert {"validation loss, valid.jsonl, 12 examples", "answers, capitals"} <= {*names}
    assert {"training loss, last report", "validation loss, last report"} <= {*names}
