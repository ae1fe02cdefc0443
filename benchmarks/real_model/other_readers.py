"""A trained real model, exported, in other programs: its tokens and answers beside mlx_lm's.

`python -m benchmarks.real_model.other_readers ROWS.jsonl EXPORT --base BASE --adapter ADAPTER
--questions QUESTIONS.jsonl`, where EXPORT is a file of `export --gguf`, read by llama.cpp, or a
folder of `export --peft`, read by transformers and PEFT. It appends a row: how many of
reference.json's 200 texts and of the questions' prompts the other program encodes to the same
tokens, how many questions it answers greedily with the same tokens as mlx_lm does with the
adapter in float32, and each question where the answers part. Needs mlx-lm, and llama-cpp-python,
or torch, transformers and peft.

Two programs add in another order, so their logits differ by rounding. How much is measured at each
token of the answers that are equal: the margin of the likeliest token over the second is computed
by both programs, and the difference is what rounding does. Answers that part where mlx_lm's margin
is smaller than the largest difference are a tie; any other is a fault of the export or the reader.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nested_core import backend

backend.prepare()  # before anything imports mlx

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_map  # noqa: E402
from mlx_lm import load  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from benchmarks.real_model.make_model import REFERENCE  # noqa: E402
from nested_core.rooms.export.llama_cpp_program import LlamaCppReader  # noqa: E402

MOST_TOKENS = 32
CONTEXT_TOKENS = 1024
Logits = np.ndarray[Any, np.dtype[np.float32]]


class Program(Protocol):
    """A program that reads a model: its tokens, its greedy answers, and its logits.

    name: the program with its version.
    """

    name: str

    def encode(self, text: str) -> list[int]:
        """The token ids of a text; the texts of control tokens become those tokens."""

    def answer(self, prompt: list[int]) -> list[int]:
        """The likeliest tokens after a prompt, up to the end of the text, which is one of them."""

    def logits(self, tokens: list[int], start: int) -> Logits:
        """The logits after each token from `start` on, (tokens, vocabulary)."""


@dataclass(frozen=True)
class Parting:
    """A question that two programs answer differently, and the token where they part.

    token: how many tokens of the answers are equal before it.
    ours, theirs: the texts of the two answers.
    our_margin: by how much mlx_lm prefers its token over the other program's, in logits.
    their_margin: by how much the other program prefers its own over mlx_lm's, in logits.
    is_tie: whether mlx_lm's margin is within the rounding of the two programs.
    """

    question: str
    token: int
    ours: str
    theirs: str
    our_margin: float
    their_margin: float
    is_tie: bool


def main() -> None:
    """Append the row of one export, and end with an error if anything but a tie differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("export", type=Path)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--questions", type=Path, required=True)
    options = parser.parse_args()
    started = time.monotonic()
    ours = MlxLm(options.base, options.adapter)
    is_gguf = options.export.is_file()
    theirs = LlamaCpp(options.export) if is_gguf else Peft(options.base, options.export)
    lines = options.questions.read_text(encoding="utf-8").splitlines()
    row = compare(ours, theirs, [json.loads(line) for line in lines])
    row |= {
        "export": "gguf" if is_gguf else "peft",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.system()} {platform.machine()}",
        "seconds": round(time.monotonic() - started),
    }
    with options.rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(json.dumps(row, indent=1, ensure_ascii=False))
    if row["unequal_texts"] or not all(parting["is_tie"] for parting in row["partings"]):
        raise SystemExit("something differs that is no tie")


def compare(ours: MlxLm, theirs: Program, questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What two programs do with the same texts and questions."""
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))["texts"]
    unequal = [text["text"] for text in reference if theirs.encode(text["text"]) != text["ids"]]
    rounding: list[float] = []
    parted: list[tuple[str, list[int], list[int], list[int]]] = []
    right = {"ours": 0, "theirs": 0}
    for question in questions:
        asked = question["messages"][-1]["content"]
        rendered = ours.render(question["messages"])
        prompt = ours.encode(rendered)
        if theirs.encode(rendered) != prompt:
            unequal.append(rendered)
        our_answer, their_answer = ours.answer(prompt), theirs.answer(prompt)
        right["ours"] += ours.decode(our_answer) == question["expected"]
        right["theirs"] += ours.decode(their_answer) == question["expected"]
        if our_answer == their_answer:
            rounding += differences_of_margins(ours, theirs, prompt, our_answer)
        else:
            parted.append((asked, prompt, our_answer, their_answer))
    largest = max(rounding, default=0.0)
    return {
        "program": theirs.name,
        "beside": ours.name,
        "texts": len(reference) + len(questions),
        "unequal_texts": unequal,
        "questions": len(questions),
        "equal": len(questions) - len(parted),
        "right": right["ours"],
        "right_of_export": right["theirs"],
        "answer_tokens": len(rounding),
        "median_rounding": float(f"{np.median(rounding):.3g}"),
        "largest_rounding": float(f"{largest:.3g}"),
        "partings": [asdict(describe(ours, theirs, *words, largest)) for words in parted],
    }


def differences_of_margins(
    ours: Program, theirs: Program, prompt: list[int], answer: list[int]
) -> list[float]:
    """How far apart two programs' margins are of the likeliest token over the second, by token."""
    tokens = prompt + answer[:-1]
    rows = [program.logits(tokens, len(prompt) - 1) for program in (ours, theirs)]
    second, first = np.argsort(rows[0], axis=-1)[:, -2:].T
    places = np.arange(len(answer))
    our_margins, their_margins = (row[places, first] - row[places, second] for row in rows)
    return [float(difference) for difference in np.abs(our_margins - their_margins)]


def describe(
    ours: MlxLm,
    theirs: Program,
    question: str,
    prompt: list[int],
    our_answer: list[int],
    their_answer: list[int],
    rounding: float,
) -> Parting:
    """The first token of two answers that differs, and how close it was in both programs."""
    pairs = zip(our_answer, their_answer, strict=False)
    token = next(place for place, (one, other) in enumerate(pairs) if one != other)
    one, other = our_answer[token], their_answer[token]
    before = prompt + our_answer[:token]
    our_row, their_row = (program.logits(before, len(before) - 1)[0] for program in (ours, theirs))
    our_margin = float(our_row[one] - our_row[other])
    return Parting(
        question,
        token,
        ours.decode(our_answer),
        ours.decode(their_answer),
        round(our_margin, 6),
        round(float(their_row[other] - their_row[one]), 6),
        our_margin <= rounding,
    )


def answer_greedily(
    advance: Callable[[list[int]], int], prompt: list[int], ends: set[int]
) -> list[int]:
    """The tokens that `advance` gives, up to an end; it takes tokens and gives the next one."""
    said = [advance(prompt)]
    while said[-1] not in ends and len(said) < MOST_TOKENS:
        said.append(advance(said[-1:]))
    return said


class MlxLm:
    """The base with the adapter in mlx_lm, computed in float32."""

    def __init__(self, base: str, adapter: str) -> None:
        self.name = f"mlx_lm {version('mlx-lm')}, mlx {version('mlx')}"
        self._model, self._tokenizer, *_ = load(base, adapter_path=adapter)
        as_float32 = tree_map(lambda array: array.astype(mx.float32), self._model.parameters())
        self._model.update(as_float32)

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt of a chat, as text."""
        prompt: str = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return prompt

    def encode(self, text: str) -> list[int]:
        """As Program says."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: list[int]) -> str:
        """The text of an answer, without its end."""
        ends = self._tokenizer.eos_token_ids
        return str(self._tokenizer.decode([token for token in tokens if token not in ends]))

    def answer(self, prompt: list[int]) -> list[int]:
        """As Program says."""
        cache = make_prompt_cache(self._model)

        def advance(tokens: list[int]) -> int:
            return int(self._model(mx.array([tokens]), cache=cache)[0, -1].argmax().item())

        return answer_greedily(advance, prompt, self._tokenizer.eos_token_ids)

    def logits(self, tokens: list[int], start: int) -> Logits:
        """As Program says."""
        return np.array(self._model(mx.array([tokens]))[0, start:])


class Peft:
    """The base with the exported adapter in transformers and PEFT, in float32 on the CPU."""

    def __init__(self, base: str, folder: Path) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        packages = ("transformers", "peft", "torch")
        self.name = ", ".join(f"{package} {version(package)}" for package in packages)
        self._torch = torch
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self._model = PeftModel.from_pretrained(plain, folder).eval()

    def encode(self, text: str) -> list[int]:
        """As Program says."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def answer(self, prompt: list[int]) -> list[int]:
        """As Program says."""
        cache = None

        def advance(tokens: list[int]) -> int:
            nonlocal cache
            with self._torch.no_grad():
                given = self._torch.tensor([tokens])
                output = self._model(given, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            return int(output.logits[0, -1].argmax())

        return answer_greedily(advance, prompt, {self._tokenizer.eos_token_id})

    def logits(self, tokens: list[int], start: int) -> Logits:
        """As Program says."""
        with self._torch.no_grad():
            rows: Logits = self._model(self._torch.tensor([tokens])).logits[0, start:].numpy()
        return rows


class LlamaCpp:
    """A GGUF in llama.cpp, on the CPU."""

    def __init__(self, file: Path) -> None:
        longest = {"rows": [], "questions": [], "prompts": [[0] * CONTEXT_TOKENS]}
        self._reader = LlamaCppReader(str(file), longest)
        self.name = self._reader.name
        self.encode = self._reader.encode

    def answer(self, prompt: list[int]) -> list[int]:
        """As Program says."""
        tokens: list[int] = self._reader.answer(prompt, MOST_TOKENS, [])["tokens"]
        return tokens

    def logits(self, tokens: list[int], start: int) -> Logits:
        """As Program says."""
        (rows,) = self._reader.logits(tokens, list(range(start, len(tokens))))
        return rows


if __name__ == "__main__":
    main()
