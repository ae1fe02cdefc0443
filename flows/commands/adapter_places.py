"""The arguments by which commands take an adapter or a name in a registry."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError
from nested_core.pipeline.named_adapters import VERSIONS, name_folder_of
from nested_core.storage.run_directory import DEFAULT_REGISTRY

ADAPTER_FORMS = "NAME|REGISTRY/NAME|RUN_DIR|FOLDER"


def add_adapter(
    parser: argparse.ArgumentParser, name: str = "folder", further: str = "", **options: Any
) -> None:
    """Add an argument for an adapter, and --registry, where a NAME of it is looked for."""
    forms = f"the champion of a name in a registry, a run, or an adapter's folder{further}"
    parser.add_argument(name, type=Path, metavar=ADAPTER_FORMS, help=forms, **options)
    add_registry_flag(parser)


def add_registry_flag(parser: argparse.ArgumentParser) -> None:
    """Add --registry, where a NAME is looked for."""
    parser.add_argument(
        "--registry", type=Path, metavar="DIR", help="where NAME is looked for (default: registry)"
    )


def add_registry_arguments(parser: argparse.ArgumentParser) -> None:
    """Add NAME, which may be given as --name too or as REGISTRY/NAME, and --registry."""
    help_text = "the adapter's name in the registry, or REGISTRY/NAME"
    name = parser.add_mutually_exclusive_group(required=True)
    name.add_argument("name", nargs="?", default=argparse.SUPPRESS, metavar="NAME", help=help_text)
    name.add_argument("--name", dest="name", metavar="NAME", help="the same")
    add_registry_flag(parser)
    command: Callable[[argparse.Namespace], object] = parser.get_default("run")

    def run(arguments: argparse.Namespace) -> object:
        """The command, with registry and name apart, and a copy of object storage up to date."""
        from nested_core.registry.mirroring import EVERY_VERSION, update_copy  # loads mlx

        arguments.registry, arguments.name = split_name(arguments.name, arguments.registry)
        update_copy(arguments.registry, arguments.name, EVERY_VERSION)
        return command(arguments)

    parser.set_defaults(run=run)


def split_name(text: str, registry: Path | None) -> tuple[Path, str]:
    """The registry and the name of `NAME`, `REGISTRY/NAME` or `REGISTRY/NAME/champion`.

    With --registry the text is a name alone. ConfigError for a path that leads into no registry.
    """
    if registry is not None or os.sep not in text:
        return registry or DEFAULT_REGISTRY, text
    folder = name_folder_of(Path(text))
    if folder is None:
        raise ConfigError(
            f"{text} is no name in a registry: it has no {VERSIONS}/. Give NAME, which is looked "
            f"for in {DEFAULT_REGISTRY}/ or under --registry, or REGISTRY/NAME; to begin a "
            f"registry elsewhere give --registry DIR and NAME."
        )
    return folder.parent, folder.name
