"""Generate a language model's answers to prompts: greedily or sampled, many at a time.

Batches are mlx_lm's own (mlx_lm.generate.BatchGenerator): prompts join as there is room, and each
answer ends by itself. A model that mlx_lm cannot batch correctly answers one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nested_core.errors import ConfigError
from nested_core.models.base_model import count_embedding_rows, describe_token_beyond
from nested_core.models.chat_template import Detokenizer, Messages, Tokenizer, chat_template_of
from nested_core.records.dataset import PromptFormat

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

BATCH_SIZE = 32
MIN_TOKENS_OF_REPEATED_ANSWER = 4
BATCHING_TEST_PROMPTS = ((1, 2, 3, 4, 5, 6, 7), (7, 3), (5, 4, 3, 2))
ROUNDING_TOLERANCE = 16  # in units of the dtype's epsilon, relative to the largest log-probability
SMALLEST_EPSILON = 2.0**-18  # 30 layers in float32 add up to 44 of its own 2.0**-23
_CAN_BATCH: dict[tuple[type, str], bool] = {}  # cache of `can_batch`, by class and arguments
OnAnswered = Callable[[int], None]
Sampler = Callable[["mx.array"], "mx.array"] | None


@dataclass(frozen=True)
class Sampling:
    """How answers are generated.

    max_tokens: the most tokens of an answer, not counting the end-of-sequence token.
    stop: texts at which an answer ends; they are not part of it.
    temperature: 0 takes the likeliest token; above it, tokens are drawn at random.
    seed: the seed of the draws.
    """

    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """An answer that a model generated.

    text: the text before the first stop text.
    tokens: how many tokens were generated, not counting the end-of-sequence token.
    is_endless: whether it was cut off at max_tokens, or at the end of the model's context.
    is_repeated: whether it is a single token, repeated.
    repeated_tokens: the length of the longest run that repeats one token or one pair of tokens.
    """

    text: str
    tokens: int
    is_endless: bool
    is_repeated: bool
    repeated_tokens: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether the text is only white space."""
        return not self.text.strip()


def answer_prompts(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    context: int | None = None,
    on_answered: OnAnswered | None = None,
) -> list[Answer]:
    """Generate an answer to each prompt, given as token ids, in the order of the prompts.

    context: the most tokens that the model can see, prompt and answer together; an answer ends
        there.
    on_answered: called with the number of prompts answered so far.

    A prompt must have at least one token. Raises ConfigError for a token beyond the model's
    embedding. Restores mlx's random state.
    """
    require_rows_for(prompts, model, tokenizer)
    limit = sampling.max_tokens
    unfinished = [
        _Unfinished(
            prompt=list(prompt),
            limit=limit if context is None else min(limit, context - len(prompt)),
            stop=sampling.stop,
            detokenizer=tokenizer.detokenizer,
        )
        for prompt in prompts
    ]
    answer = _answer_in_batches if can_batch(model) else _answer_one_by_one
    with _using_seed(sampling.seed):
        finished = answer(model, tokenizer.eos_token_ids, unfinished, make_sampler_of(sampling))
        for count, _ in enumerate(finished, start=1):
            if on_answered is not None:
                on_answered(count)
    return [answer.finish() for answer in unfinished]


def read_answer(tokenizer: Tokenizer, tokens: Sequence[int], sampling: Sampling) -> Answer:
    """Decode generated token ids into an Answer, cut off at the first stop text.

    `tokens` must not include the end-of-sequence token.
    """
    answer = _Unfinished([], sampling.max_tokens, sampling.stop, tokenizer.detokenizer)
    for token in tokens:
        answer.add(token)
    answer.is_endless = len(tokens) >= sampling.max_tokens
    return answer.finish()


def encode_messages(tokenizer: Tokenizer, messages: Messages, tools: object = None) -> list[int]:
    """Encode a chat up to where the answer begins, as mlx_lm.generate encodes a prompt.

    Without a chat template, the contents of the messages are joined by newlines.
    """
    if tokenizer.has_chat_template:
        template = chat_template_of(tokenizer)
        return template.tokenize(template.prepare(messages), tools, add_generation_prompt=True)
    return list(tokenizer.encode("\n".join(str(message["content"]) for message in messages)))


def encode_prompt(tokenizer: Tokenizer, prompt: str, rows: PromptFormat | None = None) -> list[int]:
    """Encode a text as the prompts of training rows are formatted.

    rows: how they begin; None if unknown, which is a chat without a system text.
    """
    asked_as = rows or PromptFormat()
    if not asked_as.is_chat:
        return list(tokenizer.encode(prompt))
    return encode_messages(tokenizer, asked_as.ask(prompt), asked_as.tools)


def require_rows_for(
    prompts: Sequence[Sequence[int]], model: nn.Module, tokenizer: Tokenizer
) -> None:
    """Raise ConfigError for a token beyond the model's embedding, if the embedding is known."""
    largest = [max(prompt, default=0) for prompt in prompts]
    if problem := describe_token_beyond(tokenizer, largest, count_embedding_rows(model)):
        raise ConfigError(f"The prompt cannot be read by this model: {problem}.")


@dataclass
class _Unfinished:
    """A prompt and the tokens generated for it so far.

    limit: the most tokens to generate.
    """

    prompt: list[int]
    limit: int
    stop: tuple[str, ...]
    detokenizer: Detokenizer
    tokens: list[int] = field(default_factory=list)
    is_endless: bool = False

    def add(self, token: int) -> None:
        """Append a generated token, which must not be the end-of-sequence token."""
        self.tokens.append(token)
        self.detokenizer.add_token(token)

    @property
    def has_stopped(self) -> bool:
        """Whether the text contains a stop text."""
        return find_stop(self.detokenizer.text, self.stop)[0]

    def finish(self) -> Answer:
        """Return the answer, cut off at the first stop text."""
        self.detokenizer.finalize()
        text: str = self.detokenizer.text
        ends = [position for stop in self.stop if (position := text.find(stop)) >= 0]
        is_endless = self.is_endless and not ends
        is_repeated = (
            len(self.tokens) >= MIN_TOKENS_OF_REPEATED_ANSWER and len(set(self.tokens)) == 1
        )
        return Answer(
            text[: min(ends, default=None)],
            len(self.tokens),
            is_endless,
            is_repeated,
            _count_repeated_tokens(self.tokens),
        )


def find_stop(text: str, stops: Sequence[str]) -> tuple[bool, int]:
    """Return whether an unfinished answer ends at a stop text, and how many characters to show.

    Characters that may begin a stop text are held back. The answer ends at the stop text that
    begins first. So a complete stop text waits for a longer one that began before it: with the
    stops "riga" and "g", nothing of "rig" is shown yet.
    """
    starts = [start for stop in stops if (start := text.find(stop)) >= 0]
    longest = max(map(len, stops), default=0)
    # A stop text may have begun within the last `longest - 1` characters.
    possible = (
        start
        for start in range(max(0, len(text) - longest + 1), len(text))
        if any(stop.startswith(text[start:]) for stop in stops)
    )
    first_possible = next(possible, len(text))
    return bool(starts) and min(starts) <= first_possible, min([*starts, first_possible])


def _count_repeated_tokens(tokens: Sequence[int]) -> int:
    """Return the length of the longest run that repeats one token or one pair; 0 without repeats.

    `[5, 7, 7, 7, 2]` gives 3, `[1, 2, 1, 2]` gives 4.
    """
    longest = 0
    for period in (1, 2):
        length = period
        for earlier, token in zip(tokens, tokens[period:], strict=False):
            length = length + 1 if earlier == token else period
            if length >= 2 * period:
                longest = max(longest, length)
    return longest


def _answer_in_batches(
    model: nn.Module, ends: Collection[int], unfinished: Sequence[_Unfinished], sampler: Sampler
) -> Iterator[_Unfinished]:
    """Generate the answers in batches of BATCH_SIZE, and yield each when it is complete.

    `ends` are the end-of-sequence tokens.
    """
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(
        model,
        stop_tokens=[[end] for end in ends],
        sampler=sampler,
        completion_batch_size=BATCH_SIZE,
    )
    try:
        uids = generator.insert(
            [answer.prompt for answer in unfinished], [answer.limit for answer in unfinished]
        )
        by_uid = dict(zip(uids, unfinished, strict=True))
        while responses := generator.next_generated():
            stopped = []
            for response in responses:
                answer = by_uid[response.uid]
                answer.is_endless = response.finish_reason == "length"
                if response.finish_reason != "stop":  # "stop": the end-of-sequence token
                    answer.add(response.token)
                if response.finish_reason is None and answer.has_stopped:
                    stopped.append(response.uid)
                if response.finish_reason is not None or stopped[-1:] == [response.uid]:
                    yield answer
            if stopped:
                generator.remove(stopped)
    finally:
        generator.close()


def _answer_one_by_one(
    model: nn.Module, ends: Collection[int], unfinished: Sequence[_Unfinished], sampler: Sampler
) -> Iterator[_Unfinished]:
    """Generate the answers one prompt at a time, and yield each when it is complete."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    for answer in unfinished:
        steps = generate_step(
            mx.array(answer.prompt), model, max_tokens=answer.limit, sampler=sampler
        )
        answer.is_endless = True
        for token, _ in steps:
            if int(token) in ends:
                answer.is_endless = False
                break
            answer.add(int(token))
            if answer.has_stopped:
                break
        yield answer


def can_batch(model: nn.Module) -> bool:
    """Whether mlx_lm's batches of unequal prompts give the model's log-probabilities unchanged.

    Not every cache can be batched, and some models misinterpret the mask of a batch: mlx_lm's Gemma
    2 raises, or with as many prompts as key heads it answers wrongly. This depends on the model's
    code and not on its weights, so each class is tried once with its arguments.
    """
    arguments = getattr(model, "args", None)
    if arguments is None:
        return _try_to_batch(model)
    key = type(model), repr(arguments)
    if key not in _CAN_BATCH:
        _CAN_BATCH[key] = _try_to_batch(model)
    return _CAN_BATCH[key]


def _try_to_batch(model: nn.Module) -> bool:
    """Whether two tokens after each of BATCHING_TEST_PROMPTS are the same in a batch and alone."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    if not all(hasattr(cache, "merge") for cache in make_prompt_cache(model)):
        return False
    try:
        batched = _test_prompt_logprobs_in_a_batch(model)
    except (ValueError, TypeError, AttributeError, NotImplementedError):
        return False
    for prompt, rows in zip(BATCHING_TEST_PROMPTS, batched, strict=True):
        steps = generate_step(mx.array(prompt), model, max_tokens=len(rows))
        expected = mx.stack([row for _, row in steps])
        epsilon = max(SMALLEST_EPSILON, float(mx.finfo(expected.dtype).eps))
        bound = ROUNDING_TOLERANCE * epsilon * mx.abs(expected).max()
        if not bool(mx.all(mx.abs(mx.stack(rows) - expected) <= bound).item()):
            return False
    return True


def _test_prompt_logprobs_in_a_batch(model: nn.Module) -> list[list[mx.array]]:
    """Return log-probabilities of two greedy tokens after each of BATCHING_TEST_PROMPTS.

    All prompts are in one batch.
    """
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(model, max_tokens=2)
    try:
        uids = generator.insert([list(prompt) for prompt in BATCHING_TEST_PROMPTS])
        rows: dict[int, list[mx.array]] = {uid: [] for uid in uids}
        while responses := generator.next_generated():
            for response in responses:
                rows[response.uid].append(response.logprobs)
    finally:
        generator.close()
    return [rows[uid] for uid in uids]


def make_sampler_of(sampling: Sampling) -> Sampler:
    """Return mlx-lm's sampler for a temperature; None is greedy."""
    from mlx_lm.sample_utils import make_sampler

    return make_sampler(temp=sampling.temperature) if sampling.temperature else None


@contextmanager
def _using_seed(seed: int) -> Iterator[None]:
    """Within the block, draw random numbers from `seed`; then restore mlx's random state."""
    import mlx.core as mx

    random: Any = mx.random  # `random.state` is a list with one key
    key = mx.array(random.state[0])
    mx.eval(key)
    random.seed(seed)
    try:
        yield
    finally:
        random.state[0][:] = key
