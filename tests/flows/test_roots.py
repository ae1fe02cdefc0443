"""Where the runs of deployments may read and write: nothing that parameters name leads outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from flows.allowed_folders import require_allowed, require_allowed_paths
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a deployment's run starts in, and the only one that it may use."""
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (home / "data" / "train.jsonl").touch()
    (tmp_path / "secret.jsonl").touch()
    (home / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (home / "linked").symlink_to(tmp_path)
    monkeypatch.chdir(home)
    monkeypatch.delenv("NESTED_TUNE_ROOTS", raising=False)
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", str(uuid4()))
    return home


def config(**changes: Any) -> FineTuneConfig:
    return FineTuneConfig.model_validate({"model": "owner/model", "data": "data"} | changes)


def hub(path: str, **arguments: Any) -> FineTuneConfig:
    return config(hf_dataset={"path": path, "config": arguments})


@pytest.mark.parametrize(
    "allowed",
    [
        config(model="data", data="owner/data-set"),
        hub("owner/data-set", data_files={"train": ["data/*.parquet", "more/a.jsonl"]}),
        hub("json", data_files="data/train.jsonl"),
        hub("json", data_files="https://data.example/train.jsonl"),
        hub("parquet", data_files=["hf://datasets/owner/name/a.parquet"]),
        hub("data", data_files="train.jsonl"),
        config(hf_dataset=[{"path": "data"}, {"path": "owner/other"}]),
    ],
)
def test_names_of_the_hub_addresses_and_paths_inside_are_allowed(
    home: Path, allowed: FineTuneConfig
) -> None:
    require_allowed_paths(allowed)


@pytest.mark.parametrize("key", ["model", "data", "resume_adapter_file", "adapter_path"])
@pytest.mark.parametrize("path", ["/etc", "../secret.jsonl", "link.jsonl", "linked/secret.jsonl"])
def test_a_path_that_leads_outside_is_refused_in_every_key(home: Path, key: str, path: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: {path} is outside of the folders"):
        require_allowed_paths(config(**{key: path}))


@pytest.mark.parametrize("path", ["/etc", "..", "../../etc", "linked", "./linked/home/../.."])
def test_a_data_set_outside_is_refused_by_its_path(home: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=r"^hf_dataset\[0\]\.path: .* is outside of the folders"):
        require_allowed_paths(hub(path))


@pytest.mark.parametrize(
    "files",
    [
        "/etc/passwd",
        ["data/train.jsonl", "/etc/passwd"],
        {"train": {"more": ["../secret.jsonl"]}},
        "link.jsonl",
        "*.jsonl",  # the link is among what it matches
        "data/../../*.jsonl",
        "linked/*.jsonl",
        "**/secret.jsonl",
    ],
)
@pytest.mark.parametrize("loader", ["json", "owner/data-set", "data"])
def test_data_files_outside_are_refused_however_they_are_written(
    home: Path, loader: str, files: Any
) -> None:
    with pytest.raises(ConfigError, match=r"^hf_dataset\[0\]\.config\.data_files: .* is outside"):
        require_allowed_paths(hub(loader, data_files=files))


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc/passwd",
        "local:///etc/passwd",
        "zip://*.jsonl::/etc/archive.zip",
        "zip://x::https://data.example/a.zip",
        "https://data.example/a.zip::file:///etc/passwd",
        "~/secret.jsonl",
    ],
)
def test_an_address_that_can_name_a_local_file_is_refused(home: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="is neither a path nor an https:// or hf:// address"):
        require_allowed_paths(hub("json", data_files=address))


@pytest.mark.parametrize("key", ["data_dir", "cache_dir"])
@pytest.mark.parametrize("path", ["/etc", "..", "linked"])
def test_a_folder_of_the_loader_outside_is_refused(home: Path, key: str, path: str) -> None:
    with pytest.raises(ConfigError, match=rf"^hf_dataset\[0\]\.config\.{key}: .* is outside"):
        require_allowed_paths(hub("json", **{key: path}))


def test_files_that_start_at_a_folder_given_beside_them_are_followed(home: Path) -> None:
    with pytest.raises(ConfigError, match="is outside of the folders"):
        require_allowed_paths(hub("json", data_dir="data", data_files="../../secret.jsonl"))


def test_a_run_at_a_command_line_goes_where_its_person_may(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT__RUNTIME__DEPLOYMENT__ID")
    require_allowed_paths(hub("json", data_files="/etc/passwd"))
    assert require_allowed("/etc", "data") == Path("/etc")


def test_roots_of_the_environment_replace_the_folder_of_the_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTED_TUNE_ROOTS", str(home.parent))
    require_allowed_paths(hub("json", data_files="/".join([str(home.parent), "secret.jsonl"])))
    monkeypatch.setenv("NESTED_TUNE_ROOTS", str(home / "data"))
    require_allowed_paths(config(model="owner/model", data="owner/data-set"))
    with pytest.raises(ConfigError, match="^data: "):
        require_allowed_paths(config(data="other/../../x"))
