"""The GGUF that the model was made of, in llama.cpp: the same tokens, logits and answers."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from mlx_lm.generate import generate_step

from benchmarks.real_model.make_model import GGUF_NAME, REFERENCE
from nested_core.rooms.export.asked import has_llama_cpp
from nested_core.rooms.export.llama_cpp_program import LlamaCppReader
from tests.example import DATA
from tests.real.conftest import MODEL

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not has_llama_cpp(), reason="no llama.cpp here: make real-test-llama"),
]

# llama.cpp rounds what it multiplies matrices of 4 bits with to 8 bits.
LARGEST_DISTANCE = 0.2  # of logits, relative to their norm about their mean; seen 0.09
SMALLEST_MARGIN = 0.5  # of the likeliest token over the second, below which answers part; seen 0.15
ANSWER_TOKENS = 16


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(REFERENCE.read_text())
    return read


@pytest.fixture(scope="module")
def llama() -> LlamaCppReader:
    file = str(MODEL.with_name(GGUF_NAME))
    return LlamaCppReader(file, None, {"rows": [], "questions": [], "prompts": [[0] * 128]})


@pytest.fixture(scope="module")
def mlx_model() -> tuple[Any, Any]:
    model, tokenizer, *_ = load(str(MODEL))
    model.set_dtype(mx.float32)
    return model, tokenizer


def last_logits(llama: LlamaCppReader, ids: list[int]) -> np.ndarray[Any, Any]:
    (rows,) = llama.logits(ids, [len(ids) - 1])
    last: np.ndarray[Any, Any] = rows[0]
    return last


def logits_of(model: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    return np.array(model(mx.array([ids]))[0].astype(mx.float32))


def test_the_200_texts_have_the_same_tokens(llama, reference) -> None:
    for expected in reference["texts"]:
        assert llama.encode(expected["text"]) == expected["ids"], expected["text"]


def test_the_logits_are_those_of_the_folder_but_for_rounding(llama, mlx_model, reference) -> None:
    model, _ = mlx_model
    for prompt in reference["prompts"]:
        ours, theirs = logits_of(model, prompt["ids"])[-1], last_logits(llama, prompt["ids"])
        distance = np.linalg.norm(ours - theirs) / np.linalg.norm(ours - ours.mean())
        assert distance < LARGEST_DISTANCE, prompt["messages"]


def test_answers_part_only_where_two_tokens_are_nearly_as_likely(llama, mlx_model) -> None:
    model, tokenizer = mlx_model
    rows = map(json.loads, (DATA / "held_out.jsonl").read_text().splitlines())
    for row in rows:
        prompt = list(tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True))
        theirs = llama.answer(prompt, ANSWER_TOKENS, [])["tokens"]
        ours = [
            int(token)
            for token, _ in generate_step(mx.array(prompt), model, max_tokens=len(theirs))
        ]
        parted = [step for step in range(len(theirs)) if ours[step] != theirs[step]]
        if parted:
            first, second = np.sort(logits_of(model, prompt + ours[: parted[0]])[-1])[:-3:-1]
            assert first - second < SMALLEST_MARGIN, (row, ours, theirs)
