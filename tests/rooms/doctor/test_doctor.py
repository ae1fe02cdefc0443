"""`doctor`: what it looks at, and what it says of a full disk and of packages that do not fit."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows.rooms.doctor import command
from flows.rooms.doctor.command import MIN_FREE_DISK_BYTES
from nested_core import backend
from tests.builders.file_damage import flip_a_bit
from tests.builders.registering import register_and_promote
from tests.core.registry.conftest import write_run
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
        assert ("free space" in checks["disk"]["mend"]) is not is_well
        all_well = all(check["ok"] for check in checks.values())
        assert (done.document["ok"], done.code) == (all_well, 0 if all_well else 1)


def test_a_package_that_is_missing_or_of_a_version_that_does_not_fit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    read = importlib.metadata.version
    unfit = {"whenever": "0.12.0", "polars": "3.0.0"}

    def installed(name: str) -> str:
        if name == "pandera":
            raise importlib.metadata.PackageNotFoundError(name)
        return unfit.get(name) or read(name)

    monkeypatch.setattr(command, "version", installed)
    done = called("doctor", "--json", cwd=tmp_path)
    (packages,) = [each for each in done.document["checks"] if each["name"] == "packages"]
    assert (packages["ok"], done.code) == (False, 1)
    assert "whenever 0.12.0" in packages["seen"]
    assert "pandera" not in packages["seen"]
    assert packages["mend"].startswith("pip install ")
    for name in ("whenever<0.12", "polars<3", "pandera"):
        assert f'"{name}' in packages["mend"]
    assert "prefect" not in packages["mend"]


def test_on_metal_the_mac_is_to_stay_awake_and_its_display_off(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(backend, "device", lambda: "gpu")
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: False)
    done = called("doctor", "--json", cwd=tmp_path)
    (mlx,) = [check for check in done.document["checks"] if check["name"] == "mlx"]
    assert mlx["ok"]
    assert mlx["mend"].startswith("while it trains keep the Mac awake, its display off")


def test_a_champion_that_is_damaged_is_said_and_one_that_is_sound(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    for name, seed in (("capitals", 1), ("rivers", 2)):
        register_and_promote(write_run(tmp_path / name, seed=seed), registry, name, {}, by="a test")
    weights = registry / "rivers" / "champion" / "adapters.safetensors"
    flip_a_bit(weights)
    done = called("doctor", "--json", "--registry", "registry", cwd=tmp_path)
    checks = {each["name"]: each for each in done.document["checks"]}
    assert checks["champion capitals"]["ok"]
    damaged = checks["champion rivers"]
    assert (damaged["ok"], "is not what was registered" in damaged["seen"]) == (False, True)
    assert "nested-tune audit" in damaged["mend"]
