"""mlx_lm's batches of answers, in which many long answers do not make a short one slow.

A step of 32 answers can take as long as 14 steps of one. Where it takes that much longer, the
answers that have few tokens are a batch of their own, which has most of the time.
"""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch

FIRST_TOKENS = 64  # of an answer, that go before those of longer answers
SLOW_STEP = 2.5  # steps of few answers, which one of the longer answers takes, to be kept apart
FIRST_SHARE = 2.0  # seconds for first tokens, to one second for the longer answers


class FairBatchGenerator(BatchGenerator):
    """mlx_lm's, with a second batch, of the longer answers.

    It has as many places as mlx_lm's, and those that wait for one go by the tokens that they had.
    The first batch takes `prefill_batch_size` new answers more.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Takes what mlx_lm's takes; of each answer's `stop_sequences` a TurnMatcher is made."""
        super().__init__(*arguments, **options)
        self._places = self.completion_batch_size
        self._longer = GenerationBatch.empty(self.model, self.sampler)
        self._longer_due = 0.0  # when their next step is, by time.monotonic()
        self._longer_seconds = 0.0  # of their last step
        self._smallest_step = (math.inf, math.inf)  # its answers and seconds, of those seen
        self._is_first_again = False  # whether the last step was of first tokens, too
        self._gone: set[int] = set()  # the uids that were told and are not removed yet

    def _next(self) -> tuple[list[Any], list[Any]]:
        """Do a step of the first batch, or one of the longer answers where it is due."""
        if gone := self._find_gone():  # who takes these responses removes them
            return [PromptProcessingBatch.Response(uid, (0, 1), False, False) for uid in gone], []
        first, longer = self._generation_batch, self._longer
        waiting = sorted(self._unprocessed_sequences, key=_given_tokens)
        new = sum(_given_tokens(one) < FIRST_TOKENS for one in waiting)
        admitted = new + max(0, self._places - len(longer) - len(first))
        self._unprocessed_sequences = deque(waiting[:admitted])
        self.completion_batch_size = self._places + self.prefill_batch_size - len(longer)
        has_room = len(first) < self.completion_batch_size
        has_first = first.uids or (has_room and (self._currently_processing or waiting[:admitted]))
        began = time.monotonic()
        if has_first and (not longer.uids or began < self._longer_due):
            prompts, answers = super()._next()
            if self._is_first_again and answers and not prompts:
                step = len(answers), time.monotonic() - began
                self._smallest_step = min(self._smallest_step, step)
            self._is_first_again = True
        else:
            prompts, answers = [], longer.next()
            if has_first and longer.uids:
                mx.eval(longer._next_tokens)  # in their time, so that the first do not wait for it
            ended = time.monotonic()
            self._longer_seconds = ended - began
            self._longer_due = ended + FIRST_SHARE * self._longer_seconds
            self._is_first_again = False
        self._unprocessed_sequences.extend(waiting[admitted:])
        self._join()
        return prompts, answers

    def _find_gone(self) -> list[int]:
        """Return, once each, the uids of those without a token yet whose clients are gone."""
        waiting = [(one[0], one[-1]) for one in self._unprocessed_sequences]
        begun = zip(self._prompt_batch.uids, self._prompt_batch.stop_sequences, strict=True)
        turns = [(uid, matcher.request.turn) for uid, matcher in (*waiting, *begun)]
        told = self._gone
        self._gone = {uid for uid, turn in turns if turn is not None and turn._should_stop}
        return [*self._gone - told]

    def _join(self) -> None:
        """Put answers that have had their first tokens to the longer; all where that is quick."""
        first = self._generation_batch
        fewest, seconds = self._smallest_step
        is_slow = len(first) < fewest or self._longer_seconds > SLOW_STEP * seconds
        joining: list[int] = []
        staying: list[int] = []
        for index, matcher in enumerate(first._matchers):
            is_first = matcher.request.given_tokens < FIRST_TOKENS
            (staying if is_first and is_slow else joining).append(index)
        if joining:
            batch = copy.copy(first)
            batch.prompt_cache = copy.deepcopy(first.prompt_cache)
            batch.filter(joining)
            first.filter(staying)
            self._longer.extend(batch)

    def remove(self, uids: list[int], return_prompt_caches: bool = False) -> Any:
        """Remove answers, wherever they are."""
        longer = self._longer
        keep = [index for index, uid in enumerate(longer.uids) if uid not in uids]
        if len(keep) < len(longer):
            longer.filter(keep)
        return super().remove(uids, return_prompt_caches)

    @property
    def prompt_cache_nbytes(self) -> int:
        """The bytes of all caches."""
        longer = sum(cache.nbytes for cache in self._longer.prompt_cache)
        return int(super().prompt_cache_nbytes + longer)


def _given_tokens(sequence: Any) -> int:
    """Return how many tokens an answer that waits has had."""
    return int(sequence[-1].request.given_tokens)
