"""What fails for the machine is an error to try again: no verdict, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import NestedTuneError
from nested_core.gate import fresh_process_check, verify_adapters
from nested_core.gate.checks import losses
from nested_core.pipeline import steps
from nested_core.storage.run_directory import RunDirectory

REAL = fresh_process_check.FRESH_PROCESS_PROGRAM
Limit = Callable[[str], None]

# What a fresh process meets before it begins: a disk that is full (a file may have 1,000 bytes, and
# the kernels are not compiled yet), no temporary folder, a compiler that fails, few open files,
# little memory.
NEW_KERNELS = "os.environ['TMPDIR'] = {folder!r}; "
FAILING_COMPILER = """#!/bin/sh
[ "$1" = --version ] && exit 0
echo compilation terminated. >&2
exit 1
"""
LIMITS = {
    "temporary folder is full": NEW_KERNELS
    + "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))",
    "no temporary folder": "os.environ['TMPDIR'] = {folder!r} + '/absent'",
    "compiler fails": NEW_KERNELS + "os.environ['PATH'] = {folder!r} + ':' + os.environ['PATH']",
    "few open files": "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))",
    "an error in a library": "sys.modules['mlx_lm'] = None",
}


@pytest.fixture
def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Limit:
    """Let the fresh process begin with a line of Python."""

    def limit(line: str) -> None:
        folder = tmp_path / "limits"
        folder.mkdir()
        compiler = folder / "g++"
        compiler.write_text(FAILING_COMPILER)
        compiler.chmod(0o755)
        program = tmp_path / "limited.py"
        code = f"import os, resource, runpy, sys\n{line.format(folder=str(folder))}\n"
        program.write_text(code + f"answer = runpy.run_path({str(REAL)!r})['answer']\n")
        monkeypatch.setattr(fresh_process_check, "FRESH_PROCESS_PROGRAM", program)

    return limit


@pytest.mark.parametrize("line", LIMITS.values(), ids=list(LIMITS))
def test_what_the_fresh_process_lacks_says_nothing_about_the_adapter(
    run: RunDirectory, limited: Limit, line: str
) -> None:
    limited(line)
    with pytest.raises(NestedTuneError, match="says nothing about the adapter") as caught:
        verify_adapters(run.initial, run.adapter)
    assert caught.value.exit_code == 1
    assert "there is no verdict" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_has_no_verdict_then_and_gets_one_the_next_time(
    config: FineTuneConfig, run: RunDirectory, limited: Limit, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(LIMITS["compiler fails"])
    with pytest.raises(NestedTuneError, match="Judge the run again with --resume"):
        steps.judge(config, run)
    assert not run.gate.exists()
    assert not run.manifest.exists()
    monkeypatch.setattr(fresh_process_check, "FRESH_PROCESS_PROGRAM", REAL)
    assert steps.judge(config, run).has_passed


def test_a_verdict_that_stood_before_stays_as_it_was(
    config: FineTuneConfig, run: RunDirectory, limited: Limit
) -> None:
    steps.judge(config, run)
    before = [path.read_bytes() for path in (run.gate, run.manifest)]
    limited(LIMITS["few open files"])
    with pytest.raises(NestedTuneError):
        steps.judge(config, run)
    assert [path.read_bytes() for path in (run.gate, run.manifest)] == before


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[Compile::eval_cpu] Failed to compile function."),
        RuntimeError("[malloc] Unable to allocate 8 bytes."),
        MemoryError(),
    ],
)
def test_neither_has_the_gate_a_verdict_where_mlx_fails_in_its_own_process(
    config: FineTuneConfig, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(losses, "measure_example_losses", fail)
    with pytest.raises(NestedTuneError, match="gives no verdict") as caught:
        steps.judge(config, run)
    assert caught.value.exit_code == 1
    assert not run.gate.exists()


def test_a_base_that_cannot_be_loaded_is_not_the_adapters_fault(
    run: RunDirectory, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "nobody knows"}')
    for folder in (run.initial, run.adapter):
        config = json.loads((folder / "adapter_config.json").read_bytes())
        del config["base_fingerprint"]
        (folder / "adapter_config.json").write_text(json.dumps(config | {"model": str(base)}))
    with pytest.raises(NestedTuneError, match="says nothing about the adapter"):
        verify_adapters(run.initial, run.adapter)


def test_a_scale_that_no_layer_can_compute_with_is_unreadable(run: RunDirectory) -> None:
    """mlx_lm.load takes it, and the first forward pass does not."""
    for folder in (run.initial, run.adapter):
        path = folder / "adapter_config.json"
        config = json.loads(path.read_bytes())
        config["lora_parameters"]["scale"] = None
        path.write_text(json.dumps(config))
    (reason,) = verify_adapters(run.initial, run.adapter).reasons
    assert reason.code == "unreadable"
    assert "could not use the initial adapter: TypeError" in reason.message


@pytest.mark.parametrize("side", ["initial", "trained"])
def test_an_adapter_that_mlx_lm_refuses_is_unreadable_and_named(
    run: RunDirectory, tmp_path: Path, side: str
) -> None:
    folders = {"initial": run.initial, "trained": run.adapter}
    path = folders[side] / "adapter_config.json"
    config = json.loads(path.read_bytes())
    config["lora_parameters"].pop("dropout")
    path.write_text(json.dumps(config))
    (reason,) = verify_adapters(run.initial, run.adapter).reasons
    assert reason.code == "unreadable"
    assert f"could not use the {side} adapter: KeyError: 'dropout'" in reason.message


def test_without_a_compiler_the_proof_is_computed_uncompiled(
    run: RunDirectory, limited: Limit, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    limited(f"os.environ.update(TMPDIR={str(empty)!r}, PATH={str(empty)!r})")
    assert verify_adapters(run.initial, run.adapter).has_passed
