"""soup-cli on its MLX backend, as README.md and docs/ of Soup say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from benchmarks.silent_failures.cases import Case
from benchmarks.silent_failures.tools.tool import (
    ANSWER_TOKENS,
    NotApplicable,
    Tool,
    cut_in_half,
    first_question,
)

FIRST_STEP = r"^\s*iter\s+train_loss"
CHECKPOINT = "output/0000020_adapters.safetensors"
HELD_OUT = "data/valid.jsonl"
NGRAM = 8  # words; `data score` refuses a file to compare with that has a shorter row
VALIDATION_SHARE = 0.2  # of the training file, which it splits itself
# Its watchdog stops a training whose loss is above 3 for five reports, unless it is told otherwise;
# the tiny base begins at 7 to 17, in healthy folders too. NaN stops it at any threshold.
WATCHDOG_LOSS = 20.0
KEYS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


class Soup(Tool):
    """Soup with every check that works without PyTorch, which its MLX backend does not need.

    Its chat, merge, export, serve and live evaluation (`ship`, `eval gate`) read PEFT's adapters
    with PyTorch. `adapters check` reads PEFT's without it, into which `apple-adapter` converts.
    What its MLX backend writes is loaded by mlx_lm, as its code says. Its training takes no
    held-out rows and splits them from the training file; `data score` compares rows with a file of
    others, and is given those held out. An adapter is signed after the failure is planted in it: a
    tool that saves a wrong adapter signs that.
    """

    name = "soup-cli"
    backend = "MLX backend, no PyTorch"
    checks = (
        "`doctor --config`, `data validate`, `inspect`, `clean --dry-run` and `doctor`, "
        "`data score` with the held-out rows where these are long enough for it, "
        "`train --dry-run`, `loss_watchdog` (at a loss of 20, for the tiny base begins above 3, "
        "which it has), `rewind_log`, `why`, `apple-adapter --direction mlx-to-hf` with "
        "`adapters check`, `adapters sign`, `verify`, `audit`; not `ship` and `eval gate`, which "
        "need PyTorch. Its documentation says that its MLX backend is for Apple silicon"
    )
    packages = ("soup-cli", "mlx", "mlx-lm")

    def _soup(self) -> str:
        return str(Path(self.python).with_name("soup"))

    def _write_config(self, case: Case, output: str = "output") -> str:
        settings = case.settings
        if settings.full:
            raise NotApplicable("its MLX backend trains LoRA and DoRA alone")
        rows = len((case.folder / "data/train.jsonl").read_text("utf-8").splitlines())
        steps_an_epoch = -(-round(rows * (1 - VALIDATION_SHARE)) // settings.batch_size)
        training: dict[str, Any] = {
            "epochs": max(1, settings.iters // steps_an_epoch),
            "lr": settings.rate,
            "batch_size": settings.batch_size,
            "gradient_accumulation_steps": 1,
            "warmup_ratio": 0.0,
            "eval_steps": 20,
            "save_steps": 20,
            "max_grad_norm": settings.clip,
            "quantization": "none",
            "logging_steps": 1,  # `why` asks for thirty rows of metrics
            "loss_watchdog": True,
            "loss_watchdog_threshold": WATCHDOG_LOSS,
            "rewind_log": True,
            "lora": {
                "r": settings.rank,
                "alpha": int(settings.scale * settings.rank),
                "dropout": 0.0,
                "target_modules": list(settings.keys) or KEYS,
            },
        }
        data = {
            "train": "./data/train.jsonl",
            "format": "auto",
            "val_split": VALIDATION_SHARE,
            "max_length": settings.max_seq_length,
            "train_on_responses_only": settings.masked or settings.all_answers,
        }
        config = {"base": "./base", "task": "sft", "backend": "mlx", "data": data}
        config |= {"training": training, "output": f"./{output}"}
        (case.folder / "soup.yaml").write_text(
            yaml.safe_dump(config, sort_keys=False), encoding="utf-8"
        )
        return "soup.yaml"

    def check(self, case: Case) -> None:
        config = self._write_config(case)
        rows, length = "data/train.jsonl", str(case.settings.max_seq_length)
        for arguments in (
            ["doctor", "--config", config],
            ["data", "validate", rows],
            ["data", "inspect", rows],
            ["data", "clean", rows, "--dry-run"],
            ["data", "doctor", rows, "--model", "./base", "--max-length", length],
            ["train", "--config", config, "--dry-run"],
            ["data", "score", "--input", rows, *self._compare_with(case)],
        ):
            case.run("before", [self._soup(), *arguments])

    def _compare_with(self, case: Case) -> list[str]:
        lines = (case.folder / HELD_OUT).read_text("utf-8").splitlines()
        turns = [json.loads(line)["messages"] for line in lines]
        texts = [" ".join(str(turn["content"]) for turn in row) for row in turns]
        long_enough = all(len(text.split()) >= NGRAM for text in texts)
        return ["--benchmark-file", HELD_OUT] if long_enough else []

    def train(self, case: Case) -> None:
        self._train(case, "output")
        case.adapter = case.folder / "output"

    def _train(self, case: Case, output: str, *flags: str) -> None:
        config = self._write_config(case, output)
        command = [self._soup(), "train", "--config", config, "--yes", *flags]
        case.run("after", command, FIRST_STEP)
        case.run("after", [self._soup(), "why", self._run_id(case, output)])

    def _run_id(self, case: Case, output: str) -> str:
        described = json.loads((case.folder / output / "soup_run.json").read_text("utf-8"))
        return str(described["run_id"])

    def judge(self, case: Case) -> None:
        for arguments in (
            ["apple-adapter", "output", "--direction", "mlx-to-hf", "--output", "peft"],
            ["adapters", "check", "peft"],
            ["adapters", "sign", "output"],
            ["adapters", "verify", "output"],
            ["adapters", "audit", "output", "--config", "soup.yaml"],
        ):
            case.run("after", [self._soup(), *arguments])

    def use(self, case: Case) -> None:
        command = [self.python, "-m", "mlx_lm", "generate", "--model", case.base]
        flags = ["--adapter-path", "output", "--max-tokens", str(ANSWER_TOKENS)]
        case.run("use", [*command, *flags, "--prompt", first_question(case)])

    def release(self, case: Case) -> None:
        named = ["--run-id", self._run_id(case, "output"), "--name", "champ"]
        command = [self._soup(), "registry", "push", *named, "--data", "data/train.jsonl"]
        case.run("use", command)

    def evaluate(self, case: Case) -> None:
        raise NotApplicable("its commands that evaluate a model need PyTorch and PEFT's adapters")

    def fuse(self, case: Case) -> None:
        raise NotApplicable("soup merge needs PyTorch and reads PEFT's adapters alone")

    def gguf(self, case: Case) -> None:
        raise NotApplicable("soup export needs PyTorch and reads PEFT's adapters alone")

    def serve(self, case: Case) -> None:
        raise NotApplicable("soup serve needs PyTorch and reads PEFT's adapters alone")

    def train_later(self, case: Case) -> None:
        self.serve(case)

    def train_half(self, case: Case) -> None:
        case.settings.iters //= 2
        self.train(case)

    def resume(self, case: Case) -> None:
        case.settings.iters *= 2
        self._train(case, "output", "--resume", CHECKPOINT)

    def tear_checkpoint(self, case: Case) -> None:
        cut_in_half(case.folder / CHECKPOINT)

    def train_over_it(self, case: Case) -> None:
        self._train(case, "output")

    def train_beside_it(self, case: Case) -> None:
        self._train(case, "later-output")
