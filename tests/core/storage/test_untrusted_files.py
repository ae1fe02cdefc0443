"""Files of unknown origin: hashed in pieces, and refused where they are no plain files."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from nested_core.errors import DamagedError
from nested_core.records.plan import TrainingPlan, read_plan, write_plan
from nested_core.storage.untrusted_files import (
    append_regular,
    open_regular,
    parse_json,
    read_regular,
    read_start,
    regular_sha256,
)

MIB = 1024 * 1024


@pytest.mark.slow("writes and hashes a large file")
def test_a_large_file_is_hashed_without_being_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(256 * MIB)
    tracemalloc.start()
    try:
        digest = regular_sha256(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert digest == hashlib.sha256(bytes(256 * MIB)).hexdigest()
    assert peak < 2 * MIB


def test_what_is_no_regular_file_is_not_hashed(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(DamagedError, match="is not a file"):
            regular_sha256(path)
    with pytest.raises(DamagedError, match="is missing"):
        regular_sha256(tmp_path / "nothing")


def test_a_link_is_followed_only_where_a_person_named_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", follow_links=True) == b"content"
    with pytest.raises(DamagedError, match="link is not a file: it is a symbolic link"):
        read_regular(tmp_path / "link")
    with pytest.raises(DamagedError, match="link is not a file: it is a symbolic link"):
        append_regular(tmp_path / "link", b"more")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("target", ["pipe", "folder", "/dev/zero", "nowhere", "socket"])
@pytest.mark.parametrize("is_link", [False, True])
def test_what_is_no_file_is_neither_read_nor_appended_to_and_nobody_waits(
    tmp_path: Path, target: str, is_link: bool
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket"))
        path = tmp_path / target
        if is_link:
            path = tmp_path / "link"
            path.symlink_to(tmp_path / target)
        with pytest.raises(DamagedError, match=f"^{path} "):
            read_regular(path, follow_links=True)
        if path != tmp_path / "nowhere" and path != Path("/dev/zero"):
            with pytest.raises(DamagedError, match=f"^{path} "):
                append_regular(path, b"line\n")
    assert not (tmp_path / "nowhere").exists()


def test_a_file_of_another_user_that_may_not_be_read_is_no_damage(tmp_path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "file")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError):
        read_regular(tmp_path / "file")


def test_a_file_is_read_whole_and_never_more_than_its_bound(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(DamagedError, match="is larger than 4 bytes"):
        read_regular(tmp_path / "file", 4)


def test_a_file_that_becomes_shorter_while_it_is_read_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    with open_regular(path) as (file, size):
        os.truncate(path, 10)
        with pytest.raises(DamagedError, match="became shorter while it was read"):
            read_start(file, size, path)


def test_a_duplicate_key_anywhere_is_named() -> None:
    for text in (b'{"a": 1, "a": 1}', b'[{"b": {"x": 0, "a": {}, "a": 2}}]'):
        with pytest.raises(ValueError, match="the key 'a' appears twice"):
            parse_json(text)


@pytest.mark.parametrize("number", ["1e400", "-1e999", "1" + "0" * 400, "-" + "9" * 5000])
def test_a_number_that_no_float_holds_is_refused_anywhere(number: str) -> None:
    with pytest.raises(ValueError, match="is beyond any float"):
        parse_json(f'{{"a": [{{"b": {number}}}]}}'.encode())
    assert parse_json(b"[1000000000000000019884624838656, -3]") == [10**30 + 19884624838656, -3]


def test_a_plan_with_such_a_number_is_none(tmp_path: Path) -> None:
    plan = TrainingPlan(
        steps=10,
        iterations=10,
        epochs=1.0,
        first_step=0,
        frequencies=(1,),
        offers_best=False,
        training_file="train.jsonl",
        validation_file=None,
        validation_examples=0,
        memory_forecast_gb=1.0,
        memory_limit_gb=2.0,
    )
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan
    write_plan(tmp_path / "plan.json", replace(plan, steps=10**400))
    assert read_plan(tmp_path / "plan.json") is None
