"""Adapter directories that mean harm: none is read, none crashes the reader, none makes it wait."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nested_core.errors import ConfigError, DamagedError
from nested_core.storage.adapter import read_adapter
from nested_core.storage.safetensors_files import read_tensors
from tests.builders.file_damage import delete, link_to_a_device, make_directory, make_pipe
from tests.core import hostile
from tests.core.gate.pairs import CONFIG, trained_tensors, write

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow("reads hostile files in processes")
def test_hostile_headers_are_refused_within_a_second_and_100_mb_each(tmp_path: Path) -> None:
    names = hostile.write_all(tmp_path)
    command = [sys.executable, "-m", "tests.core.hostile", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    outcomes = dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))
    assert len(outcomes) >= 50
    for name, outcome in outcomes.items():
        assert "adapters.safetensors is" in outcome["error"], (name, outcome)
        assert outcome["seconds"] < 1, (name, outcome)
        assert outcome["bytes"] < 100e6, (name, outcome)


@pytest.mark.claim(
    "Data, adapters and model folders can run nothing here, but code that your file trusts"
)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("adapters.npz", "NumPy's formats may hold pickles"),
        ("adapter_model.bin", "a pickle runs code"),
        ("adapter.pt", "a pickle runs code"),
        ("adapter.PKL", "a pickle runs code"),
    ],
)
def test_other_formats_are_refused_by_name_with_the_reason(tmp_path, name, reason) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    (tmp_path / "adapter_config.json").write_text("{}")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(DamagedError, match=f"{name} is not read: {reason}") as error:
            read_adapter(path)
        assert error.value.exit_code == 6
    with pytest.raises(DamagedError, match=reason):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "more", "wrong"),
    [
        ("a\x1b[2J", {}, "is not the name of a tensor"),
        ("a" * 2000, {}, "is not the name of a tensor"),
        ("a", {"code": "import os"}, "a has keys that the format does not know|unknown field"),
    ],
)
def test_a_header_of_hostile_names_or_keys_is_damage(tmp_path, name, more, wrong) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": (0, 4)} | more
    header = json.dumps({name: entry}).encode()
    path = tmp_path / "adapters.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(DamagedError, match=wrong):
        read_tensors(path)


def configured(lora: dict[str, Any] | None = None, **changes: Any) -> str:
    parameters = CONFIG["lora_parameters"] | (lora or {})
    return json.dumps(CONFIG | {"lora_parameters": parameters} | changes)


CONFIGURATIONS: dict[str, tuple[str, str]] = {
    "a key twice": ('{"num_layers": 2, "num_layers": 4}', "the key 'num_layers' appears twice"),
    "a key twice, inside": (
        '{"lora_parameters": {"rank": 4, "scale": 1, "scale": 2}}',
        "the key 'scale' appears twice",
    ),
    "NaN": ('{"lora_parameters": {"scale": NaN}}', "NaN is not a JSON number"),
    "infinity": ('{"lora_parameters": {"scale": -Infinity}}', "-Infinity is not a JSON number"),
    "a number beyond floats": ('{"x": 1e999}', "1e999 is beyond any float"),
    "a number of 5,000 digits": ('{"x": ' + "1" * 5000 + "}", "is not valid JSON"),
    "nested without end": ('{"x": ' + "[" * 100_000, "is not valid JSON"),
    "rank 0": (configured({"rank": 0}), "lora_parameters.rank: Input should be greater than"),
    "a negative rank": (configured({"rank": -4}), "lora_parameters.rank: Input should be greater"),
    "rank 2**40": (configured({"rank": 2**40}), "lora_parameters.rank: Input should be less than"),
    "rank true": (configured({"rank": True}), "lora_parameters.rank: Input should be a valid int"),
    "rank as text": (configured({"rank": "4"}), "lora_parameters.rank: Input should be a valid"),
    "scale 0": (configured({"scale": 0}), "lora_parameters.scale: Input should be greater than 0"),
    "a negative scale": (configured({"scale": -20.0}), "lora_parameters.scale: Input should be gr"),
    "a scale of 1e30": (configured({"scale": 1e30}), "lora_parameters.scale: Input should be less"),
    "a dropout of 1": (configured({"dropout": 1.0}), "lora_parameters.dropout: Input should be"),
    "a key that is empty": (configured({"keys": [""]}), "lora_parameters.keys.0: String should"),
    "5,000 keys": (configured({"keys": ["a"] * 5000}), "lora_parameters.keys: List should have"),
    "an unknown type": (configured(fine_tune_type="pickle"), "fine_tune_type: Input should be"),
    "num_layers -2": (configured(num_layers=-2), "num_layers: Input should be greater than"),
    "a model that is a list": (configured(model=["a"]), "model: Input should be a valid string"),
    "lora_parameters as a list": (configured(lora_parameters=[]), "lora_parameters: Input should"),
    "two documents": ("{} {}", "is not valid JSON"),
    "nothing": ("", "is not valid JSON"),
    "half of one": ("{", "is not valid JSON"),
    "no object": ("[]", ": the file: Input should be a valid dictionary"),
    "a number in the list of keys": (configured({"keys": [1]}), "keys.0: Input should be a valid"),
    "num_layers 2.5": (configured(num_layers=2.5), "num_layers: Input should be a valid integer"),
    "a MiB of spaces": (" " * (1024 * 1024 + 1), " is larger than 1048576 bytes"),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_configuration_out_of_bounds_is_damage(tmp_path: Path, case: str) -> None:
    content, message = CONFIGURATIONS[case]
    folder = write(tmp_path / "adapter", trained_tensors())
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(DamagedError) as error:
        read_adapter(folder)
    assert str(error.value).startswith(f"{folder}/adapter_config.json")
    assert message in str(error.value)
    assert len(str(error.value)) < 1000


def circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (delete, "is missing"),
        (make_pipe, "is not a file"),
        (link_to_a_device, "is not a file"),
        (make_directory, "is not a file"),
        (circle, "cannot be read: Too many levels"),
    ],
)
def test_a_pipe_a_folder_or_nothing_in_a_files_place_is_damage_and_nobody_waits(
    tmp_path, name, damage, said
) -> None:
    folder = write(tmp_path / "adapter", trained_tensors())
    damage(folder / name)
    with pytest.raises(DamagedError, match=f"{name} {said}"):
        read_adapter(folder)


def test_a_name_that_no_file_system_takes_is_no_directory() -> None:
    with pytest.raises(ConfigError, match="is not a directory") as caught:
        read_adapter(Path("x" * 5000))
    assert len(str(caught.value)) < 600
