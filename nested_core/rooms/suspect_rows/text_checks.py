"""Texts in another encoding, turns as text, cut-off answers, exchanged columns, two answers.

What a single row may well have is reported only if many rows of a file have it: a question is a
sound answer, and a data set where nearly every answer is a question has its columns exchanged.
"""

from __future__ import annotations

import html
import re
from urllib.parse import unquote

import polars as pl

from nested_core.data.lines.example_parsing import TEMPLATED_FORMATS
from nested_core.data.room_checks import RowChecks
from nested_core.data.rules.rule_table import FrameRules, Rule
from nested_core.data.tokens.text_notes import unescape
from nested_core.records.dataset import Findings
from nested_core.rooms.suspect_rows.rows_compared import WORDS, judge_examples

# What the bytes of UTF-8 beyond ASCII become when they are read as Latin-1 or as Windows-1252.
# Not the signs that may follow a capital at the end of a word, such as a closing quotation mark.
_CONTINUATION = "\x80-\xbf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152"
_CONTINUATION += "\u017d\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153"
_CONTINUATION += "\u017e\u0178"
MOJIBAKE_PATTERN = "|".join(
    (
        "\u00c3[\x80-\x9f\u00a0-\u00aa\u00ac-\u00ba\u00bc-\u00bf\u0192\u0160\u0152\u017d\u0178]",
        "\u00c2[\x80-\x9f\u00a3\u00a7\u00a9\u00ae\u00b0\u00b1]",
        "\u00e2(?:\u20ac|\x80)[\x80-\x9f\u00a2\u00a6\u2122\u0153\u201c\u201d\u02dc\u00a0]",
        f"(?:[\u00c4\u00c5\u00ce\u00cf\u00d0\u00d1\u00d8\u00d9\u00d7][{_CONTINUATION}]){{2}}",
        f"(?:[\u00e0-\u00ef][{_CONTINUATION}]{{2}}){{2}}",
        f"\u00f0[\u0178\x9f][{_CONTINUATION}]{{2}}",
    )
)
# Text that stands for other text: HTML's entities, escapes of JSON and Python (but no command of
# LaTeX), and what addresses have for blanks and letters (but no n%16, nor 12%ABV)
_ENCODED = re.compile(
    r"&(?:#\d+|#x[\da-fA-F]+|amp|lt|gt|quot|apos|nbsp|euro|hellip|[nm]dash|[lr][sd]quo|szlig"
    r"|[A-Za-z](?:acute|grave|circ|tilde|uml|cedil|ring|slash));|\\u[\da-fA-F]{4}"
    r"|(?<!\()\\[nrt](?![a-z]|Vert|Brace|V[Dd]ash|(?:Left|Right)(?:right)?arrow)"
    r"|(?<=\w)(?:%(?:[2-7]\d(?=[^\W\d_]|%)|[2-7][A-F])|(?:%[89A-F][\dA-F]){2,})+"
)
_MAY_BE_ENCODED = r"&[#A-Za-z]\w+;|\\[unrt]|%[0-9A-F]{2}"  # the same or more, for polars
# Where it is meant: within quotation marks, code, formulas and addresses
_QUOTED = re.compile(
    r"(?s)```.*?(?:```|\Z)|`[^`]*`|(?<!\\)\"(?:\\.|[^\"\\])*\"|(?<!\w)'(?:\\.|[^'\\\n])*'(?!\w)"
    r"|\$[^$]*\$|(?<!\S)[^\s/]{0,99}/\S*"
)
# A turn, or a plain text, that is a row or its turns as Python or JSON writes them
_QUOTE = r"""\\*['"]"""  # doubled, as in a text within JSON
_KEY = rf"{_QUOTE}\s*:[^\x00]*{_QUOTE}"
_ROLES = "system|user|assistant|human|gpt"
_SERIALISED_PATTERN = (
    rf"""(?:^|\x00)\s*"?[\[(]*\s*\{{[^\x00]{{0,40}}?{_QUOTE}(?:"""
    rf"(?:role|from){_QUOTE}\s*:\s*{_QUOTE}(?:{_ROLES}){_QUOTE}\s*,\s*{_QUOTE}(?:content|value)"
    rf"|content{_KEY}role|prompt{_KEY}completion){_QUOTE}\s*:"
)
# Markup, and what regular expressions have; but no path, bullet, bold type, sum or note of markdown
_TAG_OR_PATTERN = re.compile(
    r"</?[A-Za-z][^<>]*>|\\[ADSWZdsw](?![A-Za-z])|\[\^(?!\w+\])|\\[nrt](?:\?|[*+$](?![*\s\w]))"
)
# Words that end no sentence; an answer that ends in one, without a full stop, was cut off. Not `a`
# and `an` alone: a choice's letter, and what German verbs are parted from
_WORDS_BEFORE_OTHERS = (
    r"(?:as|by|for|in|of|to|with)\san?|"
    "the|of|and|or|with|from|because|which|whose|my|your|their|its|than|into|"
    "der|dem|den|des|und|eine|einer|einem|einen|"
    "le|les|des|et|ou|avec|une|du|el|los|las|del|con|una"
)
_CUT_OFF_PATTERN = rf"[^\x00]{{20}}\s(?:{_WORDS_BEFORE_OTHERS})\s*$"
_TAIL_CHARACTERS = 48
_QUESTION_END = r"[?\uff1f\u061f][\"'\u201d\u2019)\s]*"
MIN_ROWS = 10  # of which a share of questions tells something
MIN_ODD_ROWS = 3
ODD = (MIN_ODD_ROWS, 0.01)  # rows, and share of them, with text that stands for other text
CUT_OFF = (5, 0.05)
# Blanks of a word processor or a web page, in a turn that has no more of a keyboard. Not those of
# Chinese and Japanese, nor U+200B, which Thai has between words, nor those within numbers
_ODD_BLANKS = r"[^\W\d_][\u00a0\u2000-\u200a\u202f][^\W\d_]"
_ODD = re.compile(_ODD_BLANKS)
MIN_ODD_BLANKS = 3
MIN_REPEATING_SHARE = 0.5  # of answers that begin with their prompt and go on
MIN_REPEATED_CHARACTERS = 12
_LABEL = r"\A[\p{L}\s_&/'.-]{1,40}\z"  # not a figure, nor JSON with a part of the prompt
MIN_QUESTION_SHARE = 0.8  # of answers, with at most MAX_PROMPT_QUESTION_SHARE of prompts
MAX_PROMPT_QUESTION_SHARE = 0.1
# Two answers to a prompt may be alternatives on purpose. They are not if they come from two files,
# each with one answer to a prompt, nor if one answer is given to many prompts, as a label is.
MIN_ACROSS_FILES_SHARE = 0.9
MAX_DISTINCT_ANSWER_SHARE = 0.1

_COLUMNS: dict[str, type[pl.DataType]] = {
    # By the name of the check: true where it warns
    **dict.fromkeys(WORDS["texts"], pl.Boolean),
    **{"encoded": pl.String, "label": pl.String},
    **{"train_file": pl.Categorical, "answers_otherwise": pl.Int32},
}
_RULES = FrameRules(
    _COLUMNS,
    tuple(Rule.warning(one, ~pl.col(one), text, once=True) for one, text in WORDS["texts"].items()),
)


def find_suspect_texts(texts: pl.Series) -> dict[str, pl.Series]:
    """Return what single texts look like, a Boolean column each, and how answers are encoded.

    Only turns of text have answers; in plain texts and calls of tools no NUL separates turns.
    """
    tails, turns = texts.str.slice(-_TAIL_CHARACTERS), texts.str.split("\0")
    answers = _compare_with_prompts(turns)
    asked = rf"{_QUESTION_END}\x00[^\x00]*$"
    found = {
        "is_mojibake": texts.str.contains(MOJIBAKE_PATTERN),
        "is_serialised": texts.str.contains(_SERIALISED_PATTERN),
        "has_odd_blanks": _has_odd_blanks(texts, turns),
        "is_repeating": answers["is_repeating"],
        "has_answer": texts.str.contains("\0", literal=True),
        "is_cut_off": tails.str.contains(_CUT_OFF_PATTERN),
        "is_prompt_question": texts.str.contains(asked),
        "is_answer_question": tails.str.contains(f"{_QUESTION_END}$"),
    }
    may_be = texts.str.contains(_MAY_BE_ENCODED).fill_null(value=False).arg_true()
    encoded = pl.Series([None], dtype=pl.String).new_from_index(0, len(texts))
    encoded = encoded.scatter(may_be, [find_encoded(text) for text in texts.gather(may_be)])
    flags = {name: column.fill_null(value=False) for name, column in found.items()}
    labels = {name: answers[name] for name in ("label", "is_in_prompt")}
    return flags | {"encoded": encoded} | labels


def _has_odd_blanks(texts: pl.Series, turns: pl.Series) -> pl.Series:
    """Return whether most blanks of a turn are none that a keyboard has."""
    may_be = (texts.str.count_matches(_ODD_BLANKS) >= MIN_ODD_BLANKS).fill_null(value=False)
    found = [
        any(len(_ODD.findall(turn)) >= max(MIN_ODD_BLANKS, turn.count(" ")) for turn in row)
        for row in turns.filter(may_be)
    ]
    return may_be.scatter(may_be.arg_true(), found) if found else may_be


def _compare_with_prompts(turns: pl.Series) -> pl.DataFrame:
    """Return whether an answer begins with its prompt and goes on; and answers that may be labels.

    Those are short, and of letters; null in the place of others. Their prompt may have them.
    """
    prompt = pl.col("turns").list.get(-2, null_on_oob=True).str.strip_chars()
    given = pl.col("turns").list.last()
    answer = given.str.strip_chars()
    is_longer = answer.str.len_chars() > prompt.str.len_chars() + 1
    is_long = prompt.str.len_chars() >= MIN_REPEATED_CHARACTERS
    return pl.DataFrame({"turns": turns}).select(
        is_repeating=answer.str.starts_with(prompt) & is_longer & is_long,
        label=pl.when(given.str.contains(_LABEL)).then(given),
        # Of a long pattern polars makes no more than an error
        is_in_prompt=prompt.str.contains(answer.str.head(40), literal=True).fill_null(value=False),
    )


def find_encoded(text: str) -> str | None:
    """Return characters of an answer that stand for others; None without any, or if on purpose.

    They are on purpose in markup, code, regular expressions and quotations, and where the prompt
    has them too or, as in a task of encoding, what they stand for.

    text: the turns, joined by NUL.
    """
    prompt, _, answer = text.rpartition("\0")
    for word in () if _TAG_OR_PATTERN.search(answer) else _QUOTED.sub(" ", answer).split(" "):
        found, read = _ENCODED.search(word), unquote(html.unescape(unescape(word)))
        asked = found and (found[0] in prompt or bool(read.strip()) and read.strip() in prompt)
        if found and read != word and not asked:
            return found[0]
    return None


def _add_findings(frame: pl.DataFrame, findings: Findings) -> None:
    """Add the findings on the lines of a file."""
    if frame.is_empty():
        return
    is_turns = pl.col("has_answer") & pl.col("format").is_in(TEMPLATED_FORMATS)
    rows = is_turns.sum()
    asks = is_turns & pl.col("is_answer_question")
    was_asked = is_turns & pl.col("is_prompt_question")
    lines_before = [part.lines_before for part in findings.parts.get(frame["file"][0], ())]
    may_be = {  # with the least rows and the least share of rows that are told
        "encoded-answers": (is_turns & pl.col("encoded").is_not_null(), *ODD),
        "serialised-turns": (pl.col("is_serialised"), *ODD),
        "odd-blanks": (pl.col("has_odd_blanks"), *ODD),
        "answers-repeat-prompts": (is_turns & pl.col("is_repeating"), 1, MIN_REPEATING_SHARE),
        "cut-off-answers": (is_turns & pl.col("is_cut_off"), *CUT_OFF),
        "exchanged-columns": (asks, 1, MIN_QUESTION_SHARE),
    }
    found = {
        name: odd & (odd.sum() >= least) & (odd.sum() >= share * rows)
        for name, (odd, least, share) in may_be.items()
    }
    has_few_questions = was_asked.sum() <= MAX_PROMPT_QUESTION_SHARE * rows
    found["answers-repeat-prompts"] &= rows >= MIN_ROWS
    found["exchanged-columns"] &= ~was_asked & (rows >= MIN_ROWS) & has_few_questions
    found |= {
        "mojibake": pl.col("is_mojibake"),
        "labels-in-two-spellings": pl.lit(_is_respelt(frame, is_turns)),
        "two-answers": _is_contradicted(frame, is_turns, lines_before),
    }
    _RULES.add_findings(frame.with_columns(**found), findings)


def _is_respelt(frame: pl.DataFrame, is_turns: pl.Expr) -> pl.Series:
    """Return whether an answer is a label that more rows write with other capitals or blanks.

    Some of them have to differ from what their prompt lists: else answers copy a part of it.
    """
    known = frame.select(
        label=pl.when(is_turns).then(pl.col("label")),
        folded=pl.col("label").str.to_lowercase().str.replace_all(r"\s", ""),
        is_own=~pl.col("is_in_prompt"),
    )
    labels = known["label"]
    counts = labels.drop_nulls().value_counts(sort=True, name="count")
    if MIN_ODD_ROWS * len(counts) > len(labels) - labels.null_count():
        return pl.zeros(len(labels), pl.Boolean, eager=True)
    often = known.drop_nulls("label").with_columns(
        count=pl.len().over("label"), own=pl.col("is_own").sum().over("folded")
    )
    rarer = often.filter(
        pl.col("own") >= MIN_ODD_ROWS,
        pl.col("count") >= MIN_ODD_ROWS,
        pl.col("label")
        != pl.col("label")
        .sort_by("count", "is_own", "label", descending=[False, True, False])
        .last()
        .over("folded"),
    )
    return labels.is_in(rarer["label"].unique().to_list()).fill_null(value=False)


def _is_contradicted(frame: pl.DataFrame, is_turns: pl.Expr, lines_before: list[int]) -> pl.Expr:
    """Return whether a line of train has an answer that does not go with an earlier line's.

    lines_before: of each file of the split, the lines in the files before it; empty for one file.
    """
    has_two = is_turns & pl.col("is_train") & pl.col("answers_otherwise").is_not_null()
    starts = pl.Series(lines_before, dtype=pl.Int32)
    own = starts.search_sorted(frame["line"])
    other = starts.search_sorted(frame["answers_otherwise"].fill_null(0))
    is_across = has_two & pl.lit(own != other)
    is_left_over = is_across & (is_across.sum() >= MIN_ACROSS_FILES_SHARE * has_two.sum())
    answers = pl.col("answer")
    are_labels = (
        answers.filter(is_turns).n_unique() <= MAX_DISTINCT_ANSWER_SHARE * is_turns.sum()
    ) | (answers.filter(has_two).n_unique() <= MAX_DISTINCT_ANSWER_SHARE * has_two.sum())
    return is_left_over | (has_two & are_labels)


CHECKS = RowChecks(
    {
        **dict.fromkeys(("is_mojibake", "is_serialised", "has_answer", "is_cut_off"), pl.Boolean),
        **dict.fromkeys(("has_odd_blanks", "is_repeating"), pl.Boolean),
        **dict.fromkeys(("is_prompt_question", "is_answer_question"), pl.Boolean),
        **{"encoded": pl.String, "label": pl.String, "is_in_prompt": pl.Boolean},
    },
    find_suspect_texts,
    _add_findings,
    judge_examples,
)
