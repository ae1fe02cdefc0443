"""Trains, judges and fuses as the quick tours of PEFT and of transformers' Trainer say.

python peft_trainer.py STEP SETTINGS.json, in an environment that has torch, transformers and peft.
"""

# mypy: ignore-errors

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)


class Steps:
    """What the settings ask for; each method is a step."""

    def __init__(self, settings):
        self.settings = settings
        self.tokenizer = AutoTokenizer.from_pretrained(settings["base"])
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def train(self):
        """Train LoRA, or all weights, and save them."""
        settings = self.settings
        model = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=torch.bfloat16)
        if not settings["full"]:
            lora = LoraConfig(
                task_type=TaskType.CAUSAL_LM,
                r=settings["rank"],
                lora_alpha=settings["scale"] * settings["rank"],
                lora_dropout=0.0,
                target_modules=settings["keys"] or "all-linear",
            )
            model = get_peft_model(model, lora)
            model.print_trainable_parameters()
        arguments = TrainingArguments(
            output_dir=settings["output"],
            max_steps=settings["iters"],
            learning_rate=settings["rate"],
            per_device_train_batch_size=settings["batch_size"],
            max_grad_norm=settings["clip"],
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=20,
            save_strategy="steps",
            save_steps=20,
            load_best_model_at_end=True,
            debug="underflow_overflow",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = self._trainer(model, arguments)
        trainer.train(resume_from_checkpoint=settings["resume"] or None)
        model.save_pretrained(settings["output"])
        if isinstance(model, PeftModel):
            print(model.get_model_status())

    def judge(self):
        """Load the adapter onto the base, evaluate it on held-out rows, and ask it."""
        model = self._load()
        status = model.get_model_status() if isinstance(model, PeftModel) else None
        print(status)
        arguments = TrainingArguments(
            output_dir="evaluation", use_cpu=True, report_to="none", disable_tqdm=True
        )
        print(self._trainer(model, arguments).evaluate())
        turns = [{"role": "user", "content": self.settings["question"]}]
        prompt = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False)
        answer = tokens[0, prompt["input_ids"].shape[1] :]
        print("answer:", self.tokenizer.decode(answer, skip_special_tokens=True))

    def choose(self):
        """Print the losses of the turns of choices.jsonl as turn_losses.py does."""
        model = self._load()
        lines = Path("choices.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line)["messages"] for line in lines]
        with model.disable_adapter():
            before = self._measure(model, rows)
        after = self._measure(model, rows)
        print(json.dumps({turn: [before[turn], after[turn]] for turn in before}))

    def _measure(self, model, rows):
        losses = {}
        for messages in rows:
            shown = [
                self.tokenizer.apply_chat_template(messages[:number], tokenize=False)
                if number
                else ""
                for number in range(len(messages) + 1)
            ]
            encoded = [self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in shown]
            tokens = torch.tensor([encoded[-1]])
            with torch.no_grad():
                logits = model(input_ids=tokens).logits[0, :-1].float()
            by_token = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
            for number in range(len(messages)):
                turn = shown[number + 1][len(shown[number]) :]
                first = max(len(encoded[number]) - 1, 0)
                loss = float(by_token[first : len(encoded[number + 1]) - 1].mean())
                losses.setdefault(turn, round(loss, 3))
        return losses

    def fuse(self):
        """Merge the adapter into the base, and save that as a model."""
        merged = self._load().merge_and_unload()
        merged.save_pretrained(self.settings["output"])
        self.tokenizer.save_pretrained(self.settings["output"])

    def _load(self):
        if self.settings["full"]:
            return AutoModelForCausalLM.from_pretrained(self.settings["adapter"])
        base = AutoModelForCausalLM.from_pretrained(self.settings["base"])
        return PeftModel.from_pretrained(base, self.settings["adapter"])

    def _trainer(self, model, arguments):
        return Trainer(
            model=model,
            args=arguments,
            train_dataset=self._rows(self.settings["train"]),
            eval_dataset=self._rows(self.settings["held_out"]),
            processing_class=self.tokenizer,
            data_collator=DataCollatorForLanguageModeling(self.tokenizer, mlm=False),
        )

    def _rows(self, file):
        lines = Path(file).read_text("utf-8").splitlines()
        return [self._encode(json.loads(line)) for line in lines]

    def _encode(self, row):
        return self.tokenizer.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            truncation=True,
            max_length=self.settings["max_seq_length"],
            return_dict=True,
        )


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[2]).read_text("utf-8"))
    getattr(Steps(asked), sys.argv[1])()
