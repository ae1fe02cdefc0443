"""REGISTRY/NAME/serving/HOST-PID.json: what a server serves for a name, and since when.

It is no part of what was registered: a registry that cannot be written is served all the same. A
server that was killed leaves its file; the heartbeat there tells, and the next server of the same
machine removes it.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from nested_core.errors import DamagedError
from nested_core.storage.atomic import write_json
from nested_core.storage.strict_files import read_json

SERVING_FOLDER_NAME = "serving"
HEARTBEAT_SECONDS = 10.0
MAX_HEARTBEAT_AGE = timedelta(minutes=1)
MAX_FILE_BYTES = 64 * 1024
MAX_DIGITS = 20  # of a process


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
    return dict(_iterate_records(folder / SERVING_FOLDER_NAME))


def _iterate_records(folder: Path) -> Iterator[tuple[str, ServingRecord]]:
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if parse_serving_name(path.name) is None:
            continue
        with suppress(DamagedError, OSError, TypeError, ValueError):
            fields: dict[str, Any] = read_json(path, MAX_FILE_BYTES)
            record = ServingRecord(**fields)
            RECORD_VALIDATOR.validate_python(asdict(record))
            record.is_alive(datetime.now(UTC))
            yield path.name, record


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
