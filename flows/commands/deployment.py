"""deploy: put the deployments and what belongs to them on the server of PREFECT_API_URL."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.commands.command_output import result_printer
from flows.terminal import print_line, print_progress
from nested_core.errors import NestedTuneError


def add_commands(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the command."""
    deploy = commands.add_parser(
        "deploy", parents=[shared], help="work pools, deployments and automations, on a server"
    )
    deploy.add_argument(
        "-c", "--config", type=Path, help="a fine-tune, in place of the shipped example's"
    )
    deploy.add_argument("--file", type=Path, help="your own prefect.yaml, in place of the shipped")
    deploy.add_argument(
        "--notify", metavar="TYPE/NAME", help="the block that tells a person of rejections"
    )
    deploy.add_argument("--json", action="store_true", help="what was done as one JSON document")
    deploy.set_defaults(run=run_deploy)


def run_deploy(arguments: argparse.Namespace) -> Callable[[], int]:
    """Deploy, and say what was done."""
    import httpx

    from flows.deploy import deploy

    done = []
    try:
        for line in deploy(arguments.file, _read_given_keys(arguments.config), arguments.notify):
            done.append(line)
            print_progress(line)
    except httpx.HTTPError as error:
        raise NestedTuneError(
            f"The server did not take it ({type(error).__name__}: {str(error):.300}). Expected a "
            "Prefect server at PREFECT_API_URL, with PREFECT_API_AUTH_STRING as it was started "
            "with. `nested-tune doctor` looks at both."
        ) from error

    text = f"deployed: {len(done)} things are in place"
    return result_printer(arguments, lambda: {"done": done}, lambda: print_line(text))


def _read_given_keys(path: Path | None) -> dict[str, Any] | None:
    """The keys that a configuration file gives, once the whole of it was found sound."""
    from nested_core.config.loading import load_config, read_yaml

    if path is None:
        return None
    load_config(path, {})
    return read_yaml(path)
