"""An address, SCHEME://, is refused wherever a path enters; nothing is written under its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.cli import NO_PATHS, build_parser, main
from flows.commands.help_pages import is_key_flag
from flows.finetune import FinetuneParameters
from flows.promote import PromoteParameters
from flows.reconcile import ReconcileParameters
from flows.rollback import RollbackParameters
from nested_core import seams
from nested_core.config.key_properties import iterate_keys
from nested_core.config.loading import load_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError
from nested_core.storage.addresses import require_no_address
from nested_core.storage.run_directory import open_run

ADDRESSES = ("s3://bucket/x", "gs://bucket/x", "hf://datasets/a/b", "file:///etc/x", "HTTPS://a/b")
GIVEN = {"model": "owner/model", "data": "data"}
PATH_KEYS = [
    key.name
    for key in iterate_keys(FineTuneConfig)
    if isinstance(key.field.json_schema_extra, dict) and "path" in key.field.json_schema_extra
]
TEXTS = {
    ("chat", "prompt"),
    ("chat", "system"),
    ("deploy", "notify"),
    ("export", "push"),
    ("export-mlflow", "tracking_uri"),
    ("forget", "by"),
    ("forget", "reason"),
    ("init", "completion_feature"),
    ("init", "completion_features"),
    ("init", "drop_fields"),
    ("init", "group"),
    ("init", "prompt_feature"),
    ("init", "system"),
    ("init", "template"),
    ("registry", "to"),
    ("rollback", "by"),
    ("rollback", "reason"),
    ("serve", "allowed_origins"),
    ("serve", "chat_template"),
    ("serve", "host"),
}
TAKEN_OF_BUCKETS = {"data", "registry.mirror"}
REFUSED = "is an address, where nothing is read or"
REFUSAL = {"registry.mirror": "is no address of object storage"}
IN_LISTS = {"hf_dataset.path", "gate.tasks.file"}


def nest(name: str, value: str) -> dict[str, Any]:
    """The values of a configuration that has one key, of a list of sections for some."""
    section, _, key = name.rpartition(".")
    if not section:
        return GIVEN | {key: [value] if key == "held_out" else value}
    inner: Any = {key: value}
    if name == "registry.mirror":
        inner |= {"path": "registry", "name": "a"}
    if name in IN_LISTS:
        inner = [inner | ({"name": "a", "score": "exact"} if section == "gate.tasks" else {})]
    for outer in reversed(section.split(".")):
        inner = {outer: inner}
    return {**GIVEN, **inner}


def test_every_key_that_is_a_path_refuses_an_address(tmp_path: Path) -> None:
    assert len(PATH_KEYS) > 10
    for name in PATH_KEYS:
        for address in ADDRESSES:
            for value in (address, [address]):
                if name in TAKEN_OF_BUCKETS and address.startswith(("s3:", "gs:")):
                    continue
                with pytest.raises(ValueError, match=REFUSAL.get(name, REFUSED)):
                    FineTuneConfig.model_validate(nest(name, value))  # type: ignore[arg-type]
        if "." not in name and name not in IN_LISTS and name not in TAKEN_OF_BUCKETS:
            flag = f"{name}: s3://bucket/x is an address.*[(]--{name.replace('_', '-')}[)]"
            with pytest.raises(ConfigError, match=flag):
                load_config(None, GIVEN | {name: ADDRESSES[0]})


def test_what_reads_addresses_by_design_still_takes_them() -> None:
    mirror = {"path": "registry", "name": "a", "mirror": "s3://bucket/prefix"}
    given = GIVEN | {"data": "s3://bucket/rows/train.parquet", "registry": mirror}
    config = FineTuneConfig.model_validate(given)
    assert config.data == "s3://bucket/rows/train.parquet"
    assert config.registry.mirror == "s3://bucket/prefix"
    files = {"path": "json", "config": {"data_files": "https://data.example/train.jsonl"}}
    assert FineTuneConfig.model_validate(GIVEN | {"hf_dataset": files}).hf_dataset


@pytest.mark.parametrize(
    "address", ["s3://key:secret@bucket/x", "s3://key:secret/x", "s3://bucket/x?token=secret"]
)
def test_an_address_of_object_storage_has_no_credentials(address: str) -> None:
    with pytest.raises(ValueError, match="without credentials") as error:
        FineTuneConfig.model_validate(GIVEN | {"data": address})
    with pytest.raises(ConfigError, match="without credentials") as refused:
        load_config(None, GIVEN | {"data": address})
    assert "secret" not in str(refused.value)
    assert "s3://..." in str(error.value)


@pytest.mark.parametrize("address", ["S3://key:secret@bucket", "https://a/b?signature=secret"])
def test_a_refused_address_is_not_shown_with_its_credentials(address: str) -> None:
    with pytest.raises(ConfigError, match="is an address, where nothing is read") as error:
        load_config(None, GIVEN | {"data": address})
    assert "secret" not in str(error.value)


def test_a_registry_in_a_bucket_is_not_to_be_fetched_by_curl() -> None:
    with pytest.raises(ValueError, match="read a registry there by --registry") as error:
        require_no_address("s3://bucket/registry/capitals", ValueError)
    assert "curl" not in str(error.value)


@pytest.mark.parametrize("path", ["rows/../other", "rows/..", "./rows", "rows/./x", "rows/../"])
def test_an_address_does_not_lead_upwards(path: str) -> None:
    """Else an address below one that a worker lists would be an address outside of it."""
    with pytest.raises(ValueError, match=r"no part of it \. or \.\."):
        FineTuneConfig.model_validate(GIVEN | {"data": f"s3://bucket/{path}"})


def test_dots_in_the_names_of_an_address_are_taken() -> None:
    for address in ("s3://bucket.example/..rows/v1..2/.x/x.", "gs://a/b/"):
        assert FineTuneConfig.model_validate(GIVEN | {"data": address}).data == address


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_flow_takes_an_address(address: str) -> None:
    name = {"registry": address, "name": "a"}
    for parameters, values in (
        (FinetuneParameters, GIVEN | {"run_dir": address}),
        (PromoteParameters, name | {"version": "0" * 64}),
        (RollbackParameters, name | {"by": "ann"}),
        (ReconcileParameters, {"registry": address}),
    ):
        with pytest.raises(ValueError, match="is an address, where nothing is read or written"):
            parameters.model_validate(values)


def test_no_argument_takes_an_address_but_texts_and_urls() -> None:
    """Each argument of each command, as argparse has it; a new one has to be a path or a text."""
    taking, there, reading = set(), set(), set()
    for command, parser in build_parser().commands.items():
        for action in parser._actions:
            there.add((command, action.dest))
            if action.nargs == 0 or action.choices is not None or is_key_flag(action):
                continue  # a key has its own check, see above
            if action.metavar in NO_PATHS:
                taking.add((command, action.dest))
                continue
            if action.dest == "registry" and seams.may_read_copy(command):
                reading.add(command)
                continue
            with pytest.raises(Exception, match="is an address, where nothing is read or written"):
                parser._get_value(action, ADDRESSES[0])  # argparse offers no other way
    assert reading == {"audit", "chat", "evaluate", "history", "serve"} & {c for c, _ in there}
    assert taking == TEXTS & there  # without those of rooms that are deleted


def test_promote_says_that_an_address_is_no_registry_and_makes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["promote", "run", *["--name", "x", "--registry", "s3://bucket/registry"]]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "argument --registry: s3://bucket/registry is an address" in said
    assert "mount the storage" in said
    assert main(["train", *["--model", "a/b", "--data", "c", "--run-dir", "s3://bucket/run"]]) == 2
    assert main(["init", *["--model", "a/b", "--data", "c", "-o", "s3://bucket/c.yaml"]]) == 2
    assert list(tmp_path.iterdir()) == []


def test_no_run_of_the_library_is_an_address(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="s3://bucket/run is an address"):
        open_run("s3://bucket/run")
    assert not list(tmp_path.iterdir())
