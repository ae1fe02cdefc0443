"""export as a person runs it: what it prints, its exit codes, and a base that has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flows.conftest import CommandRun, Ended
from tests.left_out import needs_rooms

Run = Callable[..., Ended]


@pytest.mark.slow("exports a whole model")
def test_a_run_becomes_a_folder_with_its_record(command_run, nested_tune, tmp_path) -> None:
    done = nested_tune("export", command_run.run_dir, "--fused", "fused", "--json")
    assert done.code == 0
    document = done.document
    assert document["verdict"] == "stands"
    written = json.loads((tmp_path / "fused" / "export.json").read_bytes())
    assert written.pop("trained_on")  # for `evaluate`; too long to be printed
    assert {key: document[key] for key in written} == written
    assert "trained_on" not in document
    assert document["gain"]["file"] == "valid.jsonl"
    assert document["summary"].startswith("kept 100 % of the gain: loss ")
    assert document["packages"]["mlx-lm"] == "0.32.2"


@needs_rooms("peft")
def test_peft_is_what_export_peft_writes(command_run, nested_tune, tmp_path) -> None:
    first = nested_tune("export", command_run.run_dir, "--peft", "one")
    second = nested_tune("export-peft", command_run.run_dir, "--out", "two")
    assert first.stdout == second.stdout.replace("two:", "one:")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("key", "what"), [("chat_template", "chat template"), ("vocabulary", "tokenizer")]
)
def test_another_tokenizer_than_that_of_the_training_is_refused(
    command_run: CommandRun, nested_tune: Run, tmp_path: Path, key: str, what: str
) -> None:
    run = shutil.copytree(command_run.run_dir, tmp_path / "run")
    recorded = json.loads((run / "dataset.json").read_bytes())
    assert len(recorded[key]) == 64
    recorded[key] = "0" * 64
    (run / "dataset.json").write_text(json.dumps(recorded))
    done = nested_tune("export", "run", "--gguf", "model.gguf")
    assert done.code == 2
    assert f"run was trained with another {what} than" in done.message()
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "one of the arguments --fused --gguf --gguf-adapter --peft --push is required"),
        (("--fused", "a", "--gguf", "b"), "not allowed with argument"),
        (("--fused", "a", "--quantize", "q8_0"), "--quantize q8_0 is of a GGUF, not of --fused"),
        (("--gguf", "model.gguf", "--quantize", "q4_0"), "invalid choice: 'q4_0'"),
        (("--push", "user/name", "--for", "ollama"), "--for and --base-gguf are of a GGUF"),
    ],
)
def test_one_place_and_a_format_that_is_known(words, said, nested_tune) -> None:
    done = nested_tune("export", "run", *words)
    assert done.code == 2
    assert said in done.message()
