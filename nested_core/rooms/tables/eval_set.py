"""An eval set for `gate.tasks`, drawn from held-out chats, with the score that fits their answers.

Beside it stands how many of its questions one and the same answer would be right for: a model that
is no better has learnt nothing of the question.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nested_core.errors import ConfigError, shorten
from nested_core.rooms.tables.dataset_split import SPLIT_SEED
from nested_core.rooms.tables.labels import describe_share, find_labels

MAX_ANSWER_TOKENS = 256
EXTRA_TOKENS = 16  # of an answer beyond the longest that is expected, which may be told at length
EXTRA_TOKENS_OF_A_LABEL = 2  # which is right alone


class TooManyQuestions(ConfigError):
    """More questions than the rows can give; `most` is how many they can."""

    def __init__(self, asked: int, most: int, rows: str) -> None:
        super().__init__(f"--suite {asked}: expected from 1 to {most} questions, for {rows}.")
        self.most = most


@dataclass(frozen=True)
class EvalSet:
    """Questions, and what to set in `gate.tasks` for them.

    lines: a question of JSON each.
    max_tokens: of an answer: no fewer than the longest expected one has.
    usual: the most frequent answer of train, and for how many of the questions it is right.
    most: the most frequent answer of the questions, and how many it answers.
    """

    lines: tuple[bytes, ...]
    score: Literal["exact", "json", "contains"]
    max_tokens: int
    usual: tuple[str, int]
    most: tuple[str, int]

    def describe_baseline(self) -> str:
        """What answering the same to every question would score."""
        questions = len(self.lines)
        answer, right = self.usual
        text = (
            f"always answering {shorten(answer, 60)!r}, the most frequent answer of train, would "
            f"be right for {describe_share(right, questions)}"
        )
        answer, right = self.most
        if right > self.usual[1]:
            share = describe_share(right, questions)
            text += f"; {shorten(answer, 60)!r}, the most frequent here, for {share}"
        return text


def draw_eval_set(train: Iterable[bytes], held_out: Sequence[bytes], count: int) -> EvalSet:
    """Draw questions, each another one, with a fixed seed.

    Args:
        train, held_out: chats, a line of JSON each.
        count: how many questions.

    Raises TooManyQuestions where the held-out rows have fewer different ones.
    """
    chats = {key: chat for chat in map(json.loads, held_out) if (key := _question_of(chat))}
    if not 0 < count <= len(chats):
        rows = f"the held-out rows have {len(chats):,} different questions"
        raise TooManyQuestions(count, len(chats), rows)
    drawn = random.Random(SPLIT_SEED).sample(list(chats.values()), count)
    of_train = Counter(_answer_of(json.loads(line)) for line in train)
    expected = [_answer_of(chat) for chat in drawn]
    every = of_train + Counter(_answer_of(chat) for chat in chats.values())
    score: Literal["exact", "json", "contains"] = "contains"
    if all(isinstance(_as_object(answer), dict) for answer in every):
        score = "json"
    elif find_labels(every):
        score = "exact"
    lines = []
    for chat, answer in zip(drawn, expected, strict=True):
        value = _as_object(answer) if score == "json" else answer
        question = {"messages": chat["messages"][:-1], "expected": value}
        lines.append(json.dumps(question, ensure_ascii=False).encode(errors="surrogatepass"))
    usual = of_train.most_common(1)[0][0]
    extra = EXTRA_TOKENS_OF_A_LABEL if score == "exact" else EXTRA_TOKENS
    longest = max(len(answer.encode(errors="surrogatepass")) for answer in expected)
    return EvalSet(
        tuple(lines),
        score,
        min(MAX_ANSWER_TOKENS, longest + extra),
        (usual, expected.count(usual)),
        Counter(expected).most_common(1)[0],
    )


def _question_of(chat: dict[str, Any]) -> str:
    """All turns but the answer as one text; empty where no eval set can ask it."""
    turns = chat["messages"]
    is_plain = all(set(turn) == {"role", "content"} for turn in turns)
    roles = [turn["role"] for turn in turns[-2:]]
    if "tools" in chat or not is_plain or roles != ["user", "assistant"]:
        return ""
    return json.dumps(turns[:-1])


def _answer_of(chat: dict[str, Any]) -> str:
    return str(chat["messages"][-1].get("content"))


def _as_object(answer: str) -> Any:
    """The JSON object in an answer; None for any other text."""
    try:
        value = json.loads(answer)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
