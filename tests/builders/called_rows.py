"""Random conversations with calls, reasoning, system turns, names and control tokens.

Each text has a word of its own, so that a test can say of each whether a template shows it.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Family(NamedTuple):
    """A short version of a model family's chat template, and its special tokens, the end first."""

    template: str
    special: tuple[str, ...]


FAMILIES = {
    # SmolLM2's own: content alone, and a system turn where the row has none.
    "SmolLM2": Family(
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    ),
    # Qwen3: tools and calls as JSON, reasoning only after the last question of the user.
    "Qwen3": Family(
        "{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages and "
        "messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
        "{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}{{- '<|im_end|>\n' }}"
        "{%- elif messages and messages[0].role == 'system' %}"
        "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
        "{%- set ns = namespace(asked=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
        "{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}{%- if m.role == 'user' %}"
        "{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
        "{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}"
        "{%- if m.reasoning_content and loop.index0 > ns.asked %}"
        "{{- '<think>\n' + m.reasoning_content.strip('\n') + '\n</think>\n\n' }}{%- endif %}"
        "{{- m.content.lstrip('\n') }}{%- for call in m.tool_calls or [] %}"
        "{%- if call.function %}{%- set call = call.function %}{%- endif %}"
        '{{- \'\n<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}'
        "{{- call.arguments if call.arguments is string else call.arguments | tojson }}"
        "{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}"
        "{%- elif m.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + m.content }}"
        "{{- '\n</tool_response><|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    ),
    # Llama 3.1: trimmed, tools before the first question, a call in place of the content beside it.
    "Llama 3.1": Family(
        "{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{%- if m.role == 'system' and tools %}{{- 'Environment: ipython\n' }}{%- endif %}"
        "{%- if m.role == 'user' and tools and loop.index0 < 2 %}"
        "{%- for tool in tools %}{{- tool | tojson(indent=4) + '\n\n' }}{%- endfor %}{%- endif %}"
        "{%- if m.tool_calls %}{%- set call = m.tool_calls[0].function %}"
        '{{- \'{"name": "\' + call.name + \'", "parameters": \' + call.arguments | tojson }}'
        "{{- '}' }}{%- elif m.role == 'tool' %}{{- m.content | tojson }}"
        "{%- else %}{{- m.content | trim }}{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
        ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    ),
    # Gemma's manner: all is trimmed, and a system turn is a part of the first question.
    "strips": Family(
        "{%- set first = '' %}{%- if messages and messages[0].role == 'system' %}"
        "{%- set first = messages[0].content | trim + '\n\n' %}{%- endif %}"
        "{%- for m in messages %}{%- if m.role != 'system' %}"
        "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
        "{%- if m.role == 'user' and loop.index0 < 2 %}{{- first }}{%- endif %}"
        "{{- m.content | trim + '<end_of_turn>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}",
        ("<end_of_turn>", "<start_of_turn>", "<eos>"),
    ),
    # Mistral's manner: arguments are joined as text, and a system turn raises.
    "raises": Family(
        "{%- for m in messages %}{%- if m.role == 'system' %}"
        "{{- raise_exception('System role not supported') }}"
        "{%- elif m.role == 'assistant' %}{{- m.content }}{%- for call in m.tool_calls or [] %}"
        "{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments }}"
        "{%- endfor %}{{- '</s>' }}{%- else %}{{- '[INST]' + m.content + '[/INST]' }}{%- endif %}"
        "{%- endfor %}",
        ("</s>", "[INST]", "[/INST]"),
    ),
}
# What stands around the word of a text: white space, quotes and escapes, other scripts.
_AROUND = ('{} "so" {it} is', "  {}\n", "é{} \U0001f600\\n", "{}", "<b>{}</b> & 'more'")


@dataclass
class CalledRow:
    """A row of a conversation, and what a test needs to know of it.

    words: the word of each text, by its turn (None: the tools) and key, as findings name it.
    tokens: the control tokens that were put into texts.
    """

    row: dict[str, Any] = field(default_factory=dict)
    words: dict[str, tuple[int | None, str]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)

    @property
    def line(self) -> bytes:
        """The row as JSON."""
        return json.dumps(self.row).encode()


def draw_called_row(dice: random.Random, special: tuple[str, ...]) -> CalledRow:
    """A row of one to three questions, each answered at once or after a call."""
    return _Drawing(dice, special).draw()


class _Drawing:
    def __init__(self, dice: random.Random, special: tuple[str, ...]) -> None:
        self._dice = dice
        self._special = special
        self._drawn = CalledRow()
        self._turns: list[dict[str, Any]] = []

    def draw(self) -> CalledRow:
        """The turns, and the tools that they call."""
        dice = self._dice
        if dice.random() < 0.3:
            self._add("system")
        calls = dice.random() < 0.7
        for _ in range(dice.randint(1, 3)):
            self._add("user")
            if calls and dice.random() < 0.6:
                self._add_call()
                self._add("tool", tool_call_id="call00001")
            self._add("assistant")
        if calls:
            name, about = self._name(None, "tools"), self._text(None, "tools")
            function = {"name": name, "description": about, "parameters": {"type": "object"}}
            self._drawn.row["tools"] = [{"type": "function", "function": function}]
        self._drawn.row["messages"] = self._turns
        return self._drawn

    def _add(self, role: str, **more: Any) -> None:
        turn = len(self._turns)
        content = self._text(turn, "content")
        if self._dice.random() < 0.2:
            token = self._dice.choice(self._special)
            content = f"{content}{token}" if self._dice.random() < 0.5 else f"{token}{content}"
            self._drawn.tokens.add(token)
        message = {"role": role, "content": content, **more}
        if role == "assistant" and self._dice.random() < 0.4:
            key = self._dice.choice(("reasoning_content", "thinking"))
            message[key] = self._text(turn, key)
        if role == "user" and self._dice.random() < 0.2:
            message["name"] = self._name(turn, "name")
        self._turns.append(message)

    def _add_call(self) -> None:
        turn = len(self._turns)
        key = "tool_calls[].function"
        where = self._text(turn, f"{key}.arguments")
        arguments: Any = {"where": where, "limits": [self._number(turn, f"{key}.arguments"), None]}
        if self._dice.random() < 0.5:
            arguments = json.dumps(arguments, indent=self._dice.choice((None, 2)))
        function = {"name": self._name(turn, f"{key}.name"), "arguments": arguments}
        call = {"id": "call00001", "type": "function", "function": function}
        content = self._dice.choice(("", None))
        self._turns.append({"role": "assistant", "content": content, "tool_calls": [call]})

    def _text(self, turn: int | None, key: str) -> str:
        return self._dice.choice(_AROUND).replace("{}", self._name(turn, key))

    def _name(self, turn: int | None, key: str) -> str:
        word = f"word{len(self._drawn.words):03}x"
        self._drawn.words[word] = turn, key
        return word

    def _number(self, turn: int | None, key: str) -> int:
        number = 7_000_000 + len(self._drawn.words)
        self._drawn.words[str(number)] = turn, key
        return number
