"""The control of shapes: training rows whose answers look otherwise than the rest, without a model.

What goes wrong with a table before training leaves rows of another look: rounded numbers, lost
zeros, texts cut at a column's width, copied questions, another language. The rules compare rows
with each other, answers of train with held-out ones, and with those of the champion.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice, pairwise
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np

from nested_core.gate.checks.judged import CheckedRun
from nested_core.gate.evidence.champion_adapter import Champion
from nested_core.records.verdict import CheckRow
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry.versions import version_folder
from nested_core.rooms.controls.answer_rows import NO_ANSWERS, Rows, RunRows
from nested_core.rooms.controls.results import ControlWarning, Told
from nested_core.rooms.controls.texts import (
    find_words,
    fold,
    grouped,
    is_given_away,
    list_words,
    name_language,
)
from nested_core.storage.atomic import digest_answer

NAME = "shapes of answers"
MIN_ROWS, MAX_ROWS = 20, 2_000
MIN_ODD_SHARE = 0.01  # of the rows, that are odd in one way
MIN_SURPRISE = 14.0  # nats: what chance does once in a million is told
KEPT, MIN_KEPT = 200, 5  # shapes and labels in gate.json; of how many rows each is
PROFILE_BLOCK, LABELS = "answer_shapes", "label_digests"  # of gate.json, which has no text of a row
MIN_SHARE_LEFT = 1 / 5  # of the champion's rows: nights whose sizes spread by half differ by less
MIN_OF_KIND, MIN_LETTERS = 5, 6  # rows of one kind; letters of an answer in another script
MIN_HELD_OUT = 10  # rows, with which training rows are compared
MIN_LESS, MIN_DEVIATIONS = 0.2, 3.1  # that a share is less: chance has it once in a thousand
MAX_PARTS, FIELD = 200, "\0"  # of an answer, in which equal values are looked for; a place of JSON
MAX_SHORT = 0.25  # of the codes that are whole: those that lack a digit
WORD_CHARACTERS = 16  # more are several words, in a script without blanks between them
PROMPT_BEGIN = 16  # characters of a prompt by which it is found in answers
# What programs write where a value is missing, or was a number or a date that they did not know
_MISSING = re.compile(
    r"[Nn][/.][Aa]|<?NA>?|[Nn]a[Nn]|NaT|[Nn]one|null|NULL|<?nil>?|undefined|\{\}|\[\]"
    r"|\[(?:object Object|deleted|removed)\]|#(?:REF|N/A|VALUE|NAME|DIV/0|NUM|NULL|#+)[!?]?"
    r"|\d(?:[.,]\d+)?[eE]\+?\d\d|(?:1970-01-01|1899-12-3[01]|1900-01-0[01]|0000-00-00)\S*"
)
EMPTY = ("{}", "[]")
_BEFORE_CODE = ("=", ":", "(", ",", "return")  # a word such as None, which may be right there
_PART = re.compile(r"[\[{<][^\]}>]{0,40}[\]}>]|\S+")  # words, and `[object Object]`
ENDS = ".?!:。？！؟।"  # of sentences
_BREAK = re.compile(rf"[{ENDS}>\]|] ?")  # where an answer may have ended
# In questions for a number that may begin with 0, in the languages of the probes
_CODE = re.compile(r"(?i)\b(posta?l|(zip|plz|pin)\b|phone(?! call)|t[eé]l[eé](ph|f))")
Place = tuple[str, ...]
Profile = Mapping[str, Any]
Warnings = Iterator[ControlWarning]


class Texts(NamedTuple):
    """A row as texts; `question` is its prompt without the beginning that all prompts share.

    prompt: without what the chat template writes around it.
    """

    prompt: str
    question: str
    answer: str


def fold_shape(text: str) -> str:
    """Return how a text begins, with 9 for digits and a for words: `a-9` for `AX-4711`.

    Signs outside of ASCII are `*`, as is a text of signs alone: gate.json holds no text of a row.
    """
    words = re.sub(r"[^\W\d_]+(?:\s+[^\W\d_]+)*", "a", re.sub(r"\d+", "9", text))
    return re.sub(r"[^ -~]+", "*", words)[:12] if re.search("[a9]", words) else "*"


def find_equal(rows: Sequence[Texts]) -> list[int]:
    """Find rows with what stands for a missing value where the others all differ, such as `N/A`.

    It is the whole answer, or stands in one place of answers, see `list_values`. A word may be
    right in code, and where it stands elsewhere too; empty objects among JSON; and all of them
    where most others are found in their prompts.
    """
    values_by_row = [(index, list_values(row.answer)) for index, row in enumerate(rows)]
    places = grouped((at, (index, one)) for index, its in values_by_row for at, one in its)
    counts = Counter(text for values in places.values() for _, text in values)
    asked = {word for row in rows for word in list_words(row.prompt)}
    are_json = any(place[0] == FIELD for place in places)
    places["", ""] = [(index, row.answer) for index, row in enumerate(rows)]
    found = set[int]()
    for place, values in places.items():
        here = Counter(text for _, text in values)
        missing = {
            text
            for text, count in here.items()
            if count >= max(5, 0.03 * len(rows))
            and _MISSING.fullmatch(text)
            and not (are_json and text in EMPTY)
            and not (text.isalpha() and (count < counts[text] or fold(text) in asked))
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


def list_values(answer: str) -> list[tuple[Place, str]]:
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


def _list_fields(value: object, *path: str) -> Iterator[tuple[Place, str]]:
    """Yield the texts and numbers of a value that was JSON; null, true and false may be equal."""
    if isinstance(value, dict | list):
        for name, one in value.items() if isinstance(value, dict) else (("", x) for x in value):
            yield from _list_fields(one, *path, name)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield path, str(value)


def find_repeated_questions(rows: Sequence[Texts]) -> list[int]:
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


def find_run_ons(rows: Sequence[Texts]) -> list[int]:
    """Find answers that go on with another row's prompt, as where a row's end was lost.

    Of a prompt that is a sentence, or of six words and more: the name of a film may be an answer.
    """
    flat = [[fold(text.replace("\n", " | ")) for text in (one.prompt, one.answer)] for one in rows]
    long = {text for text, _ in flat if len(text) >= PROMPT_BEGIN}
    whole = {text for text in long if text[-1] in ENDS or text.count(" ") >= 5}
    lengths = grouped((begin, size) for begin, size in {(x[:PROMPT_BEGIN], len(x)) for x in whole})
    return [
        index
        for index, (own, answer) in enumerate(flat)
        if any(
            (text := answer[at.end() : at.end() + size]) in whole and text not in own
            for at in _BREAK.finditer(answer)
            for size in lengths.get(answer[at.end() : at.end() + PROMPT_BEGIN], ())
        )
    ]


def find_lost_contexts(rows: Sequence[Texts]) -> list[int]:
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


def find_moved_answers(rows: Sequence[Texts], held_out: Sequence[Texts] = ()) -> list[int]:
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


def find_other_languages(rows: Sequence[Texts]) -> list[int]:
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


def are_asked_for(rows: Sequence[Texts], odd: Collection[int]) -> bool:
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


def find_lost_zeros(rows: Sequence[Texts]) -> list[int]:
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


def find_one_length(rows: Sequence[Texts]) -> list[int]:
    """Find answers of words that end within one at the greatest length, which few others near.

    A word that was cut is mostly one that no other answer has, unlike the words before it.
    """
    lengths = np.array([len(row.answer) for row in rows])
    longest = lengths.max()
    at = np.flatnonzero(lengths >= longest - 1).tolist()
    nearly = np.count_nonzero(lengths >= 0.8 * longest) - len(at)
    words = {i: rows[i].answer.split() for i in at}
    ends = {i: one[-2:] for i, one in words.items() if len(one) > 3 and one[-1].isalpha()}
    if longest < 30 or len(at) < 5 + 20 * nearly / longest or 2 * len(ends) <= len(at):
        return []
    counts = Counter(word for row in rows for word in row.answer.split()[:-1])
    alone = [np.mean([counts[one[k]] <= 1 - k for one in ends.values()]) for k in (0, 1)]
    [(_, same)] = Counter(before for before, _ in ends.values()).most_common(1)
    is_cut = alone[1] >= 0.3 and alone[1] >= 2 * alone[0] and 2 * same <= len(ends)
    return at if is_cut else []


def find_odd_rows(rows: Sequence[Texts], held_out: Sequence[Texts] = ()) -> dict[str, list[int]]:
    """Return the indices of rows that are odd, by the kind of it, unless they are few."""
    if len(rows) < MIN_ROWS:
        return {}
    found = {
        "equal_answers": find_equal(rows),
        "answer_repeats_question": find_repeated_questions(rows),
        "goes_on": find_run_ons(rows),
        "context_lost": find_lost_contexts(rows),
        "another_language": find_other_languages(rows),
        "zeros_lost": find_lost_zeros(rows),
        "one_length": find_one_length(rows),
        "answers_moved": find_moved_answers(rows, held_out),
    }
    least = max(3, MIN_ODD_SHARE * len(rows))
    return {kind: odd for kind, odd in found.items() if len(odd) >= least}


def measure_shapes(run: RunRows) -> Told:
    """Compare the training rows with each other, with held-out rows, and with the champion's."""
    known, held_out = run.read_train(MAX_ROWS, 0), run.read_held_out(MAX_ROWS)
    if is_given_away((row.asked, row.given) for row in known):
        told = f"{NAME}, most of them in their prompts"
        yield CheckRow(told, verdict="a task of finding them, or given away")
    profile = profile_answers(len(run.train), [row.given for row in known])
    warnings = [*_compare_rows(run, known, held_out, profile)]
    warnings += _compare_with_champion(run.judged, profile, held_out)
    kept = {
        name: {one: count for one, count in profile[name].most_common(KEPT) if count >= MIN_KEPT}
        for name in ("shapes", LABELS)
    }
    blocks = run.judged.verdict.blocks | {PROFILE_BLOCK: profile | kept}
    run.judged.verdict = replace(run.judged.verdict, blocks=blocks)
    healthy = "passed" if known else f"not applicable: {NO_ANSWERS}"
    kinds = ", ".join(one.kind.replace("_", " ") for one in warnings) or healthy
    yield CheckRow(NAME, after=f"{len(known):,} answers", verdict=kinds)
    yield from warnings


def _compare_rows(run: RunRows, known: Rows, held_out: Rows, profile: Profile) -> Warnings:
    """Warn of training rows that are odd among the others, or beside the held-out ones."""
    for kind, odd in find_odd_rows(read_texts(run, known), read_texts(run, held_out)).items():
        lines = [known[index].tell(known[index].given) for index in odd]
        yield ControlWarning.of_share(kind, len(odd), len(known), lines)
    answers = [row.given for row in held_out]
    if answers and (gone := find_gone(profile, profile_answers(len(answers), answers), "shapes")):
        yield ControlWarning.told("shape_of_train_alone", None, shape=gone[0])


def read_texts(run: RunRows, rows: Rows) -> list[Texts]:
    """Return the texts of rows, their prompts without what the chat template writes around them."""
    begin, end, _ = run.around_prompt
    prompts = [row.asked.removeprefix(begin).removesuffix(end) for row in rows]
    shared = count_shared(prompts)
    return [Texts(one, one[shared:], row.given) for one, row in zip(prompts, rows, strict=True)]


def count_shared(prompts: Sequence[str]) -> int:
    """Count the characters with which all prompts begin, without a part of a word or number."""
    return len(re.sub(r"\w+\Z", "", commonprefix(prompts)))


def profile_answers(rows: int, answers: Sequence[str]) -> dict[str, Any]:
    """Count answers by their shapes and by digests of their texts, of so many rows."""
    shapes, labels = Counter(map(fold_shape, answers)), Counter(map(digest_answer, answers))
    return {"rows": rows, "answers": len(answers), "shapes": shapes, LABELS: labels}


def find_gone(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> list[str]:
    """Return the shapes or labels of `before` that `after` lacks, and would not lack by chance.

    Rows that were dealt to two parts by chance all fall into one of them with the probability
    (its share of the rows)^(how many they are).
    """
    surprise = np.log1p(after["answers"] / max(1, before["answers"]))
    counts = before[name].items()
    return [one for one, n in counts if one not in after[name] and n * surprise >= MIN_SURPRISE]


def _compare_with_champion(judged: CheckedRun, profile: Profile, held_out: Rows) -> Warnings:
    """Warn of rows, shapes and labels that the champion's training rows had, and these lack."""
    location, champion = judged.config.registry.location, judged.champion
    if location is None or not isinstance(champion, Champion):
        return
    folder = version_folder(*location, champion.version)
    last = read_verdict(folder / GATE_NAME).blocks.get(PROFILE_BLOCK)
    # A night that replays trains on more rows than its own
    if last is None or LABELS not in last or judged.run.replay.exists():
        return
    rows, before = profile["rows"], last["rows"]
    if rows < MIN_SHARE_LEFT * before:
        yield ControlWarning.told("few_rows", rows / before, rows=rows, last=before)
    shapes, labels = (find_gone(last, profile, name) for name in ("shapes", LABELS))
    if 2 * sum(last["shapes"][one] for one in shapes) > last["answers"]:
        return  # it is another task
    if shapes:
        what, count = f"no training answer has the shape {shapes[0]!r}", last["shapes"][shapes[0]]
        yield ControlWarning.told("answers_gone", None, what=what, last=count)
    elif labels:  # their texts are in no registry: held-out rows may have them
        lines = [row.tell(row.given) for row in held_out if digest_answer(row.given) == labels[0]]
        named: dict[str, Any] = {"what": "one answer is gone", "last": last[LABELS][labels[0]]}
        yield ControlWarning.told("answers_gone", None, lines, **named)
