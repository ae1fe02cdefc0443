"""A rank as nested_core.pipeline.rank_worker is one, but rank 1 goes astray at step 3.

ASTRAY=bit changes one element of its parameters, after the step, by the smallest amount; ASTRAY=nan
makes its gradients of that step not finite.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import mlx.core as mx
import numpy as np

from nested_core.pipeline.rank_worker import main
from nested_core.training.engine import Engine

STEP = 3

if __name__ == "__main__":
    take = Engine.take

    def strayed(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_time = args[2] == STEP - 1
        if is_time and os.environ["ASTRAY"] == "nan":
            held = self._params
            self._params = {name: value * float("nan") for name, value in held.items()}
            taken = take(self, *args, **kwargs)
            self._params = held
            return taken
        taken = take(self, *args, **kwargs)
        if is_time:
            own = np.array(self._params["tier0"])
            own[5] = np.nextafter(own[5], np.float32(1))
            self._params["tier0"] = mx.array(own)
        return taken

    if os.environ["MLX_RANK"] == "1":
        Engine.take = strayed  # type: ignore[method-assign]
    sys.exit(main(*sys.argv[1:]))
