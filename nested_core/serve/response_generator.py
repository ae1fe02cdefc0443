"""mlx_lm.server's model provider and generation loop, with versions of a registry as the models.

mlx_lm runs one thread that takes requests from a queue in order. A request that names another model
than the running batch waits until the batch has ended, and requests after it wait behind it. Here a
request for NAME gets its version when that thread takes it. A swap to a new champion so happens
between two batches: what runs ends with the version it began with, and what comes later gets the
new one.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    LogitsProcessorArguments,
    ModelDescription,
    ModelProvider,
    ResponseGenerator,
    SamplingArguments,
    _make_logits_processors,
    _make_sampler,
    convert_chat,
    process_message_content,
)

from nested_core.errors import ConfigError, NestedTuneError
from nested_core.models.base_model import context_length
from nested_core.serve.canary_check import CanaryFailed, check_canary
from nested_core.serve.request_model import RequestRefused
from nested_core.serve.served_version import ServedVersion
from nested_core.serve.stop_texts import AnswerText, StopTexts, cut_answer
from nested_core.serve.user_text import encode_user_text_as_text

WARM_UP_PROMPT = "1"
RATE_WINDOW_SECONDS = 60
SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_BETWEEN_LOOKS_AT_CLIENT = 1.0
CANARY_SECONDS_AT_A_TIME = 0.25  # between two looks at the requests
WATCHED_REQUESTS = 200
MAX_FAILED_REQUESTS = 5  # of the first ones of a version
MAX_TIMES_AS_MANY = 2  # as failed before it, as a share of the requests
STALL_SECONDS = 30.0  # without a token, a part of a prompt or a look at the requests
SECONDS_TO_END = 3.0  # of the generation thread, once it is told to


class SwapWaitOver(Exception):
    """A request ran longer than a swap to a new version may wait."""


class TokenRate:
    """Tokens a second over the last minute, or since the beginning where that is later."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._by_second: deque[list[int]] = deque()  # [second, tokens], oldest first
        self.tokens = 0  # since the beginning

    def add_token(self) -> None:
        """Count one token now."""
        self.tokens += 1
        second = int(time.monotonic())
        if self._by_second and self._by_second[-1][0] == second:
            self._by_second[-1][1] += 1
        else:
            self._by_second.append([second, 1])
        self._drop_old(second)

    def per_second(self) -> float:
        """The mean rate, in tokens a second."""
        now = time.monotonic()
        self._drop_old(int(now))
        seconds = min(max(now - self._began, 1.0), RATE_WINDOW_SECONDS)
        return sum(tokens for _, tokens in self._by_second) / seconds

    def _drop_old(self, second: int) -> None:
        while self._by_second and self._by_second[0][0] <= second - RATE_WINDOW_SECONDS:
            self._by_second.popleft()


class FailureWatch:
    """Requests that failed in the server: of the first ones of a version, and of those before it.

    A failure is an error while an answer was generated: neither what the client did nor a swap that
    did not wait any longer. What failed before a version came is no fault of it.
    """

    def __init__(self) -> None:
        self._last: deque[bool] = deque(maxlen=WATCHED_REQUESTS)  # whether each of them failed
        self._is_watching = False
        self._share_before = 0.0
        self.watched = 0
        self.failed = 0

    def begin(self) -> None:
        """Watch the requests that are answered from now on."""
        self._is_watching = True
        self._share_before = sum(self._last) / max(len(self._last), 1)
        self.watched = 0
        self.failed = 0

    def end(self) -> None:
        """Watch no longer."""
        self._is_watching = False

    def add(self, *, has_failed: bool) -> None:
        """Count a request of the version that is served."""
        self._last.append(has_failed)
        if self._is_watching and not self.is_over:
            self.watched += 1
            self.failed += int(has_failed)

    @property
    def is_over(self) -> bool:
        """Whether as many requests were watched as are."""
        return self.watched >= WATCHED_REQUESTS

    @property
    def are_too_many(self) -> bool:
        """Whether the version's own requests failed too often, and more often than those before."""
        usual = MAX_TIMES_AS_MANY * self._share_before * self.watched
        return self._is_watching and self.failed > max(MAX_FAILED_REQUESTS, usual)


@dataclass
class NameStatus:
    """What is served for one name, as `/health` and the file under serving/ give it.

    since: when the version began to be served, UTC.
    requests: how many were begun for the name, for whichever version.
    last_swap_seconds: from finding the champion changed to its first token; None before any swap.
    swaps: how often another version began to be served.
    refused: a champion that is not served, with the reason; None where the champion is served.
    """

    current: ServedVersion
    since: datetime = field(default_factory=lambda: datetime.now(UTC))
    requests: int = 0
    last_swap_seconds: float | None = None
    swaps: int = 0
    refused: dict[str, str] | None = None
    rate: TokenRate = field(default_factory=TokenRate)
    failures: FailureWatch = field(default_factory=FailureWatch)

    def fields(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "version": self.current.version,
            "since": self.since.isoformat(timespec="seconds"),
            "requests": self.requests,
            "tokens_per_second": round(self.rate.per_second(), 3),
            "last_swap_seconds": self.last_swap_seconds,
            "refused": self.refused,
        }


@dataclass
class VersionedRequest(CompletionRequest):
    """mlx_lm's request, with the name that it is for and the version that answers it.

    pinned: the version that the request itself asked for; None for the champion.
    bound: the version that answers it, from when the generation thread took it.
    queue: where mlx_lm puts its answer, from then on.
    ended: why it is to end before its answer; None where it is not.
    is_begun: whether the generation thread makes its answer. is_answered: whether the client's
        thread has mlx_lm's context of it, by which that is stopped.
    is_client_gone: whether nobody waits for the answer any more.
    tokenized: its prompt, as mlx_lm's `_tokenize` gives it, from before it is queued.
    answer: the text of its answer, from when the generation thread begins it.
    failure: why no answer could be begun.
    has_failed: whether its answer failed in the server, while it was generated.
    """

    name: str = ""
    pinned: ServedVersion | None = None
    is_client_gone: Callable[[], bool] = lambda: False
    tokenized: tuple[Any, ...] | None = field(default=None, init=False)
    answer: AnswerText | None = field(default=None, init=False)
    bound: ServedVersion | None = field(default=None, init=False)
    queue: Queue[Any] | None = field(default=None, init=False)
    ended: SwapWaitOver | None = field(default=None, init=False)
    is_begun: bool = field(default=False, init=False)
    is_answered: bool = field(default=False, init=False)
    failure: Exception | None = field(default=None, init=False)
    has_failed: bool = field(default=False, init=False)


class RegistryPromptCache(LRUPromptCache):
    """mlx_lm's prompt cache, which leaves at least the last token of a prompt to be computed.

    Where a prompt is exactly one that was cached, mlx_lm's leaves none, and its batches refuse a
    prompt without tokens with an error that ends the generation thread.
    """

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """The nearest cache, and the tokens that it lacks: at least one."""
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if rest or not tokens:
            return cache, rest
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
        return cache, [*rest, tokens[-1]]


class RegistryModelProvider(ModelProvider):
    """mlx_lm's model provider: the base is loaded once, and `load` chooses among versions on it.

    base: the base model, from `load_default` to `reset`.
    base_arrays: the arrays that it was loaded with, by id().
    vocabulary_size: of the logits. longest_token: in bytes, of the tokenizer. context: the most
        tokens that the base can see; None where it is not known. Models are built and run in the
        generation thread.
    """

    model: Any
    model_key: Any
    tokenizer: Any

    def __init__(
        self,
        options: argparse.Namespace,
        prompt_cache: LRUPromptCache,
        initial: Sequence[ServedVersion],
    ) -> None:
        """`options` are those of mlx_lm.server; `model` there is the base's folder."""
        super().__init__(options)
        self._prompt_cache = prompt_cache
        self._initial = tuple(initial)
        self.base: Any = None
        self.base_arrays: dict[int, mx.array] = {}
        self.vocabulary_size = 0
        self.longest_token = 0
        self.context: int | None = None
        self._has_retired_version = False

    def load_default(self) -> None:
        """Load the base, and build the models that are served first; only the first time.

        Raises ConfigError where the base cannot be loaded or an adapter does not fit it.
        """
        if self.base is not None:
            return
        try:
            self._load(self.cli_args.model, None, self.cli_args.draft_model)
        except (OSError, ValueError, RuntimeError, LookupError, ImportError, TypeError) as error:
            raise ConfigError(
                f"model: {self.cli_args.model} could not be loaded: {error}"
            ) from error
        self.base = self.model
        leaves: Any = tree_flatten(self.base.parameters())
        self.base_arrays = {id(array): array for _, array in leaves}
        self.context = context_length(Path(self.cli_args.model))
        self.vocabulary_size = self.base(mx.array([[0]])).shape[-1]  # traced, not computed
        self.longest_token = max(len(str(text).encode()) for text in self.tokenizer.get_vocab())
        for version in self._initial:
            version.build_model(self.base)

    def retire_version(self) -> None:
        """Have the prompt caches dropped when the next version is loaded."""
        self._has_retired_version = True

    def load(
        self, model_path: str, adapter_path: Any = None, draft_model_path: str | None = None
    ) -> tuple[Any, Any]:
        """The model of the version that `adapter_path` holds, and the tokenizer.

        A prompt cache is looked up by `model_key`, which holds name and version.
        """
        version: ServedVersion = adapter_path
        key = (self.cli_args.model, version.label, self.cli_args.draft_model)
        if self.model_key != key:
            model = version.build_model(self.base)
            version.require_in_layers(model, self.base_arrays)
            self.model, self.model_key = model, key
            if self._has_retired_version:
                self._prompt_cache.trim_to(n_sequences=0)
                self._has_retired_version = False
        return self.model, self.tokenizer

    def reset(self) -> None:
        """Drop the models; arrays are freed in the thread that made them."""
        super().reset()
        self.base = None
        self.base_arrays = {}


@dataclass(frozen=True)
class _NotedQueue:
    """A request's queue, of which each thing that the generation thread puts there is noted."""

    queue: Queue[Any]
    note: Callable[[], None]

    def put(self, item: Any) -> None:
        """As the queue's."""
        self.note()
        self.queue.put(item)


@dataclass
class _Offer:
    """A version that is to be checked, and served from then on; and how that ended.

    is_to_be_served: false where it is only checked.
    check: the rest of its canary, from when the generation thread took it.
    """

    version: ServedVersion
    is_to_be_served: bool = True
    check: Iterator[None] | None = None
    is_taken: threading.Event = field(default_factory=threading.Event)
    is_settled: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


class RegistryResponseGenerator(ResponseGenerator):
    """mlx_lm's generation thread, with the version of each request bound when it is taken.

    names: what is served for each name.
    under_way: the requests that have a version and have not ended, by their id().
    failure: what ended the thread, if anything did.
    """

    def __init__(
        self,
        provider: RegistryModelProvider,
        prompt_cache: LRUPromptCache,
        initial: Sequence[ServedVersion],
    ) -> None:
        """Begins to load the base at once; `require_ready` waits for it."""
        self.names = {version.name: NameStatus(version) for version in initial}
        self.default_name = initial[0].name
        self.failure: Exception | None = None
        self._is_ready = threading.Event()
        self._seen_at = time.monotonic()  # when the generation thread was last seen at work
        self._offers: Queue[_Offer] = Queue()
        self._offer: _Offer | None = None  # that the generation thread is at work on
        self.under_way: dict[int, VersionedRequest] = {}
        self._lock = threading.Lock()
        self.model_provider: RegistryModelProvider
        super().__init__(provider, prompt_cache)

    def _run_generate(self) -> None:
        try:
            while True:
                try:
                    self._generate()
                    return
                except Exception as error:
                    self._end_requests_under_way(error)
        except Exception as error:  # it is told by whoever waits for the server's end
            logging.debug("the generation thread ended", exc_info=error)
            # Frames hold arrays, which have to be freed in the thread that made them.
            self.failure = error.with_traceback(None)
            self._generation_failed = True
            self.model_provider.reset()
        finally:
            self._offer = None  # its canary holds arrays, too
            self._is_ready.set()

    def _end_requests_under_way(self, error: Exception) -> None:
        """End the requests at which mlx_lm's loop ended; raise the error where there are none."""
        with self._lock:
            under_way = list(self.under_way.values())
        if not under_way:
            raise error
        logging.exception("the answers under way could not be generated", exc_info=error)
        for request in under_way:
            if request.queue is not None:
                request.queue.put(RuntimeError(f"{type(error).__name__}: {error}"))
            self.forget(request)
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

    def _note_at_work(self) -> None:
        self._seen_at = time.monotonic()

    def require_ready(self) -> None:
        """Return when the base and the first versions are loaded; raise what prevented that."""
        self._is_ready.wait()
        if self.failure is not None:
            raise self.failure

    def _next_request(self, timeout: float | None = None) -> Any:
        self._is_ready.set()
        self._note_at_work()
        self._work_on_offer()
        taken = super()._next_request(timeout if self._offer is None else None)
        if taken is None:
            return None
        self._bind(*taken)
        queue, *rest = taken
        return (_NotedQueue(queue, self._note_at_work), *rest)

    def _work_on_offer(self) -> None:
        """Check the version that is offered, a part at a time; it is served when all has passed.

        Requests under way go on between the parts, with the version before.
        """
        if self._offer is None:
            try:
                self._offer = self._offers.get_nowait()
            except Empty:
                return
            self._offer.is_taken.set()
        offer = self._offer
        deadline = time.monotonic() + CANARY_SECONDS_AT_A_TIME
        try:
            if offer.check is None:
                offer.check = self._check(offer.version)
            for _ in offer.check:
                if time.monotonic() > deadline:
                    return
        except Exception as error:
            offer.error = error.with_traceback(None)  # whose frames hold arrays
        else:
            if offer.is_to_be_served:
                self._begin_serving(offer.version)
        offer.check = None
        self._offer = None
        offer.is_settled.set()

    def _check(self, version: ServedVersion) -> Iterator[None]:
        """Build a version's model and ask it, in parts; raises what keeps it from being served."""
        model = version.build_model(self.model_provider.base)
        yield
        version.require_in_layers(model, self.model_provider.base_arrays)
        yield
        if version.canary is not None:
            yield from check_canary(version.canary, model)

    def _begin_serving(self, version: ServedVersion) -> None:
        with self._lock:
            status = self.names[version.name]
            status.current = version
            status.since = datetime.now(UTC)
            status.failures.begin()
        self.model_provider.retire_version()

    def _bind(self, queue: Queue[Any], request: VersionedRequest, args: Any) -> None:
        """Give a request the version that answers it: from here on it does not change."""
        with self._lock:
            status = self.names[request.name]
            version = request.pinned or status.current
            request.bound = version
            request.queue = queue
            self.under_way[id(request)] = request
        args.model = ModelDescription(version.label, "default_model", version)  # type: ignore[arg-type]  # mlx_lm hands it to `load` as it is

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """What `_prepare` made of a client's prompt; the server's own requests come without.

        Raises what has ended the request while it waited.
        """
        with self._lock:
            if request.ended is not None:
                raise SwapWaitOver(*request.ended.args)  # anew: a traceback holds arrays
            request.is_begun = True
        if request.tokenized is None:
            return super()._tokenize(tokenizer, request, args)
        return request.tokenized

    def _prepare(self, request: VersionedRequest, args: GenerationArguments) -> None:
        """Tokenise a client's prompt, and make all that its request sets, in the client's thread.

        What is raised later ends the generation thread, and what mlx_lm raises while it samples
        leaves mlx's random state unusable. A bias for a token that there is none of writes out of
        an array's bounds. Raises RequestRefused, whatever it was that could not be made.
        """
        try:
            self._require_in_bounds(args)
            tokenizer = self.model_provider.tokenizer
            self._require_short_text(tokenizer, request, args)
            plain = encode_user_text_as_text(tokenizer, request.messages)
            tokenized = super()._tokenize(plain, request, args)
            prompt, vision = tokenized[0], tokenized[-1]
            if not prompt:
                raise RequestRefused("The prompt has no tokens. Give a prompt that is not empty.")
            context = self.model_provider.context
            if context is not None and len(prompt) > context:
                raise RequestRefused(
                    f"The prompt has {len(prompt)} tokens, and the model sees {context}.",
                    code="context_length_exceeded",
                )
            if vision is not None:
                mx.eval(vision.pixel_values)
            self._make_state_machine(self.model_provider.model_key, tokenizer, args.stop_words)
            _make_sampler(args, tokenizer)
            _make_logits_processors(args)
        except RequestRefused:
            raise
        except Exception as error:
            raise RequestRefused(
                f"The prompt cannot be read: {type(error).__name__}: {error}"
            ) from None
        request.tokenized = tokenized

    def _make_state_machine(
        self, model_key: Any, tokenizer: Any, stop_words: Sequence[str]
    ) -> tuple[Any, Any]:
        """As mlx_lm's; stop texts are looked for in the text and not among the tokens."""
        sequences, text_states = super()._make_state_machine(model_key, tokenizer, [])
        return StopTexts(tokenizer, stop_words) if stop_words else sequences, text_states

    def _require_in_bounds(self, args: GenerationArguments) -> None:
        """Raise RequestRefused for numbers of tokens that the model does not have."""
        size = self.model_provider.vocabulary_size
        if args.sampling.top_k >= size:
            raise RequestRefused(f"top_k must be below {size}")
        if any(not 0 <= token < size for token in args.logits.logit_bias or ()):
            raise RequestRefused(f"logit_bias must name tokens from 0 to {size - 1}")

    def _require_short_text(
        self, tokenizer: Any, request: VersionedRequest, args: GenerationArguments
    ) -> None:
        """Raise RequestRefused for template arguments, and texts that no context has room for.

        To encode a text takes seconds a megabyte.
        """
        text = request.prompt
        if request.request_type == "chat" and tokenizer.has_chat_template:
            given = args.chat_template_kwargs or {}
            require_known_arguments(tokenizer, given)
            process_message_content(
                request.messages, keep_images=self.model_provider.processor is not None
            )
            text = tokenizer.apply_chat_template(
                request.messages,
                tools=request.tools,
                tokenize=False,
                add_generation_prompt=True,
                **{**self.cli_args.chat_template_args, **given},
            )
        elif request.request_type == "chat":
            text = convert_chat(request.messages, request.role_mapping)
        context, size = self.model_provider.context, len(text.encode())
        if context is not None and size > context * self.model_provider.longest_token:
            raise RequestRefused(
                f"The prompt has {size} bytes, and the model sees {context} tokens of at most "
                f"{self.model_provider.longest_token} bytes.",
                code="context_length_exceeded",
            )

    def generate(
        self,
        request: Any,  # a VersionedRequest
        generation_args: GenerationArguments,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> tuple[Any, Iterator[Any]]:
        """As mlx_lm's; then `request.bound` is the version. Call `forget` when it has ended.

        What a client sent is looked at here, in the client's thread: what is raised once the
        request is queued is the server's failure.
        """
        try:
            self._prepare(request, generation_args)
            context, responses = super().generate(request, generation_args, progress_callback)
            request.is_answered = True
            tokenizer = self.model_provider.tokenizer
            request.answer = AnswerText(tokenizer, generation_args.stop_words)
        except Exception as error:
            request.failure = error
            request.has_failed = is_server_failure(error)
            raise
        return context, cut_answer(self._count_tokens(request, responses), request.answer)

    def _count_tokens(self, request: VersionedRequest, responses: Iterator[Any]) -> Iterator[Any]:
        looked = time.monotonic()
        while True:
            try:
                response = next(responses, None)
            except Exception as error:
                is_ours = not isinstance(error, SwapWaitOver | ConnectionError)
                request.has_failed = is_ours
                raise
            if response is None:
                return
            with self._lock:
                self.names[request.name].rate.add_token()
            if time.monotonic() - looked > SECONDS_BETWEEN_LOOKS_AT_CLIENT:
                looked = time.monotonic()
                if request.is_client_gone():
                    raise ConnectionAbortedError("the client did not wait for its answer")
            yield response

    def count_waiting(self) -> int:
        """How many requests are queued or under way."""
        return self.requests.qsize() + len(self.under_way)

    def count_request(self, name: str) -> None:
        """Count a request of a client."""
        with self._lock:
            self.names[name].requests += 1

    def wait_for_requests(self, seconds: float) -> None:
        """Return when no request waits or is under way, or so many seconds are over."""
        deadline = time.monotonic() + seconds
        while (self.under_way or not self.requests.empty()) and time.monotonic() < deadline:
            if not self.generation_available():
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def forget(self, request: VersionedRequest) -> None:
        """The request has ended, however it did."""
        with self._lock:
            self.under_way.pop(id(request), None)

    def count_outcome(self, request: VersionedRequest) -> None:
        """Count whether a client's request failed, where the version that is served answered it."""
        with self._lock:
            status = self.names[request.name]
            if request.bound is not None and request.bound == status.current:
                status.failures.add(has_failed=request.has_failed)

    def swap(self, version: ServedVersion, wait_seconds: float) -> None:
        """Serve a version from now on; return when it has made its first token.

        Its canary is asked first; meanwhile the version before answers. Then requests that still
        run with another version after `wait_seconds` are ended with SwapWaitOver. Raises what
        building its model raised, or CanaryFailed; the version before is served then.
        """
        began = time.monotonic()
        before = self.names[version.name].current
        offer = _Offer(version)
        self._offers.put(offer)
        with self._ending_late_requests(version, wait_seconds):
            self._wait_for(offer.is_taken)
        self._settle(offer)
        try:
            with self._ending_late_requests(version, wait_seconds):
                self._make_one_token(version)
        except Exception:
            self._serve_again(before)
            raise
        with self._lock:
            status = self.names[version.name]
            status.last_swap_seconds = round(time.monotonic() - began, 3)
            status.swaps += 1

    def require_canary(self, version: ServedVersion) -> None:
        """Ask a version's canary, without serving it. Raises CanaryFailed."""
        offer = _Offer(version, is_to_be_served=False)
        self._offers.put(offer)
        self._settle(offer)

    def require_answers(self, version: ServedVersion, wait_seconds: float) -> None:
        """Ask a version's canary, and for a token as a request does. Raises what is wrong."""
        self.require_canary(version)
        with self._ending_late_requests(version, wait_seconds):
            self._make_one_token(version)

    def _settle(self, offer: _Offer) -> None:
        """Return when an offer has been checked; raise what was wrong with it."""
        self._wait_for(offer.is_settled)
        if offer.error is not None:
            raise offer.error

    def _wait_for(self, event: threading.Event) -> None:
        while not event.wait(timeout=0.2):
            if self._stop or not self.generation_available():
                raise RuntimeError("generation has ended")

    def _serve_again(self, version: ServedVersion) -> None:
        """Serve the version before again: it is in memory, and was served already."""
        with self._lock:
            status = self.names[version.name]
            status.current = version
            status.failures.end()

    @contextmanager
    def _ending_late_requests(self, version: ServedVersion, seconds: float) -> Iterator[None]:
        """End requests that run with another version, once the block takes so many seconds.

        Those too that come to run later, until the block ends.
        """
        is_over = threading.Event()

        def end_late_requests() -> None:
            pause = seconds
            while not is_over.wait(pause):
                self._end_requests_of_other_versions(version)
                pause = SECONDS_BETWEEN_LOOKS

        watch = threading.Thread(target=end_late_requests, daemon=True)
        watch.start()
        try:
            yield
        finally:
            is_over.set()
            watch.join()

    def _make_one_token(self, version: ServedVersion) -> None:
        """Ask the version for a token, so that it is loaded before a client asks."""
        request = VersionedRequest(
            "text", WARM_UP_PROMPT, [], None, None, name=version.name, pinned=version
        )
        try:
            for _ in super().generate(request, _greedy_arguments(max_tokens=1))[1]:
                pass
        finally:
            self.forget(request)

    def _end_requests_of_other_versions(self, version: ServedVersion) -> None:
        """End them, but for those whose answer is just being begun: the next look finds them."""
        with self._lock:
            for request in self.under_way.values():
                is_between = request.is_begun and not request.is_answered
                if request.bound == version or request.ended is not None or is_between:
                    continue
                request.ended = SwapWaitOver(
                    f"This answer was ended: it ran longer than a change to version "
                    f"{version.label} waits (--swap-wait). Ask again."
                )
                if request.queue is not None:
                    request.queue.put(request.ended)


def is_server_failure(error: Exception) -> bool:
    """Whether the server failed, rather than the client asked for what there is not."""
    return failure_status(error) >= 500 and not isinstance(error, SwapWaitOver)


def failure_status(error: Exception) -> int:
    """The HTTP status: the client's fault, no such version, the server's state, or 500."""
    if isinstance(error, RequestRefused):
        return error.status
    if isinstance(error, SwapWaitOver | RuntimeError | CanaryFailed):
        return 503
    return 404 if isinstance(error, NestedTuneError) else 500


def require_known_arguments(tokenizer: Any, given: Collection[str]) -> None:
    """Raise RequestRefused for arguments that the model's own chat template does not read.

    Others would reach the tokenizer: a template of the client's own, padding, cutting off.
    """
    template = tokenizer.chat_template
    source = template if isinstance(template, str) else ""
    of_the_tokenizer = inspect.signature(tokenizer._tokenizer.apply_chat_template).parameters
    known = set(re.findall(r"\w+", source)) - set(of_the_tokenizer) | {"enable_thinking"}
    unknown = sorted(set(given) - known)
    if unknown:
        raise RequestRefused(
            f"chat_template_kwargs: {', '.join(unknown):.200} not taken here. Expected arguments "
            f"that the chat template of the model reads, or enable_thinking."
        )


def _greedy_arguments(max_tokens: int) -> GenerationArguments:
    return GenerationArguments(
        model=ModelDescription("", "default_model", ""),
        sampling=SamplingArguments(0.0, 1.0, 0, 0.0, 0.0, 0.0),
        logits=LogitsProcessorArguments(None, 0.0, 20, 0.0, 20, 0.0, 20),
        stop_words=[],
        max_tokens=max_tokens,
        num_draft_tokens=0,
        logprobs=False,
        top_logprobs=-1,
        seed=None,
        chat_template_kwargs=None,
    )
