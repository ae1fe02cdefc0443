"""Batched answers are those that mlx_lm gives to one prompt at a time."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from mlx_lm.generate import generate, generate_step
from mlx_lm.utils import load_tokenizer

from nested_core.errors import ConfigError
from nested_core.models import generation
from nested_core.models.generation import Answer, Sampling, answer_prompts, encode_messages
from tests.architectures import ARCHITECTURES, HYBRIDS, VOCABULARY, build
from tests.example import MODEL
from tests.left_out import slow_except

LENGTHS = (1, 9, 3, 17, 4, 30, 2)


class NumberTokenizer:
    """A tokenizer whose text is the token ids, for models without one; nothing ends an answer."""

    eos_token_ids: tuple[int, ...] = ()
    text = ""

    @property
    def detokenizer(self) -> NumberTokenizer:
        return NumberTokenizer()

    def add_token(self, token: int) -> None:
        self.text += f" {token}"

    def finalize(self) -> None:
        pass


NUMBERS: Any = NumberTokenizer()


@cache
def example():
    """The example's base model and its tokenizer."""
    return load(str(MODEL))[:2]


def encode(*texts: str) -> list[list[int]]:
    tokenizer = example()[1]
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=True)
        for text in texts
    ]


@pytest.mark.slow("answers one by one and in batches")
@pytest.mark.parametrize(
    "name",
    slow_except(
        sorted(ARCHITECTURES | HYBRIDS), "llama", "gemma3_text", reason="compiles another model"
    ),
)
def test_batches_of_unequal_prompts_answer_as_one_prompt_does(name) -> None:
    model = build(name)
    model.eval()
    random = np.random.default_rng(0)
    prompts = [random.integers(0, VOCABULARY, length).tolist() for length in LENGTHS]
    answers = answer_prompts(model, NUMBERS, prompts, Sampling(max_tokens=12))
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=12)]
        assert answer.text == "".join(f" {token}" for token in tokens)
        assert answer.is_endless
        assert answer.tokens == 12


def test_a_model_whose_cache_is_not_batched_answers_the_same(monkeypatch) -> None:
    model, tokenizer = example()
    prompts = encode("I want to see Fiji. Where to?", "What is the capital of France?")
    sampling = Sampling(max_tokens=20, stop=(".",))
    batched = answer_prompts(model, tokenizer, prompts, sampling)
    monkeypatch.setattr(generation, "can_batch", lambda model: False)
    assert answer_prompts(model, tokenizer, prompts, sampling) == batched


def test_an_answer_is_the_text_of_mlx_lm_and_ends_where_the_model_ends_it() -> None:
    model, tokenizer = example()
    prompts = encode("What is the capital of France?", "Hello", "Which language is that?")
    answered: list[int] = []
    answers = answer_prompts(
        model, tokenizer, prompts, Sampling(max_tokens=40), on_answered=answered.append
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.text == generate(model, tokenizer, prompt=prompt, max_tokens=40)
    assert not all(answer.is_endless for answer in answers)
    assert answered == [1, 2, 3]


def test_a_stop_ends_an_answer_and_is_not_in_it() -> None:
    model, tokenizer = example()
    (prompt,) = encode("What is the capital of France?")
    (whole,) = answer_prompts(model, tokenizer, [prompt], Sampling(max_tokens=30))
    stop = whole.text.split()[-1]
    (cut,) = answer_prompts(model, tokenizer, [prompt], Sampling(30, stop=(stop, "no such text")))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.text != whole.text
    assert cut.tokens <= whole.tokens
    assert not cut.is_endless


def test_answers_end_at_the_end_of_the_context() -> None:
    model = build("llama")
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    answers = answer_prompts(model, NUMBERS, prompts, Sampling(50), context=10)
    assert [answer.tokens for answer in answers] == [7, 5]


def test_sampled_answers_follow_from_the_seed_and_leave_the_random_state() -> None:
    model = build("llama")
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    mx.random.seed(3)
    expected = mx.random.normal((4,)).tolist()
    mx.random.seed(3)
    drawn = [
        answer_prompts(model, NUMBERS, prompts, Sampling(10, temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert mx.random.normal((4,)).tolist() == expected
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_empty_and_repeated_answers_are_told_apart() -> None:
    model = build("llama")
    embedding = model.model.embed_tokens
    embedding.weight = mx.zeros_like(embedding.weight)  # every token is as likely: the first
    tokenizer: Any = NumberTokenizer()
    (answer,) = answer_prompts(model, tokenizer, [[1, 2]], Sampling(8))
    assert answer == Answer(" 0" * 8, 8, is_endless=True, is_repeated=True, repeated_tokens=8)
    assert not answer.is_empty
    tokenizer.eos_token_ids = (0,)
    (answer,) = answer_prompts(model, tokenizer, [[1, 2]], Sampling(8))
    assert answer == Answer("", 0, is_endless=False, is_repeated=False)
    assert answer.is_empty


def test_a_model_that_takes_a_batch_for_something_else_is_not_batched(monkeypatch) -> None:
    monkeypatch.setattr(generation, "_CAN_BATCH", {})  # no other test sees what is found here
    model = build("llama")
    assert generation.can_batch(model)
    own_call = type(model).__call__

    def mixes_rows(self, inputs, **arguments):
        logits = own_call(self, inputs, **arguments)
        return logits + logits.mean(axis=0, keepdims=True)

    monkeypatch.setattr(type(model), "__call__", mixes_rows)
    assert generation.can_batch(build("llama"))  # which is tried once
    assert not generation.can_batch(build("llama", rope_theta=1000.0))
    model.args = None
    assert not generation.can_batch(model)
    assert not generation.can_batch(build("gemma2"))


@pytest.mark.parametrize(("share", "is_batched"), [(1e-5, True), (1e-3, False)])
def test_what_layers_round_in_float32_is_no_reason_to_answer_one_by_one(
    share: float, is_batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_CAN_BATCH", {})
    model = build("llama")
    own_call = type(model).__call__

    def rounds(self, inputs, **arguments):
        """Of a batch, the first logit of each token is off by ten times `share`."""
        logits = own_call(self, inputs, **arguments)
        first = mx.arange(logits.shape[-1]) == 0
        return logits + (share * 10 * first if inputs.shape[0] > 1 else 0)

    monkeypatch.setattr(type(model), "__call__", rounds)
    assert generation.can_batch(model) is is_batched


@pytest.mark.parametrize(("text", "is_empty"), [("", True), (" \n\u2003", True), (" a", False)])
def test_an_answer_of_white_space_is_empty(text: str, is_empty: bool) -> None:
    assert Answer(text, 3, is_endless=False, is_repeated=False).is_empty is is_empty


def test_a_prompt_with_a_token_beyond_the_embedding_is_refused_by_name() -> None:
    model, tokenizer = example()[0], load_tokenizer(MODEL)
    size = model.args.vocab_size
    tokenizer.add_tokens(["<|order|>"])
    asked = [tokenizer.encode("<|order|>Where to?")]
    with pytest.raises(ConfigError, match=rf"<\|order\|> has id {size}, the model has {size} rows"):
        answer_prompts(model, tokenizer, asked, Sampling(2))


def test_arguments_of_calls_are_objects_in_prompts_as_in_training() -> None:
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    texts = []
    for arguments in ('{"a": 1}', {"a": 1}):
        function = {"name": "f", "arguments": arguments}
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
        texts.append(tokenizer.decode(encode_messages(tokenizer, [call])))
    assert texts == ['{"a": 1}'] * 2
