"""The dataset keys of a lora.yaml as in mlx-lm: both loaders on the same files, token by token.

The examples are those of mlx-lm's own tests/test_datsets.py, and what its LORA.md shows.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlx_lm.tuner import datasets as theirs

from nested_core.config.loading import load_config
from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from tests.builders.data_sets import found_in, load
from tests.core.data.conftest import WriteData

TEXT = "This is an example for the model."
QUESTION, ANSWER = "What is the capital of France?", "Paris."
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
HELLO = {"role": "user", "content": "Hello."}
REPLY = {"role": "assistant", "content": "How can I assistant you today."}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the current weather",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string"}, "format": {"type": "string"}},
            "required": ["location", "format"],
        },
    },
}
CALL = {
    "id": "call_id",
    "type": "function",
    # Of JSON text mlx_lm trains on a quoted text, and mlx_lm.server gives the template the object.
    "function": {"name": "get_current_weather", "arguments": {"location": "San Francisco, CA"}},
}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
# The keys in the YAML, and one row of the file.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "test_text": ({}, {"text": TEXT}),
    "test_completions": ({}, {"prompt": QUESTION, "completion": ANSWER}),
    "test_completions_mask_prompt": (
        {"mask_prompt": True},
        {"prompt": QUESTION, "completion": ANSWER},
    ),
    "test_chat": ({}, {"messages": [SYSTEM, HELLO, REPLY]}),
    "chat, masked": ({"mask_prompt": True}, {"messages": [SYSTEM, HELLO, REPLY]}),
    "two exchanges, masked": (
        {"mask_prompt": True},
        {"messages": [HELLO, REPLY, HELLO, {"role": "assistant", "content": "Bye."}]},
    ),
    "tools": ({}, {"messages": [HELLO, CALLING], "tools": [TOOL]}),
    "tools, masked": ({"mask_prompt": True}, {"messages": [HELLO, CALLING], "tools": [TOOL]}),
    "completion with tools": ({}, {"prompt": QUESTION, "completion": ANSWER, "tools": [TOOL]}),
    "text_feature": ({"text_feature": "body"}, {"body": TEXT}),
    "prompt_feature and completion_feature": (
        {"prompt_feature": "question", "completion_feature": "response", "mask_prompt": True},
        {"question": QUESTION, "response": ANSWER},
    ),
    "chat_feature": ({"chat_feature": "chosen"}, {"chosen": [HELLO, REPLY]}),
    # Text that would be left out is refused unless a key says that it is to be left out.
    "completions win over chat and text": (
        {"drop_fields": ["text", "messages"]},
        {"text": TEXT, "prompt": QUESTION, "completion": ANSWER, "messages": [HELLO, REPLY]},
    ),
    "chat wins over text": ({"drop_fields": ["text"]}, {"text": TEXT, "messages": [HELLO, REPLY]}),
    "a prompt alone is no completion": (
        {"drop_fields": ["prompt"]},
        {"prompt": QUESTION, "messages": [HELLO, REPLY]},
    ),
    "other keys beside": ({}, {"id": 7, "text": TEXT, "meta": {"a": [1]}}),
    "max_seq_length": ({"max_seq_length": 12}, {"messages": [SYSTEM, HELLO, REPLY]}),
}


def vary(row: Any, number: int) -> Any:
    """Another row of the same form: mlx-lm's tests repeat one, which is leakage from train."""
    if isinstance(row, dict):
        return {key: vary(value, number) for key, value in row.items()}
    if isinstance(row, list):
        return [vary(item, number) for item in row]
    return f"{row} {number}" if row in (TEXT, QUESTION, ANSWER, HELLO["content"]) else row


def read_both(
    folder: Path, keys: dict[str, Any], tokenizer: TokenizerSource
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One lora.yaml, given to mlx-lm's loader and to ours."""
    file = folder / "lora.yaml"
    file.write_text(yaml.safe_dump({"data": str(folder), "train": True, "test": True, **keys}))
    arguments = types.SimpleNamespace(**yaml.safe_load(file.read_text()))
    loaded: Any = tokenizer.load()
    found = theirs.load_dataset(arguments, loaded)
    settings = DataSettings.from_config(load_config(file, {"batch_size": 1}))
    report, ours = load_dataset(settings, tokenizer)
    assert report.errors == ()
    return dict(zip(("train", "valid", "test"), found, strict=True)), dict(ours)


@pytest.mark.parametrize("case", CASES)
def test_both_loaders_give_the_same_tokens_and_learn_the_same_of_them(
    case: str, write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    keys, row = CASES[case]
    rows = [vary(row, number) for number in range(7)]
    folder = write_data(train=rows[:4], valid=rows[4:6], test=rows[6:])
    expected, ours = read_both(folder, keys, tokenizer)
    assert expected.keys() == ours.keys()
    for split, examples in expected.items():
        assert len(ours[split]) == len(examples)
        for index in range(len(examples)):
            tokens, offset = examples.process(examples[index])
            tokens = tokens[: keys.get("max_seq_length", 2048)]
            assert ours[split].example(index).tolist() == tokens
            learnt = [position >= max(1, offset) for position in range(len(tokens))]
            assert ours[split].example_mask(index).tolist() == learnt


def test_the_inputs_of_mlx_lm_tests_repeat_train_in_valid_which_we_name(
    write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    row = {"prompt": QUESTION, "completion": ANSWER}
    folder = write_data(train=[row] * 4, valid=[row] * 4)
    report, ours = load(folder, tokenizer)
    assert len(ours["train"]) == 4
    assert found_in(report) == [("valid.jsonl", line, "leakage") for line in range(1, 5)]


def test_plain_text_with_masked_prompts_is_refused_by_both(write_data, tokenizer) -> None:
    folder = write_data(train=[{"text": TEXT}] * 4)
    arguments = types.SimpleNamespace(data=str(folder), train=True, test=False, mask_prompt=True)
    with pytest.raises(ValueError, match="Prompt masking not supported for text dataset"):
        theirs.load_dataset(arguments, tokenizer.load())
    report, _ = load(folder, tokenizer, mask_prompt=True)
    assert [f.check for f in report.errors] == ["mask-prompt-on-text"]
