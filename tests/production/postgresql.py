"""A PostgreSQL cluster of the test's own, from Debian's binaries; removed at the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.production.processes import free_port

UNPRIVILEGED = "postgres"  # PostgreSQL refuses to run as root
PASSWORD = "prefect-in-tests"


def find_binaries() -> Path | None:
    """Where initdb and postgres are: on PATH, or where Debian keeps them; the newest version."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return versions[-1].parent if versions else None


def make_folder() -> Path:
    """A folder that the unprivileged user reaches: a session's own folder is closed to others."""
    return Path(tempfile.mkdtemp(prefix="nested-tune-pg-", dir="/tmp"))


@dataclass
class Cluster:
    """A database server on a free port of this machine; its files lie in a folder of their own."""

    binaries: Path
    port: int = field(default_factory=free_port)
    folder: Path = field(default_factory=make_folder)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What Prefect's server connects to."""
        return f"postgresql+asyncpg://{UNPRIVILEGED}:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    @property
    def _user(self) -> str | None:
        return UNPRIVILEGED if os.geteuid() == 0 else None

    def create(self) -> None:
        """Make the cluster's files."""
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        if self._user is not None:
            for path in (self.folder, secret):
                shutil.chown(path, self._user)
        flags = ["-U", UNPRIVILEGED, "-A", "scram-sha-256", "--pwfile", str(secret)]
        command = [str(self.binaries / "initdb"), "-D", str(self.folder / "data"), *flags]
        subprocess.run(
            command, user=self._user, cwd=self.folder, check=True, capture_output=True, timeout=120
        )

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(
            [str(self.binaries / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port)]
            + ["-k", str(self.folder), "-c", "listen_addresses=127.0.0.1"],
            user=self._user,
            cwd=self.folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        ready = [str(self.binaries / "pg_isready"), "-h", "127.0.0.1", "-p", str(self.port), "-q"]
        deadline = time.monotonic() + 60
        while subprocess.run(ready, check=False).returncode != 0:
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.2)

    def stop(self) -> None:
        """Stop it at once, cutting connections, as `systemctl restart` does."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)  # PostgreSQL's "fast" shutdown
            self.process.wait(60)
            self.process = None

    def remove(self) -> None:
        """Stop it and remove its files."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
