"""mlx-tune, by a program as its README has it (mlx_tune_trainer.py)."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from benchmarks.silent_failures.cases import Case
from benchmarks.silent_failures.tools.tool import Tool, first_question

PROGRAM = Path(__file__).with_name("mlx_tune_trainer.py")
FIRST_STEP = r"^\s*(Iter \d+:|iter\s+train_loss|Starting training for)"


class MlxTune(Tool):
    """Its SFTTrainer, and its CPTTrainer where all weights are trained. It reads no flags."""

    name = "mlx-tune"
    checks = "no check; rows held out are evaluated in training (`eval_dataset`)"
    packages = ("mlx-tune", "mlx-lm", "mlx")

    def __init__(self, python: str) -> None:
        super().__init__(python)
        # Its export to GGUF calls the program mlx_lm.fuse.
        programs = Path(python).parent.absolute()
        self.environment = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}

    def _run(self, case: Case, step: str, *, output: str = "outputs", adapter: str = "") -> None:
        settings = asdict(case.settings) | {
            "base": case.base,
            "output": output,
            "adapter": adapter,
            "question": first_question(case),
            "keys": [key.rpartition(".")[2] for key in case.settings.keys],
        }
        (case.folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        shutil.copy(PROGRAM, case.folder / PROGRAM.name)
        command = [self.python, PROGRAM.name, step, "settings.json"]
        if step == "train":
            case.run("after", command, FIRST_STEP)
        else:
            case.run("use", command)

    def train(self, case: Case) -> None:
        self._run(case, "train", adapter="lora_model")
        case.adapter = case.folder / "lora_model"

    def use(self, case: Case) -> None:
        if not case.settings.full:  # its documentation says of no way to load full weights
            self._run(case, "use", adapter="lora_model")

    def fuse(self, case: Case) -> None:
        fused = case.folder / "fused"
        number = 2 if fused.exists() else 1
        # It prints the folder's name: the first and the second differ by a number alone, so that
        # no line of one is new beside the other's.
        output = case.folder / f"merged-{number}"
        self._run(case, "fuse", output=output.name, adapter="lora_model")
        output.rename(fused if number == 1 else fused.with_name("fused-2"))

    def gguf(self, case: Case) -> None:
        self._run(case, "gguf", output="model.gguf", adapter="lora_model")

    def train_over_it(self, case: Case) -> None:
        self.train(case)

    def train_beside_it(self, case: Case) -> None:
        self._run(case, "train", output="later-outputs", adapter="later_model")
