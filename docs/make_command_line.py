"""Write docs/command-line.md from the parser of `nested-tune`: `make docs`.

A flag that several commands share is described once. With `--check` it writes nothing, and fails
where the page is out of date (`make check`).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from docs.generated_page import write_or_check
from flows.cli import build_parser
from flows.commands.help_pages import is_key_flag

PAGE = Path(__file__).with_name("command-line.md")
HEAD = """\
# Command line

Written by `make docs` from the parser of `nested-tune`; do not edit it by hand.

`nested-tune COMMAND --help` prints what is below. Of `train` it shows the sixteen flags that people
use, and `--help-all` every one. Results go to standard output, progress and errors to standard
error. [Exit codes](exit-codes.md) and [environment variables](environment.md) have their own pages.
"""
CONFIGURED = """
## Flags of a configuration

{commands} take a flag for each key of [configuration.md](configuration.md): `--learning-rate 1e-4`,
`--nested.frequencies '[1, 2, 4]'`. A flag wins over the file.
"""
SHARED = """
## Flags that several commands share

"""


def render_page() -> str:
    """The page: shared flags, then each command with an example."""
    parser = build_parser()
    commands = {name: list(_listed_actions(command)) for name, command in parser.commands.items()}
    users: dict[str, list[str]] = defaultdict(list)
    for name, actions in commands.items():
        for action in actions:
            users[_row(action)].append(name)
    parts = [HEAD, *_describe_shared(users)]
    configured = [
        f"`{name}`"
        for name, command in parser.commands.items()
        if any(map(is_key_flag, command._actions))
    ]
    parts.append(CONFIGURED.format(commands=f"{', '.join(configured[:-1])} and {configured[-1]}"))
    for group, summaries in parser.summaries.items():
        parts.append(f"\n## {group}\n")
        for name in summaries:
            parts.append(f"\n### {name}\n\n{_describe(parser.commands[name])}")
            own = [row for row in map(_row, commands[name]) if len(users[row]) == 1]
            shared = [
                row.split(": ")[0].strip()[2:]
                for row in map(_row, commands[name])
                if 1 < len(users[row]) < len(commands)
            ]
            parts += ["\n", *own] if own else []
            parts += [f"\nAlso {', '.join(shared)}.\n"] if shared else []
    return "".join(parts)


def _listed_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """What a command takes, without keys of the configuration and what its help hides."""
    for action in parser._actions:  # argparse offers no other list of them
        if not is_key_flag(action) and action.help != argparse.SUPPRESS:
            yield action


def _row(action: argparse.Action) -> str:
    """The line of a flag or an argument in a list."""
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    takes_value = action.nargs != 0
    value = action.metavar or (action.choices and "|".join(map(str, action.choices)))
    value = value or (action.dest.upper() if takes_value else None)
    if not names:
        names = f"`{value}`"
    elif takes_value:
        names = names[:-1] + f" {value}`"
    return f"- {names}{f': {_escape(action.help)}' if action.help else ''}\n"


def _describe_shared(users: Mapping[str, list[str]]) -> Iterator[str]:
    yield SHARED
    yield from (row for row, names in users.items() if len(names) > 1)


def _describe(parser: argparse.ArgumentParser) -> str:
    """What a command does, and its example."""
    summary, _, example = str(parser.description).partition("\n\nExample: ")
    return f"{summary.rstrip('.')}: `{example}`\n"


def _escape(text: str) -> str:
    text = re.sub(r"(?<!`)<([^>]+)>", r"&lt;\1&gt;", text)
    return " ".join(text.split()).replace("*", "\\*")


def main(arguments: list[str]) -> str | None:
    """Write the page, or only look with --check; return what is wrong."""
    return write_or_check(PAGE, render_page(), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
