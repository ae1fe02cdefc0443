"""mlx_lm.lora and its companions, as LORA.md and SERVER.md of mlx-lm say."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import yaml

from benchmarks.silent_failures.cases import Case
from benchmarks.silent_failures.tools.tool import (
    ANSWER_TOKENS,
    Tool,
    cut_in_half,
    first_question,
    make_mlx_lm_keys,
    name_fine_tune_type,
    served,
)

FIRST_STEP = r"^\s*(Iter \d+:|iter\s+train_loss)"
CHECKPOINT = "adapters/0000020_adapters.safetensors"


class MlxLm(Tool):
    """The trainer that MLX's own project publishes. It has no check of data and no clipping."""

    name = "mlx_lm.lora"
    checks = "no check; its evaluation (`--test`) and `generate` are run"
    packages: tuple[str, ...] = ("mlx-lm", "mlx")
    program: tuple[str, ...] = ("mlx_lm", "lora")
    key_of_the_type = "fine_tune_type"
    settings_of_its_own: Mapping[str, Any] = {}
    own_code = frozenset({"fuse-leaves-it-out"})

    def train(self, case: Case) -> None:
        self._train(case, "adapters")
        case.adapter = case.folder / "adapters"

    def _train(self, case: Case, out: str, *flags: str, data: str = "data") -> None:
        config = self._write_config(case, data)
        case.run(
            "after",
            [self.python, "-m", *self.program, "-c", config, "--adapter-path", out, *flags],
            FIRST_STEP,
        )

    def _write_config(self, case: Case, data: str) -> str:
        config = make_mlx_lm_keys(case, data) | {
            "train": True,
            self.key_of_the_type: name_fine_tune_type(case),
        }
        config |= self.settings_of_its_own
        (case.folder / "lora.yaml").write_text(
            yaml.safe_dump(config, sort_keys=False), encoding="utf-8"
        )
        return "lora.yaml"

    def judge(self, case: Case) -> None:
        self.evaluate(case)

    def evaluate(self, case: Case) -> None:
        (case.folder / "held-out").mkdir(exist_ok=True)
        shutil.copy(case.folder / case.held_out, case.folder / "held-out/test.jsonl")
        flags = ["--adapter-path", "adapters", "--data", "held-out", "--test", "--batch-size", "2"]
        case.run("after", [self.python, "-m", *self.program, "--model", case.base, *flags])

    def use(self, case: Case) -> None:
        self._ask(case, case.base, "--adapter-path", "adapters")

    def _ask(self, case: Case, model: str, *flags: str) -> None:
        command = [self.python, "-m", "mlx_lm", "generate", "--model", model, *flags]
        asked = ["--max-tokens", str(ANSWER_TOKENS), "--prompt", first_question(case)]
        case.run("use", [*command, *asked])

    def fuse(self, case: Case) -> None:
        out = "fused-2" if (case.folder / "fused").exists() else "fused"
        dequantize = ["--dequantize"] if case.settings.dequantize else []
        self._fuse(case, "--save-path", out, *dequantize)

    def gguf(self, case: Case) -> None:
        self._fuse(case, "--export-gguf", "--gguf-path", "model.gguf")

    def _fuse(self, case: Case, *flags: str) -> None:
        command = [self.python, "-m", "mlx_lm", "fuse", "--model", case.base]
        case.run("use", [*command, "--adapter-path", "adapters", *flags])

    def _server(self) -> list[str]:
        command = [self.python, "-m", "mlx_lm", "server"]
        return [*command, "--model", "base", "--adapter-path", "adapters"]

    def serve(self, case: Case) -> None:
        with served(case, self._server()) as ask:
            ask()

    def train_later(self, case: Case) -> None:
        self._train(case, "later-adapters", data="later")

    def serve_and_replace(self, case: Case) -> None:
        with served(case, self._server()) as ask:
            ask()
            shutil.copytree(case.folder / "later-adapters", case.adapter, dirs_exist_ok=True)
            ask()

    def train_half(self, case: Case) -> None:
        case.settings.iters //= 2
        self.train(case)

    def resume(self, case: Case) -> None:
        self._train(case, "adapters", "--resume-adapter-file", CHECKPOINT)

    def tear_checkpoint(self, case: Case) -> None:
        cut_in_half(case.folder / CHECKPOINT)

    def train_over_it(self, case: Case) -> None:
        self._train(case, "adapters")

    def train_beside_it(self, case: Case) -> None:
        self._train(case, "later-adapters")
