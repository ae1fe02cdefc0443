"""The order of test files: those that take longest first.

pytest-xdist gives a whole file to a worker (`--dist loadfile`). A long file that comes last runs
alone while the other cores wait, so the long ones start first and the short ones fill the end.
Add a file here when it takes more than about five seconds of CPU time; the order among them is that
of `pytest --durations=0`, roughly.
"""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent

SLOW_FILES = (
    "flows/test_cli_ranks.py",
    "flows/test_cli_run.py",
    "flows/test_cli_run_signals.py",
    "core/training/test_ranks_equal.py",
    "flows/test_cli_demo.py",
    "test_packaging.py",
    "flows/test_finetune_flow.py",
    "flows/test_cli_stop.py",
    "flows/test_cli_registry.py",
    "flows/test_cli_continual.py",
    "core/gate/test_gate_adversaries.py",
    "flows/test_cli_usage.py",
    "core/data/test_cache.py",
    "core/training/test_training_resume.py",
    "core/training/test_training_lora.py",
    "core/training/test_training_tiers.py",
    "flows/test_promotion_flows.py",
    "flows/test_events.py",
    "flows/test_cli_signals.py",
    "flows/test_cli_train.py",
    "flows/test_cli_validate.py",
    "flows/test_cli_verify.py",
    "benchmarks/test_time_to_loss_runs.py",
    "flows/test_gate_in_flow.py",
    "flows/test_sweep.py",
    "flows/test_ranks_in_flow.py",
    "core/training/test_reference.py",
    "core/gate/test_gate_forgetting.py",
    "core/gate/test_gate_proof.py",
    "core/gate/test_gate_honest.py",
    "core/gate/test_gate_run.py",
    "core/gate/test_gate_confirmed.py",
    "core/training/test_forecast_measured.py",
    "core/data/test_bad_lines.py",
    "core/data/test_formats.py",
    "core/pipeline/test_continual.py",
    "core/data/test_split_table.py",
    "core/registry/test_registry_damage.py",
    "core/kernels/test_checking.py",
    "core/models/peft/test_import_refusals.py",
)


def position(path: Path) -> int:
    """The place of a test file in the order; all files that are not listed share the last one."""
    return _POSITIONS.get(path, len(SLOW_FILES))


_POSITIONS = {TESTS / name: place for place, name in enumerate(SLOW_FILES)}
