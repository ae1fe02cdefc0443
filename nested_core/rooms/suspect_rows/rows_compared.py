"""Rows of train that look otherwise than the rest, and splits that differ.

What goes wrong with a table before training leaves rows of another look: rounded numbers, lost
zeros, texts cut at a column's width, copied questions, another language. The rules compare rows
with each other, and with held-out ones.

Rows of one table are alike however they are split. A system text, a prefix, a trailing blank or
another case that one file alone has comes from two programs that wrote them.
"""

from __future__ import annotations

import json
import re
import tomllib
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice, pairwise
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nested_core.data.lines.example_parsing import Example
from nested_core.data.lines.line_rows import call_to_compare
from nested_core.data.rules.rule_table import MAX_LISTED_FINDINGS
from nested_core.records.dataset import Finding
from nested_core.text.groups import grouped
from nested_core.text.words import (
    find_gone,
    find_words,
    fold,
    fold_shape,
    is_given_away,
    list_words,
    name_language,
)

WORDS: dict[str, dict[str, str]] = tomllib.loads(
    Path(__file__).with_name("warnings.toml").read_text("utf-8")
)
Splits = Mapping[str, Mapping[int, Example]]
MIN_ROWS = 20
MIN_ODD_SHARE = 0.01  # of the rows, that are odd in one way
MIN_OF_KIND, MIN_LETTERS = 5, 6  # rows of one kind; letters of an answer in another script
MIN_HELD_OUT = 10  # rows, with which training rows are compared
MIN_LESS, MIN_DEVIATIONS = 0.2, 3.1  # that a share is less: chance has it once in a thousand
MAX_PARTS, FIELD = 200, "\0"  # of an answer, in which equal values are looked for; a place of JSON
MAX_SHORT = 0.25  # of the codes that are whole: those that lack a digit
WORD_CHARACTERS = 16  # more are several words, in a script without blanks between them
# What programs write where a value is missing, or was a number or a date that they did not know
_MISSING = re.compile(
    r"[Nn][/.][Aa]|<?NA>?|[Nn]a[Nn]|NaT|[Nn]one|null|NULL|<?nil>?|undefined|\{\}|\[\]"
    r"|\[(?:object Object|deleted|removed)\]|#(?:REF|N/A|VALUE|NAME|DIV/0|NUM|NULL|#+)[!?]?"
    r"|\d(?:[.,]\d+)?[eE]\+?\d\d|(?:1970-01-01|1899-12-3[01]|1900-01-0[01]|0000-00-00)\S*"
)
EMPTY = ("{}", "[]")
# A word such as None, which may be right there
_BEFORE_CODE = ("=", ":", "(", ",", "return", "??", "||", "DEFAULT", "THEN", "ELSE")
_PART = re.compile(r"[\[{<][^\]}>]{0,40}[\]}>]|\S+")  # words, and `[object Object]`
ENDS = ".?!:。？！؟।"  # of sentences
_BREAK = re.compile(rf"[{ENDS}>\]|]+ ?")  # where an answer may have ended
# In questions for a number that may begin with 0, in the languages of the probes
_CODE = re.compile(r"(?i)\b(posta?l|(zip|plz|pin)\b|phone(?! call)|t[eé]l[eé](ph|f))")
# Where splits are compared
MIN_SPLIT = 8  # rows of each split that is compared with another
MOST, FEWEST = 0.9, 0.1  # of the rows, of the one split and of the other
WIDTHS = {"system text": 40, "prompt": 12, "answer": 12}  # characters at an end
FOLDED_WIDTHS = 2, 1  # of them, with A for capitals, a for small letters and 9 for digits
PLACES = [("system text", "begin with")]
PLACES += [(turn, verb) for turn in ("prompt", "answer") for verb in ("begin with", "end in")]
Ends = tuple[str, Sequence[str]]  # a split, and beginnings or ends of its rows


class Texts(NamedTuple):
    """A row as texts; `question` is its prompt without the beginning that all prompts share.

    prompt: the turns before the answer, without a system text that all rows share.
    """

    prompt: str
    question: str
    answer: str


Rows = Sequence[Texts]


def find_missing_values(rows: Rows, system: str = "") -> list[int]:
    """Find rows with what stands for a missing value where the others all differ, such as `N/A`.

    It is the whole answer, or stands in one place of answers, see `list_values`. It may be right
    where prompts or the system text of all rows have it; a word in code, and where it stands
    elsewhere too; empty objects among JSON; and all where most others are found in their prompts.
    """
    values_by_row = [(index, list_values(row.answer)) for index, row in enumerate(rows)]
    places = grouped((at, (index, one)) for index, its in values_by_row for at, one in its)
    counts = Counter(text for values in places.values() for _, text in values)
    asked = Counter(word for row in rows for word in list_words(row.prompt))
    are_json = any(place[0] == FIELD for place in places)
    places["", ""] = [(index, row.answer) for index, row in enumerate(rows)]
    found = set[int]()
    for place, values in places.items():
        here = Counter(text for _, text in values)
        missing = {
            text
            for text, count in here.items()
            if count >= max(5, 0.03 * len(rows))
            and (_MISSING.fullmatch(text) and text not in system)
            and not (are_json and text in EMPTY)
            and not (text.isalpha() and (count < counts[text] or 2 * asked[fold(text)] >= count))
            and 2 * sum(text in row.prompt for row in rows) < count
            and not ((text.isalpha() or text in EMPTY) and place[0].endswith(_BEFORE_CODE))
        }
        if not missing:
            continue
        rest = Counter({text: count for text, count in here.items() if text not in missing})
        if len(rest) >= max(0.9 * rest.total(), 0.5 * len(values), 0.1 * len(rows)):
            others = [(rows[index].prompt, text) for index, text in values if text in rest]
            if not is_given_away(others):
                found.update(index for index, text in values if text in missing)
    return sorted(found)


def list_values(answer: str) -> list[tuple[tuple[str, ...], str]]:
    """List the values of an answer with their places: the word before.

    Of JSON, also within a text, values are its texts and numbers, and a place is the names of the
    fields around it.
    """
    first, last = (answer.find("{"), answer.rfind("}")) if "{" in answer else (0, len(answer))
    with suppress(ValueError, RecursionError):
        value = json.loads(answer[first : last + 1])
        if isinstance(value, dict | list):
            return [*islice(_list_fields(value, FIELD), MAX_PARTS)]
    texts = ["", *(found[0] for found in islice(_PART.finditer(answer), MAX_PARTS))]
    return [((before,), text.rstrip(".,;:!?")) for before, text in pairwise(texts)]


def _list_fields(value: object, *path: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the texts and numbers of a value that was JSON; null, true and false may be equal."""
    if isinstance(value, dict | list):
        for name, one in value.items() if isinstance(value, dict) else (("", x) for x in value):
            yield from _list_fields(one, *path, name)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield path, str(value)


def find_repeated_questions(rows: Rows) -> list[int]:
    """Find answers that repeat their question, unless most others of their kind write it anew.

    Of their kind are rows whose prompts have all words that these prompts share, if some are.
    """
    found = [
        index
        for index, (prompt, question, answer) in enumerate(rows)
        if len(answer) >= max(12, 0.8 * len(question))
        and (prompt.endswith(answer) or fold(answer) in (fold(prompt), fold(question)))
    ]
    words = [(set(list_words(row.question)), set(list_words(row.answer))) for row in rows]
    shared = set.intersection(*(words[index][0] for index in found)) if found else set()
    others = sorted({*range(len(rows))}.difference(found))
    kind = [words[i] for i in others if shared <= words[i][0]]
    kind = kind if len(kind) >= MIN_OF_KIND else [words[i] for i in others]
    shares = [len(asked & given) / max(1, len(given)) for asked, given in kind]
    return found if shares and np.median(shares) < 0.8 else []


def find_run_ons(rows: Rows) -> list[int]:
    """Find answers that go on with another row's prompt, as where a row's end was lost.

    Of a prompt that is a sentence, or of six words and more: the name of a film may be an answer.
    """
    flat = [[fold(text.replace("\n", " | ")) for text in (one.prompt, one.answer)] for one in rows]
    long = {text for text, _ in flat if len(text) >= WORD_CHARACTERS}
    whole = sorted(text for text in long if text[-1] in ENDS or text.count(" ") >= 5)
    most = max(map(len, whole), default=0)
    return [
        index
        for index, (own, answer) in enumerate(flat)
        if any(
            text not in own
            for at in _BREAK.finditer(answer)
            for text in _find_prefixes(answer[at.end() : at.end() + most], whole)
        )
    ]


def _find_prefixes(text: str, ordered: Sequence[str]) -> Iterator[str]:
    """Yield those of some sorted texts with which a text begins, the longest first."""
    while (index := bisect_right(ordered, text)) and len(text) >= WORD_CHARACTERS:
        if is_found := text.startswith(last := ordered[index - 1]):
            yield last
        # All others are a beginning of what these two have in common, found by halving
        both = bisect_right(range(len(last)), 0, key=lambda n: not last.startswith(text[: n + 1]))
        text = text[: both - is_found]


def find_lost_contexts(rows: Rows) -> list[int]:
    """Find rows of a prompt that comes far more often than others, each time with another fact.

    What more than half of its answers say is their form; a fact is what is left, if it is short.
    """
    groups = grouped((fold(row.prompt), index) for index, row in enumerate(rows))
    least = 5 * np.median([*map(len, groups.values())])
    found: list[int] = []
    for group in (one for one in groups.values() if len(one) >= least):
        words = [set(fold(rows[index].answer).split()) for index in group]
        counts = Counter(word for one in words for word in one)
        facts = [frozenset(w for w in one if 2 * counts[w] <= len(group)) for one in words]
        sizes = [max(len(fact), sum(map(len, fact)) / WORD_CHARACTERS) for fact in facts]
        beyond = [size - max(2, len(one) / 3) for size, one in zip(sizes, words, strict=True)]
        found += group if np.median(beyond) <= 0 and 2 * len(set(facts)) > len(group) else []
    return sorted(found)


def find_moved_answers(rows: Rows, held_out: Rows = ()) -> list[int]:
    """Find answers that name what another row asks for.

    Rare words of questions are looked for in answers. Answers have to name one of their own
    question: most do, and hardly any of these one of another; or more held-out ones do than those
    of train, beyond chance. Where only train itself tells, they are as long as those that do.
    """
    asked = [set(list_words(row.question)) for row in rows]
    counts = Counter(word for row in rows for word in list_words(row.prompt))
    common = {word for word, count in counts.items() if count > max(3, len(rows) // 100)}
    rare = set[str]().union(*asked) - common
    named = [rare.intersection(list_words(row.answer)) for row in rows]
    own = [i for i, words in enumerate(named) if words & asked[i]]
    others = sorted({*range(len(rows))}.difference(own))
    astray = sum(bool(named[i] - asked[i]) for i in own)
    is_usual = 2 * len(own) >= len(rows) and 10 * astray <= len(own)
    pairs = [({*list_words(one.prompt)}, {*list_words(one.answer)}) for one in held_out]
    right = sum(bool(words & (given - common)) for words, given in pairs)
    is_less = is_share_less((len(own), len(rows)), (right, len(held_out)))
    waiting = set[str]().union(*(asked[i] for i in others))
    sizes = [len(find_words(row.answer)) for row in rows]
    usual = {sizes[i] for i in own}  # of answers that name what is asked
    moved = [i for i in others if named[i] & waiting and (is_less or sizes[i] in usual)]
    is_told = len(moved) >= max(4, 0.03 * len(rows)) and 2 * len(moved) >= len(others)
    return moved if (is_usual or is_less) and is_told else []


def is_share_less(few: tuple[int, int], many: tuple[int, int]) -> bool:
    """Return whether a share is less than another, each as (count, total), beyond chance.

    By a fifth at least, and as chance has it once in a thousand times; the other one is a half.
    """
    (a, n), (b, m) = few, many
    if m < MIN_HELD_OUT or 2 * b < m:
        return False
    spread = np.sqrt((a + b) / (n + m) * (1 - (a + b) / (n + m)) * (1 / n + 1 / m))
    return bool(b / m - a / n > max(MIN_LESS, MIN_DEVIATIONS * spread))


def find_other_languages(rows: Rows) -> list[int]:
    """Find answers in another script or language than most, and than their question.

    Not symbols of a few letters, nor where prompts ask for it, or have other words than those of
    most answers. Latin letters among others count if they are a language that is known here: else
    they are code, or names.
    """
    found: list[int] = []
    asked = [set(list_words(row.question)) for row in rows]
    for name in (name_script, name_language):
        named = [name(row.answer) for row in rows]
        [(most, count)] = Counter(named).most_common(1)
        if most is None or 2 * count <= len(rows):
            continue
        usual = set[str]().union(*(asked[i] for i, its in enumerate(named) if its == most))
        for other in {*named} - {None, most}:
            odd = [
                index
                for index, row in enumerate(rows)
                if named[index] == other != name(row.question)
                and sum(map(str.isalpha, row.answer)) >= MIN_LETTERS
                and (other != "LATIN" or name_language(row.answer) is not None)
                and 2 * len(asked[index] & usual) >= len(asked[index])
            ]
            found += [] if are_asked_for(rows, odd) else odd
    return sorted({*found})


def are_asked_for(rows: Rows, odd: Collection[int]) -> bool:
    """Return whether nearly all prompts of the odd rows have a word that hardly any other has.

    One for several of them: sentences are translated into more languages than one.
    """
    inside = Counter(word for index in odd for word in list_words(rows[index].prompt))
    counts = Counter(word for row in rows for word in list_words(row.prompt))
    most, least = 0.1 * (len(rows) - len(odd)), 0.1 * len(odd)
    asking = {
        word
        for word, n in inside.items()
        if n >= max(3, least) and counts[word] - n <= min(most, 0.5 * n)
    }
    asked = sum(not asking.isdisjoint(list_words(rows[index].prompt)) for index in odd)
    return asked >= 0.8 * len(odd)


def name_script(text: str) -> str | None:
    """Return the script of most letters of a text's beginning, such as LATIN; None without any.

    Japanese is written in three, which count as one: CJK.
    """
    names = [unicodedata.name(one, "?").split()[0] for one in text[:200] if one.isalpha()]
    names = ["CJK" if name in ("HIRAGANA", "KATAKANA") else name for name in names]
    return max(dict.fromkeys(names), key=names.count, default=None)


def find_lost_zeros(rows: Rows) -> list[int]:
    """Find numbers a digit shorter than codes of one width, if no number begins with 0.

    Codes are spread evenly over all that a width can hold, unlike sums, prices and counts. Numbers
    from 1 to 10,000 are so too: only those count whose prompt asks for a postal code or the like.
    """
    asked = {i: row.answer for i, row in enumerate(rows) if _CODE.search(row.prompt)}
    given = {i: re.findall(r"\d+", answer) for i, answer in asked.items()}
    numbers = {i: one[0] for i, one in given.items() if len(one) == 1 and 3 <= len(one[0]) <= 18}
    width = max(map(len, numbers.values()), default=0)
    found = {size: [i for i in numbers if len(numbers[i]) == size] for size in (width - 1, width)}
    for digits, group in found.items():
        places = np.array([int(numbers[index]) / 10**digits for index in group])
        is_even = len(group) >= 4 and abs(places.mean() - 0.55) <= 0.78 / len(group) ** 0.5
        if not is_even or places.min() < 0.1:
            return []
    others, short = len(numbers) - sum(map(len, found.values())), found[width - 1]
    is_code = len(numbers) >= MIN_ROWS and others <= 1 + len(short) / 4
    # Codes that begin with 0 are about one in ten
    is_lost = is_code and len(short) <= MAX_SHORT * len(found[width])
    return short if is_lost and not are_asked_for(rows, short) else []


def find_one_length(texts: Sequence[str]) -> list[int]:
    """Find texts of words that end within one at the greatest length, which few others near.

    A word that was cut is mostly one that no other text has, unlike the words before it.
    """
    lengths = np.array([*map(len, texts)])
    longest = lengths.max()
    at = np.flatnonzero(lengths >= longest - 1).tolist()
    nearly = np.count_nonzero(lengths >= 0.8 * longest) - len(at)
    words = {i: texts[i].split() for i in at}
    ends = {i: one[-2:] for i, one in words.items() if len(one) > 3 and one[-1].isalpha()}
    if longest < 30 or len(at) < 5 + 20 * nearly / longest or 2 * len(ends) <= len(at):
        return []
    counts = Counter(word for text in texts for word in text.split()[:-1])
    alone = [np.mean([counts[one[k]] <= 1 - k for one in ends.values()]) for k in (0, 1)]
    [(_, same)] = Counter(before for before, _ in ends.values()).most_common(1)
    is_cut = alone[1] >= 0.3 and alone[1] >= 2 * alone[0] and 2 * same <= len(ends)
    return at if is_cut else []


def find_odd_rows(rows: Rows, held_out: Rows = (), system: str = "") -> dict[str, list[int]]:
    """Return the indices of rows that are odd, by the kind of it, unless they are few.

    system: the system text of all rows.
    """
    if len(rows) < MIN_ROWS:
        return {}
    found = {
        "missing-values": find_missing_values(rows, system),
        "answer-repeats-question": find_repeated_questions(rows),
        "goes-on": find_run_ons(rows),
        "context-lost": find_lost_contexts(rows),
        "another-language": find_other_languages(rows),
        "zeros-lost": find_lost_zeros(rows),
        "one-length": find_one_length([row.answer for row in rows]),
        "prompts-of-one-length": find_one_length([row.prompt for row in rows]),
        "answers-moved": find_moved_answers(rows, held_out),
    }
    least = max(3, MIN_ODD_SHARE * len(rows))
    return {kind: odd for kind, odd in found.items() if len(odd) >= least}


def judge_examples(splits: Splits) -> Iterator[Finding]:
    """Yield a finding for each row of train that is odd among the others, or beside held-out ones.

    splits: examples by line, by the name of their split. And where splits differ.
    """
    yield from compare_splits(splits)
    texts = {split: read_texts(examples) for split, examples in splits.items()}
    rows = texts.pop("train", {})
    lines, train = [*rows], [*rows.values()]
    held_out = [row for its in texts.values() for row in its.values()]
    turns = (turn for one in splits.get("train", {}).values() for turn in one.messages[:1])
    system = commonprefix([str(one.get("content")) for one in turns if one["role"] == "system"])
    for kind, odd in find_odd_rows(train, held_out, system).items():
        words = WORDS["rows"][kind].format(count=len(odd), total=len(train))
        for index in odd[:MAX_LISTED_FINDINGS]:
            yield Finding("train", lines[index], "warning", kind, words)
        if (rest := len(odd) - MAX_LISTED_FINDINGS) > 0:
            yield Finding("train", None, "warning", kind, words, count=rest)
    own, others = ([fold_shape(row.answer) for row in one] for one in (train, held_out))
    for shape in find_gone(Counter(own), others, len(others) / max(1, len(own)))[:1]:
        kind, line = "shape-of-train-alone", lines[own.index(shape)]
        yield Finding("train", line, "warning", kind, WORDS["rows"][kind].format(shape=shape))


def read_texts(examples: Mapping[int, Example]) -> dict[int, Texts]:
    """Return the last answer of each example, if it is learnt, and what is before it, by line."""
    asked, answers = dict[int, list[str]](), dict[int, str]()
    for line, one in examples.items():
        if one.messages[1:] and len(one.messages) - 1 not in one.masked:
            *asked[line], answers[line] = map(_read_turn, one.messages)
    firsts = {turns[0] for turns in asked.values()}
    common = 1 if len(firsts) == 1 and min(map(len, asked.values())) > 1 else 0
    prompts = {line: "\n".join(turns[common:]) for line, turns in asked.items()}
    shared = count_shared([*prompts.values()])
    return {line: Texts(one, one[shared:], answers[line]) for line, one in prompts.items()}


def _read_turn(turn: Mapping[str, Any]) -> str:
    """Return the content of a turn, or its calls as JSON."""
    calls = map(call_to_compare, turn.get("tool_calls") or ())
    return str(turn.get("content") or json.dumps([*calls])).strip()


def count_shared(prompts: Sequence[str]) -> int:
    """Count the characters with which all prompts begin, without a part of a word or number."""
    # Backwards: from each of its characters a long word would be read to its end
    return len(re.sub(r"\A\w+", "", commonprefix(prompts)[::-1]))


def compare_splits(splits: Splits) -> Iterator[Finding]:
    """Yield a finding for each part of rows that a held-out split writes otherwise than train.

    splits: examples by line, by the name of their split. Those without a prompt are not compared.
    """
    rows = {
        split: [_list_turns(one) for one in its.values() if one.is_plain and one.messages[1:]]
        for split, its in splits.items()
    }
    train = rows.pop("train", [])
    for split, others in rows.items():
        for place in PLACES if min(len(train), len(others)) >= MIN_SPLIT else ():
            one = "train", [_cut_end(row, *place) for row in train]
            other = split, [_cut_end(row, *place) for row in others]
            told = _compare_ends(one, other, *place) or _compare_ends(other, one, *place)
            if told is not None:
                yield Finding(split, None, "warning", "splits-differ", told)


def _list_turns(example: Example) -> dict[str, str]:
    """Return system text, prompt and answer of a row; without a system text an empty one."""
    first, prompt, answer = (example.messages[n] for n in (0, -2, -1))
    system = first["content"] if first["role"] == "system" else ""
    return {"system text": system, "prompt": prompt["content"], "answer": answer["content"]}


def _cut_end(row: Mapping[str, str], turn: str, verb: str) -> str:
    """Return the beginning or end of a turn, with 9 for numbers: dates and counts go on."""
    width = 4 * WIDTHS[turn]
    return re.sub(r"\d+", "9", row[turn][-width:] if verb == "end in" else row[turn][:width])


def _compare_ends(many: Ends, few: Ends, turn: str, verb: str) -> str | None:
    """Say what nearly all rows of `many` begin with or end in, and nearly none of `few`."""
    whole = many[1], few[1]
    folded = [[*map(_fold_case, texts)] for texts in whole]
    ways = [(whole, width) for width in range(WIDTHS[turn], 0, -1)]
    for (texts, others), width in [*ways, *((folded, width) for width in FOLDED_WIDTHS)]:
        end = slice(-width, None) if verb == "end in" else slice(width)
        [(text, count)] = Counter(one[end] for one in texts).most_common(1)
        found = sum(one[end] == text for one in others)
        if text and count >= MOST * len(texts) and found <= FEWEST * len(others):
            another = next(one for one, own in zip(few[1], others, strict=True) if own[end] != text)
            named = {"turn": turn, "verb": verb, "text": text, "count": count, "found": found}
            named |= {"many": many[0], "total": len(texts), "few": few[0], "others": len(others)}
            return WORDS["rows"]["splits-differ"].format(another=another, **named)
    return None


def _fold_case(text: str) -> str:
    """Return a text with A for its capitals and a for its other letters."""
    return "".join("A" if x.isupper() else "a" if x.isalpha() else x for x in text)
