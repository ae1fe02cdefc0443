"""Mistakes that people make, each with its exit code and the words that say what to do.

A row is one mistake: files as somebody left them, the command, and what the message has to hold.
Every message is one paragraph without a traceback, is never "unexpected", and its lines break at
80 columns without cutting a word. What is not here has a test of its own: a wrong command line and
paths that cannot be used (test_cli_usage, test_unusable_paths), a line of data of every kind
(test_bad_lines), a run in use (test_run_directory), a quantised base with `full`
(test_training_full), an adapter of another base (test_training_lora, test_changed_base), a server
that does not answer (test_cli_usage, deploy/test_command). The run's own server takes a free port,
so none is in use already.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nested_core.seams import is_there
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.example import MODEL
from tests.flows.conftest import Ended, called

YAML = f"""\
model: {MODEL}
data: data
num_layers: -1
batch_size: 2
iters: 4
learning_rate: 1e-3
mask_prompt: true
lora_parameters: {{rank: 4, scale: 2.0, dropout: 0.0}}
"""
TRAIN = ("train", "-c", "lora.yaml", "--run-dir", "run")
VALIDATE = ("validate", "-c", "lora.yaml", "--no-tokenize")
TRAIN_FILE = "data/train.jsonl"
COLUMNS = 80


def as_lines(*rows: Mapping[str, object]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def chats(count: int, first: int = 0) -> str:
    """Different examples in one of the README's formats."""
    return as_lines(
        *(
            {
                "messages": [
                    {"role": "user", "content": f"Where is town {number}?"},
                    {"role": "assistant", "content": f"In land {number}."},
                ]
            }
            for number in range(first, first + count)
        )
    )


def changed(old: str, new: str) -> str:
    """The configuration with one thing else."""
    assert old in YAML
    return YAML.replace(old, new)


@dataclass(frozen=True)
class Mistake:
    """A mistake: what is different from a folder where all is well, and what has to be said.

    FOLDER in `says` stands for the folder that the command runs in.
    """

    says: tuple[str, ...]
    code: int = 2
    yaml: str = YAML
    arguments: tuple[str, ...] = TRAIN
    files: dict[str, str | bytes | None] = field(default_factory=dict)  # None: not there
    prepare: Callable[[Path], object] = lambda folder: None


TOLD_OF_INIT = "; `nested-tune init` takes the names of your columns" if is_there("tables") else ""


def data_mistake(content: str | bytes, *says: str, code: int = 3) -> Mistake:
    """A train.jsonl with something wrong."""
    return Mistake(says, code, files={TRAIN_FILE: content}, arguments=TRAIN)


def yaml_mistake(yaml: str, *says: str) -> Mistake:
    """A configuration with something wrong."""
    return Mistake(says, yaml=yaml)


def begin_other_run(folder: Path) -> None:
    """A run with another learning rate, that can be gone on with."""
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(changed("1e-3", "1e-5"))
    (folder / "run" / "tiers.json").write_text("{}")


def begin_run(folder: Path) -> None:
    """A run that ended before it could train."""
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(YAML)


def register_one(folder: Path) -> None:
    """A registry with a single version, the champion."""
    run = write_run(folder / "other", 1)
    version = register(run, folder / "registry", "bot", {"seed": 1})
    promote(folder / "registry", "bot", version, by="ann")


def write_file(folder: Path) -> None:
    """A file where a folder is needed."""
    (folder / "disk").touch()


MISTAKES: dict[str, Mistake] = {
    # The model
    "a model's path that is not there": yaml_mistake(
        changed(str(MODEL), "./models/llama"),
        "model: './models/llama' is no local directory: FOLDER/models/llama does not exist",
        "such as mlx-community/Qwen3-0.6B-4bit",
    ),
    "no model given": yaml_mistake(
        changed(f"model: {MODEL}\n", ""), "No model given in lora.yaml", "Give --model MODEL"
    ),
    "a folder that holds no model": yaml_mistake(
        changed(str(MODEL), "./data"), "no tokenizer could be loaded from", "Expected the model's"
    ),
    "no MLX for this machine": Mistake(
        ("MLX cannot be imported", "pip install 'nested-tune[cpu]' or 'nested-tune[cuda]'")
    ),
    # The data
    "a data folder that is not there": yaml_mistake(
        changed("data: data", "data: ./dataset"),
        "data: './dataset' is not a folder here: FOLDER/dataset does not exist. Expected",
    ),
    "no train.jsonl": Mistake(
        (
            "train.jsonl: missing-train-file: there is none in FOLDER/data, which holds "
            "valid.jsonl; name the file to train on train.jsonl",
        ),
        code=3,
        files={TRAIN_FILE: None},
    ),
    "a file of another kind in the place of the folder": Mistake(
        ("FOLDER/data/train.txt is a file. Expected one with train.jsonl (or",),
        yaml=changed("data: data", "data: data/train.txt"),
        files={"data/train.txt": "prompt,completion\na,b\n"},
    ),
    "a CSV with other columns": Mistake(
        ("train.csv:2: unknown-format", "set prompt_feature: question and completion_feature: ans"),
        code=3,
        files={TRAIN_FILE: None, "data/train.csv": "question,answer\n" + "a,b\nc,d\n"},
    ),
    "JSON lines in a file of another name": Mistake(
        (
            "is rejected: 1 error in 1 line.",
            "train.json:1: damaged-file: expected an array of objects, [{...}, ...], found '{'; "
            "name a file with an object a line .jsonl",
        ),
        code=3,
        files={TRAIN_FILE: None, "data/train.json": chats(8)},
    ),
    "too few rows, one of them with an error": Mistake(
        ("it holds 3 of the 64 rows that fill one batch (1 with an error); lower batch_size",),
        code=3,
        yaml=changed("batch_size: 2", "batch_size: 64"),
        files={TRAIN_FILE: chats(2) + "{\n"},
    ),
    "fields of no known name": data_mistake(
        as_lines(*({"foo": str(n), "bar": "b"} for n in range(4))),
        "train.jsonl:1: unknown-format: expected 'prompt' and 'completion', 'messages', 'text', "
        "'conversations' or 'instruction' and 'output'; found foo, bar"
        f"{TOLD_OF_INIT} (and 3 more: lines 2, 3, ...)",
    ),
    "Alpaca's format with more in it": data_mistake(
        as_lines(*({"instruction": f"{n}?", "notes": "Do so.", "output": "No"} for n in range(3))),
        "training would leave out what is in notes;",
        "drop_fields: [notes] leaves it out on purpose",
    ),
    "preference pairs": data_mistake(
        as_lines(*({"prompt": f"{n}?", "chosen": "Yes", "rejected": "No"} for n in range(3))),
        "chosen and rejected are preference pairs: to train on both, set training.loss: dpo; to",
    ),
    "UTF-16 without its mark": data_mistake(
        chats(4).encode("utf-16-le"),
        "train.jsonl:1: nul-character: a NUL byte at column 2; ",
        "the file is UTF-16: save it as UTF-8",
    ),
    "a trailing comma": data_mistake(
        chats(4) + '{"text": "a",}\n',
        "train.jsonl:5: bad-json: not valid JSON at column 14: trailing comma",
    ),
    "an empty file": data_mistake("", "train.jsonl: empty-file: it holds no example"),
    "a line too long for max_seq_length": data_mistake(
        chats(4)
        + as_lines(
            {
                "messages": [
                    {"role": "user", "content": "a " * 3000},
                    {"role": "assistant", "content": "b"},
                ]
            }
        ),
        "train.jsonl:5: no-supervised-token:",
        "shorten the prompt or take a model that sees more than",
    ),
    # The configuration
    "a word for a number": yaml_mistake(
        changed("iters: 4", "iters: many"), "iters: ", "integer; found 'many' (line 5)"
    ),
    "a number out of range": yaml_mistake(
        changed("rank: 4", "rank: 0"),
        "lora_parameters.rank: Input should be greater than 0; found 0 (line 8)",
    ),
    "a text for a list": yaml_mistake(
        changed("{rank: 4", "{keys: q_proj, rank: 4"),
        "lora_parameters.keys: Input should be a list; found 'q_proj' (line 8)",
    ),
    "a tab": yaml_mistake(
        f"{YAML}nested:\n\tfrequencies: [1, 2]\n",
        "line 10, column 1: a tab; YAML is indented with spaces alone",
    ),
    "a module that LoRA does not find": yaml_mistake(
        changed("{rank: 4", "{keys: [q_proj], rank: 4"),
        "No module is named q_proj; did you mean self_attn.q_proj?",
    ),
    "a list for a section": yaml_mistake(
        f"{YAML}nested: [1, 2, 4]\n",
        "nested: expected keys with their values, not a list; did you mean {frequencies: [1, 2, "
        "4]}?",
    ),
    "a list without its brackets": yaml_mistake(
        f"{YAML}nested: {{frequencies: '1,2,4'}}\n", "did you mean [1,2,4]?"
    ),
    "a word that is nearly a choice": yaml_mistake(
        f"{YAML}gate: {{tasks: [{{name: a, file: q.jsonl, score: contians}}]}}\n",
        "gate.tasks.0.score",
        "did you mean contains?",
    ),
    "an adapter for a model": Mistake(
        ("is an adapter, not a model. Give its base as model",),
        yaml=changed(str(MODEL), "other/adapter"),
        prepare=register_one,
    ),
    "a GGUF file for a model": Mistake(
        ("is a GGUF file, which mlx-lm does not train",),
        yaml=changed(str(MODEL), "base/x.gguf"),
        files={"base/x.gguf": "GGUF"},
    ),
    "a suite with other keys": Mistake(
        ("there is no such key in a question of this score", "expected `prompt` (or `messages`)"),
        code=3,
        yaml=f"{YAML}gate: {{tasks: [{{name: a, file: q.jsonl, score: contains}}]}}\n",
        files={"q.jsonl": as_lines({"question": "Where?", "answer": "Here"})},
    ),
    "a tier that is never due": yaml_mistake(
        f"{YAML}nested: {{frequencies: [1, 8]}}\n",
        "Tier 1 updates every 8 optimizer steps, but the run has only 4",
        "Raise iters or lower nested.frequencies",
    ),
    # Runs
    "a run folder with a run in it": Mistake(
        ("run is not empty. A run is never written over: add --resume to continue it",),
        prepare=begin_other_run,
    ),
    "a run folder of an attempt that failed": Mistake(
        ("ended before it could train: add --resume to begin it again, also with a corrected",),
        prepare=begin_run,
    ),
    "resuming with another configuration": Mistake(
        (
            "run cannot be resumed with a configuration that differs from its config.yaml:",
            "learning_rate",
        ),
        arguments=(*TRAIN, "--resume"),
        prepare=begin_other_run,
    ),
    "a folder that cannot be written": Mistake(
        ("disk/run", "give another"),
        arguments=("train", "-c", "lora.yaml", "--run-dir", "disk/run"),
        prepare=write_file,
    ),
    "report of no run": Mistake(
        ("runs/first is not a run directory: it has no config.yaml",),
        arguments=("report", "runs/first"),
    ),
    # The registry, and deployments
    "promoting a run that was not judged": Mistake(
        (
            "If it trains, let it end. If it was stopped, resume it. Continue with the same",
            "command, --run-dir run --resume.",
        ),
        arguments=("promote", "run", "--name", "bot"),
        prepare=begin_other_run,
    ),
    "rolling back with nothing left": Mistake(
        ("has no version to go back to", "Name the version that you want with --to"),
        arguments=("rollback", "bot"),
        prepare=register_one,
    ),
    "a slash in a registry's name": yaml_mistake(
        f"{YAML}registry: {{path: registry, name: team/bot}}\n",
        "registry.name: 'team/bot' is not a name for an adapter. Expected 1 to 64 letters",
        "(line 9)",
    ),
}
if not is_there("tables"):
    del MISTAKES["a CSV with other columns"], MISTAKES["JSON lines in a file of another name"]


def make_folder(folder: Path, mistake: Mistake) -> None:
    """A folder where all is well, but for the mistake."""
    sound = {
        "lora.yaml": mistake.yaml,
        TRAIN_FILE: chats(8),
        "data/valid.jsonl": chats(2, first=90),
    }
    for name, content in (sound | mistake.files).items():
        if content is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    mistake.prepare(folder)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_with_what_to_do(name, tmp_path, monkeypatch) -> None:
    mistake = MISTAKES[name]
    make_folder(tmp_path, mistake)
    if name == "no MLX for this machine":
        monkeypatch.setitem(sys.modules, "mlx.core", None)
    done = called(*mistake.arguments, cwd=tmp_path)
    message = " ".join(done.message().split())
    assert done.code == mistake.code, message
    for words in mistake.says:
        assert words.replace("FOLDER", str(tmp_path)) in message
    assert "unexpected" not in message
    require_fits(done.message().replace(str(tmp_path), ""))


def require_fits(text: str) -> None:
    """No word but a path is as wide as the terminal, and a paragraph has at most 14 lines there."""
    lines = [
        part
        for line in text.splitlines()
        for part in textwrap.wrap(line, COLUMNS, break_long_words=False, break_on_hyphens=False)
    ]
    assert len(lines) <= 14
    assert [line for line in lines if len(line) > COLUMNS and "/" not in line] == []


def test_what_is_no_mistake_is_taken(tmp_path: Path) -> None:
    """A byte-order mark and CRLF are warned of; a rate in quotes is a number."""
    content = ("\ufeff" + chats(8)).replace("\n", "\r\n")
    quoted = changed("1e-3", '"1e-5"')
    make_folder(tmp_path, Mistake((), yaml=quoted, files={TRAIN_FILE: content}))
    done = called(*VALIDATE, "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    warned = {found["check"] for found in done.document["findings"] if found["line"] == 1}
    assert {"byte-order-mark", "crlf"} <= warned


@pytest.mark.parametrize(
    ("flags", "said"), [((), "the run has 2 epochs: iters is not used"), (("--iters", "6"), None)]
)
def test_of_epochs_and_iters_the_one_that_decides_is_named_and_a_flag_wins(
    flags: tuple[str, ...], said: str | None, tmp_path: Path
) -> None:
    make_folder(tmp_path, Mistake((), yaml=f"{YAML}training: {{epochs: 2}}\n"))
    done: Ended = called(*VALIDATE, *flags, cwd=tmp_path)
    assert done.code == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "iters" in line]
    assert lines == ([] if said is None else [said])


def test_a_validation_set_by_another_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(chats(8))
    (tmp_path / "data" / "held.jsonl").write_text(chats(4, 20))
    (tmp_path / "lora.yaml").write_text(YAML)
    done = called(*VALIDATE, "--json", cwd=tmp_path)
    assert done.code == 0
    (told,) = [f for f in json.loads(done.stdout)["findings"] if f["check"] == "no-validation-set"]
    assert "which holds held.jsonl, train.jsonl" in told["message"]
    assert "name the file valid.jsonl" in told["message"]
