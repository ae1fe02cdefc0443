"""A tiny tokenizer of our own (byte-level BPE, a chat template), and data sets on disk."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.seams import is_there
from tests.builders.data_sets import write_lines

OF_TABLES = ["test_formats.py", "test_rows_as_they_are.py", "test_split_names.py"]
collect_ignore = [] if is_there("tables") else OF_TABLES
TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|tools|>"]
_FOLDERS = tempfile.TemporaryDirectory(prefix="tokenizers-")
atexit.register(_FOLDERS.cleanup)
WriteData = Callable[..., Path]


def build_tokenizer(template: str | None, special: Sequence[str] = SPECIAL) -> TokenizerSource:
    """A tokenizer of our own in a folder, as a model's folder holds one.

    special: its special tokens, of which the first ends a sequence.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["The capital of France is Paris.", "Where is the river?", "It is near the capital."]
    tokenizer.train_from_iterator(text, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], chat_template=template
    )
    folder = tempfile.mkdtemp(dir=_FOLDERS.name)
    wrapped.save_pretrained(folder)
    Path(folder, "config.json").write_text("{}")
    return TokenizerSource(folder)


@pytest.fixture(scope="session")
def tokenizer() -> TokenizerSource:
    return build_tokenizer(TEMPLATE)


@pytest.fixture(scope="session")
def bare_tokenizer() -> TokenizerSource:
    return build_tokenizer(None)


@pytest.fixture
def write_data(tmp_path: Path) -> WriteData:
    """Write {split: lines} into a folder, as `write_lines` does."""

    def write(**splits: Iterable[Any]) -> Path:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for split, lines in splits.items():
            write_lines(folder / f"{split}.jsonl", lines)
        return folder

    return write
