"""Tokenised examples on standard output, several tokens a line: which are learnt, id and text.

Texts are quoted and escaped: no control character of a data set reaches the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len
from rich.text import Text

from flows.terminal.console import output_console, print_line
from nested_core.data.tokens.tokenized_split import ShownExample, ShownToken
from nested_core.text.foreign_text import escape

WIDTH, CELL = 100, 20
LONGEST_TEXT = 60
LEARNT, LEARNT_STYLE = "*", "bold green"


def print_examples(examples: Iterable[ShownExample], note: str | None = None) -> None:
    """Print each example below a line that says where it is from and how much of it is learnt.

    `note` stands before the first, if there is one.
    """
    console = output_console(WIDTH)
    for number, example in enumerate(examples):
        if number == 0 and note is not None:
            print_line("")
            print_line(note)
        learnt = sum(token.supervised for token in example.tokens)
        place = f"{example.file}:{example.line}"
        print_line("")
        print_line(f"{place}: {len(example.tokens)} tokens, {learnt} trained on ({LEARNT})")
        for line in lay_out_tokens(example.tokens, min(WIDTH, console.width)):
            console.print(line, soft_wrap=True)


def lay_out_tokens(tokens: Sequence[ShownToken], width: int) -> Iterator[Text]:
    """Lines of at most `width` columns; a token takes one cell, or as many as its text needs."""
    digits = max((len(str(token.id)) for token in tokens), default=1)
    line = Text()
    for token in tokens:
        mark = LEARNT if token.supervised else " "
        content = f"{mark}{token.id:>{digits}} {_quote_token(token.text)}"
        cells = -(-(cell_len(content) + 1) // CELL)
        if line and cell_len(line.plain) + cells * CELL > width:
            yield _trim_line(line)
            line = Text()
        padding = " " * (cells * CELL - cell_len(content))
        line.append(content, LEARNT_STYLE if token.supervised else "").append(padding)
    if line:
        yield _trim_line(line)


def _trim_line(line: Text) -> Text:
    line.rstrip()
    return line


def _quote_token(text: str) -> str:
    quoted = escape(repr(text))
    return quoted if len(quoted) <= LONGEST_TEXT else f"{quoted[:LONGEST_TEXT]}..."
