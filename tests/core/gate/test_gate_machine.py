"""What fails for the machine is an error to try again: no verdict, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nested_core.errors import ConfigError, NestedTuneError
from nested_core.gate.checks import losses
from nested_core.gate.judge import verify_adapters
from nested_core.gate.proof import fresh_process_check
from nested_core.measure.fresh_process.starting import MLX_LM_PROGRAM
from tests.builders.adapter_folders import base_copy, change_config, name_base
from tests.builders.candidates import Candidate
from tests.left_out import slow_except

REAL = MLX_LM_PROGRAM
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
        monkeypatch.setattr(fresh_process_check, "MLX_LM_PROGRAM", program)

    return limit


@pytest.mark.parametrize(
    "line",
    slow_except(
        LIMITS.values(),
        LIMITS["compiler fails"],
        LIMITS["an error in a library"],
        reason="another process of mlx_lm",
    ),
    ids=list(LIMITS),
)
def test_what_the_fresh_process_lacks_says_nothing_about_the_adapter(
    candidate: Candidate, limited: Limit, line: str
) -> None:
    limited(line)
    with pytest.raises(NestedTuneError, match="says nothing about the adapter") as caught:
        verify_adapters(*candidate.sides)
    assert caught.value.exit_code == 1
    assert "there is no verdict" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_has_no_verdict_then_and_gets_one_the_next_time(
    candidate: Candidate, limited: Limit, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(LIMITS["compiler fails"])
    with pytest.raises(NestedTuneError, match="Run the gate again with --resume"):
        candidate.judge()
    assert not candidate.run.gate.exists()
    assert not candidate.run.manifest.exists()
    monkeypatch.setattr(fresh_process_check, "MLX_LM_PROGRAM", REAL)
    assert candidate.judge().has_passed


@pytest.mark.slow("judges twice")
def test_a_verdict_that_stood_before_stays_as_it_was(candidate: Candidate, limited: Limit) -> None:
    candidate.judge()
    before = [path.read_bytes() for path in (candidate.run.gate, candidate.run.manifest)]
    limited(LIMITS["few open files"])
    with pytest.raises(NestedTuneError):
        candidate.judge()
    assert [path.read_bytes() for path in (candidate.run.gate, candidate.run.manifest)] == before


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[Compile::eval_cpu] Failed to compile function."),
        RuntimeError("[malloc] Unable to allocate 8 bytes."),
        MemoryError(),
    ],
)
def test_neither_has_the_gate_a_verdict_where_mlx_fails_in_its_own_process(
    candidate: Candidate, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(losses, "measure_example_losses", fail)
    with pytest.raises(NestedTuneError, match="gives no verdict") as caught:
        candidate.judge()
    assert caught.value.exit_code == 1
    assert not candidate.run.gate.exists()


def test_a_base_that_cannot_be_loaded_is_not_the_adapters_fault(candidate, tmp_path) -> None:
    base = base_copy(tmp_path / "base", model_type="nobody knows")
    for folder in candidate.sides:
        name_base(folder, base)
    with pytest.raises(NestedTuneError, match="says nothing about the adapter|could not be loaded"):
        verify_adapters(*candidate.sides)


def test_a_base_without_a_tokenizer_is_named_and_leaves_no_process(candidate, tmp_path) -> None:
    base = base_copy(tmp_path / "base")
    (base / "tokenizer.json").unlink()
    request = fresh_process_check.ProofRequest(base, *candidate.sides)
    waiting = fresh_process_check.start_proof_process()
    for process in (None, waiting):
        with pytest.raises(ConfigError, match=r"no tokenizer could be loaded from .*base"):
            fresh_process_check.RunningProof(request, process)
    assert waiting.process.returncode is not None


@pytest.mark.parametrize(
    ("changed", "change", "named"),
    [
        # mlx_lm.load takes it, and the first forward pass does not.
        (("initial", "adapter"), {"scale": None}, "initial adapter: TypeError"),
        (("initial",), "dropout", "initial adapter: KeyError: 'dropout'"),
        (("adapter",), "dropout", "trained adapter: KeyError: 'dropout'"),
    ],
)
def test_an_adapter_that_mlx_lm_cannot_use_is_unreadable_and_named(
    candidate: Candidate, changed: tuple[str, ...], change: Any, named: str
) -> None:
    def spoil(config: dict[str, Any]) -> None:
        lora = config["lora_parameters"]
        lora.update(change) if isinstance(change, dict) else lora.pop(change)

    for side in changed:
        change_config(candidate.run.path / side, spoil)
    (reason,) = verify_adapters(*candidate.sides).reasons
    assert reason.code == "unreadable"
    assert f"could not use the {named}" in reason.message


def test_without_a_compiler_the_proof_is_computed_uncompiled(candidate, limited, tmp_path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    limited(f"os.environ.update(TMPDIR={str(empty)!r}, PATH={str(empty)!r})")
    assert verify_adapters(*candidate.sides).has_passed
