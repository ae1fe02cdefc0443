"""Train with TRL's DPO trainer and PEFT: `python trl_training.py SETTINGS.json OUT FIGURES.json`.

Run by the Python of an environment with trl, transformers and peft, which the project does not
need. SETTINGS.json is the configuration that our own training gets (`make_config`), its initial
adapter in PEFT's format and the pairs of each batch. Optimizer and rate are the same: Adam with
bias correction and a constant rate, no clipping. The reference is a copy of the initial adapter, as
TRL has it for a model that comes with one. On a CPU all is float32, for that is what our training
computes in there. On a GPU the base has its own dtype and the factors float32, under autocast where
the base is bfloat16.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


class _TrainerInOrder(DPOTrainer):  # type: ignore[misc]
    """Takes the pairs of each batch from a list in place of its own sampler."""

    batches: list[list[int]]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches, once."""
        loader = DataLoader(
            self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared


def main(settings: dict[str, Any], out: Path, figures: Path) -> None:
    """Train, save the adapter, and write seconds and memory."""
    has_gpu = torch.cuda.is_available()
    lines = Path(settings["data"], "train.jsonl").read_text("utf-8").splitlines()
    rows = [_as_conversations(json.loads(line)) for line in lines]
    dtype = "auto" if has_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype)
    trainer = _TrainerInOrder(
        PeftModel.from_pretrained(model, settings["initial"], is_trainable=True),
        args=DPOConfig(
            output_dir=str(out / "trainer"),
            beta=settings["training"]["loss_config"]["beta"],
            max_steps=settings["iters"],
            per_device_train_batch_size=settings["batch_size"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=0.0,
            max_length=settings["max_seq_length"],
            gradient_checkpointing=False,
            bf16=model.dtype == torch.bfloat16,
            seed=settings["seed"],
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=not has_gpu,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
    )
    trainer.batches = settings["batches"]
    if len(trainer.train_dataset) != len(rows):
        raise SystemExit("TRL left out pairs, so that batches would hold others")
    first = trainer.train_dataset[0]
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    measured = {
        "training_seconds": seconds,
        "device_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if has_gpu else None,
        "resident_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "device": torch.cuda.get_device_name() if has_gpu else "cpu",
        "versions": {name: version(name) for name in ("trl", "peft", "transformers", "torch")},
        "log": [
            {key: one[key] for key in ("step", "loss", "rewards/accuracies", "rewards/margins")}
            for one in trainer.state.log_history
            if "loss" in one
        ],
        "first_row_tokens": {key: len(value) for key, value in first.items() if "ids" in key},
    }
    trainer.save_model(str(out))
    figures.write_text(json.dumps(measured))


def _as_conversations(pair: dict[str, str]) -> dict[str, Any]:
    """A pair as TRL's conversational format, so that it applies the chat template."""
    return {
        "prompt": [{"role": "user", "content": pair["prompt"]}],
        "chosen": [{"role": "assistant", "content": pair["chosen"]}],
        "rejected": [{"role": "assistant", "content": pair["rejected"]}],
    }


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2]), Path(sys.argv[3]))
