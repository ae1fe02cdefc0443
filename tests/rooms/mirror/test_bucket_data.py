"""Data sets in object storage: fetched once, by entity tag; changed, cut off, forbidden."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import polars
import pytest

from flows.cli import main
from nested_core.data.data_settings import DataSettings
from nested_core.data.held_out_rows import read_held_out_prompts
from nested_core.data.sources.split_files import open_splits
from nested_core.errors import ConfigError
from nested_core.rooms.mirror import bucket_data
from nested_core.rooms.mirror.object_storage import ObjectStorage, StorageError, StoredObject
from tests.example import DATA, MODEL
from tests.rooms.mirror.s3_server import FaultyProxy, with_users
from tests.waiting import wait_until


def put_example(address: str) -> ObjectStorage:
    """Put the rows of the example: train as parquet, valid as JSON Lines, test as CSV."""
    storage = ObjectStorage(address)
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()]
    pairs = [[turn["content"] for turn in row["messages"]] for row in rows]
    table = polars.DataFrame(
        {"prompt": [pair[0] for pair in pairs], "completion": [pair[1] for pair in pairs]}
    )
    parquet = Path(os.environ["NESTED_TUNE_CACHE"] + ".parquet")
    table.write_parquet(parquet)
    storage.put("train.parquet", parquet)
    storage.put("valid.jsonl", DATA / "valid.jsonl")
    storage.put(
        "test.csv", b"prompt,completion\n" + b"".join(b"%d,%d\n" % (n, n) for n in range(5))
    )
    storage.put("notes.txt", b"no data")
    storage.put("older/train.jsonl", b"{}\n")
    return storage


def lines_of(address: str, tmp_path: Path) -> dict[str, list[str]]:
    spool = tmp_path / "spool"
    shutil.rmtree(spool, ignore_errors=True)
    spool.mkdir()
    splits = open_splits(DataSettings(address), spool)
    return {split: file.path.read_text().splitlines() for split, file in splits.items()}


def test_a_folder_is_read_as_the_local_one(address, tmp_path, capfd) -> None:
    storage = put_example(address)
    assert {s: len(lines) for s, lines in lines_of(address, tmp_path).items()} == {
        "train": 40,
        "valid": 10,
        "test": 5,
    }
    command = ["validate", "--model", str(MODEL), "--data", address, "--json"]
    assert main(command) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["folder"] == address
    assert report["splits"]["train"]["tags"] == {"train.parquet": storage.find("train.parquet").tag}
    assert [*report["splits"]["valid"]["tags"]] == ["valid.jsonl"]
    assert len(read_held_out_prompts(DataSettings(address), 3)) == 3


def test_a_truncated_entry_of_the_cache_is_fetched_again(address, tmp_path) -> None:
    put_example(address)
    before = lines_of(address, tmp_path)
    (entry,) = {
        path.resolve() for path in (tmp_path / "cache" / "bucket-data").rglob("valid.jsonl")
    }
    entry.write_bytes(entry.read_bytes()[:-10])
    assert lines_of(address, tmp_path) == before


@with_users
def test_a_bucket_may_be_named_as_a_file_is(author, tmp_path) -> None:
    ObjectStorage("s3://data.json").put("train.jsonl", DATA / "train.jsonl")
    assert len(lines_of("s3://data.json", tmp_path)["train"]) == 40


def test_what_is_there_by_its_tag_is_not_fetched_again(address, tmp_path, monkeypatch) -> None:
    storage = put_example(address)
    before = lines_of(address, tmp_path)
    fetched: list[str] = []
    fetch = ObjectStorage.fetch

    def note(self, key, target, **more):
        fetched.append(key)
        return fetch(self, key, target, **more)

    monkeypatch.setattr(ObjectStorage, "fetch", note)
    assert lines_of(address, tmp_path) == before
    assert fetched == []
    storage.put("valid.jsonl", (DATA / "valid.jsonl").read_bytes() * 2)
    assert len(lines_of(address, tmp_path)["valid"]) == 20
    assert fetched == ["valid.jsonl"]


def test_one_file_is_trained_on_alone(address, tmp_path) -> None:
    put_example(address)
    assert {*lines_of(f"{address}/train.parquet", tmp_path)} == {"train"}
    with pytest.raises(ConfigError, match=r"^data: .*nothing.jsonl.: it is not there"):
        lines_of(f"{address}/nothing.jsonl", tmp_path)
    with pytest.raises(ConfigError, match="has no file of data. Expected train.jsonl"):
        lines_of(f"{address}/nowhere", tmp_path)


def test_two_files_of_a_split_are_named_at_their_address(address, tmp_path) -> None:
    put_example(address).put("Valid.jsonl", DATA / "valid.jsonl")
    with pytest.raises(ConfigError, match=rf"^data: {address} holds Valid.jsonl and valid.jsonl"):
        lines_of(address, tmp_path)


def test_data_that_changes_while_it_is_fetched_is_fetched_anew(
    address, tmp_path, monkeypatch
) -> None:
    storage = put_example(address)
    fetch, changes = ObjectStorage.fetch, [2, 3]

    def fetch_late(self, key, target, **more):
        if key == "valid.jsonl" and changes:
            storage.put(key, (DATA / "valid.jsonl").read_bytes() * changes.pop(0))
        return fetch(self, key, target, **more)

    monkeypatch.setattr(ObjectStorage, "fetch", fetch_late)
    assert len(lines_of(address, tmp_path)["valid"]) == 30
    changes += [4, 5, 6]
    storage.put("valid.jsonl", b"")
    with pytest.raises(ConfigError, match="was changed 3 times while it was fetched"):
        lines_of(address, tmp_path)


def test_a_file_that_goes_while_a_folder_is_fetched_is_left_out(
    address, tmp_path, monkeypatch
) -> None:
    storage, listed = put_example(address), ObjectStorage.list_objects

    def list_early(self, prefix, **more):
        monkeypatch.setattr(ObjectStorage, "list_objects", listed)
        yield from [*listed(self, prefix, **more)]
        storage.delete(["test.csv"])

    monkeypatch.setattr(ObjectStorage, "list_objects", list_early)
    assert {*lines_of(address, tmp_path)} == {"train", "valid"}


def test_a_name_that_no_local_file_has_is_refused(address, tmp_path, monkeypatch) -> None:
    put_example(address)
    listed = ObjectStorage.list_objects

    def list_one_more(self, prefix, **more):  # the server of these tests takes no such name itself
        yield from listed(self, prefix, **more)
        yield StoredObject("x" * 250 + ".jsonl", 2, "tag")

    monkeypatch.setattr(ObjectStorage, "list_objects", list_one_more)
    with pytest.raises(ConfigError, match="longer than 255 bytes, as no local file's is: xxx"):
        lines_of(address, tmp_path)


def test_data_that_changes_at_equal_size_is_what_its_tag_says(address, monkeypatch) -> None:
    storage, listed = put_example(address), ObjectStorage.list_objects

    def list_early(self, prefix, **more):
        monkeypatch.setattr(ObjectStorage, "list_objects", listed)
        yield from [*listed(self, prefix, **more)]
        storage.put("test.csv", storage.read("test.csv", 10**6)[0].replace(b"0,0", b"9,9"))

    monkeypatch.setattr(ObjectStorage, "list_objects", list_early)
    fetched = bucket_data.fetch(address)
    assert "9,9" in Path(fetched.path, "test.csv").read_text()
    assert fetched.tags["test.csv"] == storage.find("test.csv").tag


def test_a_cache_of_a_relative_path_is_read_and_may_be_moved(
    address, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NESTED_TUNE_CACHE", "relative")
    put_example(address)
    assert len(lines_of(address, tmp_path)["valid"]) == 10
    Path("relative").rename("moved")
    monkeypatch.setenv("NESTED_TUNE_CACHE", "moved")
    assert len(lines_of(address, tmp_path)["valid"]) == 10


@with_users
def test_data_that_is_cut_off_or_forbidden_leaves_nothing_half(
    address, tmp_path, proxy: FaultyProxy, monkeypatch
) -> None:
    put_example(address)
    proxy.choose = lambda: "cut"
    with pytest.raises(StorageError, match="cannot be"):
        lines_of(address, tmp_path)
    proxy.choose = lambda: "none"
    assert len(lines_of(address, tmp_path)["train"]) == 40
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(StorageError, match="403 Forbidden") as error:
        lines_of(address, tmp_path)
    assert "wrong-secret" not in str(error.value)


def test_a_key_that_the_client_does_not_read_is_named_or_passed_over(
    address, tmp_path, proxy: FaultyProxy
) -> None:
    put_example(address)
    folder = address.removeprefix("s3://bucket/")
    proxy.foreign_key = f"{folder}/notes//x.jsonl"
    assert len(lines_of(address, tmp_path)["train"]) == 40
    proxy.foreign_key = f"{folder}/a\nb.jsonl"
    with pytest.raises(StorageError, match="Rename that object, or remove it") as error:
        lines_of(address, tmp_path)
    assert rf'no key such as "{folder}/a\nb.jsonl", with' in str(error.value)
    assert "credentials" not in str(error.value)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_fetch_that_takes_long_ends_at_a_signal(address, proxy: FaultyProxy, stop) -> None:
    put_example(address)
    proxy.counts.clear()
    proxy.choose = lambda: "endless" if proxy.counts else "none"  # the list comes at once
    command = [sys.executable, "-m", "flows.cli", "validate", "--model", str(MODEL)]
    process = subprocess.Popen(
        [*command, "--data", address],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # nohup ignores it
    )
    try:
        wait_until(lambda: "endless" in proxy.counts, "it fetches")
        time.sleep(3)  # until the first bytes have come
        process.send_signal(stop)
        assert process.wait(20) == 128 + stop
    finally:
        process.kill()


def test_an_endpoint_that_is_no_address_is_named_before_anything_is_opened(
    address, monkeypatch, capfd
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(StorageError, match=r"AWS_ENDPOINT_URL .* is set to what is no http://"):
        ObjectStorage(address)
    assert "panic" not in capfd.readouterr().err


def test_data_beyond_the_disk_or_of_too_many_files_is_refused(
    address, tmp_path, monkeypatch
) -> None:
    put_example(address)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30 + 100))
    with pytest.raises(ConfigError, match="bytes to fetch, and .* bytes free"):
        lines_of(address, tmp_path)
    monkeypatch.setattr(bucket_data, "MAX_FILES", 3)
    with pytest.raises(ConfigError, match="more than 3 objects"):
        lines_of(address, tmp_path)
