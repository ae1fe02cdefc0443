"""`samples`: the answers at each evaluation, in metrics.jsonl, which change nothing in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import TrainingStopped
from nested_core.gate.checks.judged import RunToJudge
from nested_core.gate.checks.samples import SAMPLES
from nested_core.models.base_model import load_base_model
from nested_core.models.generation import Sampling, answer_prompts, encode_messages, encode_prompt
from nested_core.models.lora_attachment import attach_adapter, load_adapter_tensors
from nested_core.report.run_report import tabulate_samples
from nested_core.training.reports.sample_prompts import SamplePrompts, samples_by_step
from tests.builders.data_sets import chat, write_lines
from tests.example import (
    ANSWERS,
    SPEEDS,
    Finished,
    example_config,
    prepare,
    stop_after,
    train,
    train_example,
)

PROMPTS = ("I want to see Italy. Where to?", "The capital of Peru is Lima.")
SETTINGS = {"samples": PROMPTS, "steps_per_eval": 4, "training": ANSWERS}
NOT_COMPARED = (*SPEEDS, "sample_seconds")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train_example(tmp_path_factory.mktemp("samples") / "run", **SETTINGS)


@pytest.mark.slow("trains a run of its own")
def test_the_answers_of_each_evaluation_are_those_of_its_adapter_loaded_anew(sampled) -> None:
    """At the precision of training, which on a CPU is not the one that mlx_lm loads."""
    answers = samples_by_step(sampled.metrics())
    assert list(answers) == [0, 4, 8]
    model, tokenizer = load_base_model(sampled.config)
    attach_adapter(model, sampled.config)
    model.eval()
    encoded = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    for step in (0, 4, 8):
        tensors = sampled.at(step).tensors
        load_adapter_tensors(model, {name: tensor.to_mlx() for name, tensor in tensors.items()})
        expected = answer_prompts(model, tokenizer, encoded, Sampling(max_tokens=12))
        assert [sample["answer"] for sample in answers[step]] == [e.text for e in expected]
        assert [sample["prompt"] for sample in answers[step]] == list(PROMPTS)
    assert answers[0] != answers[8]
    assert all(sample["tokens"] <= 12 for sample in answers[8])


@pytest.mark.parametrize("system", [(), ("Be brief.",)], ids=["no system text", "one of all rows"])
def test_a_sample_is_asked_as_the_rows_in_training_and_by_the_gate(tmp_path: Path, system) -> None:
    begin = [{"role": "system", "content": text} for text in system]
    rows = [begin + chat(f"Where is {n}?", f"In {n}.")["messages"] for n in range(9)]
    write_lines(tmp_path / "train.jsonl", ({"messages": row} for row in rows))
    config = example_config(data=str(tmp_path), samples=PROMPTS[:1], gate={"tasks": []})
    run = prepare(config, tmp_path / "run")
    tokenizer = TokenizerSource.from_config(config).load()
    turns = [*begin, {"role": "user", "content": PROMPTS[0]}]
    expected = encode_messages(tokenizer, turns)
    assert SamplePrompts.from_config(config, run, tokenizer).encoded == (expected,)
    assert SAMPLES.plan_work is not None
    work = SAMPLES.plan_work(RunToJudge(config, run, tokenizer))
    assert work.prompt_tokens == 2 * len(expected)  # of base and adapter


@pytest.mark.slow("trains two runs")
def test_answering_changes_nothing_that_is_trained(sampled: Finished, tmp_path: Path) -> None:
    plain = train_example(tmp_path / "run", steps_per_eval=4)
    assert plain.at(8).digest() == sampled.at(8).digest()
    keys = (*SPEEDS, "samples", "sample_seconds")
    assert sampled.metrics(without=keys) == plain.metrics(without=keys)


@pytest.mark.slow("trains two runs of its own")
def test_a_resumed_run_has_each_answer_once(sampled: Finished, tmp_path: Path) -> None:
    config = example_config(**SETTINGS)
    run = prepare(config, tmp_path / "run")
    with pytest.raises(TrainingStopped):
        train(config, run, on_start=stop_after(5))
    resumed = train(config, run)
    assert resumed.metrics(without=NOT_COMPARED) == sampled.metrics(without=NOT_COMPARED)


@pytest.mark.slow("trains a run of its own")
def test_prompts_are_answered_without_a_validation_set_too(tmp_path: Path) -> None:
    done = train_example(tmp_path / "run", **SETTINGS | {"val_batches": 0, "iters": 4})
    assert list(samples_by_step(done.metrics())) == [0, 4]
    assert not any("val_loss" in record for record in done.metrics())


def test_an_answer_stands_under_its_own_prompt_where_a_resumed_run_asks_others() -> None:
    def record(step: int, *prompts: str) -> dict[str, Any]:
        samples = [{"prompt": each, "answer": f"{each} at {step}"} for each in prompts]
        return {"step": step, "samples": samples}

    records = [{"samples": record(0, "a")["samples"]}, record(5, "a", "b"), record(9, "c", "b")]
    samples = tabulate_samples(records, judged_step=5)
    assert samples is not None
    assert samples.columns == ("step", "c", "b", "a")
    assert samples.rows == [
        ("0", None, None, "a at 0"),
        ("5 (selected)", None, "b at 5", "a at 5"),
        ("9", "c at 9", "b at 9", None),
    ]
    assert samples.caption.startswith("Greedy answers at 3 of 3 evaluations to 3 of 3 prompts;")
