"""A case: a folder with base, data and settings, a tool's steps in it, and what they printed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.silent_failures.failures import When

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "examples/geography-base"
GEOGRAPHY = ROOT / "examples/geography"
BROKEN = Path(__file__).with_name("broken")
SECONDS = 1200.0  # of one command
CONTEXT = 512  # positions of the bases made here: tool schemas are longer than the example's 64

Row = dict[str, Any]
Step = (
    str | Callable[["Case"], None]
)  # a method of a tool, or what happens to the folder in between


class StepFailed(Exception):
    """A command ended with an exit code other than 0, so that no step follows it."""


@dataclass(kw_only=True)
class Settings:
    """What a training is asked for, in no tool's words; rates and scales are as mlx_lm has them."""

    iters: int = 40
    rate: float = 1e-3
    batch_size: int = 8
    rank: int = 8
    scale: float = 2.0
    keys: tuple[str, ...] = ()
    full: bool = False
    max_seq_length: int = 64
    masked: bool = True
    all_answers: bool = False
    clip: float = 1.0
    dequantize: bool = False
    loss: str | None = None  # of preferences, as `training.loss` names it
    beta: float = 0.1  # of that loss


@dataclass(frozen=True)
class Run:
    """One command of a tool: what it printed until training began, and from there on."""

    when: When
    command: str
    code: int
    before: str
    after: str

    def parts(self) -> list[tuple[When, str]]:
        """What was printed, with when that was."""
        return [("before", self.before), (self.when, self.after)]


@dataclass(kw_only=True)
class Case:
    """A planted or a healthy folder.

    Attributes:
        folder: where every command runs; it holds `base/` and `data/`.
        steps: what the tool does, in order.
        base: the base that is used with the adapter after training.
        environment: what commands find in their environment beside the machine's.
        answers: what the model answered or chose, where a step asks it.
        went_right: whether the answers show that the tool did the right thing, whatever it printed.
    """

    folder: Path
    settings: Settings = field(default_factory=Settings)
    steps: list[Step] = field(default_factory=list)
    base: str = "base"
    held_out: str = "data/valid.jsonl"
    environment: dict[str, str] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    went_right: Callable[[Case], bool] | None = None
    adapter: Path = field(default_factory=Path)  # where the tool has put it

    def run(self, when: When, command: Sequence[str], first_step: str | None = None) -> None:
        """Run a command in the folder. `first_step` matches the line at which training begins."""
        ended = subprocess.run(
            command,
            cwd=self.folder,
            env=self.all_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
        self.note(when, command, ended.returncode, ended.stdout, first_step)

    def note(
        self,
        when: When,
        command: Sequence[str],
        code: int,
        output: str,
        first_step: str | None = None,
    ) -> None:
        """Keep what a command printed. Raises StepFailed if it failed."""
        output = self._without_paths(output)
        before, after, stage = "", output, when
        if first_step is not None:
            began = re.search(first_step, output, re.MULTILINE)
            before, after = (
                (output[: began.start()], output[began.start() :]) if began else (output, "")
            )
            stage = when if began else "before"
        words = " ".join([Path(command[0]).name, *command[1:]])
        self.runs.append(Run(stage, self._without_paths(words), code, before, after))
        if code != 0:
            raise StepFailed

    def all_environment(self) -> Mapping[str, str]:
        """The machine's environment, with a home that this tool's cases share, without network."""
        home = self.folder.parents[1] / "home"
        home.mkdir(exist_ok=True, mode=0o700)
        own = {
            "HOME": str(home),
            "XDG_CACHE_HOME": f"{home}/.cache",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "200",
            "MLX_DISABLE_COMPILE": "1",  # kernels of tiny models take longer to compile than to run
        }
        return os.environ | own | self.environment

    def _without_paths(self, text: str) -> str:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
        return (
            re.sub(r"/[^\s'\"]*/site-packages/", "", plain)
            .replace(f"{self.folder}/", "")
            .replace(str(self.folder), ".")
            .replace(f"{ROOT}/", "")
        )

    def break_library(self, what: str) -> None:
        """Let commands find a function of a shared library replaced (broken/sitecustomize.py)."""
        self.environment |= {"PYTHONPATH": str(BROKEN), "SILENT_FAILURE": what}

    # Data

    def write_rows(self, train: Sequence[Row], valid: Sequence[Row]) -> None:
        """Write data/train.jsonl and data/valid.jsonl."""
        for split, rows in (("train", train), ("valid", valid)):
            self.write_file(f"data/{split}.jsonl", rows)

    def write_file(self, name: str, rows: Sequence[Row]) -> None:
        """Write rows to a file of the folder, one a line."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")

    # Base

    def write_base(self, name: str = "base", template: str | None = None) -> Path:
        """Copy the tiny example base, with another chat template if one is given."""
        folder = self.folder / name
        shutil.copytree(BASE, folder)
        edit_json(folder / "config.json", max_position_embeddings=CONTEXT)
        edit_json(folder / "tokenizer_config.json", model_max_length=CONTEXT)
        if template is not None:
            edit_json(folder / "tokenizer_config.json", chat_template=template)
        return folder

    def edit_weights(self, folder: Path, edit: Callable[[str, mx.array], mx.array]) -> None:
        """Replace each tensor of a base by what `edit` gives for its name and value."""
        edit_tensors(folder / "model.safetensors", lambda name, array: (name, edit(name, array)))


def edit_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    held = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(held | values, indent=1), encoding="utf-8")


def edit_tensors(path: Path, edit: Callable[[str, mx.array], tuple[str, mx.array]]) -> None:
    """Replace names and values of a safetensors file's tensors."""
    loaded: Any = mx.load(str(path), return_metadata=True)
    tensors, metadata = loaded
    edited = dict(edit(name, array) for name, array in tensors.items())
    mx.eval(edited)
    mx.save_safetensors(str(path), edited, metadata)


def geography(split: str) -> list[Row]:
    """The rows of the example: 40 to train on, 10 held out."""
    return [
        json.loads(line) for line in (GEOGRAPHY / f"{split}.jsonl").read_text("utf-8").splitlines()
    ]


def capitals(split: str) -> list[tuple[str, str]]:
    """Country and capital of each of the example's rows."""
    found = (
        re.search(r"see (.+), the capital of (.+)!", row["messages"][1]["content"])
        for row in geography(split)
    )
    return [(match[2], match[1]) for match in found if match]


def chat(*turns: tuple[str, str], **fields: Any) -> Row:
    """A row of turns, each a role and its content."""
    return {"messages": [{"role": role, "content": content} for role, content in turns], **fields}
