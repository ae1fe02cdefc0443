"""Stop texts, looked for in an answer's text: one may begin or end inside a token.

mlx_lm.server looks for the tokens of a stop text, which are others where it begins or ends inside a
token, and cuts it out of the middle of an answer that goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.server import Response

from nested_core.models.generation import find_stop


@dataclass
class AnswerText:
    """The text of one answer up to the first stop text, a token at a time.

    tokenizer: mlx_lm's.
    stops: the stop texts.
    is_ended: whether the answer has ended, by a stop text or by the end-of-sequence token.
    """

    tokenizer: Any
    stops: Sequence[str]
    is_ended: bool = False
    _held_back: str = ""
    _detokenizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self._detokenizer = self.tokenizer.detokenizer

    def add(self, token: int) -> str:
        """Return the text that can be shown after one more token, without a possible stop text."""
        if token in self.tokenizer.eos_token_ids:
            self.is_ended = True
            return self.finish()
        self._detokenizer.add_token(token)
        self._held_back += self._detokenizer.last_segment
        self.is_ended, shown = find_stop(self._held_back, self.stops)
        text, self._held_back = self._held_back[:shown], self._held_back[shown:]
        return text

    def advance(self, token: int) -> bool:
        """Return whether the answer ends with one more token: what mlx_lm asks of a matcher."""
        self.add(token)
        return self.is_ended

    def finish(self) -> str:
        """Return the rest of the text, where no token follows."""
        self._detokenizer.finalize()
        text: str = self._held_back + self._detokenizer.last_segment
        starts = [start for stop in self.stops if (start := text.find(stop)) >= 0]
        self.is_ended = self.is_ended or bool(starts)
        return text[: min(starts, default=None)]


def cut_answer(responses: Iterable[Response], answer: AnswerText) -> Iterator[Response]:
    """Yield the same responses, with the text up to the first stop text.

    The last one is named "length", of which mlx_lm's handler shows all text: of one that is named
    "stop" it shows none. `answer.is_ended` says which of the two it is.
    """
    for response in responses:
        response.text = answer.add(response.token)
        if response.finish_reason is not None and not answer.is_ended:
            response.text += answer.finish()
        is_last = response.finish_reason is not None or answer.is_ended
        response.finish_reason = "length" if is_last else None
        yield response
        if is_last:
            return
