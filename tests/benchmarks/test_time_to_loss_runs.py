"""The study itself on a model of 50 thousand parameters: resumed, importing little, fair."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.time_to_loss.models import SIZES, is_made, pretrain
from tests.fork_server import python

pytestmark = [
    pytest.mark.slow("eleven short trainings, each in a process that imports mlx_lm")
]  # seven short processes, each of which imports mlx_lm
ARMS = ["mlx_lm", "ours"]
ONLY_THESE = """
import builtins, runpy, sys
allowed = set(sys.stdlib_module_names) | {"mlx", "mlx_lm", "numpy", "nested_core", "benchmarks"}
true_import = builtins.__import__
def checked(name, globals=None, locals=None, fromlist=(), level=0):
    importer = str((globals or {}).get("__name__"))
    is_ours = importer.split(".")[0] in ("nested_core", "benchmarks")
    if is_ours and name.split(".")[0] not in allowed:
        raise ImportError(f"{importer} imports {name}")
    return true_import(name, globals, locals, fromlist, level)
builtins.__import__ = checked
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of rows of a whole study with one rate and one measured seed."""
    rows = tmp_path_factory.mktemp("study") / "ROWS.jsonl"
    call(rows)
    return rows


def study_of(rows: Path) -> subprocess.CompletedProcess[str]:
    """One call of the study, whose processes are forked but for those of mlx_lm."""
    options = ["--sizes", "tiny", "--seeds", "1", "--rates", "1e-4", "--arms", *ARMS]
    return python("-m", "benchmarks.time_to_loss", rows, *options)


def call(rows: Path) -> str:
    """One call of the study, which must succeed; what it printed."""
    done = study_of(rows)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_second_call_goes_on_with_what_is_missing(study: Path, tmp_path: Path):
    copy = tmp_path / "ROWS.jsonl"
    kept = study.read_text().splitlines()[:3]
    copy.write_text("".join(f"{line}\n" for line in kept))
    (tmp_path / "models").symlink_to(study.parent / "models")
    assert "nothing is missing" in call(copy)
    assert copy.read_text().splitlines()[:3] == kept
    names = [(each["arm"], each["seed"]) for each in rows_of(copy)]
    assert names == [(arm, seed) for seed in (0, 1) for arm in ARMS]
    before = copy.read_text()
    call(copy)
    assert copy.read_text() == before


def test_rows_of_another_base_model_are_refused(study: Path, tmp_path: Path):
    rows = tmp_path / "ROWS.jsonl"
    rows.write_text(json.dumps(rows_of(study)[0] | {"base": "0" * 16}) + "\n")
    (tmp_path / "models").symlink_to(study.parent / "models")
    done = study_of(rows)
    assert done.returncode == 1
    assert "has runs of another model of tiny than" in done.stderr
    assert len(rows_of(rows)) == 1


def test_uniform_updates_give_mlx_lm_s_losses_from_the_same_start_on_the_same_batches(study: Path):
    of = {(each["arm"], each["seed"]): each for each in rows_of(study)}
    for seed in (0, 1):
        rival, ours = of["mlx_lm", seed], of["ours", seed]
        assert rival["losses"][0] == ours["losses"][0]
        assert ours["losses"][: len(rival["losses"])] == pytest.approx(rival["losses"], abs=5e-5)
        assert rival["losses"][-1] < rival["losses"][0] - 0.3
    assert of["mlx_lm", 0]["losses"][1] != of["mlx_lm", 1]["losses"][1]


def test_ours_are_measured_beyond_the_rival_s_last_step_but_tuned_at_it(study: Path):
    last = {(each["arm"], each["seed"]): each["steps"][-1] for each in rows_of(study)}
    assert [last[arm, 0] for arm in ARMS] == [48, 48]
    assert [last[arm, 1] for arm in ARMS] == [48, 64]


@pytest.mark.parametrize(
    "arm",
    [
        "mlx_lm",
        pytest.param("ours+1-2-4+accumulate+scaled", marks=pytest.mark.reliability),
        "ours+frozen+deep",
    ],
)
def test_it_runs_with_mlx_mlx_lm_and_numpy_alone(study: Path, tmp_path: Path, arm: str):
    rows = tmp_path / "ROWS.jsonl"
    job = json.dumps(["tiny", arm, 0, 1e-3])
    worker = "benchmarks.time_to_loss.worker", str(study.parent / "models"), "tiny", str(rows), job
    done = subprocess.run(
        [sys.executable, "-c", ONLY_THESE, *worker], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = rows_of(rows)
    assert row["losses"][-1] < row["losses"][0]
    assert len(row["losses"]) == len(row["windows"]) + 1 == 4


def test_a_killed_pretraining_goes_on_to_the_weights_of_one_that_was_not(tmp_path: Path):
    size = replace(SIZES["tiny"], pretraining=150)
    pretrain(tmp_path / "whole", size)
    code = (
        "from dataclasses import replace; from pathlib import Path;"
        "from nested_core import backend; backend.prepare();"
        "from benchmarks.time_to_loss.models import SIZES, pretrain;"
        f"pretrain(Path({str(tmp_path / 'cut')!r}), "
        "replace(SIZES['tiny'], pretraining=150), 0.0)"
    )
    state = tmp_path / "cut" / "pretraining.safetensors"
    process = subprocess.Popen([sys.executable, "-c", code])
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert state.exists()
    assert not is_made(tmp_path / "cut")
    with pytest.raises(SystemExit, match="of the facts: pretrain it longer"):
        pretrain(tmp_path / "cut", replace(size, knows=0.95))
    assert not is_made(tmp_path / "cut")
    pretrain(tmp_path / "cut", size)
    assert is_made(tmp_path / "cut")
    assert not state.exists()
    weights = [weights_of(tmp_path / name) for name in ("whole", "cut")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert np.allclose(value, weights[1][name], atol=2e-3), name


def weights_of(folder: Path) -> dict[str, Any]:
    import mlx.core as mx

    held: Any = mx.load(str(next(folder.glob("model*.safetensors"))))
    return {name: np.array(value.astype(mx.float32)) for name, value in held.items()}
