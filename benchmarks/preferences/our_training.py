"""Train and judge with nested-tune: `python -m ...our_training SETTINGS.json RUN FIGURES.json`."""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nested_core import backend

backend.prepare()

import mlx.core as mx  # noqa: E402

from nested_core import FineTuneConfig, GateRejected, Steps, finetune, open_run  # noqa: E402
from nested_core.config.loading import parse_config  # noqa: E402
from nested_core.models.session import Session  # noqa: E402
from nested_core.records.result import TrainResult  # noqa: E402
from nested_core.storage.run_directory import RunDirectory  # noqa: E402


class _MeasuredSteps(Steps):
    """Steps of a fine-tune that measure seconds and memory of training."""

    measured: dict[str, Any]

    def train(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> TrainResult:
        """Train; the reference's likelihoods and evaluations are part of it."""
        mx.reset_peak_memory()
        begin = time.perf_counter()
        result = super().train(config, run, session)
        device = mx.device_info() if mx.default_device().type == mx.gpu else {}
        self.measured = {
            "training_seconds": time.perf_counter() - begin,
            "device_memory_gb": mx.get_peak_memory() / 1e9,
            "resident_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "device": str(device.get("device_name", mx.default_device())),
            "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
        }
        return result


def main(settings: dict[str, Any], folder: Path, figures: Path) -> None:
    """Train, judge, and write what was measured with the verdict on the preference."""
    run, steps = open_run(folder), _MeasuredSteps()
    try:
        finetune(parse_config(settings, source="the benchmark"), run, steps)
    except GateRejected as rejection:
        print(rejection, file=sys.stderr)
    gate = json.loads(run.gate.read_text("utf-8"))
    verdict = {key: gate[key] for key in ("reasons", "preferences")}
    figures.write_text(json.dumps(steps.measured | verdict))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2]), Path(sys.argv[3]))
