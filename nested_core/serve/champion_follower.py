"""The thread that watches the champions of a registry and has each new one served.

A version is re-hashed, read into memory and asked its canary before it answers anybody. Where that
fails, the old one stays, and the log, `/health` and the file under serving/ say why. A version
whose canary failed, or whose first requests and then its canary did, is barred: this server does
not try it again, and where the policy of the name says so it rolls the champion back. Where the
version before it fails its canary too, the fault is the server's: nothing is barred or rolled back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nested_core.errors import ConfigError, NestedTuneError
from nested_core.models.base_model import is_same_base
from nested_core.registry import (
    list_versions,
    read_champion,
    read_rollback_target,
    read_verified_version,
    rollback,
)
from nested_core.registry.policy import read_policy
from nested_core.registry.serving_status import (
    HEARTBEAT_SECONDS,
    ServerStatus,
    ServingNews,
    ServingRecord,
    own_server_name,
    remove_records_of_ended_servers,
    remove_serving_record,
    write_serving_record,
)
from nested_core.registry.versions import VERSION_PREFIX_PATTERN
from nested_core.serve.canary_check import CanaryFailed
from nested_core.serve.response_generator import SECONDS_TO_END, RegistryResponseGenerator
from nested_core.serve.served_version import BASE_VERSION, ServedVersion, require_same_base
from nested_core.text.digest_format import shorten_digest

POLL_SECONDS = 0.5
RETRY_REFUSED_SECONDS = 60.0
MAX_PINNED_VERSIONS = 4


@dataclass(frozen=True)
class _Refusal:
    """Why a version is not served; one that is barred is not tried again."""

    reason: str
    at: float
    is_barred: bool


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
        tell: Callable[[ServingNews], None],
    ) -> None:
        """`swap_wait` is how many seconds a swap waits for running requests.

        `tell` is called with what was done with each champion, and returns at once.
        """
        self._registry = registry
        self._base = base
        self._generator = generator
        self._address = address
        self._swap_wait = swap_wait
        self._tell = tell
        self._told: dict[str, ServingNews] = {}  # by name, what was told last
        self._refusals: dict[tuple[str, str], _Refusal] = {}  # by name and version
        self._versions_before: dict[str, ServedVersion] = {}  # what each swap took the place of
        self.problems: dict[str, str] = {}
        self._pinned: OrderedDict[tuple[str, str], ServedVersion] = OrderedDict()
        self._pinned_lock = threading.Lock()
        self._is_stopping = threading.Event()
        self._heartbeat = 0.0
        self._record_lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, name="champion follower", daemon=True),
            threading.Thread(target=self._keep_alive, name="heartbeat", daemon=True),
        ]

    def start(self) -> None:
        """Begin to follow.

        Raises CanaryFailed where a champion's canary fails and there is none before it to serve.
        """
        for name in self._generator.names:
            remove_records_of_ended_servers(self._registry / name)
        for name in self._generator.names:
            self._require_servable_champion(name)
        self._write_records()
        self._tell_news()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop following and the generator, and remove this server's files."""
        self._is_stopping.set()
        self._generator.stop_and_join()
        for thread in self._threads:
            thread.join(SECONDS_TO_END)
        for name in self._generator.names:
            remove_serving_record(self._registry / name)

    def find_version(self, name: str, wanted: str) -> ServedVersion:
        """The version that a request asks for by NAME@VERSION, re-hashed unless it is in memory.

        Raises ConfigError where there is none or it is barred, DamagedError where it is not what
        was registered.
        """
        if wanted == BASE_VERSION:
            return ServedVersion(name, BASE_VERSION)
        wanted = self._complete(name, wanted)
        current = self._generator.names[name].current
        if wanted == current.version:
            return current
        with self._pinned_lock:
            found = self._pinned.get((name, wanted))
            if found is None:
                found = self._read_version(name, wanted)
                if found == current:
                    return current
                barred = self._refusals.get((name, found.version))
                if barred is not None and barred.is_barred:
                    raise ConfigError(f"{found.label} is not served here: {barred.reason}")
                found = self._pinned.setdefault((name, found.version), found)
            self._pinned.move_to_end((name, found.version))
            while len(self._pinned) > MAX_PINNED_VERSIONS:
                self._pinned.popitem(last=False)
            return found

    def _complete(self, name: str, wanted: str) -> str:
        """The one version that begins with `wanted`; `wanted` where there is not just one."""
        if VERSION_PREFIX_PATTERN.fullmatch(wanted) is None:
            return wanted
        matching = [each for each in self.list_versions(name) if each.startswith(wanted)]
        return matching[0] if len(matching) == 1 else wanted

    def list_versions(self, name: str) -> list[str]:
        """Every registered version; the one that is served alone where the registry is away."""
        try:
            return list_versions(self._registry, name)
        except (NestedTuneError, OSError):
            return [self._generator.names[name].current.version]

    def _run(self) -> None:
        while not self._is_stopping.wait(POLL_SECONDS):
            try:
                self._look()
            except Exception as error:  # unforeseen; a server that follows no longer would not tell
                self._tell_problem("following", f"{type(error).__name__}: {error}")
            else:
                self.problems.pop("following", None)

    def _keep_alive(self) -> None:
        """Say that this server lives, while a look waits for answers to end, too."""
        while not self._is_stopping.wait(POLL_SECONDS):
            if time.monotonic() - self._heartbeat >= HEARTBEAT_SECONDS:
                self._write_records()

    def _look(self) -> None:
        """Follow each name, and say what is new."""
        changed = [
            name
            for name in self._generator.names
            if self._leave_failing_version(name) or self._follow(name)
        ]
        if changed:
            self._write_records()
            self._tell_news()

    def _follow(self, name: str) -> bool:
        """Serve the champion of a name, if it is another; whether there is news of the name."""
        status = self._generator.names[name]
        try:
            champion = read_champion(self._registry, name)
        except (NestedTuneError, OSError) as error:
            self._tell_problem(name, f"the champion of {name} cannot be read: {error}")
            self._forget_passing_refusals(name)  # what was read while it went away
            return False
        self.problems.pop(name, None)
        if champion is None or champion == status.current.version:
            self._forget_passing_refusals(name)
            return False
        refusal = self._refusals.get((name, champion))
        if refusal is not None and (
            refusal.is_barred or time.monotonic() - refusal.at < RETRY_REFUSED_SECONDS
        ):
            return False
        return self._serve(name, champion)

    def _read_version(self, name: str, wanted: str) -> ServedVersion:
        """A version that was re-hashed and is of the base that is loaded; raises otherwise."""
        verified = read_verified_version(self._registry, name, wanted)
        require_same_base(verified, self._base)
        return ServedVersion.of(name, verified)

    def _serve(self, name: str, champion: str) -> bool:
        """Serve a champion in place of what is served; whether there is news of the name."""
        status = self._generator.names[name]
        before = status.current
        try:
            self._generator.swap(self._read_version(name, champion), self._swap_wait)
        except Exception as error:  # whatever is wrong with it, the version before goes on
            if not self._is_stopping.is_set():
                self._refuse(name, champion, error)
            return not self._is_stopping.is_set()
        self._versions_before[name] = before
        self._refusals.pop((name, champion), None)
        self.problems.pop(f"{name}/failing", None)
        status.refused = None
        logging.info(
            "%s: version %s is served in place of %s, after %.2f s",
            name,
            shorten_digest(champion),
            shorten_digest(before.version),
            status.last_swap_seconds,
        )
        return True

    def _refuse(self, name: str, version: str, error: Exception) -> None:
        """Say that a version is not served; roll it back where that is the policy of its fault."""
        status = self._generator.names[name]
        reason = str(error)
        is_barred = False
        if isinstance(error, CanaryFailed):
            fault = self._find_own_fault(status.current)
            is_barred = fault is None
            reason += f"; {fault or self._roll_back(name, version, reason)}"
        self._refusals[name, version] = _Refusal(reason, time.monotonic(), is_barred)
        with self._pinned_lock:
            self._pinned.pop((name, version), None)
        status.refused = {"version": version, "reason": reason}
        logging.error("%s: version %s is refused: %s", name, shorten_digest(version), reason)

    def _find_own_fault(self, served: ServedVersion) -> str | None:
        """That the version which is served fails its canary too; None where it does not."""
        try:
            self._generator.require_canary(served)
        except CanaryFailed as error:
            return (
                f"the champion stays, for this server is at fault: version "
                f"{shorten_digest(served.version)}, which was served before, fails too: {error}"
            )
        return None

    def _roll_back(self, name: str, version: str, reason: str) -> str:
        """Roll a faulty champion back, where the policy says so; what became of that."""
        try:
            policy = read_policy(self._registry, name)
            if policy is None or policy.canary != "rollback":
                return "the champion stays, for the policy has no canary: rollback"
            adapter = read_verified_version(self._registry, name, version).adapter
            recorded = adapter.config.get("base_fingerprint")
            if recorded is None or not is_same_base(recorded, self._base):
                return (
                    f"the champion stays, for {self._base} is not the base that it was evaluated on"
                )
            done = rollback(
                self._registry,
                name,
                by=f"nested-tune serve {own_server_name()}",
                expected_champion=version,
                reason=reason,
            )
        except (NestedTuneError, OSError) as error:
            return f"the champion stays, for it could not be rolled back: {error}"
        if done.outcome == "rolled_back":
            return f"rolled back to {shorten_digest(done.version)}"
        return f"not rolled back: the champion is {shorten_digest(done.version)} by now"

    def _leave_failing_version(self, name: str) -> bool:
        """Go back to the version before where too many requests failed; whether that was so.

        A version is left only where it fails when it is asked again, and the one before does not.
        """
        status = self._generator.names[name]
        current, failures = status.current, status.failures
        if not failures.are_too_many:
            if failures.is_over:
                self.problems.pop(f"{name}/failing", None)
            return False
        failed = f"{failures.failed} of its first requests failed in the server"
        try:
            self._generator.require_answers(current, self._swap_wait)
        except Exception as error:  # whatever a request may meet
            failed += f", and it fails when it is asked again: {error}"
        else:
            self._tell_failing(current, f"{failed}, and it answers when it is asked again")
            return False
        before = self._versions_before[name]
        try:
            self._generator.swap(before, self._swap_wait)
        except Exception as error:
            self._tell_failing(
                current,
                f"{failed}; this server is at fault: version {shorten_digest(before.version)}, "
                f"which was served before, fails too: {error}",
            )
            return False
        failures.end()
        self._refuse(name, current.version, CanaryFailed(failed))
        return True

    def _tell_failing(self, version: ServedVersion, problem: str) -> None:
        """Say why a version that fails is not left, and watch the requests that come next."""
        label = f"{version.name}@{shorten_digest(version.version)}"
        self._tell_problem(f"{version.name}/failing", f"{label}: {problem}")
        self._generator.names[version.name].failures.begin()

    def _require_servable_champion(self, name: str) -> None:
        """Ask the canary of what is served first; where it fails, serve the champion before it."""
        status = self._generator.names[name]
        current = status.current
        try:
            self._generator.require_canary(current)
        except CanaryFailed as error:
            before = read_rollback_target(self._registry, name)
            problem = "There is no champion before it that could be"
            if before is not None:
                try:
                    self._generator.swap(self._read_version(name, before), self._swap_wait)
                except (NestedTuneError, OSError, RuntimeError) as fault:
                    problem = f"This server is at fault: the champion before fails too: {fault}"
            if status.current == current:
                raise CanaryFailed(
                    f"{current.label} is not served: {error}. {problem}. Look at the server's "
                    f"options and at its base {self._base}; or promote another version, or roll "
                    f"back to one: `nested-tune rollback {name} --registry {self._registry} --to "
                    f"VERSION`."
                ) from error
            status.failures.end()
            self._refuse(name, current.version, error)

    def _forget_passing_refusals(self, name: str) -> None:
        """What was wrong with versions that are not barred may be mended when they come again."""
        passing = [key for key, r in self._refusals.items() if key[0] == name and not r.is_barred]
        for key in passing:
            del self._refusals[key]
        status = self._generator.names[name]
        if status.refused is not None and (name, status.refused["version"]) not in self._refusals:
            status.refused = None

    def _tell_news(self) -> None:
        """Tell of each name what is served or refused, where that was not told before."""
        for name, status in self._generator.names.items():
            refused = status.refused or {}
            served = status.current.version
            since = status.since.isoformat(timespec="seconds")
            server = ServerStatus(self._address, served, since, refused.get("reason"))
            news = ServingNews(name, refused.get("version", served), server)
            if news != self._told.get(name):
                self._told[name] = news
                self._tell(news)

    def _write_records(self) -> None:
        with self._record_lock:
            self._write_records_locked()

    def _write_records_locked(self) -> None:
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
