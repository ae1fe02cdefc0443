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
from nested_core.training.train_step import TrainStep

STEP = 3

if __name__ == "__main__":
    run = TrainStep.run
    calls = 0

    def strayed(self: Any, *args: Any, **kwargs: Any) -> Any:
        global calls
        calls += 1
        if calls != STEP:
            return run(self, *args, **kwargs)
        own = self.packed.parameters
        if os.environ["ASTRAY"] == "nan":
            self.packed.parameters = {name: value * float("nan") for name, value in own.items()}
            result = run(self, *args, **kwargs)
            self.packed.parameters = own
            return result
        result = run(self, *args, **kwargs)
        changed = np.array(self.packed.parameters["tier0"])
        changed[5] = np.nextafter(changed[5], np.float32(1))
        self.packed.parameters["tier0"] = mx.array(changed)
        return result

    if os.environ["MLX_RANK"] == "1":
        TrainStep.run = strayed  # type: ignore[method-assign]
    sys.exit(main(*sys.argv[1:]))
