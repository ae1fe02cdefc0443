"""What importing the library does to the process that imports it: nothing but load modules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nested_core

LINUX = sys.platform == "linux"


@pytest.mark.usefixtures("own_random_state")  # importing a library for the first time may draw
@pytest.mark.parametrize("name", nested_core.__all__)
def test_each_public_name_is_there(name: str) -> None:
    assert getattr(nested_core, name).__name__ == name


STATE = """
import json, logging, os, sys, warnings

def mapped():
    '''The libraries of the process that are none of Python's or of a package's.'''
    try:
        lines = open("/proc/self/maps").read().splitlines()
    except FileNotFoundError:
        return []
    paths = {line.split()[-1] for line in lines if ".so" in line}
    return sorted(path for path in paths if "blas" in path.lower() or "mlx" in path)

def state():
    import pandera.config, polars
    return {
        "environment": dict(os.environ),
        "pandera": str(pandera.config.get_config_global()),
        "polars": polars.Config.save(),
        "logging": [logging.root.level, len(logging.root.handlers), logging.root.manager.disable],
        "warnings": len(warnings.filters),
        "libraries": mapped(),
    }

before = state()
import nested_core, nested_core.data
after = state()
print(json.dumps([before, after, sorted(name for name in sys.modules if name.startswith("mlx"))]))
"""


def ask(code: str, **environment: str) -> Any:
    """What a fresh Python process prints, as JSON."""
    root = str(Path(__file__).resolve().parents[2])
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": root, "HOME": "/nowhere"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_the_library_leaves_its_host_as_it_was() -> None:
    settings = {"PANDERA_VALIDATION_ENABLED": "False", "PANDERA_CACHE_DATAFRAME": "True"}
    before, after, mlx_modules = ask(STATE, **settings)
    assert before["environment"].items() >= settings.items()
    assert after == before
    assert mlx_modules == []


LATE = """
import json, sys, warnings
import mlx.core
from nested_core import prepare
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    blas = prepare()
print(json.dumps([blas, [str(each.message) for each in caught]]))
"""


@pytest.mark.skipif(not LINUX, reason="only on Linux has MLX another BLAS to bind")
def test_preparing_after_mlx_was_imported_says_what_it_could_not_do() -> None:
    blas, messages = ask(LATE)
    assert blas is None
    (message,) = messages
    assert "was called after mlx was imported" in message
    assert "Call it before anything imports mlx." in message


UNPREPARED = """
import json, warnings
from nested_core import backend
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    backend.warn_if_unprepared()
    backend.prepare()
    backend.warn_if_unprepared()
print(json.dumps([str(each.message) for each in caught]))
"""


@pytest.mark.skipif(not LINUX, reason="elsewhere there is nothing to prepare")
def test_training_in_a_process_that_was_not_prepared_is_warned_of_once() -> None:
    (message,) = ask(UNPREPARED)
    assert message.startswith("nested_core.backend.prepare() was not called in this process.")


LIGHT = """
import json, sys
from flows.cli import main
code = main({arguments})
packages = {{name.split(".")[0] for name in sys.modules}}
print(json.dumps([code, sorted(packages), sorted(sys.modules)]))
"""


@pytest.mark.parametrize(
    ("command", "unneeded"),
    [
        (["status"], {"mlx", "mlx_lm", "transformers", "polars", "prefect"}),
        pytest.param(
            ["promote", "--registry", ".", "--name", "x"],
            {"mlx_lm", "transformers", "polars", "prefect"},
            marks=pytest.mark.slow("a process that imports what promoting needs"),
        ),
    ],
)
def test_looking_at_a_run_and_promoting_it_load_no_trainer(tmp_path, command, unneeded) -> None:
    arguments = [command[0], str(tmp_path), *command[1:]]
    code, packages, modules = ask(LIGHT.format(arguments=arguments))
    assert code == 2  # the folder is no run directory; all that the command needs was loaded
    assert "nested_core" in packages
    assert unneeded & {*packages} == set()
    assert "nested_core.training.trainer" not in modules
