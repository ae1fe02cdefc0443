"""Training in several processes, where no room starts them."""

from __future__ import annotations

import pytest

from nested_core.errors import ConfigError
from nested_core.pipeline.preflight import check_before_start
from nested_core.pipeline.processes import count_processes
from nested_core.storage.run_directory import RunDirectory
from tests.example import example_config
from tests.left_out import leave_out_room


@pytest.fixture(autouse=True)
def without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The room is deleted."""
    leave_out_room("ranks", monkeypatch)


@pytest.mark.parametrize(
    ("training", "variables", "asked"),
    [
        ({"processes": 2}, {}, "training.processes"),
        ({"hostfile": "hosts.json"}, {}, "training.hostfile"),
        ({}, {"MLX_RANK": "0"}, "mlx.launch"),
    ],
)
def test_several_processes_are_refused_with_the_rooms_name_before_anything_is_written(
    tmp_path, monkeypatch, training, variables, asked
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"`{asked}` belongs to the room ranks, which is not"):
        check_before_start(example_config(training=training), run)
    assert not run.path.exists()


def test_one_process_needs_no_room() -> None:
    assert count_processes(example_config()) == 1
