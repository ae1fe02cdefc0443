"""LoRA fine-tuning for MLX that checks whether training worked: the library behind the flows.

Importing it changes nothing in the process. The public names are loaded when they are first used,
so that a process that only reads data does without mlx. A script or a notebook that trains calls
`prepare` first, before anything imports mlx.

backend.py makes a process ready for MLX, errors.py has what is raised, rooms/ROOMS.toml says what
each room adds and seams.py loads it; the `__init__.py` of each folder says what the folder is for.
"""

from typing import TYPE_CHECKING, Any

from nested_core.seams import is_there, load

if TYPE_CHECKING:
    from nested_core.backend import prepare as prepare
    from nested_core.config.loading import load_config as load_config
    from nested_core.config.schema import FineTuneConfig as FineTuneConfig
    from nested_core.errors import ConfigError as ConfigError
    from nested_core.errors import DamagedError as DamagedError
    from nested_core.errors import DatasetError as DatasetError
    from nested_core.errors import GateRejected as GateRejected
    from nested_core.errors import NestedTuneError as NestedTuneError
    from nested_core.errors import SilentUpdateWarning as SilentUpdateWarning
    from nested_core.errors import TrainingDiverged as TrainingDiverged
    from nested_core.errors import TrainingStopped as TrainingStopped
    from nested_core.errors import UpdateNotApplied as UpdateNotApplied
    from nested_core.optim.named_updates import UpdateReport as UpdateReport
    from nested_core.optim.named_updates import (
        apply_flat_updates_to_nested as apply_flat_updates_to_nested,
    )
    from nested_core.optim.named_updates import verify_updates as verify_updates
    from nested_core.optim.tier_assignment import TierMap as TierMap
    from nested_core.optim.tier_assignment import assign_tiers as assign_tiers
    from nested_core.optim.tier_counters import Tier as Tier
    from nested_core.optim.tier_counters import TierStats as TierStats
    from nested_core.optim.tiered import NestedAdam as NestedAdam
    from nested_core.optim.tiered import NestedAdamW as NestedAdamW
    from nested_core.optim.tiered import Tiered as Tiered
    from nested_core.pipeline.champion import RegisteredAdapter as RegisteredAdapter
    from nested_core.pipeline.champion import champion as champion
    from nested_core.pipeline.champion import promote as promote
    from nested_core.pipeline.finetune import FinetuneResult as FinetuneResult
    from nested_core.pipeline.finetune import finetune as finetune
    from nested_core.pipeline.hooks import Steps as Steps
    from nested_core.report.run_report import RunReport as RunReport
    from nested_core.report.run_report import read_report as read_report
    from nested_core.storage.adapter import Adapter as Adapter
    from nested_core.storage.adapter import read_adapter as read_adapter
    from nested_core.storage.run_directory import open_run as open_run

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
    "errors": (
        *("ConfigError", "DamagedError", "DatasetError", "GateRejected", "NestedTuneError"),
        *("SilentUpdateWarning", "TrainingDiverged", "TrainingStopped", "UpdateNotApplied"),
    ),
}
PUBLIC_NAMES_BY_ROOM: dict[str, dict[str, tuple[str, ...]]] = {
    "compare": {"comparison": ("RunComparison", "compare_runs")},
    "evaluate": {"evaluating": ("evaluate",), "page": ("Evaluation",)},
    "export": {"exporting": ("Export", "export")},
}
_MODULE_OF_PUBLIC_NAME = {
    name: home for home, names in _PUBLIC_NAMES_BY_MODULE.items() for name in names
}
for _room in filter(is_there, PUBLIC_NAMES_BY_ROOM):
    for _module, _names in PUBLIC_NAMES_BY_ROOM[_room].items():
        _MODULE_OF_PUBLIC_NAME |= dict.fromkeys(_names, f"rooms.{_room}.{_module}")
__all__ = sorted(_MODULE_OF_PUBLIC_NAME)


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used, and cache the value."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = load(f"{__name__}.{_MODULE_OF_PUBLIC_NAME[name]}:{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the module's names, including public names that are not imported yet."""
    return sorted({*globals(), *__all__})
