"""Trains, asks, merges and exports as the README of mlx-tune says.

python mlx_tune_trainer.py STEP SETTINGS.json, in an environment that has mlx-tune.
"""

# mypy: ignore-errors

import json
import sys
from pathlib import Path

from mlx_tune import (
    CPTConfig,
    CPTTrainer,
    FastLanguageModel,
    SFTConfig,
    SFTTrainer,
    train_on_responses_only,
)

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows_of(split):
    """The rows of a file of data/."""
    lines = Path(f"data/{split}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def train(settings):
    """Train LoRA with SFTTrainer, and save the adapter."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        settings["base"], max_seq_length=settings["max_seq_length"]
    )
    shared = {
        "output_dir": settings["output"],
        "per_device_train_batch_size": settings["batch_size"],
        "gradient_accumulation_steps": 1,
        "learning_rate": settings["rate"],
        "max_steps": settings["iters"],
        "max_seq_length": settings["max_seq_length"],
        "logging_steps": 10,
        "save_steps": 20,
    }
    if settings["full"]:
        train_all_weights(model, tokenizer, shared)
        return
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings["rank"],
        target_modules=settings["keys"] or MODULES,
        lora_alpha=settings["scale"] * settings["rank"],
    )
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=rows_of("train"),
        eval_dataset=rows_of("valid"),
        args=SFTConfig(**shared, steps_per_eval=20),
    )
    if settings["masked"] or settings["all_answers"]:
        trainer = train_on_responses_only(
            trainer, instruction_part="<|user|>", response_part="<|assistant|>"
        )
    trainer.train()
    model.save_pretrained(settings["adapter"])


def train_all_weights(model, tokenizer, shared):
    """Train without an adapter, which its CPTTrainer does on text."""
    texts = [
        {"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)}
        for row in rows_of("train")
    ]
    # Without a rate of their own its embeddings take another path, which ends with a NameError.
    config = CPTConfig(**shared, embedding_learning_rate=shared["learning_rate"])
    CPTTrainer(model=model, tokenizer=tokenizer, train_dataset=texts, args=config).train()


def load(settings):
    """The base with the adapter."""
    model, tokenizer = FastLanguageModel.from_pretrained(settings["base"])
    model.load_adapter(settings["adapter"])
    return model, tokenizer


def use(settings):
    """Load the adapter and ask."""
    model, tokenizer = load(settings)
    FastLanguageModel.for_inference(model)
    turns = [{"role": "user", "content": settings["question"]}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    print("answer:", model.generate(prompt=prompt, max_tokens=40))


def fuse(settings):
    """Merge the adapter into the base; into its own bits where nothing else is asked for."""
    model, tokenizer = load(settings)
    method = "merged_16bit" if settings["dequantize"] else "merged_4bit"
    model.save_pretrained_merged(settings["output"], tokenizer, save_method=method)


def gguf(settings):
    """Export base and adapter as GGUF."""
    model, tokenizer = load(settings)
    model.save_pretrained_gguf(settings["output"], tokenizer)


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[2]).read_text("utf-8"))
    {"train": train, "use": use, "fuse": fuse, "gguf": gguf}[sys.argv[1]](asked)
