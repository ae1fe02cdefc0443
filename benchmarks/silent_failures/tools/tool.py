"""What a tool is to the bench: a method a step, each of which runs the tool's own commands."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.silent_failures.cases import Case
from benchmarks.silent_failures.failures import LISTS

ANSWER_TOKENS = 40
START_SECONDS = 120.0  # of a server
TURN_LOSSES = Path(__file__).with_name("turn_losses.py")


class NotApplicable(Exception):
    """The tool has no such step, or the code to be broken is its own; says which."""


class NotRun(Exception):
    """The tool does not begin on this machine; says why, in its words."""


class Tool:
    """A tool that lacks a step leaves its method as it is here.

    Steps that judge are passed over where a tool has none; a failure that needs a step which the
    tool lacks is not applicable to it.

    Attributes:
        name: as it is installed.
        backend: which part of it is run, where it has several.
        checks: what it documents to check data, training or adapters; all of it is switched on.
        lists: the lists of failures that its steps have commands for.
        packages: those whose versions are noted, its own first.
        python: the interpreter of its environment.
        own_code: failures for which the code that has to be broken is the tool's own.
        lacks: why a failure is not applicable, by its name, where no step of it says so.
        does_not_begin: why no step of it runs on this machine, in its own words.
        environment: what its commands find in their environment beside the machine's.
    """

    name: str
    backend: str = ""
    checks: str
    lists: tuple[str, ...] = LISTS[:1]
    packages: tuple[str, ...]
    own_code: frozenset[str] = frozenset()
    lacks: Mapping[str, str] = MappingProxyType({})
    does_not_begin: str = ""
    environment: Mapping[str, str] = MappingProxyType({})

    def __init__(self, python: str = sys.executable) -> None:
        self.python = python

    @cache  # noqa: B019 -- a tool lives as long as the program
    def version(self) -> str:
        """The versions of the packages in the tool's environment, its own first."""
        code = "import importlib.metadata as m, sys; print(*(m.version(p) for p in sys.argv[1:]))"
        command = [self.python, "-c", code, *self.packages]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return ", ".join(
            f"{name} {number}" for name, number in zip(self.packages, shown, strict=True)
        )

    def check(self, case: Case) -> None:
        """Judge the data before training."""

    def train(self, case: Case) -> None:
        """Train, and set `case.adapter`."""
        raise NotImplementedError

    def judge(self, case: Case) -> None:
        """Judge the adapter that lies in `case.adapter` with `case.base`."""

    def use(self, case: Case) -> None:
        """Take the adapter into use: promote it, or load it and ask."""
        raise NotImplementedError

    def release(self, case: Case) -> None:
        """Put the adapter where a server takes it from."""

    def choose(self, case: Case) -> None:
        """Append to `case.answers` what training did to the loss of each turn of choices.jsonl.

        By plain mlx_lm: no command of the tool, so that nothing of it is noticed.
        """
        command = [sys.executable, "-P", str(TURN_LOSSES), case.base, str(case.adapter)]
        case.answers.append(read_output(case, [*command, "choices.jsonl"]))

    def evaluate(self, case: Case) -> None:
        """Measure the adapter on the rows of `case.held_out`."""
        raise NotApplicable("it has no command that evaluates an adapter on a file of rows")

    def fuse(self, case: Case) -> None:
        """Fuse the adapter into `case.base`, as a folder `fused` (`fused-2` the second time)."""
        raise NotApplicable("it fuses no adapters")

    def gguf(self, case: Case) -> None:
        """Write base and adapter as a GGUF."""
        raise NotApplicable("it writes no GGUF")

    def serve(self, case: Case) -> None:
        """Serve the adapter, and ask once."""
        raise NotApplicable("it has no server")

    def train_later(self, case: Case) -> None:
        """Train another adapter on `later/`."""
        raise NotApplicable("it has no server")

    def serve_and_replace(self, case: Case) -> None:
        """Serve, ask, replace the adapter by the later one, and ask again."""
        raise NotApplicable("it has no server")

    def train_half(self, case: Case) -> None:
        """Train half of the steps, with a checkpoint at the end."""
        raise NotApplicable("it cannot resume")

    def resume(self, case: Case) -> None:
        """Go on from the checkpoint to all steps."""
        raise NotApplicable("it cannot resume")

    def lose_optimizer_state(self, case: Case) -> None:
        """Remove the optimizer's state from the checkpoint; nothing, if it never has one."""

    def tear_checkpoint(self, case: Case) -> None:
        """Cut the newest checkpoint's weights in the middle."""
        raise NotApplicable("it cannot resume")

    def train_over_it(self, case: Case) -> None:
        """Train again, and write where the adapter in use lies."""
        raise NotImplementedError

    def train_beside_it(self, case: Case) -> None:
        """Train again, and write elsewhere."""
        raise NotImplementedError


def make_mlx_lm_keys(case: Case, data: str = "data") -> dict[str, Any]:
    """The settings in the keys of mlx_lm.lora's configuration, which other tools took over."""
    settings = case.settings
    lora: dict[str, Any] = {"rank": settings.rank, "scale": settings.scale, "dropout": 0.0}
    if settings.keys:
        lora["keys"] = list(settings.keys)
    return {
        "model": "base",
        "data": data,
        "num_layers": -1,
        "batch_size": settings.batch_size,
        "iters": settings.iters,
        "learning_rate": settings.rate,
        "max_seq_length": settings.max_seq_length,
        "mask_prompt": settings.masked,
        "val_batches": -1,
        "steps_per_report": 10,
        "steps_per_eval": 20,
        "save_every": 20,
        "lora_parameters": lora,
    }


def name_fine_tune_type(case: Case) -> str:
    """`full` or `lora`, as mlx_lm.lora calls them."""
    return "full" if case.settings.full else "lora"


def first_question(case: Case) -> str:
    """The user's text in the first training row."""
    with (case.folder / "data/train.jsonl").open(encoding="utf-8") as rows:
        turns = json.loads(next(rows))["messages"]
    return next(str(turn["content"]) for turn in turns if turn["role"] == "user")


def read_output(case: Case, command: Sequence[str]) -> str:
    """What a command that is none of a tool's prints in a case's folder."""
    ended = subprocess.run(
        command,
        cwd=case.folder,
        env=case.all_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout


def cut_in_half(path: Path) -> None:
    """Keep the first half of a file's bytes."""
    held = path.read_bytes()
    path.write_bytes(held[: len(held) // 2])


@contextlib.contextmanager
def served(case: Case, command: Sequence[str]) -> Iterator[Callable[[], str]]:
    """A server of OpenAI's API that runs `command` with `--port N`; gives a function that asks it.

    What it printed is noted when it ends, with the exit code 1 if it never answered.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = case.folder / "server.log"
    code = 1
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=case.folder,
            env=case.all_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            if wait_until_up(process, f"{url}/v1/models"):
                code = 0
                yield lambda: ask_server(case, url)
            else:
                yield lambda: ""
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
    case.note(
        "use", command, code, log.read_text("utf-8", errors="replace").replace(f":{port}", ":PORT")
    )


def wait_until_up(process: subprocess.Popen[bytes], url: str) -> bool:
    """Whether the server answers before it ends, within START_SECONDS."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 -- http on this machine
            return True
        time.sleep(0.2)
    return False


def ask_server(case: Case, url: str) -> str:
    """The answer to the first training row's question, which is kept in `case.answers` too."""
    body = {
        "messages": [{"role": "user", "content": first_question(case)}],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
    }
    request = urllib.request.Request(  # noqa: S310
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
            answer = str(json.load(response)["choices"][0]["message"].get("content"))
    except urllib.error.HTTPError as error:
        answer = f"{error.code}: {error.read().decode(errors='replace')}"
    case.answers.append(answer)
    return answer
