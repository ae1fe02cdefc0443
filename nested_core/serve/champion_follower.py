"""The thread that watches the champions of a registry and has each new one served.

A version is re-hashed and read into memory before anything is changed. Where that fails, the old
one stays, and the log, `/health` and the file under serving/ say why.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nested_core.errors import NestedTuneError
from nested_core.registry import list_versions, read_champion, read_verified_adapter
from nested_core.serve.response_generator import RegistryResponseGenerator
from nested_core.serve.served_version import BASE_VERSION, ServedVersion, require_same_base
from nested_core.serve.serving_file import (
    HEARTBEAT_SECONDS,
    ServingRecord,
    remove_records_of_ended_servers,
    remove_serving_record,
    write_serving_record,
)
from nested_core.text.digest_format import shorten_digest

POLL_SECONDS = 0.5
RETRY_REFUSED_SECONDS = 60.0
MAX_PINNED_VERSIONS = 4


@dataclass(frozen=True)
class _Refusal:
    version: str
    at: float


class ChampionFollower:
    """Follows the champions of the names that a generator serves.

    problems: what keeps it from reading a champion or writing a file, by what it is about.
    """

    def __init__(
        self,
        registry: Path,
        base: Path,
        generator: RegistryResponseGenerator,
        *,
        address: str,
        swap_wait: float,
    ) -> None:
        """`swap_wait` is how many seconds a swap waits for running requests."""
        self._registry = registry
        self._base = base
        self._generator = generator
        self._address = address
        self._swap_wait = swap_wait
        self._refusals: dict[str, _Refusal] = {}
        self.problems: dict[str, str] = {}
        self._pinned: OrderedDict[tuple[str, str], ServedVersion] = OrderedDict()
        self._pinned_lock = threading.Lock()
        self._is_stopping = threading.Event()
        self._heartbeat = 0.0
        self._thread = threading.Thread(target=self._run, name="champion follower", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        for name in self._generator.names:
            remove_records_of_ended_servers(self._registry / name)
        self._write_records()
        self._thread.start()

    def stop(self) -> None:
        """Stop following, and remove this server's files; the generator has been stopped."""
        self._is_stopping.set()
        self._thread.join()
        for name in self._generator.names:
            remove_serving_record(self._registry / name)

    def find_version(self, name: str, wanted: str) -> ServedVersion:
        """The version that a request asks for by NAME@VERSION, re-hashed unless it is in memory.

        Raises ConfigError where there is none, DamagedError where it is not what was registered.
        """
        if wanted == BASE_VERSION:
            return ServedVersion(name, BASE_VERSION)
        current = self._generator.names[name].current
        if wanted == current.version:
            return current
        with self._pinned_lock:
            found = self._pinned.get((name, wanted))
            if found is None:
                adapter = read_verified_adapter(self._registry, name, wanted)
                require_same_base(adapter, self._base)
                found = ServedVersion(name, adapter.path.name, adapter)
                if found == current:
                    return current
                found = self._pinned.setdefault((name, found.version), found)
            self._pinned.move_to_end((name, found.version))
            while len(self._pinned) > MAX_PINNED_VERSIONS:
                self._pinned.popitem(last=False)
            return found

    def list_versions(self, name: str) -> list[str]:
        """Every registered version; the one that is served alone where the registry is away."""
        try:
            return list_versions(self._registry, name)
        except (NestedTuneError, OSError):
            return [self._generator.names[name].current.version]

    def _run(self) -> None:
        while not self._is_stopping.wait(POLL_SECONDS):
            changed = [name for name in self._generator.names if self._follow(name)]
            if changed or time.monotonic() - self._heartbeat >= HEARTBEAT_SECONDS:
                self._write_records()

    def _follow(self, name: str) -> bool:
        """Serve the champion of a name, if it is another; whether there is news of the name."""
        status = self._generator.names[name]
        try:
            champion = read_champion(self._registry, name)
        except (NestedTuneError, OSError) as error:
            self._tell_problem(name, f"the champion of {name} cannot be read: {error}")
            return False
        self.problems.pop(name, None)
        if champion is None or champion == status.current.version:
            status.refused = None
            self._refusals.pop(name, None)
            return False
        refusal = self._refusals.get(name)
        is_barred = refusal is not None and refusal.version == champion
        if is_barred and time.monotonic() - refusal.at < RETRY_REFUSED_SECONDS:  # type: ignore[union-attr]
            return False
        return self._serve(name, champion)

    def _serve(self, name: str, champion: str) -> bool:
        status = self._generator.names[name]
        before = status.current.version
        try:
            adapter = read_verified_adapter(self._registry, name, champion)
            require_same_base(adapter, self._base)
            self._generator.swap(ServedVersion(name, champion, adapter), self._swap_wait)
        except Exception as error:  # whatever is wrong with it, the version before goes on
            if self._is_stopping.is_set():
                return False
            self._refusals[name] = _Refusal(champion, time.monotonic())
            status.refused = {"version": champion, "reason": str(error)}
            logging.error(
                "%s: version %s is not served, %s stays: %s",
                name,
                shorten_digest(champion),
                shorten_digest(status.current.version),
                error,
            )
            return True
        self._refusals.pop(name, None)
        status.refused = None
        logging.info(
            "%s: version %s is served in place of %s, after %.2f s",
            name,
            shorten_digest(champion),
            shorten_digest(before),
            status.last_swap_seconds,
        )
        return True

    def _write_records(self) -> None:
        self._heartbeat = time.monotonic()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        for name, status in self._generator.names.items():
            record = ServingRecord(
                self._address,
                status.current.version,
                status.since.isoformat(timespec="seconds"),
                now,
                status.refused,
            )
            what = f"{name}/serving"
            try:
                write_serving_record(self._registry / name, record)
            except OSError as error:
                self._tell_problem(what, f"the file of {what} is not written: {error}")
            else:
                self.problems.pop(what, None)

    def _tell_problem(self, what: str, message: str) -> None:
        """Log a problem once, until it is another."""
        if self.problems.get(what) != message:
            self.problems[what] = message
            logging.warning("%s; what is served stays", message)
