"""Wrong command lines and configurations: exit 2, one short paragraph, nothing written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows import cli
from nested_core import seams
from nested_core.seams import Room, is_there
from tests.example import DATA, write_config
from tests.flows.conftest import PROGRAM, Ended, called

Run = Callable[..., Ended]
ROOT = Path(__file__).resolve().parents[2]


def test_version_is_printed_on_standard_output(nested_tune: Run) -> None:
    done = nested_tune("--version")
    assert (done.code, done.stdout) == (0, f"nested-tune {version('nested-tune')}\n")
    assert done.stderr == ""


WRONG: dict[str, tuple[list[str], str]] = {
    "no model": (["train", "--data", "d"], "No model given on the command line."),
    "no data": (["validate", "--model", "m"], "No data given on the command line."),
    "neither": (["run"], "No model and no data given on the command line."),
    "unknown command": (["trane"], "there is no command trane; did you mean train?"),
    "no command at all like it": (["xyzzy"], "there is no command xyzzy. `nested-tune --help`"),
    "a flag with an underscore": (
        ["train", "--learning_rate", "1e-4"],
        "unrecognized arguments: --learning_rate 1e-4. Did you mean --learning-rate? See:",
    ),
    "a file without its flag": (["train", "config.yaml"], "Did you mean -c config.yaml? See:"),
    "a folder without its flag": (["validate", "."], "Did you mean --data .? See:"),
    "data for a configuration": (
        ["train", "-c", "train.jsonl"],
        "train.jsonl is a file of data by its name, where YAML is expected",
    ),
    "a path into no registry": (["history", "a/b"], "a/b is no name in a registry"),
    "unknown flag": (
        ["train", "--quickly"],
        "unrecognized arguments: --quickly. See: `nested-tune train --help`",
    ),
    "a flag like none": (
        ["train", "--fused"],
        "unrecognized arguments: --fused. See: `nested-tune train --help`",
    ),
    "a key without its section": (
        ["train", "--epochs", "3"],
        "unrecognized arguments: --epochs 3. Did you mean --training.epochs? See:",
    ),
    "another trainer's name": (["train", "--lr", "1e-4"], "Did you mean --learning-rate? See:"),
    "no number": (["train", "--iters", "many"], "invalid int value: 'many'"),
    "missing config": (["train", "-c", "none.yaml"], "none.yaml: No such file"),
    "resume nothing": (["train", "-c", "config.yaml", "--resume"], "--resume needs the --run-dir"),
    "empty run": (
        ["train", "-c", "config.yaml", "--resume", "--run-dir", "new"],
        "new holds nothing to resume",
    ),
    "no run": (["status", "none"], "none is not a run directory"),
    "no run to stop": (["stop", "none"], "none is not a run directory"),
    "no adapter": (["verify", "none", "none"], "none is not a directory"),
    "no name": (["promote", "run"], "one of the arguments NAME --name is required"),
    "two names": (["history", "a", "--name", "b"], "--name: not allowed with argument NAME"),
    "no such registry": (["history", "a"], "There is no registry at registry."),
    "a name with a path": (
        ["promote", "run", "--name=../a", "--registry", "registry"],
        "'../a' is not a name for an adapter",
    ),
    "a device's name": (
        ["promote", "run", "--name", "con", "--registry", "registry"],
        "takes con, nul, com1 and the like for devices",
    ),
}
if not is_there("other_trainers"):
    del WRONG["another trainer's name"]


CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "two problems": (
        {"iters": 0, "batch_size": "many"},
        ["iters: Input should be greater than 0", "batch_size: Input should be a valid integer"],
    ),
    "many problems": ({f"key_{n}": n for n in range(30)}, ["key_0: unknown key", "and 20 more"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wrong")


@pytest.fixture(scope="module")
def wrong(folder: Path) -> dict[str, Ended]:
    """Every wrong command line, run in a folder of its own with a sound configuration."""
    for case in WRONG:
        (folder / case).mkdir()
        write_config(folder / case / "config.yaml")
    return {case: called(*arguments, cwd=folder / case) for case, (arguments, _) in WRONG.items()}


@pytest.fixture(scope="module")
def misconfigured(folder: Path) -> dict[str, Ended]:
    """`validate` with every wrong configuration."""
    outcomes = {}
    for case, (changes, _) in CONFIGS.items():
        (folder / case).mkdir()
        write_config(folder / case / "config.yaml", **changes)
        validate = ("validate", "-c", "config.yaml", "--no-tokenize")
        outcomes[case] = called(*validate, cwd=folder / case)
    return outcomes


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_line_is_one_paragraph_and_exit_2(wrong, folder, case) -> None:
    assert wrong[case].code == 2
    assert WRONG[case][1] in wrong[case].message()
    assert [path.name for path in (folder / case).iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("case", CONFIGS)
def test_a_wrong_configuration_names_every_key(misconfigured: dict[str, Ended], case: str) -> None:
    assert misconfigured[case].code == 2
    assert all(words in misconfigured[case].message() for words in CONFIGS[case][1])


def test_a_command_of_a_room_that_was_deleted_names_the_room(monkeypatch, capsys) -> None:
    monkeypatch.setattr(seams, "read_rooms", lambda: {"music": Room(commands=["play"])})
    assert cli.main(["play"]) == 2
    said = "`play` belongs to the room music, which is not installed here."
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert "\nServe:" not in cli.build_parser().format_help()


def test_a_flag_of_a_room_that_was_deleted_names_the_room(tmp_path, monkeypatch) -> None:
    room = Room(flags={"runs": ["--tune"]})
    monkeypatch.setattr(seams, "read_rooms", lambda: {"music": room})
    done = called("runs", "--tune", "louder", cwd=tmp_path)
    said = "`runs --tune` belongs to the room music, which is not installed here."
    assert (done.code, done.message().strip()) == (2, f"nested-tune: {said}")


def test_without_a_command_the_help_says_where_to_start(nested_tune: Run) -> None:
    done = nested_tune()
    assert done.code == 2
    assert "Start with `nested-tune demo`" in done.stderr
    assert "promote" in done.stderr


def test_a_path_that_only_exists_beside_the_file_is_named(folder: Path) -> None:
    (folder / "beside" / "examples").mkdir(parents=True)
    write_config(folder / "beside" / "lora.yaml", data="examples")
    done = called("validate", "-c", "beside/lora.yaml", "--no-tokenize", cwd=folder)
    assert done.code == 2
    there = folder / "beside" / "examples"
    assert f"data: {folder / 'examples'} does not exist, but {there} does" in done.message()


def test_a_traceback_is_shown_with_debug_alone(nested_tune: Run) -> None:
    done = nested_tune("verify", "none", "none", "--debug")
    assert done.code == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert "nested-tune: none is not a directory" in done.stderr


def test_with_standard_output_closed_a_command_ends_as_with_dev_null(tmp_path: Path) -> None:
    for output in ("/dev/null", "&-"):
        command = f'"$0" runs "$1" >{output}'
        done = subprocess.run(
            ["sh", "-c", command, PROGRAM, tmp_path], stderr=subprocess.PIPE, text=True
        )
        assert (done.returncode, done.stderr) == (0, ""), output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here is always full")
def test_a_result_that_cannot_be_printed_is_not_told_as_work_that_was_not_done(tmp_path) -> None:
    words = (PROGRAM, "runs", tmp_path, "--json")
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert "cannot be printed (No space left on device), but the command has done its work" in last


def test_what_takes_long_to_import_waits_until_ctrl_c_is_heard() -> None:
    program = "import sys, flows.cli; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_a_mistake_in_a_configuration_is_told_before_mlx_or_prefect_is_imported(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("modle: x\n")
    program = """
import sys
from flows.cli import main
commands = ("train", "run", "validate")
codes = [main([command, "-c", "config.yaml"]) for command in commands]
print(codes, {"mlx", "mlx_lm", "transformers", "prefect", "polars", "numpy"} & set(sys.modules))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[2, 2, 2] set()\n"
    assert done.stderr.count("did you mean model? (line 1)") == 3


def test_a_prefect_server_that_does_not_answer_is_one_paragraph(tmp_path, monkeypatch) -> None:
    write_config(tmp_path / "config.yaml")
    nowhere = "http://127.0.0.1:9/api"
    monkeypatch.setenv("PREFECT_API_URL", nowhere)
    with temporary_settings({PREFECT_API_URL: nowhere, PREFECT_CLIENT_MAX_RETRIES: 0}):
        done = called("run", "-c", "config.yaml", cwd=tmp_path)
    assert done.code == 1
    assert "server at http://127.0.0.1:9/api/ does not answer" in done.message()
    assert not (tmp_path / "runs").exists()


def test_the_warnings_about_a_data_set_are_said_before_training(nested_tune, tmp_path) -> None:
    (tmp_path / "data").mkdir()
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "data" / "train.jsonl").write_text("".join([*lines[:9], lines[0]]))
    write_config(tmp_path / "config.yaml", data="data", num_layers=99)
    done = nested_tune("train", "-c", "config.yaml", "--run-dir", "run")
    assert done.code == 2
    said = (
        "data: 2 warnings (duplicate 1, no-validation-set 1), explained by `nested-tune validate`"
    )
    assert said in done.stderr.splitlines()
