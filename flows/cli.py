"""The command line, `nested-tune`: it parses, dispatches, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import NoReturn

from flows.commands.help_pages import EXIT_CODES, Commands, Help, describe_commands, is_key_flag
from flows.process.os_errors import explain, explain_file_limit, explain_missing_mlx
from flows.process.stop_signals import INTERRUPTED_EXIT_CODE
from flows.terminal.console import print_progress
from nested_core import seams
from nested_core.backend import collecting_no_garbage
from nested_core.errors import ConfigError, DataWorkerFailed, NestedTuneError
from nested_core.process.command_parent import STOP_SIGNALS, Restart, end_with_parent, has_parent
from nested_core.process.our_packages import RUN_MODULE
from nested_core.storage.addresses import is_in_bucket, require_bucket, require_no_address
from nested_core.text.foreign_text import escape

# What an argument is called that is no path: a text, a URL, the words of a command, a host, a name.
TEXTS = ("TEXT", "FIELD", "A,B", "WHO", "TEMPLATE", "URI", "ORIGIN,...")
NO_PATHS = (*TEXTS, "TYPE/NAME|URL|@FILE", "COMMAND", "HOST", "USER/NAME")


class _Parser(argparse.ArgumentParser):
    """argparse, with one paragraph for a wrong command line where it would print its usage.

    commands: the parser of each command, by its name; empty for a command's own.
    summaries: what each command does in a line, by its group.
    """

    commands: Mapping[str, argparse.ArgumentParser] = MappingProxyType({})
    summaries: Mapping[str, Mapping[str, str]] = MappingProxyType({})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See: `{self.prog} --help`")

    def _get_value(self, action: argparse.Action, arg_string: str) -> object:
        """The value of an argument, which is UTF-8 and no address where a path is expected."""
        if any("\udc80" <= character <= "\udcff" for character in arg_string):
            raise ConfigError(f"{arg_string} is not UTF-8: give another name, or rename it.")
        is_copied = seams.may_read_copy(self.prog.split()[-1]) and action.dest == "registry"
        if is_copied and is_in_bucket(arg_string):
            return _open_copy(arg_string)
        if action.metavar not in NO_PATHS and not is_key_flag(action):  # a key has its own check
            require_no_address(arg_string, partial(argparse.ArgumentError, action))
        return super()._get_value(action, arg_string)


def _open_copy(address: str) -> Path:
    """The local folder that stands for a registry in object storage."""
    from nested_core.registry.mirroring import open_copy

    require_bucket(address, ConfigError)
    return open_copy(address)


# The commands of each module of flows.commands, in the order of the help: one that is called loads
# its own module alone.
COMMANDS: dict[str, Sequence[str]] = {
    "demo": ("demo",),
    "training": ("validate", "train", "run"),
    "inspection": ("verify", "status", "stop", "report", "runs"),
    "registry": ("promote", "rollback", "history"),
}


def list_command_modules() -> dict[str, Sequence[str]]:
    """The commands of each module that is there."""
    core = {f"flows.commands.{module}": names for module, names in COMMANDS.items()}
    return core | {
        f"flows.rooms.{name}.command": room.commands
        for name, room in seams.list_rooms().items()
        if room.commands
    }


def build_parser(command: str | None = None) -> _Parser:
    """The parser of all commands; where `command` is one of them, of those of its module alone.

    With `--version` as the command, of none.
    """
    every = {} if command == "--version" else list_command_modules()
    own = [module for module, names in every.items() if command in names]
    # Importing takes long enough for a person to press Ctrl-C.
    with collecting_no_garbage():
        modules = [import_module(module) for module in own or every]

    parser = _Parser(
        prog="nested-tune",
        description="LoRA fine-tuning for MLX that checks whether training worked.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="nested-tune COMMAND [options]",
    )
    parser.add_argument(
        "--version", action="version", version=f"nested-tune {version('nested-tune')}"
    )
    commands = Commands(parser)
    parser.commands = commands.parsers
    parser.summaries = commands.summaries
    for module in modules:
        module.add_commands(commands)
    for name, own_parser in commands.parsers.items():
        for room, added in seams.list_rooms().items():
            if name in added.flags:
                import_module(f"flows.rooms.{room}.command").add_flags(own_parser)
        if any(map(is_key_flag, own_parser._actions)):  # argparse offers no other list of them
            own_parser.usage = f"nested-tune {name} -c FILE [options]"
            own_parser.add_argument("--help-all", action=Help, const=True, help="show every flag")
    parser.epilog = (
        f"{describe_commands(commands.summaries)}\n\n"
        f"Start with `nested-tune demo`. `nested-tune COMMAND --help` has an example.\n"
        f"{EXIT_CODES}"
    )
    return parser


RESTARTED_COMMANDS = ("train", "run")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    As the program of a process, without `argv`, what trains runs under a small parent, which
    begins it again where it is killed.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - it is closed (`>&-`)
    warnings.showwarning = lambda message, *_, **__: print_progress(f"warning: {message}")
    try:
        with _hearing_signals(is_program=argv is None):
            if argv is None and _needs_parent(arguments):
                return _run_under_parent()
            given = next(iter(arguments), "-")
            _refuse_unknown_command(given)
            parser = build_parser(given)
            parsed, unknown = parser.parse_known_args(arguments)
            if parsed.command is None:
                parser.print_help(sys.stderr)
                return ConfigError.exit_code
            if unknown:
                raise ConfigError(
                    _describe_unknown_arguments(parsed, unknown, parser.commands[parsed.command])
                )
            # Libraries print as they like; standard output is for the result alone.
            with contextlib.redirect_stdout(sys.stderr):
                finish = parsed.run(parsed)
            return _print_result(finish)
    except NestedTuneError as error:
        is_of_process = isinstance(error, DataWorkerFailed)  # which imports mlx_lm
        text_or_none = explain_file_limit(error) if is_of_process else None
        code = error.exit_code if text_or_none is None else ConfigError.exit_code
        return _print_error(error, code, arguments, text_or_none)
    except KeyboardInterrupt as error:
        return _print_error(error, INTERRUPTED_EXIT_CODE, arguments, "interrupted")
    except BrokenPipeError:
        _forget_output()
        return 1
    except OSError as error:
        explained = explain(error)
        return _print_error(error, explained.exit_code, arguments, str(explained))
    except (ImportError, ValueError) as error:
        text_or_none = explain_missing_mlx(error) or explain_file_limit(error)
        code = 1 if text_or_none is None else ConfigError.exit_code
        return _print_error(error, code, arguments, text_or_none or _describe_unexpected(error))
    except Exception as error:  # the last line of defence: a person gets a paragraph
        return _print_error(error, 1, arguments, _describe_unexpected(error))


def _print_result(finish: Callable[[], int] | int) -> int:
    """Print what a command has done, and return its exit code.

    Raises NestedTuneError where standard output takes nothing: what is done is done all the same.
    """
    try:
        code = finish() if callable(finish) else finish
        sys.stdout.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.filename is not None:
            raise
        _forget_output()
        raise NestedTuneError(
            f"The result cannot be printed ({error.strerror}), but the command has done its work: "
            "look at what it changed before you give it again."
        ) from error
    return int(code)


def _forget_output() -> None:
    """Have standard output end nowhere, so that what is left of it is no error at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _hearing_signals(*, is_program: bool) -> Iterator[None]:
    """Have STOP_SIGNALS end the block by an exception, if they would end the process at once.

    So temporary files are removed on the way out.
    """
    in_order = dict.fromkeys(STOP_SIGNALS, _end_in_order)
    handlers = in_order | {signal.SIGINT: signal.default_int_handler}
    unheard = [one for one in handlers if is_program and signal.getsignal(one) is signal.SIG_DFL]
    for number in unheard:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number in unheard:
            if signal.getsignal(number) is not signal.SIG_IGN:  # the command is at its end
                signal.signal(number, signal.SIG_DFL)


def _end_in_order(number: int, frame: FrameType | None) -> NoReturn:
    """End the process as a shell words it; a second signal ends it at once.

    But not a second SIGHUP: a terminal that closes may send several.
    """
    signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
    sys.exit(128 + number)


def _needs_parent(arguments: Sequence[str]) -> bool:
    """Whether a command is one that trains, in a process that has no parent of the kind yet."""
    is_restarted = next(iter(arguments), None) in RESTARTED_COMMANDS and seams.is_there("restart")
    if not is_restarted:
        return False
    end_with_parent()
    return not has_parent()


def _run_under_parent() -> int:
    """Run this very command as a process of its own, and go on with its run where it is killed."""
    words = [sys.executable, *RUN_MODULE, "flows.cli", *sys.argv[1:]]
    restart = seams.load_only(Restart, "train")
    return restart.run_again(words, lambda run: ("--run-dir", str(run), "--resume"))


def _refuse_unknown_command(given: str) -> None:
    """Name the command that was meant, where the first word is none."""
    if given.startswith("-"):
        return
    commands = [name for names in list_command_modules().values() for name in names]
    if given in commands:
        return
    seams.require_command(given)
    close = difflib.get_close_matches(given, commands, n=1)
    meant = f"; did you mean {close[0]}?" if close else "."
    raise ConfigError(f"there is no command {given}{meant} `nested-tune --help` lists them all.")


def _describe_unknown_arguments(
    parsed: argparse.Namespace, unknown: Sequence[str], parser: argparse.ArgumentParser
) -> str:
    """What of a command line is not understood, and what may have been meant."""
    from nested_core.config.error_messages import read_keys_of_other_trainers

    flags = list(parser._option_string_actions)  # argparse offers no other list of them
    our_keys = read_keys_of_other_trainers().ours
    hints = []
    for word in unknown:
        if word.startswith("--"):
            given = word.partition("=")[0]
            seams.require_flag(parsed.command, given)
            theirs = our_keys.get(given[2:].replace("-", "_"), "")
            ours = f"--{theirs.partition(';')[0].replace('_', '-')}"
            meant = [flag for flag in flags if flag == ours or flag.endswith(f".{given[2:]}")]
            names = {flag.lstrip("-"): flag for flag in flags}  # -- makes any two more alike
            near = difflib.get_close_matches(given[2:], names, n=1, cutoff=0.7)
            meant += [names[name] for name in near]
            hints += [f"Did you mean {flag}?" for flag in meant[:1]]
        elif word.endswith((".yaml", ".yml")) and "--config" in flags:
            hints.append(f"Did you mean -c {word}?")
        elif "--data" in flags and os.path.isdir(word):
            hints.append(f"Did you mean --data {word}?")
    told = " ".join([f"unrecognized arguments: {' '.join(unknown)}.", *hints])
    return f"{told} See: `nested-tune {parsed.command} --help`"


def _describe_unexpected(error: Exception) -> str:
    return f"unexpected {type(error).__name__}: {error}. --debug shows where it came from."


def _print_error(
    error: BaseException, code: int, arguments: Sequence[str], text: str | None = None
) -> int:
    if "--debug" in arguments:
        traceback.print_exception(error)
    text = text or str(error)
    for argument in arguments:
        if "\n" in argument:  # the name of a file may forge no line
            text = text.replace(argument, escape(argument))
    lines = text.split("\n")
    shown = lines if len(lines) <= 14 else [*lines[:13], f"... and {len(lines) - 13} more lines"]
    print_progress(f"nested-tune: {shown[0]}", *shown[1:])
    return code


if __name__ == "__main__":
    sys.exit(main())
