"""A model is asked a suite: choices by likelihood, prompts that fit, answers that are kept."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load

from nested_core.errors import ConfigError, DatasetError
from nested_core.gate.checks.tasks import score_answers
from nested_core.measure.answers.answer_cache import (
    AnsweringModelDigests,
    answer_cache,
    fetch_answers,
)
from nested_core.measure.answers.scorers import ScoringMethod
from nested_core.measure.answers.suite_answers import EncodedSuite, Suite
from nested_core.models.generation import Answer, Sampling
from nested_core.records.dataset import PromptFormat
from nested_core.training.loss import logit_budget
from tests.core.measure.answers.test_suites import write
from tests.example import MODEL

CHOICES = [" Suva", " Paris", " New Delhi", "."]
ASKED = {"messages": [{"role": "user", "content": "What is the capital of Fiji?"}]}


@cache
def example():
    return load(str(MODEL))[:2]


def encode(tmp_path: Path, score, *lines, sampling=None, context=64) -> EncodedSuite:
    path = write(tmp_path / "suite.jsonl", *lines)
    suite = Suite.read("capitals", ScoringMethod(path, score), sampling)
    raw = PromptFormat(is_chat=False)
    return EncodedSuite.encode(suite, example()[1], context, prompt_format=raw)


def reference(model, prompt: tuple[int, ...], choice: tuple[int, ...]) -> float:
    """The summed log-probability in float64 of one choice, from a pass of its own."""
    tokens = mx.array([[*prompt, *choice]])
    logits = np.array(model(tokens).astype(mx.float32), np.float64)[0]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    places = np.arange(len(prompt) - 1, len(prompt) + len(choice) - 1)
    return float(log_probabilities[places, np.array(choice)].sum())


def test_choices_are_weighed_by_the_log_probability_of_a_float64_reference(tmp_path) -> None:
    model, tokenizer = example()
    model.set_dtype(mx.float32)
    lines = [
        {"prompt": "The capital of Fiji is", "choices": CHOICES, "expected": " Suva"},
        ASKED | {"choices": ["Suva", "Paris"], "expected": "Suva"},
        {"prompt": "In", "choices": CHOICES[::-1], "expected": " Suva"},
    ]
    encoded = encode(tmp_path, "choice", *lines)
    found = encoded.log_likelihoods(model)
    for prompt, choices, sums in zip(encoded.prompts, encoded.choices, found, strict=True):
        expected = [reference(model, prompt, choice) for choice in choices]
        np.testing.assert_allclose(sums, expected, rtol=1e-4)
    result = encoded.score(encoded.answer(model, tokenizer))
    likeliest = [
        question.choices[int(np.argmax(sums))]
        for question, sums in zip(encoded.suite.questions, found, strict=True)
    ]
    assert [answer.text for answer in result.answers] == likeliest
    assert result.scores == tuple(float(text.strip() == "Suva") for text in likeliest)


@pytest.mark.slow("weighs many choices")
@pytest.mark.parametrize(("context", "widths"), [(None, {64, 128}), (100, {64, 100})])
def test_choices_are_weighed_in_few_widths_within_the_context(tmp_path, context, widths) -> None:
    """MLX on CUDA keeps a plan for each shape of attention, and ends in an error at 512."""
    model, _ = example()
    seen: list[tuple[int, ...]] = []

    class Noting:
        def __call__(self, inputs: mx.array) -> mx.array:
            seen.append(inputs.shape)
            logits: mx.array = model(inputs)
            return logits

    lines = [
        {"prompt": "Suva " * count, "choices": CHOICES, "expected": " Suva"}
        for count in range(1, 80, 2)
    ]
    encoded = encode(tmp_path, "choice", *lines, context=context)
    found = encoded.log_likelihoods(Noting())  # type: ignore[arg-type]
    del seen[0]  # asks for the shape of the logits, and is not computed
    assert {width for _, width in seen} == widths
    assert len(set(seen)) <= 2 * len(widths) + 2
    for row in (0, 20, 39):
        expected = [reference(model, encoded.prompts[row], c) for c in encoded.choices[row]]
        np.testing.assert_allclose(found[row], expected, rtol=1e-3)


def test_a_prompt_with_more_tokens_than_may_have_logits_is_read_in_pieces(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = example()
    lines = [
        {"prompt": "Suva " * count, "choices": [" Paris is far", "."], "expected": "."}
        for count in (3, 40)
    ]
    encoded = encode(tmp_path, "choice", *lines, context=None)
    whole = encoded.log_likelihoods(model)
    for positions in (16, 32):  # a choice begins in the last piece, or ends in the next one
        monkeypatch.setattr(logit_budget, "LOGIT_BYTES", 4 * positions * model.args.vocab_size)
        np.testing.assert_allclose(encoded.log_likelihoods(model), whole, rtol=1e-4)


def test_a_tie_between_choices_is_a_wrong_answer(tmp_path) -> None:
    model, tokenizer = load(str(MODEL))[:2]
    embedding = model.model.embed_tokens
    embedding.weight = mx.zeros_like(embedding.weight)
    line = {"prompt": "In", "choices": [".", "?"], "expected": [".", "?"]}
    encoded = encode(tmp_path, "choice", line)
    assert encoded.score(encoded.answer(model, tokenizer)).scores == (0.0,)


def test_generated_answers_are_scored_and_endless_ones_marked(tmp_path) -> None:
    model, tokenizer = example()
    lines = [ASKED | {"expected": "Suva"}, {"prompt": "The capital of", "expected": "Suva"}]
    encoded = encode(tmp_path, "contains", *lines, sampling=Sampling(max_tokens=8))
    result = encoded.score(encoded.answer(model, tokenizer))
    assert result.mean == sum("Suva" in answer.text for answer in result.answers) / 2
    assert [answer.is_endless for answer in result.answers] == [
        answer.tokens == 8 for answer in result.answers
    ]


def test_a_prompt_longer_than_the_context_is_an_error_that_names_the_line(tmp_path) -> None:
    lines = [{"prompt": "short", "expected": "a"}, {"prompt": "word " * 200, "expected": "a"}]
    with pytest.raises(DatasetError) as error:
        encode(tmp_path, "exact", *lines)
    assert "suite.jsonl:2: with its answer it has" in str(error.value)
    assert "and the model sees 64" in str(error.value)
    assert "suite.jsonl:1" not in str(error.value)
    encode(tmp_path, "exact", *lines, context=None)


def test_a_chat_is_encoded_as_the_template_does_and_a_long_one_without_a_warning(
    tmp_path, capfd
) -> None:
    turns = [{"role": "user", "content": "word " * 200}]
    encoded = encode(tmp_path, "exact", {"messages": turns, "expected": "a"}, context=None)
    tokenizer = example()[1]
    assert "sequence length" not in capfd.readouterr().err
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    assert encoded.prompts == (tuple(expected),)


def test_turns_that_the_template_does_not_take_are_an_error(tmp_path, monkeypatch) -> None:
    tokenizer = load(str(MODEL))[1]
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    path = write(tmp_path / "suite.jsonl", ASKED | {"expected": "a"})
    suite = Suite.read("capitals", ScoringMethod(path, "exact"))
    with pytest.raises(DatasetError, match=r"suite.jsonl:1: the chat template .*no users here"):
        EncodedSuite.encode(suite, tokenizer, 64)


def test_a_question_with_a_token_beyond_the_embedding_is_an_error_with_its_line(tmp_path) -> None:
    path = write(tmp_path / "suite.jsonl", ASKED | {"expected": "a"})
    suite = Suite.read("capitals", ScoringMethod(path, "exact"))
    with pytest.raises(DatasetError, match=r"suite.jsonl:1: .* has id \d+, the model has 5 rows"):
        EncodedSuite.encode(suite, example()[1], None, 5)


@pytest.fixture
def asked(tmp_path):
    """A cache, the models that were asked, and a way to ask through the cache."""
    cached = answer_cache(tmp_path / "answers")
    asked: list[str | None] = []

    def ask(encoded: EncodedSuite, adapter: str | None = None, **changes: str):
        def answer():
            asked.append(adapter)
            return encoded.answer(*example())

        model = AnsweringModelDigests("base", "tokenizer", adapter, "cpu float32")
        return fetch_answers(cached, replace(model, **changes), encoded, answer)

    return cached, asked, ask


def test_a_model_is_asked_the_same_questions_once(tmp_path, asked) -> None:
    _, models, ask = asked
    line = ASKED | {"expected": "Suva"}
    first = encode(tmp_path, "exact", line)
    answers = ask(first)
    rescored = encode(tmp_path, "contains", line)  # another scorer of the same prompts
    assert ask(rescored) == answers
    assert models == [None]
    ask(first, "adapter")
    ask(first, "adapter", computation="gpu bfloat16")
    ask(first, "adapter", tokenizer="with another end of an answer")
    ask(encode(tmp_path, "exact", line, sampling=Sampling(max_tokens=3)))
    ask(encode(tmp_path, "exact", line, ASKED | {"expected": "a"}))
    assert models == [None, "adapter", "adapter", "adapter", None, None]


@pytest.mark.parametrize("damage", ["flip", "truncate", "other", "empty"])
def test_damaged_answers_are_made_again(tmp_path, asked, caplog, damage) -> None:
    cached, models, ask = asked
    encoded = encode(tmp_path, "exact", ASKED | {"expected": "Suva"})
    answers = ask(encoded)
    (path,) = cached.folder.iterdir()
    content = path.read_bytes()
    damaged = {
        "flip": content.replace(b'"tokens":', b'"tokems":'),
        "truncate": content[:-20],
        "other": content.replace(answers[0].text.encode()[:3], b"Suv"),
        "empty": b"{}",
    }
    path.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        assert ask(encoded) == answers
    assert "The cached answers are damaged" in caplog.text
    assert path.read_bytes() == content
    assert models == [None, None]


def test_a_folder_that_others_may_write_to_is_refused(tmp_path, asked) -> None:
    cached, _, ask = asked
    cached.folder.mkdir()
    cached.folder.chmod(0o777)
    with pytest.raises(ConfigError, match="could have any adapter look better than another"):
        ask(encode(tmp_path, "exact", ASKED | {"expected": "Suva"}))


def test_folders_among_the_kept_answers_end_no_judging(tmp_path, asked, caplog) -> None:
    cached, _, ask = asked
    encoded = encode(tmp_path, "exact", ASKED | {"expected": "Suva"})
    answers = ask(encoded)
    (path,) = cached.folder.iterdir()
    path.unlink()
    path.mkdir()
    old = cached.folder / "old"
    old.mkdir()
    os.utime(old, (0, 0))
    with caplog.at_level(logging.WARNING):
        assert ask(encoded) == answers
    assert "Answers could not be cached for later runs" in caplog.text
    assert not old.exists()


@pytest.mark.parametrize(
    ("score", "expected", "best"),
    [
        ("exact", ["spam", "spam", "ham", "eggs"], ("spam", 0.5)),
        ("contains", [["Oslo", "Bergen"], "Oslo", "Oslo fjord", "Riga"], ("Oslo fjord", 0.75)),
        ("number", [4, 4, 5, 6], ("4", 0.5)),
    ],
)
def test_the_best_constant_answer_is_scored_as_the_suite_scores(
    tmp_path: Path, score, expected, best
) -> None:
    lines = [{"prompt": f"{i}?", "expected": each} for i, each in enumerate(expected)]
    path = write(tmp_path / "suite.jsonl", *lines)
    suite = Suite.read("each", ScoringMethod(path, score))
    assert suite.find_best_constant(range(1, 5)) == best


def test_a_choice_has_a_best_constant_answer(tmp_path: Path) -> None:
    choices: dict[str, Any] = {"choices": ["yes", "no"]}
    lines = [{"prompt": f"{i}?", "expected": "yes" if i else "no"} | choices for i in range(4)]
    suite = Suite.read("each", ScoringMethod(write(tmp_path / "a.jsonl", *lines), "choice"))
    assert suite.find_best_constant(range(1, 5)) == ("yes", 0.75)


def test_a_prompt_is_the_chat_as_which_it_is_asked(tmp_path: Path) -> None:
    turns = [("system", " be BRIEF."), ("system", "Be long."), ("user", "fiji?")]
    brief, long, user = [{"role": role, "content": content} for role, content in turns]
    chats = [{"messages": [first, user]} for first in (brief, long)]
    asked: list[dict[str, Any]] = [chats[0], {"prompt": "Fiji?"}, chats[1], {"messages": [user]}]
    path = write(tmp_path / "s.jsonl", *(line | {"expected": "Suva"} for line in asked))
    suite = Suite.read("capitals", ScoringMethod(path, "exact"))

    def first_lines(prompt_format: PromptFormat) -> list[int]:
        encoded = EncodedSuite.encode(suite, example()[1], None, prompt_format=prompt_format)
        answers = [Answer("Suva", 1, is_endless=False, is_repeated=False)] * 4
        records = score_answers(encoded, "base", answers, 0.1)
        assert encoded.select([3, 1]).prompts == (encoded.prompts[2], encoded.prompts[0])
        return [record.same_prompt_as or record.line for record in records]

    assert first_lines(PromptFormat(system="Be brief.")) == [1, 1, 3, 4]
    assert first_lines(PromptFormat()) == [1, 2, 3, 2]


def test_a_prompt_is_asked_as_the_rows_were(tmp_path: Path) -> None:
    suite = Suite.read(
        "each",
        ScoringMethod(write(tmp_path / "a.jsonl", {"prompt": "Fiji?", "expected": "a"}), "exact"),
    )
    tokenizer = example()[1]

    def asked(prompt_format: PromptFormat | None) -> str:
        (tokens,) = EncodedSuite.encode(suite, tokenizer, None, prompt_format=prompt_format).prompts
        text: str = tokenizer.decode(list(tokens))
        return text

    def chat(*turns: tuple[str, str]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text

    assert asked(PromptFormat(is_chat=False)) == "Fiji?"
    assert asked(PromptFormat()) == asked(None) == chat(("user", "Fiji?"))
    briefly = PromptFormat(system="Be brief.")
    assert asked(briefly) == chat(("system", "Be brief."), ("user", "Fiji?"))
