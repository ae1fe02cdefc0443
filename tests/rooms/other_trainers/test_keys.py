"""A key of another trainer is answered with ours, and ours exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from nested_core.config.key_properties import iterate_keys
from nested_core.config.loading import load_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError
from nested_core.rooms.other_trainers.keys import KEYS


@pytest.mark.parametrize(
    ("theirs", "answer"),
    [
        ("num_epochs", "did you mean training.epochs?"),
        ("lora_r", "did you mean lora_parameters.rank?"),
        ("micro_batch_size", "did you mean batch_size?"),
        ("rank", "did you mean lora_parameters.rank?"),
        ("epochs", "did you mean training.epochs?"),
        ("max_steps", "did you mean iters? (it counts micro-batches, theirs counts optimizer"),
        ("sample_packing", "sample_packing is not needed: "),
        ("base", "did you mean model?"),
        ("assistant_only_loss", "did you mean training.supervise? (all trains on every answer"),
        ("train_on_inputs", "did you mean training.supervise? (all trains on every answer of a"),
        ("mask_history", "did you mean mask_prompt? (both train on the last answer of a chat"),
        ("quantization", "quantization is not a key here: give a base model that is quantised"),
    ],
)
def test_a_key_of_another_tool_is_answered_with_ours(tmp_path: Path, theirs, answer) -> None:
    (tmp_path / "lora.yaml").write_text(f"{theirs}: 3\n")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "lora.yaml")
    (line,) = (line for line in str(error.value).splitlines() if line.startswith(f"  {theirs}:"))
    assert line.startswith(f"  {theirs}: unknown key; {answer}")


def test_each_key_that_is_answered_with_ours_exists() -> None:
    known = {key.name for key in iterate_keys(FineTuneConfig)}
    for theirs, ours in KEYS.ours.items():
        assert ours.partition("; ")[0] in known, theirs
    assert not known & (KEYS.ours.keys() | KEYS.hints.keys())
