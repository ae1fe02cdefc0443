"""nested-tune, as README.md and docs/ say, with the checks that a configuration can switch on."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.silent_failures.cases import Case
from benchmarks.silent_failures.failures import LISTS
from benchmarks.silent_failures.tools.tool import (
    Tool,
    cut_in_half,
    make_mlx_lm_keys,
    name_fine_tune_type,
    served,
)

COMMAND = str(Path(sys.executable).with_name("nested-tune"))
# What training says first of a step.
FIRST_STEP = r"^(step 0:|warning: \w+: the update of step \d+)"
REGISTRY = ["--registry", "registry", "--name", "champ"]
FOLLOW_SECONDS = 60.0  # until a server answers with a promoted version


def write_config(case: Case, name: str = "lora.yaml", **values: Any) -> str:
    """The settings as a configuration file of nested-tune; returns its name."""
    settings = case.settings
    config: dict[str, Any] = make_mlx_lm_keys(case) | {
        "fine_tune_type": name_fine_tune_type(case),
        "training": {"max_grad_norm": settings.clip},
        "gate": {
            "samples": "fail",
            # It asks whether fusing into the base's own bits keeps the change.
            "check_fused": not (settings.full or settings.dequantize),
        },
    }
    if (case.folder / "questions.jsonl").exists():
        task = {"name": "held-out", "file": "questions.jsonl", "score": "contains", "min": 0.5}
        config["gate"]["tasks"] = [task]
    if settings.loss is not None:
        config["training"] |= {"loss": settings.loss, "loss_config": {"beta": settings.beta}}
        config["gate"]["samples"] = "warn"  # the tiny base says one sentence to all, trained or not
    if settings.all_answers:
        config["training"]["supervise"] = "all"
    (case.folder / name).write_text(
        yaml.safe_dump(config | values, sort_keys=False), encoding="utf-8"
    )
    return name


class NestedTune(Tool):
    """This project."""

    name = "nested-tune"
    checks = "`validate`; the gate, with `samples: fail` and `check_fused`; `verify` twice"
    lists = LISTS
    packages = ("nested-tune", "mlx", "mlx-lm")

    def check(self, case: Case) -> None:
        case.run("before", [COMMAND, "validate", "-c", write_config(case)])

    def train(self, case: Case) -> None:
        self._train(case, "--run-dir", "run")
        case.adapter = case.folder / "run/adapter"

    def _train(self, case: Case, *flags: str, config: str | None = None) -> None:
        case.run(
            "after", [COMMAND, "train", "-c", config or write_config(case), *flags], FIRST_STEP
        )

    def judge(self, case: Case) -> None:
        case.run("after", [COMMAND, "verify", "run/initial", "run/adapter"])
        if not case.settings.full:
            case.run("after", [COMMAND, "verify", "run/adapter", "--model", case.base])

    def use(self, case: Case) -> None:
        self.release(case)

    def release(self, case: Case) -> None:
        case.run("use", [COMMAND, "promote", "run", *REGISTRY])

    def evaluate(self, case: Case) -> None:
        case.run("after", [COMMAND, "evaluate", "run", "--data", case.held_out])

    def fuse(self, case: Case) -> None:
        out = "fused-2" if (case.folder / "fused").exists() else "fused"
        dequantize = ["--dequantize"] if case.settings.dequantize else []
        case.run(
            "use", [COMMAND, "export", "run", "--fused", out, "--model", case.base, *dequantize]
        )

    def gguf(self, case: Case) -> None:
        case.run("use", [COMMAND, "export", "run", "--gguf", "model.gguf"])

    def serve(self, case: Case) -> None:
        with served(case, [COMMAND, "serve", *REGISTRY]) as ask:
            ask()

    def train_later(self, case: Case) -> None:
        later = write_config(case, "later.yaml", data="later")
        self._train(case, "--run-dir", "later-run", config=later)

    def serve_and_replace(self, case: Case) -> None:
        with served(case, [COMMAND, "serve", *REGISTRY]) as ask:
            first = ask()
            case.run("use", [COMMAND, "promote", "later-run", *REGISTRY])
            end = time.monotonic() + FOLLOW_SECONDS
            while ask() == first and time.monotonic() < end:
                time.sleep(1)
            case.answers[:] = [first, case.answers[-1]]

    def train_half(self, case: Case) -> None:
        case.settings.iters //= 2
        self.train(case)

    def resume(self, case: Case) -> None:
        case.settings.iters *= 2
        self._train(case, "--run-dir", "run", "--resume")

    def lose_optimizer_state(self, case: Case) -> None:
        (self._checkpoint(case) / "optimizer.safetensors").unlink()

    def tear_checkpoint(self, case: Case) -> None:
        cut_in_half(self._checkpoint(case) / "adapters.safetensors")

    def _checkpoint(self, case: Case) -> Path:
        return max((case.folder / "run/checkpoints").glob("step-*"))

    def train_over_it(self, case: Case) -> None:
        self._train(case, "--run-dir", "later-run", "--adapter-path", "registry/champ/champion")

    def train_beside_it(self, case: Case) -> None:
        self._train(case, "--run-dir", "later-run", "--adapter-path", "elsewhere")
