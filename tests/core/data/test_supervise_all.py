"""`training.supervise: all`: every assistant turn is learnt and nothing else, or it is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Metaspace

from nested_core.config.loading import parse_config
from nested_core.data.lines.example_parsing import Example
from nested_core.data.tokens import example_encoding
from nested_core.data.tokens.example_encoding import EncodedExample, encode_example
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import ConfigError
from tests.builders.data_sets import found_in, load
from tests.core.data.conftest import TEMPLATE, WriteData, build_tokenizer
from tests.left_out import needs_rooms, slow_except

CALL = {"id": "1", "type": "function", "function": {"name": "river", "arguments": {"of": "A"}}}
TOOL = {"type": "function", "function": {"name": "river", "parameters": {"type": "object"}}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "Here."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "There."},
]
ONLY_LAST_THINKS = (  # a template that leaves the thinking of earlier turns out, as some models' do
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}{{ m.thinking }}{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LOOKS_BACK = (  # a template that thinks in all turns if one of the user's turns asks for it
    "{% set n = namespace(on=false) %}{% for m in messages %}"
    "{% if m.role == 'user' and '/think' in m.content %}{% set n.on = true %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and n.on %}(thinks){% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if n.on %}(thinks){% endif %}{% endif %}"
)
HEADED = (  # a header before all turns, and a line end after each, which is learnt with the turn
    "<|system|>{{ tools | length if tools else 0 }} tools\n"
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
UNHEADED = (  # a prompt that does not say whose turn it is
    "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
)


load_all = partial(load, supervise="all", batch_size=1)


def learnt(split: TokenizedSplit, tokenizer: TokenizerSource, index: int = 0) -> list[str]:
    """The text of each stretch of supervised tokens."""
    flags = split.example_mask(index)
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    tokens = split.example(index)
    stretches = zip(edges[::2], edges[1::2], strict=True)
    return [tokenizer.load().decode(tokens[begin:end].tolist()) for begin, end in stretches]


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE, ["Here.<|end|>", "There.<|end|>"]),
        (HEADED, ["Here.<|end|>\n", "There.<|end|>\n"]),
        (UNHEADED, ["Here.<|end|>", "There.<|end|>"]),
    ],
)
def test_every_assistant_turn_is_learnt_and_nothing_else(
    template: str, expected: list[str], mask_prompt: bool, write_data: WriteData
) -> None:
    tokenizer = build_tokenizer(template)
    folder = write_data(train=[{"messages": TURNS}])
    report, splits = load_all(folder, tokenizer, mask_prompt=mask_prompt)
    assert report.errors == ()
    assert learnt(splits["train"], tokenizer) == expected
    whole = tokenizer.load().apply_chat_template(TURNS, return_dict=False)
    assert splits["train"].example(0).tolist() == whole


def test_calls_and_answers_are_learnt_and_results_of_tools_are_not(write_data, tokenizer) -> None:
    turns = [
        {"role": "user", "content": "river"},
        {"role": "assistant", "content": "Look:", "tool_calls": [CALL]},
        {"role": "tool", "content": "Seine", "tool_call_id": "1"},
        {"role": "assistant", "content": "The Seine."},
    ]
    folder = write_data(train=[{"messages": turns, "tools": [TOOL]}])
    report, splits = load_all(folder, tokenizer)
    assert report.errors == ()
    first, second = learnt(splits["train"], tokenizer)
    assert first.startswith("Look:")
    assert '"name": "river"' in first
    assert first.endswith("<|end|>")
    assert second == "The Seine.<|end|>"


def test_a_completion_has_one_turn_to_learn(write_data, tokenizer) -> None:
    folder = write_data(train=[{"prompt": "Where?", "completion": "Here."}])
    _, splits = load_all(folder, tokenizer)
    assert learnt(splits["train"], tokenizer) == ["Here.<|end|>"]


def test_turns_beyond_the_cut_are_not_learnt(write_data, tokenizer) -> None:
    folder = write_data(train=[{"messages": TURNS}])
    whole = load_all(folder, tokenizer)[1]["train"]
    ends = np.flatnonzero(np.diff(whole.example_mask(0), prepend=False, append=False))
    for length in (ends[0] + 1, ends[1], ends[2], ends[2] + 1):
        cut = load_all(folder, tokenizer, max_seq_length=int(length))[1]["train"]
        assert cut.example_mask(0).tolist() == whole.example_mask(0)[:length].tolist()


def test_a_template_that_rewrites_an_earlier_turn_is_an_error_that_names_it(write_data) -> None:
    turns = [turn | {"thinking": "Hm."} for turn in TURNS]
    folder = write_data(train=[{"messages": turns[1:3]}, {"messages": turns}])
    report, _ = load_all(folder, build_tokenizer(ONLY_LAST_THINKS))
    assert found_in(report) == [("train.jsonl", 2, "prompt-not-a-prefix")]
    assert "up to messages[2] otherwise by itself" in report.errors[0].message


def test_a_prompt_that_the_whole_does_not_begin_with_is_an_error(write_data: WriteData) -> None:
    folder = write_data(train=[{"messages": TURNS}])
    report, _ = load_all(folder, build_tokenizer("{{ messages | length }}" + TEMPLATE))
    assert found_in(report) == [("train.jsonl", 1, "prompt-not-a-prefix")]


def test_plain_text_has_no_turns(write_data: WriteData, tokenizer: TokenizerSource) -> None:
    folder = write_data(train=[{"text": "The capital."}])
    found = found_in(load_all(folder, tokenizer)[0])
    assert found == [("train.jsonl", None, "supervise-all-on-text")]


def test_two_template_calls_a_turn_are_enough(tokenizer: TokenizerSource) -> None:
    calls = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer.load(), name)

        def apply_chat_template(self, messages: Any, **more: Any) -> Any:
            calls.append(len(messages))
            return tokenizer.load().apply_chat_template(messages, **more)

    counting = Counting()
    example = Example("chat", [*TURNS[1:3]] * 9)
    encode_example(example, counting, "all")  # what the template expects is tried once
    calls.clear()
    assert len(encode_example(example, counting, "all").spans) == 9
    assert len(calls) == 2 * 9


PLAIN = (  # no special token at all, so that all turns are split as one text
    "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:{% endif %}"
)
STRIPPING = TEMPLATE.replace("m.content or ''", "(m.content or '') | trim")
PIECES = [
    *("Where", " is", " the river?", " ", "\n", "\n\n", "  x", "é", "\U0001f600"),
    *("1234567", "'s"),
]
PIECES += ["<|end|>", "<|assistant|>", "<|", "\u0301", "_", "\t", "...", "Paris."]


def templated_one_by_one(example: Example, tokenizer: Any) -> EncodedExample:
    """What `all` means: every beginning of the chat is templated and tokenised by itself."""

    def tokens_of(turns: int, **more: Any) -> list[int]:
        messages = example.messages[:turns]
        return list(tokenizer.apply_chat_template(messages, tools=example.tools, **more))

    whole = tokens_of(len(example.messages))
    spans: list[tuple[int, int]] = []
    for turn, message in enumerate(example.messages):
        if message["role"] == "assistant":
            begin, end = tokens_of(turn, add_generation_prompt=True), tokens_of(turn + 1)
            if whole[: len(begin)] != begin or whole[: len(end)] != end:
                return EncodedExample(whole, tuple(spans), turn)
            spans.append((len(begin), len(end)))
    return EncodedExample(whole, tuple(spans))


def random_chat(dice: random.Random) -> Example:
    turns = [{"role": "system", "content": "Be brief."}] * dice.randint(0, 1)
    for _ in range(dice.randint(1, 5)):
        for role in ("user", "assistant"):
            text = "".join(dice.choices(PIECES, k=dice.randint(0, 6)))
            while role == "assistant" and text.rstrip().endswith("<|end|>"):
                text = text.rstrip().removesuffix("<|end|>")  # an answer loses its end
            turns.append({"role": role, "content": text, "thinking": dice.choice(["", "Hm."])})
    return Example("chat", turns)


# How many chats, and whether texts are split as models with a SentencePiece vocabulary split them.
CHATS = {"some": (50, False), "many": (150, False), "many with metaspace": (150, True)}


@pytest.mark.parametrize("chats", slow_except(CHATS, "some", reason="tokenises many chats twice"))
@pytest.mark.parametrize(
    "template", [TEMPLATE, HEADED, UNHEADED, ONLY_LAST_THINKS, PLAIN, STRIPPING]
)
def test_tokenising_a_chat_once_gives_the_spans_of_tokenising_each_beginning(
    template: str, chats: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, metaspace = CHATS[chats]
    source = build_tokenizer(template)
    if metaspace:
        path = str(Path(source.folder, "tokenizer.json"))
        backend = Tokenizer.from_file(path)
        backend.pre_tokenizer = Metaspace(prepend_scheme="first")
        backend.save(path)
    tokenizer = source.load()
    dice = random.Random(template)
    for number in range(count):
        example = random_chat(dice)
        monkeypatch.setattr(example_encoding, "TURNS_BETWEEN_WHOLE", (64, 1, 2, 4)[number % 4])
        encoded = encode_example(example, tokenizer, "all")
        assert replace(encoded, notes=()) == templated_one_by_one(example, tokenizer)


def test_a_template_that_looks_at_the_first_turns_gives_each_beginning_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(example_encoding, "TURNS_BETWEEN_WHOLE", 4)
    tokenizer = build_tokenizer(LOOKS_BACK).load()
    turns = [
        {"role": role, "content": f"{role} {n}{' /think' if n == 0 else ''}"}
        for n in range(8)
        for role in ("user", "assistant")
    ]
    example = Example("chat", turns)
    encoded = encode_example(example, tokenizer, "all")
    assert replace(encoded, notes=()) == templated_one_by_one(example, tokenizer)


def test_a_chat_of_many_turns_is_tokenised_once(tokenizer: TokenizerSource) -> None:
    tokenised = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer.load(), name)

        def apply_chat_template(self, messages: Any, **more: Any) -> Any:
            if more.get("tokenize", True):
                tokenised.append(len(messages))
            return tokenizer.load().apply_chat_template(messages, **more)

    example = Example("chat", [*TURNS[1:3]] * 20)
    assert len(encode_example(example, Counting(), "all").spans) == 20
    assert tokenised == []  # the rendered text is, without the template


@pytest.mark.parametrize("is_agent", [False, True])
def test_the_turns_that_are_rendered_grow_as_those_of_the_chat(
    is_agent: bool, tokenizer: TokenizerSource
) -> None:
    """Else an honest chat of 5,000 turns takes longer than a chat template may."""
    rendered, loaded = [], tokenizer.load()

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(loaded, name)

        def apply_chat_template(self, messages: Any, **more: Any) -> Any:
            rendered.append(len(messages))
            return loaded.apply_chat_template(messages, **more)

    asked, given = TURNS[1:3]
    found = {"role": "tool", "content": "found"}
    turns = [asked, *[given, found] * 249, given] if is_agent else [asked, given] * 250
    example = Example("chat", turns)
    encoded = encode_example(example, Counting(), "all")
    assert encoded == encode_example(example, loaded, "all")
    assert len(encoded.spans) == 250
    assert sum(rendered) < 50 * 500


@needs_rooms("reference")
def test_a_reference_run_refuses_to_learn_every_turn() -> None:
    values = {"training": {"reference": "mlx_lm", "supervise": "all"}}
    with pytest.raises(ConfigError, match=r"knows nothing of training\.supervise"):
        parse_config(values, source="a test")
