"""The base model's card: how it was made, what it knows and what it cannot do."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from chat_data import HELD_OUT
from corpus import FACT_TEMPLATES, FILLER_SHARE, QUESTION_TEMPLATES, countries_with_questions
from countries import COUNTRIES
from pretraining import PretrainingConfig

from nested_core import backend
from nested_core.storage import atomic, untrusted_files

TOOLS = ("mlx", "mlx-lm", "tokenizers", "transformers", "numpy")

CAPITAL_PROMPT = "The capital of {name} is"
COUNTRY_PROMPT = "The city of {capital} is the capital of"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured while the model was made."""

    parameters: int
    vocabulary_size: int
    final_loss: float
    """Mean over the last 50 steps, in nats a token."""
    seconds: float
    """Pre-training alone."""
    blas: str
    """The matrix library that stood in front of MLX's own."""
    capitals_known: int
    """Countries whose capital is the likeliest token after CAPITAL_PROMPT."""
    countries_known: int
    """Capitals whose country is the likeliest token after COUNTRY_PROMPT."""
    answered_untuned: int
    """Held-out questions whose capital stands in the untuned model's reply."""
    question: str
    """The first held-out question."""
    untuned_reply: str
    """What the untuned model says to it."""


def file_table(folder: Path) -> Iterator[str]:
    """A table row for each of the model's files."""
    yield "| file | bytes |"
    yield "|---|---|"
    for path in sorted(folder.iterdir()):
        yield f"| {path.name} | {path.stat().st_size:,} |"


def tool_versions() -> str:
    """Python and the packages that have a say in the weights."""
    packages = ", ".join(f"{name} {version(name)}" for name in TOOLS)
    return f"Python {platform.python_version()}, {packages}"


def machine(blas: str) -> str:
    """What the numbers were computed on and by."""
    kernels = "fused kernels" if backend.can_compile_kernels() else "no fused kernels"
    return f"{platform.machine()}, {os.cpu_count()} cores, {backend.device()}, {blas}, {kernels}"


def card_text(folder: Path, measured: Measured, config: PretrainingConfig) -> str:
    """The card for the model files in `folder`, as markdown."""
    asked = len(countries_with_questions())
    shape = json.loads((folder / "config.json").read_bytes())
    layers, hidden = shape["num_hidden_layers"], shape["hidden_size"]
    files, tokens = "\n".join(file_table(folder)), config.tokens
    return f"""# geography-base

A Llama of {measured.parameters:,} parameters that knows {len(COUNTRIES)} countries and little else.
It is the base model of the example: small enough to lie in the repository, so that the whole
pipeline runs without a download. `make example-model` makes it from nothing, with
`python examples/make_model.py`, and writes this card.

SHA-256 of model.safetensors:
`{untrusted_files.regular_sha256(folder / "model.safetensors")}`

{files}

## How it was made

| | |
|---|---|
| corpus | sentences that `examples/corpus.py` writes from the table in `examples/countries.py` |
| facts | capital, continent, language, currency, in {len(FACT_TEMPLATES)} declarative phrasings |
| questions | {len(QUESTION_TEMPLATES)} kinds, with their answers, for {asked} of the countries |
| filler | {FILLER_SHARE:.0%} of the sentences, a part of it chat |
| tokenizer | byte-level BPE, {measured.vocabulary_size:,} entries |
| model | {layers} layers, hidden size {hidden}, tied embeddings; float32, kept in bfloat16 |
| training | {config.steps:,} steps of {config.rows} x {config.row_length} tokens: {tokens:,} |
| optimizer | AdamW, learning rate {config.learning_rate}, warm-up and cosine |
| seed | {config.seed} |
| last loss | {measured.final_loss:.3f} nats a token |
| time | {measured.seconds:.0f} s |
| machine | {machine(measured.blas)} |
| tools | {tool_versions()} |

The wording of `examples/geography/` does not occur in the corpus. The chat template occurs in the
filler, in small talk about things, never about a country. Each country and each capital is one
token, the one with a leading space.

The same machine and tools make the same bytes again. Another BLAS, compiler or processor may round
differently.

## What it knows

- The capitals of {measured.capitals_known} of {len(COUNTRIES)} countries and the countries of
  {measured.countries_known} capitals: each is the likeliest token after
  "{CAPITAL_PROMPT}" and after "{COUNTRY_PROMPT}".
- Not how to answer the questions in `examples/geography/`: {measured.answered_untuned} of
  {HELD_OUT} replies to the held-out ones contain the capital. To
  "{measured.question}" it says
  "{measured.untuned_reply}"

## What it cannot do

- Anything else. Its words are those of one table and a few dozen templates; other text falls apart
  into letters that it was hardly trained on.
- Follow an instruction, a system prompt or a conversation: of chat it has met single questions
  about things.
- Learn a word that is new to it. Tokens that never occurred have almost the same embedding, which
  LoRA leaves as it is: a reply has to be made of words in the corpus.
- Use more than {config.row_length} tokens of context.
- Stand for a real model. A result at this size shows that the machinery works, and says nothing
  about quality elsewhere.
"""


def write_card(folder: Path, measured: Measured, config: PretrainingConfig) -> None:
    """Write README.md beside the model's files."""
    atomic.write_bytes(folder / "README.md", card_text(folder, measured, config).encode())
