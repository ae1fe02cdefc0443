"""The thread that watches the champions of a registry and has each new one served.

A version is re-hashed, read into memory and asked its canary before it answers anybody. Where that
fails, the version before goes on, the log and `/health` say why, and it is tried again a minute
later. The registry is only read.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from weakref import WeakValueDictionary

from nested_core.errors import ConfigError, DamagedError, NestedTuneError, quote_path
from nested_core.records.dataset import PromptFormat
from nested_core.registry import (
    list_versions,
    read_champion,
    read_rollback_target,
    read_verified_version,
)
from nested_core.registry.folders import name_exists
from nested_core.registry.mirroring import update_copy
from nested_core.registry.versions import PROVENANCE_NAME, VERSION_PREFIX_PATTERN
from nested_core.rooms.serve.canary_check import CanaryFailed
from nested_core.rooms.serve.engine import SECONDS_TO_END, VersionedGenerator
from nested_core.rooms.serve.metrics import NameStatus
from nested_core.rooms.serve.request_model import RequestRefused
from nested_core.rooms.serve.served_version import BASE_VERSION, ServedVersion, require_same_base
from nested_core.text.digest_format import shorten_digest

POLL_SECONDS = 0.5
MIRROR_POLL_SECONDS = 5.0
RETRY_SECONDS = 60.0
MAX_PINNED_VERSIONS = 4  # kept for who asks next
MAX_VERSIONS_IN_MEMORY = 16  # beside the champions; more are refused until answers end


class ChampionFollower:
    """Follows the champions of names of a registry.

    names: what is served for each name; the first answers requests without a model.
    problems: what keeps it from reading a champion, by the name.
    """

    def __init__(self, registry: Path, base: Path, generator: VersionedGenerator) -> None:
        """`base` is the folder of the model that the generator has loaded."""
        self._registry = registry
        self._base = base
        self._generator = generator
        self._failed_canaries: dict[tuple[str, str], tuple[str, float]] = {}  # reason, until when
        self._find_pinned = lru_cache(MAX_PINNED_VERSIONS)(self._read_once)
        self._pinned: WeakValueDictionary[tuple[str, str], ServedVersion] = WeakValueDictionary()
        self._reading = threading.Lock()
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="champion follower", daemon=True)
        self._next_mirror_poll: dict[str, float] = {}
        self.names: dict[str, NameStatus] = {}
        self.problems: dict[str, str] = {}

    def start(self, names: Sequence[str]) -> None:
        """Serve the champions of these names, and follow them.

        Raises ConfigError or DamagedError for a champion that cannot be served, CanaryFailed where
        its canary fails and no champion before it can be served.
        """
        for name in names:
            champion = require_champion(self._registry, name)
            try:
                self.names[name] = NameStatus(self._read_sound_version(name, champion))
            except CanaryFailed as error:
                self.names[name] = NameStatus(self._read_one_before(name, champion, error))
                self._refuse(name, champion, error)
        self._thread.start()

    def _read_one_before(self, name: str, champion: str, error: CanaryFailed) -> ServedVersion:
        """Read the champion before one whose canary failed; raises CanaryFailed without one."""
        before = read_rollback_target(self._registry, name)
        problem = "There is no champion before it that could be"
        if before is not None:
            try:
                return self._read_sound_version(name, before)
            except (NestedTuneError, OSError, RuntimeError) as fault:
                problem = f"This server is at fault: the champion before fails too: {fault}"
        raise CanaryFailed(
            f"{name}@{champion} is not served: {error}. {problem}. Look at the server's options "
            f"and at its base {self._base}; or promote another version, or roll back to one: "
            f"`nested-tune rollback {name} --registry {quote_path(self._registry)} --to VERSION`."
        ) from error

    def stop(self) -> None:
        """Stop following, and the generator."""
        self._is_stopping.set()
        self._generator.stop_and_join()
        if self._thread.is_alive():
            self._thread.join(SECONDS_TO_END)

    def find_version(self, name: str, wanted: str) -> ServedVersion:
        """Find the version that a request asks for, NAME or NAME@VERSION, and check it.

        Raises ConfigError for an unknown version, DamagedError where it is not what was registered,
        CanaryFailed where its canary fails, RequestRefused while answers of too many are under way.
        """
        current = self.names[name].current
        if wanted == BASE_VERSION:
            return ServedVersion(name, BASE_VERSION)
        if VERSION_PREFIX_PATTERN.fullmatch(wanted) is not None:
            matching = [v for v in self.list_versions(name) if v.startswith(wanted)]
            wanted = matching[0] if len(matching) == 1 else wanted
        return current if wanted in ("", current.version) else self._find_pinned(name, wanted)

    def list_versions(self, name: str) -> list[str]:
        """List every registered version; only the one that is served if the registry is away."""
        try:
            return list_versions(self._registry, name)
        except (NestedTuneError, OSError):
            return [self.names[name].current.version]

    def _poll_mirror(self, name: str) -> None:
        """Bring the copy of a registry in object storage up to date, now and then."""
        if time.monotonic() < self._next_mirror_poll.get(name, 0.0):
            return
        what, pause = f"mirror of {name}", MIRROR_POLL_SECONDS
        try:
            update_copy(self._registry, name)
            self.problems.pop(what, None)
        except (NestedTuneError, OSError) as error:
            self._tell_problem(what, str(error))
            if isinstance(error, DamagedError):  # its weights may be fetched to see that
                pause = RETRY_SECONDS
        self._next_mirror_poll[name] = time.monotonic() + pause

    def _read_once(self, name: str, version: str) -> ServedVersion:
        """Read a version, or return the one that is in memory: all who ask for it share one.

        An answer under way may hold a version that `_find_pinned` has let go of.
        """
        with self._reading:
            if (pinned := self._pinned.get((name, version))) is None:
                if len(self._pinned) >= MAX_VERSIONS_IN_MEMORY:
                    gc.collect()  # what answers that ended left in cycles is under way no more
                if len(self._pinned) >= MAX_VERSIONS_IN_MEMORY:
                    said = f"Answers of {MAX_VERSIONS_IN_MEMORY} older versions are under way here."
                    raise RequestRefused(f"{said} Ask again later.", 503)
                pinned = self._pinned[name, version] = self._read_sound_version(name, version)
            return pinned

    def _read_sound_version(self, name: str, version: str) -> ServedVersion:
        """Read a version, re-hash it, and ask its canary; raises where it cannot be served."""
        reason, until = self._failed_canaries.get((name, version), ("", 0.0))
        if time.monotonic() < until:
            raise ConfigError(f"{name}@{version} is not served here: {reason}")
        try:
            verified = read_verified_version(self._registry, name, version)
        except NestedTuneError:  # a copy of object storage lacks it, or has lost some of it
            update_copy(self._registry, name, version)
            verified = read_verified_version(self._registry, name, version)
        require_same_base(verified, self._base)
        rows = PromptFormat.read(verified.adapter.path / PROVENANCE_NAME)
        begin = (rows.system, rows.is_chat) if rows else ()
        served = ServedVersion(name, verified.version, verified, *begin)
        try:
            self._generator.require_sound(served)
        except CanaryFailed as error:
            self._failed_canaries[name, version] = str(error), time.monotonic() + RETRY_SECONDS
            raise
        return served

    def _run(self) -> None:
        while not self._is_stopping.wait(POLL_SECONDS):
            try:
                for name in self.names:
                    self._follow(name)
            except Exception as error:  # unforeseen; a server that follows no longer would not tell
                self._tell_problem("following", f"{type(error).__name__}: {error}")
            else:
                self.problems.pop("following", None)

    def _follow(self, name: str) -> None:
        """Serve the champion of a name, if it is another than what is served."""
        status = self.names[name]
        self._poll_mirror(name)
        try:
            champion = read_champion(self._registry, name)
        except (NestedTuneError, OSError) as error:
            self._tell_problem(name, f"the champion of {name} cannot be read: {error}")
            return
        self.problems.pop(name, None)
        if champion is None or champion == status.current.version:
            status.refused = None
            return
        is_refused = status.refused is not None and status.refused["version"] == champion
        if is_refused and time.monotonic() < status.retry_at:
            return
        began = time.monotonic()
        try:
            version = self._read_sound_version(name, champion)
        except Exception as error:  # whatever is wrong with it, the version before goes on
            if not self._is_stopping.is_set():
                self._refuse(name, champion, error)
            return
        before, status.current = status.current, version
        status.since = datetime.now(UTC)
        status.refused = None
        status.last_swap_seconds = round(time.monotonic() - began, 3)
        status.swaps += 1
        logging.info(
            "%s: version %s is served in place of %s, after %.2f s",
            name,
            shorten_digest(champion),
            shorten_digest(before.version),
            status.last_swap_seconds,
        )

    def _refuse(self, name: str, version: str, error: Exception) -> None:
        """Go on without a version, and try it again later; log a reason once."""
        status, refused = self.names[name], {"version": version, "reason": str(error)}
        self._find_pinned.cache_clear()
        self._pinned.clear()
        status.retry_at = time.monotonic() + RETRY_SECONDS
        if status.refused != refused:
            status.refused = refused
            logging.error("%s: version %s is refused: %s", name, shorten_digest(version), error)

    def _tell_problem(self, what: str, message: str) -> None:
        """Log a problem once, until it is another."""
        if self.problems.get(what) != message:
            self.problems[what] = message
            logging.warning("%s; what is served stays", message)


def require_champion(registry: Path, name: str) -> str:
    """Return the champion of a name; ConfigError without one.

    A copy of a registry in object storage is brought up to date first; where that fails, what it
    has is served, if it has anything.
    """
    try:
        update_copy(registry, name)
    except (NestedTuneError, OSError) as error:
        if not name_exists(registry, name):
            raise
        logging.warning("%s What was read from there before is served", error)
    champion = read_champion(registry, name)
    if champion is None:
        raise ConfigError(
            f"{registry / name} has no champion yet. Expected a version that was promoted: "
            f"`nested-tune promote RUN_DIR --registry {quote_path(registry)} --name {name}`."
        )
    return champion
