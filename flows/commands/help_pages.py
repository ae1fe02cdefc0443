"""What `nested-tune --help` and `COMMAND --help` print: commands in groups, an example first.

`--help` of a command with a flag for each key of the configuration lists the flags that people use,
`--help-all` every one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

# Each command in its group, with an example that is first in its help.
GROUPS: dict[str, dict[str, str]] = {
    "Start": {
        "demo": "nested-tune demo",
        "init": "nested-tune init --data DATA --model MODEL -o lora.yaml",
        "explain": "nested-tune explain -c lora.yaml",
        "doctor": "nested-tune doctor",
    },
    "Train": {
        "validate": "nested-tune validate -c lora.yaml --show 3",
        "train": "nested-tune train -c lora.yaml --run-dir runs/first",
        "run": "nested-tune run -c lora.yaml --run-dir runs/first",
        "stop": "nested-tune stop runs/first",
    },
    "Inspect": {
        "status": "nested-tune status runs/first",
        "runs": "nested-tune runs",
        "report": "nested-tune report runs/first",
        "compare": "nested-tune compare runs/first runs/second",
        "verify": "nested-tune verify runs/first/initial runs/first/adapter",
        "evaluate": "nested-tune evaluate runs/first --suite questions.jsonl",
        "chat": "nested-tune chat runs/first",
    },
    "Registry": {
        "promote": "nested-tune promote runs/first --name support-bot",
        "rollback": "nested-tune rollback support-bot --reason 'wrong answers'",
        "history": "nested-tune history support-bot",
        "audit": "nested-tune audit support-bot",
        "policy": "nested-tune policy support-bot --promote better",
        "card": "nested-tune card registry/support-bot",
        "forget": "nested-tune forget support-bot 3785767e --by ann --reason 'a bad disk'",
        "gc": "nested-tune gc support-bot --keep 10 --dry-run",
    },
    "Serve": {"serve": "nested-tune serve --name support-bot"},
    "Exchange": {
        "import-peft": "nested-tune import-peft peft-adapter --model MODEL -o adapter",
        "export-peft": "nested-tune export-peft runs/first/adapter -o peft-adapter",
        "export-mlflow": "nested-tune export-mlflow support-bot",
    },
    "Operate": {"deploy": "nested-tune deploy -c lora.yaml"},
}
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
unsafe, 130 interrupted twice.
Documentation: README.md and docs/ of the project."""


def describe_commands(summaries: dict[str, str]) -> str:
    """The list of commands, by group; a command without a group is a KeyError of the caller's."""
    width = max(map(len, summaries)) + 2
    groups = [
        "\n".join([f"{title}:", *(f"  {name:<{width}}{summaries[name]}" for name in names)])
        for title, names in GROUPS.items()
    ]
    return "\n\n".join(groups)


def example_of(command: str) -> str:
    """The example of a command, as its help shows it."""
    return next(names[command] for names in GROUPS.values() if command in names)


class ShortHelp(argparse.Action):
    """`--help`: the flags in COMMON_FLAGS, and those that are no key of the configuration."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="show this help")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print it, and end the program."""
        print_help(parser, lambda action: not is_key_flag(action) or is_common(action))


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


def is_common(action: argparse.Action) -> bool:
    """Whether a flag is one of COMMON_FLAGS."""
    return any(flag in COMMON_FLAGS for flag in action.option_strings)


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
