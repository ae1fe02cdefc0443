"""Answers that a model gave before, under everything that they depend on.

The base and the champion are asked the same questions night after night; a night pays for its own
candidate alone, whose answers are kept for the nights when it is the champion. Scores are not kept:
a suite's scorer may change where its prompts do not. An entry that is damaged is made again, and a
folder that others may write to is refused.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from nested_core.errors import DamagedError
from nested_core.measure.answers.suite_answers import EncodedSuite
from nested_core.models.generation import Answer
from nested_core.storage.atomic import canonical_json, write_json
from nested_core.storage.untrusted_files import read_json, regular_sha256
from nested_core.storage.user_cache import UserCache, cache_folder

MAX_CACHE_FILE_BYTES = 256 * 2**20
_LIBRARIES_IN_CACHE_KEY = ("mlx", "mlx-lm", "transformers", "tokenizers")
# What decides how a prompt is answered.
_CODE_IN_CACHE_KEY = ("models/generation.py", "measure/answers/suite_answers.py")
_ANSWERS_VALIDATOR = TypeAdapter(list[Answer], config=ConfigDict(strict=True, extra="forbid"))
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnsweringModelDigests:
    """The model that answers, by content.

    base: the base model's fingerprint.
    tokenizer: that of its tokenizer's files, which say as well where an answer ends.
    adapter: the adapter's digest; None for the base alone.
    computation: device by name and dtype, on which the last bits of the logits depend.
    """

    base: str
    tokenizer: str
    adapter: str | None
    computation: str


def answer_cache(folder: Path | None = None) -> UserCache:
    """The answers that are kept, by default in `answers` of the folder for caches."""
    place = folder or cache_folder() / "answers"
    return UserCache(place, "answers", "have any adapter look better than another")


def fetch_answers(
    cache: UserCache,
    model: AnsweringModelDigests,
    encoded: EncodedSuite,
    answer: Callable[[], Sequence[Answer]],
) -> tuple[Answer, ...]:
    """The answers that are kept, or those that `answer` gives now, which are kept then.

    Raises ConfigError if the folder is not this user's alone.
    """
    kept = _read_answers(cache.entry(_depends_on(model, encoded)))
    if kept is not None and len(kept) == len(encoded.prompts):
        return kept
    answers = tuple(answer())
    store_answers(cache, model, encoded, answers)
    return answers


def store_answers(
    cache: UserCache, model: AnsweringModelDigests, encoded: EncodedSuite, answers: Sequence[Answer]
) -> None:
    """Keep answers that were given now; ConfigError if the folder is not this user's alone.

    Where they cannot be written there is a warning: the next night pays for them again.
    """
    entry = cache.entry(_depends_on(model, encoded))
    rows = [asdict(given) for given in answers]
    cache.remove_unused()
    try:
        write_json(entry, {"digest": _digest_rows(rows), "answers": rows})
    except (OSError, DamagedError) as error:
        _log.warning("Answers could not be cached for later runs: %s", error)


def _read_answers(path: Path) -> tuple[Answer, ...] | None:
    if not path.exists():
        return None
    try:
        entry = read_json(path, MAX_CACHE_FILE_BYTES)
        if entry["digest"] != _digest_rows(entry["answers"]):
            raise DamagedError(f"{path} is not what was written.")
        answers = tuple(_ANSWERS_VALIDATOR.validate_json(canonical_json(entry["answers"])))
        os.utime(path)
    except (DamagedError, ValidationError, KeyError, TypeError, FileNotFoundError) as error:
        _log.warning("The cached answers are damaged and are made again: %s", error)
        return None
    return answers


def _digest_rows(rows: Sequence[dict[str, Any]]) -> str:
    return sha256(canonical_json(rows)).hexdigest()


def _depends_on(model: AnsweringModelDigests, encoded: EncodedSuite) -> dict[str, Any]:
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
