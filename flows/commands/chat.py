"""chat: ask the base model and the adapter the same, and read their answers side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from flows.commands.adapter_places import (
    ADAPTER_FORMS,
    add_registry_flag,
)
from flows.commands.command_output import printer
from flows.terminal.console import (
    WIDTH_WITHOUT_TERMINAL,
    output_console,
    print_line,
    print_progress,
)
from nested_core.errors import ConfigError
from nested_core.pipeline.named_adapters import find_named_adapter
from nested_core.text.foreign_text import escape_but_keep_newlines

if TYPE_CHECKING:
    from nested_core.models.side_by_side import BaseAndAdapter

NEW_CONVERSATION = "/new"
HELP = "/help"
INPUT_PROMPT = "> "
COLUMN_NAMES = ("base", "adapter")


def add_commands(commands: Any) -> None:
    """Add the command."""
    chat = commands.add(
        "chat",
        run_chat,
        "ask base and adapter, and read both answers",
        group="Inspect",
        example="nested-tune chat runs/first",
    )
    chat.add_argument(
        "adapter",
        type=Path,
        metavar=ADAPTER_FORMS,
        help="the champion of a name in a registry, a run, or an adapter's folder",
    )
    add_registry_flag(chat)
    chat.add_argument("--prompt", metavar="TEXT", help="ask this alone, then end")
    chat.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)"
    )
    chat.add_argument(
        "--temperature", type=float, default=0.0, metavar="NUMBER", help="default: 0, greedy"
    )


def run_chat(arguments: argparse.Namespace) -> Callable[[], int]:
    """Load the base with the adapter, then answer what is asked until there is no more."""
    if arguments.max_tokens < 1 or arguments.temperature < 0:
        raise ConfigError("chat: --max-tokens is 1 or more, and --temperature 0 or more.")
    asked = find_named_adapter(arguments.adapter, arguments.registry)
    from nested_core.models.generation import Sampling
    from nested_core.models.side_by_side import BaseAndAdapter  # loads mlx_lm, which takes seconds

    print_progress(f"adapter: {asked.describe()}")
    both = BaseAndAdapter(
        asked.folder, model=asked.model, trust_remote_code=asked.trusts_remote_code
    )
    sampling = Sampling(arguments.max_tokens, temperature=arguments.temperature)
    prompts = iter([arguments.prompt]) if arguments.prompt is not None else _read_prompts()
    return printer(lambda: _answer_each_prompt(both, prompts, sampling))


def _read_prompts() -> Iterator[str]:
    """What is typed, or each line of standard input; its end is the end."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    print_progress(f"Ctrl-D ends, {NEW_CONVERSATION} begins a new conversation.")
    while True:
        try:
            yield input(INPUT_PROMPT)
        except EOFError:
            return


def _answer_each_prompt(both: BaseAndAdapter, prompts: Iterator[str], sampling: Any) -> None:
    """Answer each prompt; each side remembers its own answers."""
    from nested_core.models.side_by_side import SIDES

    conversations: dict[Any, list[dict[str, str]]] = {side: [] for side in SIDES}
    for prompt in prompts:
        if prompt.strip() == HELP:
            print_progress(f"Ctrl-D ends, {NEW_CONVERSATION} begins a new conversation.")
            continue
        if prompt.strip() == NEW_CONVERSATION:
            conversations = {side: [] for side in SIDES}
            continue
        if not prompt.strip():
            continue
        for messages in conversations.values():
            messages.append({"role": "user", "content": prompt})
        answers = show_answers(both.stream_answers(conversations, sampling))
        for side, messages in conversations.items():
            messages.append({"role": "assistant", "content": answers[side]})


def show_answers(pieces: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Show the pieces of either column's text as they come; return the whole texts.

    Side by side in a terminal, else one line each at their end.
    """
    texts = dict.fromkeys(COLUMN_NAMES, "")
    console = output_console(WIDTH_WITHOUT_TERMINAL)
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        for column, piece in pieces:
            texts[column] += piece
        for column in COLUMN_NAMES:
            print_line(f"{f'{column}:':<9}{texts[column].strip()}")
        return texts
    with Live(lay_out(texts), console=console, auto_refresh=False) as live:
        for column, piece in pieces:
            texts[column] += piece
            live.update(lay_out(texts), refresh=True)
    return texts


def lay_out(texts: Mapping[str, str]) -> Table:
    """A column a text; what a model wrote is escaped, but for its line ends."""
    table = Table(expand=True)
    for column in COLUMN_NAMES:
        table.add_column(column, ratio=1, overflow="fold")
    table.add_row(
        *(Text(escape_but_keep_newlines(texts[column].strip())) for column in COLUMN_NAMES)
    )
    return table
