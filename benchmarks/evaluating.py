"""500 questions on the example: `evaluate` against the gate's own asking of the same models.

`python -m benchmarks.evaluating`: processor seconds of both, in turns, each from the files on disk
to the figures of a suite. No answer is kept from one turn to the next.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from nested_core import backend

backend.prepare()

from benchmarks.timing import report  # noqa: E402
from examples.countries import COUNTRIES  # noqa: E402
from nested_core import evaluate, finetune, load_config, open_run  # noqa: E402
from nested_core.config.schema import FineTuneConfig  # noqa: E402
from nested_core.config.sections import TaskSection  # noqa: E402
from nested_core.gate.checks.tasks import AskedModel, ask_model  # noqa: E402
from nested_core.measure.answers.answer_bounds import judge_answers  # noqa: E402
from nested_core.measure.answers.suite_answers import encode_suites, read_suites  # noqa: E402
from nested_core.measure.losses.held_out_loss import LoadedBase  # noqa: E402
from nested_core.storage.adapter import read_adapter  # noqa: E402
from nested_core.storage.run_directory import RunDirectory  # noqa: E402
from nested_core.storage.user_cache import CACHE_VARIABLE  # noqa: E402

REPEATS = 5
GATE, EVALUATE = "the gate's asking", "evaluate"
EXAMPLE = Path(__file__).parents[1] / "examples"
PROMPTS = (
    "I want to see {}. Where to?",
    "What is the capital of {}?",
    "Where do they rule {} from?",
    "A city in {}, please.",
    "Tell me of {}.",
)


def main() -> None:
    """Train the example for some steps, then ask it by either way."""
    os.chdir(EXAMPLE.parent)
    with tempfile.TemporaryDirectory() as folder:
        file = _write_suite(Path(folder, "questions.jsonl"))
        task = TaskSection(name="capitals", file=str(file), score="contains", max_tokens=16)
        config = load_config(EXAMPLE / "geography.yaml", {"iters": 60})
        run = open_run(Path(folder, "run"))
        finetune(config, run, progress=False)
        gate = config.gate.model_copy(update={"tasks": (task,)})
        config = config.model_copy(update={"gate": gate})
        arms: dict[str, Callable[[], object]] = {
            GATE: partial(_ask_as_the_gate_does, run, config),
            EVALUATE: partial(evaluate, [run.path], suites=[task]),
        }
        report("evaluating", _time_in_turn(arms, Path(folder)), GATE)


def _ask_as_the_gate_does(run: RunDirectory, config: FineTuneConfig) -> None:
    """Base and candidate from disk, asked every question and compared."""
    base = LoadedBase.load(config)
    suites = encode_suites(read_suites(config.gate), base.tokenizer, base.folder)
    records = [
        *ask_model(AskedModel("base", base, None), suites),
        *ask_model(AskedModel("candidate", base, read_adapter(run.adapter)), suites),
    ]
    judge_answers(config.gate, records)


def _time_in_turn(arms: Mapping[str, Callable[[], object]], folder: Path) -> dict[str, list[float]]:
    """Processor seconds of all threads, A B A B ...; the first pair is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(REPEATS + 1):
        for name, work in arms.items():
            os.environ[CACHE_VARIABLE] = str(folder / f"cache-{repeat}-{name}")
            began = time.process_time()
            work()
            if repeat:
                seconds[name].append(time.process_time() - began)
    return seconds


def _write_suite(path: Path) -> Path:
    questions = [
        {
            "messages": [{"role": "user", "content": prompt.format(country.name)}],
            "expected": country.capital,
        }
        for prompt in PROMPTS
        for country in COUNTRIES
    ]
    path.write_text("".join(f"{json.dumps(question)}\n" for question in questions))
    return path


if __name__ == "__main__":
    main()
