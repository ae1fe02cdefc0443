"""The markers that divide the tests, in a run of pytest on files of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.left_out import COMMANDS

pytest_plugins = ["pytester"]

PLUGIN = """
import pytest
from tests.left_out import LeftOut, check_reasons

def pytest_configure(config):
    config.pluginmanager.register(LeftOut(config), "left-out")

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    check_reasons(items)
"""
FILE = """
import pytest

def test_fast(): pass

@pytest.mark.slow("trains two ranks")
def test_slow(): pass

@pytest.mark.slow("kills two ranks")
@pytest.mark.reliability
def test_with_both(): pass
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder with tests of each kind."""
    pytester.makeini("[pytest]\nmarkers = slow\n    reliability\n")
    pytester.makeconftest(PLUGIN)
    pytester.makepyfile(FILE)
    return pytester


def test_the_last_line_says_how_many_were_left_out_and_what_runs_them(project) -> None:
    result = project.runpytest_inprocess("-m", "not slow and not reliability")
    result.assert_outcomes(passed=1, deselected=2)
    assert [line for line in result.outlines if line][-1] == (
        "Tests left out: 1 marked slow (`make test-all`), "
        "1 marked reliability (`make reliability`)."
    )
    whole = project.runpytest_inprocess()
    whole.assert_outcomes(passed=3)
    assert "left out" not in whole.stdout.str()


def test_a_test_that_is_slow_without_a_reason_stops_the_run(project: pytest.Pytester) -> None:
    project.makepyfile(test_other="import pytest\n@pytest.mark.slow\ndef test_it(): pass")
    result = project.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "test_other.py::test_it is marked slow without a reason" in result.stderr.str()


def test_every_command_that_the_line_names_is_in_the_makefile(request) -> None:
    makefile = (request.config.rootpath / "Makefile").read_text(encoding="utf-8")
    for command in COMMANDS.values():
        assert re.search(rf"^{command.removeprefix('make ')}:", makefile, re.M), command


@pytest.mark.parametrize(("failing", "code"), [("none", 0), ("Zen", 2)])
def test_the_kernels_target_runs_each_setting_to_its_end_and_fails_with_any(
    failing: str, code: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    shutil.copy(request.config.rootpath / "Makefile", tmp_path)
    kernels = "os.environ.get('OPENBLAS_CORETYPE')"
    program = f"import os, sys; print(dict(os.environ)); sys.exit({kernels} == '{failing}')"
    (tmp_path / "suite.py").write_text(program)
    command = ["make", "-o", ".venv/dev.stamp", "test-kernels", f"PYTEST={sys.executable} suite.py"]
    environment = os.environ | {"OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_L2_SIZE": "1"}
    environment.pop("MAKEFLAGS", None)  # of the make that runs this test
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    logs = {path.stem: path.read_text() for path in (tmp_path / "build/test-kernels").iterdir()}
    processor = Path("/proc/cpuinfo")
    has_avx512 = processor.exists() and "avx512f" in processor.read_text()
    expected = {"Haswell", "Zen", "own-kernels", "no-openblas", *["SkylakeX"] * has_avx512}
    assert logs.keys() == expected
    assert ("SkylakeX: not run" in done.stdout) is not has_avx512
    assert done.stdout.count("passed") + done.stdout.count("FAILED") == len(logs)
    assert ("Zen: FAILED" in done.stdout) is (failing == "Zen")
    assert "'OPENBLAS_CORETYPE': 'Haswell'" in logs["Haswell"]
    assert "OPENBLAS_L2_SIZE" not in logs["own-kernels"]
    assert "OPENBLAS_CORETYPE" not in logs["own-kernels"]
    assert "NESTED_TUNE_NO_OPENBLAS" in logs["no-openblas"]
