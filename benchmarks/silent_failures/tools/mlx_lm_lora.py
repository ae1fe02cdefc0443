"""mlx-lm-lora, as its README says: a trainer like mlx_lm.lora that fuses when training ends."""

from __future__ import annotations

from types import MappingProxyType

from benchmarks.silent_failures.cases import BROKEN, Case
from benchmarks.silent_failures.tools.mlx_lm import MlxLm
from benchmarks.silent_failures.tools.tool import NotApplicable, Tool


class MlxLmLora(MlxLm):
    """Its supervised training; its README names mlx_lm.generate to use an adapter with."""

    name = "mlx-lm-lora"
    checks = "no check; its evaluation (`--test`) and mlx_lm's `generate` are run"
    packages = ("mlx-lm-lora", "mlx-lm", "mlx")
    program = ("mlx_lm_lora.train",)
    key_of_the_type = "train_type"
    settings_of_its_own = {"train_mode": "sft", "fuse": False}  # noqa: RUF012
    own_code = frozenset[str]()
    # Without it no training begins on Linux; see broken/sitecustomize.py.
    environment = MappingProxyType({"PYTHONPATH": str(BROKEN), "MAC_MEMORY": "1"})

    def judge(self, case: Case) -> None:
        self.use(case)  # first: `--test` writes adapter_config.json anew, from its defaults
        self.evaluate(case)

    def fuse(self, case: Case) -> None:
        if case.base != "base":
            raise NotApplicable("it fuses at the end of a training alone")
        # It has no flag for that: the same training on the base in 16 bits.
        unquantised = ["--model", "original"] if case.settings.dequantize else []
        self._train(case, "fused", "--fuse", *unquantised)

    gguf = Tool.gguf
    serve = Tool.serve
    train_later = Tool.train_later
    serve_and_replace = Tool.serve_and_replace
