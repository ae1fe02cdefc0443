"""A rank as nested_core.training.rank is one, but rank 1 goes astray after step 3."""

from __future__ import annotations

import os
import sys
from typing import Any

import mlx.core as mx
import numpy as np

from nested_core.training.engine import Engine
from nested_core.training.rank import main

STEP = 3

if __name__ == "__main__":
    take = Engine.take

    def strayed(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken = take(self, *args, **kwargs)
        if taken[0].first_iteration == STEP - 1:
            own = np.array(self._params["tier0"])
            own[5] = np.nextafter(own[5], np.float32(1))
            self._params["tier0"] = mx.array(own)
        return taken

    if os.environ["MLX_RANK"] == "1":
        Engine.take = strayed  # type: ignore[method-assign]
    sys.exit(main(*sys.argv[1:]))
