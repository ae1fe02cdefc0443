"""A trained real model, exported, in other programs: its tokens and answers beside mlx_lm's.

`python -m benchmarks.real_model.other_readers ROWS.jsonl EXPORT --base BASE --adapter ADAPTER
--questions QUESTIONS.jsonl`, where EXPORT is a file of `export --gguf`, read by llama.cpp, or a
folder of `export --peft`, read by transformers and PEFT. It appends a row: how many of
reference.json's 200 texts and of the questions' prompts the other program encodes to the same
tokens, how many questions it answers greedily with the same tokens as mlx_lm does with the
adapter in float32, and each question where the answers part. Needs mlx-lm, and llama-cpp-python,
or torch, transformers and peft.

Two programs add in another order, so their logits differ by rounding. How much is measured at each
token that both answers have, up to where they part: the margin of the likeliest token over the
second is computed by both programs, and the difference is what rounding does. Answers that part
where mlx_lm's margin is at most the largest difference are a tie; any other is a fault of the
export or the reader.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
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
from mlx_lm.generate import generate_step  # noqa: E402

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


@dataclass(frozen=True)
class Answers:
    """The tokens of two programs' answers to one question."""

    question: str
    prompt: list[int]
    ours: list[int]
    theirs: list[int]

    @property
    def agreed(self) -> int:
        """How many tokens both answers begin with."""
        pairs = zip(self.ours, self.theirs, strict=False)
        differing = (token for token, (one, other) in enumerate(pairs) if one != other)
        return next(differing, len(self.ours))


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
    answered: list[Answers] = []
    right = {"ours": 0, "theirs": 0}
    for question in questions:
        rendered = ours.render(question["messages"])
        prompt = ours.encode(rendered)
        if theirs.encode(rendered) != prompt:
            unequal.append(rendered)
        asked = question["messages"][-1]["content"]
        answers = Answers(asked, prompt, ours.answer(prompt), theirs.answer(prompt))
        right["ours"] += ours.decode(answers.ours) == question["expected"]
        right["theirs"] += ours.decode(answers.theirs) == question["expected"]
        if answers.agreed:
            rounding += differences_of_margins(ours, theirs, answers)
        answered.append(answers)
    parted = [answers for answers in answered if answers.ours != answers.theirs]
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
        "median_rounding": float(f"{np.median(rounding or [0.0]):.3g}"),
        "largest_rounding": float(f"{largest:.3g}"),
        "partings": [asdict(describe(ours, theirs, answers, largest)) for answers in parted],
    }


def differences_of_margins(ours: Program, theirs: Program, answers: Answers) -> list[float]:
    """How far apart the programs' margins of the likeliest token are, by token that both answer."""
    tokens = answers.prompt + answers.ours[: answers.agreed - 1]
    start = len(answers.prompt) - 1
    rows = [program.logits(tokens, start) for program in (ours, theirs)]
    second, first = np.argsort(rows[0], axis=-1)[:, -2:].T
    places = np.arange(answers.agreed)
    our_margins, their_margins = (row[places, first] - row[places, second] for row in rows)
    return [float(difference) for difference in np.abs(our_margins - their_margins)]


def describe(ours: MlxLm, theirs: Program, answers: Answers, rounding: float) -> Parting:
    """The first token of two answers that differs, and how close it was in both programs."""
    token = answers.agreed
    one, other = answers.ours[token], answers.theirs[token]
    before = answers.prompt + answers.ours[:token]
    our_row, their_row = (program.logits(before, len(before) - 1)[0] for program in (ours, theirs))
    our_margin = float(our_row[one] - our_row[other])
    return Parting(
        answers.question,
        token,
        ours.decode(answers.ours),
        ours.decode(answers.theirs),
        round(our_margin, 6),
        round(float(their_row[other] - their_row[one]), 6),
        our_margin <= rounding,
    )


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
        """As Program says; by mlx_lm's own generation."""
        said: list[int] = []
        for token, _ in generate_step(mx.array(prompt), self._model, max_tokens=MOST_TOKENS):
            said.append(int(token))
            if said[-1] in self._tokenizer.eos_token_ids:
                break
        return said

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
        """As Program says; by transformers' own generation."""
        given = self._torch.tensor([prompt])
        whole = self._model.generate(
            input_ids=given,
            attention_mask=self._torch.ones_like(given),
            do_sample=False,
            max_new_tokens=MOST_TOKENS,
        )
        said: list[int] = whole[0, len(prompt) :].tolist()
        return said

    def logits(self, tokens: list[int], start: int) -> Logits:
        """As Program says."""
        with self._torch.no_grad():
            rows: Logits = self._model(self._torch.tensor([tokens])).logits[0, start:].numpy()
        return rows


class LlamaCpp:
    """A GGUF in llama.cpp, on the CPU."""

    def __init__(self, file: Path) -> None:
        longest = {"rows": [], "questions": [], "prompts": [[0] * CONTEXT_TOKENS]}
        self._reader = LlamaCppReader(str(file), None, longest)
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
