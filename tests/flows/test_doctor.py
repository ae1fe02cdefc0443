"""`doctor`: what it looks at, and what it says of a disk that is nearly full."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows.commands.doctor import MIN_FREE_DISK_BYTES
from tests.flows.conftest import called


def test_each_check_says_what_was_seen_and_what_to_do_where_it_is_not_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for free, is_well in ((MIN_FREE_DISK_BYTES, False), (MIN_FREE_DISK_BYTES + 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        done = called("doctor", "--json", cwd=tmp_path)
        checks = {check["name"]: check for check in done.document["checks"]}
        assert {"python", "packages", "mlx", "disk"} <= set(checks)
        assert checks["python"]["ok"] is True
        assert (checks["disk"]["ok"], checks["disk"]["seen"]) == (is_well, "2.0 GB free here")
        assert ("free some space" in checks["disk"]["mend"]) is not is_well
        all_well = all(check["ok"] for check in checks.values())
        assert (done.document["ok"], done.code) == (all_well, 0 if all_well else 1)
