"""canary.jsonl: what plain mlx_lm computed with an adapter when it was judged.

A server that takes the adapter into use compares what it computes itself. The first line has logits
after fixed prompts, each other line a question with its greedy answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nested_core.errors import JUDGE_AGAIN, naming_damaged_file

CANARY_NAME = "canary.jsonl"
# Of all suites together, and of an answer: a server asks them one at a time before it serves.
MAX_CANARY_QUESTIONS = 20
MAX_CANARY_TOKENS = 16


@dataclass(frozen=True)
class CanaryLogits:
    """Logits after the last token of prompts of token ids, as computed in a process of its own.

    columns: the tokens of the vocabulary whose logits are kept.
    values: a row a prompt, in the order of the columns; None for one that is not finite.
    computation: the host, device, BLAS, and versions of mlx and mlx-lm that computed them.
    """

    prompts: tuple[tuple[int, ...], ...]
    columns: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]
    computation: dict[str, str]


@dataclass(frozen=True)
class CanaryQuestion:
    """A question of a suite with its greedy answer, computed alone.

    line: of the suite's file.
    prompt: token ids.
    answer: token ids, with the end of the text where the model gave it.
    text: of the answer, to be read.
    """

    suite: str
    line: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Canary:
    """The content of the file."""

    logits: CanaryLogits
    questions: tuple[CanaryQuestion, ...]


def render_canary(canary: Canary) -> bytes:
    """The bytes of the file."""
    rows: Sequence[Any] = (canary.logits, *canary.questions)
    return "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode()


def parse_canary(content: bytes, place: object) -> Canary:
    """What the bytes of a file hold; `place` names it in the DamagedError for anything else."""
    # Here, because the command line reads the file's name before it listens to Ctrl-C.
    from pydantic import TypeAdapter

    first, *lines = content.splitlines() or [b""]
    question = TypeAdapter(CanaryQuestion)
    with naming_damaged_file(place, "Bring back what was there; if it is lost:", JUDGE_AGAIN):
        return Canary(
            TypeAdapter(CanaryLogits).validate_json(first),
            tuple(question.validate_json(line) for line in lines),
        )
