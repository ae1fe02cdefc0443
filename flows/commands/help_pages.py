"""What `nested-tune --help` and `COMMAND --help` print: commands in groups, an example first.

`--help` of a command with a flag for each key of the configuration lists the flags that people use,
`--help-all` every one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

GROUPS = ("Start", "Train", "Inspect", "Registry", "Serve", "Exchange", "Operate")
# The flags that `--help` shows of a command with one for each key of the configuration.
COMMON_FLAGS = {
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
}
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


class Help(argparse.Action):
    """`--help` and `--help-all`, whose `const` is true: flags that people use, or every flag.

    Those that people use are in COMMON_FLAGS, or no key of the configuration.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print it, and end the program."""
        for action in parser._actions:  # argparse offers no other list of them
            is_used = not is_key_flag(action) or not COMMON_FLAGS.isdisjoint(action.option_strings)
            if not (self.const or is_used):
                action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


class Commands:
    """argparse's sub-commands, where the line in the list of commands opens each one's own help."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._subparsers = parser.add_subparsers(
            dest="command", metavar="COMMAND", help=argparse.SUPPRESS, prog="nested-tune"
        )
        self.parsers: dict[str, argparse.ArgumentParser] = {}
        self.summaries: dict[str, dict[str, str]] = {group: {} for group in GROUPS}

    def add(
        self,
        name: str,
        run: Callable[[argparse.Namespace], int | Callable[[], int]],
        group: str,
        example: str = "",
        *,
        json: bool = False,
        usage: str | None = None,
    ) -> argparse.ArgumentParser:
        """Add a command, which the first line of `run`'s docstring describes in the help.

        `run` is called with the arguments; `group` is one of GROUPS, `example` what follows the
        name in the command line that its help begins with, and `json` whether the command has that
        flag.
        """
        description = (run.__doc__ or name).partition("\n")[0]
        # `--lr` would be taken for `--lr-schedule`, whose error then speaks of a file's key.
        parser = self._subparsers.add_parser(
            name,
            description=f"{description}\n\nExample: nested-tune {name} {example}".rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=EXIT_CODES,
            allow_abbrev=False,
            add_help=False,
            usage=usage,
        )
        parser.add_argument("-h", "--help", action=Help, help="show this help")
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if json:
            parser.add_argument("--json", action="store_true", help="the result as a JSON document")
        parser.set_defaults(run=run)
        self.parsers[name] = parser
        self.summaries[group][name] = f"{description[0].lower()}{description[1:].rstrip('.')}"
        return parser


def is_key_flag(action: argparse.Action) -> bool:
    """Whether a flag is a key of the configuration."""
    return action.dest.startswith("config.")
