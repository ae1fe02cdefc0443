"""PEFT with transformers' Trainer, by a program as their quick tours have it (peft_trainer.py)."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

from benchmarks.silent_failures.cases import Case
from benchmarks.silent_failures.tools.tool import Tool, cut_in_half, first_question, read_output

PROGRAM = Path(__file__).with_name("peft_trainer.py")
FIRST_STEP = r"^\{'loss'"


class Peft(Tool):
    """The documented checks: Trainer's debug="underflow_overflow", PEFT's status of a model."""

    name = "peft"
    checks = "Trainer's `debug=underflow_overflow` and `evaluate`, PEFT's `get_model_status`"
    packages = ("peft", "transformers", "torch")
    own_code = frozenset({"fuse-leaves-it-out"})
    lacks = MappingProxyType(
        {
            "fuse-requantised-away": "transformers cannot read a base that MLX has quantised",
            "mask-off-by-one-turn": "the programs of its quick tours learn every token, so that no "
            "mask is there that could be off",
        }
    )
    environment = MappingProxyType({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})

    def _command(self, case: Case, step: str, **values: object) -> list[str]:
        settings = {
            "base": case.base,
            "train": "data/train.jsonl",
            "held_out": case.held_out,
            "output": "adapter",
            "adapter": "adapter",
            "question": first_question(case),
            "resume": "",
        }
        keys = [key.rpartition(".")[2] for key in case.settings.keys]
        shutil.copy(PROGRAM, case.folder / PROGRAM.name)
        (case.folder / "settings.json").write_text(
            json.dumps(asdict(case.settings) | settings | values | {"keys": keys}), encoding="utf-8"
        )
        return [self.python, PROGRAM.name, step, "settings.json"]

    def train(self, case: Case) -> None:
        case.run("after", self._command(case, "train"), FIRST_STEP)
        case.adapter = case.folder / "adapter"

    def judge(self, case: Case) -> None:
        case.run("after", self._command(case, "judge"))

    def use(self, case: Case) -> None:
        """Nothing is left to do: to judge an adapter is to load and to ask it."""

    def choose(self, case: Case) -> None:
        case.answers.append(read_output(case, self._command(case, "choose")))

    def evaluate(self, case: Case) -> None:
        self.judge(case)

    def fuse(self, case: Case) -> None:
        out = "fused-2" if (case.folder / "fused").exists() else "fused"
        case.run("use", self._command(case, "fuse", output=out))

    def train_half(self, case: Case) -> None:
        case.settings.iters //= 2
        self.train(case)

    def resume(self, case: Case) -> None:
        case.settings.iters *= 2
        command = self._command(case, "train", resume="adapter/checkpoint-20")
        case.run("after", command, FIRST_STEP)

    def lose_optimizer_state(self, case: Case) -> None:
        (case.folder / "adapter/checkpoint-20/optimizer.pt").unlink()

    def tear_checkpoint(self, case: Case) -> None:
        cut_in_half(case.folder / "adapter/checkpoint-20/adapter_model.safetensors")

    def train_over_it(self, case: Case) -> None:
        self.train(case)

    def train_beside_it(self, case: Case) -> None:
        case.run("after", self._command(case, "train", output="later-adapter"), FIRST_STEP)
