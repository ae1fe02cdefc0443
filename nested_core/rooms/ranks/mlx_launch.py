"""The arguments of `mlx.launch` that start a run's ranks: how many, where, with which environment.

A rank is one of the processes that train together.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from nested_core.backend import computes_on_cuda
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError, DamagedError
from nested_core.storage.untrusted_files import parse_json, read_regular

RANK_WORKER_ARGUMENTS = ("-m", "nested_core.rooms.ranks.rank_worker")
# The parent's CUDA_VISIBLE_DEVICES, which mlx.launch replaces.
DEVICES_VARIABLE = "NESTED_TUNE_DEVICES"
HOST_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@:-]*")  # never an option of ssh
MESSAGE_PREFIX = "@nested-tune "  # of the lines on standard output that are a rank's messages
HOSTFILE_FORMAT_HELP = (
    'It should list two hosts or more, as mlx.launch reads them: [{"ssh": "host1", "ips": '
    '["10.0.0.1"]}, ...].'
)
MAX_HOSTFILE_BYTES = 16 * 1024 * 1024
PORTS = range(20000, 32000)  # below those that Linux and macOS give to whoever asks for any
PORT_TRIES = 50


def count_ranks(config: FineTuneConfig) -> int:
    """Return the number of processes that train: the hosts of a hostfile, or `training.processes`.

    Raises ConfigError if the hostfile cannot be used.
    """
    if config.training.hostfile is None:
        return config.training.processes
    path = Path(config.training.hostfile)
    hosts = _read_hosts(path)
    invalid = [host for host in hosts if not HOST_PATTERN.fullmatch(host)]
    if invalid or len(hosts) < 2:
        problem = f"{invalid[0]!r}, which is no host name" if invalid else hosts
        raise ConfigError(f"training.hostfile: {path} names {problem}. {HOSTFILE_FORMAT_HELP}")
    if config.batch_size % len(hosts):
        raise ConfigError(
            f"training.hostfile: the {len(hosts)} hosts of {path} share each batch, and do not "
            f"divide batch_size {config.batch_size}. Give a multiple of {len(hosts)}."
        )
    return len(hosts)


def list_rank_hosts(config: FineTuneConfig) -> list[str]:
    """List the hosts of the hostfile, one a rank, as ssh is told of them; else none."""
    return [] if config.training.hostfile is None else _read_hosts(Path(config.training.hostfile))


def _read_hosts(path: Path) -> list[str]:
    """Return the host names that mlx.launch reads (mlx/_distributed_utils/common.py, Hostfile)."""
    try:
        content = parse_json(read_regular(path, MAX_HOSTFILE_BYTES, follow_links=True))
        hosts = content["hosts"] if isinstance(content, dict) else content
        return [str(host["ssh"]) for host in hosts]
    except DamagedError as error:
        raise ConfigError(
            f"training.hostfile: {path} cannot be read: {error} {HOSTFILE_FORMAT_HELP}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"training.hostfile: {path} cannot be read as a list of hosts: "
            f"{type(error).__name__} {error}. {HOSTFILE_FORMAT_HELP}"
        ) from error


def launch_arguments(config: FineTuneConfig, ranks: int, run_dir: Path) -> list[str]:
    """Return the arguments of mlx.launch that start every rank on a run directory."""
    program = [sys.executable, *RANK_WORKER_ARGUMENTS, str(run_dir.resolve()), str(ranks)]
    if config.training.hostfile is not None:
        return ["--hostfile", str(Path(config.training.hostfile).resolve()), "--", *program]
    backend = "nccl" if computes_on_cuda() else "ring"
    port = str(find_consecutive_free_ports(ranks))
    ports = ["--starting-port", port, "--nccl-port", port]
    return ["-n", str(ranks), "--backend", backend, *ports, "--", *program]


def find_consecutive_free_ports(count: int) -> int:
    """The first of `count` consecutive ports that are free on this machine.

    The ranks listen there only seconds later, so the range that the system assigns ports from is
    left alone.
    """
    for _ in range(PORT_TRIES):
        first = secrets.choice(PORTS)
        if all(map(_is_free, range(first, first + count))):
            return first
    raise OSError(f"no {count} free ports in a row on 127.0.0.1 in {PORT_TRIES} tries")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def rank_environment(config: FineTuneConfig) -> dict[str, str]:
    """Return the environment variables for the ranks.

    If they share this machine's GPUs, and CUDA_VISIBLE_DEVICES limits these, one of ours lists the
    GPUs, from which each rank takes its one. Raises ConfigError if there are fewer GPUs than ranks.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ranks = config.training.processes
    if visible is None or config.training.hostfile is not None or not computes_on_cuda():
        return dict(os.environ)
    if len(visible.split(",")) < ranks:
        raise ConfigError(
            f"training.processes: {ranks} ranks need a GPU each, and CUDA_VISIBLE_DEVICES is "
            f"{visible!r}."
        )
    return os.environ | {DEVICES_VARIABLE: visible}


def rank_device(environment: Mapping[str, str], rank: int) -> str | None:
    """Return the CUDA device of a rank on this machine; None if its parent was not given a list."""
    devices = environment.get(DEVICES_VARIABLE)
    return None if devices is None else devices.split(",")[rank]
