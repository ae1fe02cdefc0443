"""`registry mirror`: put what object storage lacks of a registry."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from flows.commands.command_output import result_printer
from flows.terminal.console import print_line, print_progress
from nested_core.errors import ConfigError, DamagedError, NestedTuneError
from nested_core.storage.addresses import require_bucket
from nested_core.storage.run_directory import DEFAULT_REGISTRY
from nested_core.text.digest_format import shorten_digest
from nested_core.text.stages import receiving_stages

WORD = "mirror"


def add_flags(registry: argparse.ArgumentParser) -> None:
    """Add `registry mirror [DIR]` to the command that lists a registry."""
    list_names: Callable[[argparse.Namespace], object] = registry.get_default("run")

    def run(arguments: argparse.Namespace) -> object:
        """Publish where the first word is `mirror`; else list, which takes a folder alone."""
        if str(arguments.registry) == WORD:
            arguments.registry = arguments.mirrored or DEFAULT_REGISTRY
            return run_mirror(arguments)
        if arguments.mirrored or arguments.to or arguments.only:
            raise ConfigError("--to, --only and a second folder belong to `registry mirror`.")
        return list_names(arguments)

    registry.set_defaults(run=run)
    registry.add_argument(
        "mirrored",
        type=Path,
        nargs="?",
        metavar="DIR",
        help="after the word `mirror`: put what object storage lacks of this registry",
    )
    registry.add_argument(
        "--to", metavar="URI", help="with mirror: from now on mirror to this s3://bucket/prefix"
    )
    registry.add_argument("--only", nargs="+", metavar="NAME", help="with mirror: these names")


def run_mirror(arguments: argparse.Namespace) -> Callable[[], int]:
    """Bring the mirrors of a registry's names up to date; it takes as long as it needs."""
    from nested_core.registry.folders import find_name_folder, list_names
    from nested_core.registry.mirroring import read_mirror_note, set_mirror
    from nested_core.rooms.mirror.author import Published, publish

    registry = arguments.registry
    if arguments.to is not None:
        require_bucket(arguments.to, lambda message: ConfigError(f"--to: {message}."))
    done: dict[str, Published] = {}
    problems: dict[str, NestedTuneError] = {}
    for name in arguments.only or list_names(registry):
        folder = find_name_folder(registry, name)
        if arguments.to is not None:
            set_mirror(folder, arguments.to)
        note = read_mirror_note(folder)
        if note is None:
            continue
        try:
            with receiving_stages(print_progress):
                done[name] = publish(folder, note.address)
        except NestedTuneError as error:
            problems[name] = error
    if not done and not problems:
        raise ConfigError(
            f"{registry} has no name that is mirrored. Give --to s3://BUCKET/PREFIX, or "
            f"registry.mirror in the configuration of its runs."
        )

    def show() -> None:
        """Print a line for each name, then what is wrong."""
        for name, one in done.items():
            champion = "none" if one.champion is None else shorten_digest(one.champion)
            print_line(
                f"{name}: {one.files} files put ({one.size:,} bytes); {one.address} has "
                f"{one.lines} lines, champion {champion}"
            )
            print_progress(*(f"not put, damaged here: {text}" for text in one.skipped))
        print_progress(*(f"{name}: {error}" for name, error in problems.items()))

    document = {
        "registry": str(registry),
        "names": {name: asdict(one) for name, one in done.items()},
        "problems": {name: str(error) for name, error in problems.items()},
    }
    codes = [error.exit_code for error in problems.values()]
    codes += [DamagedError.exit_code for one in done.values() if one.skipped]
    return result_printer(arguments, lambda: document, show, max(codes, default=0))
