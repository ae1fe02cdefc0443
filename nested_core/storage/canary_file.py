"""canary.jsonl: reference outputs of plain mlx_lm with an adapter, computed when it was judged.

A server that loads the adapter compares its own outputs with them. The first line has logits after
fixed prompts; each other line has a question with its greedy answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nested_core.errors import JUDGE_AGAIN, naming_damaged_file

CANARY_NAME = "canary.jsonl"
# Of all suites together, and of an answer: a server asks them one at a time before it serves.
MAX_CANARY_QUESTIONS = 20
MAX_CANARY_TOKENS = 16


@dataclass(frozen=True)
class CanaryLogits:
    """Logits after the last token of fixed prompts, computed in a separate process.

    prompts: the token ids of each prompt.
    columns: the token ids whose logits are stored.
    values: the logits, one row a prompt, in the order of `columns`; None for one that is not
        finite.
    computation: host, device, BLAS, and versions of mlx and mlx-lm.
    """

    prompts: tuple[tuple[int, ...], ...]
    columns: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]
    computation: dict[str, str]


@dataclass(frozen=True)
class CanaryQuestion:
    """A suite's question with its greedy answer, generated without other questions in the batch.

    line: the question's line in the suite's file.
    prompt: its token ids.
    answer: the answer's token ids, with the end token if the model gave it.
    text: the answer as text.
    """

    suite: str
    line: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Canary:
    """The content of canary.jsonl."""

    logits: CanaryLogits
    questions: tuple[CanaryQuestion, ...]


def render_canary(canary: Canary) -> bytes:
    """Return the bytes of canary.jsonl."""
    rows: Sequence[CanaryLogits | CanaryQuestion] = (canary.logits, *canary.questions)
    return "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode()


def parse_canary(content: bytes, place: object) -> Canary:
    """Parse the bytes of canary.jsonl; DamagedError, naming `place`, if they have another form."""
    # Here, because the command line reads the file's name before it listens to Ctrl-C.
    from pydantic import TypeAdapter

    first, *lines = content.splitlines() or [b""]
    question = TypeAdapter(CanaryQuestion)
    with naming_damaged_file(place, "Bring back what was there; if it is lost:", JUDGE_AGAIN):
        return Canary(
            TypeAdapter(CanaryLogits).validate_json(first),
            tuple(question.validate_json(line) for line in lines),
        )
