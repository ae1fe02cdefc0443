"""A preference of style learnt from pairs: answers of one sentence, by us and by mlx-lm-lora.

    python -m benchmarks.preferences --model build/SmolLM2-135M-Instruct --out build/preferences \
        --rival-python ENVIRONMENT/bin/python

The base answers 500 prompts. An answer of several sentences gives a pair: its first sentence is
chosen, all of it is rejected. Both trainers get the same pairs, DPO, adapter, rate, batches and
steps. Then the base and both adapters answer fresh prompts, which combine questions and subjects as
no pair does. The share of answers that are one sentence is compared by prompt; the loss on general
text, seconds and memory stand beside it. Each figure is a line of JSON, in OUT-rows.jsonl too.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from nested_core import backend

backend.prepare()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import yaml  # noqa: E402

from nested_core.config.loading import parse_config  # noqa: E402
from nested_core.measure.losses.held_out_loss import LoadedBase  # noqa: E402
from nested_core.models.generation import Sampling, answer_prompts, encode_prompt  # noqa: E402
from nested_core.models.lora_attachment import load_adapter_tensors  # noqa: E402
from nested_core.models.parameters import in_evaluation_mode  # noqa: E402
from nested_core.records.paired_difference import compare_pairs  # noqa: E402
from nested_core.storage.safetensors_files import load_arrays  # noqa: E402

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
SUBJECTS = Path(__file__).with_name("subjects.txt").read_text("utf-8").split()
END_OF_SENTENCE = re.compile(r"[.!?]+(?=\s|$)")
MAX_TOKENS = 96
MIN_WORDS = 3
GENERAL_LINES = 200
# mlx-lm-lora 5.10.2 asks every device for a figure that Metal alone has: without it it ends.
RIVAL = """
import runpy, mlx.core as mx
if "max_recommended_working_set_size" not in mx.device_info():
    mx.device_info = lambda: {"max_recommended_working_set_size": 0}
    mx.set_wired_limit = lambda limit: 0
runpy.run_module("mlx_lm_lora.train", run_name="__main__")
"""


def first_sentence(text: str) -> str:
    """The text up to its first end of a sentence; all of it where there is none."""
    end = END_OF_SENTENCE.search(text)
    return text if end is None else text[: end.end()].strip()


def is_one_sentence(text: str, *, is_endless: bool) -> bool:
    """Whether an answer ended by itself and is one sentence of a few words."""
    stripped = text.strip()
    ends = [end.end() for end in END_OF_SENTENCE.finditer(stripped)]
    return not is_endless and ends == [len(stripped)] and len(stripped.split()) >= MIN_WORDS


def make_config(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What both trainers are told, under the names that they share."""
    return {
        "model": options.model,
        "data": str(options.out / "pairs"),
        "num_layers": -1,
        "batch_size": options.batch_size,
        "iters": options.pairs * options.epochs // options.batch_size,
        "learning_rate": options.learning_rate,
        "max_seq_length": 1024,
        "seed": 0,
        "lora_parameters": {"rank": 8, "scale": 10.0, "dropout": 0.0},
        **more,
    }


class Answering:
    """The base, and adapters of it one after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        config = parse_config(make_config(options), source="the benchmark")
        self.base = LoadedBase.load(config)

    def answer(self, prompts: Sequence[str], adapter: Path | None = None) -> list[Any]:
        """Greedy answers to questions of a user."""
        tensors = self.base.parameters if adapter is None else load_arrays(adapter)
        load_adapter_tensors(self.base.model, tensors)
        encoded = [encode_prompt(self.base.tokenizer, prompt) for prompt in prompts]
        with in_evaluation_mode(self.base.model):
            return answer_prompts(
                self.base.model, self.base.tokenizer, encoded, Sampling(MAX_TOKENS)
            )


def draw_prompts(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Prompts to make pairs of, and fresh ones."""
    prompts = [frame.format(subject) for frame, subject in product(FRAMES, SUBJECTS)]
    random.Random(0).shuffle(prompts)
    fresh = prompts[: options.fresh]
    return prompts[options.fresh :], fresh


def make_pairs(options: argparse.Namespace, answering: Answering, prompts: list[str]) -> None:
    """Write train, valid and test of pairs: as many as asked for, and a tenth more of each."""
    folder = options.out / "pairs"
    if (folder / "train.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    held_out = max(options.pairs // 5, 8)
    wanted = options.pairs + 2 * held_out
    pairs: list[dict[str, str]] = []
    for start in range(0, len(prompts), 64):
        asked = prompts[start : start + 64]
        for prompt, answer in zip(asked, answering.answer(asked), strict=True):
            whole, first = answer.text.strip(), first_sentence(answer.text.strip())
            if len(first) < len(whole) and len(first.split()) >= MIN_WORDS:
                pairs.append({"prompt": prompt, "chosen": first, "rejected": whole})
        say(f"{len(pairs)} of {wanted} pairs")
        if len(pairs) >= wanted:
            break
    if len(pairs) < wanted:
        raise SystemExit(f"{options.model} gave {len(pairs)} pairs, and {wanted} are needed")
    ends = {"valid": held_out, "test": 2 * held_out, "train": wanted}
    start = 0
    for split, end in ends.items():
        lines = (json.dumps(pair) + "\n" for pair in pairs[start:end])
        (folder / f"{split}.jsonl").write_text("".join(lines))
        start = end


def train_ours(options: argparse.Namespace) -> dict[str, Any]:
    """Train with nested-tune, judged; the figures of the run."""
    run = options.out / "ours"
    config = make_config(
        options,
        val_batches=-1,
        training={"loss": options.loss, "loss_config": {"beta": options.beta}},
        gate={"general_data": str(options.out / "general.jsonl"), "max_general_loss_increase": 1},
    )
    path = options.out / "ours.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "flows.cli", "train", "-c", path, "--run-dir", run]
    seconds, code = timed(command)
    gate = json.loads((run / "gate.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    memory = max((one.get("peak_memory_gb", 0) for one in metrics), default=0)
    reasons = [reason["code"] for reason in gate["reasons"]]
    shown = {"exit_code": code, "reasons": reasons, "preferences": gate["preferences"]}
    return {"seconds": seconds, "memory_gb": memory, **shown}


def train_theirs(options: argparse.Namespace) -> dict[str, Any]:
    """Train with mlx-lm-lora, which loads the base a second time as the reference."""
    config = make_config(
        options,
        train=True,
        train_mode=options.loss,
        train_type="lora",
        beta=options.beta,
        dpo_cpo_loss_type="sigmoid",
        adapter_path=str(options.out / "theirs"),
        fuse=False,
        val_batches=2,
        reference_model_path=options.model,
    )
    path = options.out / "theirs.yaml"
    path.write_text(yaml.safe_dump(config))
    seconds, code = timed([options.rival_python, "-c", RIVAL, "-c", path])
    return {"seconds": seconds, "exit_code": code}


def timed(command: Sequence[Any]) -> tuple[float, int]:
    """Wall seconds and exit code of a command, whose output is shown."""
    say(" ".join(map(str, command)))
    begin = time.perf_counter()
    code = subprocess.run(list(map(str, command)), check=False).returncode
    return time.perf_counter() - begin, code


def write_general_text(path: Path) -> None:
    """Paragraphs of the project's own documents: text that no pair is about."""
    root = Path(__file__).parents[2]
    paragraphs = [
        paragraph.replace("\n", " ")
        for page in sorted((root / "docs").glob("*.md"))
        for paragraph in page.read_text("utf-8").split("\n\n")
        if paragraph[:1].isalpha() and len(paragraph) > 200
    ]
    lines = (json.dumps({"text": text}) + "\n" for text in paragraphs[:GENERAL_LINES])
    path.write_text("".join(lines))


def general_loss(answering: Answering, options: argparse.Namespace, adapter: Path) -> list[float]:
    """The mean loss on general text of the base and of an adapter, in nats/token."""
    from nested_core.data.data_settings import DataSettings
    from nested_core.data.dataset_loading import load_dataset
    from nested_core.data.held_out_rows import as_test_set_alone
    from nested_core.data.tokens.tokenizer_source import TokenizerSource

    config = answering.base.config
    settings = replace(DataSettings.from_config(config), loss=None)
    with as_test_set_alone(options.out / "general.jsonl", settings) as alone:
        split = load_dataset(alone, TokenizerSource.from_config(config))[1]["test"]
    tensors = [answering.base.parameters, load_arrays(adapter)]
    predictions = answering.base.as_plain().compare_predictions(tensors, split)
    return [float(own.sum() / predictions.tokens.sum()) for own in predictions.losses]


def compare(name: str, before: list[bool], after: list[bool]) -> dict[str, Any]:
    """Shares and the paired difference, after less before, with its 95 % interval."""
    first, second = (np.array(own, np.float64) for own in (before, after))
    found = compare_pairs(first, second)
    return {
        "compared": name,
        "before": float(first.mean()),
        "after": float(second.mean()),
        "difference": found.mean,
        "interval": [found.low, found.high] if found.is_measurable else None,
        "prompts": len(before),
    }


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is measured, one after the other."""
    options.out.mkdir(parents=True, exist_ok=True)
    write_general_text(options.out / "general.jsonl")
    prompts, fresh = draw_prompts(options)
    answering = Answering(options)
    make_pairs(options, answering, prompts)

    def styles(adapter: Path | None) -> list[bool]:
        answers = answering.answer(fresh, adapter)
        return [is_one_sentence(one.text, is_endless=one.is_endless) for one in answers]

    base = styles(None)
    adapters = {}
    yield {"arm": "ours", **train_ours(options)}
    adapters["ours"] = options.out / "ours" / "adapter" / "adapters.safetensors"
    if options.rival_python:
        yield {"arm": "mlx-lm-lora", **train_theirs(options)}
        adapters["mlx-lm-lora"] = options.out / "theirs" / "adapters.safetensors"
        if not adapters["mlx-lm-lora"].is_file():
            say("mlx-lm-lora wrote no adapter: it is not compared")
            del adapters["mlx-lm-lora"]
    styled = {}
    for arm, adapter in adapters.items():
        styled[arm] = styles(adapter)
        yield compare(f"base, {arm}", base, styled[arm])
        losses = general_loss(answering, options, adapter)
        yield {"arm": arm, "general_loss_before": losses[0], "general_loss_after": losses[1]}
    if len(styled) == 2:
        yield compare("mlx-lm-lora, ours", styled["mlx-lm-lora"], styled["ours"])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    yield {"device": str(mx.default_device()), "peak_resident_gb_of_a_child": peak}


def say(text: str) -> None:
    """Tell whoever waits."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and write a line for each figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preferences", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rival-python", help="a Python that has mlx-lm-lora")
    parser.add_argument("--loss", default="dpo", choices=("dpo", "orpo"))
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--fresh", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    options = parser.parse_args()
    with (options.out.parent / f"{options.out.name}-rows.jsonl").open("a") as file:
        for row in rows(options):
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
