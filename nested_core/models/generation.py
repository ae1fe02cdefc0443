"""Answers of a language model to prompts: greedy or sampled, many at a time.

The batches are mlx_lm's own (mlx_lm.generate.BatchGenerator), with the prompts in as they come and
each answer ending by itself. A model that mlx_lm cannot batch soundly answers one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nested_core.errors import ConfigError
from nested_core.models.base_model import count_embedding_rows, describe_token_beyond
from nested_core.models.chat_template import chat_template_of

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

BATCH_SIZE = 32
MIN_TOKENS_OF_REPEATED_ANSWER = 4
BATCHING_TEST_PROMPTS = ((1, 2, 3, 4, 5, 6, 7), (7, 3), (5, 4, 3, 2))
ROUNDING_TOLERANCE = 16  # in units of the dtype's epsilon, relative to the largest log-probability
SMALLEST_EPSILON = 2.0**-18  # 30 layers in float32 add up to 44 of its own 2.0**-23
_CAN_BATCH: dict[tuple[type, str], bool] = {}  # by a model's class and arguments
OnAnswered = Callable[[int], None]
Sampler = Callable[["mx.array"], "mx.array"] | None


@dataclass(frozen=True)
class Sampling:
    """How answers are generated.

    max_tokens: of an answer, its end not counted.
    stop: texts at which an answer ends; they are not part of it.
    temperature: 0 takes the likeliest token; above it, tokens are drawn.
    seed: of those draws.
    """

    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What a model said.

    text: without the stop and what came after it.
    tokens: how many were generated, without the end of the text.
    is_endless: it was cut off at max_tokens, or at the end of the model's context.
    is_repeated: it is one token, again and again.
    repeated_tokens: how many tokens in a row are one token, or one pair, again and again.
    """

    text: str
    tokens: int
    is_endless: bool
    is_repeated: bool
    repeated_tokens: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to read in it."""
        return not self.text.strip()


def answer_prompts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    context: int | None = None,
    on_answered: OnAnswered | None = None,
) -> list[Answer]:
    """Answer each prompt, given in token ids, of which it must have at least one.

    Raises ConfigError for a token that the model has no row for.

    `context` is the most tokens that the model can see, prompt and answer together: an answer ends
    there. The random state of mlx is as it was afterwards. `on_answered` gets the number of prompts
    answered so far.
    """
    _require_rows_for(prompts, model, tokenizer)
    longest = sampling.max_tokens
    unfinished = [
        _UnfinishedAnswer(
            prompt=list(prompt),
            limit=longest if context is None else min(longest, context - len(prompt)),
            stop=sampling.stop,
            detokenizer=tokenizer.detokenizer,
        )
        for prompt in prompts
    ]
    answer = _answer_in_batches if can_batch(model) else _answer_one_by_one
    with _using_seed(sampling.seed):
        finished = answer(model, tokenizer.eos_token_ids, unfinished, _make_sampler(sampling))
        for count, _ in enumerate(finished, start=1):
            if on_answered is not None:
                on_answered(count)
    return [answer.finish() for answer in unfinished]


def read_answer(tokenizer: Any, tokens: Sequence[int], sampling: Sampling) -> Answer:
    """The answer that these tokens are, up to the first stop; its end is not among them."""
    answer = _UnfinishedAnswer([], sampling.max_tokens, sampling.stop, tokenizer.detokenizer)
    for token in tokens:
        answer.add(token)
    answer.is_endless = len(tokens) >= sampling.max_tokens
    return answer.finish()


def encode_messages(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The tokens of a chat up to where an answer begins, as mlx_lm.generate encodes a prompt.

    Without a chat template it is the text of the messages, one after the other.
    """
    if tokenizer.has_chat_template:
        template = chat_template_of(tokenizer)
        return template.tokenize(template.prepare(messages), add_generation_prompt=True)
    return list(tokenizer.encode("\n".join(str(message["content"]) for message in messages)))


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of one question of a user."""
    return encode_messages(tokenizer, [{"role": "user", "content": prompt}])


def stream_answer(
    model: nn.Module, tokenizer: Any, prompt: Sequence[int], sampling: Sampling
) -> Iterator[str]:
    """The answer to one prompt as it comes, in pieces of text; its stops are not looked for.

    Each piece is computed when it is asked for. Raises ConfigError as `answer_prompts` does.
    """
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    _require_rows_for([prompt], model, tokenizer)
    detokenizer = tokenizer.detokenizer
    steps = generate_step(
        mx.array(list(prompt)),
        model,
        max_tokens=sampling.max_tokens,
        sampler=_make_sampler(sampling),
    )
    for token, _ in steps:
        if int(token) in tokenizer.eos_token_ids:
            break
        detokenizer.add_token(int(token))
        yield detokenizer.last_segment
    detokenizer.finalize()
    yield detokenizer.last_segment


def _require_rows_for(prompts: Sequence[Sequence[int]], model: nn.Module, tokenizer: Any) -> None:
    """Raise ConfigError for a token beyond the embedding of the model, if it has one."""
    largest = [max(prompt, default=0) for prompt in prompts]
    if problem := describe_token_beyond(tokenizer, largest, count_embedding_rows(model)):
        raise ConfigError(f"The prompt cannot be read by this model: {problem}.")


@dataclass
class _UnfinishedAnswer:
    """A prompt and the tokens of its answer so far."""

    prompt: list[int]
    limit: int
    stop: tuple[str, ...]
    detokenizer: Any
    tokens: list[int] = field(default_factory=list)
    is_endless: bool = False

    def add(self, token: int) -> None:
        """One more token, which is not the end of the text."""
        self.tokens.append(token)
        self.detokenizer.add_token(token)

    @property
    def has_stopped(self) -> bool:
        """Whether its text has come to a stop."""
        return find_stop(self.detokenizer.text, self.stop)[0]

    def finish(self) -> Answer:
        """The answer, cut off at the first stop."""
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
    """Whether an unfinished answer ends at a stop text, and how many characters can be shown.

    The answer ends before the stop text that begins first, so that one which is complete waits for
    a longer one that began before it: of "riga" and "g" with the text "rig" nothing is shown yet.
    """
    starts = [start for stop in stops if (start := text.find(stop)) >= 0]
    longest = max(map(len, stops), default=0)
    possible = (
        start
        for start in range(max(0, len(text) - longest + 1), len(text))
        if any(stop.startswith(text[start:]) for stop in stops)
    )
    first_possible = next(possible, len(text))
    shown = min([*starts, first_possible])
    return bool(starts) and min(starts) <= first_possible, shown


def _count_repeated_tokens(tokens: Sequence[int]) -> int:
    """The longest row of tokens that repeats one token or one pair; 0 where nothing is repeated."""
    longest = 0
    for period in (1, 2):
        length = period
        for earlier, token in zip(tokens, tokens[period:], strict=False):
            length = length + 1 if earlier == token else period
            if length >= 2 * period:
                longest = max(longest, length)
    return longest


def _answer_in_batches(
    model: nn.Module,
    ends: Collection[int],
    unfinished: Sequence[_UnfinishedAnswer],
    sampler: Sampler,
) -> Iterator[_UnfinishedAnswer]:
    """Fill the answers, BATCH_SIZE at a time, and yield each when it is done."""
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
                if response.finish_reason != "stop":
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
    model: nn.Module,
    ends: Collection[int],
    unfinished: Sequence[_UnfinishedAnswer],
    sampler: Sampler,
) -> Iterator[_UnfinishedAnswer]:
    """The same, a prompt at a time."""
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
    """Whether mlx_lm's batches of unequal prompts give this model's own log-probabilities.

    Not every cache can be batched, and some models take the mask of a batch for something else:
    mlx_lm's Gemma 2 raises, or with as many prompts as key heads it answers wrongly. That lies in
    the model's code and not in its weights, so each class with its arguments is tried once.
    """
    arguments = getattr(model, "args", None)
    if arguments is None:
        return _try_to_batch(model)
    key = type(model), repr(arguments)
    if key not in _CAN_BATCH:
        _CAN_BATCH[key] = _try_to_batch(model)
    return _CAN_BATCH[key]


def _try_to_batch(model: nn.Module) -> bool:
    """Whether two tokens after each of BATCHING_TEST_PROMPTS are alike in a batch and alone."""
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
        alone = [row for _, row in generate_step(mx.array(prompt), model, max_tokens=len(rows))]
        expected = mx.stack(alone)
        epsilon = max(SMALLEST_EPSILON, float(mx.finfo(expected.dtype).eps))
        bound = ROUNDING_TOLERANCE * epsilon * mx.abs(expected).max()
        if not bool(mx.all(mx.abs(mx.stack(rows) - expected) <= bound).item()):
            return False
    return True


def _test_prompt_logprobs_in_a_batch(model: nn.Module) -> list[list[mx.array]]:
    """Log-probabilities of two greedy tokens after each of BATCHING_TEST_PROMPTS, in one batch."""
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


def _make_sampler(sampling: Sampling) -> Sampler:
    from mlx_lm.sample_utils import make_sampler

    return make_sampler(temp=sampling.temperature) if sampling.temperature else None


@contextmanager
def _using_seed(seed: int) -> Iterator[None]:
    """Draw from a seed, and put mlx's random state back as it was."""
    import mlx.core as mx

    random: Any = mx.random  # its state is a list of one key
    key = mx.array(random.state[0])
    mx.eval(key)
    random.seed(seed)
    try:
        yield
    finally:
        random.state[0][:] = key
