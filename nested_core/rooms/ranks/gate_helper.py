"""The program of a process that computes losses of the gate beside the one that judges.

A request is a configuration with the files of adapters, or batches, as lists of tokens and masks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nested_core import backend

if TYPE_CHECKING:
    from nested_core.rooms.ranks.gate_helpers import Compare

_state: dict[str, Any] = {}  # the session, which keeps the base, and what compares the adapters


def answer(request: Any) -> Any:
    """Load base and adapters, or answer with the shape and the numbers of each batch's losses."""
    if isinstance(request, list):
        compare: Compare = _state["compare"]
        batches: Any = [(np.array(row, np.int32), np.array(mask, bool)) for row, mask in request]
        return [
            {name: (v.shape, v.tolist()) for name, v in vars(one).items() if v is not None}
            for one in compare(batches)
        ]
    backend.prepare()
    backend.hide_torch_from_transformers()
    from nested_core.config.loading import parse_config
    from nested_core.measure.losses.held_out_loss import LoadedBase
    from nested_core.models.session import Session
    from nested_core.rooms.ranks.gate_helpers import comparing
    from nested_core.storage.safetensors_files import load_arrays

    _state.pop("compare", None)  # which has put layers of its own into the base
    config = parse_config(request["config"], source="the run's configuration")
    base = LoadedBase.load(config, _state.setdefault("session", Session()))
    _state["compare"] = comparing(base, [load_arrays(Path(file)) for file in request["adapters"]])
    return None
