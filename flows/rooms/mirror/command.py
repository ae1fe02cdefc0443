"""`registry mirror`: put a registry into object storage, what is damaged there too."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from flows.commands.command_output import result_printer
from flows.terminal.console import print_line, print_progress
from nested_core.errors import ConfigError, NestedTuneError
from nested_core.storage.addresses import require_bucket
from nested_core.storage.run_directory import DEFAULT_REGISTRY
from nested_core.text.digest_format import shorten_digest
from nested_core.text.stages import receiving_stages

WORD = "mirror"


def add_flags(registry: argparse.ArgumentParser) -> None:
    """Add `registry mirror [DIR]` to the command that lists a registry."""
    list_registry: Callable[[argparse.Namespace], object] = registry.get_default("run")

    def run(arguments: argparse.Namespace) -> object:
        """Publish where the first word is `mirror`; else list, which takes a folder alone.

        Alone, the word is a folder of that name, if there is one.
        """
        has_more = bool(arguments.mirrored or arguments.to)
        if str(arguments.registry) == WORD and (has_more or not Path(WORD).is_dir()):
            return run_mirror(arguments)
        if has_more:
            raise ConfigError("--to and a second folder belong to `registry mirror`.")
        return list_registry(arguments)

    registry.set_defaults(run=run)
    registry.add_argument(
        "mirrored",
        type=Path,
        nargs="?",
        metavar="DIR",
        help="after the word `mirror`: put it into object storage",
    )
    registry.add_argument("--to", metavar="URI", help="with mirror: s3://bucket/prefix from now on")


def run_mirror(arguments: argparse.Namespace) -> Callable[[], int]:
    """Bring the mirrors of a registry's names up to date; it takes as long as it needs."""
    from nested_core.registry.folders import list_names, require_registry
    from nested_core.registry.mirroring import read_mirror_note, set_mirror
    from nested_core.rooms.mirror.author import Published, publish

    registry = arguments.mirrored or DEFAULT_REGISTRY
    require_registry(registry)
    done: dict[str, Published] = {}
    problems: dict[str, NestedTuneError] = {}
    if arguments.to is not None:
        require_bucket(arguments.to, lambda message: ConfigError(f"--to: {message}."))
    for name in list_names(registry):
        folder, address = registry / name, arguments.to
        try:
            if address is None and (note := read_mirror_note(folder)) is not None:
                address = note.address
            if address is not None:
                with receiving_stages(print_progress):
                    done[name] = publish(folder, address)
                set_mirror(folder, address)  # only now: a refused one is not to be followed
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
            print_line(f"{name}: champion {champion}, {one.files} files put to {one.address}")
        print_progress(*(f"{name}: {error}" for name, error in problems.items()))

    document = {
        "names": {name: asdict(one) for name, one in done.items()},
        "problems": {name: str(error) for name, error in problems.items()},
    }
    code = max((error.exit_code for error in problems.values()), default=0)
    return result_printer(arguments, lambda: document, show, code)
