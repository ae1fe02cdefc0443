"""mlx-lm-lora, as its README says: a trainer like mlx_lm.lora that fuses when training ends."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import MappingProxyType

import yaml

from benchmarks.silent_failures.cases import BROKEN, Case
from benchmarks.silent_failures.tools.mlx_lm import MlxLm
from benchmarks.silent_failures.tools.tool import NotApplicable, Tool, make_mlx_lm_keys

PROGRAM = Path(__file__).with_name("mlx_lm_lora_checks.py")


class MlxLmLora(MlxLm):
    """Its supervised training; its README names mlx_lm.generate to use an adapter with."""

    name = "mlx-lm-lora"
    checks = (
        "`validate_model_support`, `inspect_dataset` and `check_training_config` of its MCP "
        "server; its evaluation (`--test`) and mlx_lm's `generate` are run"
    )
    packages = ("mlx-lm-lora", "mlx-lm", "mlx")
    program = ("mlx_lm_lora.train",)
    key_of_the_type = "train_type"
    settings_of_its_own = {"train_mode": "sft", "fuse": False}  # noqa: RUF012
    own_code = frozenset[str]()
    lacks = MappingProxyType(
        {
            "layer-never-updated": "it reads no `keys` and puts LoRA on every projection, so that "
            "each block is trained"
        }
    )
    # Without it no training begins on Linux; see broken/sitecustomize.py.
    environment = MappingProxyType({"PYTHONPATH": str(BROKEN), "MAC_MEMORY": "1"})

    def check(self, case: Case) -> None:
        config = self._write_config(case, "data")
        shutil.copy(PROGRAM, case.folder / PROGRAM.name)
        case.run("before", [self.python, PROGRAM.name, config])

    def _train(self, case: Case, out: str, *flags: str, data: str = "data") -> None:
        # All weights are an adapter that nothing loads; the folder that it fuses is a model.
        fused = ["--fuse"] if case.settings.full else []
        super()._train(case, out, *fused, *flags, data=data)

    def judge(self, case: Case) -> None:
        if not case.settings.full:
            self.evaluate(case)

    def use(self, case: Case) -> None:
        if case.settings.full:
            self._ask(case, "adapters")
        else:
            self._ask(case, case.base, "--adapter-path", "adapters")

    def evaluate(self, case: Case) -> None:
        # In a copy: `--test` writes the adapter's configuration anew, from the settings given here.
        settings = make_mlx_lm_keys(case, "held-out") | {"model": case.base, "batch_size": 2}
        (case.folder / "test.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        (case.folder / "held-out").mkdir(exist_ok=True)
        shutil.copy(case.folder / case.held_out, case.folder / "held-out/test.jsonl")
        shutil.copytree(case.adapter, case.folder / "tested", dirs_exist_ok=True)
        flags = ["--adapter-path", "tested", "--test"]
        case.run("after", [self.python, "-m", *self.program, "-c", "test.yaml", *flags])

    def fuse(self, case: Case) -> None:
        if case.base != "base":
            raise NotApplicable(
                "it fuses at the end of a training alone: its README's command without a training "
                "ends with `Must provide at least one of --train or --test`"
            )
        # It has no flag for that: the same training on the base in 16 bits.
        unquantised = ["--model", "original"] if case.settings.dequantize else []
        self._train(case, "fused", "--fuse", *unquantised)

    def gguf(self, case: Case) -> None:
        raise NotApplicable("no command of it writes a GGUF")

    serve = Tool.serve
    train_later = Tool.train_later
    serve_and_replace = Tool.serve_and_replace
