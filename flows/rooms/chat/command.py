"""chat: ask a base model and one adapter or two the same, and read their answers side by side."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from flows.commands.adapter_places import add_adapter
from flows.commands.command_output import printer
from flows.terminal.console import WIDTH_WITHOUT_TERMINAL, output_console, print_progress
from nested_core.errors import ConfigError, DamagedError
from nested_core.pipeline.named_adapters import find_named_adapter
from nested_core.storage.output_places import require_output_file
from nested_core.storage.untrusted_files import append_regular, read_regular
from nested_core.text.foreign_text import escape, escape_but_keep_newlines

StreamAnswers = Callable[[Mapping[str, Any]], Iterator[tuple[str, str]]]
NEW_CONVERSATION = "/new"
HELP = "/help"
INPUT_PROMPT = "> "
HELP_TEXT = f"Ctrl-D ends, {NEW_CONVERSATION} begins a new conversation."
SYSTEM_HELP = "the system message of each conversation (default: that of the training rows)"
MAX_ADAPTERS = 2
ADAPTER_TOKENS = 256
BASE_TOKENS = 64  # a base that was not trained to end goes on and on
MAX_PROMPTS_BYTES = 16 * 2**20


def add_commands(commands: Any) -> None:
    """Add the command."""
    chat = commands.add(
        "chat", run_chat, "Inspect", "runs/first", usage="%(prog)s ADAPTER [ADAPTER] [options]"
    )
    add_adapter(chat, "adapters", "; one or two", nargs="+")
    chat.add_argument("--system", metavar="TEXT", help=SYSTEM_HELP)
    asked = chat.add_mutually_exclusive_group()
    asked.add_argument("--prompt", action="append", metavar="TEXT", help="ask this alone, then end")
    asked.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="ask each line of a text file, in a conversation of its own, then end",
    )
    chat.add_argument(
        "--save", type=Path, metavar="FILE", help="add prompts and answers to it, as JSON Lines"
    )
    chat.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"of an answer (default: {ADAPTER_TOKENS} of an adapter, {BASE_TOKENS} of the base)",
    )
    chat.add_argument(
        "--temperature", type=float, default=0.0, metavar="NUMBER", help="default: 0, greedy"
    )


def run_chat(arguments: argparse.Namespace) -> Callable[[], int]:
    """Ask base and adapters, and read their answers."""
    most = arguments.max_tokens
    if (most is not None and most < 1) or arguments.temperature < 0:
        raise ConfigError("chat: --max-tokens is 1 or more, and --temperature 0 or more.")
    given: list[Path] = arguments.adapters
    if len(given) > MAX_ADAPTERS or len(set(given)) < len(given):
        raise ConfigError("chat: give one adapter, or two different ones.")
    prompts = _read_prompts(arguments.prompt, arguments.prompts)
    save = None if arguments.save is None else require_output_file(arguments.save, "--save")
    found = [find_named_adapter(path, arguments.registry) for path in given]
    from nested_core.models.generation import Sampling
    from nested_core.records.dataset import PromptFormat
    from nested_core.rooms.chat.side_by_side import SideBySide  # loads mlx_lm, which takes seconds

    names = ["adapter"] if len(given) == 1 else [str(path) for path in given]
    for name, adapter in zip(names, found, strict=True):
        print_progress(f"{name}: {adapter.describe()}")
    rows, system = PromptFormat.read(found[0].training_record), arguments.system
    if system is None and rows is not None and rows.system is not None:
        system = rows.system
        print_progress(f"system text of its training rows (--system '' for none): {escape(system)}")
    models = SideBySide(
        {name: adapter.folder for name, adapter in zip(names, found, strict=True)},
        model=found[0].model,
        trust_remote_code=found[0].trusts_remote_code,
        tools=None if rows is None else rows.tools,
    )
    sampling = Sampling(most or ADAPTER_TOKENS, temperature=arguments.temperature)
    stream = partial(models.stream_answers, sampling=sampling, base_tokens=most or BASE_TOKENS)
    chat = _Chat(models.sides, stream, system or None, save)
    return printer(lambda: chat.answer_each(prompts))


def _read_prompts(given: Sequence[str] | None, file: Path | None) -> Iterator[str]:
    """Return the prompts, the lines of the file, else what is typed or standard input's lines."""
    if given is not None:
        if not all(map(str.strip, given)):
            raise ConfigError("--prompt: there is no text in it. Give what is to be asked.")
        return iter([line for prompt in given for line in (NEW_CONVERSATION, prompt)])
    if file is None:
        return _read_input()
    try:
        lines = read_regular(file, MAX_PROMPTS_BYTES, follow_links=True).decode("utf-8-sig")
    except DamagedError as error:
        raise ConfigError(f"--prompts: {error} Give a text file, a prompt a line.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts: {file} is not UTF-8: {error.reason}.") from error
    asked = [line for line in lines.splitlines() if line.strip()]
    if not asked:
        raise ConfigError(f"--prompts: {file} has no line. Give a text file, a prompt a line.")
    return iter([line for prompt in asked for line in (NEW_CONVERSATION, prompt)])


def _read_input() -> Iterator[str]:
    """Yield what is typed, or each line of standard input, to its end."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    print_progress(HELP_TEXT)
    while True:
        try:
            yield input(INPUT_PROMPT)
        except EOFError:
            return


class _Chat:
    """A conversation with each side, which remembers its own answers."""

    def __init__(
        self, sides: Sequence[str], stream: StreamAnswers, system: str | None, save: Path | None
    ) -> None:
        self._sides = sides
        self._stream = stream
        self._system = system
        self._save = save
        self._conversations = self._begin()

    def _begin(self) -> dict[str, list[dict[str, str]]]:
        """Return a conversation a side that holds the system message alone, if there is one."""
        first = [] if self._system is None else [{"role": "system", "content": self._system}]
        return {side: list(first) for side in self._sides}

    def answer_each(self, prompts: Iterator[str]) -> None:
        """Answer each prompt by each side; a command of a slash is obeyed."""
        for prompt in prompts:
            if prompt.strip() == HELP:
                print_progress(HELP_TEXT)
            elif prompt.strip() == NEW_CONVERSATION:
                self._conversations = self._begin()
            elif prompt.strip():
                self._answer(prompt)

    def _answer(self, prompt: str) -> None:
        for messages in self._conversations.values():
            messages.append({"role": "user", "content": prompt})
        answers = show_answers(self._stream(self._conversations), self._sides)
        for side, messages in self._conversations.items():
            messages.append({"role": "assistant", "content": answers[side]})
        if self._save is not None:
            turn = sum(message["role"] == "user" for message in messages)
            row = {"turn": turn, "system": self._system, "prompt": prompt, "answers": answers}
            append_regular(self._save, json.dumps(row).encode() + b"\n")


def show_answers(pieces: Iterable[tuple[str, str]], sides: Sequence[str]) -> dict[str, str]:
    """Show the pieces of each side's text as they come; return the whole texts.

    Beside each other in a terminal, else one line each.
    """
    texts = dict.fromkeys(sides, "")
    console = output_console(WIDTH_WITHOUT_TERMINAL)
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        _print_lines(pieces, texts)
        return texts
    with Live(lay_out(texts), console=console, auto_refresh=False) as live:
        for column, piece in pieces:
            texts[column] += piece
            live.update(lay_out(texts), refresh=True)
    return texts


def _print_lines(pieces: Iterable[tuple[str, str]], texts: dict[str, str]) -> None:
    """Print a line for each side's text, piece by piece, without the white space around it."""
    width = max(map(len, texts)) + 2
    for side, of_side in groupby(pieces, itemgetter(0)):
        print(f"{escape(f'{side}:'):<{width}}", end="")  # noqa: T201
        shown = 0
        for _, piece in of_side:
            texts[side] += piece
            text = texts[side].strip()
            print(escape(text[shown:]), end="", flush=True)  # noqa: T201
            shown = len(text)
        print(flush=True)  # noqa: T201


def lay_out(texts: Mapping[str, str]) -> Table:
    """Return a column a text; what a model wrote is escaped, but for its line ends."""
    table = Table(expand=True)
    for column in texts:
        table.add_column(Text(escape(column)), ratio=1, overflow="fold")
    table.add_row(*(Text(escape_but_keep_newlines(text.strip())) for text in texts.values()))
    return table
