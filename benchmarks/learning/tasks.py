"""Tasks of real text, read from a folder that the user names: prompts, and answers to give exactly.

PROTOCOL.md has the commands that fetch that folder. No row that judges has the prompt of a row that
trains or chooses. `geography` is the example's own data set, and needs no folder.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 20_261_124
ALL = 10**6
GEOGRAPHY = Path(__file__).resolve().parents[2] / "examples" / "geography"
CLINC = "oos-eval/data/data_full.json"
BANKING = "task-specific-datasets/banking_data"
RESTAURANT = "task-specific-datasets/span_extraction/restaurant8k"
SHA256 = {
    CLINC: "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0",
    f"{BANKING}/train.csv": "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
    f"{BANKING}/test.csv": "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
    f"{RESTAURANT}/train_0.json": (
        "90cb03e1cdd3ee141829605955a54d946308e1558250ca1e7413f260443bc6a4"
    ),
    f"{RESTAURANT}/test.json": "31dbbb2fa36319f9f1f2c3ed441619ebf6e081f82aefd484b98caf86cd826ab0",
}


@dataclass(frozen=True)
class Row:
    """A user's message and the answer that counts as right."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Splits:
    """The rows that train, those that choose steps, rates and scales, and those that judge."""

    train: tuple[Row, ...]
    choose: tuple[Row, ...]
    judge: tuple[Row, ...]

    def write(self, folder: Path) -> None:
        """Write train.jsonl, and valid.jsonl where there are rows for it, as both programs read."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("train", self.train), ("valid", self.choose)):
            lines = [json.dumps({"prompt": row.prompt, "completion": row.answer}) for row in rows]
            if rows:
                (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Counts:
    """How many rows of each split are taken; a task with fewer has all of them.

    longest: characters of prompt and answer together; longer rows are left out.
    answers: of a task with more different answers to train on, rows of the first ones are taken.
    """

    train: int = 1336
    choose: int = 400
    judge: int = 2000
    longest: int = ALL
    answers: int = ALL


def read_task(name: str, data: Path | None, counts: Counts) -> Splits:
    """The splits of a task, always the same; SystemExit where a file is not the recorded one.

    geography is taken whole.
    """
    folder = data
    if name == "geography":
        folder, counts = GEOGRAPHY, Counts()
    if folder is None:
        raise SystemExit(f"{name} is read from the folder of --data; PROTOCOL.md fetches it.")
    pools = READERS[name](folder)
    answers = set(sorted({row.answer for row in pools[0]})[: counts.answers])
    chance = random.Random(SEED)
    seen = set[str]()
    splits = []
    wanted = (counts.train, counts.choose, counts.judge)
    for rows, count in zip(pools, wanted, strict=True):
        fresh = {
            row.prompt: row
            for row in rows
            if row.prompt not in seen
            and len(row.prompt) + len(row.answer) <= counts.longest
            and (row.answer in answers or counts.answers >= ALL)
        }
        taken = list(fresh.values())
        chance.shuffle(taken)
        splits.append(tuple(taken[:count]))
        seen.update(row.prompt for row in splits[-1])
    return Splits(*splits)


def _checked(data: Path, name: str) -> Path:
    """The file, if its digest is the recorded one."""
    path = data / name
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256[name]:
        raise SystemExit(f"{path} has the SHA-256 {digest}, and PROTOCOL.md was for {SHA256[name]}")
    return path


def _clinc150(data: Path) -> list[list[Row]]:
    """A question to an assistant, and which of 150 intents it has."""
    splits = json.loads(_checked(data, CLINC).read_text(encoding="utf-8"))
    return [
        [Row(text, intent.replace("_", " ")) for text, intent in splits[split]]
        for split in ("train", "val", "test")
    ]


def _banking77(data: Path) -> list[list[Row]]:
    """A customer's question to a bank, and which of 77 intents it has."""
    pools = []
    for split in ("train", "test"):
        with _checked(data, f"{BANKING}/{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = [(line["text"].strip(), line["category"]) for line in csv.DictReader(file)]
        pools.append([Row(text, intent.replace("_", " ")) for text, intent in rows])
    train, test = pools
    return [train, train, test]


def _restaurant8k(data: Path) -> list[list[Row]]:
    """A guest's message with what was asked for, and the slots that it fills, as JSON."""
    train, test = (
        [_slots(line) for line in json.loads(_checked(data, f"{RESTAURANT}/{name}").read_bytes())]
        for name in ("train_0.json", "test.json")
    )
    return [train, train, test]


def _slots(line: dict[str, Any]) -> Row:
    text = line["userInput"]["text"]
    asked = line.get("context", {}).get("requestedSlots", [])
    slots = {}
    for label in line.get("labels", []):
        span = label["valueSpan"]
        slots[label["slot"]] = text[span.get("startIndex", 0) : span["endIndex"]]
    return Row(f"({', '.join(asked)}) {text}", json.dumps(slots, sort_keys=True))


def _geography(data: Path) -> list[list[Row]]:
    """A country to see, and the sentence that names its capital."""
    pools = []
    for name in ("train", "valid"):
        chats = (json.loads(line)["messages"] for line in _lines(data / f"{name}.jsonl"))
        pools.append([Row(user["content"], reply["content"]) for user, reply in chats])
    judge = []
    for line in _lines(data / "held_out.jsonl"):
        question = json.loads(line)
        prompt = question["messages"][0]["content"]
        country = prompt.removeprefix("I want to see ").removesuffix(". Where to?")
        judge.append(Row(prompt, f"Go and see {question['expected']}, the capital of {country}!"))
    return [*pools, judge]


def _lines(path: Path) -> Iterable[str]:
    return path.read_text(encoding="utf-8").splitlines()


READERS: dict[str, Callable[[Path], list[list[Row]]]] = {
    "clinc150": _clinc150,
    "banking77": _banking77,
    "restaurant8k": _restaurant8k,
    "geography": _geography,
}
