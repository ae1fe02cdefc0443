"""import-peft and export-peft as a person runs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nested_core.storage.adapter import read_adapter
from tests.example import MODEL
from tests.flows.conftest import CommandRun, Ended
from tests.rooms.peft.make_golden import GOLDEN

Run = Callable[..., Ended]


def test_a_run_goes_to_peft_and_back_and_the_gate_judges_it_the_same(
    command_run: CommandRun, nested_tune: Run, tmp_path: Path
) -> None:
    for side in ("initial", "adapter"):
        source = command_run.run_dir / side
        assert nested_tune("export-peft", source, "--out", f"peft/{side}").code == 0
        done = nested_tune("import-peft", f"peft/{side}", "--out", side, "--model", MODEL)
        assert (done.code, done.stderr) == (0, "")
        assert done.stdout == f"{side}: 84 tensors of 42 modules, rank 8, scale 2\n"
        assert read_adapter(tmp_path / side).tensors == read_adapter(source).tensors
    verdict = nested_tune("verify", "initial", "adapter", "--json")
    assert (verdict.code, verdict.document["verdict"]) == (0, "passed")


def test_a_run_directory_stands_for_the_adapter_that_it_offers(
    command_run: CommandRun, nested_tune: Run, tmp_path: Path
) -> None:
    done = nested_tune("export-peft", command_run.run_dir, "--out", "peft", "--model", "org/base")
    assert done.code == 0
    assert done.stdout == "peft: 84 tensors of 42 modules, r 8, alpha 16\n"
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == "org/base"
    assert len(config["target_modules"]) == 42


def test_the_champion_is_exported_through_its_link(command_run, nested_tune, tmp_path) -> None:
    target = ("--registry", "registry", "--name", "geo")
    assert nested_tune("promote", command_run.run_dir, *target).code == 0
    champion = tmp_path / "registry" / "geo" / "champion"
    done = nested_tune("export-peft", champion, "--out", "peft", "--json")
    assert (done.code, done.document["tensors"]) == (0, 84)
    weights = champion / "adapters.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    done = nested_tune("export-peft", champion, "--out", "other")
    assert done.code == 6
    assert "adapters.safetensors has changed since it was written" in done.message()
    assert not (tmp_path / "other").exists()


def test_with_json_there_is_one_document_and_notes_go_to_standard_error(nested_tune: Run) -> None:
    folder = GOLDEN / "rslora_some_layers_bfloat16"
    done = nested_tune("import-peft", folder, "--out", "out", "--model", MODEL, "--json")
    assert done.code == 0
    document = done.document
    assert (document["out"], document["modules"], document["tensors"]) == ("out", 6, 12)
    assert document["config"]["lora_parameters"]["scale"] == 12 / 8**0.5
    (note,) = document["notes"]
    assert note.startswith("keys hold full names")
    assert done.stderr == f"note: {note}\n"


def with_biases(config: Path) -> None:
    values = json.loads(config.read_bytes())
    config.write_text(json.dumps(values | {"bias": "all"}))


def cut_short(config: Path) -> None:
    weights = config.with_name("adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (with_biases, 2, "bias: 'all'"),
        (cut_short, 6, "adapter_model.safetensors is not a sound safetensors file"),
    ],
)
def test_what_cannot_be_converted_is_2_and_what_is_damaged_6(
    damage: Callable[[Path], None], code: int, message: str, nested_tune: Run, tmp_path: Path
) -> None:
    shutil.copytree(GOLDEN / "lora", tmp_path / "peft")
    damage(tmp_path / "peft" / "adapter_config.json")
    done = nested_tune("import-peft", "peft", "--out", "out", "--model", MODEL, "--json")
    assert done.code == code
    assert message in done.message()
    assert not (tmp_path / "out").exists()


def test_the_base_has_to_be_named(nested_tune: Run) -> None:
    done = nested_tune("import-peft", GOLDEN / "lora", "--out", "out")
    assert done.code == 2
    assert "the following arguments are required: --model" in done.message()
