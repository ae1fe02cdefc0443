"""Losses and gradients by TRL itself, as a fixture for tests: `python trl_oracle.py FIXTURE.npz`.

Run in an environment with trl, torch and transformers (trl 1.16.0, torch 2.14.1, transformers
5.24.0 made the committed one), which the project does not need. DPO is the trainer's own
`_compute_loss` on a batch that TRL made; of ORPO and CPO (SimPO) the trainers' loss functions on
the log-likelihoods that TRL's `get_batch_logps` gives. ORPO's first term is that of the paper, on
the answer alone; TRL's trainer takes it over prompt and answer.

The model is a Llama of 2 layers. `tests/rooms/preferences/tiny_llama.py` has its weights from the
same generator, so that the fixture holds tokens, losses and gradients alone.
"""

from __future__ import annotations

import sys
import tempfile
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

WORDS = 40
SHAPE: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
}
PROMPTS = ("a b c", "d e", "f g h i", "j")
CHOSEN = ("k l m", "n o p q r", "s", "t u")
REJECTED = ("v w", "x y z", "k k l m n", "p")


def fill(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The values of a weight, from its name: the test has the same."""
    generator = np.random.default_rng([seed, *name.encode()])
    values = generator.normal(0, 0.5, shape)
    return (1 + 0.1 * values if len(shape) == 1 else values).astype(np.float32)


def make_model(seed: int) -> Any:
    """A Llama with weights of a seed."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.from_numpy(fill(name, tuple(weight.shape), seed)))
    return model.eval()


def make_tokenizer() -> Any:
    """A tokenizer of single letters."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    words |= {letter: 3 + number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def gradients(model: Any, loss: Any) -> dict[str, np.ndarray]:
    """The gradient of a loss with respect to every weight."""
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.numpy().copy() for name, weight in model.named_parameters()}


def main(path: str) -> None:
    """Write the fixture."""
    kept: dict[str, Any] = {}

    def keep(name: str, loss: Any, model: Any, **arrays: Any) -> None:
        kept[f"{name}/loss"] = np.array(float(loss))
        kept.update({f"{name}/{key}": np.asarray(value) for key, value in arrays.items()})
        for key, value in gradients(model, loss).items():
            kept[f"{name}/gradient/{key}"] = value

    policy, reference, tokenizer = make_model(1), make_model(2), make_tokenizer()
    pairs = [
        {"prompt": f"{p} ", "chosen": c, "rejected": r}
        for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    ]
    common = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": [],
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_dropout": False,
    }
    trainer = DPOTrainer(
        policy,
        ref_model=reference,
        args=DPOConfig(**common, beta=0.3),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    policy.eval()
    loss = trainer._compute_loss(policy, batch, False)
    keep("dpo", loss, policy, tokens=batch["input_ids"], mask=batch["completion_mask"])

    tokens = torch.from_numpy(kept["dpo/tokens"])
    labels = tokens.masked_fill(torch.from_numpy(kept["dpo/mask"]) == 0, -100)
    stub = SimpleNamespace(
        beta=0.3,
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=0.6,
        label_smoothing=0.1,
        accelerator=SimpleNamespace(device="cpu"),
    )
    for name, trainer_class in (("orpo", ORPOTrainer), ("simpo", CPOTrainer)):
        policy = make_model(1)
        logits = policy(tokens, attention_mask=(tokens != 0).long()).logits
        means = trainer_class.get_batch_logps(logits, labels, average_log_prob=True)
        chosen, rejected = means.chunk(2)
        if name == "orpo":
            losses = -chosen - trainer_class.odds_ratio_loss(stub, chosen, rejected)[0]
        else:
            losses = trainer_class.cpo_loss(stub, chosen, rejected)[0]
        keep(name, losses.mean(), policy)
    np.savez_compressed(path, **kept)


if __name__ == "__main__":
    main(sys.argv[1])
