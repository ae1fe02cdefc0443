"""The order of test files: those that take longest first.

pytest-xdist gives a whole file to a worker (`--dist loadfile`). A long file that comes last runs
alone while the other cores wait, so the long ones start first and the short ones fill the end.
Add a file here when it takes more than about five seconds of CPU time; the order among them is that
of `pytest --durations=0`, roughly.
"""

from __future__ import annotations

from pathlib import Path

SLOW_FILES = (  # names of modules, without their folders
    "test_cli_ranks",
    "test_cli_run_signals",
    "test_cli_demo",
    "test_gate_honest",
    "test_ranks_equal",
    "test_registry_crashes",
    "test_reference",
    "test_time_to_loss_runs",
    "test_mutations",
    "test_training_formats",
    "test_cli_signals",
    "test_cli_run",
    "test_mlx_lm_variants",
    "test_cli_stop",
    "test_embedded_server",
    "test_soak_slice",
    "test_tokenized_split",
    "test_gate_proof",
    "test_cli_train",
    "test_training_resume",
    "test_cache",
    "test_finetune_flow",
    "test_not_switched_off",
    "test_cli_registry",
    "test_optimizers_equal_mlx",
    "test_ranks_in_flow",
    "test_packaging",
    "test_gate_in_flow",
    "test_gate_adversaries",
    "test_registry_system_calls",
    "test_self_check",
    "test_generation",
    "test_cli_continual",
    "test_cli_show",
    "test_cli_validate",
    "test_mlflow_export",
    "test_bad_lines",
    "test_training_tiers",
    "test_training_failures",
    "test_gate_forgetting",
    "test_memory_measured",
    "test_training_lora",
    "test_formats",
    "test_training_stop",
    "test_training_selection",
    "test_training_options",
    "test_gate_run",
    "test_events",
    "test_finetune",
    "test_continual",
    "test_promotion_flows",
    "test_sweep",
    "test_registry_damage",
    "test_import_refusals",
    "test_mutated_folders",
)
_POSITIONS = {name: place for place, name in enumerate(SLOW_FILES)}


def position(path: Path) -> int:
    """The place of a test file in the order; all files that are not listed share the last one."""
    return _POSITIONS.get(path.stem, len(SLOW_FILES))
