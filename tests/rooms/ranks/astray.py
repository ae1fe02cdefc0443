"""A rank as nested_core.rooms.ranks.rank_worker is one, but rank 1 goes astray.

ASTRAY=bit changes elements of its parameters, after step 3, by the smallest amount; ASTRAY=nan
makes its gradients of that step not finite. At the eighth step of the process, ASTRAY=stop stops
it, once, which the file ASTRAY_ONCE remembers; ASTRAY=loop has it do nothing for ever. ASTRAY=slow
has both take up to ASTRAY_SECONDS longer for each step.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nested_core.rooms.ranks.rank_worker import main
from nested_core.training.train_step import TrainStep

STEP = 3
STEP_OF_WAIT = 8  # the first ones compile, and may take longer, as may those after a checkpoint


def wait_for_ever() -> None:
    while True:
        time.sleep(1)


def go_missing() -> None:
    if os.environ["ASTRAY"] == "loop":
        wait_for_ever()
    once = Path(os.environ["ASTRAY_ONCE"])
    if not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    run = TrainStep.run
    calls = 0

    def strayed(self: Any, *args: Any, **kwargs: Any) -> Any:
        global calls
        calls += 1
        if os.environ["ASTRAY"] in ("stop", "loop"):
            if calls == STEP_OF_WAIT:
                go_missing()
            return run(self, *args, **kwargs)
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
        changed[:64] = np.nextafter(
            changed[:64], np.float32(1)
        )  # a later update may round one back
        self.packed.parameters["tier0"] = mx.array(changed)
        return result

    if os.environ["ASTRAY"] == "slow":
        dice = random.Random(os.environ["MLX_RANK"])

        def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
            time.sleep(dice.uniform(0, float(os.environ["ASTRAY_SECONDS"])))
            return run(self, *args, **kwargs)

        TrainStep.run = slow  # type: ignore[method-assign]
    elif os.environ["MLX_RANK"] == "1":
        TrainStep.run = strayed  # type: ignore[method-assign]
    sys.exit(main(*sys.argv[1:]))
