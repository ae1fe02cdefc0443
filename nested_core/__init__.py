"""Fine-tuning for MLX that cannot silently do nothing: the library behind the flows.

Importing it makes the backend ready before mlx is first imported.
"""

from nested_core import backend

backend.prepare()

from nested_core.adapters import Adapter, read_adapter  # noqa: E402  # mlx comes after its BLAS
from nested_core.clocks import Tier, TierStats  # noqa: E402
from nested_core.config import FineTuneConfig  # noqa: E402
from nested_core.config_file import load_config  # noqa: E402
from nested_core.errors import (  # noqa: E402
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
from nested_core.optimizers import NestedAdam, NestedAdamW  # noqa: E402
from nested_core.pytree import (  # noqa: E402
    UpdateReport,
    apply_flat_updates_to_nested,
    verify_updates,
)
from nested_core.tiers import TierMap, assign_tiers  # noqa: E402

__all__ = [
    "Adapter",
    "ConfigError",
    "DamagedError",
    "DatasetError",
    "FineTuneConfig",
    "GateRejected",
    "NestedAdam",
    "NestedAdamW",
    "NestedTuneError",
    "SilentUpdateWarning",
    "Tier",
    "TierMap",
    "TierStats",
    "TrainingDiverged",
    "TrainingStopped",
    "UpdateNotApplied",
    "UpdateReport",
    "apply_flat_updates_to_nested",
    "assign_tiers",
    "load_config",
    "read_adapter",
    "verify_updates",
]
