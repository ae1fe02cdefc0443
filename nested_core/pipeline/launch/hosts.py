"""How many ranks a configuration asks for, and the `mlx.launch` command that starts them."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from nested_core.backend import has_cuda
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError
from nested_core.storage.strict_files import user_folder

PROGRAM = ("-m", "nested_core.pipeline.worker")
DEVICES = "NESTED_TUNE_DEVICES"  # the parent's CUDA_VISIBLE_DEVICES, which mlx.launch replaces
HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@:-]*")  # never an option of ssh
FORM = (
    'It should list two hosts or more, as mlx.launch reads them: [{"ssh": "host1", "ips": '
    '["10.0.0.1"]}, ...].'
)
PORTS = range(20000, 32000)  # below those that Linux and macOS give to whoever asks for any
PORT_TRIES = 50


def count_ranks(config: FineTuneConfig) -> int:
    """The number of processes that train; ConfigError where a hostfile cannot be used."""
    if config.training.hostfile is None:
        return config.training.processes
    path = Path(config.training.hostfile)
    hosts = _read_hosts(path)
    strange = [host for host in hosts if not HOST.fullmatch(host)]
    if strange or len(hosts) < 2:
        raise ConfigError(
            f"training.hostfile: {path} names {f'{strange[0]!r}, no host' if strange else hosts}. "
            f"{FORM}"
        )
    if config.batch_size % len(hosts):
        raise ConfigError(
            f"training.hostfile: the {len(hosts)} hosts of {path} share each batch, and do not "
            f"divide batch_size {config.batch_size}. Give a multiple of {len(hosts)}."
        )
    return len(hosts)


def _read_hosts(path: Path) -> list[str]:
    """The names that mlx.launch would give to ssh (mlx/_distributed_utils/common.py, Hostfile)."""
    try:
        content = json.loads(path.read_bytes())
        hosts = content["hosts"] if isinstance(content, dict) else content
        return [str(host["ssh"]) for host in hosts]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"training.hostfile: {path} cannot be read as a list of hosts: "
            f"{type(error).__name__} {error}. {FORM}"
        ) from error


def launch_command(config: FineTuneConfig, ranks: int, run_dir: Path) -> list[str]:
    """The command line that starts every rank on a run directory."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    launcher = shutil.which("mlx.launch", path=path)
    if launcher is None:
        raise ConfigError(
            "training.processes: there is no mlx.launch beside this Python or on PATH. It comes "
            "with mlx: install that package again."
        )
    where = [launcher]
    if config.training.hostfile is not None:
        where += ["--hostfile", str(Path(config.training.hostfile).resolve())]
    else:
        port = str(free_ports(ranks))
        where += ["-n", str(ranks), "--backend", "nccl" if has_cuda() else "ring"]
        where += ["--starting-port", port, "--nccl-port", port]
    return [*where, "--", sys.executable, *PROGRAM, str(run_dir.resolve()), str(ranks)]


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody has now, on this machine.

    It takes seconds until the ranks listen there: ports that the system hands out are left alone.
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
    """This process's environment, for ranks on this machine; each is to see a device of its own."""
    visible, ranks = os.environ.get("CUDA_VISIBLE_DEVICES"), config.training.processes
    if visible is None or config.training.hostfile is not None or not has_cuda():
        return dict(os.environ)
    if len(visible.split(",")) < ranks:
        raise ConfigError(
            f"training.processes: {ranks} ranks need a GPU each, and CUDA_VISIBLE_DEVICES is "
            f"{visible!r}."
        )
    return os.environ | {DEVICES: visible}


def own_temporary_folder(rank: int) -> Path:
    """Where a rank that does not lead keeps the kernels that MLX compiles for it, from run to run.

    MLX writes them in place below $TMPDIR/mlx; two ranks that start together would read what the
    other has half written. ConfigError where the folder is another user's.
    """
    shared = user_folder(f"the kernels of rank {rank}", "Set TMPDIR to a folder of your own.")
    folder = shared / f"rank-{rank}"
    folder.mkdir(exist_ok=True)
    return folder


def own_device(environment: Mapping[str, str], rank: int) -> str | None:
    """The CUDA device of a rank on this machine, where its parent was given some of them."""
    devices = environment.get(DEVICES)
    return None if devices is None else devices.split(",")[rank]
