"""Length and wording of every sentence that a person reads: `python docs/check_prose.py`.

It reads the Markdown of README, docs/, deployments/ and benchmarks/, the messages of errors, the
help of flags and keys, and the sentences of pages and reports.
Prose is paragraphs, list items and table cells, not headings and blocks of code. Inline code, or a
placeholder in a message, is one word. A sentence ends at `.`, `?` or `!` before a space, and at the
end of its block; a colon or a semicolon ends none. Fewer than five words without such an end are a
label, as table cells often are, and count nowhere. Lines of blocks have to fit their column.

`--check` fails where a page of HELD is outside of the limits. A page that was rewritten is added.
It fails too for a docstring of nested_core that is a riddle: RIDDLES has the turns that readers who
did not know the code understood worst.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
MESSAGES = "messages, help and reports"
HELD = (
    "README.md",
    "deployments/README.md",
    "docs/README.md",
    "docs/better-adapters.md",
    "docs/coming-from.md",
    "docs/controls.md",
    "docs/data.md",
    "docs/data-parallel.md",
    "docs/evaluate.md",
    "docs/exit-codes.md",
    "docs/export.md",
    "docs/faults.md",
    "docs/first-hour.md",
    "docs/gate.md",
    "docs/how-it-works.md",
    "docs/installation.md",
    "docs/minutes.md",
    "docs/nested-optimizer.md",
    "docs/nested-learning.md",
    "docs/new-rows.md",
    "docs/noise.md",
    "docs/operations.md",
    "docs/peft.md",
    "docs/prefect-pages.md",
    "docs/registry.md",
    "docs/replay.md",
    "docs/report.md",
    "docs/runs.md",
    "docs/serving.md",
    "docs/silent-updates.md",
    "docs/support.md",
    "docs/tables.md",
    "docs/troubleshooting.md",
    "docs/watching.md",
    MESSAGES,
)
GENERATED = (
    "docs/command-line.md",
    "docs/configuration.md",
    "docs/environment.md",
    "docs/python.md",
)
TEXT_CALLS = {"key": 1, "Text": 0, "Reason": 1, "warn_once": 2}  # calls, and which argument is text
TEXT_KEYWORDS = {"help", "description", "message"}

MEAN_WORDS = 15
LONG_WORDS = 28  # at most 5 of 100 sentences have more
MAX_WORDS = 40
MIN_WORDS = 5  # without a full stop, fewer are a label
SEMICOLON_SHARE = 0.1
BLOCK_WIDTH = 86  # characters that the site's column shows, 1,280 pixels wide
BANNED = re.compile(r"\b(is said|is told|are told|stands|stand)\b|(?:^|[.,:;] )(?:[Ww]ho \w+s\b)")
# "None" or a pronoun in the place of the noun: say what is not there, and when.
RIDDLES = re.compile(
    r"\bnone\s+where\b"
    r"|\b(?:where|if)\s+(?:there\s+(?:is|are)\s+none|none\s+(?:is|are|was|were|does|did)\b)"
    r"|\b(?:where|if)\s+(?:it|one)\s+has\s+none\b"
    r"|\b(?:what|neither|never)\s+is\s+so\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[.?!])[\"')\]]*\s+(?=\S)")
_NO_SENTENCE_END = re.compile(r"\b(e\.g|i\.e|vs|cf|approx|no|fig|sect)\.$", re.IGNORECASE)


@dataclass(frozen=True)
class Prose:
    """The sentences of a page, and what is measured of them."""

    name: str
    sentences: tuple[str, ...]
    wide_lines: tuple[str, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Words of each sentence, the shortest first."""
        return sorted(len(sentence.split()) for sentence in self.sentences)

    @property
    def mean(self) -> float:
        """Words of a sentence in the mean; 0 without any."""
        return sum(self.lengths) / max(1, len(self.lengths))

    def share_above(self, words: int) -> float:
        """The share of sentences with more words than that."""
        return sum(length > words for length in self.lengths) / max(1, len(self.lengths))

    @property
    def semicolon_share(self) -> float:
        """The share of sentences with a semicolon."""
        return sum(";" in sentence for sentence in self.sentences) / max(1, len(self.sentences))

    def find_problems(self) -> Iterator[str]:
        """What is outside of the limits."""
        if self.mean > MEAN_WORDS:
            yield f"{self.name}: {self.mean:.1f} words a sentence, at most {MEAN_WORDS}"
        if (share := self.share_above(LONG_WORDS)) > 0.05:
            yield f"{self.name}: {share:.1%} of the sentences have more than {LONG_WORDS} words"
        for sentence in self.sentences:
            if (words := len(sentence.split())) > MAX_WORDS:
                yield f"{self.name}: {words} words, at most {MAX_WORDS}: {sentence}"
            if (banned := BANNED.search(sentence)) is not None:
                yield f"{self.name}: {banned[0].strip()!r}: {sentence}"
        if self.semicolon_share > SEMICOLON_SHARE:
            yield f"{self.name}: {self.semicolon_share:.1%} of the sentences have a semicolon"
        for line in self.wide_lines:
            yield f"{self.name}: {len(line)} characters in a block, at most {BLOCK_WIDTH}: {line}"


def split_sentences(text: str) -> Iterator[str]:
    """The sentences of a block of text, without labels."""
    begun = ""
    for part in _SENTENCE_END.split(" ".join(text.split())):
        begun = f"{begun} {part}".strip()
        if _NO_SENTENCE_END.search(begun) is None:
            yield from _unless_label(begun)
            begun = ""
    yield from _unless_label(begun)


def _unless_label(text: str) -> Iterator[str]:
    if len(text.split()) >= MIN_WORDS or (text[-1:] in (".", "?", "!") and " " in text):
        yield text


def read_markdown(text: str) -> Iterator[str]:
    """The sentences of a page in Markdown."""
    is_heading = False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        is_heading = token.type == "heading_open" or (is_heading and token.type == "inline")
        if token.type == "inline" and not is_heading:
            yield from split_sentences("".join(_words_of(token.children or ())))


def read_wide_lines(text: str) -> Iterator[str]:
    """The lines of a page's blocks of code that do not fit its column."""
    for token in MarkdownIt("commonmark").parse(text):
        if token.type in ("fence", "code_block"):
            yield from (line for line in token.content.splitlines() if len(line) > BLOCK_WIDTH)


def _words_of(tokens: Iterable[Token]) -> Iterator[str]:
    for token in tokens:
        if token.type == "text":
            yield token.content
        elif token.type == "code_inline":
            yield "`code`"
        elif token.type in ("softbreak", "hardbreak"):
            yield " "


def find_riddles(root: Path = ROOT) -> Iterator[str]:
    """Each docstring of nested_core that has one of RIDDLES, by file and line."""
    for path in sorted((root / "nested_core").rglob("*.py")):
        name = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                riddle = RIDDLES.search(ast.get_docstring(node) or "")
                if riddle is not None:
                    line = node.body[0].lineno
                    yield f"{name}:{line}: {' '.join(riddle[0].split())!r} in a docstring"


def read_messages(source: str) -> Iterator[str]:
    """The sentences that a module of Python shows: errors, help of flags and keys, reports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            texts = list(node.exc.args)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", "")
            texts = node.args[TEXT_CALLS[name] :][:1] if name in TEXT_CALLS else []
            texts += [each.value for each in node.keywords if each.arg in TEXT_KEYWORDS]
        else:
            continue
        for text in texts:
            yield from split_sentences(_text_of(text))


def _text_of(expression: ast.expr) -> str:
    """The text of a string, a placeholder as one word; empty for any other expression."""
    if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        return re.sub(r"`[^`]*`", "`code`", expression.value)
    if isinstance(expression, ast.JoinedStr):
        parts = [
            part.value if isinstance(part, ast.Constant) else "X" for part in expression.values
        ]
        return re.sub(r"`[^`]*`", "`code`", "".join(map(str, parts)))
    return ""


def read_project(root: Path = ROOT) -> Iterator[Prose]:
    """Every page that is written by hand, and the messages."""
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    pages += [root / "deployments" / "README.md", root / "benchmarks" / "README.md"]
    for page in pages:
        name = page.relative_to(root).as_posix()
        if name not in GENERATED:
            text = page.read_text(encoding="utf-8")
            yield Prose(name, tuple(read_markdown(text)), tuple(read_wide_lines(text)))
    sources = [
        path for room in ("nested_core", "tasks", "flows") for path in (root / room).rglob("*.py")
    ]
    messages = [
        text for path in sources for text in read_messages(path.read_text(encoding="utf-8"))
    ]
    yield Prose(MESSAGES, tuple(messages))


def main(arguments: list[str]) -> int:
    """Print the figures of each page, or with `--check` what is outside of the limits."""
    pages = list(read_project())
    if "--check" in arguments:
        problems = [line for page in pages if page.name in HELD for line in page.find_problems()]
        problems += find_riddles()
        print("\n".join(problems), end="\n" if problems else "")
        return int(bool(problems))
    print(f"{'page':<32}{'words':>7}{'mean':>7}{'> 28':>8}{'> 40':>8}{';':>8}")
    for page in pages:
        shares = (page.share_above(LONG_WORDS), page.share_above(MAX_WORDS), page.semicolon_share)
        cells = "".join(f"{share:>8.1%}" for share in shares)
        print(f"{page.name:<32}{sum(page.lengths):>7}{page.mean:>7.1f}{cells}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
