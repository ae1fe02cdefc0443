"""LoRA fine-tuning for MLX that checks whether training worked: the library behind the flows.

Importing it changes nothing in the process. The public names are loaded when they are first used,
so that a process that only reads data does without mlx. A script or a notebook that trains calls
`prepare` first, before anything imports mlx.

backend.py makes a process ready for MLX, errors.py has what is raised, rooms/__init__.py says what
each room adds and seams.py loads it; the `__init__.py` of each folder says what the folder is for.
"""

from typing import TYPE_CHECKING, Any

from nested_core.seams import list_public_names, list_rooms, load

if TYPE_CHECKING:
    from nested_core.backend import prepare
    from nested_core.config.loading import load_config
    from nested_core.config.schema import FineTuneConfig
    from nested_core.errors import (
        ConfigError,
        DamagedError,
        DatasetError,
        GateRejected,
        NestedTuneError,
        SilentUpdateWarning,
        TrainingDiverged,
        TrainingStopped,
        UpdateNotApplied,
    )
    from nested_core.optim.named_updates import (
        UpdateReport,
        apply_flat_updates_to_nested,
        verify_updates,
    )
    from nested_core.optim.tier_assignment import TierMap, assign_tiers
    from nested_core.optim.tier_counters import Tier, TierStats
    from nested_core.optim.tiered import NestedAdam, NestedAdamW, Tiered
    from nested_core.pipeline.champion import RegisteredAdapter, champion, promote
    from nested_core.pipeline.finetune import FinetuneResult, finetune
    from nested_core.pipeline.hooks import Steps
    from nested_core.report.run_report import RunReport, read_report
    from nested_core.storage.adapter import Adapter, read_adapter
    from nested_core.storage.run_directory import open_run

__all__ = [
    "Adapter",
    "ConfigError",
    "DamagedError",
    "DatasetError",
    "FineTuneConfig",
    "FinetuneResult",
    "GateRejected",
    "NestedAdam",
    "NestedAdamW",
    "NestedTuneError",
    "RegisteredAdapter",
    "RunReport",
    "SilentUpdateWarning",
    "Steps",
    "Tier",
    "TierMap",
    "TierStats",
    "Tiered",
    "TrainingDiverged",
    "TrainingStopped",
    "UpdateNotApplied",
    "UpdateReport",
    "apply_flat_updates_to_nested",
    "assign_tiers",
    "champion",
    "finetune",
    "load_config",
    "open_run",
    "prepare",
    "promote",
    "read_adapter",
    "read_report",
    "verify_updates",
]
_PARTS_OF_ROOMS = list_public_names(list_rooms())
__all__ += _PARTS_OF_ROOMS

_PUBLIC_NAMES_BY_MODULE = {
    "backend": ("prepare",),
    "storage.adapter": ("Adapter", "read_adapter"),
    "optim.tier_counters": ("Tier", "TierStats"),
    "config.schema": ("FineTuneConfig",),
    "config.loading": ("load_config",),
    "optim.tiered": ("NestedAdam", "NestedAdamW", "Tiered"),
    "optim.named_updates": ("UpdateReport", "apply_flat_updates_to_nested", "verify_updates"),
    "optim.tier_assignment": ("TierMap", "assign_tiers"),
    "pipeline.champion": ("RegisteredAdapter", "champion", "promote"),
    "pipeline.finetune": ("FinetuneResult", "finetune"),
    "pipeline.hooks": ("Steps",),
    "report.run_report": ("RunReport", "read_report"),
    "storage.run_directory": ("open_run",),
}
_MODULE_OF_PUBLIC_NAME = {
    name: home for home, names in _PUBLIC_NAMES_BY_MODULE.items() for name in names
}


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used, and cache the value."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = f"{__name__}.{_MODULE_OF_PUBLIC_NAME.get(name, 'errors')}"
    value = load(_PARTS_OF_ROOMS.get(name, f"{module}:{name}"))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the module's names, including public names that are not imported yet."""
    return sorted({*globals(), *__all__})
