"""Tokens are mlx-lm's, to the last one; only its pad token is not supervised."""

from __future__ import annotations

import json
import shutil
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.datasets import CacheDataset, create_dataset
from mlx_lm.tuner.trainer import iterate_batches

from nested_core.data.batches import choose_evaluation_batches
from nested_core.data.data_settings import DataSettings
from nested_core.data.lines.example_parsing import FieldNames, read_examples
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import DatasetError
from tests.builders.data_sets import load
from tests.core.data.conftest import WriteData
from tests.example import MODEL

CALL = {"id": "1", "type": "function", "function": {"name": "river", "arguments": {"of": "A"}}}
TOOL = {"type": "function", "function": {"name": "river", "parameters": {"type": "object"}}}
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"The capital of {n} is near.\n" + "x" * n} for n in range(9)]
    + [{"text": "already ended<|end|>"}],
    "completion": [
        {"prompt": f"Where is {n}?", "completion": "é\U0001f600" * n} for n in range(1, 9)
    ]
    + [{"prompt": "river", "completion": "A.", "tools": [TOOL], "unknown": 1}],
    "chat": [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Where is {n}?"},
                {"role": "assistant", "content": "Here. " * n},
                {"role": "user", "content": "And then?"},
                {"role": "assistant", "content": f"There {n}.", "name": "bot"},
            ]
        }
        for n in range(1, 9)
    ]
    + [
        {
            "messages": [
                {"role": "user", "content": "river"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "Seine", "tool_call_id": "1"},
                {"role": "assistant", "content": "The Seine."},
            ],
            "tools": [TOOL],
        }
    ],
}
CASES = [
    ("text", False),
    ("completion", False),
    ("completion", True),
    ("chat", False),
    ("chat", True),
]


def train_split(
    write_data: WriteData, tokenizer: TokenizerSource, kind: str, **more: Any
) -> TokenizedSplit:
    report, splits = load(write_data(train=ROWS[kind]), tokenizer, **more)
    assert report.errors == ()
    return splits["train"]


@pytest.mark.parametrize(("kind", "mask_prompt"), CASES)
def test_tokens_and_mask_offsets_are_those_of_mlx_lm(
    kind: str, mask_prompt: bool, write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    split = train_split(write_data, tokenizer, kind, mask_prompt=mask_prompt)
    config = DataSettings("", mask_prompt=mask_prompt)  # it reads the same attribute names
    rows = [json.loads(json.dumps(row)) for row in ROWS[kind]]
    loaded: Any = tokenizer.load()
    reference = create_dataset(rows, loaded, config)
    assert len(split) == len(rows)
    for index, row in enumerate(rows):
        tokens, offset = reference.process(row)
        assert split.example(index).tolist() == tokens
        learnt = np.arange(len(tokens)) >= max(1, offset)
        assert split.example_mask(index).tolist() == learnt.tolist()


@pytest.mark.parametrize(("kind", "mask_prompt"), CASES)
@pytest.mark.parametrize("max_seq_length", [32, 2048])
def test_what_is_supervised_is_what_mlx_lm_supervises_without_its_pad_token(
    kind, mask_prompt, max_seq_length, write_data, tokenizer
) -> None:
    settings: Any = {"max_seq_length": max_seq_length, "mask_prompt": mask_prompt}
    split = load(write_data(train=ROWS[kind]), tokenizer, **settings)[1]["train"]
    config = DataSettings("", mask_prompt=mask_prompt)
    reference = CacheDataset(create_dataset(list(ROWS[kind]), tokenizer.load(), config))
    for index, (batch, lengths) in enumerate(one_by_one(reference, max_seq_length)):
        steps = mx.arange(1, batch.shape[1])
        mask = np.array((steps >= lengths[:, 0:1]) & (steps < lengths[:, 1:]))
        targets = np.array(batch)[:, 1:][mask]
        example = split.example(index)
        assert example[split.example_mask(index)].tolist() == targets.tolist()


def one_by_one(reference: Any, max_seq_length: int) -> Any:
    """mlx-lm's own batch of each row by itself, in order."""
    for index in range(len(reference)):
        yield next(iter(iterate_batches([reference[index]], 1, max_seq_length)))


def test_arrays_are_flat_with_the_documented_types(write_data, tokenizer) -> None:
    split = train_split(write_data, tokenizer, "chat", max_seq_length=48)
    assert split.tokens.dtype == np.int32
    assert split.starts.dtype == np.int64
    assert split.target_mask.dtype == np.bool_
    assert len(split.target_mask) == len(split.tokens)
    assert not split.target_mask[split.starts[:-1]].any()
    assert split.starts.tolist() == np.concatenate([[0], np.cumsum(split.lengths)]).tolist()
    assert split.lengths.max() == 48
    assert len(split.tokens) == split.starts[-1]


def test_rows_with_an_error_are_left_out_and_the_order_is_kept(write_data, tokenizer) -> None:
    rows: list[Any] = [{"text": "one"}, b"", {"text": ""}, {"text": "two"}, b"{", {"text": "three"}]
    _, splits = load(write_data(train=rows), tokenizer)
    split = splits["train"]
    texts = [tokenizer.load().decode(split.example(index).tolist()) for index in range(len(split))]
    assert texts == ["one<|end|>", "two<|end|>", "three<|end|>"]


def test_a_file_that_changes_after_it_was_judged_is_refused(write_data: WriteData) -> None:
    path = write_data(train=[{"text": "a"}, b'{"text": 5}']) / "train.jsonl"
    with pytest.raises(DatasetError, match=r"train.jsonl:2 changed while it was read: text"):
        list(read_examples(path, FieldNames(), skip=set()))


def test_an_empty_split_is_an_empty_split(write_data, tokenizer) -> None:
    folder = write_data(train=[{"text": "a"}] * 4, valid=[])
    split = load(folder, tokenizer)[1]["valid"]
    assert len(split) == 0
    assert split.lengths.tolist() == []
    assert choose_evaluation_batches(split, 4) == []


def test_a_tokenizer_whose_files_changed_is_loaded_again_in_the_same_process(tmp_path) -> None:
    base = shutil.copytree(MODEL, tmp_path / "base")
    source = TokenizerSource(str(base))
    before = source.load()
    assert source.load() is before
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "changed"}))
    assert source.load().chat_template == "changed"
