"""The geography data set in every format that is trained on, for a model that takes them all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.example import DATA, MODEL

Row = dict[str, Any]
SPLITS = ("train", "valid")
TOOL = {"type": "function", "function": {"name": "capital", "parameters": {"type": "object"}}}
# The example's own template refuses the role tool; this one gives its results as a user's turn.
TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "<|{{ 'user' if m.role == 'tool' else m.role }}|>{{ m.content or '' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _turns(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _texts(pairs: list[tuple[str, str]]) -> list[Row]:
    return [{"text": f"{question} {answer}"} for question, answer in pairs]


def _completions(pairs: list[tuple[str, str]]) -> list[Row]:
    return [{"prompt": question, "completion": answer} for question, answer in pairs]


def _chats(pairs: list[tuple[str, str]]) -> list[Row]:
    """Two questions a conversation."""
    return [{"messages": _turns(*first) + _turns(*second)} for first, second in _by_two(pairs)]


def _calls(pairs: list[tuple[str, str]]) -> list[Row]:
    rows = []
    for question, answer in pairs:
        asked, answered = _turns(question, answer)
        function = {"name": "capital", "arguments": {}}
        call = {"id": "1", "type": "function", "function": function}
        called = {"role": "assistant", "content": "Ask ", "tool_calls": [call]}
        result = {"role": "tool", "content": answer.split()[3], "tool_call_id": "1"}
        rows.append({"messages": [asked, called, result, answered], "tools": [TOOL]})
    return rows


def _by_two(pairs: list[tuple[str, str]]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    return list(zip(pairs[::2], pairs[1::2], strict=True))


FORMATS: dict[str, Callable[[list[tuple[str, str]]], list[Row]]] = {
    "text": _texts,
    "completion": _completions,
    "chat": _chats,
    "tools": _calls,
}


def write_format(folder: Path, name: str) -> Path:
    """The data set in a format, as folder/train.jsonl and folder/valid.jsonl."""
    folder.mkdir(parents=True)
    for split in SPLITS:
        lines = (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        messages = [json.loads(line)["messages"] for line in lines]
        pairs = [(asked["content"], answered["content"]) for asked, answered in messages]
        rows = [json.dumps(row) + "\n" for row in FORMATS[name](pairs)]
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


def write_model(folder: Path) -> Path:
    """The example's base model with a chat template that takes tools."""
    folder.mkdir(parents=True)
    for path in MODEL.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((MODEL / "tokenizer_config.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder
