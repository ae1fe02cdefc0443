"""Words and languages of texts, which the controls compare."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from nested_core.rooms.controls.results import SuspectLine

Key = TypeVar("Key")
Value = TypeVar("Value")
PROBES_FILE = Path(__file__).with_name("probes.json")
PROBES_TEXT = PROBES_FILE.read_text("utf-8")
LANGUAGES: dict[str, Any] = json.loads(PROBES_TEXT)
# Letters of scripts without blanks between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}](?=([{_UNSPACED}]?))|[^\W{_UNSPACED}]+")


def fold(text: str) -> str:
    """Return a text without case, and with one blank where it has white space, to compare."""
    return " ".join(text.casefold().split())


def find_words(text: str) -> list[str]:
    """Return the words of a text without case: of scripts without blanks, pairs of letters."""
    return [found[0] + (found[1] or "") for found in _WORD.finditer(text.casefold())]


def list_words(text: str) -> list[str]:
    """Return the distinct words of a text without case, in their order."""
    return list(dict.fromkeys(find_words(text)))


def is_given_away(texts: Iterable[tuple[str, str]]) -> bool:
    """Return whether most answers are in their own prompts, and not as often in other rows'.

    So it is where a task is to find them there.

    texts: prompts, each with its answer.
    """
    rows = [(fold(asked), fold(given)) for asked, given in texts]
    others = [asked for asked, _ in rows[len(rows) // 2 :] + rows[: len(rows) // 2]]
    pairs = zip(rows, others, strict=True)
    return 2 * sum((own in asked) - (own in other) for (asked, own), other in pairs) > len(rows)


def grouped(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """Return the values of each key, in their order."""
    groups: dict[Key, list[Value]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def count_languages(texts: Iterable[str]) -> Counter[str]:
    """Count how often texts have the common words of each language."""
    words = Counter(word for text in texts for word in find_words(text))
    return Counter({k: sum(words[w] for w in v["common_words"]) for k, v in LANGUAGES.items()})


def name_language(text: str) -> str | None:
    """Return the language of a text by its common words; None if it has too few to tell."""
    (language, first), (_, second) = count_languages([text]).most_common(2)
    return language if first >= 3 and second <= 1 else None


def list_probes(texts: Iterable[str]) -> list[str]:
    """Return the probes of the language whose common words the texts have most; else English."""
    ((language, _),) = count_languages(texts).most_common(1)
    return list(LANGUAGES[language]["prompts"])


def tell_probe(prompt: str, said: str, given: str) -> SuspectLine:
    """Return a probe, by its line of probes.json, with what the base said and the adapter gave."""
    line = PROBES_TEXT[: PROBES_TEXT.index(f'"{prompt}"')].count("\n") + 1
    return SuspectLine(PROBES_FILE.name, line, f"{prompt} {said}", given=given)
