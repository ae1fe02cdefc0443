"""deploy: put the deployments and what belongs to them on the server of PREFECT_API_URL."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from flows.commands.command_output import result_printer
from flows.terminal.console import print_line, print_progress
from nested_core.errors import ConfigError, NestedTuneError
from nested_core.storage.untrusted_files import read_regular

if TYPE_CHECKING:
    from flows.rooms.deploy.container_pools import Request

PoolType = Literal["process", "docker", "kubernetes"]  # of Prefect's work pools
MAX_NOTIFY_BYTES = 64 * 2**10


def add_commands(commands: Any) -> None:
    """Add the command."""
    deploy = commands.add("deploy", run_deploy, "Operate", "-c lora.yaml", json=True)
    deploy.add_argument(
        "-c", "--config", type=Path, help="a fine-tune with a registry name: it gets its own set"
    )
    deploy.add_argument("--file", type=Path, help="your own prefect.yaml, in place of the shipped")
    deploy.add_argument(
        "--pool",
        choices=get_args(PoolType),
        default="process",
        help="what runs are: processes, or containers of the image",
    )
    deploy.add_argument(
        "--notify",
        metavar="TYPE/NAME|URL|@FILE",
        help="where alerts go: a notification block, a webhook's URL, or @FILE with one of them, "
        "which keeps a secret URL out of the list of processes",
    )
    deploy.add_argument("--test-alert", action="store_true", help="send one alert to try the block")


def run_deploy(arguments: argparse.Namespace) -> Callable[[], int]:
    """Create work pools, deployments and automations on a server.

    NestedTuneError if the server refuses.
    """
    import httpx

    try:
        return _deploy_and_report(arguments)
    except httpx.HTTPError as error:
        raise NestedTuneError(
            f"The server did not take it ({type(error).__name__}: {str(error):.300}). Expected a "
            "Prefect server at PREFECT_API_URL, with PREFECT_API_AUTH_STRING as it was started "
            "with. `nested-tune doctor` looks at both."
        ) from error


def read_notify(given: str | None) -> str | None:
    """Return where alerts go: the value of --notify, or for @FILE the one word in that file."""
    if given is None or not given.startswith("@"):
        return given
    content = read_regular(Path(given[1:]), MAX_NOTIFY_BYTES, follow_links=True)
    words = content.decode(errors="replace").split()
    if len(words) != 1:
        raise ConfigError(
            f"--notify {given}: the file holds {len(words)} words. Expected a notification block "
            "as TYPE/NAME, or the URL of a webhook, and nothing else."
        )
    return words[0]


def _forecast_request(pool: PoolType, config: Path | None) -> Request:
    """Return what the container of a training asks for; nothing where `explain` cannot say."""
    from flows.rooms.deploy.container_pools import NO_REQUEST, forecast_request

    if pool == "process" or config is None:
        return NO_REQUEST
    try:
        request = forecast_request(config)
    except NestedTuneError as error:
        print_progress(f"warning: no request of memory or GPU: {error}")
        return NO_REQUEST
    print_progress(request.describe())
    return request


def _deploy_and_report(arguments: argparse.Namespace) -> Callable[[], int]:
    """Deploy with a line of progress for each thing, and return what prints the result."""
    from prefect.client.orchestration import get_client

    from flows.rooms.deploy.alerts import NO_ALERTS_WARNING, send_test_alert
    from flows.rooms.deploy.deploy import deploy, list_next_commands, require_server
    from flows.rooms.deploy.planned_deployments import begin_name, make_plan

    notify = read_notify(arguments.notify)
    require_server()
    done = []
    request = _forecast_request(arguments.pool, arguments.config)
    plan = make_plan(arguments.file, arguments.config, arguments.pool, request)
    for line in deploy(plan, notify):
        done.append(line)
        if line != NO_ALERTS_WARNING:  # shown last
            print_progress(line)
    if arguments.config is not None and arguments.pool == "process":
        print_progress(begin_name(plan))
    if arguments.test_alert:
        alerts = [each["name"] for each in plan.automations if "notify" in each]
        with get_client(sync_client=True) as client:
            done.append(send_test_alert(client, alerts))
        print_progress(done[-1])

    next_commands = list(list_next_commands(plan))

    def show() -> None:
        """Print how much is in place, the next commands, and a warning if alerts go nowhere."""
        is_silent = NO_ALERTS_WARNING in done
        print_line(f"deployed: {len(done) - int(is_silent)} things are in place")
        print_line("next, with this PREFECT_API_URL, each worker in a terminal of its own:")
        for command in next_commands:
            print_line(f"  {command}")
        if is_silent:
            print_line(NO_ALERTS_WARNING)

    return result_printer(arguments, lambda: {"done": done, "next": next_commands}, show)
