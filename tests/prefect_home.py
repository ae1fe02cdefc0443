"""Homes for Prefect servers, whose database has its tables already.

An empty database takes a server's first start ten seconds of CPU time, in some hundred migrations.
They are done once for the versions of Prefect, SQLAlchemy and SQLite: the file is kept in the
user's folder for caches, for all workers and sessions, and copied.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import subprocess
import sys
from importlib import metadata
from pathlib import Path

MAKE_TABLES = """
import asyncio
from prefect.server.database import provide_database_interface

async def make_tables():
    database = provide_database_interface()
    await database.create_db()
    await (await database.engine()).dispose()

asyncio.run(make_tables())
"""
DATABASE = "prefect.db"


def new_prefect_home(folder: Path) -> Path:
    """The folder, made where there is none, as a PREFECT_HOME with a database of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_database_with_tables(), folder / DATABASE)
    return folder


def _database_with_tables() -> Path:
    """The database that is copied; the first process that asks for it makes it."""
    versions = [f"{name}-{metadata.version(name)}" for name in ("prefect", "sqlalchemy", "alembic")]
    folder = Path(os.environ["NESTED_TUNE_TESTS_SHARED"]) / "-".join(
        [*versions, f"sqlite-{sqlite3.sqlite_version}"]
    )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / DATABASE).exists():
            home = folder / f"made-by-{os.getpid()}"
            environment = os.environ | {"PREFECT_HOME": str(home)}
            subprocess.run([sys.executable, "-c", MAKE_TABLES], env=environment, check=True)
            (home / DATABASE).rename(folder / DATABASE)
            shutil.rmtree(home)
    return folder / DATABASE
