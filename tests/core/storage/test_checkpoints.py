"""A checkpoint is whole or it is not there; one that was changed is named and passed over."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from nested_core import DamagedError, read_adapter
from nested_core.storage.checkpoint import (
    latest_checkpoint,
    prune_checkpoints,
    publish_adapter,
    read_checkpoint,
    write_checkpoint,
)
from nested_core.storage.checkpoint_verification import checkpoint_path, list_checkpoints
from nested_core.storage.manifest import write_manifest

FILES = [
    "MANIFEST.json",
    "adapter_config.json",
    "adapters.safetensors",
    "optimizer.safetensors",
    "state.json",
]


def write(folder: Path, step: int, **state: Any) -> Path:
    """A small checkpoint whose values depend on its step."""
    return write_checkpoint(
        folder,
        adapter={"layers.0.lora_a": mx.full((2,), float(step))},
        masters={},
        adapter_config={"lora_parameters": {"rank": 1}},
        optimizer_state={"step": mx.array(step, mx.uint64), "layers": [{"v": mx.ones(2)}]},
        state={"step": step} | state,
    )


def flip(path: Path, index: int) -> None:
    """Change one bit of one byte."""
    content = bytearray(path.read_bytes())
    content[index] ^= 1 << index % 8
    path.write_bytes(content)


def same(left: Any, right: Any) -> bool:
    """Whether two trees have equal names, dtypes and bits."""

    def bits(tree: Any) -> Any:
        flat = dict(tree_flatten(tree))
        return {k: (a.dtype, np.array(a.astype(mx.float32)).tobytes()) for k, a in flat.items()}

    return bool(bits(left) == bits(right))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        write(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


class TestRoundTrip:
    def test_it_stands_under_its_steps_name_with_all_its_files(self, tmp_path: Path) -> None:
        path = write(tmp_path, 100)
        assert path == checkpoint_path(tmp_path, 100) == tmp_path / "step-0000100"
        assert sorted(file.name for file in path.iterdir()) == FILES

    def test_tensors_state_and_holes_come_back_bit_for_bit(self, tmp_path: Path) -> None:
        adapter = {"b": mx.random.normal((3, 2)), "a": mx.ones((2,), mx.bfloat16) / 3}
        optimizer = {
            "step": mx.array(7, mx.uint64),
            "learning_rate": mx.array(1e-5),
            "layers": [{"w": {"m": mx.random.normal((2, 2))}}, {"w": {"m": mx.zeros((2,))}}],
            "nested": {"updates": mx.array([7, 3], mx.uint64)},
        }
        state = {"step": 7, "best_val_loss": 0.1 + 0.2, "red_flags": ["é"], "flushed": False}
        masters = {"a": mx.ones((2,)) / 3}
        path = write_checkpoint(
            tmp_path,
            adapter=adapter,
            masters=masters,
            adapter_config={},
            optimizer_state=optimizer,
            state=state,
        )
        found = read_checkpoint(path)
        assert (found.step, found.state) == (7, state)
        assert same(found.parameters(), adapter | masters)
        assert same(found.optimizer_state(), optimizer)
        assert read_adapter(path).tensors["a"].dtype == "BF16"

    def test_what_was_read_does_not_change_with_the_file(self, folder: Path) -> None:
        tensors = read_checkpoint(folder / "step-0000003").parameters()
        shutil.rmtree(folder)
        assert tensors["layers.0.lora_a"].tolist() == [3.0, 3.0]

    def test_a_checkpoint_of_the_same_step_is_replaced(self, folder: Path) -> None:
        write(folder, 3, ended=True)
        assert read_checkpoint(folder / "step-0000003").state == {"step": 3, "ended": True}
        assert len(list(folder.iterdir())) == 3


class TestLatest:
    def test_it_is_the_newest(self, folder: Path) -> None:
        found = latest_checkpoint(folder)
        assert found is not None
        assert found.step == 3

    def test_without_any_it_is_none(self, tmp_path: Path) -> None:
        assert latest_checkpoint(tmp_path) is None
        assert latest_checkpoint(tmp_path / "missing") is None

    def test_half_written_ones_are_not_looked_at(self, folder: Path) -> None:
        (folder / ".tmp-step-0000004-0a1b2c3d").mkdir()
        (folder / "step-4").mkdir()
        assert [path.name[-1] for path in list_checkpoints(folder)] == ["1", "2", "3"]

    def test_every_damaged_one_is_named(self, folder: Path) -> None:
        (folder / "step-0000003" / "state.json").unlink()
        (folder / "step-0000002" / "MANIFEST.json").unlink()
        with pytest.warns(UserWarning, match="is damaged") as caught:
            found = latest_checkpoint(folder)
        assert found is not None
        assert found.step == 1
        assert [str(warning.message).split()[1] for warning in caught] == [
            "step-0000003",
            "step-0000002",
        ]

    def test_none_sound_is_an_error_that_names_the_newest(self, folder: Path) -> None:
        for path in list_checkpoints(folder):
            flip(path / "state.json", 0)
        message = rf"^No checkpoint in {folder} is sound\. The newest: {folder}/step-0000003/state"
        with (
            pytest.warns(UserWarning, match="is damaged"),
            pytest.raises(DamagedError, match=message),
        ):
            latest_checkpoint(folder)


class TestDamage:
    @pytest.mark.parametrize("name", FILES)
    def test_a_flip_in_any_byte_is_found(self, name: str, tmp_path: Path) -> None:
        path = write(tmp_path, 1)
        sound = (path / name).read_bytes()
        for index in range(len(sound)):
            flip(path / name, index)
            with pytest.raises(DamagedError, match=str(path)):
                read_checkpoint(path)
            (path / name).write_bytes(sound)
        assert read_checkpoint(path).step == 1

    @pytest.mark.parametrize("name", FILES)
    def test_a_file_that_is_cut_short_missing_or_longer_is_found(self, name, tmp_path) -> None:
        path = write(tmp_path, 1)
        sound = (path / name).read_bytes()
        for content in (b"", sound[:-1], sound + b"\0", None):
            (path / name).unlink(missing_ok=True)
            if content is not None:
                (path / name).write_bytes(content)
            with pytest.raises(DamagedError, match=name):
                read_checkpoint(path)

    def test_a_checkpoint_under_another_steps_name_is_found(self, folder: Path) -> None:
        (folder / "step-0000003").rename(folder / "step-0000009")
        with pytest.raises(DamagedError, match="step-0000009 holds the manifest of another step"):
            read_checkpoint(folder / "step-0000009")

    def test_another_name_is_no_checkpoint(self, tmp_path: Path) -> None:
        write_manifest(tmp_path, {"step": 1})
        with pytest.raises(DamagedError, match="is not a checkpoint: its name is not step-NNNNNNN"):
            read_checkpoint(tmp_path)


class TestCrash:
    def test_a_state_that_cannot_be_written_leaves_no_trace(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="JSON"):
            write(folder, 4, loss=float("nan"))
        assert sorted(path.name[-1] for path in folder.iterdir()) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("last", "steps", "kept"),
    [(2, [], [5, 6]), (2, [1, 3], [1, 3, 5, 6]), (2, [6], [5, 6]), (9, [], [1, 2, 3, 4, 5, 6])],
)
def test_pruning_keeps_the_last_and_the_named(tmp_path, last, steps, kept) -> None:
    for step in range(1, 7):
        checkpoint_path(tmp_path, step).mkdir()
    prune_checkpoints(tmp_path, keep_last=last, keep_steps=steps)
    assert [int(path.name[-1]) for path in list_checkpoints(tmp_path)] == kept


def test_the_published_adapter_is_the_checkpoints_byte_for_byte(folder: Path) -> None:
    target = folder.parent / "adapter"
    for step in (1, 3):
        source = checkpoint_path(folder, step)
        publish_adapter(source, target)
        assert {path.name for path in target.iterdir()} == set(FILES[1:3])
        for path in target.iterdir():
            assert path.read_bytes() == (source / path.name).read_bytes()
        assert read_adapter(target).digest() == read_adapter(source).digest()
