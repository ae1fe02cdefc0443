"""What `nested-tune --help` and `COMMAND --help` print: commands in groups, an example first.

`--help` of a command with a flag for each key of the configuration lists the flags that people use,
`--help-all` every one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

GROUPS = ("Start", "Train", "Inspect", "Registry", "Serve", "Exchange", "Operate")
# The flags that `--help` shows of a command with one for each key of the configuration.
COMMON_FLAGS = (
    "--config",
    "--model",
    "--data",
    "--run-dir",
    "--resume",
    "--json",
    "--learning-rate",
    "--training.epochs",
    "--minutes",
    "--iters",
    "--batch-size",
    "--max-seq-length",
    "--num-layers",
    "--lora-parameters.rank",
    "--lora-parameters.scale",
    "--mask-prompt",
)
EXIT_CODES = """\
Exit codes: 0 done, 1 unexpected, 2 usage or configuration, 3 data set rejected,
4 adapter rejected, 5 stopped and resumable, 6 something on disk is damaged or
unsafe, 130 interrupted at once.
Documentation: README.md and docs/ of the project."""


def describe_commands(summaries: Mapping[str, Mapping[str, str]]) -> str:
    """The list of commands, a line each, by group."""
    width = max((len(name) for names in summaries.values() for name in names), default=0) + 2
    groups = [
        "\n".join([f"{title}:", *(f"  {name:<{width}}{line}" for name, line in names.items())])
        for title, names in summaries.items()
        if names
    ]
    return "\n\n".join(groups)


class ShortHelp(argparse.Action):
    """`--help`: the flags in COMMON_FLAGS, and those that are no key of the configuration."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="show this help")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print it, and end the program."""
        common = set(COMMON_FLAGS)
        print_help(parser, lambda a: not is_key_flag(a) or not common.isdisjoint(a.option_strings))


class FullHelp(argparse.Action):
    """`--help-all`: every flag."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="show every flag")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print it, and end the program."""
        print_help(parser, lambda _: True)


def is_key_flag(action: argparse.Action) -> bool:
    """Whether a flag is a key of the configuration."""
    return action.dest.startswith("config.")


def print_help(
    parser: argparse.ArgumentParser, is_shown: Callable[[argparse.Action], bool]
) -> None:
    """Print the help with some of the flags, and end the program with exit code 0."""
    hidden = [action for action in _actions(parser) if not is_shown(action)]
    for action in hidden:
        action.help = argparse.SUPPRESS
    parser.print_help()
    parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    return parser._actions  # argparse offers no other list of them
