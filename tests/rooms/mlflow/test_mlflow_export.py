"""The copy in MLflow's registry: versions, losses, files and the champion alias, each once."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nested_core.errors import ConfigError, DamagedError
from nested_core.registry import read_champion as registry_champion
from nested_core.registry import rollback
from nested_core.rooms.mlflow import mlflow_export
from nested_core.rooms.mlflow.mlflow_export import MlflowExport, export_to_mlflow
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.left_out import slow_except

NAME = "capitals"
needs_mlflow = pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None, reason="the extra mlflow is not installed"
)


@pytest.fixture
def versions(tmp_path: Path) -> list[str]:
    """Two versions in `tmp_path`/registry; the first is champion."""
    registry = tmp_path / "registry"
    versions = [
        register(write_run(tmp_path / str(seed), seed), registry, NAME, {"parent": "p" * 64})
        for seed in (1, 2)
    ]
    promote(registry, NAME, versions[0], by="ann")
    return versions


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store in a file, with its artifacts beside it."""
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def export(tmp_path: Path, store: str) -> MlflowExport:
    return export_to_mlflow(tmp_path / "registry", NAME, store)


def client(store: str) -> Any:
    mlflow = pytest.importorskip("mlflow")
    return mlflow.MlflowClient(tracking_uri=store, registry_uri=store)


class _Client:
    """MLflow's registry as far as the alias goes, with the first versions in it."""

    def __init__(self, versions: list[str]) -> None:
        self.versions = versions
        self.calls: list[str] = []
        self.tracking_uri = "sqlite:///mlflow.db"

    def search_registered_models(self, **_: Any) -> list[str]:
        return ["there"]

    def search_model_versions(self, *_: Any, **__: Any) -> Any:
        tags = [{"nested_tune.version": version} for version in self.versions]
        return _Page(SimpleNamespace(tags=tag, version=n) for n, tag in enumerate(tags, 1))

    def set_registered_model_alias(self, name: str, alias: str, number: str) -> None:
        self.calls.append(f"set {alias} {number}")

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        self.calls.append(f"delete {alias}")


class _Page(list[Any]):
    token = None


def test_a_promotion_while_it_exports_removes_no_alias(versions, tmp_path, monkeypatch) -> None:
    """A new version becomes champion just before the export reads which one it is."""
    registry, read = tmp_path / "registry", registry_champion

    def read_champion(*where: Any) -> str | None:
        new = register(write_run(tmp_path / "new", 9), registry, NAME, {})
        promote(registry, NAME, new, by="ann")
        return read(*where)

    stub = _Client(versions)
    monkeypatch.setattr(mlflow_export, "_make_client", lambda uri: stub)
    monkeypatch.setattr(mlflow_export, "read_champion", read_champion)
    monkeypatch.setattr(mlflow_export, "_export_version", lambda *_: "3")
    export_to_mlflow(registry, NAME)
    assert stub.calls == ["set champion 3"]


def test_versions_are_numbered_in_the_order_of_their_registration(tmp_path, monkeypatch) -> None:
    registry = tmp_path / "registry"
    given = [
        register(write_run(tmp_path / str(seed), seed), registry, NAME, {}) for seed in range(5)
    ]
    exported: list[str] = []
    monkeypatch.setattr(mlflow_export, "_make_client", lambda uri: _Client([]))
    monkeypatch.setattr(
        mlflow_export, "_export_version", lambda client, name, version, _: exported.append(version)
    )
    done = export_to_mlflow(registry, NAME)
    assert exported == list(done.added) == given != sorted(given)
    assert done.store == "sqlite:///mlflow.db"


def test_without_mlflow_it_says_what_to_install(versions, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"nested-tune\[mlflow\]"):
        export_to_mlflow(tmp_path / "registry", NAME)


@pytest.mark.slow("a process that imports the core")
def test_the_core_does_not_import_mlflow() -> None:
    code = "import sys, nested_core.rooms.mlflow.mlflow_export; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@needs_mlflow
@pytest.mark.slow("imports mlflow and makes its database")
@pytest.mark.filterwarnings("ignore")
class TestExport:
    def test_every_version_is_there_with_its_losses_and_its_gate(
        self, versions: list[str], tmp_path: Path, store: str
    ) -> None:
        done = export(tmp_path, store)
        assert set(done.numbers) == set(done.added) == set(versions)
        for version in versions:
            found = client(store).get_model_version(NAME, done.numbers[version])
            assert found.tags["nested_tune.version"] == version
            assert found.tags["nested_tune.parent"] == "p" * 64
            run = client(store).get_run(found.run_id)
            expected = {"loss_before": 4.1, "loss_after": 1.2, "difference": -2.9}
            expected |= {"one_sided_high": -2.82, "smallest_visible": 0.1}
            assert run.data.metrics == expected
            gate = client(store).download_artifacts(
                found.run_id, "adapter/gate.json", str(tmp_path)
            )
            assert json.loads(Path(gate).read_bytes())["trained"]["digest"] == version

    def test_the_alias_follows_the_champion_and_nothing_is_added_twice(
        self, versions: list[str], tmp_path: Path, store: str
    ) -> None:
        numbers = export(tmp_path, store).numbers

        def alias() -> str:
            return str(client(store).get_model_version_by_alias(NAME, "champion").version)

        assert alias() == numbers[versions[0]]
        promote(tmp_path / "registry", NAME, versions[1], by="ann")
        again = export(tmp_path, store)
        assert (again.numbers, again.added) == (numbers, ())
        assert alias() == numbers[versions[1]]
        rollback(tmp_path / "registry", NAME, by="ann")
        export(tmp_path, store)
        assert alias() == numbers[versions[0]]
        assert len(client(store).search_model_versions(f"name = '{NAME}'")) == 2

    @pytest.mark.parametrize(
        "name",
        slow_except(["gate.json", "provenance.json"], "gate.json", reason="another MLflow store"),
    )
    def test_a_damaged_version_is_not_exported(self, versions, tmp_path, store, name) -> None:
        path = tmp_path / "registry" / NAME / "versions" / versions[1] / name
        path.chmod(0o644)
        path.write_text(path.read_text() + " ")
        with pytest.raises(DamagedError, match=re.escape(name)):
            export(tmp_path, store)
        found = client(store).search_model_versions(f"name = '{NAME}'")
        assert versions[1] not in {version.tags["nested_tune.version"] for version in found}
