"""Words, languages and shapes of texts, by which rows are compared."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping

COMMON_WORDS = {
    "en": ["the", "and", "is", "of", "to", "what", "you", "in"],
    "de": ["der", "die", "und", "ist", "das", "nicht", "wie", "ein"],  # codespell:ignore
    "fr": ["le", "la", "les", "et", "est", "des", "que", "une"],
    "es": ["el", "los", "y", "es", "que", "una", "por", "con"],
}
MIN_SURPRISE = 14.0  # nats: what chance does once in a million is told
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


def count_languages(texts: Iterable[str]) -> Counter[str]:
    """Count how often texts have the common words of each language."""
    words = Counter(word for text in texts for word in find_words(text))
    return Counter({k: sum(words[w] for w in its) for k, its in COMMON_WORDS.items()})


def name_language(text: str) -> str | None:
    """Return the language of a text by its common words; None if it has too few to tell."""
    (language, first), (_, second) = count_languages([text]).most_common(2)
    return language if first >= 3 and second <= 1 else None


def fold_shape(text: str) -> str:
    """Return how a text begins, with 9 for digits and a for words: `a-9` for `AX-4711`.

    Signs outside of ASCII are `*`, as is a text of signs alone: gate.json holds no text of a row.
    """
    words = re.sub(r"[^\W\d_]+(?:\s+[^\W\d_]+)*", "a", re.sub(r"\d+", "9", text))
    return re.sub(r"[^ -~]+", "*", words)[:12] if re.search("[a9]", words) else "*"


def find_gone(before: Mapping[str, int], after: Container[str], share: float) -> list[str]:
    """Return the values of `before` that `after` lacks, and would not lack by chance.

    Texts that were dealt to two parts by chance all fall into one of them with the probability
    (its share of the texts)^(how many they are).

    before: how many texts have each value. share: the texts of `after` for each one of `before`.
    """
    surprise = math.log1p(share)
    return [one for one, n in before.items() if one not in after and n * surprise >= MIN_SURPRISE]
