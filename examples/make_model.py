"""Make the example model and its data set again from nothing: `python examples/make_model.py`.

A few minutes on two CPU cores. Everything is seeded and nothing is downloaded. A model that lacks a
fact, or that answers before it is tuned, does not replace the one that is there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from random import Random
from typing import Any

from nested_core import backend
from nested_core.storage import atomic

# isort: split
import mlx.core as mx
from chat_data import question, reply, split_countries, write_chat_data
from corpus import every_sentence, fill, token_rows
from countries import COUNTRIES
from mlx import nn
from mlx_lm import generate, load
from model_card import CAPITAL_PROMPT, COUNTRY_PROMPT, Measured, write_card
from model_files import END_ID, architecture, save_model, train_tokenizer
from pretraining import PretrainingConfig, build_model, pretrain
from tokenizers import Tokenizer

from nested_core.backend import to_int
from nested_core.optim.named_updates import flatten

EXAMPLES = Path(__file__).resolve().parent
MODEL_FOLDER, DATA_FOLDER = "geography-base", "geography"
REPLY_TOKENS = 24
MOST_ANSWERED_UNTUNED = 2


def make_tokenizer(seed: int) -> Tokenizer:
    """The tokenizer of the corpus and of the chat wording, with every name one token."""
    chat = [text(country) for country in COUNTRIES for text in (question, reply)]
    tokenizer = train_tokenizer([*every_sentence(Random(seed)), *chat])
    names = [name for country in COUNTRIES for name in (country.name, country.capital)]
    split = [name for name in names if len(tokenizer.encode(f" {name}").ids) != 1]
    if split:
        raise SystemExit(f"names that are more than one token: {split}")
    return tokenizer


def likeliest_next(model: nn.Module, tokens: list[int]) -> int:
    """The token that the model holds likeliest after `tokens`."""
    return to_int(mx.argmax(model(mx.array([tokens]))[0, -1]))


def facts_known(model: nn.Module, tokenizer: Any, prompt: str, answer: str) -> int:
    """For how many countries the field `answer` is the likeliest token after `prompt`, filled."""
    known = 0
    for country in COUNTRIES:
        (expected,) = tokenizer.encode(" " + getattr(country, answer))
        known += likeliest_next(model, tokenizer.encode(fill(prompt, country))) == expected
    return known


def chat_reply(model: nn.Module, tokenizer: Any, text: str) -> str:
    """The model's greedy reply to one user message."""
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return str(generate(model, tokenizer, prompt=prompt, max_tokens=REPLY_TOKENS))


def measure(folder: Path, **training: Any) -> Measured:
    """Load the files just written and look at what the model knows."""
    model, tokenizer, *_ = load(str(folder))
    _, _, held_out = split_countries()
    replies = {country: chat_reply(model, tokenizer, question(country)) for country in held_out}
    return Measured(
        parameters=sum(value.size for value in flatten(model).values()),
        vocabulary_size=len(tokenizer),
        blas=backend.prepare() or "the BLAS that MLX brings",
        capitals_known=facts_known(model, tokenizer, CAPITAL_PROMPT, "capital"),
        countries_known=facts_known(model, tokenizer, COUNTRY_PROMPT, "name"),
        answered_untuned=sum(country.capital in said for country, said in replies.items()),
        question=question(held_out[0]),
        untuned_reply=replies[held_out[0]],
        **training,
    )


def refuse_unfit(measured: Measured) -> None:
    """Stop if the model lacks a fact, or answers the fine-tuning question before it is tuned."""
    known = min(measured.capitals_known, measured.countries_known)
    if known < len(COUNTRIES):
        raise SystemExit(
            f"Only {known} of {len(COUNTRIES)} capitals are known in both directions: nothing was "
            "replaced. Train for more steps (PretrainingConfig)."
        )
    if measured.answered_untuned > MOST_ANSWERED_UNTUNED:
        raise SystemExit(
            f"{measured.answered_untuned} of the held-out questions are answered before tuning, at "
            f"most {MOST_ANSWERED_UNTUNED} should be: nothing was replaced. Try another seed."
        )


def make_model(target: Path, config: PretrainingConfig) -> None:
    """Pre-train the base model and put its folder at `target`, replacing what is there."""
    tokenizer = make_tokenizer(config.seed)
    shape = architecture(tokenizer.get_vocab_size(), config.row_length)
    model = build_model(shape, config.seed)
    rows = token_rows(
        Random(config.seed), lambda text: tokenizer.encode(text).ids, END_ID, config.row_length + 1
    )
    started = time.perf_counter()
    final_loss = pretrain(model, rows, config)
    seconds = time.perf_counter() - started
    with atomic.new_directory(target, replace=True) as folder:
        save_model(folder, model, tokenizer, shape)
        measured = measure(folder, final_loss=final_loss, seconds=seconds)
        refuse_unfit(measured)
        write_card(folder, measured, config)


def main() -> None:
    """Write the model, unless told not to, and then the data set that goes with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-only", action="store_true", help="write the data set alone")
    parser.add_argument("--out", type=Path, default=EXAMPLES, help="folder to write into")
    arguments = parser.parse_args()
    if not arguments.data_only:
        make_model(arguments.out / MODEL_FOLDER, PretrainingConfig())
    write_chat_data(arguments.out / DATA_FOLDER)


if __name__ == "__main__":
    main()
