"""Registering copies what the gate passed, once, and refuses everything else."""

from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nested_core.errors import ConfigError, DamagedError, GateRejected
from nested_core.registry import history, list_versions
from nested_core.seams import is_there
from nested_core.storage.adapter import read_adapter
from nested_core.storage.manifest import verify_manifest
from tests.builders.registering import promote, register
from tests.core.registry.states import last_line

FILES = {
    "adapters.safetensors",
    "adapter_config.json",
    "gate.json",
    "provenance.json",
    "MANIFEST.json",
    *(["README.md"] if is_there("export") else []),
}


def test_version_is_the_digest_of_the_adapter_and_holds_its_proof(make_run, registry):
    run = make_run()
    version = register(run, registry, "capitals", {"dataset": "d1"})
    folder = registry / "capitals" / "versions" / version
    assert version == read_adapter(run / "adapter").digest() == read_adapter(folder).digest()
    assert {path.name for path in folder.iterdir()} == FILES
    provenance = json.loads((folder / "provenance.json").read_text())
    registered_at = datetime.fromisoformat(provenance.pop("registered_at"))
    assert timedelta(0) <= datetime.now(UTC) - registered_at < timedelta(minutes=1)
    assert provenance == {"dataset": "d1"}
    assert verify_manifest(folder) == {"kind": "adapter version", "version": version}
    assert history(registry, "capitals") == []
    line = last_line(registry)
    manifest = json.loads((folder / "MANIFEST.json").read_bytes())["digest"]
    assert (line["action"], line["version"], line["previous"]) == ("registered", version, None)
    assert (line["manifest"], line["layout"]) == (manifest, 2)


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o400), (0o027, 0o440), (0o002, 0o444)])
def test_files_of_a_version_are_read_by_those_whom_the_umask_lets(
    make_run, registry, monkeypatch, umask, mode
):
    run, before = make_run(1), os.umask(umask)
    try:
        version = register(run, registry, "capitals", {})
        promote(registry, "capitals", version, by="ann")
    finally:
        os.umask(before)
    folder = registry / "capitals"
    files = (folder / "versions" / version).iterdir()
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}
    for name in (".lock", "history.jsonl", "champion.json"):  # a group that promotes writes them
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o666 & ~umask


def test_registering_twice_keeps_one_version_with_its_first_provenance(make_run, registry):
    run = make_run()
    first = register(run, registry, "capitals", {"attempt": 1})
    assert register(run, registry, "capitals", {"attempt": 2}) == first
    assert list_versions(registry, "capitals") == [first]
    provenance = registry / "capitals" / "versions" / first / "provenance.json"
    assert json.loads(provenance.read_text())["attempt"] == 1


def test_rejected_adapter_never_reaches_the_registry(make_run, registry):
    with pytest.raises(GateRejected, match="unchanged"):
        register(make_run(verdict="failed"), registry, "capitals", {})
    assert not registry.exists()


def test_verdict_on_another_adapter_is_damage(make_run, registry):
    run, other = make_run(1), make_run(2)
    (run / "gate.json").write_bytes((other / "gate.json").read_bytes())
    with pytest.raises(DamagedError, match="has changed since the verdict was given"):
        register(run, registry, "capitals", {})
    assert not registry.exists()


def test_a_file_that_says_the_same_in_other_bytes_than_were_judged_is_damage(make_run, registry):
    run = make_run()
    path = run / "adapter" / "adapter_config.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DamagedError, match="has changed since the verdict was given"):
        register(run, registry, "capitals", {})
    assert list_versions(registry, "capitals") == []


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"verdict": "passed"', "[" * 100_000, '{"verdict": 1}']
)
def test_unreadable_gate_is_damage(make_run, registry, content):
    run = make_run()
    (run / "gate.json").write_text(content)
    with pytest.raises(DamagedError, match=r"gate\.json"):
        register(run, registry, "capitals", {})


def test_run_without_a_verdict_is_refused_with_what_to_do(make_run, registry):
    run = make_run()
    (run / "gate.json").unlink()
    with pytest.raises(ConfigError, match="no gate has evaluated this adapter"):
        register(run, registry, "capitals", {})


def test_registry_may_lie_below_directories_that_are_not_there_yet(make_run, tmp_path: Path):
    registry = tmp_path / "some where" / "über" / "registry"
    assert register(make_run(), registry, "a", {}) in list_versions(registry, "a")
