"""README's commands for own data on SmolLM2-135M-Instruct: from `init` to a served champion."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer

from tests.example import DATA
from tests.real.conftest import MODEL, PROGRAM, ROOT, Project
from tests.waiting import wait_until

pytestmark = pytest.mark.real

NAME = "support-bot"
QUESTIONS = 4
ASKED = "I want to see Norway. Where to?"
SHORT = {"iters": 8, "batch_size": 2, "save_every": 2, "steps_per_eval": 4, "steps_per_report": 2}


@pytest.fixture(scope="module")
def configured(project: Project) -> Project:
    """The data in a folder of the project, and the file that `init` writes of it, made short."""
    shutil.copytree(DATA, project.folder / "data")
    questions = (DATA / "held_out.jsonl").read_text().splitlines()[:QUESTIONS]
    (project.folder / "questions.jsonl").write_text("\n".join(questions) + "\n")
    (project.folder / "data" / "held_out.jsonl").unlink()
    project.run("init", "--data", "data", "--model", MODEL, "-o", "lora.yaml")
    settings: dict[str, Any] = yaml.safe_load((project.folder / "lora.yaml").read_text())
    del settings["training"]["epochs"]
    task = {"name": "capitals", "file": "questions.jsonl", "score": "contains", "max_tokens": 16}
    settings |= SHORT
    settings["training"] |= {"evaluate_tasks": ["capitals"], "select_by": "capitals"}
    settings["gate"] |= {"tasks": [task]}
    settings["registry"] = {"path": "registry", "name": NAME}
    settings["continual"] = {"from": "champion"}
    (project.folder / "short.yaml").write_text(yaml.safe_dump(settings))
    return project


@pytest.fixture(scope="module")
def trained(configured: Project) -> dict[str, Any]:
    """The result of a run that was killed after a checkpoint, and resumed."""
    words = ("train", "-c", "short.yaml", "--run-dir", "runs/first", "--json")
    process = configured.start(*words)
    run = configured.folder / "runs" / "first"
    wait_until(lambda: any((run / "checkpoints").glob("*")), "a checkpoint", process)
    os.kill(process.pid, signal.SIGKILL)
    killed = configured.end(process, *words)
    assert killed.code == -signal.SIGKILL
    result: dict[str, Any] = configured.run(*words, "--resume").document
    return result


@pytest.fixture(scope="module")
def champion(configured: Project, trained: dict[str, Any]) -> str:
    """The run's adapter as the champion of a name; its version."""
    version: str = configured.run("promote", "runs/first", "--name", NAME, "--json").document[
        "version"
    ]
    return version


def read_losses(run: Path) -> dict[int, float]:
    """The validation loss by step, of a run's metrics."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["val_loss"] for row in rows if row.get("val_loss") is not None}


def test_the_file_of_init_is_valid_and_its_run_is_forecast(configured: Project) -> None:
    checked = configured.run("validate", "-c", "lora.yaml", "--json").document
    assert checked["splits"]["train"]["rows"] == 40
    forecast = configured.run("explain", "-c", "short.yaml", "--json").document
    gigabytes = re.search(r"([\d.]+) GB", forecast["memory"])
    assert gigabytes is not None
    assert 0.5 < float(gigabytes[1]) < 3


def test_a_killed_training_goes_on_and_its_adapter_is_better(configured, trained) -> None:
    assert (trained["step"], trained["verdict"]) == (8, "passed")
    losses = read_losses(configured.folder / "runs" / "first")
    assert sorted(losses) == [0, 4, 8]
    assert losses[8] < losses[0] - 0.5
    assert trained["adapter_step"] in (4, 8)  # the one whose answers are best


def test_a_champion_answers_in_chat_as_mlx_lm_does_with_its_adapter(configured, champion) -> None:
    place = f"registry/{NAME}"
    said = configured.run("chat", place, "--prompt", ASKED, "--max-tokens", 16)
    assert answer_of_mlx_lm(configured, f"{place}/champion") in said.output


def answer_of_mlx_lm(project: Project, adapter: str) -> str:
    """What mlx_lm.generate answers with an adapter, 16 tokens at most."""
    command = [str(PROGRAM.with_name("mlx_lm.generate")), "--model", str(MODEL), "--prompt", ASKED]
    options = ["--adapter-path", adapter, "--max-tokens", "16", "--verbose", "False"]
    done = subprocess.run(
        [*command, *options], cwd=project.folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@contextmanager
def serving(project: Project) -> Iterator[str]:
    """The address of `serve`, whose log is in the project's folder."""
    process = project.start("serve", "--name", NAME, "--port", "0")
    log = project.folder / "err"
    try:
        wait_until(lambda: " at http" in log.read_text(), log.read_text, process)
        found = re.search(r" at (http://127\.0\.0\.1:\d+)", log.read_text())
        assert found is not None
        yield found[1]
    finally:
        process.kill()
        project.end(process, "serve")


def test_openais_client_is_answered_as_chat_is_whole_and_streamed(configured, champion) -> None:
    import openai  # takes half a second, and all tests are collected each time

    asked: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": ASKED}],
        "max_tokens": 16,
        "temperature": 0,
    }
    with (
        serving(configured) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        whole = client.chat.completions.create(**asked)
        pieces = list(client.chat.completions.create(**asked, stream=True))
    assert whole.system_fingerprint == champion
    text = str(whole.choices[0].message.content)
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert streamed == text
    assert text.strip() == answer_of_mlx_lm(configured, f"registry/{NAME}/champion")


def test_base_adapter_and_exports_answer_the_same_questions(configured, champion) -> None:
    """Exports end with 0 only where a new process reads of them what the adapter does."""
    fused = configured.run("export", f"registry/{NAME}", "--fused", "fused", "--json").document
    gguf = configured.run("export", f"registry/{NAME}", "--gguf", "model.gguf", "--json").document
    for record in (fused, gguf):
        assert record["problems"] == []
        gain = record["gain"]
        assert gain["interval"][1] <= 0.1 * (gain["base"] - gain["adapter"])
    asked = ("--suite", "questions.jsonl", "--max-tokens", "16", "--json")
    told = configured.run("evaluate", "runs/first", "fused", "model.gguf", *asked).document
    assert len(told["answers"]) == QUESTIONS
    for question in told["answers"]:
        answers = question["answers"]
        assert answers["fused"] == answers["model.gguf"] == answers["runs/first"] != answers["base"]


def test_a_gguf_encodes_the_200_texts_as_the_model_does(
    configured: Project, champion: str, tmp_path: Path
) -> None:
    from nested_core.rooms.export.gguf.gguf_file import unpack_gguf

    unpack_gguf(configured.folder / "model.gguf", tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    reference = json.loads((ROOT / "benchmarks" / "real_model" / "reference.json").read_text())
    for expected in reference["texts"]:
        ids = tokenizer.encode(expected["text"], add_special_tokens=False).ids
        assert ids == expected["ids"], expected["text"]


def test_a_night_is_skipped_without_new_rows_and_goes_on_from_the_champion_with_some(
    configured: Project, champion: str
) -> None:
    words = ("train", "-c", "short.yaml", "--json", "--run-dir")
    idle = configured.run(*words, "runs/idle").document
    assert idle["skipped"]["version"] == champion
    rows = (DATA / "held_out.jsonl").read_text().splitlines()[QUESTIONS:]
    answered = [json.loads(row) for row in rows]
    with (configured.folder / "data" / "train.jsonl").open("a") as file:
        for row in answered:
            file.write(json.dumps(as_example(row)) + "\n")
    # At init's rate, which is for a new adapter, the gate refused these 8 steps: 0.26 -> 0.34.
    night = configured.run(*words, "runs/night", "--learning-rate", "1e-5").document
    assert night["verdict"] == "passed"
    first = read_losses(configured.folder / "runs" / "first")
    losses = read_losses(configured.folder / "runs" / "night")
    assert abs(losses[0] - first[trained_step(configured)]) < 0.02  # it began with the champion


def trained_step(project: Project) -> int:
    """The step whose adapter the first run offered."""
    step: int = json.loads((project.folder / "runs/first/result.json").read_text())["adapter_step"]
    return step


def as_example(question: dict[str, Any]) -> dict[str, Any]:
    """A row of training data of a question, with the answer that the other rows would give."""
    (asked,) = question["messages"]
    country = asked["content"].removeprefix("I want to see ").removesuffix(". Where to?")
    answer = f"Go and see {question['expected']}, the capital of {country}!"
    return {"messages": [asked, {"role": "assistant", "content": answer}]}
