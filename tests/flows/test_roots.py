"""Where the runs of deployments may read and write: nothing that parameters name leads outside."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pydantic import ValidationError

import nested_core
from flows.finetune import FinetuneParameters
from flows.flow_runs.allowed_folders import (
    allow_paths,
    require_allowed,
    require_known_name,
    with_allowed_paths,
    with_trusted_code,
)
from flows.reconcile import ReconcileParameters
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError
from nested_core.registry import read_champion
from tasks.promote import roll_back
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run


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
        hub("parquet", data_files=["hf://datasets/owner/name/a.parquet"]),
        hub("data", data_files="train.jsonl"),
        config(hf_dataset=[{"path": "data"}, {"path": "owner/other"}]),
    ],
)
def test_names_of_the_hub_addresses_and_paths_inside_are_allowed(home, allowed) -> None:
    with_allowed_paths(allowed)


@pytest.mark.parametrize("listed", ["", "s3://rows/support s3://other/", "s3://rows/support-2"])
def test_a_run_uses_buckets_that_the_worker_lists_alone(home: Path, monkeypatch, listed) -> None:
    monkeypatch.setenv("NESTED_TUNE_BUCKETS", listed)
    mirror = {"path": "data", "name": "a", "mirror": "s3://other"}
    rows = config(data="s3://rows/support/new")
    mirrored = config(data="data", registry=mirror)
    if "support " in listed:
        assert with_allowed_paths(rows).data == rows.data
        assert with_allowed_paths(mirrored).registry.mirror == "s3://other"
        return
    for refused in (rows, mirrored):
        with pytest.raises(ConfigError, match="would be used with this worker's credentials"):
            with_allowed_paths(refused)


@pytest.mark.parametrize(
    "path", ["*.jsonl", "data/../../*.jsonl", "l*/secret.jsonl", "**/s*.jsonl"]
)
def test_a_pattern_that_matches_files_outside_is_refused(home: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="^data: .* is outside of the folders"):
        with_allowed_paths(config(data=path))


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
def test_data_files_outside_are_refused_however_they_are_written(home, loader, files) -> None:
    with pytest.raises(ConfigError, match=r"^hf_dataset\[0\]\.config\.data_files: .* is outside"):
        with_allowed_paths(hub(loader, data_files=files))


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc/passwd",
        "local:///etc/passwd",
        "zip://*.jsonl::/etc/archive.zip",
        "zip://x::https://data.example/a.zip",
        "https://data.example/a.zip::file:///etc/passwd",
        "~/secret.jsonl",
        "http://169.254.169.254/latest/meta-data",
        "https://data.example/train.jsonl",
        "https://x/\n::file:///etc/passwd",
        "https://x/::/etc/passwd",
        "hf://x/\r\n::file:///etc/passwd",
        "https://x/\0",
        "HTTP://x/a.jsonl",
        "ftp://x/a.jsonl",
        "s3://bucket/a.jsonl",
        "data/train.jsonl\n",
    ],
)
def test_only_one_plain_address_of_the_hub_is_taken(home: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="is neither a path nor an hf|control character") as e:
        with_allowed_paths(hub("json", data_files=address))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("path", ["file:/etc/passwd", "https:/x/y.json", "a/b/c", "$HOME/x"])
def test_a_data_set_is_a_folder_here_or_a_name_of_the_hub(home: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="is neither a folder here nor OWNER/NAME of the hub"):
        with_allowed_paths(hub(path))


@pytest.mark.parametrize("key", ["data_dir"])
@pytest.mark.parametrize("path", ["/etc", "..", "linked"])
def test_a_folder_of_the_loader_outside_is_refused(home: Path, key: str, path: str) -> None:
    with pytest.raises(ConfigError, match=rf"^hf_dataset\[0\]\.config\.{key}: .* is outside"):
        with_allowed_paths(hub("json", **{key: path}))


def test_files_that_start_at_a_folder_given_beside_them_are_followed(home: Path) -> None:
    with pytest.raises(ConfigError, match="is outside of the folders"):
        with_allowed_paths(hub("json", data_dir="data", data_files="../../secret.jsonl"))


def test_a_run_at_a_command_line_goes_where_its_person_may(home, monkeypatch) -> None:
    monkeypatch.delenv("PREFECT__RUNTIME__DEPLOYMENT__ID")
    with_allowed_paths(hub("json", data_files="/etc/passwd"))
    assert require_allowed("/etc", "data") == Path("/etc")


def test_roots_of_the_environment_replace_the_folder_of_the_run(home, monkeypatch) -> None:
    monkeypatch.setenv("NESTED_TUNE_ROOTS", str(home.parent))
    with_allowed_paths(hub("json", data_files="/".join([str(home.parent), "secret.jsonl"])))
    monkeypatch.setenv("NESTED_TUNE_ROOTS", str(home / "data"))
    with_allowed_paths(config(model="owner/model", data="owner/data-set"))
    with pytest.raises(ConfigError, match="^data: "):
        with_allowed_paths(config(data="other/../../x"))


@pytest.mark.parametrize("variable", ["NESTED_TUNE_CACHE", "NESTED_TUNE_KERNELS", "PREFECT_HOME"])
def test_caches_kernels_and_prefects_files_are_no_data_wherever_they_lie(
    home: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Nor is a folder above: a name `real` of a registry `above` would be written among them."""
    (home / "above" / "real" / "answers").mkdir(parents=True)
    (home / "place").symlink_to(home / "above" / "real")
    paths = ("./place/run", "./above/real", "data/../above/real/answers/run", "above", "data/../.")
    for path in paths[:-1]:
        allow_paths(parameters("run_dir", path))
    monkeypatch.setenv(variable, str(home / "place"))
    for path in paths:
        for key in KEYS_OF_PATHS:
            with pytest.raises(ConfigError, match=f"lies in {variable} or holds it"):
                allow_paths(parameters(key, path))
    allow_paths(parameters("run_dir", "above/really"))
    monkeypatch.setenv("NESTED_TUNE_ROOTS", f"{home}/above/real{os.pathsep}{home}/data")
    with pytest.raises(ConfigError, match=f"lies in {variable} or holds it"):
        allow_paths(parameters("run_dir", str(home / "above" / "real" / "run")))


@pytest.mark.parametrize("below", ["", "nested_core/rooms", "flows/run", "tasks"])
def test_what_a_root_holds_of_code_is_no_data(
    home: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    packages, ours = (
        Path(sysconfig.get_path("purelib")).resolve(),
        Path(nested_core.__file__).parents[1],
    )
    for root in (ours, ours.parent, packages, packages.parent):
        monkeypatch.setenv("NESTED_TUNE_ROOTS", os.pathsep.join((str(root), str(home))))
        for place in (ours, packages):
            if place.is_relative_to(root):
                with pytest.raises(ConfigError, match="lies in Python's packages or holds it"):
                    allow_paths(parameters("run_dir", str(place / below)))
    monkeypatch.setenv("NESTED_TUNE_ROOTS", os.pathsep.join((str(ours), str(home))))
    allow_paths(parameters("run_dir", str(ours / "runs" / "run")))


KEYS_OF_PATHS = [
    *("model", "data", "resume_adapter_file", "adapter_path", "run_dir", "training.hostfile"),
    *("gate.held_out", "gate.general_data", "gate.tasks", "registry.path", "hf_dataset"),
]


def parameters(key: str, path: str) -> FinetuneParameters:
    """The parameters of a run in which one key has this path."""
    values: dict[str, Any] = {"model": "owner/model", "data": "data"}
    section, _, name = key.rpartition(".")
    if key == "gate.tasks":
        values["gate"] = {"tasks": [{"name": "x", "file": path, "score": "exact"}]}
    elif key == "gate.general_data":
        values["gate"] = {"general_data": path, "max_general_loss_increase": 0.1}
    elif key == "registry.path":
        values["registry"] = {"path": path, "name": "x"}
    elif key == "hf_dataset":
        values["hf_dataset"] = {"path": path}
    elif section:
        values[section] = {name: path}
    else:
        values[name] = path
    return FinetuneParameters.model_validate(values)


@pytest.mark.parametrize("key", KEYS_OF_PATHS)
@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("~/secret.jsonl", "is outside of the folders"),
        ("~root/secret.jsonl", "is outside of the folders"),
        *((path, "is outside of the folders") for path in ("/etc", "..", "linked", "link.jsonl")),
        ("~/../secret.jsonl", "is outside of the folders"),
        ("linked/secret.jsonl", "is outside of the folders"),
        ("data/../../secret.jsonl", "is outside of the folders"),
        ("data/x\n/etc/passwd", "control character"),
        ("data/x\u2028", "control character"),
        (".cache/huggingface/token", "is hidden"),
        ("data/.git/config", "is hidden"),
    ],
)
def test_no_key_leads_outside_by_any_spelling(home, monkeypatch, key, path, problem) -> None:
    (home.parent / "somebody").mkdir()
    (home / "~").mkdir()  # what is no home folder to who does not expand it
    monkeypatch.setenv("HOME", str(home.parent / "somebody"))
    with pytest.raises(ConfigError, match=problem) as refused:
        with_allowed_paths(parameters(key, path))
    assert "\n" not in str(refused.value)


def test_what_is_checked_is_what_is_opened(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "real").mkdir()
    (home / "inside").symlink_to("real")
    (home / "~").mkdir()
    (home / "~" / "suite.jsonl").touch()
    for key in KEYS_OF_PATHS:
        (path,) = [p for p in paths_of(with_allowed_paths(parameters(key, "inside/../inside/x")))]
        assert path == "real/x"
    monkeypatch.setenv("HOME", str(home))
    assert require_allowed("~/data", "data") == Path("data")
    monkeypatch.setenv("HOME", "/nowhere")
    # A folder that is called ~ is opened as such, also by who would expand it once more.
    assert require_allowed("./~/suite.jsonl", "file") == home / "~" / "suite.jsonl"


def paths_of(config: FineTuneConfig) -> list[str]:
    """The one path that `parameters` has given."""
    values = config.model_dump()
    gate, hub_datasets = values["gate"], values["hf_dataset"]
    found = [values["model"], values["data"], values["resume_adapter_file"], values["adapter_path"]]
    found += [values["run_dir"], values["training"]["hostfile"], gate["held_out"]]
    found += [gate["general_data"], values["registry"]["path"]]
    found += [task["file"] for task in gate["tasks"]] + [each["path"] for each in hub_datasets]
    return [path for path in found if path not in (None, "owner/model", "data", "auto")]


@pytest.mark.parametrize("key", ["data", "hf_dataset"])
def test_a_file_of_a_data_set_that_leads_outside_is_refused(home: Path, key: str) -> None:
    (home / "data" / "train.jsonl").unlink()
    (home / "data" / "train.jsonl").symlink_to(home.parent / "secret.jsonl")
    with pytest.raises(ConfigError, match=r"data/train\.jsonl is outside of the folders"):
        with_allowed_paths(parameters(key, "data"))


@pytest.mark.parametrize("loader", ["pandas", "webdataset", "imagefolder", "pandas/", "./eval"])
def test_a_loader_that_reads_more_than_data_is_refused(home, loader, monkeypatch) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match="is a loader of `datasets`"):
        with_allowed_paths(hub(loader, data_files="data/train.jsonl"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"trust_remote_code": True},
        {"cache_dir": "registry"},
        {"token": True},
        {"storage_options": {"proxy": "http://x"}},
        {"con": "sqlite:////etc/x.db", "sql": "select 1"},
    ],
)
def test_arguments_that_name_code_credentials_or_folders_to_write_in_are_refused(
    home: Path, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"config\.\w+: a flow takes name, revision, data_dir, "):
        with_allowed_paths(hub("json", **arguments))


def test_a_models_code_runs_only_where_the_worker_lists_the_model(home, monkeypatch) -> None:
    (home / "model").mkdir()
    (home / "other").mkdir()
    trusting = [config(model=name, trust_remote_code=True) for name in ("model", "other", "a/b")]
    for each in trusting:
        with pytest.raises(ConfigError, match="NESTED_TUNE_TRUSTED_MODELS .* does not list"):
            with_trusted_code(each)
    monkeypatch.setenv("NESTED_TUNE_TRUSTED_MODELS", f"{home / 'model'}:a/b:c/d@main")
    assert with_trusted_code(trusting[0]) == trusting[0]
    for each in trusting[1:]:  # of the hub only with a revision
        with pytest.raises(ConfigError, match="does not list"):
            with_trusted_code(each)
    monkeypatch.delenv("PREFECT__RUNTIME__DEPLOYMENT__ID")
    assert with_trusted_code(trusting[2]) == trusting[2]


def test_of_a_trusted_model_of_the_hub_the_listed_revision_is_loaded(
    home: Path, monkeypatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(model: str, revision: str | None = None) -> Path:
        asked.append((model, revision))
        return home / "snapshot"

    monkeypatch.setattr("mlx_lm.utils._download", download)
    monkeypatch.setenv("NESTED_TUNE_TRUSTED_MODELS", "c/d@0123abc")
    trusted = with_trusted_code(config(model="c/d", trust_remote_code=True))
    assert trusted.model == str(home / "snapshot")
    assert asked == [("c/d", "0123abc")]


def test_a_deployments_run_begins_a_name_only_in_the_registries_that_the_worker_lists(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = parameters("registry.path", "registry").registry
    with pytest.raises(ConfigError, match="NESTED_TUNE_REGISTRIES .* does not list"):
        require_known_name(section)
    monkeypatch.setenv("NESTED_TUNE_REGISTRIES", "elsewhere:registry")
    require_known_name(section)
    monkeypatch.setenv("NESTED_TUNE_REGISTRIES", "elsewhere")
    with pytest.raises(ConfigError, match="`nested-tune deploy -c CONFIG` begins the name"):
        require_known_name(section)
    (home / "registry" / "x" / "versions").mkdir(parents=True)
    require_known_name(section)


def test_a_flow_goes_back_to_no_version_that_was_never_champion(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    former, champion, waiting = (
        register(write_run(tmp_path / f"run-{seed}", seed), registry, "capitals", {})
        for seed in (1, 2, 3)
    )
    for version in (former, champion):
        promote(registry, "capitals", version, by="ann")
    for version in (waiting, waiting[:12], ""):
        with pytest.raises(ConfigError, match=r"was never champion of capitals|is not a version"):
            roll_back.fn(registry, "capitals", version, "ann")
    assert read_champion(registry, "capitals") == champion


def test_reconcile_takes_names_and_no_paths() -> None:
    with pytest.raises(ValidationError, match="names"):
        ReconcileParameters(registry="registry", names=("../../etc",))
