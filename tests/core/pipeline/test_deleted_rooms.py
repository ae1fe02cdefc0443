"""A key that a deleted room would answer is refused before anything is made, and names the room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset
from nested_core.errors import ConfigError
from nested_core.pipeline.finetune import finetune
from nested_core.storage.run_directory import RunDirectory
from tests.example import example_config
from tests.left_out import leave_out_room

KEYS: dict[str, tuple[str, dict[str, Any]]] = {
    "gate.check_fused": ("fused", {"gate": {"check_fused": True}}),
    "report_to": ("services", {"report_to": "wandb"}),
}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_a_deleted_room_is_refused_with_the_name_of_the_room(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, settings = KEYS[key]
    leave_out_room(room, monkeypatch)
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"`{key}` belongs to the room {room}"):
        finetune(example_config(**settings), run)
    assert not run.path.exists()


KEYS_OF_DATA: dict[str, tuple[str, dict[str, Any]]] = {
    "data_policy.near_duplicates": (
        "near_duplicates",
        {"data_policy": {"near_duplicates": "error"}},
    ),
    "hf_dataset": ("hub", {"hf_dataset": {"path": "a/b", "train_split": "train"}}),
}


@pytest.mark.parametrize("key", KEYS_OF_DATA)
def test_a_key_of_the_data_is_refused_where_the_data_is_read(key, monkeypatch) -> None:
    room, settings = KEYS_OF_DATA[key]
    config = example_config(**settings)
    leave_out_room(room, monkeypatch)
    with pytest.raises(ConfigError, match=f"`{key}` belongs to the room {room}"):
        load_dataset(DataSettings.from_config(config), None)
