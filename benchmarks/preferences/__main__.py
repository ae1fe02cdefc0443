"""A preference of style learnt from pairs: answers of one sentence, by us and by TRL.

    python -m benchmarks.preferences --model build/SmolLM2-135M-Instruct --out build/preferences \
        --rival-python ENVIRONMENT/bin/python

The base answers 500 prompts. An answer of several sentences gives a pair: its first sentence is
chosen, all of it is rejected. Both trainers get the same pairs, DPO, initial adapter, optimizer,
rate and batches in the same order. Then the base and both adapters answer fresh prompts, which
combine questions and subjects as no pair does. The share of answers that are one sentence is
compared by prompt; the loss on general text, seconds and memory stand beside it. Each figure is a
line of JSON, appended to OUT-rows.jsonl. What is in OUT and in that file already is not computed
again, so that a call that was cut off goes on; a call with a larger `--fresh` asks what no pair was
made of.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product, repeat
from pathlib import Path
from typing import Any

from nested_core import backend

backend.prepare()

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from benchmarks.preferences.answering import WEIGHTS, answer_in_worker, load_base  # noqa: E402
from nested_core.data.data_settings import DataSettings  # noqa: E402
from nested_core.data.dataset_loading import load_dataset  # noqa: E402
from nested_core.data.held_out_rows import as_test_set_alone  # noqa: E402
from nested_core.data.tokens.tokenizer_source import TokenizerSource  # noqa: E402
from nested_core.measure.losses.held_out_loss import LoadedBase  # noqa: E402
from nested_core.records.paired_difference import compare_pairs  # noqa: E402
from nested_core.rooms.peft import export_peft, import_peft  # noqa: E402
from nested_core.storage.safetensors_files import load_arrays  # noqa: E402
from nested_core.training.schedule.step_schedule import make_batch_order  # noqa: E402

HERE = Path(__file__).parent
FRAMES = (
    "What is {}?",
    "Explain {} to a child.",
    "Why is {} important?",
    "Tell me about {}.",
    "How does {} affect daily life?",
    "What should everyone know about {}?",
    "Describe {}.",
    "Where do people come across {}?",
    "What is the history of {}?",
    "Give me a fact about {}.",
    "Who works with {}?",
    "What is hard to understand about {}?",
    "How do I learn more about {}?",
    "What would happen without {}?",
    "Compare {} with something similar.",
    "What do experts say about {}?",
    "When did people first think about {}?",
    "What is a common mistake about {}?",
    "How is {} taught at school?",
    "Is {} the same everywhere?",
    "What does {} cost?",
    "What is the best thing about {}?",
    "What is the worst thing about {}?",
    "Can you summarise {}?",
)
SUBJECTS = HERE.joinpath("subjects.txt").read_text("utf-8").split()
END_OF_SENTENCE = re.compile(r"[.!?]+(?=\s|$)")
MIN_WORDS = 3
OURS, TRL = "ours", "trl"


def first_sentence(text: str) -> str:
    """The text up to its first end of a sentence; all of it where there is none."""
    end = END_OF_SENTENCE.search(text)
    return text if end is None else text[: end.end()].strip()


def is_one_sentence(text: str, *, is_endless: bool) -> bool:
    """Whether an answer ended by itself and is one sentence of a few words."""
    stripped = text.strip()
    ends = [end.end() for end in END_OF_SENTENCE.finditer(stripped)]
    return not is_endless and ends == [len(stripped)] and len(stripped.split()) >= MIN_WORDS


def make_config(options: argparse.Namespace) -> dict[str, Any]:
    """What both trainers are told. PyTorch's Adam corrects its bias; mlx's does where asked to."""
    return {
        "model": options.model,
        "data": str(options.out / "pairs"),
        "num_layers": -1,
        "batch_size": options.batch_size,
        "iters": options.pairs * options.epochs // options.batch_size,
        "learning_rate": options.learning_rate,
        "optimizer": "adam",
        "optimizer_config": {"adam": {"bias_correction": True}},
        "max_seq_length": 1024,
        "seed": options.seed,
        "lora_parameters": {"rank": 8, "scale": 10.0, "dropout": 0.0},
        "val_batches": -1,
        "training": {"loss": "dpo", "loss_config": {"beta": options.beta}},
        "gate": {
            "general_data": str(options.out / "general.jsonl"),
            "max_general_loss_increase": 1,
        },
    }


class Benchmark:
    """The model, the prompts and the folder of one call."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out
        prompts = [frame.format(subject) for frame, subject in product(FRAMES, SUBJECTS)]
        random.Random(0).shuffle(prompts)
        self.fresh, self.of_pairs = prompts[: options.fresh], prompts[options.fresh :]

    @property
    def base(self) -> LoadedBase:
        """The base, with an adapter's modules attached."""
        return load_base(json.dumps(make_config(self.options)))

    def rows(self, rows_done: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Each figure that `rows_done` lacks, with its name as `cell`."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_general_text(self.out / "general.jsonl", self.options.paragraphs)
        self.make_pairs()
        seed = self.options.seed
        before = list(self.answer("base", self.fresh[: self.options.fresh_of_base], None))
        after = {}
        for arm in (OURS, TRL):
            cell = f"training {arm} {seed}"
            if arm in self.options.arms and cell not in rows_done:
                yield {"cell": cell, **self.train(arm)}
            if not (self.adapter_of(arm) / WEIGHTS).is_file():
                continue
            answers = self.answer(f"{arm}-{seed}", self.fresh, self.adapter_of(arm))
            after[arm] = list(answers)
            if (cell := f"share base, {arm} {seed}") not in rows_done:
                yield {"cell": cell, **compare(before, after[arm][: len(before)])}
            if (cell := f"general loss {arm} {seed}") not in rows_done:
                yield {"cell": cell, **self.compare_general_loss(self.adapter_of(arm))}
        if len(after) == 2 and (cell := f"share {TRL}, {OURS} {seed}") not in rows_done:
            yield {"cell": cell, **compare(after[TRL], after[OURS])}

    def adapter_of(self, arm: str) -> Path:
        """The folder of what an arm trained, in mlx-lm's format."""
        name = f"{arm}-{self.options.seed}"
        return self.out / name / "adapter" if arm == OURS else self.out / f"{name}-converted"

    def answer(
        self, name: str, prompts: Sequence[str], adapter: Path | None
    ) -> Iterator[dict[str, Any]]:
        """Greedy answers in the order of the prompts, kept in a file as they come."""
        path = self.out / f"answers-{name}.jsonl"
        kept = read_lines(path)
        if [one["prompt"] for one in kept] != list(prompts[: len(kept)]):
            raise SystemExit(f"{path} has other prompts: give another --out")
        yield from kept
        for new in self._answer_the_rest(name, prompts[len(kept) :], adapter):
            append_lines(path, new)
            yield from new

    def _answer_the_rest(
        self, name: str, prompts: Sequence[str], adapter: Path | None
    ) -> Iterator[list[dict[str, Any]]]:
        """Answers of `--at-once` prompts at a time, by several processes, in order."""
        if not prompts:
            return
        at_once = self.options.at_once
        parts = [prompts[start : start + at_once] for start in range(0, len(prompts), at_once)]
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.options.processes, spawn)
        try:
            config = make_config(self.options)
            answered = pool.map(answer_in_worker, repeat(config), repeat(adapter), parts)
            for part, answers in zip(parts, answered, strict=True):
                say(f"{name}: {len(answers)} answers more")
                yield [
                    {"prompt": prompt, "text": one.text, "is_endless": one.is_endless}
                    for prompt, one in zip(part, answers, strict=True)
                ]
        finally:
            pool.shutdown(cancel_futures=True)

    def make_pairs(self) -> None:
        """Write train, valid and test of pairs: as many as asked for, and a fifth more of each."""
        folder = self.out / "pairs"
        held_out = max(self.options.pairs // 5, 8)
        ends = {"valid": held_out, "test": 2 * held_out, "train": self.options.pairs + 2 * held_out}
        if (folder / "train.jsonl").exists():
            return
        folder.mkdir(exist_ok=True)
        pairs: list[dict[str, str]] = []
        for answer in self.answer("of-pairs", self.of_pairs, None):
            whole, first = answer["text"].strip(), first_sentence(answer["text"].strip())
            if len(first) < len(whole) and len(first.split()) >= MIN_WORDS:
                pairs.append({"prompt": answer["prompt"], "chosen": first, "rejected": whole})
            if len(pairs) == ends["train"]:
                break
        else:
            raise SystemExit(f"{len(pairs)} answers gave a pair, and {ends['train']} are needed")
        start = 0
        for split, end in ends.items():
            append_lines(folder / f"{split}.jsonl", pairs[start:end])
            start = end

    def train(self, arm: str) -> dict[str, Any]:
        """Train in a process of its own; what it measured, and wall seconds of all of it."""
        folder = self.out / f"{arm}-{self.options.seed}"
        settings, figures = folder.with_suffix(".json"), folder.with_suffix(".figures.json")
        shutil.rmtree(folder, ignore_errors=True)
        config = make_config(self.options)
        environment = dict(os.environ)
        if arm == OURS:
            command = [sys.executable, "-m", "benchmarks.preferences.our_training"]
        else:
            config |= self.start()
            command = [self.options.rival_python, str(HERE / "trl_training.py")]
            environment["PYTHONPATH"] = self.options.rival_path
        settings.write_text(json.dumps(config), "utf-8")
        command += [str(settings), str(folder), str(figures)]
        say(" ".join(command))
        begin = time.perf_counter()
        subprocess.run(command, check=True, env=environment)
        seconds = time.perf_counter() - begin
        if arm == TRL:
            shutil.rmtree(self.adapter_of(TRL), ignore_errors=True)
            import_peft(folder, self.adapter_of(TRL), self.options.model)
        shown = ("pairs", "epochs", "batch_size", "learning_rate", "beta")
        told = {name: getattr(self.options, name) for name in shown}
        measured = json.loads(figures.read_text("utf-8"))
        return {**told, "process_seconds": seconds, **measured}

    def start(self) -> dict[str, Any]:
        """What our training began with, for TRL: its initial adapter, and the pairs of each batch.

        Pairs are counted from 0, in the order of train.jsonl.
        """
        ours = self.out / f"{OURS}-{self.options.seed}"
        initial = self.out / f"initial-{self.options.seed}"
        shutil.rmtree(initial, ignore_errors=True)
        export_peft(ours / "initial", initial, self.options.model)
        config = self.base.config
        tokenizer = TokenizerSource.from_config(config)
        split = load_dataset(DataSettings.from_config(config), tokenizer)[1]["train"]
        order = make_batch_order(config, split)
        batches = [split.lines[order.batch(index).rows] - 1 for index in range(config.iters)]
        return {"initial": str(initial), "batches": [pairs.tolist() for pairs in batches]}

    def compare_general_loss(self, adapter: Path) -> dict[str, float]:
        """The mean loss on general text of the base and of an adapter, in nats/token."""
        settings = replace(DataSettings.from_config(self.base.config), loss=None)
        tokenizer = TokenizerSource.from_config(self.base.config)
        with as_test_set_alone(self.out / "general.jsonl", settings) as alone:
            split = load_dataset(alone, tokenizer)[1]["test"]
        tensors = [self.base.parameters, load_arrays(adapter / WEIGHTS)]
        predictions = self.base.as_plain().compare_predictions(tensors, split)
        before, after = (float(own.sum() / predictions.tokens.sum()) for own in predictions.losses)
        return {"before": before, "after": after}


def write_general_text(path: Path, count: int) -> None:
    """Paragraphs of the project's own documents: text that no pair is about."""
    root = Path(__file__).parents[2]
    paragraphs = [
        paragraph.replace("\n", " ")
        for page in sorted((root / "docs").glob("*.md"))
        for paragraph in page.read_text("utf-8").split("\n\n")
        if paragraph[:1].isalpha() and len(paragraph) > 200
    ]
    lines = (json.dumps({"text": text}) + "\n" for text in paragraphs[:count])
    path.write_text("".join(lines))


def compare(before: Sequence[Any], after: Sequence[Any]) -> dict[str, Any]:
    """Shares of one sentence and the paired difference, after less before, with its 95 % interval.

    Also the mean length of an answer in words, and the share without an end.
    """
    first, second = score(before), score(after)
    difference = compare_pairs(first, second)
    return {
        "before": float(first.mean()),
        "after": float(second.mean()),
        "difference": difference.mean,
        "interval": [difference.low, difference.high],
        "prompts": len(before),
        "words": [
            float(np.mean([len(one["text"].split()) for one in own])) for own in (before, after)
        ],
        "endless": [float(np.mean([one["is_endless"] for one in own])) for own in (before, after)],
    }


def compare_all_seeds(out: Path, fresh: int) -> dict[str, Any] | None:
    """The difference of both arms over all seeds with `fresh` answers of both; None below two.

    Of each prompt the mean of its differences is taken, so that the interval is of prompts, for
    these seeds; `by_seed` shows how far trainings with other seeds lie apart.
    """
    seeds = sorted(int(path.stem.split("-")[2]) for path in out.glob(f"answers-{OURS}-*.jsonl"))
    found = {
        seed: [read_lines(out / f"answers-{arm}-{seed}.jsonl") for arm in (TRL, OURS)]
        for seed in seeds
    }
    whole = {seed: both for seed, both in found.items() if set(map(len, both)) == {fresh}}
    if len(whole) < 2:
        return None
    scores = np.array([[score(one) for one in both] for both in whole.values()])
    before, after = scores.mean(axis=0)
    difference = compare_pairs(before, after)
    return {
        "cell": f"share {TRL}, {OURS}, all seeds",
        "seeds": list(whole),
        "before": float(before.mean()),
        "after": float(after.mean()),
        "difference": difference.mean,
        "interval": [difference.low, difference.high],
        "by_seed": (scores[:, 1] - scores[:, 0]).mean(axis=1).tolist(),
        "prompts": len(before),
    }


def score(answers: Sequence[Any]) -> NDArray[np.float64]:
    """1 for each answer that is one sentence, else 0; float64 (answers,)."""
    return np.array(
        [is_one_sentence(one["text"], is_endless=one["is_endless"]) for one in answers], np.float64
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where there is no file, nor of a line cut off."""
    text = path.read_text("utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write objects at the end of a file of JSON lines, in one piece."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def say(text: str) -> None:
    """Tell whoever waits."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and write a line for each figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preferences", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rival-python", help="a Python that has trl, transformers and peft")
    parser.add_argument("--rival-path", default="", help="PYTHONPATH of the rival's process")
    parser.add_argument("--arms", nargs="*", choices=(OURS, TRL), help="what is trained; all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="that answer at the same time")
    parser.add_argument("--at-once", type=int, default=64, help="prompts of a process at a time")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--fresh", type=int, default=1500)
    parser.add_argument("--fresh-of-base", type=int, help="the base answers the first so many")
    parser.add_argument("--paragraphs", type=int, default=200, help="of general text")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    options = parser.parse_args()
    if options.arms is None:
        options.arms = [OURS, TRL] if options.rival_python else [OURS]
    path = options.out.parent / f"{options.out.name}-rows.jsonl"
    done = {row["cell"]: row for row in read_lines(path)}
    for row in Benchmark(options).rows(done):
        print(json.dumps(row), flush=True)
        append_lines(path, [row])
    row = compare_all_seeds(options.out, options.fresh)
    if row is not None and row != done.get(row["cell"]):
        print(json.dumps(row), flush=True)
        append_lines(path, [row])


if __name__ == "__main__":
    main()
