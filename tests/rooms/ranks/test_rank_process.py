"""The process of a rank: what it imports, and who starts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nested_core.errors import ConfigError
from nested_core.pipeline.preflight import check_before_start
from nested_core.storage.run_directory import RunDirectory
from tests.core import test_backend as backend_tests
from tests.core.test_imports import ask
from tests.example import example_config

RANK = """
import os
os.environ["MLX_RANK"] = "0"
os.dup2(os.pipe()[0], 0)  # a rank ends when its standard input does
from nested_core.rooms.ranks.rank_worker import main
main("/no/such/run", "1")
import mlx_lm.tuner.trainer  # as a rank does that has a run
"""


def test_a_rank_chooses_its_device_before_anything_imports_mlx() -> None:
    imported = (
        "import json, sys, nested_core.rooms.ranks.rank_worker; print(json.dumps([*sys.modules]))"
    )
    assert "mlx.core" not in ask(imported)


@pytest.mark.slow("imports what a training imports")
def test_a_rank_imports_no_installed_torch(tmp_path: Path) -> None:
    backend_tests.check_that_no_torch_is_imported(RANK, tmp_path)


def test_a_command_that_mlx_launch_started_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_RANK", "1")
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"Start it without mlx.launch, and give training.proc"):
        check_before_start(example_config(), run)
    assert not run.path.exists()
