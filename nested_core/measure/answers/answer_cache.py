"""A cache of models' answers to suites, keyed by everything that the answers depend on.

Base and champion are asked the same questions night after night. With the cache a night only pays
for its own candidate, whose answers serve later nights on which it is the champion. Scores are not
cached, because a suite's scorer may change while its prompts do not. A damaged entry is computed
again. A folder that other users can write to is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from nested_core.measure.answers.suite_answers import EncodedSuite
from nested_core.models.generation import Answer
from nested_core.storage.atomic import canonical_json
from nested_core.storage.untrusted_files import regular_sha256
from nested_core.storage.user_cache import UserCache, cache_folder

_LIBRARIES_IN_CACHE_KEY = ("mlx", "mlx-lm", "transformers", "tokenizers")
# The code that decides how a prompt is answered.
_CODE_IN_CACHE_KEY = ("models/generation.py", "measure/answers/suite_answers.py")
_ANSWERS = TypeAdapter(list[Answer], config=ConfigDict(strict=True, extra="forbid"))


@dataclass(frozen=True)
class AnsweringModelDigests:
    """The identity of the model that answers, as digests of its content.

    base: the base model's fingerprint.
    tokenizer: the fingerprint of the tokenizer's files, which also define where an answer ends.
    adapter: the adapter's digest; None for the base alone.
    computation: device name and dtype, which affect the last bits of the logits.
    """

    base: str
    tokenizer: str
    adapter: str | None
    computation: str


def answer_cache(folder: Path | None = None) -> UserCache:
    """Return the cache of answers, by default in `answers` of the user's cache folder."""
    path = folder or cache_folder() / "answers"
    return UserCache(path, "answers", "have any adapter look better than another")


def fetch_answers(
    cache: UserCache,
    model: AnsweringModelDigests,
    encoded: EncodedSuite,
    answer: Callable[[], Sequence[Answer]],
) -> tuple[Answer, ...]:
    """Return the cached answers to a suite, or call `answer` and cache what it returns.

    Raises ConfigError if other users can write to the cache's folder.
    """
    cached = _read_answers(cache, cache.entry(_cache_key(model, encoded)))
    if cached is not None and len(cached) == len(encoded.prompts):
        return cached
    answers = tuple(answer())
    store_answers(cache, model, encoded, answers)
    return answers


def store_answers(
    cache: UserCache, model: AnsweringModelDigests, encoded: EncodedSuite, answers: Sequence[Answer]
) -> None:
    """Cache new answers to a suite.

    A failure to write is only logged: the next run computes the answers again. Raises ConfigError
    if other users can write to the cache's folder.
    """
    cache.keep(cache.entry(_cache_key(model, encoded)), [asdict(answer) for answer in answers])


def _read_answers(cache: UserCache, entry: Path) -> tuple[Answer, ...] | None:
    """Read the answers of a cache entry; None if it does not exist or is damaged."""
    rows = cache.read(entry)
    try:
        return None if rows is None else tuple(_ANSWERS.validate_json(canonical_json(rows)))
    except ValidationError as error:
        cache.tell_damaged(error)
        return None


def _cache_key(model: AnsweringModelDigests, encoded: EncodedSuite) -> dict[str, object]:
    """Return everything that the answers to a suite depend on, as JSON values."""
    root = Path(__file__).parents[2]
    return {
        "model": asdict(model),
        "prompts": encoded.prompts,
        "choices": encoded.choices,
        "texts": [question.choices for question in encoded.suite.questions],
        "context": encoded.context,
        "sampling": asdict(encoded.suite.sampling),
        "libraries": {name: version(name) for name in _LIBRARIES_IN_CACHE_KEY},
        "code": {name: regular_sha256(root / name) for name in _CODE_IN_CACHE_KEY},
    }
