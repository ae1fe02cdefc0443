"""What the servers of a name serve, by their files below it.

REGISTRY/NAME/serving/HOST-PID.json is no part of what was registered: a registry that cannot be
written is served all the same, and where a server may write this one folder it is seen. A server
that was killed leaves its file; the heartbeat there tells, and the next server of the same machine
removes it.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter

from nested_core.config.sections import RegistrySection
from nested_core.errors import DamagedError, shorten
from nested_core.registry.queries import read_champion
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.storage.atomic import write_json
from nested_core.storage.untrusted_files import read_json
from nested_core.text.digest_format import shorten_digest

SERVING_FOLDER_NAME = "serving"
HEARTBEAT_SECONDS = 10.0
MAX_HEARTBEAT_AGE = timedelta(minutes=1)
MAX_FILE_BYTES = 64 * 1024
MAX_DIGITS = 20  # of a process

SECONDS_BETWEEN_LOOKS = 0.5
MAX_REASON_LENGTH = 500


@dataclass(frozen=True)
class ServingRecord:
    """What one server says.

    address: where it answers, http://HOST:PORT.
    version: what it serves now, "base" never.
    since: when it began to serve that, UTC, ISO 8601.
    heartbeat: when the file was last written, UTC, ISO 8601.
    refused: a champion that it does not serve, with the reason, or None.
    """

    address: str
    version: str
    since: str
    heartbeat: str
    refused: dict[str, str] | None = None
    __pydantic_config__ = ConfigDict(extra="forbid")

    def age(self, now: datetime) -> timedelta:
        """How long ago the server wrote the file."""
        return now - datetime.fromisoformat(self.heartbeat)

    def is_alive(self, now: datetime) -> bool:
        """Whether the server wrote the file within the last minute."""
        return self.age(now) <= MAX_HEARTBEAT_AGE


RECORD_VALIDATOR = TypeAdapter(ServingRecord)


def write_serving_record(folder: Path, record: ServingRecord) -> None:
    """Write this process's file below a name's folder, which must exist. Raises OSError."""
    (folder / SERVING_FOLDER_NAME).mkdir(exist_ok=True)
    write_json(_own_path(folder), asdict(record))


def remove_serving_record(folder: Path) -> None:
    """Remove this process's file, if it can be."""
    with suppress(OSError):
        _own_path(folder).unlink(missing_ok=True)


def remove_records_of_ended_servers(folder: Path) -> None:
    """Remove files of processes of this machine that are gone, where that can be done."""
    with suppress(OSError):
        for path in (folder / SERVING_FOLDER_NAME).iterdir():
            host, process = parse_serving_name(path.name) or ("", 0)
            if host == _host() and not _runs(process):
                path.unlink(missing_ok=True)


def read_serving_records(folder: Path) -> dict[str, ServingRecord]:
    """Each server's record by the file's name; files that cannot be read are left out."""
    records = {}
    for path in sorted((folder / SERVING_FOLDER_NAME).glob("*.json")):
        if parse_serving_name(path.name) is not None:
            with suppress(DamagedError, OSError, TypeError, ValueError):
                record = RECORD_VALIDATOR.validate_python(read_json(path, MAX_FILE_BYTES))
                record.is_alive(datetime.now(UTC))
                records[path.name] = record
    return records


def parse_serving_name(name: str) -> tuple[str, int] | None:
    """Host and process of a file HOST-PID.json; None for any other."""
    host, dash, process = name.removesuffix(".json").rpartition("-")
    is_one = name.endswith(".json") and dash and process.isascii() and process.isdigit()
    return (host, int(process)) if is_one and len(process) < MAX_DIGITS else None


def own_server_name() -> str:
    """HOST-PID of this process, as its file is called."""
    return f"{_host()}-{os.getpid()}"


def _own_path(folder: Path) -> Path:
    return folder / SERVING_FOLDER_NAME / f"{own_server_name()}.json"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", socket.gethostname()) or "host"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@dataclass(frozen=True)
class ServerStatus:
    """What one server says of a name.

    address: http://HOST:PORT.
    version: what it serves.
    since: when it began to serve that, UTC, ISO 8601.
    problem: why it does not serve another version, or that it is silent; None for no problem.
    """

    address: str
    version: str
    since: str
    problem: str | None = None


@dataclass(frozen=True)
class ServingNews:
    """What a server did with a champion of a name: it serves it, or says why it does not."""

    name: str
    champion: str
    server: ServerStatus


def read_await_serving(registry: Path, name: str, version: str) -> float | None:
    """`registry.await_serving`, in seconds, as it was recorded with a version."""
    recorded = read_provenance(version_folder(registry, name, version)).get("config") or {}
    seconds: float | None = (recorded.get("registry") or {}).get("await_serving")
    return seconds


def read_servers(
    registry: Path, name: str, *, heard_within: timedelta = MAX_HEARTBEAT_AGE
) -> list[ServerStatus]:
    """The servers of a name whose file is at most so old.

    One that has not written it for a minute has that as its problem.
    """
    now = datetime.now(UTC)
    records = read_serving_records(registry / name).values()
    return [_status_of(record, now) for record in records if record.age(now) <= heard_within]


def _status_of(record: ServingRecord, now: datetime) -> ServerStatus:
    reason = (record.refused or {}).get("reason")
    problem = None if reason is None else shorten(reason, MAX_REASON_LENGTH)
    if not record.is_alive(now):
        problem = f"nothing was heard of it since {shorten(record.heartbeat)}"
    return ServerStatus(
        shorten(record.address, 200), shorten(record.version, 64), shorten(record.since), problem
    )


def await_serving(registry: Path, name: str, version: str, *, seconds: float) -> list[ServerStatus]:
    """Wait until every server of a name serves a version, at most so many seconds.

    Returns what they say then; at once where there is no server, or the champion is another again.
    """
    deadline = time.monotonic() + seconds
    while True:
        servers = read_servers(registry, name)
        is_over = time.monotonic() >= deadline or read_champion(registry, name) != version
        if is_over or not find_servers_behind(servers, version):
            return servers
        time.sleep(SECONDS_BETWEEN_LOOKS)


def await_configured(section: RegistrySection, version: str) -> list[str]:
    """Wait as `registry.await_serving` says; a sentence for each server, none without the key."""
    if section.await_serving is None or section.path is None or section.name is None:
        return []
    registry = Path(section.path)
    servers = await_serving(registry, section.name, version, seconds=section.await_serving)
    return [describe_server(server, version) for server in servers]


def find_servers_behind(servers: Sequence[ServerStatus], version: str) -> list[ServerStatus]:
    """The servers that do not serve a version."""
    return [server for server in servers if server.version != version]


def describe_server(server: ServerStatus, version: str) -> str:
    """A sentence: since when a server serves a version, or that it does not and why."""
    if server.version == version:
        return f"serving since {server.since}, at {server.address}"
    said = f"not served at {server.address}: {shorten_digest(server.version)} there"
    return said if server.problem is None else f"{said}; {server.problem}"
