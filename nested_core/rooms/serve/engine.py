"""mlx_lm.server's model provider and generation thread, with versions of a registry as the models.

mlx_lm's thread takes requests from a queue in order. A request for another model than that of the
running batch waits until the batch has ended. Here a request holds the version that was served when
it came, so that a new champion changes no answer that has begun.
"""

from __future__ import annotations

import argparse
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import mlx.core as mx
import mlx_lm.server
from mlx.utils import tree_flatten
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    ModelDescription,
    ModelProvider,
    ResponseGenerator,
    TimeBudget,
    _make_logits_processors,
    _make_sampler,
)

from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import ConfigError, DataWorkerFailed
from nested_core.models.base_model import context_length, find_model_folder, naming_unloadable_model
from nested_core.models.tokenizer_cell import try_to_load, work_in_cell
from nested_core.rooms.serve.fair_batches import FIRST_TOKENS, FairBatchGenerator
from nested_core.rooms.serve.request_model import RequestRefused
from nested_core.rooms.serve.request_tokens import RequestTokenizer
from nested_core.rooms.serve.served_version import ServedVersion
from nested_core.rooms.serve.stop_texts import AnswerText, cut_answer

SECONDS_BETWEEN_LOOKS_AT_CLIENT = 1.0
CHECK_SECONDS_AT_A_TIME = 0.25  # of a version's canary, between two looks at the requests
STALL_SECONDS = 30.0  # without a token, a part of a prompt or a look at the requests
TURN_TOKENS = 16  # of an answer, after which those who wait for another version go first
TURN_TOKENS_BESIDE_NEW = 2  # the same, of a longer answer, where one who waits has no token yet
LONG_TURN_TOKENS = 256  # the same, where those who wait need its place alone
LARGE_TEXT = 2**14  # characters, of which tokens are made beside those of short ones
BATCH_SECONDS = 0.02  # of a batch, between two looks at the requests
SECONDS_TO_END = 3.0  # of the generation thread, once it is told to
CLIENT_IS_GONE = "the client did not wait for its answer"

mlx_lm.server.BatchGenerator = FairBatchGenerator  # type: ignore[misc]  # its thread makes one


@dataclass
class VersionedRequest(CompletionRequest):
    """mlx_lm's request, with the version that answers it.

    name: the registry's name that it is for.
    version: what was served for the name, or what the request asked for, when it came.
    count_token: called for each token of its answer.
    is_client_gone: whether nobody waits for the answer any more.
    tokenized: its prompt, as mlx_lm's `_tokenize` gives it, from before it is queued.
    answer: the text of its answer, from when the generation thread begins it.
    queue: where mlx_lm's thread puts its answer, from when it took the request.
    failure: why no answer could be begun.
    is_alone: whether mlx_lm answers nobody else meanwhile, as with a seed.
    turn: mlx_lm's GenerationContext of what its thread does for it; None before it begins a turn.
    given_tokens: how many tokens its turns have given.
    turn_tokens: how many its turn has; 0 while it waits for one.
    is_paused: whether the generation thread has ended its turn and not its answer.
    next_seed: of its next turn, which draws as this one would have gone on.
    looked_at: when it was last seen whether its client waits, by time.monotonic().
    is_gone: whether nobody waits any more.
    """

    name: str
    version: ServedVersion
    count_token: Callable[[], None]
    is_client_gone: Callable[[], bool]
    tokenized: tuple[Any, ...] = field(default=(), init=False)
    answer: AnswerText | None = field(default=None, init=False)
    queue: Queue[Any] | None = field(default=None, init=False)
    failure: Exception | None = field(default=None, init=False)
    is_alone: bool = field(default=False, init=False)
    turn: Any = field(default=None, init=False)
    given_tokens: int = field(default=0, init=False)
    turn_tokens: int = field(default=0, init=False)
    is_paused: bool = field(default=False, init=False)
    next_seed: int = field(default=0, init=False)
    looked_at: float = field(default_factory=time.monotonic, init=False)
    is_gone: bool = field(default=False, init=False)


@dataclass
class TurnMatcher:
    """What ends an answer for mlx_lm: its own matcher, or after TURN_TOKENS others who wait.

    So mlx_lm keeps the cache of what it computed, and goes on from there.
    """

    request: VersionedRequest
    of_answer: Any
    has_to_wait: Callable[[VersionedRequest], bool]
    random_state: Any = None

    def matcher(self) -> TurnMatcher:
        """Return itself: it is of one answer."""
        return self

    def advance(self, token: int) -> bool:
        """Return whether mlx_lm ends with one more token; the next one is drawn already."""
        request = self.request
        request.turn_tokens += 1
        request.given_tokens += 1
        state: Any = mx.random.state
        before, self.random_state = self.random_state, state[0]
        is_ended: bool = self.of_answer.advance(token)
        is_over = not is_ended and request.turn_tokens >= TURN_TOKENS_BESIDE_NEW
        request.is_paused = is_over and self.has_to_wait(request)
        if request.is_paused:
            high, low = before.tolist()
            request.next_seed = high << 32 | low
        return is_ended or request.is_paused


class PartialPromptCache(LRUPromptCache):
    """mlx_lm's prompt cache, which leaves the last tokens of a prompt to be computed.

    Where a prompt is exactly one that was cached, mlx_lm's leaves none, and its batches refuse a
    prompt without tokens with an error that ends the generation thread. An answer that it gives
    alone is penalised for the tokens that it computes, and not for those in the cache.
    left: how many tokens are left, of a prompt that has so many.
    count_paused: how many answers wait for their turn, whose caches are kept beside `max_size`.
    """

    left = 1
    count_paused: Callable[[], int]

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], **options: Any
    ) -> None:
        """Keep a cache, and drop those that are too many.

        It is kept for the tokens that all of its layers have: after an answer with a draft model,
        the draft's and the model's own lack some of the last ones.
        """
        layers = [layer for layer in prompt_cache if hasattr(layer, "offset")]
        known = min([len(tokens), *(int(layer.offset) for layer in layers)])
        if known < len(tokens):
            if not can_trim_prompt_cache(prompt_cache):
                return
            for layer in layers:
                layer.trim(int(layer.offset) - known)
        most, self.max_size = self.max_size, self.max_size + self.count_paused()
        super().insert_cache(model, tokens[:known], prompt_cache, **options)
        self.trim_to(n_sequences=self.max_size)
        self.max_size = most

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """Return the nearest cache, and the tokens that it lacks."""
        known = tokens[: max(0, len(tokens) - self.left)]
        cache, rest = super().fetch_nearest_cache(model, known) if known else (None, [])
        return cache, [*rest, *tokens[len(known) :]]


class VersionProvider(ModelProvider):
    """mlx_lm's model provider: the base is loaded once, and `load` chooses among versions on it.

    base: the base model, from `load_default` to `reset`.
    base_arrays: the arrays that it was loaded with, by id().
    vocabulary_size: of the logits.
    request_tokenizer: makes the tokens of clients' requests.
    """

    model: Any
    model_key: Any
    tokenizer: Any

    def __init__(self, options: argparse.Namespace) -> None:
        """`options` are those of mlx_lm.server; `model` there is the base's folder."""
        super().__init__(options)
        self.base: Any = None
        self.base_arrays: dict[int, mx.array] = {}
        self.vocabulary_size = 0
        self.request_tokenizer: Any = None

    def load_default(self) -> None:
        """Load the base, the first time. Raises ConfigError where it cannot be loaded."""
        if self.base is not None:
            return
        options = self.cli_args
        files = TokenizerSource(options.model, options.trust_remote_code).files
        try_to_load(files)  # in a process with limits, before it is loaded here
        if draft := options.draft_model:
            folder = str(find_model_folder(draft))
            try_to_load(TokenizerSource(folder, options.trust_remote_code).files)
        with naming_unloadable_model(Path(self.cli_args.model)):
            self._load(self.cli_args.model, None, self.cli_args.draft_model)
        work_in_cell(self.tokenizer, files, LARGE_TEXT)
        if template := self.cli_args.chat_template:  # the cell knows that of the folder alone
            inner = self.tokenizer._tokenizer
            inner.apply_chat_template = partial(inner.apply_chat_template, chat_template=template)
        self.base = self.model
        leaves: Any = tree_flatten(self.base.parameters())
        self.base_arrays = {id(array): array for _, array in leaves}
        self.vocabulary_size = self.base(mx.array([[0]])).shape[-1]  # traced, not computed
        context = context_length(Path(self.cli_args.model))
        self.request_tokenizer = RequestTokenizer(self.tokenizer, context)

    def load(
        self, model_path: str, adapter_path: Any = None, draft_model_path: str | None = None
    ) -> tuple[Any, Any]:
        """Return the model of the version that `adapter_path` holds, and the tokenizer.

        A prompt cache is looked up by `model_key`, which holds name and version.
        """
        version: ServedVersion = adapter_path
        key = (self.cli_args.model, version.label, self.cli_args.draft_model)
        if self.model_key != key:
            self.model = version.build_model(self.base)
            self.model_key = key
        return self.model, self.tokenizer

    def reset(self) -> None:
        """Drop the models; arrays are freed in the thread that made them."""
        super().reset()
        self.base = None
        self.base_arrays = {}


@dataclass
class _Check:
    """Steps that check a version, done in the generation thread between its other work."""

    steps: Iterator[None]
    outcome: Future[None] = field(default_factory=Future)


class VersionedGenerator(ResponseGenerator):
    """mlx_lm's generation thread, in which each request is answered by its own version.

    under_way: the clients' requests that have not ended, by their id().
    failure: what ended the thread, if anything did.
    """

    def __init__(self, provider: VersionProvider, prompt_cache: PartialPromptCache) -> None:
        """Begins to load the base at once; `require_ready` waits for it."""
        self.failure: Exception | None = None
        self.under_way: dict[int, VersionedRequest] = {}
        self._is_ready = threading.Event()
        self._seen_at = time.monotonic()  # when the generation thread was last seen at work
        self._checks: Queue[_Check] = Queue()
        self._check: _Check | None = None  # that the generation thread is at work on
        self._begun: VersionedRequest  # whose answer the generation thread is about to begin
        self._client = threading.local()  # the request of a client's thread
        self.model_provider: VersionProvider
        self.prompt_cache: PartialPromptCache
        prompt_cache.count_paused = lambda: sum(one.is_paused for one in [*self.under_way.values()])
        super().__init__(provider, prompt_cache)
        self._time_budget = TimeBudget(BATCH_SECONDS)

    def _run_generate(self) -> None:
        """Run as mlx_lm does; an error ends the answers under way, or without any the thread."""
        try:
            while not self._stop:
                try:
                    self._generate()
                except Exception as error:
                    self._end_requests_under_way(error)
        except Exception as error:  # it is told by whoever waits for the server's end
            logging.debug("the generation thread ended", exc_info=error)
            # Frames hold arrays, which have to be freed in the thread that made them.
            self.failure = error.with_traceback(None)
            self._generation_failed = True
            self.model_provider.reset()
        finally:
            self._check = None  # its canary holds arrays, too
            self._is_ready.set()

    def _end_requests_under_way(self, error: Exception) -> None:
        """End the requests at which mlx_lm's loop ended; without any raise the error."""
        taken = [request for request in list(self.under_way.values()) if request.queue is not None]
        if not taken:
            raise error
        logging.exception("the answers under way could not be generated", exc_info=error)
        for request in taken:
            self.forget(request)
            request.queue.put(RuntimeError(f"{type(error).__name__}: {error}"))  # type: ignore[union-attr]
        mx.random.seed(time.time_ns())  # which is unusable where sampling was interrupted

    @property
    def is_healthy(self) -> bool:
        """Whether the generation thread is there, and gets on."""
        return self.generation_available() and time.monotonic() - self._seen_at < STALL_SECONDS

    def stop_and_join(self) -> None:
        """Tell the generation thread to end, and wait some seconds; `has_ended` is how it went."""
        self._stop = True
        self._generation_thread.join(SECONDS_TO_END)

    @property
    def has_ended(self) -> bool:
        """Whether the generation thread is over."""
        return not self._generation_thread.is_alive()

    def require_ready(self) -> None:
        """Return when the base is loaded; raise what prevented that."""
        self._is_ready.wait()
        if self.failure is not None:
            raise self.failure

    def require_sound(self, version: ServedVersion) -> None:
        """Build a version's model and ask its canary; answers under way go on meanwhile.

        Raises CanaryFailed, or ConfigError where the adapter does not fit the base.
        """
        provider = self.model_provider
        check = _Check(version.check(provider.base, provider.base_arrays))
        self._checks.put(check)
        while not self._stop and self.generation_available():
            with suppress(TimeoutError):
                return check.outcome.result(timeout=0.2)
        raise RuntimeError("generation has ended")

    def _next_request(self, timeout: float | None = None) -> Any:
        self._is_ready.set()
        self._seen_at = time.monotonic()
        self._go_on_with_check()
        taken = super()._next_request(timeout if self._check is None else None)
        while taken is not None and taken[1].is_gone:
            taken[0].put(ConnectionAbortedError(CLIENT_IS_GONE))
            taken = super()._next_request()
        if taken is not None:
            taken[1].queue = taken[0]
        return taken

    def _await_response(self, response_queue: Queue[Any]) -> Any:
        """Return what comes next of an answer, in its client's thread, until the client is gone.

        Before a turn has begun the generation thread ends it: else it begins what nobody can stop.
        """
        request = self._client.request
        while True:
            now = time.monotonic()
            if now - request.looked_at > SECONDS_BETWEEN_LOOKS_AT_CLIENT:
                request.looked_at = now
                request.is_gone = request.is_gone or request.is_client_gone()
            if request.is_gone and request.turn is not None:
                raise ConnectionAbortedError(CLIENT_IS_GONE)
            with suppress(Empty):
                return response_queue.get(timeout=SECONDS_BETWEEN_LOOKS_AT_CLIENT)
            if not self.generation_available():
                raise RuntimeError("generation thread died")

    def _go_on_with_check(self) -> None:
        """Do some steps of the check that is next."""
        if self._check is None:
            with suppress(Empty):
                self._check = self._checks.get_nowait()
        if (check := self._check) is None:
            return
        deadline = time.monotonic() + CHECK_SECONDS_AT_A_TIME
        try:
            for _ in check.steps:
                if time.monotonic() > deadline:
                    return
            check.outcome.set_result(None)
        except Exception as error:
            check.outcome.set_exception(error.with_traceback(None))  # whose frames hold arrays
        self._check = None

    def _tokenize(self, tokenizer: Any, request: VersionedRequest, args: Any) -> Any:
        """Return what `_prepare` made of the prompt; `_make_state_machine` is called next."""
        if request.is_gone:
            raise ConnectionAbortedError(CLIENT_IS_GONE)
        self._begun = request
        of = args.logits
        sizes = of.repetition_context_size, of.presence_context_size, of.frequency_context_size
        looked_back = max(size or len(request.tokenized[0]) for size in sizes)
        self.prompt_cache.left = looked_back if request.is_alone else 1
        return request.tokenized

    def _make_state_machine(
        self, model_key: Any, tokenizer: Any, stop_words: Sequence[str]
    ) -> tuple[Any, Any]:
        """Do as mlx_lm, but look for stop texts in the text and not among the tokens."""
        sequences, text_states = super()._make_state_machine(model_key, tokenizer, [])
        matcher = AnswerText(tokenizer, stop_words) if stop_words else sequences.matcher()
        return TurnMatcher(self._begun, matcher, self._has_to_wait), text_states

    def _prepare(self, request: VersionedRequest, args: GenerationArguments) -> None:
        """Tokenise a prompt, and make all that its request sets, in the client's thread.

        What is raised later ends the generation thread, and what mlx_lm raises while it samples
        leaves mlx's random state unusable. A bias for a token that does not exist writes out of
        an array's bounds. Raises RequestRefused, whatever it was that could not be made.
        """
        tokenizer = self.model_provider.request_tokenizer
        try:
            tokenizer.require_known_arguments(args.chat_template_kwargs)
            self._require_in_bounds(args)
            tokenized = super()._tokenize(tokenizer, request, args)
            prompt, vision = tokenized[0], tokenized[-1]
            if not prompt:
                raise RequestRefused("The prompt has no tokens. Give a prompt that is not empty.")
            tokenizer.require_room(len(prompt), "tokens", 1)
            args.max_tokens = min(args.max_tokens, tokenizer.room_after(prompt))
            request.is_alone = vision is not None or not self._is_batchable(args)
            if vision is not None:
                mx.eval(vision.pixel_values)
            _make_sampler(args, tokenizer)
            _make_logits_processors(args)
        except RequestRefused:
            raise
        except (ConfigError, DataWorkerFailed) as error:  # the process that makes tokens ended
            logging.exception("no tokens could be made of a prompt")
            failure = RuntimeError if isinstance(error, DataWorkerFailed) else ConfigError
            raise failure("The server could not read the prompt. Its log says why.") from None
        except Exception as error:
            raise RequestRefused(
                f"The prompt cannot be read: {type(error).__name__}: {error}"
            ) from None
        request.tokenized = tokenized

    def _require_in_bounds(self, args: GenerationArguments) -> None:
        """Raise RequestRefused for numbers of tokens that the model does not have."""
        size = self.model_provider.vocabulary_size
        if args.sampling.top_k >= size:
            raise RequestRefused(f"top_k must be below {size}")
        if any(not 0 <= token < size for token in args.logits.logit_bias or ()):
            raise RequestRefused(f"logit_bias must name tokens from 0 to {size - 1}")

    def generate(
        self,
        request: Any,  # a VersionedRequest
        generation_args: GenerationArguments,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> tuple[Any, Iterator[Any]]:
        """Generate as mlx_lm does, by the request's version. Call `forget` when it has ended."""

        def note_progress(processed: int, total: int) -> None:
            self._seen_at = time.monotonic()
            if progress_callback is not None:
                progress_callback(processed, total)

        version = request.version
        generation_args.model = ModelDescription(version.label, "default_model", version)
        self._client.request = request
        try:
            self._prepare(request, generation_args)
            self.under_way[id(request)] = request
            turns = self._take_turns(request, generation_args, note_progress)
            context = next(turns)
        except Exception as error:
            request.failure = error
            raise
        request.answer = AnswerText(self.model_provider.tokenizer, generation_args.stop_words)
        return context, cut_answer(self._watch(request, turns), request.answer)

    def _take_turns(
        self, request: VersionedRequest, args: GenerationArguments, progress: Any
    ) -> Iterator[Any]:
        """Yield mlx_lm's context of an answer, then its tokens.

        After each TURN_TOKENS it waits as a new request does, if others have to wait for it.
        """
        tokens: list[int] = []
        while True:
            request.turn_tokens = 0
            request.turn = None
            request.turn, responses = super().generate(request, args, progress)
            if not tokens:
                yield request.turn
            tokens, is_paused = [], False
            for response in responses:
                tokens.append(response.token)
                is_paused = request.is_paused and len(tokens) < args.max_tokens
                response.finish_reason = None if is_paused else response.finish_reason
                yield response
            if not is_paused:
                return
            prompt, others = [*request.tokenized[0], *tokens], request.tokenized[3:]
            request.tokenized = (prompt, [prompt], ["assistant"], *others)
            seed = None if args.seed is None else request.next_seed
            args = replace(args, max_tokens=args.max_tokens - len(tokens), seed=seed)

    def _has_to_wait(self, request: VersionedRequest) -> bool:
        """Return whether a request waits for the place of this one."""
        requests = list(self.under_way.values())
        waiting = [one for one in requests if one.turn_tokens == 0]
        if request.tokenized[-1] is not None:
            return False
        options, turn_tokens = self.cli_args, request.turn_tokens
        is_longer = request.given_tokens >= FIRST_TOKENS
        if any(
            (request.is_alone or other.is_alone or other.version != request.version)
            and (turn_tokens >= TURN_TOKENS or (is_longer and other.given_tokens == 0))
            for other in waiting
        ):
            return True
        free = max(options.decode_concurrency, options.prompt_concurrency) - sum(
            one.turn_tokens > 0 and one.given_tokens >= FIRST_TOKENS and not one.is_paused
            for one in requests
        )
        is_long = turn_tokens >= LONG_TURN_TOKENS and any(one.given_tokens for one in waiting)
        return is_longer and free <= (0 if is_long else -1)

    def _watch(self, request: VersionedRequest, responses: Iterator[Any]) -> Iterator[Any]:
        """Yield the same tokens, counted."""
        for response in responses:
            self._seen_at = time.monotonic()
            request.count_token()
            yield response

    def forget(self, request: VersionedRequest) -> None:
        """Note that the request has ended, however it did."""
        request.is_gone = True
        if request.turn is not None:
            request.turn.stop()
        self.under_way.pop(id(request), None)
